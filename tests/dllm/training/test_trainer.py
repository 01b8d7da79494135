"""The trainer: learns, resumes bit for bit after a kill, accumulates exactly, refuses what cannot work in one line."""

import json
import math
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dllm.training.trainer as trainer
from dllm.config.reading import load_config
from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.data import PackedDataset
from dllm.diffusion_lm import DiffusionLM
from dllm.errors import Failure, UserError
from dllm.generation.config import MDMGenerationConfig
from dllm.model.families import ModelConfig
from dllm.model.layouts import Padded, Visible
from dllm.train import main
from dllm.training.batches import AttentionAnneal, draw_visible, forward, make_batches, opened_share
from dllm.training.optimizer import Muon, build_optimizers, learning_rate, orthogonalize
from dllm.training.trainer import train
from tests import processes


@pytest.fixture(autouse=True)
def one_thread():
    """Equal bits need equal threads, and tiny products are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_config(corpus, tmp_path):
    def make(**train_keys) -> Config:
        keys = {"output_dir": str(tmp_path / "run"), "lr": 3e-3, "micro_batch_size": 4, "max_steps": 12,
                "save_steps": 4, "num_train_epochs": 100, "device": "cpu", "lr_warmup_ratio": 0.2,
                "lr_decay_style": "cosine", "precision": "fp32", **train_keys}  # auto's probe depends on the load
        model = ModelGroup(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1)
        return Config(model=model, data=DataGroup(train_path=str(corpus), max_seq_len=48, validation_share=0.1),
                      train=TrainGroup(**keys))
    return make


def losses(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}
            for line in history]


def read_metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("keys", [
    {"objective": "mdm", "path_term": True, "eval_every": 4},
    {"objective": "elbo", "optimizer": "muon", "schedule": "cosine"},
    {"objective": "ar"}, {"objective": "block_diffusion", "block_length": 8},
    {"objective": "block_diffusion", "block_length": 8, "causal_blocks": True},
    {"objective": "cart"}, {"objective": "expansion", "expand_token_id": 299},
    {"objective": "mdm", "precision": "bf16", "global_batch_size": 8}], ids=str)
def test_every_objective_lowers_the_loss_and_leaves_a_checkpoint_that_loads(make_config, functions, keys):
    result = train(make_config(max_steps=30, **keys))
    history = result.history
    assert result.steps == 30 == len(history) and history == read_metrics(result.output_dir)
    assert sum(line["nll"] for line in history[-5:]) < 0.9 * sum(line["nll"] for line in history[:5])
    no_bound = keys["objective"] in ("mdm", "cart", "expansion")
    assert history[-1]["validation_loss"] > 0 and ("validation_bound" in history[-1]) == no_bound
    measured = [line["step"] for line in history if "validation_loss" in line]
    assert measured == ([*range(4, 30, 4), 30] if "eval_every" in keys else [30])
    model = DiffusionLM.from_pretrained(result.checkpoint)
    assert model.dtype == torch.float32 and model.mask_token_id == 2 == model.config.mask_token_id
    blocks = keys["objective"] == "block_diffusion"  # it is then sampled block by block by default
    assert (model.config.block_causal, model.config.block_length) == ((True, 8) if blocks else (False, None))
    assert model.config.causal_blocks == ("causal_blocks" in keys)
    settings = MDMGenerationConfig(steps=2, max_new_tokens=8)
    assert model.diffusion_generate(torch.tensor([[5, 6, 7]]), generation_config=settings).sequences.shape == (1, 11)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(result.checkpoint)
    assert tokenizer.mask_token_id == 2 and tokenizer.decode(tokenizer(functions[0])["input_ids"]) == functions[0]
    theirs = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in model.parameters())
    assert load_config(result.output_dir / "config.yaml") == make_config(max_steps=30, **keys)


def test_nothing_is_measured_where_no_held_out_token_is_masked(make_config, tmp_path):
    """One short answer in two held-out conversations, at times drawn for two rows."""
    talks = [{"messages": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": "2"}]}
             for i in range(12)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    config = make_config(max_steps=1)
    config = replace(config, data=replace(
        config.data, train_path=str(tmp_path / "talks.jsonl"), data_type="conversation", text_keys="messages",
        chat_template=str(tmp_path / "chat.jinja")))
    for seed in range(8):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            line, = train(replace(config, train=replace(config.train, seed=seed,
                                                        output_dir=str(tmp_path / str(seed))))).history
        said = any("no held-out token is masked, of" in str(warning.message) for warning in told)
        assert said != ("validation_loss" in line) and line.get("validation_loss") != 0
        if said:
            return
    raise AssertionError("no seed left all held-out tokens as they are")


def test_a_finished_run_is_left_as_it_is(make_config):
    first = train(make_config())
    files = {path: path.stat().st_mtime_ns for path in first.checkpoint.rglob("*")}
    again = train(make_config())
    assert again == first and files == {path: path.stat().st_mtime_ns for path in first.checkpoint.rglob("*")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopping_and_continuing_gives_the_same_losses_bit_for_bit(make_config, tmp_path, optimizer):
    whole = train(make_config(output_dir=str(tmp_path / "whole"), optimizer=optimizer, eval_every=3, max_steps=10))
    # The schedules depend on the number of steps, so the run is interrupted from outside.
    config = make_config(optimizer=optimizer, eval_every=3, save_steps=3, max_steps=10)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "make_batches", interrupt_at(8))
        train(config)
    output = tmp_path / "run"
    assert len(read_metrics(output)) == 8
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a kill in the middle of a line
    resumed = train(config)
    assert losses(resumed.history) == losses(whole.history) == losses(read_metrics(output))
    before, after = (DiffusionLM.from_pretrained(r.checkpoint).state_dict() for r in (whole, resumed))
    assert all(torch.equal(before[name], after[name]) for name in before)


def interrupt_at(wanted):
    def interrupting(dataset, step, *rest):
        if step == wanted:
            raise KeyboardInterrupt
        return make_batches(dataset, step, *rest)
    return interrupting


def die_in_the_save_of_step_20(arguments):
    write = torch.save

    def write_half_and_die(state, file):
        if isinstance(state, dict) and state["step"] == 20:
            file.write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        write(state, file)

    torch.save = write_half_and_die
    return main(arguments)


@pytest.mark.slow
def test_kill_9_in_a_step_and_in_a_save_changes_nothing(make_config, tmp_path):
    config = make_config(max_steps=40, save_steps=10, optimizer="muon", eval_every=7)
    whole = train(replace(config, train=replace(config.train, output_dir=str(tmp_path / "whole"))))
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    output = tmp_path / "run"

    assert processes.end(processes.start(die_in_the_save_of_step_20, [path], tmp_path / "told")) == -signal.SIGKILL
    assert [folder.name for folder in (output / "checkpoints").glob("[!.]*")] == ["global_step_10"]

    running = processes.start(main, [path], tmp_path / "told")
    processes.wait_until(lambda: (output / "checkpoints/global_step_20").exists() and len(read_lines(output)) >= 24,
                         running)
    running.kill()
    assert processes.end(running) == -signal.SIGKILL

    assert processes.end(processes.start(main, [path], tmp_path / "told")) == 0
    assert losses(read_metrics(output)) == losses(whole.history)


def read_lines(output: Path) -> list[str]:
    return (output / "metrics.jsonl").read_text().splitlines()


def make_model(**keys) -> DiffusionLM:
    torch.manual_seed(0)
    return DiffusionLM(ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                   num_attention_heads=4, num_key_value_heads=2, head_dim=8, qk_norm=True,
                                   mask_token_id=63, **keys))


def make_dataset(longest: int, max_seq_len=16) -> PackedDataset:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, longest, (50,), generator=generator).tolist()
    return PackedDataset([torch.randint(63, (n,), generator=generator) for n in lengths], max_seq_len)


@pytest.mark.parametrize("token, message", [
    (300, "must be one of the model's 300 tokens"), (0, "neither end-of-text"), (2, "nor the mask")])
def test_tokens_that_cannot_stand_for_two_are_refused(make_config, token, message):
    with pytest.raises(UserError, match=message):
        train(make_config(objective="expansion", expand_token_id=token))


def test_gaps_do_not_depend_on_who_computes_them_and_lose_nothing():
    dataset, model = make_dataset(longest=40), make_model(eos_token_id=61, shift_logits=False)
    settings = TrainGroup(output_dir="x", objective="expansion", expand_token_id=62, micro_batch_size=8)
    whole, = make_batches(dataset, 3, range(8), 8, settings, 1, model)
    halves = [make_batches(dataset, 3, part, 8, settings, 1, model)[0] for part in (range(4), range(4, 8))]
    assert torch.equal(whole.input_ids.flatten(), torch.cat([half.input_ids.flatten() for half in halves]))
    assert whole.normaliser == sum(half.normaliser for half in halves) > 0
    packed = dataset.read(range(24, 32))
    noisy, said = whole.input_ids.flatten(), whole.targets.tokens
    assert torch.equal(noisy == 63, whole.targets.scored) and torch.equal(noisy[noisy != 63], said[noisy != 63])
    for (start, end), (first, last) in zip(whole.cu_seqlens.unfold(0, 2, 1).tolist(),
                                           packed.cu_seqlens.unfold(0, 2, 1).tolist(), strict=True):
        document, text, place = said[start:end].tolist(), packed.tokens[first:last].tolist(), 0
        for token in document:  # an expansion replaces its own token and those left out after it
            if token == 62:
                place += 1
            elif token != 61:
                place = text.index(token, place) + 1
        assert document[-1] == text[-1] or noisy[end - 1] == 63
        assert document.count(61) <= 64 + text.count(61)
    assert (said == 62).any() and (said == 61).any()


@pytest.mark.parametrize("longest, block_length, shift, causal", [
    (15, 4, False, False), (15, 4, True, False), (60, 6, True, False), (15, 40, False, False), (60, 6, True, True),
    (60, 6, False, "context"), (15, 4, True, "context")])
def test_block_diffusion_is_the_sum_over_blocks_given_the_clean_ones_before(longest, block_length, shift, causal):
    """causal: "context" means of the clean text alone, as of Nemotron."""
    model = make_model(shift_logits=shift, block_causal=True, causal_blocks=causal is True,
                       causal_context=causal == "context").double()
    dataset = make_dataset(longest=longest)
    settings = TrainGroup(output_dir="x", objective="block_diffusion", block_length=block_length, micro_batch_size=8)
    batch, = make_batches(dataset, 0, range(8), 8, settings, 1, model)
    forward(model, batch, torch.device("cpu")).loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    noisy, clean = batch.input_ids.flatten(), batch.clean_ids.flatten()
    targets = batch.targets
    corrupted, weights = noisy.ne(clean), targets.weights.roll(1) if shift else targets.weights
    rows, length = batch.input_ids.shape
    ends = range(0, rows * length + 1, length) if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    expected, times = 0, set()
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        for first in range(start, end, block_length):
            last = min(first + block_length, end)
            seen = torch.cat((clean[start:first], noisy[first:last]))[None]
            layout, place = Padded(block_length=1 if causal else block_length), torch.arange(last - start)
            if causal == "context":
                layout = Visible([(place <= place[:, None]) | (place[:, None] >= first - start)])
            logits = model.hidden_states(seen, layout)[0] @ model.head_weight.T
            for place in range(max(first, start + 1) if shift else first, last):
                if corrupted[place]:
                    about = logits[place - start - shift]
                    expected = expected - weights[place] * about.log_softmax(-1)[clean[place]]
            times.add(weights[last - 1].item())
    expected.backward()
    assert forward(model, batch, torch.device("cpu")).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)
    assert len(times) > (8 if block_length < 40 else 1)


def test_rows_of_one_chunk_each_are_trained_densely():
    dataset = PackedDataset([torch.arange(64)], 16)
    settings = TrainGroup(output_dir="x", micro_batch_size=4)
    batch, = make_batches(dataset, 0, range(4), 4, settings, 1, make_model())
    assert batch.input_ids.shape == (4, 16) and batch.cu_seqlens is None


def test_a_steps_draws_depend_on_seed_and_step_alone_and_cover_the_times_evenly():
    dataset, model = PackedDataset([torch.arange(63).repeat(400)], 16), make_model()
    settings = TrainGroup(output_dir="x", objective="elbo", micro_batch_size=64)
    first, again, other_step, other_seed = (make_batches(dataset, step, range(64), 64, settings, seed, model)[0]
                                            for step, seed in ((3, 1), (3, 1), (4, 1), (3, 2)))
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, other_step.input_ids)
    assert not torch.equal(first.input_ids, other_seed.input_ids)
    times = (1 / first.targets.weights).view(64, 16)[:, 0]
    assert torch.allclose(times.sort().values.diff(), torch.tensor(1 / 64), atol=2e-3)


def test_a_rows_draws_do_not_depend_on_who_computes_it_and_those_of_packed_rows_are_spread_too():
    dataset, model = make_dataset(longest=8), make_model(shift_logits=False)
    settings = TrainGroup(output_dir="x", objective="elbo", micro_batch_size=64)
    whole, = make_batches(dataset, 2, range(64), 64, settings, 1, model)
    parts = [make_batches(dataset, 2, range(i, i + 16), 64, settings, 1, model)[0] for i in range(0, 64, 16)]
    assert torch.equal(torch.cat([part.input_ids for part in parts], 1), whole.input_ids)
    assert torch.equal(torch.cat([part.targets.weights for part in parts]), whole.targets.weights)
    times = (1 / whole.targets.weights)[whole.cu_seqlens[:-1].long()].sort().values
    gaps = times.diff(prepend=torch.zeros(1), append=torch.ones(1)) * len(times)
    assert len(times) > 100 and gaps.max() < 4  # the largest of 200 independent draws is about log(200) = 5.3


@pytest.mark.parametrize("shift", [False, True])
def test_every_document_has_a_scored_token_when_asked(shift):
    dataset, model = make_dataset(longest=6), make_model(shift_logits=shift)
    settings = TrainGroup(output_dir="x", micro_batch_size=4)
    for asked in (False, True):
        batch, = make_batches(dataset, 0, range(4), 4, replace(settings, mask_at_least_one=asked), 1, model)
        documents = batch.targets.scored.tensor_split(batch.cu_seqlens[1:-1].long())
        assert all(scored.any() for scored in documents if len(scored) > shift) == asked


def test_learning_rates_equal_open_dllms(shared):
    for case in json.loads((shared / "golden/open_dllm/lr_schedules.json").read_text()):
        expected, total = case.pop("lr_at_step"), case.pop("train_steps")
        group = TrainGroup(output_dir="x", **case)
        assert [learning_rate(step, total, group) for step in range(len(expected))] == pytest.approx(expected, rel=1e-9)


def test_newton_schulz_makes_singular_values_nearly_one():
    for shape in ((3, 24, 24), (2, 16, 48), (2, 48, 16)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        got = orthogonalize(matrices)
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        values = torch.einsum("kmi,kmn,kin->ki", u, got, vh)
        assert (values[s > 0.05 * s.amax(1, keepdim=True)] - 1).abs().max() < 0.4
        assert (got - u @ torch.diag_embed(values) @ vh).norm() < 1e-3 * got.norm()


def test_muon_equals_one_matrix_at_a_time():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(8, 12, generator=generator) for _ in range(3)]
    gradients = [[torch.randn(8, 12, generator=generator) for _ in start] for _ in range(2)]
    together = [torch.nn.Parameter(x.clone()) for x in start]
    optimizer = Muon(together, lr=0.1, weight_decay=0.2)
    momenta, expected = [torch.zeros_like(x) for x in start], [x.clone() for x in start]
    for step in gradients:
        for i, gradient in enumerate(step):
            together[i].grad = gradient.clone()
            momenta[i] = 0.95 * momenta[i] + 0.05 * gradient
            update = orthogonalize((0.05 * gradient + 0.95 * momenta[i])[None])[0]
            expected[i] = expected[i] * (1 - 0.1 * 0.2) - 0.1 * 0.2 * 12**0.5 * update
        optimizer.step()
    assert all(torch.allclose(got, want, atol=1e-6) for got, want in zip(together, expected, strict=True))


@pytest.mark.slow
def test_a_time_limit_ends_the_run_and_the_learning_rate_with_it(make_config):
    result = train(make_config(max_minutes=0.02, max_steps=10**6, lr_decay_style="linear"))
    assert 0 < result.steps < 10**5 and result.history[-1]["seconds"] < 5
    assert result.history[-1]["lr"] < 0.1 * max(line["lr"] for line in result.history)
    assert train(make_config(max_minutes=0.02, max_steps=10**6, lr_decay_style="linear")).steps == result.steps


def test_training_starts_from_given_weights_and_keeps_their_tokenizer(make_config, tmp_path):
    first = train(make_config())
    config = make_config(output_dir=str(tmp_path / "second"), max_steps=1, lr=1e-12, lr_min=0, lr_warmup_ratio=0)
    second = train(replace(config, model=ModelGroup(model_path=str(first.checkpoint))))
    before, after = (DiffusionLM.from_pretrained(r.checkpoint).state_dict() for r in (first, second))
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    third = train(replace(config, model=ModelGroup(config_path=str(first.checkpoint)),
                          train=replace(config.train, output_dir=str(tmp_path / "third"))))
    fresh = DiffusionLM.from_pretrained(third.checkpoint).state_dict()
    assert fresh["model.norm.weight"].eq(1).all()
    assert not torch.allclose(fresh["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_blocks_learnt_by_a_given_model_go_into_its_configuration_and_the_run_continues(make_config, tmp_path):
    begun = train(make_config(max_steps=1, output_dir=str(tmp_path / "begun"))).checkpoint
    config = make_config(objective="block_diffusion", block_length=4, max_steps=3, save_steps=2)
    config = replace(config, model=ModelGroup(model_path=str(begun)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "make_batches", interrupt_at(2))
        train(config)
    result = train(config)
    assert json.loads((result.checkpoint / "config.json").read_text())["block_size"] == 4
    assert "block_size" not in json.loads((begun / "config.json").read_text())


def test_only_the_last_checkpoints_are_kept_when_asked(make_config, tmp_path):
    train(make_config(keep_last=2))
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["global_step_12", "global_step_8"]


@pytest.mark.parametrize("change, parts", [
    (lambda c: replace(c, data=replace(c.data, max_seq_len=32)), ["data.max_seq_len 48, not 32", "train.output_dir"]),
    (lambda c: replace(c, model=replace(c.model, hidden_size=64)), ["model.hidden_size 32, not 64"]),
    (lambda c: replace(c, train=replace(c.train, objective="elbo")), ["train.objective 'mdm', not 'elbo'"]),
    (lambda c: replace(c, train=replace(c.train, auto_resume=False)), ["already holds checkpoints", "global_step_12"]),
])
def test_another_run_in_the_same_folder_is_refused_naming_the_difference(make_config, change, parts):
    config = make_config()
    train(config)
    with pytest.raises(UserError) as error:
        train(change(config))
    assert all(part in str(error.value) for part in parts)


@pytest.mark.slow
def test_after_a_full_disk_the_run_goes_on_from_the_last_checkpoint(make_config, tmp_path, monkeypatch):
    config = make_config()
    write = torch.save

    def full(state, file):
        if isinstance(state, dict) and state["step"] == 8:
            raise OSError(28, "No space left on device")
        write(state, file)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(Failure, match="cannot write .*global_step_8: No space left on device"):
            train(config)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["global_step_4"]
    resumed = train(config)
    whole = train(replace(config, train=replace(config.train, output_dir=str(tmp_path / "whole"))))
    assert losses(resumed.history) == losses(whole.history)


def test_a_loss_that_is_not_finite_stops_with_advice(make_config):
    with pytest.raises(Failure, match="step .*lower train.lr"):
        train(make_config(lr=1e30, lr_decay_style="constant", max_grad_norm=0, max_steps=50))


def test_the_command_reports_bad_input_with_2_and_failure_with_1_in_one_line(make_config, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(make_config(max_steps=1).to_yaml())
    assert main([str(path), "--train.lr=-1"]) == 2
    assert main([str(path), "--data.train_path=/no/such/folder"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "train.lr" in error and "/no/such/folder does not exist" in error
    (tmp_path / "file").write_text("")
    assert main([str(path), f"--train.output_dir={tmp_path / 'file'}"]) == 1
    assert capsys.readouterr().err.startswith("dllm: error: cannot write")
    assert main([str(path)]) == 0
    assert "global_step_1" in capsys.readouterr().out


@pytest.mark.parametrize("group, keys, message", [
    ("data", {"max_seq_len": 40000}, "more than the model's 32768 positions"),
    ("model", {"vocab_size": 100}, "at least 259"),
    ("model", {"family": "gpt9"}, "model.family must be one of"),
])
def test_what_the_model_cannot_do_is_refused(make_config, group, keys, message):
    config = make_config()
    with pytest.raises(UserError, match=message):
        train(replace(config, **{group: replace(getattr(config, group), **keys)}))


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(make_config, tmp_path):
    first = train(make_config(max_steps=1))
    config = make_config(output_dir=str(tmp_path / "second"))
    with pytest.raises(UserError, match="the tokenizer has 300 tokens, the model's vocabulary is 290"):
        train(replace(config, model=replace(config.model, vocab_size=290, tokenizer_path=str(first.checkpoint))))


def test_a_step_that_is_not_finite_is_skipped_and_counted_and_the_next_ones_learn(make_config, monkeypatch):
    forward_once = trainer.forward

    def poisoned(*arguments):
        sums = forward_once(*arguments)
        poisoned.calls += 1
        return sums._replace(loss=sums.loss * math.nan) if poisoned.calls == 5 else sums

    poisoned.calls = 0
    monkeypatch.setattr(trainer, "forward", poisoned)
    result = train(make_config(save_steps=0))
    assert [line.get("skipped", 0) for line in result.history] == [0] * 4 + [1] * 8
    assert math.isnan(result.history[4]["loss"]) and result.history[-1]["loss"] < result.history[0]["loss"]


def test_a_last_step_that_is_not_finite_ends_the_run_which_says_so(make_config, monkeypatch, capsys):
    forward_once = trainer.forward

    def poisoned(*arguments):
        poisoned.calls += 1
        sums = forward_once(*arguments)
        return sums._replace(loss=sums.loss * math.nan) if poisoned.calls == 12 else sums

    poisoned.calls = 0
    monkeypatch.setattr(trainer, "forward", poisoned)
    config = make_config(save_steps=0)
    result = train(replace(config, data=replace(config.data, validation_share=0.0)))
    assert result.finished and result.history[-1]["skipped"] == 1
    assert "the last 1 steps were skipped, because loss or gradient was not finite" in capsys.readouterr().err
    assert all(parameter.isfinite().all() for parameter in DiffusionLM.from_pretrained(result.checkpoint).parameters())


def test_a_run_reads_no_rows_beyond_its_last_step(make_config, monkeypatch):
    asked = []

    def counting(source, step, *rest):
        asked.append(step)
        return make_batches(source, step, *rest)

    monkeypatch.setattr(trainer, "make_batches", counting)
    config = make_config(max_steps=3)
    train(config)
    assert asked == [0, 1, 2]
    train(config)
    assert asked == [0, 1, 2]


def test_no_checkpoint_is_written_of_weights_whose_loss_is_not_finite(make_config, tmp_path):
    with pytest.raises(Failure, match="not finite in 3 steps in a row: lower train.lr"):
        train(make_config(lr=1e30, lr_decay_style="constant", lr_warmup_ratio=0, max_grad_norm=0, max_steps=50,
                          save_steps=1, max_bad_steps=3))
    folders = (tmp_path / "run/checkpoints").glob("*")
    assert sorted(int(folder.name.split("_")[-1]) for folder in folders) == [1]


@pytest.mark.slow
def test_adapters_alone_are_trained_and_merged_into_the_model_for_others(make_config, tmp_path):
    start = train(make_config(max_steps=2, output_dir=str(tmp_path / "start"))).checkpoint
    config = make_config(lora_rank=4, max_steps=8, save_steps=3, lr=3e-2)
    config = replace(config, model=ModelGroup(model_path=str(start)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "make_batches", interrupt_at(5))
        train(config)
    resumed = train(config)
    whole = train(replace(config, train=replace(config.train, output_dir=str(tmp_path / "whole"))))
    assert losses(resumed.history) == losses(whole.history)
    before, after = (DiffusionLM.from_pretrained(folder).state_dict() for folder in (start, resumed.checkpoint))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj.weight" in name}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_parameters_stay_bit_for_bit_and_have_no_state_and_the_others_learn(make_config, tmp_path, optimizer):
    start = train(make_config(max_steps=2, output_dir=str(tmp_path / "start"))).checkpoint
    config = make_config(max_steps=4, save_steps=2, optimizer=optimizer, weight_decay=0.1,
                         freeze_layers="LM_head, layers.1.mlp")
    config = replace(config, model=ModelGroup(model_path=str(start)))
    optimizers = []
    with pytest.MonkeyPatch.context() as patch:
        def keep(*arguments):
            optimizers.extend(build_optimizers(*arguments))
            return optimizers
        patch.setattr(trainer, "build_optimizers", keep)
        result = train(config)
    before, after = (DiffusionLM.from_pretrained(folder).state_dict() for folder in (start, result.checkpoint))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight",  # tied: the head
                    *(f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))}
    assert sum(len(optimizer.state) for optimizer in optimizers) == len(before) - len(same)
    with pytest.raises(UserError, match="train.freeze_layers 'LM_head, layers.1.mlp', not None"):
        train(replace(config, train=replace(config.train, freeze_layers=None)))


@pytest.mark.parametrize("objective", ["mdm", "elbo"])
def test_alignment_of_micro_batches_of_any_size_is_that_of_the_whole(objective):
    dataset, model, teacher = make_dataset(longest=40), make_model(), make_model()
    alignments = []
    for size in (12, 4, 1):
        settings = TrainGroup(output_dir="x", objective=objective, micro_batch_size=size, global_batch_size=12)
        batches = make_batches(dataset, 5, range(12), 12, settings, 1, model)
        alignments.append(sum(forward(model, batch, torch.device("cpu"), teacher).alignment.item()
                              for batch in batches))
        assert sum(batch.scored for batch in batches) > alignments[-1] > 0
    assert alignments[1:] == pytest.approx(alignments[:1] * 2, rel=1e-5)


def test_the_teacher_sees_clean_text_and_no_later_token():
    model, teacher, dataset = make_model(), make_model(), make_dataset(longest=15)
    settings = TrainGroup(output_dir="x", micro_batch_size=8)
    batch, = make_batches(dataset, 0, range(8), 8, settings, 1, model)
    calls = []
    teacher.hidden_states = lambda ids, layout, **keys: calls.append((ids, layout)) or DiffusionLM.hidden_states(
        teacher, ids, layout, **keys)
    forward(model, batch, torch.device("cpu"), teacher)
    (ids, layout), = calls
    assert torch.equal(ids[0], dataset.read(range(8)).tokens) and layout.block_length == 1
    assert layout.cu_seqlens is batch.cu_seqlens


def test_attention_opens_linearly_from_causal_to_both_directions():
    settings = TrainGroup(output_dir="x", anneal_attention_ratio=0.2)
    assert [opened_share(step, 50, settings) for step in (0, 1, 5, 9, 10, 49)] == [0, 0.1, 0.5, 0.9, 1, 1]
    assert opened_share(0, 50, TrainGroup(output_dir="x")) == 1


@pytest.mark.parametrize("longest", [15, 400])
def test_hardly_opened_attention_is_causal_and_nearly_open_attention_sees_all(longest):
    model, dataset = make_model(), make_dataset(longest=longest)
    settings = TrainGroup(output_dir="x", micro_batch_size=8)

    def loss(opened: float, **change) -> float:
        batch, = make_batches(dataset, 3, range(8), 8, settings, 1, model, opened)
        return forward(model, batch._replace(**change), torch.device("cpu")).loss.item()

    causal, both = loss(1, block_length=1), loss(1)
    assert loss(0) == pytest.approx(causal, rel=1e-5) and loss(1 - 1e-12) == pytest.approx(both, rel=1e-5)
    assert abs(loss(0.5) - causal) > 1e-4 < abs(loss(0.5) - both)


def test_which_later_tokens_are_seen_depends_on_seed_step_and_slot_and_on_no_cut():
    model, dataset = make_model(), make_dataset(longest=40, max_seq_len=32)

    def draw(slots: range, step=3, seed=1, opened=0.3) -> list[torch.Tensor]:
        settings = TrainGroup(output_dir="x", micro_batch_size=len(slots))
        batch, = make_batches(dataset, step, slots, 12, settings, seed, model, opened)
        return draw_visible(batch.anneal, torch.device("cpu"))

    whole, parts = draw(range(12)), draw(range(5)) + draw(range(5, 12))
    assert all(torch.equal(mine, other) for mine, other in zip(whole, parts, strict=True))
    wider = draw(range(12), opened=0.6)
    later = [mask[torch.ones_like(mask).triu(1)] for mask in whole]
    assert all(mask.tril().equal(torch.ones_like(mask).tril()) for mask in whole)
    assert all((mine <= other).all() for mine, other in zip(whole, wider, strict=True))
    assert torch.cat(later).double().mean().item() == pytest.approx(0.3, abs=0.03)
    first = {str(mask[:8, :8].tolist()) for mask in whole if len(mask) >= 8}
    assert len(first) == sum(len(mask) >= 8 for mask in whole) > 8
    anneal = AttentionAnneal(0.3, 1, 3, [(0, 0, 8)])
    others = [anneal, anneal._replace(seed=2), anneal._replace(step=4), anneal._replace(documents=[(1, 0, 8)]),
              anneal._replace(documents=[(0, 8, 8)])]
    assert len({str(draw_visible(other, torch.device("cpu"))[0].tolist()) for other in others}) == 5


@pytest.mark.slow
def test_annealed_training_learns_and_continues_bit_for_bit(make_config, tmp_path):
    keys = {"anneal_attention_ratio": 0.5, "save_steps": 3}
    whole = train(make_config(output_dir=str(tmp_path / "whole"), **keys))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "make_batches", interrupt_at(5))
        train(make_config(**keys))
    assert losses(train(make_config(**keys)).history) == losses(whole.history)
    plain = train(make_config(output_dir=str(tmp_path / "plain"))).history
    assert whole.history[-1]["loss"] < whole.history[0]["loss"] != plain[0]["loss"]


def align(make_config, start: Path, **keys) -> Config:
    return replace(make_config(repr_align_wt=10.0, **keys), model=ModelGroup(model_path=str(start)))


@pytest.mark.slow
def test_aligned_training_counts_the_term_lowers_it_and_continues_bit_for_bit(make_config, tmp_path):
    start = train(make_config(max_steps=2, objective="ar", output_dir=str(tmp_path / "start"))).checkpoint
    config = align(make_config, start, max_steps=12, save_steps=3, path_term=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "make_batches", interrupt_at(5))
        train(config)
    resumed = train(config)
    whole = train(align(make_config, start, max_steps=12, path_term=True, output_dir=str(tmp_path / "whole")))
    assert losses(resumed.history) == losses(whole.history)
    plain = train(replace(config, train=replace(config.train, repr_align_wt=0, output_dir=str(tmp_path / "plain"))))
    first, other = whole.history[0], plain.history[0]
    assert "alignment" not in other
    assert first["loss"] == pytest.approx(other["loss"] + 10 * first["alignment"], rel=1e-6)
    assert whole.history[-1]["alignment"] < 0.9 * first["alignment"]
    bound = train(align(make_config, start, max_steps=1, objective="elbo", output_dir=str(tmp_path / "elbo"))).history
    assert bound[0]["alignment"] == pytest.approx(first["alignment"], rel=1e-6)  # the mean of the same positions
    assert {file.name for file in whole.checkpoint.iterdir()} == {file.name for file in plain.checkpoint.iterdir()}
    sizes = [sum(file.stat().st_size for file in result.checkpoint.parent.rglob("*.distcp")) for result in
             (whole, plain)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01) and sizes[0] > 0  # no second model in them


@pytest.mark.parametrize("shift", [True, False])
def test_alignment_needs_starting_weights_that_predict_the_next_token(make_config, tmp_path, shift):
    config = make_config(repr_align_wt=10.0)
    if shift:
        with pytest.raises(UserError, match="weights of model.model_path, which is not set"):
            train(config)
        return
    start = make_config(max_steps=1, output_dir=str(tmp_path / "start"))
    start = train(replace(start, model=replace(start.model, family="llama", shift_logits=False))).checkpoint
    with pytest.raises(UserError, match="predict their own: set it to 0"):
        train(align(make_config, start))


@pytest.mark.parametrize("names, message", [
    ("norm,layers.7", "no parameter has 'layers.7' in its name"), ("model", "model leaves no parameter to train"),
])
def test_names_that_freeze_nothing_or_everything_are_refused(make_config, names, message):
    with pytest.raises(UserError, match=message):
        train(make_config(freeze_layers=names))


def test_activations_computed_again_train_alike(make_config, tmp_path):
    plain = train(make_config(max_steps=4))
    again = train(make_config(max_steps=4, enable_gradient_checkpointing=True, output_dir=str(tmp_path / "again")))
    assert losses(again.history) == losses(plain.history)


@pytest.mark.slow
def test_compiled_layers_train_alike(make_config, tmp_path):
    plain, compiled = (make_config(max_steps=3, save_steps=0, output_dir=str(tmp_path / name), enable_compile=compile)
                       for name, compile in (("plain", False), ("compiled", True)))
    plain, compiled = (train(replace(config, model=replace(config.model, num_hidden_layers=1),
                                     data=replace(config.data, validation_share=0.0))) for config in (plain, compiled))
    for ours, theirs in zip(losses(compiled.history), losses(plain.history), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_save_in_the_background_is_the_save_of_its_step(make_config, tmp_path):
    plain = train(make_config(max_steps=9, save_steps=3, save_hf_weights=False))
    behind = train(make_config(max_steps=9, save_steps=3, save_hf_weights=True, save_async=True,
                               output_dir=str(tmp_path / "behind")))
    assert losses(plain.history) == losses(behind.history)
    early = tmp_path / "behind/checkpoints/global_step_3/hf_ckpt"
    assert not (tmp_path / "run/checkpoints/global_step_3/hf_ckpt/model.safetensors").exists()
    config = make_config(max_steps=9, save_steps=3, output_dir=str(tmp_path / "third"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "make_batches", interrupt_at(4))
        train(config)
    third = DiffusionLM.from_pretrained(tmp_path / "third/checkpoints/global_step_3/hf_ckpt").state_dict()
    for name, tensor in DiffusionLM.from_pretrained(early).state_dict().items():
        assert torch.equal(tensor, third[name])


def test_a_changed_model_or_tokenizer_is_refused_naming_the_difference(make_config, tmp_path):
    start = train(make_config(max_steps=2, output_dir=str(tmp_path / "start"))).checkpoint
    config = replace(make_config(max_steps=4), model=ModelGroup(model_path=str(start)))
    train(config)
    described = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(described | {"rope_theta": 5000.0}))
    with pytest.raises(UserError, match="rope_theta was 10000.0 and is 5000.0; put it back"):
        train(config)
    (start / "config.json").write_text(json.dumps(described))
    tokenizer = json.loads((start / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (start / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="the tokenizer differs in 4 entries, such as 'a'"):
        train(config)
    words["a"], words["b"] = words["b"], words["a"]
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (start / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="the same words, but other rules to cut a text into them"):
        train(config)


@pytest.mark.slow
def test_checkpoints_are_evaluated_and_what_fails_is_told(make_config, corpus, tmp_path, capfd):
    tasks = f"perplexity --data {corpus} --windows 2 --samples 1; masked_accuracy --nonsense"
    result = train(make_config(max_steps=4, save_steps=2, eval_tasks=tasks))
    assert len(result.history) == 4
    lines = [json.loads(line) for line in (tmp_path / "run/evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[1]["perplexity/nats_per_token"] < lines[0]["perplexity/nats_per_token"] < 10
    assert (tmp_path / "run/evaluations/global_step_4/perplexity.json").exists()
    assert "note: evaluation masked_accuracy of global_step_2 failed: " in capfd.readouterr().err


def test_other_documents_are_refused(make_config, functions, tmp_path):
    (tmp_path / "code.txt").write_text("".join(functions))
    config = make_config(max_steps=2)
    config = replace(config, data=replace(config.data, train_path=str(tmp_path / "code.txt"), validation_share=0.0))
    train(config)
    (tmp_path / "code.txt").write_text("".join(functions) + "more")
    with pytest.raises(UserError, match="continues a run on other documents than there are now in .*code.txt"):
        train(config)


def test_metrics_go_to_tensorboard_and_a_profile_is_written_when_asked(make_config, tmp_path):
    train(make_config(max_steps=6, enable_profiling=True, profile_trace_dir=str(tmp_path / "trace"),
                      profile_start_step=2, profile_end_step=4))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [file.name for file in (tmp_path / "trace").iterdir()] == ["steps_3_to_4.json.gz"]


def test_a_dry_run_says_what_would_be_done_and_does_nothing(make_config, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(make_config(global_batch_size=8).to_yaml())
    assert main([str(path), "--dry-run", "--train.lr=0.5"]) == 0
    told = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(told)
    assert load_config(tmp_path / "again.yaml").train.lr == 0.5
    assert "# parameters: 28,256\n" in told and "# memory of each of 1 processes, estimated: " in told
    assert "# a step: 8 rows, at most 384 tokens; micro-batches of each process: 2\n# steps: 12; " in told
    assert not (tmp_path / "run").exists()
    assert main([str(path), "--dry-run", "--train.freeze_layers=mlp"]) == 0
    assert "# parameters: 28,256, 15,968 of them trained\n" in capsys.readouterr().out
