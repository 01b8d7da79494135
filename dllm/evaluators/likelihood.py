"""Prediction of held-out text by a masked diffusion model: a bound on its perplexity, accuracy at fixed shares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm.config.fields import check_kind, settings_of
from dllm.data import Document
from dllm.diffusion.uniform import Noise, NoiseTargets, add_noise, noise_losses
from dllm.errors import UserError
from dllm.evaluators.held_out import HeldOutSettings, Window, corrupt_share, cut_windows, ratio_with_error
from dllm.generation.canvas import block_length_of
from dllm.generation.checks import find_mask_token
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.inputs import read_mask
from dllm.model.diffusion_gemma import DiffusionGemma
from dllm.model.layouts import Packed, Padded, TwoCopies
from dllm.model.tokenizer import begin_text
from dllm.model.transformer import Transformer
from dllm_kernels import linear_masked_cross_entropy, linear_token_scores


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityResult:
    """An upper bound on the negative log-likelihood of the held-out windows, given the first token of each; that
    itself, where it is exact."""

    perplexity_bound: float  # exp of nats_per_token
    nats_per_token: float
    nats_per_token_stderr: float | None  # across documents; None for a single document
    monte_carlo_stderr: float | None  # of nats_per_token, across corruptions; None for a single sample
    bits_per_byte: float
    bits_per_byte_stderr: float | None  # across documents
    documents: int
    windows: int
    tokens: int  # scored
    bytes: int  # of the text of these tokens
    samples: int  # corrupted copies of each window; 0 where it is exact
    exact: bool = False  # no bound: the encoder of the model predicts each token from those before it


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedResult:
    """Prediction of the corrupted tokens at a fixed share of corrupted positions."""

    share: float
    accuracy: float  # share of the corrupted positions where the most likely token is right
    accuracy_stderr: float | None  # across documents; None for a single document
    nats: float  # mean negative log-likelihood of a corrupted token
    nats_stderr: float | None
    positions: int  # corrupted positions scored


def perplexity_bound(model: Transformer, tokenizer, documents: Sequence[Document],
                     settings: HeldOutSettings | None = None) -> PerplexityResult:
    """Monte Carlo estimate of the model's bound on -log p(window | its first token), per token and per byte.

    The bound is the ELBO with an exact integral over time, which is the same for every schedule: with n uniform on 1..L
    and S a uniform set of n of L positions, -log p <= E[L / n * sum over S of -log p(token | visible tokens)]
    (arXiv:2110.02037, arXiv:2406.03736; also LLaDA's evaluation, arXiv:2502.09992). It varies less than drawing a time
    and corrupting each position independently. n is stratified twice: evenly over the windows in every sample, and
    evenly over the samples of every window. For a block-causal model the bound is the sum over blocks, each given the
    blocks before it (BD3-LM, arXiv:2503.09573); L, n and S then belong to a block, counted from the window's beginning.
    For a model of uniform words it is that of diffusion/uniform.py, at one time for each window and sample, spread
    as n is.

    The encoder of a model that renoises (DiffusionGemma) gives the likelihood itself, after the token that begins its
    texts.

    Raises: UserError if there is no text, or windows are longer than the model's positions.
    """
    settings = settings or HeldOutSettings()
    windows = cut_windows(tokenizer, documents, settings)
    exact = model.config.canvas_length is not None
    if exact:
        nats = exact_nats(model, tokenizer, windows, settings.batch_tokens)
    else:
        nats = bound_windows(model, windows, settings)
    per_window, of_document = nats.mean(0).tolist(), [window.document for window in windows]
    lengths, sizes = [window.scored for window in windows], [window.bytes for window in windows]
    per_token, per_token_error = ratio_with_error(per_window, lengths, of_document)
    per_byte, per_byte_error = ratio_with_error(per_window, sizes, of_document)
    monte_carlo = None
    if len(nats) > 1:
        monte_carlo = float((nats.sum(1) / sum(lengths)).std() / math.sqrt(settings.samples))
    return PerplexityResult(
        perplexity_bound=math.exp(per_token), nats_per_token=per_token, nats_per_token_stderr=per_token_error,
        monte_carlo_stderr=monte_carlo,
        bits_per_byte=per_byte / math.log(2),
        bits_per_byte_stderr=None if per_byte_error is None else per_byte_error / math.log(2),
        documents=len(set(of_document)), windows=len(windows), tokens=sum(lengths), bytes=sum(sizes),
        samples=0 if exact else settings.samples, exact=exact)


def exact_nats(model: DiffusionGemma, tokenizer, windows: Sequence[Window], batch_tokens: int) -> Tensor:
    """[1, windows] float64: -log p(window | its first token), by the encoder."""
    begun = [replace(window, tokens=begin_text(tokenizer, window.tokens)) for window in windows]
    scored = [torch.arange(len(now.tokens), device="cpu") >= len(now.tokens) - window.scored
              for now, window in zip(begun, windows, strict=True)]
    results = score_positions(model, begun, scored, batch_tokens, exact=True)
    return torch.stack([nats.sum() for nats, _ in results]).unsqueeze(0)


def bound_windows(model: Transformer, windows: Sequence[Window], settings: HeldOutSettings) -> Tensor:
    """[samples, windows] float64: bounds on -log p(window | its first token), each from one corruption."""
    generator = torch.Generator().manual_seed(settings.seed)
    parts = [(i, places) for i, window in enumerate(windows)
             for places in split_by_block(model, torch.arange(1, len(window.tokens), device="cpu"))]
    offset = torch.rand((), generator=generator, dtype=torch.float64, device="cpu")
    strata = (torch.randperm(len(parts), generator=generator, device="cpu") + offset) / len(parts)
    nats = torch.zeros(settings.samples, len(windows), dtype=torch.float64, device="cpu")
    for sample in range(settings.samples):
        times = ((strata + sample / settings.samples) % 1).tolist()
        if model.config.uniform_share is not None:
            places = [places for _, places in parts]
            uniform = [torch.rand(len(window.tokens), 2, generator=generator, dtype=torch.double, device="cpu")
                       for window in windows]
            nats[sample] = bound_noise(model, windows, places, times, uniform, settings.batch_tokens)
            continue
        weights = [torch.zeros(len(window.tokens), dtype=torch.float64, device="cpu") for window in windows]
        for (i, places), t in zip(parts, times, strict=True):
            corrupt_some(weights[i], places, t, generator)
        nats[sample] = bound_once(model, windows, weights, settings.batch_tokens)
    return nats


def check_masked(model: Transformer) -> None:
    """Refuse a model that predicts no masks: that was taught to insert alone, or by uniform words alone, or that
    renoises."""
    if model.config.canvas_length is not None:
        raise UserError("this model (DiffusionGemma) fills no masks, so it has no bound of masked diffusion, nor "
                        "accuracies of masked tokens; its encoder gives the likelihood itself: dllm eval perplexity, "
                        "or model(ids).logits")
    if model.config.edit_heads == "insert":
        raise UserError("this model writes by insertions and predicts no masks, so it has no bound of masked "
                        "diffusion; in Python, model.edit_bound(ids) gives the one of insertions")
    if model.config.uniform_share == 1:
        raise UserError("this model is trained on uniform words without masks, and nothing here tells of masks; "
                        "dllm eval perplexity gives its own bound")


class Likelihood(NamedTuple):
    """Upper bounds on -log p(scored tokens | the others) of B sequences, by Monte Carlo."""

    nats: Tensor  # [B] float64
    stderr: Tensor  # [B] float64: of nats, across corruptions; a little too large, because counts are stratified
    tokens: Tensor  # [B] int64: scored tokens

    @property
    def perplexity(self) -> Tensor:
        """[B] float64: exp of the nats per token."""
        return (self.nats / self.tokens).exp()


def bound_likelihood(model: Transformer, input_ids: Tensor, attention_mask: Tensor | None = None, *,
                     scored: Tensor | None = None, samples: int = 128, seed: int = 0,
                     batch_tokens: int = 16384) -> Likelihood:
    """The bound of `perplexity_bound` for given sequences; LLaDA and Dream score the answers of multiple choices so.

    Each of `samples` copies has n of the scored tokens (of each block, if the model is block-causal) corrupted, with n
    spread evenly over 1 to all of them.

    Args:
        input_ids: [B, L] or [L] int64.
        attention_mask: [B, L], nonzero where there is a token; padding may be on either side.
        scored: [B, L] bool, or [L] for one sequence: the tokens whose probability given all others is bounded (False
            for a prompt); the default is all tokens, except the first where the model's logits are shifted.
        samples: corrupted copies of each sequence.
        batch_tokens: positions of one forward pass; only speed and memory depend on it.
    Raises: UserError if nothing of a sequence is scored, or the first token of one whose model's logits are shifted.
    """
    input_ids = input_ids.reshape(1, -1) if input_ids.ndim == 1 else input_ids
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    first = real & (real.cumsum(1) == 1)
    shifted = model.config.shift_logits
    if scored is None:
        scored = real & ~first if shifted else real
    else:
        scored = read_mask(scored, input_ids, "input_ids", "scored", "where a token counts, else zero")
        scored = scored.to(real.device) & real
    wanted = settings_of(HeldOutSettings)
    for name, value in (("samples", samples), ("seed", seed), ("batch_tokens", batch_tokens)):
        check_kind(name, value, wanted[name])
    if samples < 2:
        raise UserError(f"samples must be at least 2, for a standard error, not {samples}")
    if not scored.any(1).all():
        raise UserError(f"sequence {int((~scored.any(1)).nonzero()[0])} has no token to score; mark some in `scored`")
    if shifted and (scored & first).any():
        raise UserError("a model with shifted logits cannot predict the first token; leave it out of `scored`")
    windows, weights, noises = [], [], []
    for tokens, visible, wanted in zip(input_ids.cpu(), real.cpu(), scored.cpu(), strict=True):
        generator = torch.Generator().manual_seed(int(seed))  # anew, so that rows do not depend on others
        parts = split_by_block(model, wanted[visible].nonzero().flatten())
        offsets = [float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu")) for _ in parts]
        for sample in range(samples):
            windows.append(Window(tokens[visible], len(windows), 0))
            if model.config.uniform_share is not None:
                uniform = torch.rand(len(windows[-1].tokens), 2, generator=generator, dtype=torch.double, device="cpu")
                noises.append((parts[0], (sample + offsets[0]) / samples, uniform))
                continue
            weights.append(torch.zeros(len(windows[-1].tokens), dtype=torch.float64, device="cpu"))
            for places, offset in zip(parts, offsets, strict=True):
                corrupt_some(weights[-1], places, (sample + offset) / samples, generator)
    drawn = bound_noise(model, windows, *zip(*noises, strict=True), batch_tokens) if noises else bound_once(
        model, windows, weights, batch_tokens)
    drawn = drawn.view(len(input_ids), samples)
    sizes = scored.sum(1).cpu()
    return Likelihood(drawn.mean(1), drawn.std(1) / math.sqrt(samples), sizes)


def split_by_block(model: Transformer, places: Tensor) -> list[Tensor]:
    """Ascending places [N] of a window, divided by block if the model is block-causal."""
    if not model.config.block_causal:
        return [places]
    _, counts = (places // block_length_of(model)).unique_consecutive(return_counts=True)
    return list(places.split(counts.tolist()))


def corrupt_some(weights: Tensor, places: Tensor, time: float, generator: torch.Generator) -> None:
    """Draw n of the N places, int(time * N) + 1 for a time in [0, 1), and give each the weight N / n."""
    count = int(time * len(places)) + 1
    weights[places[torch.randperm(len(places), generator=generator, device="cpu")[:count]]] = len(places) / count


def bound_once(model: Transformer, windows: Sequence[Window], weights: Sequence[Tensor], batch_tokens: int) -> Tensor:
    """[windows] float64: the sum of negative log-likelihoods times weights [L], over positions of weight above 0."""
    results = score_positions(model, windows, [weight > 0 for weight in weights], batch_tokens)
    return torch.stack([(nats * weight[weight > 0]).sum() for (nats, _), weight in zip(results, weights, strict=True)])


def masked_accuracy(model: Transformer, tokenizer, documents: Sequence[Document],
                    settings: HeldOutSettings | None = None) -> tuple[MaskedResult, ...]:
    """Accuracy and negative log-likelihood at each of `settings.shares`, one result per share.

    A block-causal model sees the blocks before that of a corrupted token uncorrupted.
    Raises: as `perplexity_bound`.
    """
    check_masked(model)
    settings = settings or HeldOutSettings()
    windows = cut_windows(tokenizer, documents, settings)
    results = []
    for share in settings.shares:
        corrupted = corrupt_share(windows, share, settings.seed)
        scored = score_positions(model, windows, corrupted, settings.batch_tokens, predict=True)
        right = [predicted == window.tokens[where]
                 for window, where, (_, predicted) in zip(windows, corrupted, scored, strict=True)]
        results.append(summarize_share(share, windows, right, [nats for nats, _ in scored]))
    return tuple(results)


def summarize_share(share: float, windows: Sequence[Window], right: Sequence[Tensor],
                    nats: Sequence[Tensor]) -> MaskedResult:
    """The result for a share. right: bool, nats: float64, both per corrupted position of each window."""
    sizes, of_document = [len(hits) for hits in right], [window.document for window in windows]
    accuracy, accuracy_error = ratio_with_error([float(hits.sum()) for hits in right], sizes, of_document)
    mean, error = ratio_with_error([float(values.sum()) for values in nats], sizes, of_document)
    return MaskedResult(share=share, accuracy=accuracy, accuracy_stderr=accuracy_error, nats=mean, nats_stderr=error,
                        positions=sum(sizes))


@torch.no_grad()
def score_positions(model: Transformer, windows: Sequence[Window], corrupted: Sequence[Tensor], batch_tokens: int,
                    *, predict: bool = False, exact: bool = False) -> list[tuple[Tensor, Tensor | None]]:
    """Per window, at its n corrupted positions in order: negative log-likelihoods [n] float64 and, with `predict`, the
    most likely tokens [n] int64. The head is multiplied at these positions alone.

    A block-causal model sees a corrupted block as it is, and the blocks before it uncorrupted, as in training.

    exact: whether each is predicted from the tokens before it, by the encoder of a model that renoises.
    """
    mask_token_id = None
    if not exact:
        check_masked(model)
        mask_token_id = find_mask_token(model, MDMGenerationConfig())
    check_lengths(model, windows)
    results: list[tuple[Tensor, Tensor | None] | None] = [None] * len(windows)
    for batch in batches_of_similar_length([len(window.tokens) for window in windows], batch_tokens):
        tokens, where = [windows[i].tokens for i in batch], [corrupted[i] for i in batch]
        lengths = torch.tensor([len(row) for row in tokens], device="cpu")
        sizes = [int(row.sum()) for row in where]
        if model.config.block_causal:
            tokens, where = (torch.cat(rows).unsqueeze(0).to(model.device) for rows in (tokens, where))
            ends = F.pad(lengths.cumsum(0), (1, 0)).int().to(model.device)
            layout = TwoCopies(tokens, block_length_of(model), Packed(ends, int(lengths.max())),
                               model.config.causal_blocks, model.config.causal_context)
        else:
            tokens, where = (pad_sequence(rows, batch_first=True).to(model.device) for rows in (tokens, where))
            real = torch.arange(tokens.shape[1], device="cpu") < lengths.unsqueeze(1)
            layout = Padded(None if real.all() else real.to(model.device), block_length=1 if exact else None)
        hidden = model.hidden_states(tokens if exact else tokens.masked_fill(where, mask_token_id), layout)
        rows, places = where.nonzero(as_tuple=True)
        if model.config.shift_logits or exact:
            places = places - 1  # padding is on the right, and the first token is not corrupted
        hidden, targets = hidden[rows, places], tokens[where]
        scored = torch.ones_like(targets, dtype=torch.bool)
        nats = linear_masked_cross_entropy(hidden, model.head_weight, targets, scored, count=len(targets),
                                           bias=model.head_bias, softcap=model.config.logit_softcap,
                                           reduction="none").double().cpu()
        best = [None] * len(batch)
        if predict:
            everywhere = torch.arange(len(hidden), device=model.device)
            best = linear_token_scores(hidden.unsqueeze(0), model.head_weight, everywhere,
                                       bias=model.head_bias).token.cpu().split(sizes)
        for i, values, tokens_of in zip(batch, nats.split(sizes), best, strict=True):
            results[i] = values, tokens_of
    return results


def check_lengths(model: Transformer, windows: Sequence[Window]) -> None:
    longest = max(len(window.tokens) for window in windows)
    if longest > model.config.max_position_embeddings:
        raise UserError(f"windows of {longest} tokens, but the model has {model.config.max_position_embeddings} "
                        "positions; shorten them, or lower max_seq_len")


@torch.no_grad()
def bound_noise(model: Transformer, windows: Sequence[Window], places: Sequence[Tensor], times: Sequence[float],
                uniform: Sequence[Tensor], batch_tokens: int) -> Tensor:
    """[windows] float64: for a model of uniform words, the bound at one time for each window, summed over its scored
    places; the others stay clean.

    t = sin(pi u / 2)**2 of the u given: near 0 and 1, where the loss is large and rare, more times are drawn.

    places: [N] int64 of each. times: u, in [0, 1). uniform: [L, 2] of each.
    """
    check_lengths(model, windows)
    noise, result = Noise.of(model.config), torch.zeros(len(windows), dtype=torch.float64, device="cpu")
    t = torch.sin(math.pi / 2 * torch.tensor(times, dtype=torch.float64, device="cpu")).square().clamp(1e-6, 1 - 1e-6)
    for batch in batches_of_similar_length([len(window.tokens) for window in windows], batch_tokens):
        tokens = torch.cat([windows[i].tokens for i in batch])
        lengths = torch.tensor([len(windows[i].tokens) for i in batch], device="cpu")
        scored = torch.cat([torch.zeros(len(windows[i].tokens), dtype=torch.bool, device="cpu").index_fill(
            0, places[i], True) for i in batch])
        ends = F.pad(lengths.cumsum(0), (1, 0)).int()
        noisy, targets = add_noise(noise, tokens, ends, t[batch], torch.cat([uniform[i] for i in batch]),
                                   shift=model.config.shift_logits, trainable=scored)
        hidden = model.hidden_states(noisy.unsqueeze(0).to(model.device), Packed(ends.to(model.device),
                                                                                 int(lengths.max())))
        targets = NoiseTargets(*(x.to(model.device) if isinstance(x, Tensor) else x for x in targets))
        losses = noise_losses(hidden, model.head_weight, targets)[1].double().cpu()
        window = torch.repeat_interleave(torch.tensor(batch), torch.tensor([len(places[i]) for i in batch]))
        result.index_add_(0, window, losses)
    return result * math.pi * (t * (1 - t)).sqrt()


def batches_of_similar_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices grouped, longest first, so that rows * longest <= batch_tokens (one row at least)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
