"""Texts that change their lengths while they are denoised: what may change, how it begins, how tokens come and go."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.errors import UserError
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.steps import Update
from dllm.model.transformer import Transformer
from dllm_kernels import philox_uniform


class EditedText:
    """Texts whose tokens are inserted, deleted and substituted (Edit Flows).

    tokens [B, L], on which `visible` [B, L] is False after a row's end; `editable` [B, L], the tokens that may change;
    `open` [B, L], the positions after which tokens may be inserted: editable ones, and the one before each gap.

    Args:
        visible: [B, L] bool, False at padding, on either side.
        editable: [B, L] bool.
        limit: [B] int64, editable tokens of a row at most.
    Raises: UserError if nothing is before a token that may change.
    """

    def __init__(self, tokens: Tensor, visible: Tensor, editable: Tensor, limit: Tensor):
        self.visible, (self.tokens, self.editable) = move(visible.long(), [(tokens, tokens), (editable, editable)])
        begins = self.editable & ~F.pad(self.editable, (1, -1))
        if begins[:, 0].any():
            raise UserError("edits need a token before what they fill; begin the prompt with one, such as the "
                            "tokenizer's first token or an end of text")
        self.open = self.editable | F.pad(begins, (-1, 1))
        self.limit = limit

    @property
    def room(self) -> Tensor:
        """[B] int64, how many tokens each row may gain."""
        return self.limit - self.editable.sum(1)

    def close(self, row: int) -> None:
        """Let nothing of a row change any more."""
        self.editable[row] = self.open[row] = False

    def empty(self, length: int) -> None:
        """Put `length` tokens, 0 until they are chosen, in the place of what is in each gap."""
        place, source, number = repeat((self.visible & ~self.editable) + length * (self.open & ~self.editable))
        fresh = number > 0
        opens = (self.open & ~self.editable).flatten()[source]
        self.visible = place
        self.tokens, self.editable, self.open = (lay(place, values) for values in (
            self.tokens.flatten()[source].masked_fill(fresh, 0), fresh, opens))

    def apply(self, update: Update, others: tuple[tuple[Tensor, Tensor], ...]) -> list[Tensor]:
        """Take a step's edits. others: (values of the tokens that stay, values of those inserted), [B, L] each.

        Returns: these, moved along, [B, L'].
        """
        comes, stays = update.inserted >= 0, self.visible & ~update.deleted
        instead = comes & ~stays  # what is inserted after a deleted token takes its place
        pairs = [(update.tokens, update.inserted), (self.editable, comes), (self.open, comes), *others]
        self.visible, (self.tokens, self.editable, self.open, *rest) = move(
            stays.long() + comes, [(torch.where(instead, new, old), new) for old, new in pairs])
        return rest


def begin_edits(model: Transformer, config: MDMGenerationConfig, tokens: Tensor, key_mask: Tensor | None,
                asked: Tensor | None, mask_token_id: int, seed: int | Tensor, sequence: Tensor) -> EditedText:
    """A canvas with a source in its gaps, or with the tokens that are edited.

    Args:
        tokens, key_mask: [B, L], the canvas with its copies, and which of it is no padding; None: all.
        asked: [B / copies, L] bool, the tokens to edit; None: the masked positions are gaps.
        seed, sequence: whose random numbers a uniform source has.
    Raises: UserError if a text or its source does not fit.
    """
    visible = torch.ones_like(tokens, dtype=torch.bool) if key_mask is None else key_mask
    editable = (tokens == mask_token_id if asked is None else asked.to(tokens.device).repeat_interleave(
        config.num_return_sequences, 0)) & visible
    room = model.config.max_position_embeddings - visible.sum(1)
    if (room < 0).any():
        raise UserError(f"a text of {int(visible.sum(1).max())} tokens is more than the "
                        f"{model.config.max_position_embeddings} positions of the model; give a shorter one")
    limit = editable.sum(1)
    if asked is not None:
        limit = limit + room.clamp(max=config.max_new_tokens)
    text = EditedText(tokens, visible, editable, limit)
    if asked is None:
        length = 0 if config.edit_source == "empty" else config.edit_source_length
        if length > (fewest := int(limit[limit > 0].min()) if (limit > 0).any() else length):
            raise UserError(f"edit_source_length {length} is more than the {fewest} tokens that a gap may have; "
                            "lower it, or raise max_new_tokens or the gap's length")
        text.empty(length)
        fresh = torch.full_like(text.tokens, mask_token_id)
        if config.edit_source == "uniform":
            place = torch.arange(fresh.shape[1], device=fresh.device).expand_as(fresh)
            drawn = philox_uniform(seed, sequence, 4 * config.steps, place)[..., 0]
            fresh = (drawn * (model.config.vocab_size - 1)).long()
            fresh = fresh + (fresh >= mask_token_id)
        text.tokens = torch.where(text.editable, fresh, text.tokens)
    return text


def move(counts: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Let each position of [B, L] become none, one or two.

    Args:
        counts: [B, L] int64.
        pairs: (the value of a position's first, the value of its second), [B, L] each.
    Returns: [B, L'] bool, False for padding, which is on the right; the values [B, L'], 0 or False there.
    """
    place, source, number = repeat(counts)
    return place, [lay(place, torch.where(number > 0, two.flatten()[source], one.flatten()[source]))
                   for one, two in pairs]


def repeat(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens of rows [B, L] come to lie, if each is there so many times: [B, L'] bool, False for padding on
    the right; and of each that is there, the number of its token among all B * L, and how many of it are before."""
    lengths = counts.sum(1)
    place = torch.arange(int(lengths.max()), device=counts.device) < lengths.unsqueeze(1)
    source = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts.flatten())
    return place, source, torch.arange(len(source), device=counts.device) - torch.searchsorted(source, source)


def lay(place: Tensor, values: Tensor) -> Tensor:
    """[B, L'] with the values, one after the other, where `place` is True, and 0 or False elsewhere."""
    return torch.zeros(place.shape, dtype=values.dtype, device=values.device).masked_scatter(place, values)
