"""What a strategy gets and gives back: the canvas as a step finds it, the questions it may ask the model, its update.

Symbols: B rows, L positions, step i of n, time running from 1 to eps, t before the step and s after it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """The canvas as a denoising step finds it."""

    index: int | Tensor  # i, from 0 in each block; kept as int64 on the CPU, [B], or [1] where all rows share it
    total: int | Tensor  # n, of this block; as index
    eps: float  # the time after the last step, in (0, 1)
    tokens: Tensor  # [B, L] int64
    masked: Tensor  # [B, L] bool: still to be committed, in the block being denoised
    editable: Tensor  # [B, L] bool: of that block, masked when denoising began
    mask_token_id: int
    uniform: Tensor | None  # [B, L, 2] float64 in (0, 1), [B, L, 8] for edits; None where nothing is random
    # The words each position may take, [B, L, V] bool or bits, computed where a strategy asks; None: all.
    allowed: Callable[[], Tensor] | None = None
    columns: tuple[int, int] = (0, 0)  # of the block: the first, and that after the last
    # What the host knows without asking a GPU, [B] on the CPU. None: it asks.
    left: Tensor | None = None  # int64: masked positions of each row
    size: Tensor | None = None  # int64: editable positions of each row
    working: Tensor | None = None  # bool: rows still at work; None: those with a masked position
    # Of edits: [B, L] bool, the positions after which tokens may be inserted, and [B], how many tokens a row may grow.
    open: Tensor | None = None
    room: Tensor | None = None

    def __post_init__(self):
        for name in ("index", "total"):
            number = getattr(self, name)
            if isinstance(number, int):
                object.__setattr__(self, name, torch.tensor([number], device="cpu"))
        for name, counted in (("left", self.masked), ("size", self.editable)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, counted.sum(1).cpu())
        if self.working is None:
            object.__setattr__(self, "working", self.left > 0)

    @property
    def last(self) -> Tensor:
        """bool [B] or [1]."""
        return self.index == self.total - 1

    def times(self) -> tuple[Tensor, Tensor]:
        """t and s, fp32 [B] or [1] each, as the originals' linspace rounds them."""
        grids = [time_grid(total, self.eps)[index:index + 2]
                 for total, index in zip(self.total.tolist(), self.index.tolist(), strict=True)]
        return (torch.stack(grids).T if len(grids) > 1 else grids[0].unsqueeze(1)).unbind()

    def share(self) -> Tensor:
        """1 - s/t, fp32 [B] or [1]: the share of the masked positions that this step should commit."""
        t, s = self.times()
        return 1 - s / t

    def chances(self, values: Tensor) -> Tensor:
        """Values [B] or [1] on the CPU as a column on the canvas's device."""
        return values.to(self.tokens.device, non_blocking=True).unsqueeze(1)


@lru_cache(maxsize=8)
def time_grid(total: int, eps: float) -> Tensor:
    """The times between the `total` steps of a block, fp32 [total + 1], from 1 to eps."""
    return torch.linspace(1.0, eps, total + 1, dtype=torch.float32, device="cpu")


class Update(NamedTuple):
    tokens: Tensor  # [B, L] after the step
    confidence: Tensor | None  # [B, L] fp32, -inf where not scored; None if nothing was
    deleted: Tensor | None = None  # [B, L] bool; None: no position
    inserted: Tensor | None = None  # [B, L] int64, the token to insert after each position, -1 for none; None: nowhere
    inserted_confidence: Tensor | None = None  # [B, L] fp32
    agreement: Tensor | None = None  # [B], of a step that corrects: share of the tokens that the model would choose


class Prediction(NamedTuple):
    """What a model makes of some positions, [B, L] each; elsewhere tokens are -1 and logarithms -inf."""

    drawn: Tensor  # int64, a sample of its distribution p over the words
    best: Tensor  # int64, the most likely word
    of_current: Tensor  # fp64, log p of the token that is there
    of_other: Tensor  # of the other word that was given
    of_drawn: Tensor
    of_best: Tensor


class Scorer(Protocol):
    """The model, asked about some positions of the current canvas; each call is one forward pass."""

    def unmask(self, k: Tensor, confidence: str, *, raw: bool = False, threshold: float | None = None) -> Update:
        """Commit the k[b] most confident masked positions of each row, and all whose confidence reaches the threshold.

        k: [B] int64 on the CPU; of a row with 0 nothing is computed.
        raw: the confidence is of the distribution before temperature and filters.
        """

    def score(self, positions: Tensor, *, confidence: str = "prob", raw: bool = False) -> Update:
        """Choose and score a token where `positions` [B, L] is True; elsewhere the update's tokens are -1."""

    def predict(self, positions: Tensor, other: Tensor, *, temperature: float | None = None) -> Prediction:
        """The distribution over the words, which the mask is not, where `positions` [B, L] is True.

        other: [B, L] int64, words to score too. temperature: in the place of the config's.
        """


class EditScorer(Protocol):
    """A model with heads for edits."""

    def rates(self) -> Tensor:
        """[B, L, 3] fp32, the rates to substitute, delete and insert after each position of the current canvas."""

    def draw(self, positions: Tensor, head: str) -> Update:
        """Draw a token where `positions` [B, L] is True, by the head "substitute" or "insert"; elsewhere -1."""


Strategy = Callable[[Step, Scorer], Update]
