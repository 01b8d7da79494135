"""The micro-batches of a training step: rows of the corpus, corrupted, each with its targets.

Every draw is a function of the seed, the step's number and the row's slot in the step.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from dllm.config.schema import TrainGroup
from dllm.data import Packed, RowSource
from dllm.diffusion.canvases import CanvasTargets, MeanEmbedding, draw_canvases, sum_canvas_losses
from dllm.diffusion.corruption import SCHEDULES, T_MIN, Corruption, corrupt
from dllm.diffusion.edits import (
    Columns,
    Draws,
    EditTargets,
    align_source,
    choose_given,
    make_edits,
    show,
    sum_edit_losses,
)
from dllm.diffusion.expansion import make_gaps
from dllm.diffusion.objectives import LossSums, Targets, choose_targets, sum_alignment, sum_losses
from dllm.diffusion.uniform import Noise, NoiseTargets, add_noise, sum_noise_losses
from dllm.model import layouts
from dllm.model.diffusion_gemma import Context, DiffusionGemma
from dllm.model.special_tokens import as_ids
from dllm.model.transformer import Transformer
from dllm.training.cost import count_pairs
from dllm_kernels import philox_uniform

GOLDEN_RATIO = (5**0.5 - 1) / 2  # any number of its multiples, modulo 1, is spread evenly


class AttentionAnneal(NamedTuple):
    """Causal attention opening to bidirectional attention (DiffuLLaMA, arXiv:2410.17891; see `draw_visible`)."""

    share: float  # share of the later positions that a query sees
    seed: int
    step: int
    documents: list[tuple[int, int, int]]  # slot, first column and length of each


class MicroBatch(NamedTuple):
    """R rows: [R, L] if each is one chunk of L tokens, otherwise all chunks one after the other, [1, T]."""

    input_ids: Tensor  # int64, corrupted
    cu_seqlens: Tensor | None  # [S + 1] int32 over the flattened positions, if they are packed
    max_seqlen: int
    targets: Targets | EditTargets | NoiseTargets | CanvasTargets
    block_length: int | None  # blocks of the attention; 1 is causal
    tokens: int
    scored: int
    normaliser: int
    pairs: int = 0  # of a query and a key that attend to each other
    anneal: AttentionAnneal | None = None  # None: attention as block_length says
    clean_ids: Tensor | None = None  # as input_ids, for block diffusion, with blocks of block_length
    causal_blocks: bool = False  # see `ModelConfig`
    causal_context: bool = False
    encoded: int = 0  # tokens that an encoder is scored on
    conditioned: bool = False  # whether the model predicts from its own prediction, see `hidden_states`

    def pin(self, device: torch.device) -> "MicroBatch":
        """In memory that a GPU copies from while it computes."""
        return self if device.type == "cpu" else self.each(Tensor.pin_memory)

    def each(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """With each tensor changed."""
        def changed(value):
            return change(value) if isinstance(value, Tensor) else value

        return type(self)(*map(changed, self))._replace(
            targets=type(self.targets)(*map(changed, self.targets)))


def make_batches(source: RowSource, step: int, slots: range, of: int, settings: TrainGroup, seed: int,
                 model: Transformer, opened: float = 1.0, by_ratio: bool = False) -> list[MicroBatch]:
    """The micro-batches of a step's rows in `slots`, out of `of` rows that the step has over all processes.

    opened: share of the later positions that attention sees; 0 is causal, 1 sees all.
    by_ratio: also sum the losses by the probability of being masked.

    In conversations only the tokens of answers are scored and, without settings.corrupt_prompt, masked: the model
    learns to answer what it can read.
    A row and its draws are a function of seed, step and slot alone, however the step is divided among processes.
    The times of a step's documents, or of their blocks, are one random offset plus nearly equal spacing: each is
    uniform, and together they cover (0, 1) evenly, which lowers the variance of the loss (MDLM, arXiv:2406.07524).
    """
    batches = []
    for first in range(slots.start, slots.stop, settings.micro_batch_size):
        part = range(first, min(first + settings.micro_batch_size, slots.stop))
        packed = source.read(range(step * of + part.start, step * of + part.stop))
        if settings.objective == "canvas":
            batches.append(make_canvases(packed, part.start, of, step, settings, seed, model))
            continue
        if settings.objective == "edit":
            packed, targets = edit_rows(packed, part.start, of, step, settings, seed, model)
            input_ids, scored = packed.tokens, targets.scored
        elif settings.objective == "uniform":
            input_ids, targets = add_noise(
                Noise.of(model.config), packed.tokens, packed.cu_seqlens,
                spread_times(packed, packed.cu_seqlens, part.start, of, seed, step),
                philox_uniform(seed, packed.row + part.start, step, packed.column), shift=model.config.shift_logits,
                schedule=settings.schedule, weighting=settings.loss_weighting, trainable=packed.trainable,
                by_ratio=by_ratio)
            scored = targets.count
        else:
            packed, corruption = corrupt_rows(packed, part.start, of, step, settings, seed, model)
            input_ids = packed.tokens if corruption is None else corruption.noisy
            targets = choose_targets(packed.tokens, packed.cu_seqlens, corruption, objective=settings.objective,
                                     path_term=settings.path_term, shift=model.config.shift_logits,
                                     trainable=packed.trainable, by_ratio=by_ratio,
                                     delete_token_id=model.config.eos_token_id)
            scored = int(targets.scored.sum())
        anneal = None
        if opened < 1:
            starts = packed.cu_seqlens[:-1].long()
            anneal = AttentionAnneal(opened, seed, step, list(zip(
                (packed.row[starts] + part.start).tolist(), packed.column[starts].tolist(),
                packed.cu_seqlens.diff().tolist(), strict=True)))
        even = len(input_ids) == (len(packed.cu_seqlens) - 1) * packed.max_seqlen
        shape = (-1, packed.max_seqlen) if even else (1, -1)
        batches.append(MicroBatch(
            input_ids=input_ids.view(shape),
            cu_seqlens=None if even else packed.cu_seqlens, max_seqlen=packed.max_seqlen, targets=targets,
            block_length={"ar": 1, "block_diffusion": settings.block_length}.get(settings.objective),
            tokens=len(input_ids), scored=scored, normaliser=int(targets.normaliser),
            pairs=count_pairs(packed.cu_seqlens, settings.objective, settings.block_length, model.config.causal_blocks,
                              model.config.causal_context),
            anneal=anneal, causal_blocks=model.config.causal_blocks, causal_context=model.config.causal_context,
            conditioned=predicts_twice(settings, seed, step),
            clean_ids=packed.tokens.view(shape) if settings.objective == "block_diffusion" else None))
    return batches


def make_canvases(packed: Packed, first_slot: int, of: int, step: int, settings: TrainGroup, seed: int,
                  model: DiffusionGemma) -> MicroBatch:
    """A canvas of each row, which is one chunk."""
    config = model.config
    input_ids, targets = draw_canvases(
        packed, torch.arange(len(packed.cu_seqlens) - 1) + first_slot, step, seed,
        times=spread_times(packed, packed.cu_seqlens, first_slot, of, seed, step), length=config.canvas_length,
        vocab_size=config.vocab_size, ends=as_ids(config.eos_token_id), schedule=settings.schedule,
        self_conditioning=settings.self_conditioning_chance)
    scored = int(targets.normaliser)
    return MicroBatch(input_ids=input_ids, cu_seqlens=None, max_seqlen=input_ids.shape[1], targets=targets,
                      block_length=None, tokens=int(targets.lengths.sum()), scored=scored, normaliser=scored,
                      encoded=int(targets.encoded))


def corrupt_rows(packed: Packed, first_slot: int, of: int, step: int, settings: TrainGroup, seed: int,
                 model: Transformer) -> tuple[Packed, Corruption | None]:
    """(rows, their corruption). "ar" has none; "expansion" changes the lengths of documents."""
    if settings.objective == "ar":
        return packed, None
    ends = packed.cu_seqlens
    if settings.objective == "block_diffusion":
        ends = cut_blocks(ends, settings.block_length)
    times = spread_times(packed, ends, first_slot, of, seed, step)
    if settings.masked_share is not None:
        share = times.new_tensor(1 - settings.masked_share)
        times = SCHEDULES[settings.schedule].when(share).clamp(T_MIN, 1 - T_MIN).expand_as(times)
    if settings.objective == "expansion":
        return make_gaps(packed, first_slot, step, seed, model.config.max_position_embeddings, times=times,
                         delete=model.config.eos_token_id, expand=settings.expand_token_id,
                         mask=model.config.mask_token_id)
    scorable = None
    if settings.mask_at_least_one:
        learnt = packed.trainable
        scorable = torch.ones_like(packed.tokens, dtype=torch.bool) if learnt is None else learnt.clone()
        if model.config.shift_logits:
            scorable[packed.cu_seqlens[:-1].long()] = False
    return packed, corrupt(
        packed.tokens, ends, model.config.mask_token_id, schedule=settings.schedule, times=times,
        uniform=philox_uniform(seed, packed.row + first_slot, step, packed.column)[..., 0],
        maskable=None if settings.corrupt_prompt else packed.trainable, at_least_one_of=scorable)


def predicts_twice(settings: TrainGroup, seed: int, step: int) -> bool:
    """Whether a step predicts from a prediction; all of its rows do, in every process, or none."""
    drawn = philox_uniform(seed, torch.tensor(2**31), step, torch.tensor(0))[..., 0]
    return bool(drawn < settings.self_conditioning_chance)


def opened_share(step: int, total: int, settings: TrainGroup) -> float:
    """Share of the later positions that attention sees at a step (from 0) of `total`; it grows linearly from 0 to 1."""
    steps = settings.anneal_attention_ratio * total
    return 1.0 if step >= steps else step / steps


def draw_visible(anneal: AttentionAnneal, device: torch.device) -> list[Tensor]:
    """For each document of n tokens, the keys that its queries see, [n, n] bool: all keys up to the query, and each
    later key with probability `share` (attention mask annealing, DiffuLLaMA, arXiv:2410.17891).

    A draw is a function of seed, step, slot and the columns of query and key in the row, which is below 2**16 long.
    """
    visible = []
    for slot, first, length in anneal.documents:
        columns = torch.arange(first, first + length, device=device)
        slots = torch.full((length, length), slot, device=device)
        # The other uniform is that of the corruption.
        uniform = philox_uniform(anneal.seed, slots, anneal.step, columns.unsqueeze(1) * 2**16 + columns)[..., 1]
        visible.append((uniform < anneal.share) | (columns <= columns.unsqueeze(1)))
    return visible


def cut_blocks(cu_seqlens: Tensor, block_length: int) -> Tensor:
    """Starts of the blocks of each document, and T, as in cu_seqlens. The last block of a document may be shorter."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    position = torch.arange(int(cu_seqlens[-1])) - torch.repeat_interleave(starts, lengths)
    return torch.cat(((position % block_length == 0).nonzero().squeeze(1).int(), cu_seqlens[-1:]))


def edit_rows(packed: Packed, first_slot: int, of: int, step: int, settings: TrainGroup, seed: int,
              model: Transformer) -> tuple[Packed, EditTargets]:
    """Rows on their way from the source, of other lengths, and the edits that remain. Of pairs, the source is the text
    before, and its first column and end-of-text never change."""
    times = spread_times(packed, packed.cu_seqlens, first_slot, of, seed, step)
    draws = Draws(seed, step, packed.row[packed.cu_seqlens[:-1].long()] + first_slot)
    given = choose_given(packed, draws)
    if packed.before is None:
        columns = align_source(packed, given, draws, source=settings.edit_source or "empty",
                               length=settings.source_tokens, mask_token_id=model.config.mask_token_id,
                               vocab_size=model.config.vocab_size)
    else:
        lengths = packed.cu_seqlens.diff().long()
        columns = Columns(packed.before, packed.tokens, ~given,
                          torch.repeat_interleave(torch.arange(len(lengths)), lengths))
    shown, weight = show(columns, draws, times, settings.schedule, settings.edit_propagation)
    return make_edits(columns, shown, weight, times, settings.schedule, packed,
                      inserts_only=model.config.edit_heads == "insert", shift=model.config.shift_logits)


def spread_times(packed: Packed, ends: Tensor, first_slot: int, of: int, seed: int, step: int) -> Tensor:
    """A time for each part that begins at `ends`, [S]: rows are 1 / of apart, the parts of a row the golden ratio."""
    offset = philox_uniform(seed, torch.tensor(of), step, torch.tensor(0))[..., 0]
    row = packed.row[ends[:-1].long()]
    index = torch.arange(len(row)) - torch.searchsorted(row, row)
    return ((row + first_slot) / of + index * GOLDEN_RATIO + offset).frac().clamp(T_MIN, 1 - T_MIN)


def forward(model: Transformer, batch: MicroBatch, device: torch.device, teacher: Transformer | None = None,
            group: ProcessGroup | None = None) -> LossSums:
    """The sums of a micro-batch's losses; with a teacher, a causal model, the alignment of the scored positions too.
    The processes of a group share the positions (`share_positions`)."""
    there = batch.each(lambda tensor: tensor.to(device, non_blocking=True))
    if isinstance(there.targets, CanvasTargets):
        return forward_canvases(model, there.input_ids, there.targets)
    levels: list[Tensor] | None = None if teacher is None else []
    layout, seen = choose_layout(there, group), {}
    if batch.conditioned:
        with torch.no_grad():
            seen["predicted"] = embed_predictions(model, model.hidden_states(there.input_ids, layout), there.targets)
    hidden = model.hidden_states(there.input_ids, layout, levels=levels, **seen)
    if isinstance(there.targets, NoiseTargets):
        return sum_noise_losses(hidden, model.head_weight, there.targets)
    if isinstance(there.targets, EditTargets):
        return sum_edit_losses(hidden, model.head_weight, model.insert_head.weight, model.rate_head(hidden),
                               there.targets)
    sums = sum_losses(hidden, model.head_weight, there.targets, bias=model.head_bias,
                      softcap=model.config.logit_softcap)
    if levels is None:
        return sums
    clean, theirs = there.targets.tokens.roll(1).view_as(there.input_ids), []  # the targets are one to the left
    with torch.no_grad():
        teacher.hidden_states(clean, choose_layout(there._replace(block_length=1, anneal=None)), levels=theirs)
    scored = batch.targets.scored.nonzero()[:, 0].to(device, non_blocking=True)
    return sums._replace(alignment=sum_alignment(levels, theirs, scored))


def forward_canvases(model: DiffusionGemma, input_ids: Tensor, targets: CanvasTargets) -> LossSums:
    """The losses of decoder and encoder. The context of a canvas is that of the whole example, cut where it starts, so
    its gradient goes through the keys and values of the encoder."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    context, before = Context(whole=True), places < targets.start.unsqueeze(1)
    encoded = model.encode(input_ids, context, places < targets.lengths.unsqueeze(1))
    decoded = model.decode(targets.noisy, context, condition(model, context, before, targets), before)
    return sum_canvas_losses(decoded, encoded, model.head_weight, input_ids, targets,
                             softcap=model.config.logit_softcap)


def condition(model: DiffusionGemma, context: Context, before: Tensor, targets: CanvasTargets) -> Tensor:
    """[R, C, D]: the mean embedding of the decoder's words for the noisy canvas, in the examples that are
    self-conditioned, and zeros in the others. The words get no gradient, the embedding does."""
    weight, conditioned = model.head_weight, targets.conditioned
    soft = weight.new_zeros(*targets.noisy.shape, weight.shape[1])
    if conditioned is None:
        return soft
    # All processes of fsdp2 gather the weights of a layer equally often, so one example is decoded in any case.
    rows = conditioned if len(conditioned) else conditioned.new_zeros(1)
    with torch.no_grad():
        hidden = model.decode(targets.noisy[rows], context.take(rows), None, before[rows])
    words = MeanEmbedding.apply(hidden.flatten(0, 1), weight, model.config.logit_softcap).view_as(hidden)
    return soft.index_copy(0, conditioned, words[:len(conditioned)].to(soft.dtype))


def embed_predictions(model: Transformer, hidden: Tensor, targets: Targets | NoiseTargets) -> Tensor:
    """What is predicted of each token [B, L, D], at its own place; zeros where it is not scored."""
    flat = hidden.flatten(0, -2)
    predicted = torch.zeros_like(flat)
    predicted[targets.scored] = model.embed_softly(flat[targets.scored])
    # Under shift what is predicted at a position is about the next one; the last one of all is not scored.
    return (predicted.roll(1, 0) if model.config.shift_logits else predicted).view_as(hidden)


def choose_layout(batch: MicroBatch, group: ProcessGroup | None = None) -> layouts.Layout:
    if batch.anneal is not None:
        return layouts.Visible(draw_visible(batch.anneal, batch.input_ids.device))
    rows = layouts.Padded(block_length=batch.block_length)
    if batch.cu_seqlens is not None:
        rows = layouts.Packed(batch.cu_seqlens, batch.max_seqlen, batch.block_length, group)
    if batch.clean_ids is None:
        return rows
    return layouts.TwoCopies(batch.clean_ids, batch.block_length, rows, batch.causal_blocks, batch.causal_context)


def share_positions(batch: MicroBatch, part: int, parts: int) -> MicroBatch:
    """One of `parts` equal parts of the positions of a micro-batch; attention still covers all positions.

    The rows become one packed row, padded to equal parts with a document that has no loss. Part 0 keeps the counts of
    all positions, and the other parts count 0.
    """
    if parts == 1:
        return batch
    rows, length = batch.input_ids.shape
    ends = batch.cu_seqlens if batch.cu_seqlens is not None else torch.arange(rows + 1, dtype=torch.int32) * length
    extra = -batch.input_ids.numel() % parts
    if extra:
        ends = torch.cat((ends, ends[-1:] + extra))
    size = int(ends[-1]) // parts
    mine = slice(part * size, (part + 1) * size)

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else F.pad(tensor.flatten(), (0, extra))[mine]

    counts = {} if part == 0 else dict.fromkeys(("tokens", "scored", "normaliser", "pairs"), 0)
    each = (cut(value) if isinstance(value, Tensor) and value.ndim else value for value in batch.targets)
    targets = type(batch.targets)(*each)
    targets = targets._replace(count=int(targets.scored.sum()))
    return batch._replace(input_ids=cut(batch.input_ids).unsqueeze(0), cu_seqlens=ends, targets=targets,
                          max_seqlen=max(batch.max_seqlen, extra), **counts)
