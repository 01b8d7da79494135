"""What the likelihood evaluators share: windows of held-out documents, their corrupted positions, standard errors.

The first token of a window is given and never scored: models with right shift cannot predict it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.data import Document
from dllm.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutSettings:
    """Which part of the held-out documents is scored, and how often."""

    max_seq_len: int = 512  # tokens of a window; a document is cut into windows that do not see each other
    windows: int | None = 256  # at most so many, drawn evenly from all; None takes all
    samples: int = 4  # corrupted copies of each window for the perplexity bound
    shares: tuple[float, ...] = (0.15, 0.5)  # of a window's scored positions corrupted, for the accuracies
    batch_tokens: int = 16384  # positions of one forward pass; changes nothing but speed and memory
    seed: int = 0

    def __post_init__(self):
        for name, lowest in (("max_seq_len", 2), ("windows", 1), ("samples", 1), ("batch_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"{name} must be at least {lowest}, not {value}")
        if not all(0 < share <= 1 for share in self.shares):
            raise UserError(f"shares must be in (0, 1], not {self.shares}")


@dataclass(frozen=True, slots=True)
class Window:
    tokens: Tensor  # [L] int64
    document: int  # index of the document it is cut from
    bytes: int  # of UTF-8 text that its tokens after the first stand for

    @property
    def scored(self) -> int:
        """Positions that can be corrupted: all but the first."""
        return len(self.tokens) - 1


def encode(tokenizer, text: str) -> tuple[Tensor, list[int]]:
    """Tokens [N] int64 of the text, nothing added, and N + 1 offsets: the character where each begins, and the end."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = [start for start, _ in encoded["offset_mapping"]]
    return torch.tensor(encoded["input_ids"], dtype=torch.long), [*offsets, len(text)]


def decode(tokenizer, tokens: Tensor) -> str:
    """The text of tokens [N], with nothing tidied up."""
    return tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)


def cut_windows(tokenizer, documents: Sequence[Document], settings: HeldOutSettings) -> list[Window]:
    """Cut every document, with its end-of-text token, into consecutive windows; draw `settings.windows` of them.

    Raises: UserError if there is no text.
    """
    windows = []
    for index, document in enumerate(documents):
        tokens, offsets = encode(tokenizer, document.text)
        if tokenizer.eos_token_id is not None and len(tokens):
            tokens = torch.cat((tokens, torch.tensor([tokenizer.eos_token_id])))
            offsets.append(offsets[-1])
        for start in range(0, len(tokens), settings.max_seq_len):
            end = min(start + settings.max_seq_len, len(tokens))
            if end - start < 2:  # nothing to score
                continue
            text = document.text[offsets[start + 1]:offsets[end]]
            windows.append(Window(tokens[start:end], index, len(text.encode("utf-8", "surrogatepass"))))
    if not windows:
        raise UserError(f"nothing to evaluate in {len(documents)} held-out documents: none has two tokens; "
                        "give more data or hold out a larger share")
    if settings.windows is not None and settings.windows < len(windows):
        chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(settings.seed))[:settings.windows]
        windows = [windows[i] for i in chosen.sort().values.tolist()]
    return windows


def corrupt_share(windows: Sequence[Window], share: float, seed: int) -> list[Tensor]:
    """For each window [L] bool with max(1, round(share * (L - 1))) corrupted, every such set equally likely, a function
    of the arguments alone."""
    generator, corrupted = torch.Generator().manual_seed(seed), []
    for window in windows:
        chosen = torch.zeros(len(window.tokens), dtype=torch.bool)
        count = max(1, round(share * window.scored))
        chosen[1 + torch.randperm(window.scored, generator=generator)[:count]] = True
        corrupted.append(chosen)
    return corrupted


def ratio_with_error(amounts: Sequence[float], sizes: Sequence[float],
                     documents: Sequence[int]) -> tuple[float, float | None]:
    """sum(amounts) / sum(sizes), and its standard error were other documents drawn (None for a single document).

    Windows of one document are alike, so documents are the independent units: the error is that of a ratio estimator
    with clusters, sqrt(G / (G - 1) * sum over G documents of (amount - ratio * size)**2) / sum(sizes).
    """
    amount, size = math.fsum(amounts), math.fsum(sizes)
    ratio = amount / size
    residuals: dict[int, float] = {}
    for a, s, document in zip(amounts, sizes, documents, strict=True):
        residuals[document] = residuals.get(document, 0.0) + a - ratio * s
    groups = len(residuals)
    if groups < 2:
        return ratio, None
    return ratio, math.sqrt(groups / (groups - 1) * math.fsum(r * r for r in residuals.values())) / size
