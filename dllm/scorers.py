"""Scorers: how a strategy's question about some positions of the canvas is answered by the model.

Each runs the model on the rows that are asked about, computes the last layer at the wanted positions alone, and
multiplies the head there. They differ in what they keep between denoising steps: `HeadScorer` nothing, `CachedScorer`
the finished blocks of a block-causal model (exact), `StaleScorer` what is outside the block (Fast-dLLM; approximate).
"""

from typing import Protocol

import torch
from torch import Tensor

from dllm.cache import KeyValueCache
from dllm.errors import UserError
from dllm.model import DiffusionLM
from dllm.strategies import Step, Update
from dllm_kernels import linear_token_scores, linear_topk_unmask


class Settings(Protocol):
    """What a scorer reads of the generation config."""

    temperature: float
    top_k: int | None
    top_p: float | None
    alg_temp: float
    cfg_scale: float
    block_length: int | None
    cache: str


class HeadScorer:
    """Computes the whole canvas in every step."""

    def __init__(self, model: DiffusionLM, config: Settings, mask_token_id: int, key_mask: Tensor | None,
                 position_ids: Tensor, prompt: Tensor):
        self.model, self.mask_token_id, self.key_mask, self.position_ids = model, mask_token_id, key_mask, position_ids
        self.cfg_scale, self.prompt = config.cfg_scale, prompt  # [B, L] bool, what guidance does without
        self.source = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
        if model.config.shift_logits:
            self.source = previous_token(self.source, key_mask)
        self.sampling = {"temperature": config.temperature, "top_k": config.top_k or None, "top_p": config.top_p}
        self.selection_temperature = config.alg_temp
        self.forwards = self.row_forwards = 0

    def at(self, step: Step) -> "HeadScorer":
        self.step = step
        return self

    def unmask(self, k: Tensor, confidence: str, *, raw: bool = False, threshold: float | None = None) -> Update:
        wanted = self.step.masked & (k > 0).unsqueeze(1)
        rows, index, valid, hidden = self._hidden(wanted)
        uniform = None if self.step.uniform is None else self.step.uniform[rows.unsqueeze(1), index]
        tokens = torch.where(valid, self.mask_token_id, -1)  # the places that only fill up a row are not masked
        result = linear_topk_unmask(hidden, self.model.head_weight, tokens, self.mask_token_id, k[rows],
                                    confidence=confidence, selection_temperature=self.selection_temperature,
                                    threshold=threshold, confidence_of="raw" if raw else "filtered",
                                    allowed=self._allowed(wanted), generator=uniform, **self.sampling)
        return Update(self._place(self.step.tokens, wanted, result.tokens[valid]),
                      self._place(None, wanted, result.confidence[valid]))

    def score(self, positions: Tensor, *, raw: bool = False) -> Update:
        rows, index, valid, hidden = self._hidden(positions)
        uniform = None if self.step.uniform is None else self.step.uniform[positions]
        scores = linear_token_scores(hidden, self.model.head_weight, valid.flatten().nonzero().squeeze(1),
                                     confidence="prob", confidence_of="raw" if raw else "filtered",
                                     allowed=self._allowed(positions), generator=uniform, **self.sampling)
        nothing = torch.full_like(self.step.tokens, -1)
        return Update(self._place(nothing, positions, scores.token), self._place(None, positions, scores.confidence))

    def _allowed(self, wanted: Tensor) -> Tensor | None:
        return None if self.step.allowed is None else self.step.allowed[wanted]

    def _hidden(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the positions `wanted` [B, L] are predicted from.

        Returns: rows [R] that want anything, index [R, Q] of the wanted positions filled up with 0, valid [R, Q], and
            hidden [R, Q, D].
        """
        rows, index, valid = list_positions(wanted)
        self.forwards += 1
        self.row_forwards += len(rows)
        tokens, positions, queries = self.step.tokens[rows], self.position_ids[rows], self.source[rows].gather(1, index)
        key_mask = None if self.key_mask is None else self.key_mask[rows]
        if self.cfg_scale > 0:
            tokens = torch.cat((tokens, tokens.masked_fill(self.prompt[rows], self.mask_token_id)))
            positions, queries = positions.repeat(2, 1), queries.repeat(2, 1)
            key_mask = None if key_mask is None else key_mask.repeat(2, 1)
        hidden = self.model.hidden_states(tokens, position_ids=positions, queries=queries, attention_mask=key_mask)
        return rows, index, valid, self._guide(hidden)

    def _guide(self, hidden: Tensor) -> Tensor:
        """Classifier-free guidance of hidden [2R, Q, D], those without the prompt last; [R, Q, D]."""
        if self.cfg_scale == 0:
            return hidden
        # The head is linear, so what guidance does to the logits it may do to the hidden states.
        hidden, without = hidden.chunk(2)
        return without + (self.cfg_scale + 1) * (hidden - without)

    @staticmethod
    def _place(onto: Tensor | None, where: Tensor, values: Tensor) -> Tensor:
        """A copy of `onto` (None: all -inf) with the values, in row-major order, at `where` [B, L]."""
        if onto is None:
            onto = torch.full(where.shape, -torch.inf, device=where.device)
        return onto.masked_scatter(where, values)


class CachedScorer(HeadScorer):
    """Computes one block of a block-causal model at a time; finished blocks are computed once more, and kept."""

    def __init__(self, model: DiffusionLM, config: Settings, mask_token_id: int, key_mask: Tensor | None,
                 position_ids: Tensor, prompt: Tensor):
        super().__init__(model, config, mask_token_id, key_mask, position_ids, prompt)
        self.block_length = config.block_length
        rows = len(position_ids) * (2 if self.cfg_scale else 1)  # with guidance, those without the prompt come last
        self.cache = KeyValueCache(model.config, rows, position_ids.shape[1], like=model.head_weight, grows=True)
        self.finished = 0  # positions of which everything is kept
        self.before: Tensor | None = None  # [rows, D], under shift: of the last of them, about the one after it

    def _hidden(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, index, valid = list_positions(wanted)
        start = int(self.step.editable.any(0).nonzero()[0]) // self.block_length * self.block_length
        end = min(start + self.block_length, wanted.shape[1])
        everything = torch.arange(len(wanted), device=wanted.device)
        if self.finished < start and self.model.config.shift_logits:
            last = torch.full((len(wanted), 1), start - 1, device=wanted.device)
            self.before = self._compute(everything, self.finished, start, last).squeeze(1)
            self.finished = start
        first = self.finished
        # Where blocks were finished since, those of every row are computed along, and kept.
        computed = everything if first < start else rows
        queries = torch.full((len(wanted), index.shape[1]), start, device=wanted.device)
        queries[rows] = torch.where(valid, self.source[rows].gather(1, index), start)
        queries = queries[computed]
        hidden = self._compute(computed, first, end, queries.clamp(min=start))
        if self.before is not None:
            before = self.before[self._both(computed)].unsqueeze(1)
            hidden = torch.where((queries < start).repeat(len(hidden) // len(queries), 1).unsqueeze(-1), before, hidden)
        self.finished = start
        hidden = self._guide(hidden)
        return rows, index, valid, hidden[rows] if len(computed) > len(rows) else hidden

    def _compute(self, rows: Tensor, first: int, end: int, queries: Tensor) -> Tensor:
        """Hidden states of the positions `queries` [R, Q] of some rows, all in the last block before `end`; those from
        `first` on are computed, and their keys and values kept."""
        self.forwards += 1
        self.row_forwards += len(rows)
        tokens = self.step.tokens[rows]
        if self.cfg_scale > 0:
            tokens = torch.cat((tokens, tokens.masked_fill(self.prompt[rows], self.mask_token_id)))
        both = self._both(rows)
        copies = len(both) // len(rows)
        whole = len(both) == self.cache.content.shape[2]
        self.cache.start, self.cache.rows = first, None if whole else both
        return self.model.hidden_states(
            tokens[:, first:end], cache=self.cache, block_length=self.block_length,
            position_ids=self.position_ids[rows, first:end].repeat(copies, 1),
            queries=(queries - first).repeat(copies, 1),
            attention_mask=None if self.key_mask is None else self.key_mask[rows, :end].repeat(copies, 1))

    def _both(self, rows: Tensor) -> Tensor:
        """The rows of the cache: with guidance also those without the prompt."""
        return torch.cat((rows, rows + len(self.position_ids))) if self.cfg_scale > 0 else rows


class StaleScorer(HeadScorer):
    """Computes the whole canvas when a block begins, then the block alone ("dual") or all from it on ("prefix")."""

    def __init__(self, model: DiffusionLM, config: Settings, mask_token_id: int, key_mask: Tensor | None,
                 position_ids: Tensor, prompt: Tensor):
        super().__init__(model, config, mask_token_id, key_mask, position_ids, prompt)
        self.dual = config.cache == "dual"
        self.cache = KeyValueCache(model.config, *position_ids.shape, like=model.head_weight, grows=False)
        self.began = torch.full((len(position_ids),), -1, device=position_ids.device)  # the block each row is kept for

    def _hidden(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, index, valid = list_positions(wanted)
        columns = self.step.editable.any(0).nonzero().squeeze(1)
        start, end = int(columns[0]), int(columns[-1]) + 1
        if not self.step.editable[rows, start:end].all():
            raise UserError(f"cache {'dual' if self.dual else 'prefix'!r} needs the positions to fill of all rows in "
                            "the same columns, one after the other; pad prompts on the left")
        begins = self.began[rows] != start
        self.began[rows] = start
        sources = torch.where(valid, self.source[rows].gather(1, index), start)
        hidden = self.model.head_weight.new_empty(*index.shape, self.model.head_weight.shape[1])
        # Rows that begin later than others are computed apart, so that a row's tokens do not depend on the others.
        for some, window in ((begins, slice(0, wanted.shape[1])),
                             (~begins, slice(start, end if self.dual else wanted.shape[1]))):
            if not some.any():
                continue
            these = rows[some]
            self.cache.start, self.cache.rows = window.start, None if len(these) == len(wanted) else these
            hidden[some] = self.model.hidden_states(
                self.step.tokens[these, window], position_ids=self.position_ids[these, window],
                queries=(sources[some] - window.start).clamp(min=0), cache=self.cache,
                attention_mask=None if self.key_mask is None else self.key_mask[these])
            self.forwards += 1
            self.row_forwards += len(these)
        return rows, index, valid, hidden


def list_positions(wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of wanted [B, L]: rows [R] that want anything, index [R, Q] of the positions, filled up with 0, valid [R, Q]."""
    rows = wanted.any(1).nonzero().squeeze(1)
    wanted = wanted[rows]
    counts = wanted.sum(1)
    valid = torch.arange(int(counts.max()), device=wanted.device) < counts.unsqueeze(1)
    index = torch.zeros(valid.shape, dtype=torch.long, device=wanted.device)
    index[valid] = wanted.nonzero()[:, 1]
    return rows, index, valid


def previous_token(places: Tensor, key_mask: Tensor | None) -> Tensor:
    """Where the logits about each token of [B, L] are under right shift: at the token before it, skipping padding;
    the first token's are at its own place."""
    last_seen = places if key_mask is None else torch.where(key_mask, places, -1).cummax(1).values
    before = torch.cat((last_seen.new_full((len(places), 1), -1), last_seen[:, :-1]), 1)
    return torch.where(before < 0, places, before)
