"""A bound on the likelihood of a text under a model that writes it by insertions from nothing (Edit Flows).

With s = -log(1 - kappa), by which a token is there with the chance 1 - exp(-s), and E the tokens still missing,

    bound = integral over s of E[ sum of the rates r  -  sum over E of (1 + log r[place] + log Q[place](token)) ]

is the divergence of the path to the text from the model's paths, so it bounds -log p of the text as s grows (the
paper's appendix; it does not depend on the schedule). A model without time as an input still has small rates on a
complete text, whose integral grows with s without end: so it is cut where a share `cut` of the text is missing. Up to
there it bounds the divergence from the model of the text with that share left out, and that is no bound of masked
diffusion, nor to be put beside one.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.config.fields import require
from dllm.data import Packed
from dllm.diffusion.edits import INSERT, Columns, log_softplus, make_edits
from dllm.errors import UserError
from dllm.generation.inputs import read_mask, read_prompts
from dllm.model import layouts
from dllm.model.transformer import Transformer
from dllm_kernels import linear_masked_cross_entropy


class EditLikelihood(NamedTuple):
    """Bounds of B texts, by Monte Carlo, up to the cut."""

    nats: Tensor  # [B] float64
    stderr: Tensor  # [B] float64: of nats, across the samples; too large, because these are stratified
    tokens: Tensor  # [B] int64: tokens that are written
    cut: float  # share of the tokens that is missing where the integral ends


@torch.no_grad()
def bound_edits(model: Transformer, input_ids: Any, attention_mask: Any = None, *, scored: Any = None,
                samples: int = 64, cut: float = 1e-3, seed: int = 0) -> EditLikelihood:
    """The bound for given texts.

    Args:
        input_ids, attention_mask: [B, L] or [L]; see `inputs.read_prompts`.
        scored: [B, L], one where a token is written, zero where it is given; None: all but the first of each row.
        samples: of s for each text, evenly spread.
        cut: see above.
    Raises: UserError if the model does not insert alone, or a text has nothing to write or its first token not given.
    """
    if model.config.edit_heads != "insert":
        raise UserError("a bound of insertions needs a model that inserts alone, from an empty source; train one by "
                        "train.objective=edit, or take perplexity_bound for a masked model")
    require("samples", samples, samples >= 2, "at least 2, for a standard error")
    require("cut", cut, 0 < cut < 1, "above 0 and below 1")
    ids, mask = read_prompts(model, input_ids, attention_mask, name="input_ids")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    first = real & (real.cumsum(1) == 1)
    written = real & ~first if scored is None else read_mask(
        scored, ids, "input_ids", "scored", "where a token is written and zero where it is given").to(ids.device) & real
    if not written.any(1).all() or (written & first).any():
        raise UserError("each text needs a token to write, and a given one before it")
    end = -math.log(cut)
    nats = [bound_text(model, row[here].cpu(), new[here].cpu(), samples, end, seed)
            for row, here, new in zip(ids, real, written, strict=True)]
    each = torch.stack(nats)
    return EditLikelihood(each.mean(1), each.std(1) / math.sqrt(samples), written.sum(1).cpu(), cut)


def bound_text(model: Transformer, tokens: Tensor, written: Tensor, samples: int, end: float, seed: int) -> Tensor:
    """[samples] float64, estimates for one text [L]; its samples are the documents of one packed row."""
    generator, count = torch.Generator().manual_seed(seed), len(tokens)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    s = (torch.arange(samples) + offset) / samples * end
    document = torch.arange(samples).repeat_interleave(count)
    here = torch.rand(samples, count, generator=generator, dtype=torch.float64) < -torch.expm1(-s).unsqueeze(1)
    missing = (written & ~here).flatten()
    text = Packed(tokens.repeat(samples), (torch.arange(samples + 1) * count).int(), count, document,
                  torch.arange(count).repeat(samples))
    columns = Columns(text.tokens.masked_fill(written.repeat(samples), -1), text.tokens, written.repeat(samples),
                      document)
    # The linear schedule's weight at time 1 is 1, so every rate and every edit weighs 1.
    noisy, targets = make_edits(columns, ~missing, torch.ones(len(missing)), torch.ones(samples), "linear", text,
                                inserts_only=True, shift=model.config.shift_logits)
    device = model.device
    hidden = model.hidden_states(noisy.tokens.unsqueeze(0).to(device), layouts.Packed(
        noisy.cu_seqlens.to(device), noisy.max_seqlen))[0]
    raw, rows = model.rate_head(hidden).float()[:, INSERT], targets.rows.to(device)
    _, nll = linear_masked_cross_entropy(hidden[rows], model.insert_head.weight, targets.tokens.to(device),
                                         torch.ones(len(rows), dtype=torch.bool, device=device), count=len(rows),
                                         reduction="sum", return_nll=True)
    lengths = noisy.cu_seqlens.diff().long()
    owner = torch.repeat_interleave(torch.arange(samples), lengths)
    rates = (F.softplus(raw).cpu() * targets.rate_weights[:, INSERT]).double()
    edits = (nll - 1 - log_softplus(raw[rows])).cpu().double()
    return end * torch.zeros(samples, dtype=torch.float64).index_add(0, owner, rates).index_add(
        0, owner[targets.rows], edits)
