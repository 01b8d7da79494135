"""Scorers: how a strategy's question about some positions of the canvas is answered by the model.

Each runs the model on the rows that are asked about, computes the last layer at the wanted positions alone, and
multiplies the head there. They differ in what they keep between denoising steps: `HeadScorer` nothing, `CachedScorer`
the finished blocks of a block-causal model (exact), `StaleScorer` what is outside the block (Fast-dLLM; approximate).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.diffusion.edits import log_softplus
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.editing import EditedText
from dllm.generation.graphs import GraphedForward
from dllm.generation.steps import Prediction, Step, Update
from dllm.model.cache import KeyValueCache
from dllm.model.layouts import Cached, Padded
from dllm.model.transformer import Transformer
from dllm_kernels import (
    Scores,
    Unmasked,
    filter_logits,
    linear_token_scores,
    linear_topk_unmask,
    slices_of_rows,
    token_scores,
    topk_unmask,
)


@dataclass(frozen=True, slots=True)
class Queries:
    """Wanted positions of a canvas [B, L], compacted to [R, Q]: the R rows that want any, padded to the longest, Q.

    Nothing here waits for a GPU, because the counts are given.
    """

    numbers: Tensor  # [R] int64 on the CPU: the rows
    rows: Tensor  # the same on the device
    index: Tensor  # [R, Q] int64: the wanted positions of each row in their order, then others of the row
    valid: Tensor  # [R, Q] bool: which of them are wanted
    shape: torch.Size  # [B, L]

    @classmethod
    def of(cls, wanted: Tensor, numbers: Tensor, counts: Tensor) -> "Queries":
        """wanted [B, L] bool; numbers [R] of the rows that want any, counts [B] of how many each does, on the CPU."""
        rows, counts = numbers.to(wanted.device, non_blocking=True), counts[numbers]
        most = int(counts.max()) if len(counts) else 0
        index = wanted[rows].byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        counts = counts.to(wanted.device, non_blocking=True)
        valid = torch.arange(most, device=wanted.device) < counts.unsqueeze(1)
        return cls(numbers, rows, index, valid, wanted.shape)

    def place(self, onto: Tensor | None, values: Tensor) -> Tensor:
        """A copy of `onto` [B, L] (None: all -inf) with values [R, Q] where they are wanted."""
        if onto is None:
            onto = torch.full(self.shape, -torch.inf, dtype=torch.float32, device=values.device)
        mine = onto[self.rows]
        mine = mine.scatter(1, self.index, torch.where(self.valid, values, mine.gather(1, self.index)))
        return onto.index_copy(0, self.rows, mine)


class HeadScorer:
    """Computes the whole canvas in every step."""

    def __init__(self, model: Transformer, config: MDMGenerationConfig, mask_token_id: int, key_mask: Tensor | None,
                 prompt: Tensor):
        self.model, self.mask_token_id, self.key_mask = model, mask_token_id, key_mask
        self.cfg_scale, self.prompt = config.cfg_scale, prompt  # [B, L] bool, what guidance does without
        self.copies = 2 if config.cfg_scale > 0 else 1
        self.position_ids = Padded(key_mask).number(prompt)
        self.source = Padded().number(prompt)
        if model.config.shift_logits:
            self.source = previous_token(self.source, key_mask)
        self.sampling = {"temperature": config.temperature, "top_k": config.top_k or None, "top_p": config.top_p}
        self.selection_temperature = config.alg_temp
        self.predicted = None  # [B, L, D], what the last steps have predicted, for self-conditioning
        if model.config.self_conditioning:
            self.predicted = model.head_weight.new_zeros(*prompt.shape, model.config.hidden_size)
        self.forward = model.hidden_states
        if config.cuda_graphs:
            model.graphs = self.forward = model.graphs or GraphedForward(model)
        self.forwards = self.row_forwards = 0
        # What the last step commits, [B] int64 on the CPU, where that is known before it is computed.
        self.committed: Tensor | None = None

    def at(self, step: Step) -> "HeadScorer":
        self.step = step
        return self

    def unmask(self, k: Tensor, confidence: str, *, raw: bool = False, threshold: float | None = None) -> Update:
        step = self.step
        chosen = ((k > 0) & (step.left > 0)).nonzero().squeeze(1)  # on the CPU, as k is: no GPU is waited for
        if threshold is None:
            self.committed = torch.minimum(k, step.left)
        asked = Queries.of(step.masked, chosen, step.left)
        hidden = self._hidden(asked)
        uniform = None if step.uniform is None else step.uniform[asked.rows.unsqueeze(1), asked.index]
        tokens = torch.where(asked.valid, self.mask_token_id, -1)  # padding is not masked
        k = k[chosen].to(step.tokens.device, non_blocking=True)
        result = unmask_by_head(self.model, hidden, tokens, self.mask_token_id, k, count=int(step.left[chosen].sum()),
                                confidence=confidence, selection_temperature=self.selection_temperature,
                                threshold=threshold, confidence_of="raw" if raw else "filtered",
                                allowed=self._allowed(asked), generator=uniform, **self.sampling)
        return Update(asked.place(step.tokens, result.tokens), asked.place(None, result.confidence))

    def score(self, positions: Tensor, *, confidence: str = "prob", raw: bool = False) -> Update:
        counts = positions.sum(1).cpu()
        asked = Queries.of(positions, (counts > 0).nonzero().squeeze(1), counts)
        hidden = self._hidden(asked)
        places = asked.valid.flatten().nonzero().squeeze(1)
        uniform, allowed = self.step.uniform, self._allowed(asked)
        if uniform is not None:
            uniform = uniform[asked.rows.unsqueeze(1), asked.index].flatten(0, 1)[places]
        scores = score_by_head(self.model, hidden, places, confidence=confidence,
                               confidence_of="raw" if raw else "filtered",
                               allowed=None if allowed is None else allowed.flatten(0, 1)[places],
                               generator=uniform, **self.sampling)
        token, confidence = (values.new_zeros(asked.valid.numel()).index_copy(0, places, values).view(asked.index.shape)
                             for values in scores)
        nothing = torch.full_like(self.step.tokens, -1)
        return Update(asked.place(nothing, token), asked.place(None, confidence))

    def predict(self, positions: Tensor, other: Tensor, *, temperature: float | None = None) -> Prediction:
        counts = positions.sum(1).cpu()
        asked = Queries.of(positions, (counts > 0).nonzero().squeeze(1), counts)
        places = asked.valid.flatten().nonzero().squeeze(1)
        hidden = self._hidden(asked).flatten(0, 1)[places]
        given, uniform = (values[asked.rows.unsqueeze(1), asked.index].flatten(0, 1)[places]
                          for values in (torch.stack((self.step.tokens, other), -1), self.step.uniform[..., :2]))
        sampling = self.sampling if temperature is None else {**self.sampling, "temperature": temperature}
        words, logs = score_words(hidden, self.model.head_weight, given, uniform, self.mask_token_id, **sampling)
        found = []
        for values, missing in ((words, -1), (logs, -torch.inf)):
            nothing = torch.full(positions.shape, missing, dtype=values.dtype, device=values.device)
            found += [asked.place(nothing, torch.zeros(asked.index.shape, dtype=values.dtype, device=values.device)
                                  .masked_scatter(asked.valid, column)) for column in values.unbind(1)]
        return Prediction(*found)

    def _allowed(self, asked: Queries) -> Tensor | None:
        return None if self.step.allowed is None else self.step.allowed()[asked.rows.unsqueeze(1), asked.index]

    def _hidden(self, asked: Queries) -> Tensor:
        """What the positions are predicted from, [R, Q, D]."""
        tokens, key_mask = self._read(asked.rows)
        queries = self.source[asked.rows].gather(1, asked.index).repeat(self.copies, 1)
        layout = Padded(key_mask, queries=queries)
        if self.predicted is None:
            return self._guide(self.forward(tokens, layout))
        # As in training, only tokens that are still to be predicted have a prediction beside them.
        wanted = asked.valid
        if self.model.config.uniform_share is None:
            wanted = wanted & self.step.masked[asked.rows].gather(1, asked.index)
        before = self.predicted[asked.rows]
        shown = torch.zeros(before.shape[:2], dtype=torch.bool, device=before.device).scatter(1, asked.index, wanted)
        before = (before * shown.unsqueeze(-1)).repeat(self.copies, 1, 1)
        hidden = self._guide(self.forward(tokens, layout, predicted=before))
        rows = asked.rows.unsqueeze(1).expand_as(asked.index)
        self.predicted[rows[asked.valid], asked.index[asked.valid]] = self.model.embed_softly(hidden[asked.valid])
        return hidden

    def _read(self, rows: Tensor, asking: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens and mask of the rows of a forward pass; with guidance, those without the prompt come last.

        asking: how many of the rows need this pass; the others only come along. None: all.
        """
        self.forwards += 1
        self.row_forwards += len(rows) if asking is None else asking
        tokens = self.step.tokens[rows]
        if self.copies > 1:
            tokens = torch.cat((tokens, tokens.masked_fill(self.prompt[rows], self.mask_token_id)))
        return tokens, None if self.key_mask is None else self.key_mask[rows].repeat(self.copies, 1)

    def _make_cache(self, rows: int, block_length: int | None = None) -> KeyValueCache:
        length = self.position_ids.shape[1]
        if isinstance(self.forward, GraphedForward):
            return self.forward.cache_for(rows, length, block_length)
        return KeyValueCache(self.model.config, rows, length, self.model.head_weight, block_length)

    def _guide(self, hidden: Tensor) -> Tensor:
        """Classifier-free guidance of hidden [2R, Q, D], those without the prompt last; [R, Q, D]."""
        if self.cfg_scale == 0:
            return hidden
        # The head is linear, so what guidance does to the logits it may do to the hidden states.
        hidden, without = hidden.chunk(2)
        return without + (self.cfg_scale + 1) * (hidden - without)


class CachedScorer(HeadScorer):
    """Computes the blocks of a block-causal model that are being denoised; those finished since are computed once
    more, with them, and kept."""

    def __init__(self, model: Transformer, config: MDMGenerationConfig, *canvas):
        super().__init__(model, config, *canvas)
        self.block_length, self.several = config.block_length, config.window_blocks > 1
        seen_whole = 1 if model.config.causal_blocks else self.block_length
        self.cache = self._make_cache(self.copies * len(self.position_ids), seen_whole)
        self.causal_context = model.config.causal_context and not model.config.causal_blocks
        self.finished = 0  # positions of which everything is kept
        self.before: Tensor | None = None  # [rows, D], under shift: of the last of them, about the one after it
        self.certainty: Tensor | None = None  # [B, L] fp32, of tokens that are embedded by it (`toward_mask`)
        if config.method == "soft_parallel":
            self.certainty = torch.ones(self.position_ids.shape, device=model.device)

    def _hidden(self, asked: Queries) -> Tensor:
        start, end = self._window(asked)
        first, shift = self.finished, self.model.config.shift_logits
        begins = first < start  # blocks were finished since: those of every row are computed along, and kept
        everything = torch.arange(len(self.position_ids), device=asked.rows.device)
        computed = everything if begins else asked.rows
        sources = torch.where(asked.valid, self.source[asked.rows].gather(1, asked.index), start)
        queries = torch.full((len(everything), asked.index.shape[1]), start, device=asked.rows.device)
        queries = queries.index_copy(0, asked.rows, sources)[computed]
        if begins and shift:  # what is said about the first position of the blocks does not change any more
            queries = F.pad(queries, (0, 1), value=start - 1)
        if begins and self.certainty is not None:
            self.certainty[:, first:start] = 1
        if first < end:
            several = self.several or (begins and shift and start < end)
            hidden = self._compute(computed, first, end, queries.clamp(first, end - 1), len(asked.rows), several, start)
        if begins and shift:
            hidden, self.before = hidden[:, :-1], hidden[:, -1]
        elif self.before is not None:
            before = self.before[self._both(computed)].unsqueeze(1)
            early = (queries < start).repeat(self.copies, 1).unsqueeze(-1)
            hidden = torch.where(early, before, hidden) if first < end else before.expand(-1, queries.shape[1], -1)
        self.finished = start
        hidden = self._guide(hidden)
        return hidden[asked.rows] if len(computed) > len(asked.rows) else hidden

    def _window(self, asked: Queries) -> tuple[int, int]:
        """The first column of the blocks being denoised, and that after the last one to compute. Where only the first
        position is asked about, and predicted from the one before it, no block."""
        first, end = self.step.columns
        if self.several:
            first, last = torch.stack(asked.index[asked.valid].aminmax()).tolist()
            end = last + 1
        start = first // self.block_length * self.block_length
        if self.model.config.shift_logits and 0 < start == end - 1:
            return start, start
        end = ((end - 1) // self.block_length + 1) * self.block_length
        return start, min(end, self.position_ids.shape[1])

    def _compute(self, rows: Tensor, first: int, end: int, queries: Tensor, asking: int, several: bool,
                 finished: int) -> Tensor:
        """Hidden states of the positions `queries` [R, Q] of some rows, all in the last block before `end` unless
        `several`; those from `first` on are computed, and their keys and values kept. Those before `finished` are in
        finished blocks."""
        tokens, key_mask = self._read(rows, asking)
        context = finished - first if self.causal_context else 0
        certainty = None
        if self.certainty is not None:
            certainty = self.certainty[rows].repeat(self.copies, 1)
            certainty = certainty.masked_fill(tokens == self.mask_token_id, 1)[:, first:end]
        return self.forward(tokens[:, first:end], Cached(
            self.cache, first, None if len(rows) == len(self.position_ids) else self._both(rows),
            None if key_mask is None else key_mask[:, :end].contiguous(), (queries - first).repeat(self.copies, 1),
            several, certainty, context))

    def score(self, positions: Tensor, *, confidence: str = "prob", raw: bool = False) -> Update:
        update = super().score(positions, confidence=confidence, raw=raw)
        if self.certainty is not None:
            self.certainty = torch.where(positions, update.confidence, self.certainty)
        return update

    def _both(self, rows: Tensor) -> Tensor:
        """The rows of the cache: with guidance also those without the prompt."""
        return torch.cat((rows, rows + len(self.position_ids))) if self.copies > 1 else rows


class StaleScorer(HeadScorer):
    """Computes the whole canvas when a block begins, then the block alone ("dual") or all from it on ("prefix")."""

    def __init__(self, model: Transformer, config: MDMGenerationConfig, *canvas):
        super().__init__(model, config, *canvas)
        self.dual = config.cache == "dual"
        self.cache = self._make_cache(len(self.position_ids))
        self.began = torch.full((len(self.position_ids),), -1, device="cpu")  # the block that each row is kept for

    def _hidden(self, asked: Queries) -> Tensor:
        start, end = self.step.columns
        begins = self.began[asked.numbers] != start
        self.began[asked.numbers] = start
        sources = torch.where(asked.valid, self.source[asked.rows].gather(1, asked.index), start)
        hidden = self.model.head_weight.new_empty(*asked.index.shape, self.model.head_weight.shape[1])
        # Rows that begin later than others are computed apart, so that a row's tokens do not depend on the others.
        for some, window in ((begins, slice(0, self.position_ids.shape[1])),
                             (~begins, slice(start, end if self.dual else self.position_ids.shape[1]))):
            some = some.nonzero().squeeze(1).to(asked.rows.device, non_blocking=True)
            if not len(some):
                continue
            these = asked.rows[some]
            tokens, key_mask = self._read(these)
            hidden[some] = self.forward(tokens[:, window], Cached(
                self.cache, window.start, None if len(these) == len(self.position_ids) else these, key_mask,
                (sources[some] - window.start).clamp(min=0)))
        return hidden


class EditScorer(HeadScorer):
    """Computes the rows that have changed since they were computed, whole, for their rates and their tokens.

    With guidance the rates are lambda^(1 + s) lambda'^-s and the tokens' logits combined likewise, where the primed are
    those of the text without its prompt (the form that Edit Flows found best).
    """

    def __init__(self, model: Transformer, config: MDMGenerationConfig, mask_token_id: int, text: EditedText,
                 before: "EditScorer | None" = None, changed: Tensor | None = None):
        """before: the scorer of the canvas before the last edits, which have changed the rows `changed` [B]."""
        super().__init__(model, config, mask_token_id, text.visible, ~text.open)
        rows, length = text.tokens.shape
        self.hidden = model.head_weight.new_zeros(self.copies, rows, length, model.head_weight.shape[1])
        self.known = torch.zeros(rows, dtype=torch.bool, device=text.tokens.device)
        if before is not None:
            self.forwards, self.row_forwards = before.forwards, before.row_forwards
            self.known = before.known & ~changed
            shared = min(length, before.hidden.shape[2])
            self.hidden[:, :, :shared] = before.hidden[:, :, :shared]
        words = torch.ones(1, model.config.vocab_size, dtype=torch.bool, device=text.tokens.device)
        words[:, mask_token_id] = False
        self.words = words

    def rates(self) -> Tensor:
        self._compute()
        raw = self.model.rate_head(self.hidden).float()
        self.damaged = raw.isnan().any(-1).sum()  # a rate that is no number would never come true, and not be seen
        if self.model.config.shift_logits:
            before = raw.take_along_dim(self.source.unsqueeze(-1).unsqueeze(0), dim=2)
            raw = torch.cat((before[..., :2], raw[..., 2:]), -1)
        if self.copies == 1:
            rates = F.softplus(raw[0])
        else:
            given, without = log_softplus(raw)
            rates = torch.exp(without + (self.cfg_scale + 1) * (given - without))
        if self.model.config.edit_heads == "insert":  # the others were never trained
            rates = rates * rates.new_tensor([0, 0, 1])
        return rates

    def draw(self, positions: Tensor, head: str) -> Update:
        if not positions.any():
            return Update(torch.full_like(self.step.tokens, -1), None)
        hidden = self._guide(self.hidden.flatten(0, 1))
        if head == "substitute" and self.model.config.shift_logits:
            hidden = hidden.take_along_dim(self.source.unsqueeze(-1), dim=1)
        places = positions.flatten().nonzero().squeeze(1)
        mine = slice(4, 6) if head == "substitute" else slice(6, 8)
        weight = self.model.head_weight if head == "substitute" else self.model.insert_head.weight
        tokens, confidence = linear_token_scores(
            hidden, weight, places, confidence="prob", allowed=self.words.expand(len(places), -1),
            generator=self.step.uniform.flatten(0, 1)[places, mine], **self.sampling)
        return Update(torch.full_like(self.step.tokens, -1).flatten().index_copy(0, places, tokens).view_as(positions),
                      torch.full(positions.shape, -torch.inf, device=confidence.device).flatten().index_copy(
                          0, places, confidence).view_as(positions))

    def _compute(self) -> None:
        rows = (~self.known & self.step.working.to(self.known.device)).nonzero().squeeze(1)
        if not len(rows):
            return
        self.forwards, self.row_forwards = self.forwards + 1, self.row_forwards + len(rows)
        tokens, seen = self.step.tokens[rows], self.key_mask[rows]
        if self.copies > 1:  # padding takes no position, so these are the texts without their prompts
            tokens, seen = tokens.repeat(2, 1), torch.cat((seen, seen & ~self.prompt[rows]))
        self.hidden[:, rows] = self.forward(tokens, Padded(seen)).unflatten(0, (self.copies, -1)).to(self.hidden.dtype)
        self.known[rows] = True


def unmask_by_head(model: Transformer, hidden: Tensor, tokens: Tensor, mask_token_id: int, k: Tensor, *, count: int,
                   **settings) -> Unmasked:
    """`linear_topk_unmask` by the model's head; one with a soft cap stores the logits of the wanted positions."""
    if model.config.logit_softcap is None:
        return linear_topk_unmask(hidden, model.head_weight, tokens, mask_token_id, k, bias=model.head_bias,
                                  count=count, **settings)
    return topk_unmask(model.logits(hidden), tokens, mask_token_id, k, **settings)


def score_by_head(model: Transformer, hidden: Tensor, places: Tensor, **settings) -> Scores:
    """`linear_token_scores` likewise."""
    if model.config.logit_softcap is None:
        return linear_token_scores(hidden, model.head_weight, places, bias=model.head_bias, **settings)
    return token_scores(model.logits(hidden.flatten(0, -2)[places]), **settings)


def score_words(hidden: Tensor, weight: Tensor, given: Tensor, uniform: Tensor, mask_token_id: int, *,
                temperature: float, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """What `Prediction` holds: [M, 2] int64, a drawn and the most likely word; [M, 4] fp64, log p of two given words
    and of these two.

    Args:
        hidden: [M, D]. weight: [V, D]. given: [M, 2] int64. uniform: [M, 2].
    """
    words, logs = given.new_empty(len(given), 2), torch.empty(len(given), 4, dtype=torch.double, device=given.device)
    for part in slices_of_rows(len(given), len(weight), given.device):
        logits = F.linear(hidden[part], weight).float()
        logits[:, mask_token_id] = -torch.inf
        best = logits.argmax(1, keepdim=True)
        logits = filter_logits(logits / (temperature or 1.0), top_k, top_p)
        drawn = token_scores(logits, temperature=1.0 if temperature else 0.0, generator=uniform[part]).token
        words[part] = torch.cat((drawn.unsqueeze(1), best), 1)
        scored = torch.cat((given[part], words[part]), 1)
        if temperature:
            logs[part] = logits.double().log_softmax(1).gather(1, scored)
        else:
            logs[part] = torch.where(logits.isnan().any(1, keepdim=True), torch.nan,
                                     torch.where(scored == best, 0.0, -torch.inf))
    return words, logs


def previous_token(places: Tensor, key_mask: Tensor | None) -> Tensor:
    """Where the logits about each token of [B, L] are under right shift: at the token before it, skipping padding;
    the first token's are at its own place."""
    last_seen = places if key_mask is None else torch.where(key_mask, places, -1).cummax(1).values
    before = torch.cat((last_seen.new_full((len(places), 1), -1), last_seen[:, :-1]), 1)
    return torch.where(before < 0, places, before)
