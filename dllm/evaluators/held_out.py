"""Windows of held-out documents, their corrupted positions, and standard errors, for the likelihood evaluators.

The first token of a window is given and never scored, because models with right shift cannot predict it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.data import Document
from dllm.errors import UserError
from dllm.evaluators.settings import HeldOutSettings


@dataclass(frozen=True, slots=True)
class Window:
    tokens: Tensor  # [L] int64
    document: int  # index of the document it is cut from
    bytes: int  # UTF-8 bytes of the text of its tokens after the first

    @property
    def scored(self) -> int:
        """Positions that can be corrupted: all but the first."""
        return len(self.tokens) - 1


def encode_with_offsets(tokenizer, text: str) -> tuple[Tensor, list[int]]:
    """Tokens [N] int64 of the text, none of them special, and N + 1 offsets: their first characters, and the end."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True,
                        verbose=False)
    offsets = [start for start, _ in encoded["offset_mapping"]]
    return torch.tensor(encoded["input_ids"], dtype=torch.long), [*offsets, len(text)]


def decode(tokenizer, tokens: Tensor) -> str:
    """The exact text of tokens [N], without clean-up."""
    return tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)


def cut_windows(tokenizer, documents: Sequence[Document], settings: HeldOutSettings) -> list[Window]:
    """Cut every document, with its end-of-text token, into consecutive windows; draw `settings.windows` of them.

    Raises: UserError if there is no text.
    """
    windows = []
    for index, document in enumerate(documents):
        tokens, offsets = encode_with_offsets(tokenizer, document.text)
        if tokenizer.eos_token_id is not None and len(tokens):
            tokens = torch.cat((tokens, torch.tensor([tokenizer.eos_token_id])))
            offsets.append(offsets[-1])
        for start in range(0, len(tokens), settings.max_seq_len):
            end = min(start + settings.max_seq_len, len(tokens))
            if end - start < 2:  # nothing to score
                continue
            text = document.text[offsets[start + 1]:offsets[end]]
            windows.append(Window(tokens[start:end], index, len(text.encode("utf-8", "surrogatepass"))))
    if not any(window.bytes for window in windows):
        raise UserError(f"nothing to evaluate in {len(documents)} held-out documents: none has text after its first "
                        "token; give more data or hold out a larger share")
    if settings.windows is not None and settings.windows < len(windows):
        chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(settings.seed))[:settings.windows]
        windows = [windows[i] for i in chosen.sort().values.tolist()]
    return windows


def corrupt_share(windows: Sequence[Window], share: float, seed: int) -> list[Tensor]:
    """For each window [L] bool, max(1, round(share * (L - 1))) corrupted positions, all such sets equally likely."""
    generator, corrupted = torch.Generator().manual_seed(seed), []
    for window in windows:
        chosen = torch.zeros(len(window.tokens), dtype=torch.bool)
        count = max(1, round(share * window.scored))
        chosen[1 + torch.randperm(window.scored, generator=generator)[:count]] = True
        corrupted.append(chosen)
    return corrupted


def ratio_with_error(amounts: Sequence[float], sizes: Sequence[float],
                     documents: Sequence[int]) -> tuple[float, float | None]:
    """sum(amounts) / sum(sizes), and its standard error across documents (None for a single document).

    Windows of one document are alike, so documents are the independent units. The error is that of a ratio estimator
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
