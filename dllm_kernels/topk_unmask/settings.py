"""Settings of a denoising step, as the layers pass them on."""

from typing import NamedTuple

import torch
from torch import Tensor

CONFIDENCES = ("prob", "margin", "entropy", "random")  # csrc counts them in this order


class Effective(NamedTuple):
    """A `Sampling` without settings that change nothing, so that a kernel does no work for them."""

    measure: str  # "prob", "margin" or "entropy": the sums over the words
    temperature: float | None  # None takes the likeliest word
    filtered: bool
    top_k: int  # the number of words: no limit
    top_p: float  # infinity: no limit
    raw: bool  # the confidence comes from other numbers than the token


class Sampling(NamedTuple):
    """Rule by which a row of logits gives a token and a confidence; see `dllm_kernels.topk_unmask`."""

    confidence: str = "prob"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    raw: bool = False  # confidence_of="raw"

    def has_filters(self, words: int) -> bool:
        return (self.top_p is not None and self.top_p < 1) or (self.top_k is not None and self.top_k < words)

    def is_filtered(self, words: int) -> bool:
        """Whether the filters can change the token or the confidence: the likeliest word is always kept."""
        return self.has_filters(words) and (self.temperature > 0 or not (self.raw or self.confidence == "random"))

    def effective(self, words: int, restricted: bool) -> Effective:
        """`restricted`: some words are not allowed."""
        random = self.confidence == "random"
        return Effective(
            measure="prob" if random else self.confidence,
            temperature=float(self.temperature) if self.temperature > 0 else None,
            filtered=self.is_filtered(words),
            top_k=words if self.top_k is None else min(self.top_k, words),
            top_p=float("inf") if self.top_p is None or self.top_p >= 1 else self.top_p,
            raw=self.raw and not random and (self.temperature > 0 or restricted))


class Rows(NamedTuple):
    """The n rows to score, and what belongs to each of them."""

    index: Tensor | None = None  # [n] int64, rows of the inputs; None: all, in order
    uniform: Tensor | None = None  # [n, 2] float64
    allowed: Tensor | None = None  # [n, ceil(V / 32)] int32 bits, see `allowed.py`
    sparse: bool = False  # only the GPU knows which of the index are -1, not asked for

    def part(self, some: slice) -> "Rows":
        return Rows(*(None if x is None else x[some] for x in self[:3]), self.sparse)

    def readable(self) -> "Rows":
        """With strides that the compiled kernels take; that of the rows of `allowed` is free."""
        index, uniform = (None if x is None else x.contiguous() for x in (self.index, self.uniform))
        allowed = self.allowed
        allowed = allowed if allowed is None or allowed.stride(-1) == 1 else allowed.contiguous()
        return Rows(index, uniform, allowed, self.sparse)


def places(index: Tensor, R: int) -> Tensor:
    """Each row's own place where it is one of R rows; -1 where it is not asked for, and else past the last place."""
    place = torch.arange(len(index), device=index.device)
    return torch.where(index < 0, -1, torch.where(index < R, place, len(index)))


class Selection(NamedTuple):
    """Rule by which a step commits masked positions; see `dllm_kernels.topk_unmask`."""

    k: Tensor  # [B] int64
    selection_temperature: float = 0.0
    threshold: float | None = None
