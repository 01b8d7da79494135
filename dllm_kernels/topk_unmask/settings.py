"""What the settings of a denoising step come to, so that a kernel does no work that cannot change the outcome."""

from typing import NamedTuple


class Settings(NamedTuple):
    measure: str  # "prob", "margin" or "entropy": what is summed over the words
    temperature: float | None  # None: the likeliest word
    filtered: bool
    top_k: int  # all words: no limit
    top_p: float  # infinity: no limit
    raw: bool  # the confidence is of other numbers than those that the token is chosen from


def is_filtered(words: int, confidence: str, temperature: float, top_k: int | None, top_p: float | None,
                raw: bool) -> bool:
    """Whether the filters can change the token or the confidence: the likeliest word is always kept."""
    filters = (top_p is not None and top_p < 1) or (top_k is not None and 0 < top_k < words)
    return filters and (temperature > 0 or not (raw or confidence == "random"))


def effective(words: int, restricted: bool, confidence: str, temperature: float, top_k: int | None,
              top_p: float | None, raw: bool) -> Settings:
    """`restricted`: some words are not allowed."""
    return Settings(
        measure="prob" if confidence == "random" else confidence,
        temperature=float(temperature) if temperature > 0 else None,
        filtered=is_filtered(words, confidence, temperature, top_k, top_p, raw),
        top_k=words if top_k is None or top_k < 1 else min(top_k, words),
        top_p=float("inf") if top_p is None or top_p >= 1 else top_p,
        raw=raw and confidence != "random" and (temperature > 0 or restricted),
    )
