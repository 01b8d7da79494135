"""Fine-tuning of models that write in canvases: the recorded losses and gradients, what is drawn, runs."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.data import PackedDataset
from dllm.data.sources import Document
from dllm.data.tokens import Tokens, encode_documents
from dllm.diffusion.canvases import CanvasTargets, draw_canvas
from dllm.diffusion_lm import DiffusionLM
from dllm.errors import UserError
from dllm.model import diffusion_gemma
from dllm.model.diffusion_gemma import DiffusionGemma
from dllm.model.gemma_config import read_gemma_config
from dllm.model.tokenizer import load_tokenizer, train_tokenizer
from dllm.training.batches import forward, forward_canvases, make_batches
from dllm.training.dry_run import plan
from dllm.training.export import export
from dllm.training.showing import show_rows
from dllm.training.trainer import train
from tests.dllm.training.test_distributed import assert_close, read, run

pytestmark = pytest.mark.filterwarnings("ignore:.*vision tower")
C = 12  # tokens of a canvas in the goldens
TINY = {"model_type": "diffusion_gemma", "architectures": ["DiffusionGemmaForBlockDiffusion"], "canvas_length": 8,
        "eos_token_id": [0, 1], "text_config": {
            "model_type": "diffusion_gemma_text", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
            "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "num_experts": 4,
            "top_k_experts": 2, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"],
            "max_position_embeddings": 128, "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.1,
            "final_logit_softcapping": 30.0, "use_bidirectional_attention": "vision", "pad_token_id": 1,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25,
                                   "rope_theta": 1000000.0}}}}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|pad|>{% endfor %}" \
           "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "golden/diffusion_gemma"
    return folder, np.load(folder / "training.npz"), json.loads((folder / "training.json").read_text())


@pytest.fixture(scope="module")
def recorded(golden):
    """The model, and the three recorded examples as one micro-batch, padded on the right."""
    folder, arrays, facts = golden
    model = DiffusionLM.from_pretrained(folder / "model_random")
    rows = [{name: torch.from_numpy(arrays[f"row{i}.{name}"]) for name in ("prompt", "filled", "x0", "noisy")}
            for i in range(3)]
    examples = [torch.cat((row["prompt"], row["filled"])) for row in rows]
    facts = facts["rows"]
    start = torch.tensor([len(row["prompt"]) + C * fact["block"] for row, fact in zip(rows, facts, strict=True)])
    conditioned = torch.tensor([i for i, fact in enumerate(facts) if fact["self_conditioned"]])
    lengths = torch.tensor([len(example) for example in examples])
    targets = CanvasTargets(lengths, start, *(torch.stack([row[name] for row in rows]) for name in ("x0", "noisy")),
                            torch.ones(3, C, dtype=torch.bool), conditioned, torch.tensor(3 * C), (lengths - 1).sum())
    return model, torch.nn.utils.rnn.pad_sequence(examples, batch_first=True, padding_value=1), targets


def take(input_ids, targets, row):
    """One example as a micro-batch of its own, without padding."""
    length = int(targets.lengths[row])
    conditioned = torch.zeros(int(row in targets.conditioned), dtype=torch.long)
    one = CanvasTargets(*(tensor[row:row + 1] for tensor in targets[:5]), conditioned, torch.tensor(C),
                        torch.tensor(length - 1))
    return input_ids[row:row + 1, :length], one


def test_a_micro_batch_has_the_recorded_means_over_tokens(recorded, golden):
    model, input_ids, targets = recorded
    sums = forward_canvases(model, input_ids, targets)
    losses = golden[2]["losses"]
    assert float(sums.loss / targets.normaliser) == pytest.approx(losses["diffusion"], abs=1e-5)
    total = sums.loss / targets.normaliser + sums.encoder / targets.encoded
    assert float(total) == pytest.approx(losses["nemo"], abs=1e-5)
    assert float(sums.nll) == float(sums.loss)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_mean_over_examples_has_the_recorded_loss_and_gradients(recorded, golden, checkpointing):
    model, *batch = recorded
    model.zero_grad()
    model.checkpointing, total = checkpointing, 0.0
    for row in range(3):
        input_ids, targets = take(*batch, row)
        sums = forward_canvases(model, input_ids, targets)
        loss = (sums.loss / targets.normaliser + sums.encoder / targets.encoded) / 3
        loss.backward()
        total += float(loss.detach())
    model.checkpointing = False
    assert total == pytest.approx(golden[2]["losses"]["google"], abs=1e-5)
    theirs = load_file(golden[0] / "training_gradients.safetensors")
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name].grad - gradient).norm() <= 1e-3 * gradient.norm(), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tiny DiffusionGemma, with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("gemma") / "tiny"
    torch.manual_seed(0)
    model = DiffusionGemma(read_gemma_config(TINY))
    model.generation_defaults |= {"eos_token_id": [0, 1]}
    model.save_pretrained(folder)
    tokenizer = train_tokenizer(["user: 1 + 2 = assistant: 3"] * 9, 300)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A file of 40 conversations, some of two turns."""
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    lines = []
    for i in range(40):
        turns = [(f"{i} + {j}", f"{i + j}" * (1 + i % 4)) for j in range(1 + i % 2)]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for turn in turns for role, text in
                                              zip(("user", "assistant"), turn, strict=True)]}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def make_config(folder, talks, tmp_path):
    def make(data=None, **train_keys) -> Config:
        keys = {"output_dir": str(tmp_path / "run"), "objective": "canvas", "lr": 3e-3, "micro_batch_size": 4,
                "max_steps": 4, "num_train_epochs": 100, "device": "cpu", "use_tensorboard": False,
                "precision": "fp32", **train_keys}
        data = {"train_path": str(talks), "data_type": "conversation", "max_seq_len": 64, "validation_share": 0.1,
                **(data or {})}
        return Config(model=ModelGroup(model_path=str(folder)), data=DataGroup(**data), train=TrainGroup(**keys))
    return make


def example(*parts):
    """(tokens [n], whether each is learnt): of texts of digits, those in upper positions of the list are learnt."""
    tokens = [int(digit) for part in parts for digit in part]
    learnt = [index % 2 == 1 for index, part in enumerate(parts) for _ in part]
    return torch.tensor(tokens), torch.tensor(learnt)


@pytest.mark.parametrize("parts, uniform, text, start", [
    (("555", "6660"), 0.5, "5556660", 3),  # a whole canvas
    (("555", "66660"), 0.4, "55566660000", 3), (("555", "66660"), 0.6, "55566660000", 7),  # filled with end-of-text
    (("5", "66", "7", "88880"), 0.3, "56600", 1), (("5", "66", "7", "88880"), 0.5, "566788880000", 4),  # two answers
    (("5", "66", "7", "88880"), 0.99, "566788880000", 8),
    (("5", "66", "77"), 0.9, "56600", 1),  # tokens after the last answer
    (("", "6666666"), 0.99, "6666666", 0)])  # cut off by the end of its chunk: the whole canvases alone
def test_a_canvas_is_one_of_the_examples_own(parts, uniform, text, start):
    tokens, found, whole = draw_canvas(*example(*parts), 4, [0, 9], uniform)
    assert ("".join(map(str, tokens.tolist())), found, whole) == (text, start, True)


def test_an_answer_cut_off_before_its_first_canvas_ends_has_none():
    tokens, learnt = example("55", "666")
    found = draw_canvas(tokens, learnt, 4, [0], 0.5)
    assert torch.equal(found[0], tokens) and found[1:] == (5, False)


def make_source():
    """Rows of questions and answers of several lengths; the first answer is cut off after 6 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 40, (30,), generator=generator)
    lengths[0] = 40
    tokens = torch.randint(2, 320, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    tokens[lengths.cumsum(0) - 1] = 0
    place = torch.arange(len(tokens)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    learnt = (place >= 3) & ((torch.arange(len(tokens)) >= 40) | (place >= 26))
    return PackedDataset.of(Tokens(tokens, lengths, learnt), torch.arange(30), 32, alone=True)


def test_a_plain_text_is_an_answer_to_the_token_that_begins_texts(gemma_folder):
    tokenizer = load_tokenizer(gemma_folder)
    tokens = encode_documents(tokenizer, [Document("def add", "a"), Document("x", "b")])
    lengths = tokens.lengths.tolist()
    for part, learnt in zip(tokens.tokens.split(lengths), tokens.trainable.split(lengths), strict=True):
        assert part[0] == tokenizer.bos_token_id and part[-1] == tokenizer.eos_token_id
        assert learnt.tolist() == [False, *[True] * (len(part) - 1)]


def test_rows_are_shown_without_a_copy_where_there_is_no_mask_token(folder):
    console = Console(file=io.StringIO())
    show_rows(make_source().read(range(2)), load_tokenizer(folder), 0, console)
    shown = console.file.getvalue()
    assert "row 1" in shown and "corrupted" not in shown


def settings_of(**keys):
    return TrainGroup(**{"output_dir": "x", "objective": "canvas", "micro_batch_size": 12, "global_batch_size": 12,
                         **keys})


def test_noise_is_uniform_at_the_chance_of_its_example_and_times_cover_the_step(folder):
    model = DiffusionLM.from_pretrained(folder)
    rows = 400
    sizes = {"micro_batch_size": rows, "global_batch_size": rows}
    batch, = make_batches(make_source(), 3, range(rows), rows, settings_of(**sizes), 5, model)
    targets = batch.targets
    kept = (targets.noisy == targets.clean).float().mean(1)
    # The rows' times are 1 / 400 apart, in their order, from a common offset on.
    assert abs(kept.mean() - 0.5) < 0.02
    quarters = torch.stack([part.mean() for part in torch.cat((kept, kept)).view(-1, 100).mean(1).split(1)])
    assert quarters.max() - quarters.min() > 0.5
    noise = targets.noisy[targets.noisy != targets.clean]
    assert noise.min() < 20 and noise.max() > 300 and abs(noise.float().mean() - 160) < 8
    assert abs(len(targets.conditioned) / rows - 0.5) < 0.08
    assert batch.scored == batch.normaliser == int(targets.scored.sum()) < 8 * rows
    assert batch.encoded == int((targets.lengths - 1).sum()) == batch.tokens - rows
    again, = make_batches(make_source(), 3, range(rows), rows, settings_of(self_conditioning=0.0, **sizes), 5, model)
    assert again.targets.conditioned is None and torch.equal(again.targets.noisy, targets.noisy)


def test_micro_batches_of_any_size_give_the_gradients_of_the_whole(folder):
    model, gradients = DiffusionLM.from_pretrained(folder), []
    for size in (12, 4, 1):
        batches = make_batches(make_source(), 5, range(12), 12, settings_of(micro_batch_size=size), 1, model)
        normaliser, encoded = (sum(getattr(b, name) for b in batches) for name in ("normaliser", "encoded"))
        sums = [forward(model, batch, torch.device("cpu")) for batch in batches]
        loss = sum(s.loss / normaliser + s.encoder / encoded for s in sums)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


def test_padding_and_tokens_after_the_canvas_change_nothing_of_the_decoder(folder):
    model = DiffusionLM.from_pretrained(folder)
    batch, = make_batches(make_source(), 0, range(4), 4, settings_of(micro_batch_size=4, global_batch_size=4), 0, model)
    later = torch.arange(batch.input_ids.shape[1]) >= batch.targets.start.unsqueeze(1)
    other = batch.input_ids.where(~later, 7)
    ours, theirs = (forward_canvases(model, ids, batch.targets) for ids in (batch.input_ids, other))
    assert later.sum() > 40 and torch.allclose(ours.loss, theirs.loss) and not torch.allclose(ours.encoder,
                                                                                              theirs.encoder)


def test_the_layers_run_equally_often_whatever_the_examples(folder, monkeypatch):
    """Processes that share the weights by fsdp2 would else wait for one another."""
    monkeypatch.setattr(diffusion_gemma, "PIECE", 4)
    model, runs = DiffusionLM.from_pretrained(folder), []
    model.layers[0].register_forward_hook(lambda *_: runs.append(0))
    counts, lengths, conditioned = set(), set(), set()
    for batch in make_batches(make_source(), 0, range(12), 12, settings_of(micro_batch_size=1), 0, model):
        runs.clear()
        forward(model, batch, torch.device("cpu"))
        counts.add(len(runs))
        lengths.add(batch.max_seqlen)
        conditioned.add(len(batch.targets.conditioned))
    assert counts == {3} and conditioned == {0, 1} and max(lengths) > 2 * min(lengths)


@pytest.mark.slow
def test_a_run_teaches_answers_which_sampling_then_gives(make_config, tmp_path):
    path = tmp_path / "digits.jsonl"
    path.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": f"{i}"}, {
        "role": "assistant", "content": f"{i}" * 4}]}) for i in range(5, 10)))
    result = train(make_config({"train_path": str(path), "validation_share": 0.0}, max_steps=80, micro_batch_size=20,
                               lr=2e-2, lr_decay_style="linear", num_train_epochs=1000))
    last = result.history[-10:]
    assert sum(line["nll"] for line in last) < 10 * 0.2 and last[0]["encoder_nll"] < 0.3
    assert last[0]["loss"] == pytest.approx(last[0]["nll"] + last[0]["encoder_nll"])
    model, tokenizer = DiffusionLM.from_pretrained(result.checkpoint), load_tokenizer(result.checkpoint)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": f"{i}"}], add_generation_prompt=True,
                                             return_dict=True)["input_ids"] for i in range(5, 10)]
    out = model.diffusion_generate(torch.tensor(prompts), max_new_tokens=8, seed=0).sequences[:, len(prompts[0]):]
    answers = [tokenizer.decode(row) for row in out]
    assert sum(answer.startswith(f"{i}" * 4 + "<|pad|>") for i, answer in enumerate(answers, 5)) >= 4, answers


@pytest.mark.slow
def test_adapters_are_of_every_linear_map_but_the_routers_and_are_merged(make_config, folder, tmp_path):
    config = make_config(max_steps=30, lora_rank=4, lr=1e-2, micro_batch_size=8)
    assert "objective: canvas" in plan(config)
    history = train(config).history
    first, last = history[:3], history[-3:]
    for name in ("nll", "encoder_nll"):
        assert sum(line[name] for line in last) < 0.95 * sum(line[name] for line in first), name
    line = history[-1]
    assert line["validation_loss"] > line["validation_encoder_nll"] > 0 and "validation_bound" not in line
    exported = export(config.train.output_dir, tmp_path / "exported")
    before, after = map(DiffusionLM.from_pretrained, (folder, exported))
    old, new = before.state_dict(), after.state_dict()
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        f"{name}.weight" for name, module in before.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name and ".router." not in name}
    assert after.generation_defaults["eos_token_id"] == [0, 1] and "mask_token_id" not in after.generation_defaults
    assert load_tokenizer(exported).get_vocab() == load_tokenizer(folder).get_vocab()


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(make_config, tmp_path):
    config = make_config(max_steps=6, save_steps=3)
    whole = train(config)
    folder = tmp_path / "again"
    shutil.copytree(tmp_path / "run", folder)
    shutil.rmtree(folder / "checkpoints" / "global_step_6")
    again = train(replace(config, train=replace(config.train, output_dir=str(folder))))
    assert [line["step"] for line in again.history][-3:] == [4, 5, 6]
    assert read(folder) == read(tmp_path / "run")
    ours, theirs = (DiffusionLM.from_pretrained(result.checkpoint).state_dict() for result in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("modes, keys", [(("ddp", "fsdp2"), {}), (("fsdp2",), {"lora_rank": 2})], ids=str)
def test_two_processes_equal_one(make_config, tmp_path, modes, keys):
    """Of micro-batches of a row, in some of which no example is self-conditioned."""
    config = make_config(micro_batch_size=1, global_batch_size=2, max_grad_norm=0.0, **keys)
    train(config)
    for mode in modes:
        path = tmp_path / f"{mode}.yaml"
        path.write_text(replace(config, train=replace(
            config.train, output_dir=str(tmp_path / mode), data_parallel_mode=mode,
            enable_gradient_checkpointing=mode == "fsdp2")).to_yaml())
        run(2, path)
        assert_close(read(tmp_path / mode), read(tmp_path / "run"), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("data_type", ["mapping", "iterable"])
def test_documents_are_responses_without_a_prompt(make_config, corpus, data_type):
    data = {"train_path": str(corpus), "data_type": "plaintext", "datasets_type": data_type, "max_seq_len": 16}
    history = train(make_config(data, max_steps=2)).history
    assert len(history) == 2 and all(line["nll"] > 0 and line["encoder_nll"] > 0 for line in history)


@pytest.mark.parametrize("keys, message", [
    ({"objective": "mdm"}, "train.objective=mdm is not for diffusion_gemma, which writes in canvases of random words"),
    ({"objective": "ar", "self_conditioning": 0.5}, "needs train.objective=mdm or elbo or cart or uniform or canvas"),
    ({"path_term": True}, "train.path_term True needs train.objective=mdm"),
    ({"ulysses_parallel_size": 2}, "no train.ulysses_parallel_size; leave it out"),
    ({"enable_compile": True}, "no train.enable_compile; leave it out"),
    ({"layers_backend": "liger"}, "train.layers_backend=liger does not compute a DiffusionGemma"),
    ({"self_conditioning": 1.5}, "train.self_conditioning must be")], ids=str)
def test_what_does_not_go_together_is_refused_with_the_remedy(make_config, keys, message):
    with pytest.raises(UserError) as error:
        plan(make_config(**keys))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_models_and_data_that_do_not_fit_are_refused(make_config, model_folder):
    with pytest.raises(UserError, match="train.objective=canvas needs a model that writes in canvases"):
        plan(replace(make_config(), model=ModelGroup(model_path=str(model_folder))))
    with pytest.raises(UserError, match="may need more than the model's 128 positions; lower it"):
        plan(make_config({"max_seq_len": 121}))
    config = make_config()
    with pytest.raises(UserError, match="has no mask token"):
        plan(replace(config, model=replace(config.model, mask_token="<|mask|>")))
