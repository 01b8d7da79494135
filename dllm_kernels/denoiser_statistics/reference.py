"""The statistics and the soft embedding in plain PyTorch: the definition, and the backends' oracle.

Chunks of rows whose fp32 logits have room in the workspace, multiplied a slab of words at a time, so that a head in
16 bits is never widened whole. fp64 inputs are computed in fp64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..chunks import slices_of_rows
from .settings import Inputs, Results

_SLAB = 8192  # words


def statistics(inputs: Inputs, uniform: Tensor, soft: bool) -> Results:
    """Of M positions; `uniform` [M] float64. The soft embedding multiplies the logits again."""
    found = [_statistics(_part(inputs, rows), uniform[rows])
             for rows in slices_of_rows(len(uniform), len(inputs.weight), uniform.device)]
    token, argmax, entropy, log_normaliser = map(torch.cat, zip(*found, strict=True))
    none = inputs.weight.new_empty(0)
    return Results(token, argmax, entropy, log_normaliser, soft_embedding(inputs, log_normaliser) if soft else none)


def _statistics(inputs: Inputs, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = torch.cat([logits for _, logits in _slabs(inputs)], 1)
    top, argmax = z.max(-1)
    below = z.sub_(top.unsqueeze(1))
    e = below.exp()
    total = e.sum(-1)
    entropy = total.log() - below.masked_fill_(e == 0, 0).mul_(e).sum(-1) / total  # 0 log 0 = 0
    cumulative = e.double().cumsum(-1)
    token = (cumulative <= uniform.unsqueeze(1) * cumulative[:, -1:]).sum(-1).clamp(max=z.shape[1] - 1)
    return token, argmax, entropy.float(), (top + total.log()).float()


def soft_embedding(inputs: Inputs, log_normaliser: Tensor) -> Tensor:
    """[M, D] in the dtype of the weight; `log_normaliser` [M] fp32."""
    soft = inputs.weight.new_empty(inputs.hidden.shape)
    for rows in slices_of_rows(len(soft), _SLAB, soft.device):
        total = mass = 0
        for words, z in _slabs(_part(inputs, rows)):
            p = z.sub_(log_normaliser[rows].unsqueeze(1)).exp_()
            total, mass = total + p @ words, mass + p.sum(-1, keepdim=True)
        soft[rows] = (total / mass).to(soft.dtype)  # mass is 1 up to the rounding of the log-normaliser
    return soft


def _slabs(inputs: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
    """Some words of the weight, and their z [M, words]."""
    dtype = torch.promote_types(torch.promote_types(inputs.hidden.dtype, inputs.weight.dtype), torch.float32)
    hidden = inputs.hidden.to(dtype)
    for words in inputs.weight.split(_SLAB):
        words = words.to(dtype)
        z = hidden @ words.T
        if inputs.softcap is not None:
            z = z.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
        yield words, z.div_(inputs.temperature.unsqueeze(1))


def _part(inputs: Inputs, rows: slice) -> Inputs:
    return inputs._replace(hidden=inputs.hidden[rows], temperature=inputs.temperature[rows])
