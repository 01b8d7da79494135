"""How a canvas is denoised: which positions form a block, in whole blocks, or with gaps that grow and shrink."""

from collections.abc import Container
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.errors import UserError
from dllm.generation.config import DEFAULT_STEPS, MDMGenerationConfig
from dllm.generation.editing import move
from dllm.model.transformer import Transformer

BLOCK_LENGTH = 32  # for block-causal models whose checkpoint names none (LLaDA2)


class Block(NamedTuple):
    """Positions that are denoised together, before those of the next block."""

    editable: Tensor  # [B, L] bool, the positions to fill
    steps: Tensor  # [B] int64 on the CPU, denoising steps at most
    columns: tuple[int, int]  # the first column, and the one after the last


def split_into_blocks(editable: Tensor, place: Tensor, config: MDMGenerationConfig, *, even: bool,
                      first_alone: bool = False) -> list[Block]:
    """The blocks of a canvas, from left to right. Those of a row and their steps do not depend on the other rows.

    Args:
        editable: [B, L] bool, the positions to fill.
        place: [B, L] int64, the number of each position, by which blocks are counted off.
        even: whether block_length must divide the positions to fill, and the number of blocks the steps, as in LLaDA.
            Else the prompt decides how many blocks there are, and each gets an equal whole number of the steps.
        first_alone: with sub-blocks, whether the first position of each block is a part of its own.
    Raises: UserError if one of these does not divide, or the cache finds given positions between those of a block.
    """
    extents = (place.masked_fill(~editable, -1).amax(1) + 1).tolist() if editable.numel() else [0] * len(editable)
    length = config.block_length or max(extents, default=1)
    if even and config.block_length is not None and (uneven := [extent for extent in extents if extent % length]):
        raise UserError(f"block_length {length} does not divide the {uneven[0]} positions to fill; choose one that "
                        "does")
    number = place // (config.sub_block_length or max(length, 1))
    if first_alone:
        number = 2 * number + (place % length != 0)
    parts = [editable & (number == wanted) for wanted in number[editable].unique().tolist()]
    counts = sum((part.any(1).long() for part in parts), torch.zeros_like(editable[:, 0], dtype=torch.long)).tolist()
    steps = torch.tensor([max(steps_of_block(config, config.block_length or extent, count, even), 1)
                          for extent, count in zip(extents, counts, strict=True)], dtype=torch.long, device="cpu")
    return [Block(block, steps, columns) for part in parts for block, columns in share_columns(part, config.cache)]


def share_columns(block: Tensor, cache: str) -> list[tuple[Tensor, tuple[int, int]]]:
    """A block [B, L] with its columns. A cache wants the same ones in each row, so it gets the rows that share them."""
    if cache == "none":
        columns = block.any(0).nonzero().flatten().tolist()
        return [(block, (columns[0], columns[-1] + 1))]
    place = torch.arange(block.shape[1], device=block.device)
    first = torch.where(block, place, len(place)).amin(1, keepdim=True)
    end = torch.where(block, place + 1, 0).amax(1, keepdim=True)
    spans = torch.cat((first, end, block.sum(1, keepdim=True)), 1).tolist()  # the only wait for a GPU
    if any(end - first > count for first, end, count in spans):
        raise UserError(f"cache {cache!r} needs the positions to fill of a block one after the other; pad prompts "
                        "on the left, and fill one gap at a time")
    groups = dict.fromkeys((first, end) for first, end, count in spans if count)
    return [(block & (first == columns[0]) & (end == columns[1]), columns) for columns in groups]


def steps_of_block(config: MDMGenerationConfig, length: int, blocks: int, even: bool) -> int:
    """Denoising steps at most for each of a row's `blocks` blocks of `length` positions; `even` as in
    `split_into_blocks`."""
    if config.editing_threshold is not None:
        return length + config.max_post_steps
    if config.adaptive or config.revises:
        return length  # each step commits one position at least
    blocks = max(blocks, 1)
    if config.steps == DEFAULT_STEPS:  # nobody chose it, so it fits
        return (round_up(DEFAULT_STEPS, blocks) if even else max(DEFAULT_STEPS, blocks)) // blocks
    if even and config.steps % blocks:
        raise UserError(f"steps must be a multiple of the {blocks} blocks of {length} positions, not {config.steps}; "
                        f"{round_up(config.steps, blocks)} would be")
    if config.steps < blocks:
        raise UserError(f"steps must be at least {blocks}, one for each of the blocks of {length} positions, not "
                        f"{config.steps}")
    return config.steps // blocks


def round_up(number: int, divisor: int) -> int:
    """The least multiple of `divisor` that is at least `number`."""
    return -(-number // divisor) * divisor


def block_length_of(model: Transformer) -> int:
    """Positions of a block of a block-causal model."""
    return model.config.block_length or BLOCK_LENGTH


def fit_blocks(model: Transformer, config: MDMGenerationConfig) -> MDMGenerationConfig:
    """The config with the blocks that a block-causal model was trained on, and their parts where confidences decide."""
    length, part = config.block_length or block_length_of(model), config.sub_block_length
    if part is None and config.adaptive and config.window_blocks == 1 and length == model.config.block_length:
        part = model.config.sub_block_length
    return replace(config, block_length=length, sub_block_length=part)


def counts_from_text(model: Transformer, config: MDMGenerationConfig) -> bool:
    """Whether blocks are counted from the first token, instead of the first masked position."""
    causal = model.config.block_causal if config.block_causal is None else config.block_causal
    unsaid = config.blocks_from is None and causal and not model.config.causal_context
    return config.blocks_from == "text" or unsaid


def block_of_gap(model: Transformer, config: MDMGenerationConfig) -> int | None:
    """The block_length that must divide the positions to fill, because blocks begin with the first of them; or None."""
    causal = model.config.block_causal if config.block_causal is None else config.block_causal
    if causal or config.blocks_from == "text" or model.config.canvas_length is not None:  # whose last canvas is cut
        return None
    return config.block_length


def block_of_text(model: Transformer, config: MDMGenerationConfig) -> int | None:
    """The length of blocks that are counted from the first token, or None."""
    if block_of_gap(model, config) or not (model.config.block_causal or config.block_causal or config.blocks_from):
        return None
    return config.block_length or block_length_of(model)


def positions_of(model: Transformer, config: MDMGenerationConfig) -> int:
    """Masked positions for `max_new_tokens` tokens: rounded up to whole blocks, where blocks begin with them."""
    return round_up(config.max_new_tokens, block_of_gap(model, config) or 1)


def fit_new_tokens(model: Transformer, config: MDMGenerationConfig, given: int,
                   at_most: int | None = None) -> MDMGenerationConfig:
    """A `max_new_tokens` that nobody asked for, cut to what the model's positions leave in whole blocks; at least 1.

    given: tokens of the longest prompt. at_most: another limit.
    """
    block = block_of_gap(model, config) or 1
    room = (model.config.max_position_embeddings - given) // block * block
    return replace(config, max_new_tokens=max(1, min(config.max_new_tokens, room, at_most or room)))


def fit_folder_settings(model: Transformer, config: MDMGenerationConfig, asked: Container[str],
                        given: int) -> MDMGenerationConfig:
    """Fit what generation_config.json chose, and no argument did, to a prompt: its max_new_tokens and its steps.

    asked: names of the settings that the arguments gave. given: tokens of the longest prompt.
    """
    folder = model.generation_defaults or {}
    chose = {name for name in folder if folder[name] is not None and name not in asked}
    if "max_new_tokens" in chose:
        config = fit_new_tokens(model, config, given)
    if "edit_source_length" in chose:
        config = replace(config, edit_source_length=min(config.edit_source_length, config.max_new_tokens))
    if "steps" not in chose:
        return config
    if block := block_of_gap(model, config):
        return replace(config, steps=round_up(config.steps, max(1, config.max_new_tokens // block)))
    counted = block_of_text(model, config) or config.max_new_tokens  # the first and last block may be touched in part
    return replace(config, steps=max(config.steps, -(-(config.max_new_tokens - 1) // counted) + 1))


def fill_after_end(tokens: Tensor, editable: Tensor, mask_token_id: int, ends: list[int]) -> Tensor:
    """Fill the masked positions after a final end of text with the first of `ends`, so that the row is done.

    An end of text is final if no position before it is masked.
    """
    masked = editable & (tokens == mask_token_id)
    end = editable & torch.isin(tokens, torch.tensor(ends, device=tokens.device)) & (masked.cumsum(1) == 0)
    return torch.where(masked & (end.cumsum(1) > 0), ends[0], tokens)


class AsGiven:
    """A canvas [B, L] that is denoised as it was given."""

    def __init__(self, canvas: Tensor, key_mask: Tensor | None):
        self.canvas, self.key_mask, self.given_mask = canvas, key_mask, key_mask
        self.real = torch.ones_like(canvas, dtype=torch.bool)

    def restore(self, x: Tensor) -> Tensor:
        return x


class WholeBlocks:
    """A canvas for a block-causal model: the tokens of every row follow each other, in blocks of equal length.

    from_masked: whether a block begins with the first masked position (BD3-LM: padding before the row's first token
        ensures this, and the last block may be shorter), or with the first token (LLaDA2, SDAR: masked positions
        complete the last block of a row; they are filled, because the model sees them, but not returned).
    """

    def __init__(self, canvas: Tensor, key_mask: Tensor | None, block_length: int, mask_token_id: int,
                 from_masked: bool):
        self.given = canvas
        self.given_mask = torch.ones_like(canvas, dtype=torch.bool) if key_mask is None else key_mask
        # Positions in their new order: real ones first, because the sort is stable.
        self.order = self.given_mask.long().argsort(dim=1, descending=True, stable=True)
        tokens, lengths = canvas.gather(1, self.order), self.given_mask.sum(1, keepdim=True)
        self.shift = torch.zeros_like(lengths)
        if from_masked:
            masked = (tokens == mask_token_id) & (torch.arange(canvas.shape[1], device=canvas.device) < lengths)
            first = torch.where(masked.any(1, keepdim=True), masked.int().argmax(1, keepdim=True), 0)
            self.shift = -first % block_length
        ends = self.shift + lengths
        whole = ends if from_masked else -(-ends // block_length) * block_length
        width = int(whole.max()) if len(canvas) else 0
        place = torch.arange(width, device=canvas.device)
        filler = torch.where(place < whole, mask_token_id, 0 if mask_token_id else 1)
        source = (place - self.shift).clamp(0, max(canvas.shape[1] - 1, 0))
        self.real = real = (place >= self.shift) & (place < ends)  # [B, width], the positions that were given
        self.canvas = torch.where(real, tokens.gather(1, source), filler)
        if from_masked:
            self.canvas = torch.where(real, self.canvas, 0 if mask_token_id else 1)
        self.key_mask = real if from_masked and not bool(real.all()) else None

    def restore(self, x: Tensor) -> Tensor:
        """Tokens or confidences [B, width] on the given canvas [B, L]; padding keeps its tokens and has confidence
        -inf."""
        length = self.given.shape[1]
        place = torch.arange(length, device=x.device) + self.shift
        x = x.gather(1, place.clamp(max=x.shape[1] - 1))
        padding = torch.full_like(x, -torch.inf) if x.is_floating_point() else self.given
        return torch.where(self.given_mask, torch.empty_like(x).scatter_(1, self.order, x), padding)


class ElasticGap:
    """Gaps that a model lengthens and shortens with two tokens it was trained to give (DreamOn, arXiv:2602.01326).

    A committed expand token becomes two masked positions, a committed delete token none; the tokens after it move. A
    row takes no expand token once its gap has `max_length` positions, or after `max_length` expansions, or once it
    has all `positions` of the model. given: [B] int64, its tokens outside the gap.
    """

    def __init__(self, given: Tensor, vocabulary: int, *, expand: int, delete: int | None, max_length: int,
                 positions: int):
        self.expand, self.delete = expand, delete
        self.max_length = (positions - given).clamp(max=max_length)
        self.budget = torch.full_like(given, max_length)
        self.words = torch.ones(2, vocabulary, dtype=torch.bool, device=given.device)
        self.words[1, expand] = False

    def allowed(self, editable: Tensor) -> Tensor:
        """bool [B, L, V]: every word, except the expand token where a row may not grow any more."""
        full = (editable.sum(1) >= self.max_length) | (self.budget <= 0)
        return self.words[full.long()].unsqueeze(1).expand(-1, editable.shape[1], -1)

    def resize(self, tokens: Tensor, masked: Tensor, visible: Tensor, mask_token_id: int,
               others: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Carry out the expand and delete tokens that the last step committed where `masked` [B, L].

        Returns: tokens [B, L'], visible [B, L'] (False is padding, on the right), and the others [B, L'], moved along;
            padding is 0 or False.
        """
        grown = masked & (tokens == self.expand)
        counts = visible.long() + grown
        if self.delete is not None:
            counts[masked & (tokens == self.delete)] = 0
        self.budget -= grown.sum(1)
        tokens = torch.where(grown, mask_token_id, tokens)
        visible, moved = move(counts, [(x, x) for x in (tokens, *others)])
        return moved[0], visible, tuple(moved[1:])
