"""Canvases that are not denoised as they are given: in whole blocks, or with gaps that grow and shrink."""

import torch
from torch import Tensor


class WholeBlocks:
    """A canvas for a block-causal model: in every row the tokens follow each other, in blocks of equal length.

    from_masked: whether a block begins with the first masked position (BD3-LM: padding before the row's first token
        sees to that, and the last block may be shorter), or with the first token (LLaDA2, SDAR: what is masked to
        complete a row's last block is filled too, as the model sees it, but not given out).
    """

    def __init__(self, canvas: Tensor, key_mask: Tensor | None, block_length: int, mask_token_id: int,
                 from_masked: bool):
        self.given = canvas
        self.given_mask = torch.ones_like(canvas, dtype=torch.bool) if key_mask is None else key_mask
        # Of the positions in their new order: real ones first, as the sort is stable.
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
        self.real = real = (place >= self.shift) & (place < ends)  # [B, width], what was given
        self.canvas = torch.where(real, tokens.gather(1, source), filler)
        if from_masked:
            self.canvas = torch.where(real, self.canvas, 0 if mask_token_id else 1)
        self.key_mask = real if from_masked and not bool(real.all()) else None

    def restore(self, aligned: Tensor) -> Tensor:
        """Tokens or confidences [B, width] where they were given; padding keeps its tokens, and has no confidence."""
        length = self.given.shape[1]
        place = torch.arange(length, device=aligned.device) + self.shift
        aligned = aligned.gather(1, place.clamp(max=aligned.shape[1] - 1))
        padding = torch.full_like(aligned, -torch.inf) if aligned.is_floating_point() else self.given
        return torch.where(self.given_mask, torch.empty_like(aligned).scatter_(1, self.order, aligned), padding)


class ElasticGap:
    """Gaps that a model lengthens and shortens with two tokens it was trained to give (DreamOn, arXiv:2602.01326).

    A committed expand token becomes two masked positions, a committed delete token none; what follows moves. A row
    takes no expand token once its gap has `max_length` positions, or after so many expansions.
    """

    def __init__(self, canvas: Tensor, vocabulary: int, *, expand: int, delete: int | None, max_length: int):
        self.expand, self.delete, self.max_length = expand, delete, max_length
        self.budget = torch.full((len(canvas),), max_length, device=canvas.device)
        self.words = torch.ones(2, vocabulary, dtype=torch.bool, device=canvas.device)
        self.words[1, expand] = False

    def allowed(self, editable: Tensor) -> Tensor:
        """bool [B, L, V]: every word but, where a row may not grow any more, the expand token."""
        full = (editable.sum(1) >= self.max_length) | (self.budget <= 0)
        return self.words[full.long()].unsqueeze(1).expand(-1, editable.shape[1], -1)

    def resize(self, tokens: Tensor, masked: Tensor, visible: Tensor, mask_token_id: int,
               others: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Carry out what the last step committed where `masked` [B, L].

        Returns: tokens [B, L'], visible [B, L'] (False is padding, on the right), and the others [B, L] moved along, 0
            or False where there is padding.
        """
        grown = masked & (tokens == self.expand)
        counts = visible.long() + grown
        if self.delete is not None:
            counts[masked & (tokens == self.delete)] = 0
        self.budget -= grown.sum(1)
        lengths = counts.sum(1)
        width = int(lengths.max())
        source = torch.arange(tokens.numel(), device=tokens.device).repeat_interleave(counts.flatten())
        place = torch.arange(width, device=tokens.device) < lengths.unsqueeze(1)
        tokens = torch.where(grown, mask_token_id, tokens)
        moved = [torch.zeros(len(x), width, dtype=x.dtype, device=x.device).masked_scatter(place, x.flatten()[source])
                 for x in (tokens, *others)]
        return moved[0], place, tuple(moved[1:])
