"""Every objective on micro-batches: packed as alone, in parts as whole, and each what its definition says."""


import pytest
import torch
import torch.nn.functional as F

from dllm.batches import MicroBatch, cut_blocks, forward, make_batches, open_mask
from dllm.config import TrainGroup
from dllm.data import PackedDataset
from dllm.errors import UserError
from dllm.expansion import MOST_DELETIONS, corrupt_gaps
from dllm.families import ModelConfig
from dllm.loss import Targets
from dllm.model import DiffusionLM
from dllm.optimizer import freeze_layers
from dllm.sampler import MDMGenerationConfig, infill

CPU = torch.device("cpu")
EOS, EXPAND, MASK = 60, 62, 63
OBJECTIVES = {
    "mdm": {}, "path": {"path_term": True}, "elbo": {"objective": "elbo"}, "cart": {"objective": "cart"},
    "block_diffusion": {"objective": "block_diffusion", "block_length": 4},
    "expansion": {"objective": "expansion", "expand_token_id": EXPAND}, "annealed": {"anneal_attention_ratio": 1.0},
    "aligned": {"repr_align_wt": 3.0}, "ar": {"objective": "ar"}}


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


def teacher_of(settings):
    if not settings.repr_align_wt:
        return {}
    torch.manual_seed(1)
    teacher = make_model()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return {"teacher": teacher, "repr_align_wt": settings.repr_align_wt}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shift", [False, True])
def test_packed_documents_train_as_each_of_them_alone(name, shift):
    model, dataset = make_model(shift_logits=shift), make_dataset(longest=15)
    settings = make_settings(micro_batch_size=8, **OBJECTIVES[name])
    keys = teacher_of(settings)
    batch, = make_batches(dataset, 0, range(8), 8, settings, 1, model, progress=0.3)
    assert batch.cu_seqlens is not None and len(batch.cu_seqlens) > 9
    assert (batch.visible is not None) == (name == "annealed")
    packed = forward(model, batch, CPU, **keys).loss
    alone = sum(forward(model, document, CPU, **keys).loss for document in cut_documents(batch))
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    ours, theirs = (gradients_of(loss, model) for loss in (packed, alone))
    assert ours.norm() > 0 and (ours - theirs).norm() <= 1e-5 * theirs.norm()


def cut_documents(batch: MicroBatch):
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        n = int(end - start)
        targets = Targets(*(value if value is None or value.ndim == 0 else value[start:end] for value in batch.targets))
        yield batch._replace(
            input_ids=batch.input_ids[:, start:end], clean_ids=batch.clean_ids[:, start:end], cu_seqlens=None,
            max_seqlen=n, targets=targets, visible=None if batch.visible is None else batch.visible[:n, :n],
            ends_block=None if batch.ends_block is None else batch.ends_block[start:end])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("source", ["documents", "conversations"])
def test_micro_batches_of_any_size_give_the_gradients_of_the_whole(name, source):
    dataset, model = make_dataset(longest=40), make_model()
    if source == "conversations":
        dataset = Conversations(dataset)
    gradients = []
    for size in (12, 6, 4, 1):
        settings = make_settings(micro_batch_size=size, global_batch_size=12, **OBJECTIVES[name])
        keys = teacher_of(settings)
        if name == "expansion" and source == "conversations":
            with pytest.raises(UserError, match="plain documents"):
                make_batches(dataset, 5, range(12), 12, settings, 1, model)
            return
        batches = make_batches(dataset, 5, range(12), 12, settings, 1, model, progress=0.5)
        assert len(batches) == 12 // size
        loss = sum(forward(model, batch, CPU, **keys).loss for batch in batches) / sum(b.normaliser for b in batches)
        gradients.append(gradients_of(loss, model))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


# Conversations


@pytest.mark.parametrize("name", ["mdm", "elbo", "block_diffusion", "cart"])
@pytest.mark.parametrize("corrupt_prompt", [False, True])
def test_prompts_are_neither_scored_nor_unless_asked_corrupted(name, corrupt_prompt):
    if corrupt_prompt and name != "mdm":
        return
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


# Block diffusion


@pytest.mark.parametrize("shift", [False, True])
def test_block_diffusion_trains_on_what_a_sampler_sees(shift):
    """The blocks before finished, its own noisy; under shift a block's first token is read from the block before."""
    model, n = make_model(shift_logits=shift), 4
    settings = make_settings(objective="block_diffusion", block_length=n, micro_batch_size=8)
    batch, = make_batches(make_dataset(longest=15), 0, range(8), 8, settings, 1, model)
    expected, scored = 0, 0
    for document in cut_documents(batch):
        for start in range(0, document.max_seqlen, n):
            canvas = torch.cat((document.clean_ids[:, :start], document.input_ids[:, start:start + n]), 1)
            logits = F.linear(model.hidden_states(canvas, block_length=n), model.head_weight)[0]
            for i in range(max(start, shift), canvas.shape[1]):
                if canvas[0, i] == MASK:
                    weight = document.targets.weights[i - shift]
                    expected += weight * F.cross_entropy(logits[i - shift], document.clean_ids[0, i])
                    scored += 1
    assert scored == batch.scored
    assert forward(model, batch, CPU).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("shift", [False, True])
def test_one_block_per_document_is_the_elbo(shift):
    model, dataset = make_model(shift_logits=shift), make_dataset(longest=15)
    blocks = make_settings(objective="block_diffusion", block_length=16, micro_batch_size=8)
    whole = make_settings(objective="elbo", micro_batch_size=8)
    losses = [forward(model, make_batches(dataset, 0, range(8), 8, settings, 1, model)[0], CPU).loss
              for settings in (blocks, whole)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)


def test_each_block_has_its_own_time():
    model, dataset = make_model(shift_logits=False), PackedDataset([torch.arange(59).repeat(36)], 18)
    settings = make_settings(objective="block_diffusion", block_length=4, micro_batch_size=16)
    batch, = make_batches(dataset, 0, range(16), 16, settings, 1, model)
    times = (1 / batch.targets.weights).view(16, 18)
    blocks = times[:, :16].unflatten(1, (4, 4))
    assert torch.equal(blocks.amin(-1), blocks.amax(-1)) and torch.equal(times[:, 16], times[:, 17])
    every = torch.cat((blocks[..., 0], times[:, 16:17]), 1).flatten().sort().values
    gaps = every.diff(prepend=torch.zeros(1), append=torch.ones(1)) * len(every)
    assert len(every.unique()) > 75 and gaps.max() < 3.5
    assert cut_blocks(torch.tensor([0, 5, 6, 14]), 4).tolist() == [0, 4, 5, 6, 10, 14]


# Annealing of the attention


def test_the_causal_mask_opens_as_the_run_goes_on():
    model, dataset = make_model(), make_dataset(longest=15)
    settings = make_settings(anneal_attention_ratio=0.5, micro_batch_size=8)

    def batch_at(progress, step=3, seed=1):
        return make_batches(dataset, step, range(8), 8, settings, seed, model, progress)[0]

    first = batch_at(0.0)
    causal = first._replace(visible=None, block_length=1)
    assert forward(model, first, CPU).loss.item() == pytest.approx(forward(model, causal, CPU).loss.item(), rel=1e-6)
    assert batch_at(0.5).visible is None and batch_at(1.0).visible is None
    assert torch.equal(batch_at(0.2).visible, batch_at(0.2).visible)
    assert not torch.equal(batch_at(0.2).visible, batch_at(0.2, step=4).visible)
    masks = [open_mask(100, share, 0, 0) for share in (0.0, 0.3, 0.6)]
    upper = torch.ones(100, 100).triu(1).bool()
    for mask, share in zip(masks, (0.0, 0.3, 0.6), strict=True):
        assert mask[~upper].all() and abs(mask[upper].float().mean() - share) < 0.02
    assert (masks[2] | ~masks[1]).all()  # of one step, what is open at a smaller share is open at a larger one


def test_a_visible_mask_excludes_what_it_would_contradict():
    model, ids = make_model(), torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="visible excludes"):
        model.hidden_states(ids, visible=torch.ones(4, 4).bool(), block_length=1)
    with pytest.raises(ValueError, match="clean_ids needs block_length"):
        model.hidden_states(ids, clean_ids=ids)


# Gaps that grow and shrink


def test_gaps_are_masked_merged_and_padded_with_deletions():
    packed = make_dataset(longest=40, max_seq_len=48).read(range(30))
    S, T = len(packed.cu_seqlens) - 1, len(packed.tokens)
    generator = torch.Generator().manual_seed(0)
    times, uniform, choices = (torch.rand(*shape, generator=generator, dtype=torch.float64)
                               for shape in ((S,), (T, 2), (S, 4)))
    got, corruption = corrupt_gaps(packed, times, uniform, choices, room=64, mask_token_id=MASK, expand_token_id=EXPAND,
                                   delete_token_id=EOS)
    assert torch.equal(corruption.noisy, torch.where(corruption.corrupted, MASK, got.tokens))
    before = packed.tokens.split(packed.cu_seqlens.diff().tolist())
    lengths = got.cu_seqlens.diff().tolist()
    assert max(lengths) == got.max_seqlen <= 64 and sum(lengths) == len(got.tokens) == len(got.row)
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
        kept = [token for token in gap.tolist() if token not in (EOS, EXPAND)]
        rest = iter(old[first:len(old) - after].tolist())
        assert all(token in rest for token in kept)  # in their order
        merged = len(old) - first - after - (len(gap) - deleted)
        assert merged >= (gap == EXPAND).sum() and (merged > 0) == bool((gap == EXPAND).any())
        merges += merged
    assert merges > 20 and min(deletions) < 5 and 45 < max(deletions) <= MOST_DELETIONS


def test_an_end_of_text_alone_is_left_alone():
    packed = PackedDataset([torch.tensor([EOS]), torch.tensor([1, EOS])], 8).gather(torch.tensor([0]))
    high = torch.full((3, 2), 0.99)
    got, corruption = corrupt_gaps(packed, torch.tensor([0.9, 0.9]), high * 0, torch.full((2, 4), 0.99), room=8,
                                   mask_token_id=MASK, expand_token_id=EXPAND, delete_token_id=EOS)
    lone = [tokens.tolist() for tokens in got.tokens.split(got.cu_seqlens.diff().tolist())]
    assert sorted(lone) == [[1, *[EOS] * 7], [EOS]] and corruption.corrupted.sum() == 7


def test_one_end_of_text_is_needed_to_delete():
    settings = make_settings(micro_batch_size=2, **OBJECTIVES["expansion"])
    for ids in ([1, 2], None):
        with pytest.raises(UserError, match="one eos_token_id"):
            make_batches(make_dataset(9), 0, range(2), 2, settings, 1, make_model(eos_token_id=ids))


# Alignment and freezing


def test_alignment_to_oneself_is_zero_under_causal_attention_only():
    model = make_model()
    batch, = make_batches(make_dataset(15), 0, range(8), 8, make_settings(micro_batch_size=8), 1, model)
    causal = batch._replace(input_ids=batch.clean_ids, block_length=1)
    assert abs(forward(model, causal, CPU, teacher=model, repr_align_wt=1.0).misalignment) < 1e-3
    sums, plain = forward(model, batch, CPU, teacher=model, repr_align_wt=2.0), forward(model, batch, CPU)
    assert sums.misalignment > 1 and plain.misalignment is None
    assert sums.loss.item() == pytest.approx((plain.loss + 2 * sums.misalignment).item(), rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(tied):
    model = make_model(tie_word_embeddings=tied)
    batch, = make_batches(make_dataset(15), 0, range(4), 4, make_settings(micro_batch_size=4), 1, model)
    forward(model, batch, CPU).loss.backward()
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    freeze_layers(model, "LM_head, embed_tokens,.mlp")
    forward(model, batch, CPU).loss.backward()
    for name, parameter in model.named_parameters():
        frozen = any(part in name for part in ("lm_head", "embed_tokens", "mlp"))
        assert (parameter.grad is None) == frozen == (not parameter.requires_grad), name
        assert frozen or torch.allclose(parameter.grad, before[name], atol=1e-5), name


def test_names_of_no_parameter_and_of_all_are_refused():
    for names in (None, "", " , "):
        freeze_layers(make_model(), names)
    with pytest.raises(UserError, match=r"no parameter has 'attn_out' in .*; .*layers.\*.self_attn.q_proj"):
        freeze_layers(make_model(), "mlp,attn_out")
    with pytest.raises(UserError, match="freezes every parameter"):
        freeze_layers(make_model(), "model,lm_head")


# Learning


LINES = [f"{name} = {call}({'abcdefgh'[i]}, {i * 7 + j})" for i, name in enumerate(
    ("total", "row", "names", "left", "cut", "size", "words", "k")) for j, call in enumerate(
    ("max", "sum", "min", "len", "zip", "pow", "map", "abs"))]


@pytest.mark.slow
def test_a_tiny_model_learns_64_lines_by_heart_and_fills_each_in():
    """Each line follows its number, which is a prompt: without it nobody could tell an all-masked line."""
    letters = {letter: i for i, letter in enumerate(sorted({*"".join(LINES), *"0123456789:"}))}
    encoded = [torch.tensor([letters[c] for c in f"{i:02}:{line}"]) for i, line in enumerate(LINES)]
    model = make_model(shift_logits=False, hidden_size=96, intermediate_size=192, head_dim=24, initializer_range=0.05)
    source = Conversations(PackedDataset(encoded, 24))
    settings = make_settings(objective="mdm", micro_batch_size=len(source.dataset))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    steps, rows = 500, len(source.dataset)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(step / 20, 1 - step / steps + 0.01, 1)
        batch, = make_batches(source, step, range(rows), rows, settings, 0, model)
        (forward(model, batch, CPU).loss / batch.normaliser).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        sums = sum(forward(model, make_batches(source, step, range(rows), rows, settings, 1, model)[0], CPU).by_ratio
                   for step in range(4))
    assert (sums[1] > 100).all() and (sums[0] / sums[1]).max() < 0.05, sums[0] / sums[1]
    for i, line in enumerate(encoded):
        config = MDMGenerationConfig(alg="maskgit_plus", steps=len(line) - 3, temperature=0.0)
        filled = infill(model, line[:3], line[:0], length=len(line) - 3, generation_config=config)
        assert torch.equal(filled.sequences[0], line), LINES[i]
