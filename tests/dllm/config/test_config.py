"""The configuration: reading, refusals, and their messages."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dllm.config import reading
from dllm.config.fields import settings_of
from dllm.config.reading import load_config, read_foreign_keys
from dllm.config.schema import GROUPS, Config, DataGroup, ModelGroup, TrainGroup
from dllm.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path
    return write


def refusal(*flags, path=None) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, ["--train.output_dir=out", *flags])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_flags_win_over_the_file_and_the_file_over_defaults(write):
    path = write("train: {output_dir: out, lr: 2e-4, seed: 7}\ndata: {max_seq_len: 128}")
    config = load_config(path, ["--train.lr=1e-3", "--data.train_path", "some/folder"])
    assert (config.train.lr, config.train.seed, config.data.max_seq_len) == (1e-3, 7, 128)
    assert config.data.train_path == "some/folder"
    assert config.train.lr_min == TrainGroup(output_dir="x").lr_min


@pytest.mark.parametrize("flag, value", [("data.train_size=1_000_000", 10**6), ("data.train_size=1e12", 10**12),
                                         ("train.max_steps=null", None), ("train.auto_resume=false", False),
                                         ("train.lr=3.0e-4", 3e-4), ("data.train_path=123", "123"),
                                         ("data.train_path=", None)])
def test_values_become_the_type_of_their_field(flag, value):
    group, name = flag.split("=")[0].split(".")
    got = getattr(getattr(load_config(None, ["--train.output_dir=out", f"--{flag}"]), group), name)
    assert got == value and type(got) is type(value)


def test_yaml_of_a_configuration_reads_back_equal(write):
    config = Config(train=TrainGroup(output_dir="out", lr=1e-3, max_minutes=0.5, muon_lr=None),
                    model=ModelGroup(hidden_size=64), data=DataGroup(train_path="a, b"))
    assert load_config(write(config.to_yaml())) == config
    assert config.data.path_list == ["a", "b"]


@pytest.mark.parametrize("flag, hint", [
    ("--data.max_seq_length=8", "did you mean data.max_seq_len?"),
    ("--train.max_seq_len=8", "did you mean data.max_seq_len?"), ("--trian.lr=1", "did you mean train.lr?"),
    ("--train.optimiser=muon", "did you mean train.optimizer?"), ("--lr=1", "did you mean train.lr?"),
    ("--train.learning_rate=1", "did you mean train.lr?"), ("--train.bf16=true", "did you mean train.precision?"),
    ("--model_name_or_path=x", "did you mean model.model_path?")])
def test_an_unknown_key_names_the_nearest_valid_one(flag, hint):
    message = refusal(flag)
    assert flag.split("=")[0].removeprefix("--") in message and hint in message


def test_hints_name_keys_that_there_are():
    for meant in reading._FOREIGN_NAMES.values():
        group, name = meant.split(".")
        assert name in settings_of(reading.GROUPS[group])


@pytest.mark.parametrize("flags, parts", [
    (["--train.lr=0"], ["train.lr", "above 0", "0.0"]),
    (["--train.micro_batch_size=-1"], ["train.micro_batch_size", "-1"]),
    (["--data.max_seq_len=1"], ["data.max_seq_len", "at least 2"]),
    (["--data.validation_share=1"], ["data.validation_share", "below 1"]),
    (["--train.global_batch_size=6", "--train.micro_batch_size=4"], ["multiple of micro_batch_size 4", "6"]),
    (["--train.objective=mlm"], ["mdm, elbo, block_diffusion, cart, expansion, edit, uniform, canvas, ar", "mlm"]),
    (["--train.objective=expansion", "--train.expand_token_id=7", "--train.schedule=cosine"], ["linear, not cosine"]),
    (["--train.objective=block_diffusion"], ["train.block_length=32", "need each other"]),
    (["--train.block_length=32"], ["train.block_length", "need each other", "the objective is mdm"]),
    (["--train.expand_token_id=7"], ["train.expand_token_id", "need each other"]),
    (["--train.eval_tasks=humaneval '"], ["train.eval_tasks", "no closing quotation", "humaneval --limit 20"]),
    (["--train.objective=elbo", "--train.corrupt_prompt=true"], ["corrupt_prompt", "mdm", "elbo"]),
    (["--train.objective=ar", "--train.path_term=true"], ["path_term", "mdm"]),
    (["--train.objective=elbo", "--train.mask_at_least_one=true"], ["mask_at_least_one", "mdm", "bias the bound"]),
    (["--train.objective=ar", "--train.repr_align_wt=10"], ["repr_align_wt 10.0", "mdm or elbo"]),
    (["--train.objective=elbo", "--train.masked_share=1"], ["masked_share 1.0", "block_diffusion", "bias the bound"]),
    (["--train.ulysses_parallel_size=2", "--train.repr_align_wt=10"], ["repr_align_wt", "ulysses_parallel_size 1"]),
    (["--train.anneal_attention_ratio=2"], ["anneal_attention_ratio", "at least 0 and at most 1", "2.0"]),
    (["--train.anneal_attention_ratio=0.5", "--train.max_minutes=1"], ["counts steps", "train.max_steps"]),
    (["--train.freeze_layers=mlp", "--train.lora_rank=4"], ["'mlp' has no effect", "lora_rank"]),
    (["--train.lr_decay_style=cosine", "--train.lr_min=1"], ["lr_min", "1.0"]),
    (["--model.num_attention_heads=3"], ["hidden_size", "256"]),
    (["--model.num_key_value_heads=3"], ["num_key_value_heads", "divisor"]),
    (["--model.model_path=a", "--model.hidden_size=64"], ["hidden_size", "64", "'a'"]),
    (["--model.model_path=a", "--model.config_path=b"], ["'a'", "'b'"]),
    (["--train.max_steps=ten"], ["train.max_steps", "whole number", "ten"]),
    (["--train.max_steps=1.5"], ["whole number", "1.5"]),
    (["--train.lr=nan"], ["train.lr", "nan"]),
    (["--train.auto_resume=maybe"], ["true or false", "maybe"]),
    (["--train.seed=[1]"], ["train.seed", "[1]"]),
    (["train.lr=1"], ["--train.lr=1e-3", "train.lr=1"]),
    (["--train.lr"], ["needs a value"]),
    (["--lr=1"], ["--train.lr=1e-3"]),
])
def test_values_out_of_range_are_refused_naming_value_and_remedy(flags, parts):
    message = refusal(*flags)
    assert all(part in message for part in parts), message


def test_output_dir_is_required():
    with pytest.raises(UserError, match="train.output_dir is missing"):
        load_config(None, [])


def test_unreadable_files_are_refused_in_one_line(write, tmp_path):
    assert "nowhere.yaml" in refusal(path=tmp_path / "nowhere.yaml")
    assert "not valid YAML" in refusal(path=write("train: [1"))
    assert "'optim' is not a group" in refusal(path=write("optim: {lr: 1}"))
    assert "group train holds 5" in refusal(path=write("train: 5"))
    assert "'just text' is not a group" in refusal(path=write("just text"))


def test_keys_of_open_dllm_that_change_nothing_are_named_and_accepted(capsys):
    load_config(None, ["--train.output_dir=out", "--train.ckpt_manager=dcp", "--train.rmpad_with_pos_ids=true",
                       "--train.ulysses_parallel_size=1"])
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "train.ckpt_manager" in note and "documents are always packed" in note
    assert "ulysses" not in note  # 1 asks for nothing


@pytest.mark.parametrize("flag, advice", [
    ("--train.bsz_warmup_ratio=0.1", "train.lr_warmup_ratio"), ("--data.data_name=x", "data.train_path"),
    ("--train.tensor_parallel_size=2", "ulysses_parallel_size"), ("--train.load_checkpoint_path=x", "model.model_path"),
    ("--train.enable_fsdp_offload=true", "train.micro_batch_size")])
def test_keys_of_open_dllm_that_we_lack_are_refused_by_name_with_an_alternative(flag, advice):
    message = refusal(flag)
    assert flag[2:].split("=")[0] in message and advice in message


def test_no_foreign_key_is_also_ours():
    ours = {f"{group}.{name}" for group, cls in GROUPS.items() for name in cls.__dataclass_fields__}
    assert not ours & set(read_foreign_keys())


def test_enable_masking_means_open_dllms_two_objectives():
    both = load_config(None, ["--train.output_dir=out", "--train.enable_masking=true"]).train
    assert (both.objective, both.path_term) == ("mdm", True)
    assert load_config(None, ["--train.output_dir=out", "--train.enable_masking=no"]).train.objective == "ar"
    elbo = load_config(None, ["--train.output_dir=out", "--train.objective=elbo", "--train.enable_masking=true"]).train
    assert (elbo.objective, elbo.path_term) == ("elbo", False)


def test_open_dllms_readme_flags_work_on_our_copy_of_its_recipe(capsys):
    config = load_config(ROOT / "configs/pretrain/qwen2_5_coder_500M.yaml", [
        "--data.train_path=data/data", "--train.ckpt_manager=dcp", "--train.micro_batch_size=16",
        "--train.global_batch_size=512", "--train.output_dir=logs/Qwen2.5-Coder-0.5B_mdm", "--train.save_steps=10000"])
    assert (config.train.lr, config.train.lr_min, config.train.rows_per_step) == (3e-4, 3e-6, 512)
    assert (config.data.max_seq_len, config.data.train_size) == (4096, 10**12)
    assert (config.train.lr_warmup_ratio, config.train.save_time_interval_minutes) == (0.001, 170)


def test_every_shipped_configuration_loads():
    for path in (ROOT / "configs").rglob("*.yaml"):
        has_output = "output_dir" in (yaml.safe_load(path.read_text()).get("train") or {})
        load_config(path, [] if has_output else ["--train.output_dir=out"])


def test_reading_a_configuration_does_not_import_torch():
    code = "import sys, dllm.config.reading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
