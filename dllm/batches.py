"""What a training step computes on: rows of the corpus, corrupted, cut into micro-batches, each with its targets.

Every draw is a function of the seed, the step's number and the row's slot in the step.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dllm.config import TrainGroup
from dllm.corruption import T_MIN, Corruption, corrupt
from dllm.data import Packed, RowSource
from dllm.errors import UserError
from dllm.expansion import corrupt_gaps
from dllm.loss import LossSums, Targets, choose_targets, misalign, sum_losses
from dllm.model import DiffusionLM
from dllm_kernels import philox_uniform

GOLDEN_RATIO = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many there are
DOCUMENTS, ATTENTION = 1 << 32, 2 << 32  # added to the seed: streams of draws beside those of the tokens


class MicroBatch(NamedTuple):
    """R rows: [R, L] when each is one chunk of L tokens, else all chunks one after the other, [1, T]."""

    input_ids: Tensor  # int64, corrupted
    cu_seqlens: Tensor | None  # [S + 1] int32 over the flattened positions, if they are packed
    max_seqlen: int
    targets: Targets
    block_length: int | None  # of the attention: 1 is causal
    tokens: int
    scored: int
    normaliser: int
    clean_ids: Tensor | None = None  # int64, as input_ids, not corrupted
    ends_block: Tensor | None = None  # [T] bool, block diffusion: the last position of each block
    visible: Tensor | None = None  # [max_seqlen, max_seqlen] bool: who sees whom while the causal mask opens


def make_batches(source: RowSource, step: int, slots: range, of: int, settings: TrainGroup, seed: int,
                 model: DiffusionLM, progress: float = 1.0) -> list[MicroBatch]:
    """The micro-batches of a step's rows in `slots`, out of `of` rows that the step has over all processes.

    A row and its draws are a function of seed, step and slot alone, whoever computes it and however the step is cut.
    The times of a step's documents (or blocks) are one random offset plus nearly equal spacing: each is uniform, and
    together they cover (0, 1) evenly, which lowers the variance of the loss (MDLM, arXiv:2406.07524).

    Args:
        progress: share of the run that is done, for settings.anneal_attention_ratio.
    Raises: UserError if the objective does not fit the model or the rows.
    """
    offset = philox_uniform(seed, torch.tensor(of), step, torch.tensor(0))[..., 0]
    batches = []
    for first in range(slots.start, slots.stop, settings.micro_batch_size):
        part = range(first, min(first + settings.micro_batch_size, slots.stop))
        packed = source.read(range(step * of + part.start, step * of + part.stop))
        blocks = packed.cu_seqlens
        if settings.objective == "block_diffusion":
            blocks = cut_blocks(packed.cu_seqlens, settings.block_length)
        corruption = None
        if settings.objective != "ar":
            times = spread_times(packed.row[blocks[:-1].long()], part.start, of, offset)
            packed, corruption = corrupt_rows(packed, blocks, times, step, part.start, settings, seed, model)
        input_ids = packed.tokens if corruption is None else corruption.noisy
        targets = choose_targets(packed.tokens, packed.cu_seqlens, corruption, objective=settings.objective,
                                 path_term=settings.path_term, shift=model.config.shift_logits,
                                 trainable=packed.trainable, delete_token_id=model.config.eos_token_id)
        even = len(input_ids) == (len(packed.cu_seqlens) - 1) * packed.max_seqlen
        shape = (-1, packed.max_seqlen) if even else (1, -1)
        ends_block, opened = None, 1.0
        if settings.objective == "block_diffusion":
            ends_block = torch.zeros_like(input_ids, dtype=torch.bool).index_fill(0, blocks[1:].long() - 1, True)
        if settings.anneal_attention_ratio:
            opened = progress / settings.anneal_attention_ratio
        batches.append(MicroBatch(
            input_ids=input_ids.view(shape), cu_seqlens=None if even else packed.cu_seqlens,
            max_seqlen=packed.max_seqlen, targets=targets,
            block_length=1 if settings.objective == "ar" else settings.block_length, tokens=len(input_ids),
            scored=int(targets.scored.sum()), normaliser=int(targets.normaliser), clean_ids=packed.tokens.view(shape),
            ends_block=ends_block, visible=open_mask(packed.max_seqlen, opened, step, seed) if opened < 1 else None))
    return batches


def corrupt_rows(packed: Packed, blocks: Tensor, times: Tensor, step: int, first_slot: int, settings: TrainGroup,
                 seed: int, model: DiffusionLM) -> tuple[Packed, Corruption]:
    """The rows from slot `first_slot` on, corrupted at `times` [S] of their `blocks` (cu_seqlens, [S + 1])."""
    slot = packed.row + first_slot
    uniform = philox_uniform(seed, slot, step, packed.column)
    if settings.objective == "expansion":
        if packed.trainable is not None or not isinstance(model.config.eos_token_id, int):
            raise UserError("train.objective=expansion takes plain documents and a model with one eos_token_id, which "
                            "becomes the delete token; choose another objective")
        start = packed.cu_seqlens[:-1].long()
        choices = philox_uniform(seed + DOCUMENTS, slot[start].unsqueeze(1), step,
                                 packed.column[start].unsqueeze(1) * 2 + torch.arange(2)).flatten(1)
        return corrupt_gaps(packed, times, uniform, choices, room=model.config.max_position_embeddings,
                            mask_token_id=model.config.mask_token_id, expand_token_id=settings.expand_token_id,
                            delete_token_id=model.config.eos_token_id)
    scorable = None
    if settings.mask_at_least_one:
        scorable = torch.ones_like(packed.tokens, dtype=torch.bool)
        if packed.trainable is not None:
            scorable = packed.trainable.clone()
        if model.config.shift_logits:
            scorable[packed.cu_seqlens[:-1].long()] = False
    return packed, corrupt(packed.tokens, blocks, model.config.mask_token_id, schedule=settings.schedule, times=times,
                           uniform=uniform[..., 0], maskable=None if settings.corrupt_prompt else packed.trainable,
                           at_least_one_of=scorable)


def cut_blocks(cu_seqlens: Tensor, block_length: int) -> Tensor:
    """cu_seqlens of the blocks of packed documents; the last block of each may be shorter."""
    counts = (cu_seqlens.diff().long() + block_length - 1) // block_length
    document = torch.repeat_interleave(torch.arange(len(counts)), counts)
    index = torch.arange(len(document)) - (counts.cumsum(0) - counts)[document]
    return torch.cat((cu_seqlens[:-1][document] + index * block_length, cu_seqlens[-1:])).int()


def spread_times(row: Tensor, first_slot: int, of: int, offset: Tensor) -> Tensor:
    """A time for each document of `row` [S], ascending: rows are 1 / of apart, a row's documents the golden ratio."""
    index = torch.arange(len(row)) - torch.searchsorted(row, row)
    return ((row + first_slot) / of + index * GOLDEN_RATIO + offset).frac().clamp(T_MIN, 1 - T_MIN)


def open_mask(length: int, share: float, step: int, seed: int) -> Tensor:
    """[length, length] bool: the causal mask with each position above the diagonal opened at the chance `share`.

    One mask for all documents of a step, as in DiffuLLaMA (arXiv:2410.17891), whose positions count from their first.
    """
    place = torch.arange(length)
    uniform = philox_uniform(seed + ATTENTION, place.unsqueeze(1), step, place)[..., 0]
    return (uniform < share) | (place <= place.unsqueeze(1))


def forward(model: DiffusionLM, batch: MicroBatch, device: torch.device, teacher: DiffusionLM | None = None,
            repr_align_wt: float = 0.0) -> LossSums:
    """The losses of a micro-batch; in evaluation mode also per chance of being masked.

    With right shift, block diffusion reads the first token of a block from the last position of the clean copy of the
    block before, which sees just what a sampler sees when it begins a block: the finished ones.

    Args:
        teacher: a frozen autoregressive model, whose hidden states of the clean text, seen causally, those of the
            model are drawn to, with weight `repr_align_wt`.
    """
    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    packed = {} if batch.cu_seqlens is None else {"cu_seqlens": move(batch.cu_seqlens), "max_seqlen": batch.max_seqlen}
    targets = Targets(*map(move, batch.targets))
    copies = {} if batch.ends_block is None else {"clean_ids": move(batch.clean_ids)}
    layers: list[Tensor] | None = None if teacher is None else []
    hidden = model.hidden_states(move(batch.input_ids), block_length=batch.block_length, visible=move(batch.visible),
                                 layers=layers, **copies, **packed)
    if batch.ends_block is not None:
        hidden, clean = hidden.chunk(2, dim=1)
        if model.config.shift_logits:
            hidden = torch.where(move(batch.ends_block).view(batch.input_ids.shape).unsqueeze(-1), clean, hidden)
    sums = sum_losses(hidden, model.head_weight, targets, by_ratio=not model.training)
    if teacher is None:
        return sums
    wanted: list[Tensor] = []
    with torch.no_grad():
        teacher.hidden_states(move(batch.clean_ids), block_length=1, layers=wanted, **packed)
    misalignment = misalign(layers, wanted, targets.scored)
    return sums._replace(loss=sums.loss + repr_align_wt * misalignment, misalignment=misalignment.detach())
