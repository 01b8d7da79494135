"""Corruption for models whose gaps grow and shrink (DreamOn, arXiv:2602.01326).

Of each document a random span is the gap. Its tokens are masked at the document's rate; two masked neighbours may merge
into one position, whose target is then the expand token; masked positions whose target is the delete token follow. What
the model learns: an expand token becomes two masks when it samples, and a delete token disappears.
"""

import torch
from torch import Tensor

from dllm.corruption import Corruption
from dllm.data import Packed

MERGE_CHANCE = 0.5
MOST_DELETIONS = 64  # delete tokens of a gap, nor more than it has tokens


def corrupt_gaps(packed: Packed, times: Tensor, uniform: Tensor, choices: Tensor, *, room: int, mask_token_id: int,
                 expand_token_id: int, delete_token_id: int) -> tuple[Packed, Corruption]:
    """Mask a span of each document, merge some masks and add some deletions: other documents, and their corruption.

    DreamOn takes whole lines as the span, this any tokens but a last end-of-text token; it adds up to 64 deletions to
    the shortest gap, this at most as many as the gap has tokens, so that gaps with too few masks are as common as those
    with too many.

    Args:
        times: [S] in (0, 1), the rate at which each document's span is masked.
        uniform: [T, 2] in [0, 1): a token is masked where the first is below the rate, and a pair of masks merged where
            the second of its first is below the chance.
        choices: [S, 4] in [0, 1): the ends of the span, how many deletions, and the chance that masks merge: evenly
            `MERGE_CHANCE` or that times the share of the gap that is not masked.
        room: tokens that a document may have; deletions do not take it beyond.
    Returns: The new documents, whose tokens are the targets where masked; T and cu_seqlens are others, and `column` is
        of the token that each comes from.
    """
    lengths = packed.cu_seqlens.diff().long()
    starts = packed.cu_seqlens[:-1].long()
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.arange(len(document)) - starts[document]

    fillable = lengths - (packed.tokens[packed.cu_seqlens[1:].long() - 1] == delete_token_id).long()
    ends = (choices[:, :2] * fillable.unsqueeze(1)).long().sort(1).values  # first and last place of the span
    last = torch.minimum(ends[:, 1], fillable - 1)  # -1 where nothing can be filled
    inside = (place >= ends[:, 0][document]) & (place <= last[document])
    masked = inside & (uniform[:, 0] < times[document])
    span = torch.bincount(document[inside], minlength=len(lengths))
    most = span.clamp(max=MOST_DELETIONS).minimum(room - lengths)
    deletions = (choices[:, 2] * (most + 1)).long()
    size = span + deletions
    share = (torch.bincount(document[masked], minlength=len(lengths)) + deletions) / size.clamp(min=1)
    chance = torch.where(choices[:, 3] < 0.5, MERGE_CHANCE, MERGE_CHANCE * (1 - share))
    grown, merged = merge_masks(masked, document, uniform[:, 1] < chance[document])

    at_end = inside & (place == last[document])
    counts = (~merged).long() + torch.where(at_end, deletions[document], 0)
    source = torch.repeat_interleave(torch.arange(len(counts)), counts)
    index = torch.arange(len(source)) - (counts.cumsum(0) - counts)[source]
    deleted = index >= (~merged)[source].long()
    tokens = packed.tokens.masked_fill(grown, expand_token_id)[source].masked_fill(deleted, delete_token_id)
    corrupted = masked[source] | deleted
    document = document[source]
    new_lengths = torch.bincount(document, minlength=len(lengths))
    cu_seqlens = torch.cat((starts[:1], new_lengths.cumsum(0))).int()
    t = times.float()[document]
    corruption = Corruption(tokens.masked_fill(corrupted, mask_token_id), corrupted, t, t, 1 / t)
    return Packed(tokens, cu_seqlens, int(new_lengths.max()), packed.row[source], packed.column[source]), corruption


def merge_masks(masked: Tensor, document: Tensor, merging: Tensor) -> tuple[Tensor, Tensor]:
    """Which of T positions stand for two, [T] bool, and which are left out for that, [T] bool.

    A masked position where `merging` is true takes in the next one, if that is masked and of the same document.
    """
    grown = masked & merging
    grown[:-1] &= masked[1:] & (document[1:] == document[:-1])
    grown[-1] = False
    return grown, torch.cat((grown.new_zeros(1), grown[:-1]))
