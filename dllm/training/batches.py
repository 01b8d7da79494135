"""What a training step computes on: rows of the corpus, corrupted, cut into micro-batches, each with its targets.

Every draw is a function of the seed, the step's number and the row's slot in the step.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.accounting import count_pairs
from dllm.config import Config, TrainGroup
from dllm.corruption import T_MIN, Corruption, corrupt
from dllm.data import Packed, RowSource, TrainingData
from dllm.gaps import make_gaps
from dllm.loss import BOUNDS, LossSums, Targets, choose_targets, sum_alignment, sum_losses
from dllm.model import DiffusionLM
from dllm_kernels import philox_uniform

GOLDEN_RATIO = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many there are


class Opening(NamedTuple):
    """Causal attention on its way to attention in both directions (see `draw_visible`)."""

    share: float  # of the later positions that are seen
    seed: int
    step: int
    documents: list[tuple[int, int, int]]  # slot, first column and length of each


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
    pairs: int = 0  # of a query and a key that attend to each other
    position_ids: Tensor | None = None  # [1, T / P] int64, if P processes share the positions
    opening: Opening | None = None  # None: attention as block_length says
    clean_ids: Tensor | None = None  # as input_ids, for block diffusion, with blocks of block_length

    def pin(self, device: torch.device) -> "MicroBatch":
        """In memory that a GPU copies from while it computes."""
        if device.type == "cpu":
            return self

        def pinned(value):
            return value.pin_memory() if isinstance(value, Tensor) else value

        return self._replace(input_ids=pinned(self.input_ids), cu_seqlens=pinned(self.cu_seqlens),
                             position_ids=pinned(self.position_ids), clean_ids=pinned(self.clean_ids),
                             targets=Targets(*map(pinned, self.targets)))


def make_batches(source: RowSource, step: int, slots: range, of: int, settings: TrainGroup, seed: int,
                 model: DiffusionLM, opened: float = 1.0, by_ratio: bool = False) -> list[MicroBatch]:
    """The micro-batches of a step's rows in `slots`, out of `of` rows that the step has over all processes.

    opened: share of the later positions that attention sees; 0 is causal, 1 sees all.
    by_ratio: whether the losses are wanted by the chance of being masked too.

    Of conversations only the answers' tokens are scored, and (but for settings.corrupt_prompt) ever masked: the model
    learns to answer what it can read.
    A row and its draws are a function of seed, step and slot alone, whoever computes it and however the step is cut.
    The times of a step's documents, or of their blocks, are one random offset plus nearly equal spacing: each is
    uniform, and together they cover (0, 1) evenly, which lowers the variance of the loss (MDLM, arXiv:2406.07524).
    """
    batches = []
    for first in range(slots.start, slots.stop, settings.micro_batch_size):
        part = range(first, min(first + settings.micro_batch_size, slots.stop))
        packed = source.read(range(step * of + part.start, step * of + part.stop))
        packed, corruption = corrupt_rows(packed, part.start, of, step, settings, seed, model)
        input_ids = packed.tokens if corruption is None else corruption.noisy
        targets = choose_targets(packed.tokens, packed.cu_seqlens, corruption, objective=settings.objective,
                                 path_term=settings.path_term, shift=model.config.shift_logits,
                                 trainable=packed.trainable, by_ratio=by_ratio,
                                 delete_token_id=model.config.eos_token_id)
        opening = None
        if opened < 1:
            starts = packed.cu_seqlens[:-1].long()
            opening = Opening(opened, seed, step, list(zip((packed.row[starts] + part.start).tolist(),
                                                           packed.column[starts].tolist(),
                                                           packed.cu_seqlens.diff().tolist(), strict=True)))
        even = len(input_ids) == (len(packed.cu_seqlens) - 1) * packed.max_seqlen
        shape = (-1, packed.max_seqlen) if even else (1, -1)
        batches.append(MicroBatch(
            input_ids=input_ids.view(shape),
            cu_seqlens=None if even else packed.cu_seqlens, max_seqlen=packed.max_seqlen, targets=targets,
            block_length={"ar": 1, "block_diffusion": settings.block_length}.get(settings.objective),
            tokens=len(input_ids), scored=int(targets.scored.sum()), normaliser=int(targets.normaliser),
            pairs=count_pairs(packed.cu_seqlens, settings.objective, settings.block_length), opening=opening,
            clean_ids=packed.tokens.view(shape) if settings.objective == "block_diffusion" else None))
    return batches


def corrupt_rows(packed: Packed, first_slot: int, of: int, step: int, settings: TrainGroup, seed: int,
                 model: DiffusionLM) -> tuple[Packed, Corruption | None]:
    """What rows are to be, and their corruption: None for "ar"; for "expansion" documents change their lengths."""
    if settings.objective == "ar":
        return packed, None
    offset = philox_uniform(seed, torch.tensor(of), step, torch.tensor(0))[..., 0]
    ends = packed.cu_seqlens
    if settings.objective == "block_diffusion":
        ends = cut_blocks(ends, settings.block_length)
    times = spread_times(packed, ends, first_slot, of, offset)
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


def opened_share(step: int, total: int, settings: TrainGroup) -> float:
    """Of the later positions, how many attention sees at a step (from 0) of `total`: it grows linearly from 0 to 1."""
    steps = settings.anneal_attention_ratio * total
    return 1.0 if step >= steps else step / steps


def draw_visible(opening: Opening, device: torch.device) -> list[Tensor]:
    """For each document of n tokens, which keys its queries see, [n, n] bool: all up to the query, and of those after
    it each with probability `share` (attention mask annealing, DiffuLLaMA, arXiv:2410.17891).

    A draw is a function of seed, step, slot and the columns of query and key in the row, which is below 2**16 long.
    """
    visible = []
    for slot, first, length in opening.documents:
        columns = torch.arange(first, first + length, device=device)
        slots = torch.full((length, length), slot, device=device)
        # The other uniform is that of the corruption.
        uniform = philox_uniform(opening.seed, slots, opening.step, columns.unsqueeze(1) * 2**16 + columns)[..., 1]
        visible.append((uniform < opening.share) | (columns <= columns.unsqueeze(1)))
    return visible


def cut_blocks(cu_seqlens: Tensor, block_length: int) -> Tensor:
    """Where the blocks of each document begin, and T: as cu_seqlens. The last block of a document may be shorter."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    position = torch.arange(int(cu_seqlens[-1])) - torch.repeat_interleave(starts, lengths)
    return torch.cat(((position % block_length == 0).nonzero().squeeze(1).int(), cu_seqlens[-1:]))


def spread_times(packed: Packed, ends: Tensor, first_slot: int, of: int, offset: Tensor) -> Tensor:
    """A time for each of the parts [S] that begin at `ends`: rows are 1 / of apart, the parts of a row by the golden
    ratio."""
    row = packed.row[ends[:-1].long()]
    index = torch.arange(len(row)) - torch.searchsorted(row, row)
    return ((row + first_slot) / of + index * GOLDEN_RATIO + offset).frac().clamp(T_MIN, 1 - T_MIN)


def forward(model: DiffusionLM, batch: MicroBatch, device: torch.device,
            teacher: DiffusionLM | None = None) -> LossSums:
    """The sums of a micro-batch's losses; with a teacher, a causal model, the alignment of the scored positions too."""
    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    packed = {} if batch.cu_seqlens is None else {"cu_seqlens": move(batch.cu_seqlens), "max_seqlen": batch.max_seqlen}
    levels: list[Tensor] | None = None if teacher is None else []
    visible = None if batch.opening is None else draw_visible(batch.opening, device)
    hidden = model.hidden_states(move(batch.input_ids), position_ids=move(batch.position_ids), visible=visible,
                                 block_length=batch.block_length, levels=levels, clean_ids=move(batch.clean_ids),
                                 **packed)
    sums = sum_losses(hidden, model.head_weight, Targets(*map(move, batch.targets)))
    if levels is None:
        return sums
    clean, theirs = batch.targets.tokens.roll(1).view_as(batch.input_ids), []  # the targets are one to the left
    with torch.no_grad():
        teacher.hidden_states(move(clean), block_length=1, levels=theirs, **packed)
    return sums._replace(alignment=sum_alignment(levels, theirs, move(batch.targets.scored.nonzero()[:, 0])))


def share_positions(batch: MicroBatch, part: int, parts: int) -> MicroBatch:
    """Of the positions of a micro-batch, one of as many equal parts; its attention is still about all positions.

    The rows become one packed row, filled up with a document that has no loss, so that the parts are equal. The counts
    of a part are those of all positions in part 0, and else 0.
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

    lengths = ends.diff().long()
    positions = torch.arange(int(ends[-1])) - torch.repeat_interleave(ends[:-1].long(), lengths)
    counts = {} if part == 0 else dict.fromkeys(("tokens", "scored", "normaliser", "pairs"), 0)
    targets = Targets(*map(cut, batch.targets))._replace(normaliser=batch.targets.normaliser)
    return batch._replace(input_ids=cut(batch.input_ids).unsqueeze(0), cu_seqlens=ends, targets=targets,
                          max_seqlen=max(batch.max_seqlen, extra), position_ids=positions[mine].unsqueeze(0), **counts)


class Validation(NamedTuple):
    """The held-out rows with their corruption, the same at every measurement."""

    loss: list[MicroBatch]  # of the objective
    bound: list[MicroBatch]  # on the likelihood, or the likelihood itself; the same ones if the objective is that
    tokens_per_byte: float  # of the held-out text


def draw_validation(data: TrainingData, config: Config, model: DiffusionLM) -> Validation | None:
    """None if nothing is held out."""
    if data.held_out is None:
        return None

    def draw(settings: TrainGroup, by_ratio: bool) -> list[MicroBatch]:
        return make_batches(data.held_out, 0, range(rows), rows, settings, config.train.seed + 1, model,
                            by_ratio=by_ratio)

    rows = min(len(data.held_out), max(1, config.train.eval_tokens // config.data.max_seq_len))
    loss = bound = draw(config.train, config.train.objective in BOUNDS)
    if config.train.objective not in (*BOUNDS, "ar"):
        bound = draw(replace(config.train, objective="elbo", path_term=False, mask_at_least_one=False,
                             corrupt_prompt=False, expand_token_id=None), True)
    return Validation(loss, bound, data.held_out.num_tokens / max(data.held_out_bytes, 1))
