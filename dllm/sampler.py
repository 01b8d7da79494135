"""The denoising loop: from a canvas with masked positions to tokens, by any strategy of strategies.py.

Each step runs the model once, on the rows that still change, and multiplies the head only at the positions that the
strategy asks about. Randomness is a function of (seed, sequence, step, position), so a prompt gives the same text alone
and in any batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm.cache import KeyValueCache
from dllm.errors import UserError
from dllm.model import DiffusionLM, number_tokens
from dllm.strategies import CONFIDENCES, REMASKINGS, STRATEGIES, Step, Update, choose_strategy
from dllm_kernels import linear_token_scores, linear_topk_unmask, philox_uniform

BLOCK_LENGTH = 32  # of block-causal models whose checkpoint names none: LLaDA2's


@dataclass(frozen=True, kw_only=True, slots=True)
class MDMGenerationConfig:
    """How to denoise. The fields up to output_history and their meanings are Open-dLLM's, the others ours."""

    max_new_tokens: int = 128  # masked positions appended to the prompt by `diffusion_generate`
    steps: int = 512  # denoising steps at most; those that commit nothing cost nothing
    temperature: float = 0.0  # divides the logits; 0 takes the most likely token
    top_p: float | None = None  # keep the most likely tokens until their probability passes this
    top_k: int | None = None  # then keep the k most likely
    alg: str = "entropy"  # a key of strategies.STRATEGIES
    alg_temp: float = 0.0  # Gumbel noise on the confidences, in units of them; p2 and origin have no use for it
    eps: float = 1e-3  # the time after the last step
    mask_token_id: int | None = None  # None takes the checkpoint's or its tokenizer's
    num_return_sequences: int = 1  # per prompt, next to each other in the output
    output_history: bool = False
    seed: int | None = None  # None draws one from torch's global generator
    block_length: int | None = None  # denoise so many masked positions after the other, from left to right; None: all
    remasking: str | None = None  # in the place of `alg` a key of strategies.REMASKINGS: LLaDA's sampler
    threshold: float | None = None  # commit all that are at least so sure, one at least, in as many steps as that takes
    factor: float | None = None  # the same where the bound rises with how many are committed (strategies.py)
    cfg_scale: float = 0.0  # classifier-free guidance: logits + cfg_scale * (logits - those without the prompt)
    cache: str = "none"  # "prefix" takes what is before a block, "dual" what is around it, as it was when it began
    stop_at_eos: bool = False  # a row ends with the first end-of-text token that no masked position is before
    block_causal: bool | None = None  # blocks, counted from the first token, see none after them; None: as trained

    def __post_init__(self):
        wants = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "steps": (self.steps >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k is None or self.top_k >= 0, "at least 1, or 0 or none for no limit"),
            "alg": (self.alg in STRATEGIES, "one of " + ", ".join(STRATEGIES)),
            "alg_temp": (self.alg_temp >= 0, "0 or more"),
            "eps": (0 < self.eps < 1, "in (0, 1)"),
            "num_return_sequences": (self.num_return_sequences >= 1, "at least 1"),
            "block_length": (self.block_length is None or self.block_length >= 1, "at least 1"),
            "remasking": (self.remasking in (None, *REMASKINGS), "none or one of " + ", ".join(REMASKINGS)),
            "factor": (self.factor is None or self.factor > 0, "above 0"),
            "cfg_scale": (0 <= self.cfg_scale < float("inf"), "0 or more"),
            "cache": (self.cache in ("none", "prefix", "dual"), "none, prefix or dual"),
        }
        for name, (holds, wanted) in wants.items():
            if not holds:
                raise UserError(f"{name} must be {wanted}, not {getattr(self, name)!r}")
        if self.remasking == "low_confidence_dynamic":
            if self.threshold is None or self.factor is not None:
                raise UserError("remasking low_confidence_dynamic needs a threshold (LLaDA2: 0.95), and no factor")
        elif self.threshold is not None or self.factor is not None:
            if self.threshold is not None and self.factor is not None:
                raise UserError("threshold and factor exclude each other: each says how many positions a step commits")
            if (self.remasking or self.alg) not in CONFIDENCES:
                raise UserError(f"threshold and factor need confidences, which {self.remasking or self.alg} has not; "
                                "choose " + ", ".join(CONFIDENCES))


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    sequences: Tensor  # [B, L] int64
    history: list[Tensor] | None  # the canvas after each step, with output_history
    steps: int  # denoising steps taken, free ones included
    forwards: int  # forward passes of the model
    tokens_per_forward: float  # positions filled / forward passes, each row's counted for itself


OnStep = Callable[[int, Tensor, Tensor | None], None]


def generate(model: DiffusionLM, inputs: Tensor, attention_mask: Tensor | None = None,
             config: MDMGenerationConfig | None = None, on_step: OnStep | None = None) -> GenerationOutput:
    """Append `max_new_tokens` masked positions to each prompt and denoise them.

    Args:
        inputs: [B, P] or [P] int64. Prompts of different lengths are padded, on the left as usual or on the right.
        attention_mask: [B, P], nonzero where there is a token; without it every position counts.
        on_step: called after each step with its number, the canvas [B, L] and the confidences (see `denoise`).
    Returns: sequences [B * num_return_sequences, P + max_new_tokens].
    Raises: UserError if the result would not fit into the model's positions, or nothing names the mask token.
    """
    config = config or MDMGenerationConfig()
    inputs = inputs.reshape(1, -1) if inputs.ndim == 1 else inputs
    new = inputs.new_full((len(inputs), config.max_new_tokens), find_mask_token(model, config))
    limit = model.config.max_position_embeddings
    if inputs.shape[1] + config.max_new_tokens > limit:
        raise UserError(f"a prompt of {inputs.shape[1]} tokens and {config.max_new_tokens} new ones need "
                        f"{inputs.shape[1] + config.max_new_tokens} positions, the model has {limit}; "
                        "shorten the prompt or lower max_new_tokens")
    if attention_mask is not None:
        prompt_mask = attention_mask.reshape(inputs.shape).bool()
        attention_mask = torch.cat((prompt_mask, torch.ones_like(new, dtype=torch.bool)), 1)
    return denoise(model, torch.cat((inputs, new), 1), config, attention_mask, on_step)


def infill(model: DiffusionLM, prefix_ids: Tensor, suffix_ids: Tensor, *, length: int,
           generation_config: MDMGenerationConfig | None = None, on_step: OnStep | None = None) -> GenerationOutput:
    """Denoise `length` masked positions between prefix [B, P] or [P] and suffix [B, S] or [S].

    The sequences of the output are [B, P + length + S].
    """
    config = generation_config or MDMGenerationConfig()
    if length < 1:
        raise UserError(f"length must be at least 1, not {length}: the number of tokens to fill in")
    prefix_ids, suffix_ids = (ids.reshape(1, -1) if ids.ndim == 1 else ids for ids in (prefix_ids, suffix_ids))
    middle = prefix_ids.new_full((len(prefix_ids), length), find_mask_token(model, config))
    return denoise(model, torch.cat((prefix_ids, middle, suffix_ids), 1), config, on_step=on_step)


@torch.no_grad()
def denoise(model: DiffusionLM, canvas: Tensor, config: MDMGenerationConfig, attention_mask: Tensor | None = None,
            on_step: OnStep | None = None) -> GenerationOutput:
    """Fill every masked position of the canvas.

    Args:
        canvas: [B, L] int64; the positions that equal the mask token are filled, the others never change.
        attention_mask: [B, L], nonzero where there is a token; padding is never attended and takes no position.
        on_step: called after each step with its number from 0, the canvas, and confidences [B, L] fp32 (-inf where not
            scored; None if the step was free).
    A model may predict the mask token itself (the originals allow it); such positions can be left masked at the end.
    """
    mask_token_id = find_mask_token(model, config)
    canvas = canvas.to(model.device).repeat_interleave(config.num_return_sequences, 0)
    key_mask = None
    if attention_mask is not None and not bool(attention_mask.all()):
        key_mask = attention_mask.to(model.device).bool().repeat_interleave(config.num_return_sequences, 0)
    sequence = torch.arange(len(canvas), device=model.device) % config.num_return_sequences
    seed = draw_seed() if config.seed is None else config.seed
    causal = model.config.block_causal if config.block_causal is None else config.block_causal
    if config.cache != "none" and (causal or config.cfg_scale > 0 or config.block_length is None):
        raise UserError(f"cache {config.cache!r} needs a block_length, and neither a block-causal model (which keeps "
                        "its finished blocks anyway) nor cfg_scale")
    if causal:
        config = replace(config, block_length=config.block_length or model.config.block_length or BLOCK_LENGTH)
        layout = WholeBlocks(canvas, key_mask, config.block_length, mask_token_id)
        canvas, key_mask = layout.canvas, None
    strategy = choose_strategy(config.alg, config.remasking, config.threshold, config.factor, config.block_length)
    random = (config.temperature > 0 or config.alg_temp > 0
              or (config.remasking or config.alg) in ("origin", "random"))

    tokens, editable = canvas, canvas == mask_token_id
    if key_mask is not None:
        editable = editable & key_mask
    kind = CachedScorer if causal else HeadScorer if config.cache == "none" else StaleScorer
    scorer = kind(model, config, mask_token_id, key_mask, number_tokens(canvas, key_mask, None), ~editable)
    place = scorer.position_ids if causal else editable.cumsum(1) - 1
    history: list[Tensor] = []
    steps = 0
    for number, block, total in split_into_blocks(editable, place, config):
        for index in range(total):
            masked = (tokens == mask_token_id) & block
            if not masked.any():
                break
            # Not by the steps taken: how many a block takes depends on the other rows.
            draw = number * total + index
            uniform = philox_uniform(seed, sequence[:, None], draw, scorer.position_ids) if random else None
            step = Step(index, total, config.eps, tokens, masked, block, mask_token_id, uniform)
            tokens, confidence = strategy(step, scorer.at(step))
            if confidence is not None and confidence.isnan().any():
                raise UserError(f"step {steps}: the model's logits at {int(confidence.isnan().sum())} positions are "
                                "NaN or infinite: its weights are damaged, or too large for its dtype (try float32)")
            if config.stop_at_eos:
                tokens = fill_after_end(tokens, editable, mask_token_id, find_ends(model))
            if config.output_history:
                history.append(layout.restore(tokens) if causal else tokens)
            if on_step is not None:
                seen = (tokens, confidence)
                on_step(steps, *(layout.restore(x) if causal and x is not None else x for x in seen))
            steps += 1
    filled = int(editable.sum())
    return GenerationOutput(layout.restore(tokens) if causal else tokens, history if config.output_history else None,
                            steps, scorer.forwards, filled / max(scorer.row_forwards, 1))


def split_into_blocks(editable: Tensor, place: Tensor, config: MDMGenerationConfig) -> list[tuple[int, Tensor, int]]:
    """Of each block its number, the positions [B, L] to fill, and the denoising steps it gets.

    Args:
        place: [B, L] int64, by which the positions are counted off into blocks: among those to fill, or in the row.
    Raises: UserError if block_length does not divide the positions of a row, or the number of blocks the steps.
    """
    longest = int(place[editable].max()) + 1 if editable.any() else 0
    length = config.block_length or max(longest, 1)
    counts = place.masked_fill(~editable, -1).amax(1) + 1 if editable.numel() else editable.sum(1)
    if config.block_length is not None and (uneven := counts[counts % length > 0]).numel():
        raise UserError(f"block_length {length} does not divide the {int(uneven[0])} positions to fill; choose one "
                        "that does")
    numbers = (place // length)[editable].unique().tolist()
    unlimited = config.remasking != "low_confidence_dynamic" and (config.threshold, config.factor) != (None, None)
    if config.steps % max(len(numbers), 1) and not unlimited:
        raise UserError(f"steps must be a multiple of the {len(numbers)} blocks of {length} positions, not "
                        f"{config.steps}; {-(-config.steps // len(numbers)) * len(numbers)} would be")
    return [(number, editable & (place // length == number), length if unlimited else config.steps // len(numbers))
            for number in numbers]


class WholeBlocks:
    """A canvas for a block-causal model: rows that begin in the first column and end with a whole block.

    What is masked to complete a row's last block is filled too, as the model sees it, but not given out.
    """

    def __init__(self, canvas: Tensor, key_mask: Tensor | None, block_length: int, mask_token_id: int):
        self.given = canvas
        self.key_mask = torch.ones_like(canvas, dtype=torch.bool) if key_mask is None else key_mask
        self.order = self.key_mask.long().argsort(dim=1, descending=True, stable=True)
        lengths = self.key_mask.sum(1, keepdim=True)
        whole = -(-lengths // block_length) * block_length
        width = int(whole.max()) if len(canvas) else 0
        tokens = torch.nn.functional.pad(canvas.gather(1, self.order), (0, width - canvas.shape[1]))
        place = torch.arange(width, device=canvas.device)
        beyond = torch.where(place < whole, mask_token_id, 0 if mask_token_id else 1)
        self.canvas = torch.where(place < lengths, tokens, beyond)

    def restore(self, aligned: Tensor) -> Tensor:
        """Tokens or confidences [B, width] where they were given; padding keeps its tokens, and has no confidence."""
        length = self.given.shape[1]
        aligned = torch.nn.functional.pad(aligned[:, :length], (0, max(length - aligned.shape[1], 0)))
        padding = torch.full_like(aligned, -torch.inf) if aligned.is_floating_point() else self.given
        return torch.where(self.key_mask, torch.empty_like(aligned).scatter_(1, self.order, aligned), padding)


class HeadScorer:
    """Answers a strategy: hidden states of the rows and positions it asks about, then the head on those alone."""

    def __init__(self, model: DiffusionLM, config: MDMGenerationConfig, mask_token_id: int, key_mask: Tensor | None,
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
                                    generator=uniform, **self.sampling)
        return Update(self._place(self.step.tokens, wanted, result.tokens[valid]),
                      self._place(None, wanted, result.confidence[valid]))

    def score(self, positions: Tensor, *, raw: bool = False) -> Update:
        rows, index, valid, hidden = self._hidden(positions)
        uniform = None if self.step.uniform is None else self.step.uniform[positions]
        scores = linear_token_scores(hidden, self.model.head_weight, valid.flatten().nonzero().squeeze(1),
                                     confidence="prob", confidence_of="raw" if raw else "filtered",
                                     generator=uniform, **self.sampling)
        nothing = torch.full_like(self.step.tokens, -1)
        return Update(self._place(nothing, positions, scores.token), self._place(None, positions, scores.confidence))

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
        if self.cfg_scale > 0:
            # The head is linear, so what guidance does to the logits it may do to the hidden states.
            hidden, without = hidden.chunk(2)
            hidden = without + (self.cfg_scale + 1) * (hidden - without)
        return rows, index, valid, hidden

    @staticmethod
    def _place(onto: Tensor | None, where: Tensor, values: Tensor) -> Tensor:
        """A copy of `onto` (None: all -inf) with the values, in row-major order, at `where` [B, L]."""
        if onto is None:
            onto = torch.full(where.shape, -torch.inf, device=where.device)
        return onto.masked_scatter(where, values)


class CachedScorer(HeadScorer):
    """The same for a block-causal model and one block at a time: finished blocks are computed once and kept."""

    def __init__(self, model: DiffusionLM, config: MDMGenerationConfig, mask_token_id: int, key_mask: Tensor | None,
                 position_ids: Tensor, prompt: Tensor):
        super().__init__(model, config, mask_token_id, key_mask, position_ids, prompt)
        if model.config.shift_logits or config.cfg_scale > 0:
            raise UserError("block-causal decoding takes neither models with shifted logits nor cfg_scale; "
                            "set block_causal=False or leave cfg_scale out")
        self.block_length = config.block_length
        self.cache = KeyValueCache(model.config, *position_ids.shape, like=model.head_weight, grows=True)
        self.finished = 0  # positions of which everything is kept

    def _hidden(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, index, valid = list_positions(wanted)
        start = int(self.step.editable.any(0).nonzero()[0]) // self.block_length * self.block_length
        first, end = self.finished, start + self.block_length
        computed = rows
        if first < start:  # blocks were finished since: those of every row are computed along, and kept
            computed = torch.arange(len(wanted), device=wanted.device)
        self.cache.start, self.cache.rows = first, None if len(computed) == len(wanted) else computed
        queries = torch.full((len(wanted), index.shape[1]), start, device=wanted.device)
        queries[rows] = torch.where(valid, index, start)
        self.forwards += 1
        self.row_forwards += len(computed)
        hidden = self.model.hidden_states(self.step.tokens[computed, first:end], cache=self.cache,
                                          block_length=self.block_length, queries=queries[computed] - first)
        self.finished = start
        return rows, index, valid, hidden[rows] if len(computed) > len(rows) else hidden


class StaleScorer(HeadScorer):
    """Computes the whole canvas when a block begins, then the block alone ("dual") or all from it on ("prefix")."""

    def __init__(self, model: DiffusionLM, config: MDMGenerationConfig, mask_token_id: int, key_mask: Tensor | None,
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
        sources = torch.where(valid, self.source[rows].gather(1, index), self.source[rows, start:start + 1])
        first = int(self.source[rows, start].min())  # one before the block, where logits are shifted
        hidden = self.model.head_weight.new_empty(*index.shape, self.model.head_weight.shape[1])
        # Rows that begin later than others are computed apart, so that a row's tokens do not depend on the others.
        for some, window in ((begins, slice(0, wanted.shape[1])),
                             (~begins, slice(first, end if self.dual else wanted.shape[1]))):
            if not some.any():
                continue
            these = rows[some]
            self.cache.start, self.cache.rows = window.start, None if len(these) == len(wanted) else these
            hidden[some] = self.model.hidden_states(
                self.step.tokens[these, window], position_ids=self.position_ids[these, window],
                queries=sources[some] - window.start, cache=self.cache,
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


def find_mask_token(model: DiffusionLM, config: MDMGenerationConfig) -> int:
    """The mask token of the config, the checkpoint or its tokenizer, in this order."""
    token_id = model.mask_token_id if config.mask_token_id is None else config.mask_token_id
    if token_id is None:
        raise UserError("neither the generation config, the checkpoint's config.json nor its tokenizer names a mask "
                        "token; set mask_token_id")
    if not 0 <= token_id < model.config.vocab_size:
        raise UserError(f"mask_token_id {token_id} is outside the model's vocabulary of {model.config.vocab_size}")
    return token_id


def find_ends(model: DiffusionLM) -> list[int]:
    """The end-of-text tokens that the checkpoint's config.json names."""
    ends = model.config.eos_token_id
    if ends is None:
        raise UserError("stop_at_eos: the checkpoint's config.json names no eos_token_id; leave stop_at_eos out")
    return ends if isinstance(ends, list) else [ends]


def fill_after_end(tokens: Tensor, editable: Tensor, mask_token_id: int, ends: list[int]) -> Tensor:
    """tokens [B, L] with the first of `ends` in every masked position after one that stands where nothing before it is
    masked: those rows are done, and leave the forward passes."""
    masked = editable & (tokens == mask_token_id)
    end = editable & torch.isin(tokens, torch.tensor(ends, device=tokens.device)) & (masked.cumsum(1) == 0)
    return torch.where(masked & (end.cumsum(1) > 0), ends[0], tokens)


def draw_seed() -> int:
    """A seed from torch's global generator, so that torch.manual_seed makes a run repeatable."""
    return int(torch.randint(2**63 - 1, ()))
