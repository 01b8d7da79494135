"""Every objective on micro-batches: packed as alone, in parts as whole, and equal to its definition."""

import pytest
import torch

from dllm.config.schema import TrainGroup
from dllm.data import PackedDataset
from dllm.diffusion.expansion import make_gaps
from dllm.diffusion.objectives import Targets
from dllm.diffusion_lm import DiffusionLM
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.infilling import Gap, fill
from dllm.model.families import ModelConfig
from dllm.training.batches import MicroBatch, forward, make_batches

CPU = torch.device("cpu")
EOS, EXPAND, MASK = 60, 62, 63
OBJECTIVES = {
    "mdm": {}, "path": {"path_term": True}, "elbo": {"objective": "elbo"}, "cart": {"objective": "cart"},
    "block_diffusion": {"objective": "block_diffusion", "block_length": 4},
    "expansion": {"objective": "expansion", "expand_token_id": EXPAND}, "ar": {"objective": "ar"}}


def make_model(**keys) -> DiffusionLM:
    torch.manual_seed(0)
    return DiffusionLM(ModelConfig(**{
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "qk_norm": True, "mask_token_id": MASK, "eos_token_id": EOS,
        "initializer_range": 0.3, **keys}))


def make_dataset(longest: int, max_seq_len=16) -> PackedDataset:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, longest, (50,), generator=generator).tolist()
    documents = [torch.randint(EOS, (n,), generator=generator) for n in lengths]
    return PackedDataset([torch.cat((tokens, torch.tensor([EOS]))) for tokens in documents], max_seq_len)


def make_settings(**keys) -> TrainGroup:
    return TrainGroup(output_dir="x", **keys)


class Conversations:
    """Rows of a dataset whose documents begin with three tokens that are not trained on."""

    def __init__(self, dataset):
        self.dataset = dataset

    def read(self, places):
        packed = self.dataset.read(places)
        starts = packed.cu_seqlens[:-1].long()
        document = torch.repeat_interleave(starts, packed.cu_seqlens.diff())
        return packed._replace(trainable=torch.arange(len(packed.tokens)) - document >= 3)


def gradients_of(loss, model) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shift", [False, True])
def test_packed_documents_train_as_each_of_them_alone(name, shift):
    model, dataset = make_model(shift_logits=shift), make_dataset(longest=15)
    settings = make_settings(micro_batch_size=8, **OBJECTIVES[name])
    batch, = make_batches(dataset, 0, range(8), 8, settings, 1, model)
    assert batch.cu_seqlens is not None and len(batch.cu_seqlens) > 9
    packed = forward(model, batch, CPU).loss
    alone = sum(forward(model, document, CPU).loss for document in cut_documents(batch))
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    ours, theirs = (gradients_of(loss, model) for loss in (packed, alone))
    assert ours.norm() > 0 and (ours - theirs).norm() <= 1e-5 * theirs.norm()


def cut_documents(batch: MicroBatch):
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        parts = [x[start:end] if isinstance(x, torch.Tensor) and x.ndim else x for x in batch.targets]
        targets = Targets(*parts)._replace(count=None)
        yield batch._replace(
            input_ids=batch.input_ids[:, start:end], cu_seqlens=None, max_seqlen=int(end - start), targets=targets,
            clean_ids=None if batch.clean_ids is None else batch.clean_ids[:, start:end])


@pytest.mark.parametrize("name, conversations", [
    *((name, False) for name in OBJECTIVES), *((name, True) for name in OBJECTIVES if name != "expansion")])
def test_micro_batches_of_any_size_give_the_gradients_of_the_whole(name, conversations):
    dataset, model = make_dataset(longest=40), make_model()
    if conversations:
        dataset = Conversations(dataset)
    gradients = []
    for size in (12, 6, 4, 1):
        settings = make_settings(micro_batch_size=size, global_batch_size=12, **OBJECTIVES[name])
        batches = make_batches(dataset, 5, range(12), 12, settings, 1, model)
        assert len(batches) == 12 // size
        loss = sum(forward(model, batch, CPU).loss for batch in batches) / sum(b.normaliser for b in batches)
        gradients.append(gradients_of(loss, model))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("name, corrupt_prompt", [
    ("mdm", False), ("mdm", True), ("elbo", False), ("block_diffusion", False), ("cart", False)])
def test_prompts_are_neither_scored_nor_unless_asked_corrupted(name, corrupt_prompt):
    source, model = Conversations(make_dataset(longest=40)), make_model()
    settings = make_settings(micro_batch_size=40, corrupt_prompt=corrupt_prompt, **OBJECTIVES[name])
    batch, = make_batches(source, 0, range(40), 40, settings, 1, model)
    trainable = source.read(range(40)).trainable
    masked = batch.input_ids.flatten() == MASK
    assert torch.equal(batch.targets.scored.roll(1), masked & trainable) and masked[trainable].any()
    assert masked[~trainable].any() == corrupt_prompt
    assert batch.normaliser == (trainable if name != "mdm" else masked & trainable).sum()


def test_the_token_that_is_always_masked_is_one_to_learn():
    source, model = Conversations(make_dataset(longest=8)), make_model()
    for corrupt_prompt in (False, True):
        settings = make_settings(micro_batch_size=8, mask_at_least_one=True, corrupt_prompt=corrupt_prompt)
        batch, = make_batches(source, 0, range(8), 8, settings, 1, model)
        documents = batch.targets.scored.tensor_split(batch.cu_seqlens[1:-1].long())
        assert all(scored.any() for scored in documents if len(scored) > 3)


def test_gaps_are_masked_merged_and_padded_with_deletions():
    packed = make_dataset(longest=40, max_seq_len=48).read(range(30))
    times = torch.rand(len(packed.cu_seqlens) - 1, generator=torch.Generator().manual_seed(0))
    got, corruption = make_gaps(packed, 0, 0, 1, 50, delete=EOS, expand=EXPAND, mask=MASK, times=times)
    assert torch.equal(corruption.noisy, torch.where(corruption.corrupted, MASK, got.tokens))
    before = packed.tokens.split(packed.cu_seqlens.diff().tolist())
    lengths = got.cu_seqlens.diff().tolist()
    assert max(lengths) == got.max_seqlen <= 50 and sum(lengths) == len(got.tokens) == len(got.row)
    deletions, merges = [], 0
    for old, new, masked, t in zip(before, got.tokens.split(lengths), corruption.corrupted.split(lengths),
                                   corruption.t.split(lengths), strict=True):
        assert len(t.unique()) == 1
        places = masked.nonzero().flatten()
        first, last = (int(places[0]), int(places[-1])) if len(places) else (0, -1)
        assert torch.equal(new[:first], old[:first])  # text before the gap, and after it, the end of it included
        after = len(new) - last - 1
        assert after >= 1 and torch.equal(new[len(new) - after:], old[len(old) - after:])
        gap = new[first:last + 1]
        deleted = int((gap == EOS).sum())
        assert (gap[len(gap) - deleted:] == EOS).all()  # at the end of the gap
        deletions.append(deleted)
        assert len(new) <= 2 * len(old)
        kept = [token for token in gap.tolist() if token not in (EOS, EXPAND)]
        rest = iter(old[first:len(old) - after].tolist())
        assert all(token in rest for token in kept)  # in their order
        merged = len(old) - first - after - (len(gap) - deleted)
        assert merged >= (gap == EXPAND).sum() and (merged > 0) == bool((gap == EXPAND).any())
        merges += merged
    assert merges > 20 and min(deletions) == 0 and max(deletions) > 10


def test_an_end_of_text_alone_is_left_alone():
    packed = PackedDataset([torch.tensor([EOS]), torch.tensor([1, EOS])], 8).gather(torch.tensor([0]))
    got, corruption = make_gaps(packed, 0, 0, 1, 8, delete=EOS, expand=EXPAND, mask=MASK, times=torch.tensor([.9, .9]))
    lone = [tokens.tolist() for tokens in got.tokens.split(got.cu_seqlens.diff().tolist())]
    assert [EOS] in lone and [1, *[EOS] * (len(got.tokens) - 2)] in lone
    assert not corruption.corrupted[got.cu_seqlens[1:].long() - 1].any()


@pytest.mark.slow
def test_a_trained_model_shrinks_gaps_that_are_too_long_and_grows_those_that_are_too_short():
    lines = ["total = max(a, 7)", "k = 3", "names = list(row)", "return", "cut = size - left[0]", "x += 1",
             "print(row, end='')", "pass"]
    letters = {letter: i for i, letter in enumerate(sorted({*"".join(lines), *"01234567:"}))}
    texts = [torch.tensor([*(letters[c] for c in f"{i}:{line}"), EOS]) for i, line in enumerate(lines)]
    model = make_model(shift_logits=False, hidden_size=64, intermediate_size=128, head_dim=16, initializer_range=0.05)
    dataset, steps = PackedDataset(texts * 8, 32), 600
    rows = len(dataset)
    settings = make_settings(micro_batch_size=rows, **OBJECTIVES["expansion"])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(step / 20, 1 - step / steps)
        batch, = make_batches(dataset, step, range(rows), rows, settings, 0, model)
        (forward(model, batch, CPU).loss / batch.normaliser).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    config = MDMGenerationConfig(alg="maskgit_plus", steps=100, temperature=0.0, expand_token_id=EXPAND)
    gaps, asked = [], []
    for text in texts:
        for start in range(2, len(text) - 1, 2):
            for length in range(1, min(9, len(text) - start)):
                for masks, kind in ((2 * length, "too long"), (length // 2, "too short")):
                    if masks:
                        gaps.append(Gap(text[:start], text[start + length:], masks))
                        asked.append((kind, text[start:start + length].tolist()))
    right = {"too long": [], "too short": []}
    for (kind, truth), answer in zip(asked, fill(model.eval(), gaps, config).answers, strict=True):
        right[kind].append(answer.tolist() == truth)
    shares = {kind: sum(values) / len(values) for kind, values in right.items()}
    assert shares["too long"] > 0.85 and shares["too short"] > 0.4, shares


@pytest.mark.parametrize("schedule", ["linear", "cube"])
def test_a_share_of_masks_that_is_given_holds_in_every_block(schedule):
    """Prompts of conversations stay visible; the other tokens weigh what they do at that share."""
    source, model = Conversations(make_dataset(longest=40)), make_model()
    keys = {"micro_batch_size": 40, "objective": "block_diffusion", "block_length": 4, "schedule": schedule}
    masked = {}
    for share in (0.25, 1.0):
        batch, = make_batches(source, 0, range(40), 40, make_settings(masked_share=share, **keys), 1, model)
        masked[share] = (batch.input_ids.flatten() == MASK)[source.read(range(40)).trainable].float().mean()
        assert batch.targets.weights.unique().numel() == 1
    assert masked[0.25] == pytest.approx(0.25, abs=0.08) and masked[1.0] > 0.98
