"""Scores where each process of a group holds a slice of the words (vocabulary parallelism, arXiv:1909.08053).

Every process finds maximum, runner-up and sums of its own words; one all_gather of these few numbers per row gives
every process the whole distribution. A sample takes a second collective of the same size: the process in whose slice
the cumulative sum passes u finds the word. Filters need the whole row, so the slices of the logits are then gathered.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference
from .allowed import unpack, width
from .settings import Rows, Sampling


def linear_score_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, sampling: Sampling, *,
                      group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """As `reference.linear_score_rows`, the same in every process.

    Args:
        weight, bias: [Vr, D] and [Vr], this process's words, in the order of ranks. All else is the same in every
            process; the bits in `rows` are those of all words.
    """
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=hidden.device)
    sizes[dist.get_rank(group)] = len(weight)
    dist.all_reduce(sizes, group=group)
    sizes = sizes.tolist()
    if rows.allowed is not None and rows.allowed.shape[1] != width(sum(sizes)):
        raise ValueError(f"the group holds {sum(sizes)} words, so allowed needs {width(sum(sizes))} int32 numbers of "
                         f"bits for each position, not {rows.allowed.shape[1]}")
    return reference.in_chunks(lambda logits, some: _score(logits, sizes, some, sampling, group), hidden, weight, bias,
                               rows, max(sizes))


def _score(logits: Tensor, sizes: list[int], rows: Rows, sampling: Sampling,
           group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    if sampling.has_filters(sum(sizes)):
        return reference.score_rows(_gather_words(logits, sizes, group), rows, sampling)
    first = sum(sizes[:dist.get_rank(group)])
    words = slice(first, first + logits.shape[1])
    x = logits / sampling.temperature if sampling.temperature > 0 else logits
    if rows.allowed is not None:
        x = x.masked_fill(~unpack(rows.allowed, sum(sizes))[:, words], -torch.inf)
    own = torch.stack((*_statistics(x, first), *_statistics(logits, first)))
    gathered = [torch.empty_like(own) for _ in sizes]
    dist.all_gather(gathered, own, group=group)
    tempered, untouched = torch.stack(gathered, 1).split(5)
    top, total = _combine(tempered)[:2]
    best = tempered[0].max(0).indices  # among equals the first process, whose words come first
    token, chosen = (part.gather(0, best.unsqueeze(0)).squeeze(0) for part in (tempered[4], tempered[0]))
    if sampling.temperature > 0:
        token, chosen = _sample(x, logits if sampling.raw else x, tempered, top, rows.uniform, first, group)
    if sampling.confidence == "random":
        score = rows.uniform[:, 1]
    else:
        score = _confidence(sampling.confidence, _combine(untouched if sampling.raw else tempered), chosen)
    return token.long(), torch.where(total > 0, score, torch.nan).float()


def _statistics(x, first):
    """The largest, the runner-up, sum exp(x - largest), sum exp(x - largest) (x - largest), and the largest's id."""
    best = x.topk(min(2, x.shape[1]))
    top, second = best.values[:, 0].double(), best.values[:, -1].double()
    if x.shape[1] == 1:
        second = torch.full_like(top, -torch.inf)
    below = (x - best.values[:, :1]).double()
    weights = below.exp()
    terms = torch.where(weights == 0, 0, weights * below)
    # A slice without a possible word weighs nothing; a NaN shows in the sum of its slice.
    empty = top == -torch.inf
    return (top, second, torch.where(empty, 0, weights.sum(1)), torch.where(empty, 0, terms.sum(1)),
            (x.argmax(1) + first).double())


def _combine(parts):
    """Largest, sum, sum of terms and runner-up of the whole, from `_statistics` [5, processes, M]."""
    tops, seconds, totals, terms, _ = parts
    top = tops.max(0).values
    shift = torch.where(tops == -torch.inf, 0, tops - top)
    factor = torch.where(tops == -torch.inf, 0, shift.exp())
    second = torch.cat((tops, seconds)).topk(2, dim=0).values[1]
    return top, (factor * totals).sum(0), (factor * (terms + shift * totals)).sum(0), second


def _confidence(confidence, whole, chosen):
    top, total, terms, second = whole
    if confidence == "prob":
        return (chosen - top).exp() / total
    if confidence == "margin":
        return (1 - (second - top).exp()) / total
    return terms / total - total.log()


def _sample(x, logits, parts, top, uniform, first, group):
    """The first word, over all processes in their order, whose cumulative sum passes u, and its number in `logits`."""
    masses = torch.where(parts[0] == -torch.inf, 0, (parts[0] - top).exp() * parts[2])
    cumulative = masses.cumsum(0)
    wanted = uniform[:, 0] * cumulative[-1]
    owner = (cumulative <= wanted).sum(0).clamp(max=len(masses) - 1)
    rank = dist.get_rank(group)
    before = cumulative[rank] - masses[rank]
    within = (x.double() - top.unsqueeze(1)).exp().cumsum(1)
    place = (within <= (wanted - before).unsqueeze(1)).sum(1)
    # Rounding may carry the sum past the end: then the last possible word is taken.
    last = x.shape[1] - 1 - (x > -torch.inf).flip(1).int().argmax(1)
    place = torch.minimum(place, last)
    found = torch.stack(((place + first).double(), logits.gather(1, place.unsqueeze(1)).squeeze(1).double()))
    found = torch.where(owner == rank, found, 0)
    dist.all_reduce(found, group=group)
    return found[0], found[1]


def _gather_words(logits, sizes, group):
    """[M, V] of the slices [M, Vr]."""
    slices = [logits.new_empty(len(logits), max(sizes)) for _ in sizes]
    dist.all_gather(slices, torch.nn.functional.pad(logits, (0, max(sizes) - logits.shape[1])), group=group)
    return torch.cat([part[:, :size] for part, size in zip(slices, sizes, strict=True)], 1)
