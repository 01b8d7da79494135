"""Canvases: the objective of models that write in canvases of C tokens (DiffusionGemma, arXiv:2608.00146).

An example is a prompt and a response, filled up with end-of-text to whole canvases. In a step one of its canvases x is
drawn. Each token of it becomes a uniform word (maybe the same) with the chance t, which gives z. The decoder is to say
every token of the canvas from z, from what stands before the canvas and, where the example is self-conditioned, from
its own words for z in a pass before; the encoder is to say the next token of prompt, response and fill.

loss = mean over i of -log p(x[i] | z, before, words)  +  mean over j of -log p(y[j + 1] | y[..j]),   y the example

Both means are over all tokens of a step, so sums and their numbers are apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm.data import Packed
from dllm.diffusion.corruption import SCHEDULES
from dllm.diffusion.objectives import LossSums
from dllm_kernels import linear_denoiser_statistics, linear_masked_cross_entropy, philox_uniform

_SLAB = 8192  # words


class CanvasTargets(NamedTuple):
    """A canvas of C tokens in each of R examples."""

    lengths: Tensor  # [R] int64, tokens of the examples
    start: Tensor  # [R] int64, tokens before the canvas
    clean: Tensor  # [R, C] int64
    noisy: Tensor  # [R, C] int64
    scored: Tensor  # [R, C] bool: all of it, or nothing where an example is cut off before its first canvas ends
    conditioned: Tensor | None  # [K] int64: the examples that are self-conditioned; None: none in any step
    normaliser: Tensor  # int64 scalar: tokens scored
    encoded: Tensor  # int64 scalar: tokens that the encoder is scored on


def draw_canvases(packed: Packed, slots: Tensor, step: int, seed: int, *, times: Tensor, length: int, vocab_size: int,
                  ends: Sequence[int], self_conditioning: float, schedule: str = "linear"
                  ) -> tuple[Tensor, CanvasTargets]:
    """A canvas in each of R chunks, each a row of its own. The draws are a function of seed, step and slot.

    Args:
        slots: [R] int64, of the rows in the step.
        times: [R] in (0, 1), of which `schedule` makes the chance of noise.
        length: C.
        ends: the tokens that end a text, of which the first one fills up a response.
        self_conditioning: the chance that an example is self-conditioned.
    Returns: (the examples [R, n] int64, padded on the right, and their targets). An example ends with the fill of the
        response that the canvas is of: of a conversation, one canvas of all answers is drawn.
    """
    uniform = philox_uniform(seed, slots.unsqueeze(1), step, torch.arange(length + 1))  # [R, C + 1, 2]
    noise, (which, coin) = uniform[:, :length], uniform[:, length].unbind(1)
    bounds = packed.cu_seqlens.tolist()
    parts = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
    drawn = [draw_canvas(packed.tokens[part], None if packed.trainable is None else packed.trainable[part], length,
                         ends, chance) for part, chance in zip(parts, which.tolist(), strict=True)]
    examples, starts, whole = zip(*drawn, strict=True)
    start, lengths = torch.tensor(starts), torch.tensor([len(example) for example in examples])
    input_ids = pad_sequence(examples, batch_first=True, padding_value=ends[0])
    places = (start.unsqueeze(1) + torch.arange(length)).clamp(max=input_ids.shape[1] - 1)
    clean = input_ids.gather(1, places)
    corrupted = noise[..., 0] < 1 - SCHEDULES[schedule].alpha(times.float()).unsqueeze(1)
    noisy = torch.where(corrupted, (noise[..., 1] * vocab_size).long(), clean)
    scored = torch.tensor(whole).unsqueeze(1).expand_as(clean).contiguous()
    conditioned = (coin < self_conditioning).nonzero()[:, 0] if self_conditioning else None
    return input_ids, CanvasTargets(lengths, start, clean, noisy, scored, conditioned, scored.sum(),
                                    (lengths - 1).sum())


def draw_canvas(tokens: Tensor, learnt: Tensor | None, length: int, ends: Sequence[int], uniform: float
                ) -> tuple[Tensor, int, bool]:
    """One of the canvases of a chunk's responses, the runs of tokens that are learnt.

    A response is filled up to whole canvases, unless the chunk cuts it off, which leaves the whole ones.

    Args:
        tokens, learnt: [n] int64 and bool; None: all.
        uniform: in [0, 1), chooses the canvas.
    Returns: (tokens up to the end of the response with its fill, start of the canvas, whether there is any canvas).
    """
    marks = torch.ones_like(tokens, dtype=torch.bool) if learnt is None else learnt
    edges = torch.cat((marks.new_zeros(1), marks, marks.new_zeros(1))).long().diff()
    responses = torch.stack(((edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]), 1).tolist()
    cut_off = responses[-1][1] == len(tokens) and int(tokens[-1]) not in ends
    counts = [-(-(end - begin) // length) for begin, end in responses]
    if cut_off:
        counts[-1] = (responses[-1][1] - responses[-1][0]) // length
    chosen = int(uniform * sum(counts))
    for (begin, end), count in zip(responses, counts, strict=True):
        if chosen < count:
            fill = max(0, begin + count * length - end)
            return torch.cat((tokens[:end], tokens.new_full((fill,), ends[0]))), begin + chosen * length, True
        chosen -= count
    return tokens, len(tokens), False


class MeanEmbedding(torch.autograd.Function):
    """softmax(z) @ weight, z = softcap * tanh(hidden @ weight.T / softcap), [M, D] of hidden [M, D] and weight [V, D],
    with softmax(z) a constant to the gradient. The probabilities [M, V] are never stored as a whole."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
        uniform = torch.zeros(len(hidden), 2, dtype=torch.float64, device=hidden.device)  # of a sample, not used
        found = linear_denoiser_statistics(hidden, weight, None, softcap=softcap, generator=uniform, soft=True)
        ctx.save_for_backward(hidden, weight, found.log_normaliser)
        ctx.softcap = softcap
        return found.soft

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None
        hidden, weight, log_normaliser = ctx.saved_tensors
        hidden, gradient, parts = hidden.float(), gradient.float(), []
        with torch.autocast(hidden.device.type, enabled=False):
            for words in weight.split(_SLAB):
                z = hidden @ words.float().T
                z = z if ctx.softcap is None else torch.tanh(z / ctx.softcap) * ctx.softcap
                parts.append(((z - log_normaliser.unsqueeze(1)).exp().T @ gradient).to(weight.dtype))
        return None, torch.cat(parts), None


def sum_canvas_losses(decoded: Tensor, encoded: Tensor, head_weight: Tensor, input_ids: Tensor, targets: CanvasTargets,
                      *, softcap: float | None = None) -> LossSums:
    """The sums of the losses of one micro-batch.

    Args:
        decoded: [R, C, D] hidden states of the canvases after the final norm. encoded: [R, n, D], of the examples.
        head_weight: [V, D].
        input_ids: [R, n], the examples.
        softcap: of the logits, see `dllm_kernels.linear_masked_cross_entropy`.
    """
    loss, each = linear_masked_cross_entropy(decoded, head_weight, targets.clean, targets.scored, softcap=softcap,
                                             reduction="sum", return_nll=True)
    last = (targets.lengths - 1).unsqueeze(1)
    followed = torch.arange(input_ids.shape[1], device=input_ids.device) < last
    encoder = linear_masked_cross_entropy(encoded, head_weight, input_ids.roll(-1, 1), followed, softcap=softcap,
                                          reduction="sum")
    return LossSums(loss, each.sum(), torch.zeros_like(loss), encoder=encoder)
