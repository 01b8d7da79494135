"""The export of a run: a folder that loads everywhere, with a record of the run."""

import json
import shutil

import pytest
import torch

import dllm
from dllm.cli import main
from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.training.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("def add(x, y):\n    return x + y\n" * 40)
    config = Config(
        model=ModelGroup(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1),
        data=DataGroup(train_path=str(folder / "text.txt"), max_seq_len=32),
        train=TrainGroup(output_dir=str(folder / "run"), device="cpu", max_steps=4, save_steps=2, micro_batch_size=2,
                         num_train_epochs=100))
    return train(config)


def test_the_folder_loads_and_says_what_made_it(run, tmp_path, capsys):
    assert main(["export", str(run.output_dir), "--output-dir", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    model = dllm.DiffusionLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    trained = dllm.DiffusionLM.from_pretrained(run.checkpoint).state_dict()
    assert all(torch.equal(tensor, trained[name].bfloat16()) for name, tensor in model.state_dict().items())
    from transformers import AutoTokenizer, GenerationConfig

    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == model.mask_token_id
    assert GenerationConfig.from_pretrained(tmp_path / "out").mask_token_id == model.mask_token_id
    manifest = json.loads((tmp_path / "out/dllm_run.json").read_text())
    assert manifest["step"] == 4 and manifest["config"]["train"]["max_steps"] == 4 and manifest["versions"]["torch"]
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: dllm\n") and "| steps | 4 |" in card


def test_a_checkpoint_of_the_run_can_be_named(run, tmp_path):
    earlier = run.output_dir / "checkpoints/global_step_2"
    assert main(["export", str(earlier), "--output-dir", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/dllm_run.json").read_text())["step"] == 2


@pytest.mark.parametrize("arguments, message", [
    (["export", "/no/such/run", "--output-dir", "{new}"], "/no/such/run holds no checkpoint; give the output_dir"),
    (["export", "{run}", "--output-dir", "{full}"], "is there already; name a new folder"),
    (["export", "{run}/checkpoints/global_step_3", "--output-dir", "{new}"], "holds no checkpoint"),
    (["export", "{run}", "--output-dir", "{new}", "--private"], "--private goes with --push")])
def test_bad_input_is_one_line(run, tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("here")
    names = {"new": tmp_path / "new", "full": tmp_path, "run": run.output_dir}
    assert main([argument.format(**names) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_named_and_a_cut_line_of_metrics_left_out(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run.output_dir, copy)
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a leftover of a kill
    assert main(["export", str(copy), "--output-dir", str(tmp_path / "out")]) == 0
    damaged = copy / "checkpoints/global_step_2"
    (damaged / "trainer_state.pt").write_bytes(b"half")
    assert main(["export", str(damaged), "--output-dir", str(tmp_path / "other")]) == 2
    assert "global_step_2 is damaged (trainer_state.pt has 4 bytes, not" in capsys.readouterr().err


def test_push_uploads_the_folder_and_says_when_the_hub_refuses(run, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, repository, private, exist_ok):
            calls.append((repository, private))
            return "https://hub/" + repository

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            if repo_id == "me/refused":
                raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    push = ["export", str(run.output_dir), "--private", "--push"]
    assert main([*push, "me/model", "--output-dir", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.endswith("https://hub/me/model\n")
    assert calls[0] == ("me/model", True) and {"README.md", "model.safetensors", "dllm_run.json"} <= set(calls[1][1])
    assert main([*push, "me/refused", "--output-dir", str(tmp_path / "b")]) == 1
    assert "is written, but the hub did not take it as me/refused: no route to the hub" in capsys.readouterr().err
