"""Training on uniform words and with self-conditioning: micro-batches, a toy that is learnt, resuming, bad input."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dllm import DiffusionLM, UserError
from dllm.config.schema import ModelGroup, TrainGroup
from dllm.data import PackedDataset
from dllm.diffusion import uniform
from dllm.model.families import FAMILIES, ModelConfig, read_config
from dllm.model.growth import add_self_conditioning
from dllm.training.batches import forward, make_batches, predicts_twice
from dllm.training.trainer import train
from dllm_kernels import chunks
from tests.dllm.training.test_distributed import assert_close, read, run
from tests.dllm.training.test_training_objectives import Conversations, gradients_of, make_dataset

CPU, MASK = torch.device("cpu"), 63
KINDS = [{}, {"uniform_share": 0.2}, {"uniform_share": 0.0, "loss_weighting": "dynamic"},
         {"schedule": "cosine", "loss_weighting": "clip"}, {"uniform_share": 0.5, "self_conditioning": 1.0},
         {"objective": "mdm", "self_conditioning": 1.0}, {"objective": "cart", "self_conditioning": 1.0}]


def make_model(**keys) -> DiffusionLM:
    torch.manual_seed(0)
    return DiffusionLM(ModelConfig(**{
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "qk_norm": True, "mask_token_id": MASK, "eos_token_id": 60,
        "initializer_range": 0.3, **keys})).eval()


def prepare(kind: dict, **keys):
    """Settings of a kind of training, and a model for them."""
    settings = TrainGroup(**{"output_dir": "x", "objective": "uniform", **kind, **keys})
    model = make_model(uniform_share=settings.noise_share, self_conditioning=settings.self_conditioning_chance > 0)
    if model.self_condition is not None:
        torch.nn.init.normal_(model.self_condition.weight, std=0.5)
    return settings, model


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("conversations", [False, True])
def test_micro_batches_of_any_size_give_the_gradients_of_the_whole(kind, conversations):
    dataset = make_dataset(longest=40)
    dataset = Conversations(dataset) if conversations else dataset
    gradients = []
    for size in (12, 4, 1):
        settings, model = prepare(kind, micro_batch_size=size, global_batch_size=12)
        batches = make_batches(dataset, 5, range(12), 12, settings, 1, model)
        assert all(batch.conditioned == (settings.self_conditioning_chance > 0) for batch in batches)
        loss = sum(forward(model, batch, CPU).loss for batch in batches) / sum(b.normaliser for b in batches)
        gradients.append(gradients_of(loss, model))
    for gradient in gradients[1:]:
        assert gradient.norm() > 0 and (gradient - gradients[0]).norm() <= 2e-5 * gradients[0].norm()


def test_the_loss_does_not_depend_on_chunks_and_autocast_stays_near(monkeypatch):
    settings, model = prepare({"uniform_share": 0.2}, micro_batch_size=8)
    batch, = make_batches(make_dataset(longest=40), 0, range(8), 8, settings, 1, model)
    whole = forward(model, batch, CPU).loss
    gradient = gradients_of(whole, model)
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", {"cpu": 64 * 7 * 4, "cuda": 0})
    stored, compute = [], uniform.score_noise

    def record(logits, *values):
        stored.append(len(logits))
        return compute(logits, *values)

    monkeypatch.setattr(uniform, "score_noise", record)
    parts = forward(model, batch, CPU).loss
    assert max(stored) == 7 and sum(stored) == batch.scored
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)
    assert (gradients_of(parts, model) - gradient).norm() <= 1e-4 * gradient.norm()
    with torch.autocast("cpu", torch.bfloat16):
        rough = forward(model, batch, CPU).loss
    assert rough.item() == pytest.approx(whole.item(), rel=0.03)
    assert (gradients_of(rough, model) - gradient).norm() <= 0.1 * gradient.norm()


def test_losses_by_the_share_of_noise_sum_to_all_of_them():
    settings, model = prepare({}, micro_batch_size=16)
    batch, = make_batches(make_dataset(longest=40), 0, range(16), 16, settings, 1, model, by_ratio=True)
    sums = forward(model, batch, CPU)
    assert sums.by_ratio[0].sum().item() == pytest.approx(sums.nll.item(), rel=1e-5)
    assert sums.by_ratio[1].sum() == batch.scored and (sums.by_ratio[1] > 0).all()


@pytest.mark.parametrize("shift", [False, True])
def test_a_second_prediction_sees_the_first_where_tokens_are_predicted(shift):
    settings = TrainGroup(output_dir="x", objective="elbo", micro_batch_size=4, self_conditioning=1.0)
    model = make_model(self_conditioning=True, shift_logits=shift)
    torch.nn.init.normal_(model.self_condition.weight, std=0.5)
    batch, = make_batches(PackedDataset([torch.arange(1, 13)] * 4, 12), 0, range(4), 4, settings, 1, model)
    assert batch.conditioned
    embedding, head = model.model.embed_tokens.weight, model.head_weight
    p = F.linear(model.hidden_states(batch.input_ids), head).softmax(-1)
    if shift:
        p = p.roll(1, 1)
    masked = batch.input_ids == MASK
    if shift:
        masked[:, 0] = False
    expected = F.linear(model.hidden_states(batch.input_ids, predicted=(p @ embedding) * masked.unsqueeze(-1)), head)
    logs = expected.log_softmax(-1).flatten(0, 1)
    targets = batch.targets
    losses = -logs.gather(1, targets.tokens.unsqueeze(1)).squeeze(1) * targets.weights * targets.scored
    assert forward(model, batch, CPU).loss.item() == pytest.approx(losses.sum().item(), rel=1e-4)
    once = forward(model, batch._replace(conditioned=False), CPU).loss.item()
    assert once != pytest.approx(losses.sum().item(), rel=1e-3)


def test_about_as_many_steps_predict_twice_as_the_chance_says_whatever_the_process():
    settings = TrainGroup(output_dir="x", objective="elbo", self_conditioning=0.5)
    drawn = [predicts_twice(settings, 7, step) for step in range(400)]
    assert 150 < sum(drawn) < 250 and drawn == [predicts_twice(settings, 7, step) for step in range(400)]
    assert not predicts_twice(TrainGroup(output_dir="x"), 7, 0)


def test_self_conditioning_changes_nothing_at_first_and_is_saved_and_loaded(tmp_path):
    plain, ids = make_model(), torch.arange(8).unsqueeze(0)
    model = add_self_conditioning(make_model())
    predicted = torch.randn(1, 8, 32)
    assert torch.equal(model.hidden_states(ids, predicted=predicted), plain.hidden_states(ids))
    torch.nn.init.normal_(model.self_condition.weight)
    model.save_pretrained(tmp_path)
    again = DiffusionLM.from_pretrained(tmp_path)
    assert again.config.self_conditioning
    assert torch.equal(again.hidden_states(ids, predicted=predicted), model.hidden_states(ids, predicted=predicted))
    assert not torch.equal(again.hidden_states(ids, predicted=predicted), plain.hidden_states(ids))


@pytest.mark.parametrize("family", ["qwen2", "llama", "Dream", "llada", "llada_moe"])
def test_every_familys_folder_says_which_noise_a_model_knows(family, tmp_path):
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16} if "moe" in family else {}
    model = make_model(**{"qk_norm": False, "family": family, "uniform_share": 0.2, "head_dim": 8,
                          "num_key_value_heads": 4, **FAMILIES[family].fixed, **experts})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["uniform_share"] == 0.2
    assert DiffusionLM.from_pretrained(tmp_path).config.uniform_share == 0.2
    assert "uniform_share" not in json.loads(
        (make_and_save(tmp_path / "plain") / "config.json").read_text())


def make_and_save(folder):
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture
def make_config(make_short_run):
    return partial(make_short_run, objective="uniform", max_steps=4, save_steps=2)


def test_a_toy_is_learnt_and_sampled_and_corrections_mend_what_is_wrong(tmp_path):
    """Four texts of eight letters: their unigrams have 2 nats a letter, the texts themselves 1.4 in all."""
    texts = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1], [2, 4, 6, 8, 1, 3, 5, 7],
                          [7, 7, 5, 5, 3, 3, 1, 1]])
    torch.manual_seed(0)
    model = DiffusionLM(ModelConfig(
        vocab_size=10, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=12, qk_norm=True, mask_token_id=9, initializer_range=0.06, shift_logits=False,
        tie_word_embeddings=False, uniform_share=0.2))
    settings = TrainGroup(output_dir="x", objective="uniform", uniform_share=0.2, micro_batch_size=32,
                          loss_weighting="dynamic")
    dataset = PackedDataset([*texts.repeat(16, 1)], 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 150)
        batch, = make_batches(dataset, step, range(32), 32, settings, 0, model)
        (forward(model, batch, CPU).loss / batch.normaliser).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    bound = model.perplexity_bound(texts, samples=64)
    unigrams = torch.bincount(texts.flatten(), minlength=10)[1:9] / 32
    unigram_nats = -8 * (unigrams * unigrams.log()).sum()
    assert (bound.nats < 0.5 * unigram_nats).all() and (bound.nats + 3 * bound.stderr > 1).all(), bound
    settings = {"alg": "ancestral", "temperature": 1.0, "max_new_tokens": 8, "steps": 16, "seed": 0,
                "num_return_sequences": 40}
    known = {tuple(text) for text in texts.tolist()}

    def right(**more) -> int:
        out = model.diffusion_generate(torch.zeros(1, 0, dtype=torch.long), **settings, **more)
        assert out.steps <= 16 + more.get("correction_steps", 0)
        return sum(tuple(row) in known for row in out.sequences.tolist())

    plain, corrected = right(), right(correction_steps=16)
    assert plain >= 8 and corrected >= 26 and corrected > plain, (plain, corrected)  # of 40; by chance none
    filled = model.infill(texts[:, :2], texts[:, 6:], length=4, alg="ancestral", temperature=1.0, steps=16, seed=1,
                          greedy_end=True)
    assert (filled.sequences == texts).all(1).sum() >= 3


def test_a_run_writes_a_folder_that_samples_bounds_and_goes_on_bit_for_bit(make_config, tmp_path):
    config = make_config(uniform_share=0.2, self_conditioning=0.5, loss_weighting="clip")
    whole = train(config)
    last = whole.history[-1]
    assert {"validation_loss", "validation_bound", "validation_bits_per_byte"} <= last.keys()
    assert last["validation_bound"] > last["validation_loss"]
    folder = tmp_path / "again"
    shutil.copytree(tmp_path / "run", folder)
    shutil.rmtree(folder / "checkpoints" / "global_step_4")
    again = train(replace(config, train=replace(config.train, output_dir=str(folder))))
    assert read(folder) == read(tmp_path / "run")
    model, other = (DiffusionLM.from_pretrained(result.checkpoint) for result in (whole, again))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in other.state_dict().items())
    assert model.config.uniform_share == 0.2 and model.config.self_conditioning
    out = model.diffusion_generate([[5, 6]], max_new_tokens=6, steps=3)  # by the folder's own method
    assert (out.sequences != model.mask_token_id).all()
    with pytest.raises(UserError, match="holds a run with train.uniform_share 0.2, not 0.3"):
        train(replace(config, train=replace(config.train, uniform_share=0.3)))


@pytest.mark.slow
def test_a_masked_model_gets_self_conditioning_lora_trains_it_and_masks_come_back(make_config, model_folder, tmp_path):
    config = make_config(max_steps=2, lora_rank=2, save_steps=0, self_conditioning=1.0)
    config = replace(config, model=ModelGroup(model_path=str(model_folder)))
    result = train(config)
    model = DiffusionLM.from_pretrained(result.checkpoint)
    assert model.config.uniform_share == 1 and model.self_condition.weight.any()
    back = replace(config, model=ModelGroup(model_path=str(result.checkpoint)), train=replace(
        config.train, output_dir=str(tmp_path / "back"), objective="mdm", lora_rank=0))
    masked = DiffusionLM.from_pretrained(train(back).checkpoint)
    assert masked.config.uniform_share is None
    assert (masked.diffusion_generate([[5, 6]], max_new_tokens=4, steps=2).sequences != masked.mask_token_id).all()


@pytest.mark.slow
def test_two_processes_equal_one(make_config, tmp_path):
    config = make_config(micro_batch_size=1, global_batch_size=2, save_steps=0, max_grad_norm=0.0, uniform_share=0.3,
                         self_conditioning=0.5)
    for processes, mode in ((1, "ddp"), (2, "ddp"), (2, "fsdp2")):
        output = tmp_path / f"{processes}{mode}"
        path = output.with_suffix(".yaml")
        path.write_text(replace(config, train=replace(config.train, output_dir=str(output),
                                                      data_parallel_mode=mode)).to_yaml())
        run(processes, path)
    for mode in ("ddp", "fsdp2"):
        assert_close(read(tmp_path / f"2{mode}"), read(tmp_path / "1ddp"), 1e-5)


@pytest.mark.parametrize("keys, message", [
    ({"uniform_share": 1.5}, "train.uniform_share must be at least 0 and at most 1, not 1.5"),
    ({"uniform_share": -0.1}, "train.uniform_share must be at least 0 and at most 1, not -0.1"),
    ({"objective": "mdm", "uniform_share": 0.0}, "train.uniform_share 0.0 needs train.objective=uniform, not 'mdm'"),
    ({"objective": "elbo", "loss_weighting": "clip"}, "train.loss_weighting clip needs train.objective=uniform"),
    ({"loss_weighting": "dynamic"}, "train.uniform_share 1 has no masks; set clip, or a lower share"),
    ({"uniform_share": 0.5, "schedule": "cosine"}, "has GIDD's own schedule: set train.schedule to linear, not cosine"),
    ({"path_term": True}, "train.path_term True needs train.objective=mdm"),
    ({"block_length": 4}, "train.objective=block_diffusion and train.block_length"),
    ({"corrupt_prompt": True}, "train.corrupt_prompt True needs train.objective=mdm"),
    ({"objective": "ar", "self_conditioning": 0.5}, "train.self_conditioning 0.5 needs train.objective=mdm or elbo"),
    ({"self_conditioning": 0.5, "ulysses_parallel_size": 2}, "train.self_conditioning predicts whole rows in one"),
    ({"self_conditioning": 2.0}, "train.self_conditioning must be at least 0 and at most 1")])
def test_keys_that_do_not_go_together_are_refused_with_the_remedy(make_config, keys, message):
    with pytest.raises(UserError) as error:
        make_config(**keys)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keys, name", [({}, "objective=uniform"),
                                        ({"objective": "mdm", "self_conditioning": 0.5}, "self_conditioning=0.5")])
def test_models_with_blocks_are_refused(make_config, model_folder, tmp_path, keys, name):
    folder = tmp_path / "blocks"
    shutil.copytree(model_folder, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "block_size": 4}))
    with pytest.raises(UserError, match=f"train.{name} is about all tokens .*choose a model without blocks"):
        train(replace(make_config(**keys), model=ModelGroup(model_path=str(folder))))


@pytest.mark.parametrize("changes, message", [
    ({"uniform_share": 0.3, "mask_token_id": None}, "nothing names the mask token; add mask_token_id"),
    ({"uniform_share": 1.2}, "uniform_share must be none or at least 0 and at most 1, not 1.2"),
    ({"uniform_share": 1.0, "block_causal": True}, "uniform_share needs a model without blocks"),
    ({"self_conditioning": True, "block_causal": True}, "self_conditioning needs a model without blocks")])
def test_models_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError) as error:
        make_model(**changes)
    assert message.split(" must")[0] in str(error.value) and "\n" not in str(error.value)
    raw = {"model_type": "qwen3", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
           "num_attention_heads": 1, "uniform_share": 2}
    with pytest.raises(UserError, match="uniform_share"):
        read_config(raw)
