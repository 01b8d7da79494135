"""What all likelihood evaluators share: windows of held-out documents, which positions are corrupted, standard errors."""

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
    shares: tuple[float, ...] = (0.15, 0.5)  # of a window's positions corrupted, for the accuracies
    batch_tokens: int = 16384  # positions of one forward pass; changes nothing but speed and memory
    seed: int = 0

    def __post_init__(self):
        for name, lowest in (("max_seq_len", 1), ("windows", 1), ("samples", 1), ("batch_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"{name} must be at least {lowest}, not {value}")
        if not all(0 < share <= 1 for share in self.shares):
            raise UserError(f"shares must be in (0, 1], not {self.shares}")


@dataclass(frozen=True, slots=True)
class Window:
    tokens: Tensor  # [L] int64
    document: int  # index of the document it is cut from
    bytes: int  # of UTF-8 text that its tokens stand for


def encode(tokenizer, text: str) -> tuple[Tensor, list[int]]:
    """Tokens [N] int64 of the text, nothing added, and N + 1 offsets: the character at which each begins, and the end."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return torch.tensor(encoded["input_ids"], dtype=torch.long), [start for start, _ in encoded["offset_mapping"]] + [len(text)]


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
            text = document.text[offsets[start]:offsets[end]]
            windows.append(Window(tokens[start:end], index, len(text.encode("utf-8", "surrogatepass"))))
    if not windows:
        raise UserError(f"nothing to evaluate: no text in the {len(documents)} held-out documents; "
                        "give more data or a larger data.validation_share")
    if settings.windows is not None and settings.windows < len(windows):
        chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(settings.seed))[:settings.windows]
        windows = [windows[i] for i in chosen.sort().values.tolist()]
    return windows


def corrupt_exactly(windows: Sequence[Window], counts: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """For each window [L] bool with counts[i] corrupted positions, every subset of that size equally likely."""
    corrupted = []
    for window, count in zip(windows, counts, strict=True):
        chosen = torch.zeros(len(window.tokens), dtype=torch.bool)
        chosen[torch.randperm(len(window.tokens), generator=generator)[:count]] = True
        corrupted.append(chosen)
    return corrupted


def corrupt_share(windows: Sequence[Window], share: float, seed: int) -> list[Tensor]:
    """For each window [L] bool with max(1, round(share * L)) corrupted positions, a function of the arguments alone."""
    counts = [max(1, round(share * len(window.tokens))) for window in windows]
    return corrupt_exactly(windows, counts, torch.Generator().manual_seed(seed))


def ratio_with_error(amounts: Sequence[float], sizes: Sequence[float], documents: Sequence[int]) -> tuple[float, float | None]:
    """sum(amounts) / sum(sizes), and its standard error were other documents drawn (None for a single document).

    Windows of one document are alike, so the documents are the independent units: the error is that of a ratio estimator
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
