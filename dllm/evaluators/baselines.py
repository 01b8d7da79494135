"""Unigram and bigram baselines, scored on the same positions as the model.

unigram: p(w) = (c(w) + 1/2) / (N + V/2) over the training tokens.
bigram: where the left neighbour v is visible, interpolated modified Kneser-Ney (Chen and Goodman 1999):
    p(w | v) = max(c(vw) - d(c(vw)), 0) / c(v) + g(v) * q(w),
    q(w) = the share of distinct bigrams that end in w, itself discounted and interpolated with 1/V,
and the unigram elsewhere. The discounts d(1), d(2), d(3+) are estimated from the counts of counts, as in the paper.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.data import Document
from dllm.evaluators.held_out import HeldOutSettings, corrupt_share, cut_windows
from dllm.evaluators.likelihood import MaskedResult, summarize_share


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineResult:
    unigram: MaskedResult
    bigram: MaskedResult


@dataclass(frozen=True, slots=True)
class NgramCounts:
    """Probabilities from the training tokens. V words, P distinct bigrams; everything float64 or int64."""

    unigram: Tensor  # [V] probabilities, sum 1
    continuation: Tensor  # [V] q(w) above, sum 1
    pairs: Tensor  # [P] v * V + w of every bigram seen, ascending
    seen: Tensor  # [P] the discounted first term of p(w | v)
    backoff: Tensor  # [V] g(v); 1 where v was never seen with a successor
    favourite: Tensor  # [V] the most likely successor of v

    def bigram_probability(self, left: Tensor, word: Tensor) -> Tensor:
        """p(word | left), float64, for int64 tensors of one shape."""
        wanted = left * len(self.unigram) + word
        place = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        first = torch.where(self.pairs[place] == wanted, self.seen[place], 0.0)
        return first + self.backoff[left] * self.continuation[word]


def count_ngrams(sequences: Iterable[Tensor], vocab_size: int) -> NgramCounts:
    """Count the training sequences ([N] int64 each; no bigram crosses from one to the next)."""
    V = vocab_size
    words, pairs = torch.zeros(V, dtype=torch.long), [torch.empty(0, dtype=torch.long)]
    for tokens in sequences:
        words += tokens.bincount(minlength=V)
        pairs.append(tokens[:-1] * V + tokens[1:])
    unigram = (words.double() + 0.5) / (words.sum() + 0.5 * V)

    pairs, counts = torch.cat(pairs).unique(return_counts=True)
    left, right = pairs // V, pairs % V
    endings = right.bincount(minlength=V)
    uniform = torch.full((V,), 1 / V, dtype=torch.float64)
    first, spare = _discounted(endings, torch.zeros_like(endings), 1)
    continuation = first + spare[0] * uniform
    seen, backoff = _discounted(counts, left, V)

    # The favourite is a seen successor or the most likely continuation: no other unseen word can beat that one.
    top = continuation.argmax()
    score = seen + backoff[left] * continuation[right]
    best = (backoff * continuation[top]).scatter_reduce(0, left, score, "amax")
    favourite = torch.full((V,), V).scatter_reduce(0, left[score == best[left]], right[score == best[left]], "amin")
    favourite = torch.where(favourite == V, top, favourite)
    return NgramCounts(unigram, continuation, pairs, seen, backoff, favourite)


def _discounted(counts: Tensor, context: Tensor, contexts: int) -> tuple[Tensor, Tensor]:
    """Modified Kneser-Ney: (count - discount) / total of the context, for each count; freed mass of each context."""
    n1, n2, n3, n4 = ((counts == n).sum().item() for n in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2) if n1 else 0.5
    # With too few data an estimate can be senseless (no counts, or out of order); the plain discount replaces it.
    d1, d2, d3 = (n - (n + 1) * y * more / some if some else y
                  for n, some, more in ((1, n1, n2), (2, n2, n3), (3, n3, n4)))
    if not 0 < d1 <= d2 <= d3 < 3 or d1 >= 1 or d2 >= 2:
        d1 = d2 = d3 = min(y, 0.9)
    discount = torch.tensor([0.0, d1, d2, d3], dtype=torch.float64)[counts.clamp(max=3)]
    nothing = torch.zeros(contexts, dtype=torch.float64)
    total = nothing.scatter_add(0, context, counts.double())
    freed = nothing.scatter_add(0, context, discount)
    return (counts - discount) / total[context].clamp(min=1), torch.where(total > 0, freed / total.clamp(min=1), 1.0)


def baseline_accuracy(counts: NgramCounts, tokenizer, documents: Sequence[Document],
                      settings: HeldOutSettings | None = None) -> tuple[BaselineResult, ...]:
    """Both baselines at each of `settings.shares`, on the positions that `masked_accuracy` scores with these arguments.

    Raises: UserError if there is no text.
    """
    settings = settings or HeldOutSettings()
    windows = cut_windows(tokenizer, documents, settings)
    commonest = counts.unigram.argmax()
    results = []
    for share in settings.shares:
        right: dict[str, list[Tensor]] = {"unigram": [], "bigram": []}
        nats: dict[str, list[Tensor]] = {"unigram": [], "bigram": []}
        for window, where in zip(windows, corrupt_share(windows, share, settings.seed), strict=True):
            truth, place = window.tokens[where], where.nonzero().squeeze(1)
            left, visible = window.tokens[place - 1], ~where[place - 1]
            alone = counts.unigram[truth]
            paired = torch.where(visible, counts.bigram_probability(left, truth), alone)
            favourite = torch.where(visible, counts.favourite[left], commonest)
            for name, probability, guess in (("unigram", alone, commonest), ("bigram", paired, favourite)):
                right[name].append(guess == truth)
                nats[name].append(-probability.log())
        results.append(BaselineResult(
            unigram=summarize_share(share, windows, right["unigram"], nats["unigram"]),
            bigram=summarize_share(share, windows, right["bigram"], nats["bigram"])))
    return tuple(results)
