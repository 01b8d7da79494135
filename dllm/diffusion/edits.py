"""Edit flows: text that grows out of a source by inserting, deleting and substituting tokens (arXiv:2506.09018).

Source and text are aligned in columns (a, b), of which either may be blank: (a, a) is kept, (blank, b) inserts b,
(a, blank) deletes a, (a, b) substitutes. At time t, 1 at the source and 0 at the text, each column shows its b with
the chance alpha(t), otherwise its a; without the blanks that is x_t. The columns that still show another a are the
edits E that remain, each at a place i of x_t: its own, or that of the token before it where it inserts. With rates
r[i] that do not depend on the time, and w = -alpha'(t) / (1 - alpha(t)),

    loss = w (sum over the places that may change of r_sub + r_del + r_ins  -  sum over E of log r_kind[i] Q_kind[i](b))

so r_ins learns how many tokens are missing after a place, the others how likely a place is wrong or too many. As the
rates are without time, a bound on w only weighs late times less; it is 20 here, as in ZHZisZZ/dllm.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.data import Packed
from dllm.data.alignment import BLANK
from dllm.diffusion.corruption import SCHEDULES
from dllm.diffusion.objectives import LossSums
from dllm_kernels import linear_masked_cross_entropy, philox_uniform

SUBSTITUTE, DELETE, INSERT = range(3)  # the order of the rates in the published checkpoints
MAX_WEIGHT = 20.0
DROPPED = 0.1  # share of plain texts that nothing is given of, so that guidance has something to compare with
# Draws for documents, for the order of their columns, and for how far edits spread, beyond those of the columns.
_OF_DOCUMENTS, _OF_ORDER, _OF_SPREAD = 2**24, 2**25, 2**26


class Columns(NamedTuple):
    """Aligned columns of some documents, one after the other, C in all."""

    before: Tensor  # [C] int64, of the source; BLANK where there is none
    after: Tensor  # [C] int64, of the text
    editable: Tensor  # [C] bool: not a given token, such as one of a prompt
    document: Tensor  # [C] int64


class EditTargets(NamedTuple):
    """What the hidden states at T positions are scored on. The E edits are sorted by their kind."""

    rate_weights: Tensor  # [T, 3] fp32: of each rate in the loss; 0 where such an edit is impossible
    rows: Tensor  # [E] int64: the position that predicts an edit
    tokens: Tensor  # [E] int64; 0 where it deletes
    weights: Tensor  # [E] fp32
    counts: tuple[int, int, int]  # edits that substitute, delete and insert
    normaliser: Tensor  # int64 scalar: tokens of the texts that are not given

    @property
    def scored(self) -> int:
        """Tokens that are predicted."""
        return self.counts[SUBSTITUTE] + self.counts[INSERT]


class Draws(NamedTuple):
    """Whose random numbers a step's are: a function of seed, step, slot and the place in the row alone."""

    seed: int
    step: int
    slot: Tensor  # [S] int64, the slot of each document's row, ascending

    def of(self, document: Tensor, place: Tensor) -> Tensor:
        """[..., 2] fp64 in (0, 1)."""
        return philox_uniform(self.seed, self.slot[document], self.step, place)

    def number(self, document: Tensor) -> Tensor:
        """Places of columns of these documents, ascending, counted in each row."""
        return number_within(self.slot[document])


def number_within(group: Tensor) -> Tensor:
    """How many entries of the same ascending value are before each."""
    return torch.arange(len(group)) - torch.searchsorted(group, group)


def choose_given(packed: Packed, draws: Draws) -> Tensor:
    """Which tokens are given, [T] bool: the first of each document, after which the first edit inserts; in
    conversations all that is not learnt; else a part of the text.

    A tenth of the plain texts have no given part; of the others the first n c^3 tokens are given, c uniform, as in the
    paper, and of half of these also the last n' d^3 of the n' others, so that gaps before a known end are learnt.
    """
    starts, lengths = packed.cu_seqlens[:-1].long(), packed.cu_seqlens.diff().long()
    documents = torch.arange(len(lengths))
    document = torch.repeat_interleave(documents, lengths)
    place = number_within(document)
    if packed.trainable is not None:
        return ~packed.trainable | (place == 0)
    drawn = draws.of(documents.unsqueeze(1), _OF_DOCUMENTS + 2 * packed.column[starts].unsqueeze(1) + torch.arange(2))
    prefix = (lengths * drawn[:, 0, 0]**3).long().clamp(min=1)
    suffix = ((lengths - prefix) * drawn[:, 0, 1]**3).long() * (drawn[:, 1, 1] < 0.5)
    dropped = drawn[:, 1, 0] < DROPPED
    prefix, suffix = prefix.masked_fill(dropped, 1), suffix.masked_fill(dropped, 0)
    return (place < prefix[document]) | (place >= (lengths - suffix)[document])


def align_source(packed: Packed, given: Tensor, draws: Draws, *, source: str, length: int, mask_token_id: int,
                 vocab_size: int) -> Columns:
    """Columns of texts whose source is empty, `length` masks, or so many uniform words (but the mask).

    As many of the source's tokens as the text needs become its tokens, in the uniform source at most half; the others
    are deleted, and what the text still lacks is inserted, all in random order (the paper's figure 13).
    """
    lengths = packed.cu_seqlens.diff().long()
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    wanted = torch.bincount(document[~given], minlength=len(lengths))
    there = torch.where(wanted > 0, 0 if source == "empty" else length, 0)
    become = torch.minimum(wanted, there - there // 2 if source == "uniform" else there)
    counts = torch.stack((become, there - become, wanted - become), 1)  # by kind
    owner = torch.repeat_interleave(torch.arange(len(lengths)), counts.sum(1))
    drawn = draws.of(owner, _OF_ORDER + draws.number(owner))
    order = drawn[:, 0].argsort()
    kind = torch.repeat_interleave(torch.arange(3).repeat(len(lengths)), counts.flatten())
    kind = kind[order[owner[order].argsort(stable=True)]]

    # The j-th column that shows a token of a text shows the j-th token that is not given.
    places, shows = (~given).nonzero().squeeze(1), kind != DELETE
    so_far = shows.long().cumsum(0)
    place, following = places[(so_far - 1).clamp(min=0)], places[so_far.clamp(max=len(places) - 1)]
    begun = (so_far > 0) & (document[place] == owner)  # else a deleted token stands before the first of its document
    key = torch.where(begun, 3 * place + torch.where(shows, 1, 2), 3 * following)
    words = torch.full_like(kind, mask_token_id)
    if source == "uniform":
        words = (drawn[:, 1] * (vocab_size - 1)).long()
        words = words + (words >= mask_token_id)
    kept = given.nonzero().squeeze(1)
    order = torch.cat((3 * kept + 1, key)).argsort(stable=True)
    same = packed.tokens[kept]
    return Columns(torch.cat((same, words.masked_fill(kind == INSERT, BLANK)))[order],
                   torch.cat((same, torch.where(shows, packed.tokens[place], BLANK)))[order],
                   (torch.arange(len(order)) >= len(kept))[order], torch.cat((document[kept], owner))[order])


def show(columns: Columns, draws: Draws, times: Tensor, schedule: str, propagation: float = 0.0
         ) -> tuple[Tensor, Tensor]:
    """Which columns show the text at their document's time, [C] bool, and the rate at which the others change, [C]
    fp32: w, or with `propagation` more next to columns that have changed (see `spread`)."""
    index = draws.number(columns.document)
    uniform = draws.of(columns.document, index)[:, 0]
    t = times.float()[columns.document]
    alpha, _, when = SCHEDULES[schedule]
    if not propagation:
        return ~columns.editable | (uniform < alpha(t)), weigh(t, schedule)
    began = when(uniform) - t.double()  # since a column changed by itself; negative: it has not
    reach = draws.of(columns.document, _OF_SPREAD + index)
    shown, neighbours = spread(columns.document, began, reach, propagation)
    return ~columns.editable | shown, weigh(t, schedule) + propagation * neighbours


def weigh(t: Tensor, schedule: str) -> Tensor:
    """w at the times t, at most MAX_WEIGHT."""
    return SCHEDULES[schedule].weight(t).clamp(max=MAX_WEIGHT)


def spread(document: Tensor, began: Tensor, uniform: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Localized edits (arXiv:2506.09018, appendix C.1): a column that has changed spreads to both sides at `rate`.

    Args:
        document: [C]; nothing spreads to another one.
        began: [C], the time since which a column spreads; negative if it does not.
        uniform: [C, 2], of how far it has come to the left and to the right, Poisson(rate * began) columns each.
    Returns: [C] bool, which columns have changed; [C] fp32, how many spreading columns have come to a neighbour.
    """
    active, columns = began > 0, torch.arange(len(document))
    mean = rate * began.clamp(min=0)
    reach = draw_poisson(mean.unsqueeze(1), uniform)
    first = torch.searchsorted(document, document)
    end = torch.searchsorted(document, document, right=True)
    left, right = torch.maximum(columns - reach[:, 0], first), torch.minimum(columns + reach[:, 1] + 1, end)
    change = torch.zeros(len(document) + 1, dtype=torch.long)
    change.index_add_(0, left[active], torch.ones_like(left[active]))
    change.index_add_(0, right[active], -torch.ones_like(right[active]))
    covering = change.cumsum(0)[:-1]
    padded = F.pad(covering, (1, 1))
    here = torch.stack((columns > first, columns + 1 < end))
    return covering > 0, (padded[:-2] * here[0] + padded[2:] * here[1]).float()


def draw_poisson(mean: Tensor, uniform: Tensor) -> Tensor:
    """int64 of the shape of both: how many of the distribution's cumulative probabilities are at most `uniform`."""
    chance = torch.exp(-mean.double())
    below, drawn, k = chance, torch.zeros(torch.broadcast_shapes(mean.shape, uniform.shape), dtype=torch.long), 0
    while bool((more := uniform >= below).any()) and k < 1000:
        drawn, k = drawn + more, k + 1
        chance = chance * mean / k
        below = below + chance
    return drawn


def make_edits(columns: Columns, shown: Tensor, weight: Tensor, times: Tensor, schedule: str, packed: Packed, *,
               inserts_only: bool, shift: bool) -> tuple[Packed, EditTargets]:
    """x_t, and what is learnt from it.

    Args:
        shown, weight: of the columns, see `show`.
        packed: the texts; only the rows of their documents are read.
        inserts_only: whether the model has no other rates.
        shift: whether a position predicts the token after it, so that what is said about a place is read before it.
    """
    here = torch.where(shown, columns.after, columns.before)
    present = here != BLANK
    place = present.long().cumsum(0) - 1  # of each column's token, or of the one before it
    document = columns.document[present]
    ends = torch.bincount(document, minlength=len(packed.cu_seqlens) - 1)
    cu_seqlens = F.pad(ends.cumsum(0), (1, 0)).int()
    w = weigh(times.float(), schedule)[document]
    opens = columns.editable | F.pad(columns.editable[1:] & (columns.document[1:] == columns.document[:-1]), (0, 1))
    allowed = torch.stack([columns.editable[present] & (not inserts_only)] * 2 + [opens[present]], 1)
    rate_weights = allowed * w.unsqueeze(1)

    left = (columns.editable & ~shown & (columns.before != columns.after)).nonzero().squeeze(1)
    before, after = columns.before[left], columns.after[left]
    kind = torch.where(before == BLANK, INSERT, torch.where(after == BLANK, DELETE, SUBSTITUTE))
    left = left[order := kind.argsort(stable=True)]
    rows, kind = place[left], kind[order]
    if shift:
        rate_weights[:, :INSERT] = rate_weights[:, :INSERT].roll(-1, 0)  # the first place of a document has none
        rows = rows - (kind != INSERT).long()
    targets = EditTargets(rate_weights, rows, after[order].clamp(min=0), weight[left],
                          tuple(torch.bincount(kind, minlength=3).tolist()),
                          (columns.editable & (columns.after != BLANK)).sum())
    starts = packed.cu_seqlens[:-1].long()
    return Packed(here[present], cu_seqlens, int(ends.max()), packed.row[starts][document],
                  packed.column[starts][document] + number_within(document)), targets


def log_softplus(x: Tensor) -> Tensor:
    """log(softplus(x)), also where softplus is below the smallest number: there it is x, to 1e-7 from -15 on."""
    return torch.where(x < -15, x, F.softplus(x.clamp(min=-15)).log())


def sum_edit_losses(hidden: Tensor, substitute: Tensor, insert: Tensor, raw_rates: Tensor, targets: EditTargets, *,
                    backend: str | None = None) -> LossSums:
    """The sum of the losses of one micro-batch, with gradients to every head, zero where none of its edits is there.

    Args:
        hidden: [..., D] after the final norm, T of them.
        substitute, insert: [V, D], the heads.
        raw_rates: [..., 3] before softplus.
        targets: of these T positions.
        backend: of `dllm_kernels.linear_masked_cross_entropy`.
    """
    hidden, raw = hidden.flatten(0, -2), raw_rates.flatten(0, -2).float()
    kinds = torch.repeat_interleave(torch.arange(3, device=raw.device), torch.tensor(targets.counts, device=raw.device),
                                    output_size=len(targets.rows))
    logs = log_softplus(raw[targets.rows, kinds])
    loss = (F.softplus(raw) * targets.rate_weights).sum() - (logs * targets.weights).sum()
    nll, start = torch.zeros((), device=hidden.device), 0
    for kind, head in ((SUBSTITUTE, substitute), (DELETE, None), (INSERT, insert)):
        mine = slice(start, start := start + targets.counts[kind])
        if head is None:
            continue
        rows, tokens = hidden[targets.rows[mine]], targets.tokens[mine]
        total, each = linear_masked_cross_entropy(
            rows, head, tokens, torch.ones_like(tokens, dtype=torch.bool), weights=targets.weights[mine],
            count=len(tokens), reduction="sum", return_nll=True, backend=backend)
        loss, nll = loss + total, nll + each.sum()
    return LossSums(loss, nll, torch.zeros((), device=hidden.device))
