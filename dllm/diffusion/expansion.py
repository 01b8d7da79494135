"""Corruption for models whose gaps grow and shrink (DreamOn, arXiv:2602.01326): a gap is masked with another length.

A part of each document becomes the gap, with some delete tokens (end-of-text) after it. Its tokens are masked with a
chance, the delete tokens always. Of two masked tokens in a row, with a chance the second is left out and the first is
to say `expand`: at inference, one masked position that becomes two.
"""

import torch
from torch import Tensor

from dllm.data import Packed
from dllm.diffusion.corruption import Corruption
from dllm_kernels import philox_uniform

MERGE_CHANCE = 0.5
MAX_DELETE = 64  # delete tokens of a gap
_OF_DOCUMENTS = 2**24  # positions of draws from here on are those of documents, beyond all columns


def make_gaps(packed: Packed, first_slot: int, step: int, seed: int, longest: int, *, delete: int, expand: int,
              mask: int, times: Tensor) -> tuple[Packed, Corruption]:
    """Give each document of some rows a gap, which never holds its last token if that is end-of-text.

    DreamOn's gaps are whole lines, these any tokens. DreamOn adds up to 64 delete tokens to the shortest gap, this at
    most as many as the gap has tokens, so that gaps with too few masks are as common as those with too many.

    Args:
        first_slot: of the rows in the step; draws are a function of seed, step, slot and column.
        longest: tokens of a document with its delete tokens.
        times: [S], the chance of each document's gap.
    Returns: what the documents are to be, of other lengths now (`row` and `column` are those of the tokens that they
        come from), and their corruption.
    """
    starts, lengths = packed.cu_seqlens[:-1].long(), packed.cu_seqlens.diff().long()
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.arange(len(document)) - starts[document]
    slot = packed.row + first_slot
    uniform = philox_uniform(seed, slot, step, packed.column)
    draws = philox_uniform(seed, slot[starts].unsqueeze(1), step, _OF_DOCUMENTS + 4 * packed.column[starts].unsqueeze(1)
                           + torch.arange(4))[..., 0]

    fillable = lengths - (packed.tokens[packed.cu_seqlens[1:].long() - 1] == delete).long()
    ends = (draws[:, :2] * fillable.unsqueeze(1)).long().sort(1).values
    last = torch.minimum(ends[:, 1], fillable - 1)  # -1, and so no gap, where nothing can be filled
    inside = (place >= ends[:, 0][document]) & (place <= last[document])
    masked = inside & (uniform[:, 0] < times[document])
    text = torch.bincount(document[inside], minlength=len(lengths))
    deletes = (draws[:, 2] * (text.clamp(max=MAX_DELETE).minimum(longest - lengths) + 1)).long()

    share = (torch.bincount(document[masked], minlength=len(lengths)) + deletes) / (text + deletes).clamp(min=1)
    chance = MERGE_CHANCE * torch.where(draws[:, 3] < 0.5, 1, 1 - share)
    merging, left_out = merge_masks(masked, document, uniform[:, 1] < chance[document])

    counts = (~left_out).long() + torch.where(inside & (place == last[document]), deletes[document], 0)
    source = torch.repeat_interleave(torch.arange(len(counts)), counts)
    index = torch.arange(len(source)) - (counts.cumsum(0) - counts)[source]
    deleted = index >= (~left_out)[source].long()  # those of a gap come after its last token
    tokens = packed.tokens.masked_fill(merging, expand)[source].masked_fill(deleted, delete)
    corrupted = masked[source] | deleted
    document = document[source]
    new_lengths = torch.bincount(document, minlength=len(lengths))
    cu_seqlens = torch.cat((starts[:1], new_lengths.cumsum(0))).int()
    t = times.float()[document]
    return (Packed(tokens, cu_seqlens, int(new_lengths.max()), packed.row[source], packed.column[source]),
            Corruption(tokens.masked_fill(corrupted, mask), corrupted, t, t, 1 / t))


def merge_masks(masked: Tensor, document: Tensor, merging: Tensor) -> tuple[Tensor, Tensor]:
    """Which of T tokens are to say `expand`, [T] bool, and which are left out for that, [T] bool.

    A masked token where `merging` is true takes in the next one, if that is masked and of the same document.
    """
    merging = masked & merging
    merging[:-1] &= masked[1:] & (document[1:] == document[:-1])
    merging[-1] = False
    return merging, torch.cat((merging.new_zeros(1), merging[:-1]))
