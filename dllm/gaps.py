"""Corruption for models whose gaps grow and shrink (DreamOn, arXiv:2602.01326): a gap is masked with another length.

A part of each document becomes the gap, with some delete tokens (end-of-text) after it. Its tokens are masked with a
chance, the delete tokens always. Of two masked tokens in a row, with a chance the second is left out and the first is
to say `expand`: at inference, one masked position that becomes two.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dllm.corruption import Corruption
from dllm.data import Packed
from dllm_kernels import philox_uniform

MERGE_CHANCE = 0.5
MAX_DELETE = 64  # delete tokens of a gap
_OF_DOCUMENTS = 2**24  # positions of draws from here on are those of documents, beyond all columns


class Gap(NamedTuple):
    """A gap of n tokens, delete tokens included, as it is masked."""

    noisy: Tensor  # [n] int64
    labels: Tensor  # [n] int64: what the masked ones are to say
    kept: Tensor  # [n] bool: the others are left out


def mask_gap(tokens: Tensor, delete: int, expand: int, mask: int, *, ratio: float, uniform: Tensor,
             merge_uniform: Tensor, static: bool) -> Gap:
    """Mask a gap, and merge some of its masked tokens.

    Args:
        tokens: [n] int64, the text's, then delete tokens.
        ratio: chance that a token of the text is masked.
        uniform: [n] in [0, 1); a token of the text is masked where it is below the ratio.
        merge_uniform: [n - 1] in [0, 1), for each token and the next.
        static: whether the chance of merging is MERGE_CHANCE, or that times the share of the gap that is not masked.
    """
    masked = (uniform < ratio) | (tokens == delete)
    chance = MERGE_CHANCE * (1.0 if static else 1 - masked.float().mean())
    merged = masked[:-1] & masked[1:] & (merge_uniform < chance) & ((tokens == delete).cumsum(0)[:-1] == 0)
    labels = tokens.clone()
    labels[:-1][merged] = expand
    kept = torch.ones_like(masked)
    kept[1:] = ~merged
    return Gap(tokens.masked_fill(masked, mask), labels, kept)


def make_gaps(packed: Packed, first_slot: int, step: int, seed: int, longest: int, *, delete: int, expand: int,
              mask: int, times: Tensor) -> tuple[Packed, Corruption]:
    """Give each document of some rows a gap, which never holds its last token if that is end-of-text.

    DreamOn adds up to 64 delete tokens to the shortest gap, this at most as many as the gap has tokens, so that gaps
    with too few masks are as common as those with too many.

    Args:
        first_slot: of the rows in the step; draws are a function of seed, step, slot and column.
        longest: tokens of a document with its delete tokens.
        times: [S], the chance of each document's gap.
    Returns: what the documents are to be, of other lengths now, and their corruption. Its weights are 1 - t, and for
        delete tokens divided by their number in the gap, so that a tail of them counts as one token.
    """
    noisy, labels, weights, lengths = [], [], [], []
    for (start, end), time in zip(packed.cu_seqlens.unfold(0, 2, 1).tolist(), times.tolist(), strict=True):
        tokens, slot, column = packed.tokens[start:end], packed.row[start:end] + first_slot, packed.column[start:end]
        draws = philox_uniform(seed, slot[:1], step, _OF_DOCUMENTS + 4 * column[:1] + torch.arange(4))[:, 0]
        fillable = end - start - int(tokens[-1] == delete)
        first, last = sorted((draws[:2] * fillable).long().tolist()) if fillable else (0, -1)
        before, text, after = tokens.split([first, last + 1 - first, end - start - last - 1])
        deletes = int(draws[2] * (min(longest - (end - start), MAX_DELETE, len(text)) + 1))
        uniform = philox_uniform(seed, slot, step, column)[first:last + 1]
        uniform = torch.cat((uniform, torch.ones(deletes, 2)))
        gap = mask_gap(torch.cat((text, torch.full((deletes,), delete))), delete, expand, mask, ratio=time,
                       uniform=uniform[:, 0], merge_uniform=uniform[:-1, 1], static=bool(draws[3] < 0.5))
        weight = torch.full((len(gap.noisy),), 1 - time)
        weight[len(text):] /= max(deletes, 1)
        noisy += [before, gap.noisy[gap.kept], after]
        labels += [before, gap.labels[gap.kept], after]
        weights += [torch.zeros(len(before)), weight[gap.kept], torch.zeros(len(after))]
        lengths.append(len(before) + int(gap.kept.sum()) + len(after))
    noisy = torch.cat(noisy)
    t = torch.repeat_interleave(times.float(), torch.tensor(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return (packed._replace(tokens=torch.cat(labels), cu_seqlens=ends, max_seqlen=max(lengths)),
            Corruption(noisy, noisy == mask, t, t, torch.cat(weights)))
