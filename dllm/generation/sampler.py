"""The denoising loop: from a canvas with masked positions to tokens, by any strategy of strategies.py.

Each step runs the model once, on the rows that still change, and multiplies the head only at the positions that the
strategy asks about (scorers.py). Randomness is a function of (seed, sequence, step, position), so a prompt gives the
same text alone and in any batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm.canvas import ElasticGap, WholeBlocks
from dllm.constraints import Constraint
from dllm.corruption import SCHEDULES
from dllm.errors import UserError
from dllm.model import DiffusionLM, number_tokens
from dllm.scorers import CachedScorer, HeadScorer, StaleScorer
from dllm.strategies import CONFIDENCES, REMASKINGS, STRATEGIES, Step, begin_with_first, choose_strategy
from dllm_kernels import philox_uniform

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
    blocks_from: str | None = None  # "text": they are counted from the first token on, as block-causal models are
    # trained; "masked": from the first masked position on; None: "text" for block-causal models, else "masked"
    remasking: str | None = None  # in the place of `alg` a key of strategies.REMASKINGS: LLaDA's sampler
    schedule: str = "even"  # of `remasking`: as many in each step, or what a key of corruption.SCHEDULES leaves masked
    threshold: float | None = None  # commit all that are at least so sure, one at least, in as many steps as that takes
    factor: float | None = None  # the same where the bound rises with how many are committed (strategies.py)
    editing_threshold: float | None = None  # with a threshold, replace committed tokens if so sure of others (LLaDA2.1)
    max_post_steps: int = 16  # that edit a block which has no masked position left
    remask_rate: float = 0.02  # of remdm: the chance at most that a step masks a committed token again
    cfg_scale: float = 0.0  # classifier-free guidance: logits + cfg_scale * (logits - those without the prompt)
    cache: str = "none"  # "prefix" takes what is before a block, "dual" what is around it, as it was when it began
    stop_at_eos: bool = False  # a row ends with the first end-of-text token that no masked position is before
    expand_token_id: int | None = None  # commits one position a step; this token becomes two masked ones (DreamOn)
    delete_eos_token: bool = True  # where gaps expand, an end-of-text token is taken out of them
    pad_eos_to_right: bool = False  # where gaps expand, the masked positions after an end-of-text token become that too
    max_infill_length: int = 64  # positions that a gap expands to at most
    infill_lengths: tuple[int, ...] = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # that `infill(length="auto")` chooses from
    constraint: Constraint | None = None  # what the text must be (constraints.py)
    cuda_graphs: bool = False  # on a GPU, replay forward passes instead of launching their kernels one by one
    block_causal: bool | None = None  # blocks, counted from the first token, see none after them; None: as trained

    def __post_init__(self):
        object.__setattr__(self, "infill_lengths", tuple(self.infill_lengths))  # a list, where it was read from JSON
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
            "blocks_from": (self.blocks_from in (None, "text", "masked"), "text, masked or none"),
            "schedule": (self.schedule in ("even", *SCHEDULES), "one of " + ", ".join(("even", *SCHEDULES))),
            "factor": (self.factor is None or self.factor > 0, "above 0"),
            "max_post_steps": (self.max_post_steps >= 0, "0 or more"),
            "remask_rate": (0 <= self.remask_rate <= 1, "in [0, 1]"),
            "max_infill_length": (self.max_infill_length >= 1, "at least 1"),
            "infill_lengths": (len(self.infill_lengths) > 0 and min(self.infill_lengths) >= 1, "numbers of 1 or more"),
            "cfg_scale": (0 <= self.cfg_scale < float("inf"), "0 or more"),
            "cache": (self.cache in ("none", "prefix", "dual"), "none, prefix or dual"),
        }
        for name, (holds, wanted) in wants.items():
            if not holds:
                raise UserError(f"{name} must be {wanted}, not {getattr(self, name)!r}")
        name = self.remasking or self.alg
        if name in ("low_confidence_dynamic", "confidence_threshold") and (self.threshold is None or self.factor):
            raise UserError(f"{name} needs a threshold (0.9, say), and no factor")
        if self.threshold is not None and self.factor is not None:
            raise UserError("threshold and factor exclude each other: each says how many positions a step commits")
        if (self.threshold, self.factor) != (None, None) and name not in (*CONFIDENCES, "low_confidence_dynamic"):
            raise UserError(f"threshold and factor need confidences, which {name} has not; choose "
                            + ", ".join(CONFIDENCES))
        if self.editing_threshold is not None and name != "low_confidence_dynamic":
            raise UserError("editing_threshold is for remasking low_confidence_dynamic (LLaDA2.1)")
        if self.schedule != "even" and (name != "low_confidence" or (self.threshold, self.factor) != (None, None)):
            raise UserError(f"schedule {self.schedule} is for remasking low_confidence without threshold and factor")
        if self.expand_token_id is not None and (
                name not in CONFIDENCES or self.remasking or (self.threshold, self.factor) != (None, None)):
            raise UserError("expand_token_id commits one position a step, by an alg that has confidences: "
                            "maskgit_plus, entropy or topk_margin, without remasking, threshold and factor")

    @property
    def rewrites(self) -> bool:
        """Whether a committed token may still change."""
        return self.alg in ("p2", "remdm") and self.remasking is None or self.editing_threshold is not None


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    sequences: Tensor  # [B, L] int64
    history: list[Tensor] | None  # the canvas after each step, with output_history
    steps: int  # denoising steps taken, free ones included
    forwards: int  # forward passes of the model
    tokens_per_forward: float  # positions filled / forward passes, each row's counted for itself
    confidence: Tensor  # [B, L] fp32 with which each token was committed (as `alg` ranks them), -inf where none was
    attention_mask: Tensor | None = None  # [B, L] bool, False where a row has ended, if gaps could grow and shrink


OnStep = Callable[["CanvasStep"], None]


def generate(model: DiffusionLM, inputs: Tensor, attention_mask: Tensor | None = None,
             config: MDMGenerationConfig | None = None, on_step: OnStep | None = None) -> GenerationOutput:
    """Append `max_new_tokens` masked positions to each prompt and denoise them.

    Args:
        inputs: [B, P] or [P] int64. Prompts of different lengths are padded, on the left as usual or on the right.
        attention_mask: [B, P], nonzero where there is a token; without it every position counts.
        on_step: called after each step with a `CanvasStep`.
    Returns: sequences [B * num_return_sequences, P + max_new_tokens].
    Raises: UserError if the result would not fit into the model's positions, or nothing names the mask token.
    """
    return finish(start(model, inputs, attention_mask, config), on_step)


def start(model: DiffusionLM, inputs: Tensor, attention_mask: Tensor | None = None,
          config: MDMGenerationConfig | None = None) -> "Denoising":
    """`generate` step by step: `for step in start(...)` takes one at a time, and gives the canvas after it.

    Args and errors: as `generate`.
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
    return Denoising(model, torch.cat((inputs, new), 1), config, attention_mask)


def infill(model: DiffusionLM, prefix_ids: Tensor, suffix_ids: Tensor, *, length: int | str,
           generation_config: MDMGenerationConfig | None = None, on_step: OnStep | None = None) -> GenerationOutput:
    """Denoise `length` masked positions between prefix [B, P] or [P] and suffix [B, S] or [S].

    length: "auto" takes for each row the one of `infill_lengths` that the model is surest of (lengths.py); or, if gaps
        expand, lets them grow from the shortest one.
    The sequences of the output are [B, P + length + S]; with "auto" and several rows, the longest, and attention_mask
    says where each ends.
    """
    config = generation_config or MDMGenerationConfig()
    if length != "auto" and (not isinstance(length, int) or length < 1):
        raise UserError(f"length must be at least 1 or 'auto', not {length!r}: the number of tokens to fill in")
    prefix_ids, suffix_ids = (ids.reshape(1, -1) if ids.ndim == 1 else ids for ids in (prefix_ids, suffix_ids))
    if length != "auto":
        lengths = [length] * len(prefix_ids)
    elif config.expand_token_id is not None:
        lengths = [min(config.infill_lengths)] * len(prefix_ids)
    else:
        from dllm.lengths import choose_lengths

        lengths = choose_lengths(model, prefix_ids, suffix_ids, config)
    canvas, visible = make_gaps(prefix_ids, suffix_ids, lengths, find_mask_token(model, config))
    out = denoise(model, canvas, config, visible, on_step)
    if out.attention_mask is None and not bool(visible.all()):
        out = replace(out, attention_mask=visible.to(out.sequences.device).repeat_interleave(
            config.num_return_sequences, 0))
    return out


def make_gaps(prefix_ids: Tensor, suffix_ids: Tensor, lengths: Sequence[int],
              mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Rows of prefix [B, P], lengths[b] masked positions and suffix [B, S]: the canvas [B, L], padded on the right, and
    [B, L] bool, False where it is."""
    rows = [torch.cat((prefix, prefix.new_full((length,), mask_token_id), suffix))
            for prefix, suffix, length in zip(prefix_ids, suffix_ids, lengths, strict=True)]
    sizes = torch.tensor([len(row) for row in rows])
    return pad_sequence(rows, batch_first=True), torch.arange(int(sizes.max())) < sizes.unsqueeze(1)


class CanvasStep(NamedTuple):
    """The canvas after a denoising step."""

    index: int  # from 0
    tokens: Tensor  # [B, L] int64
    confidence: Tensor | None  # [B, L] fp32 that the step gave, -inf where not scored; None if it was free
    kept: Tensor  # [B, L] fp32 with which each token was committed, -inf where none was
    visible: Tensor | None  # [B, L] bool, False beyond a row's end, where gaps can grow and shrink


class Denoising:
    """A canvas being denoised: iterate over its steps, each a `CanvasStep`; `result()` is what they have come to.

    Args:
        canvas: [B, L] int64; the positions that equal the mask token are filled, the others never change.
        attention_mask: [B, L], nonzero where there is a token; padding is never attended and takes no position.
        sequence: [B] int64 below 2**32, the number by which a row draws its random numbers; by default a prompt's
            copies are numbered from 0. With numbers of their own, num_return_sequences is 1.
        seeds: [B] int64, a seed for each row in the place of the config's; the same conditions.
    A model may predict the mask token itself (the originals allow it); such positions can be left masked at the end. On
    a GPU, steps that commit by count learn of them only at the end of a block: tokens can differ from those of a CPU.
    Raises: UserError if settings, canvas and model do not go together.
    """

    def __init__(self, model: DiffusionLM, canvas: Tensor, config: MDMGenerationConfig,
                 attention_mask: Tensor | None = None, sequence: Tensor | None = None,
                 seeds: Tensor | None = None):
        self.model, self.mask_token_id = model, find_mask_token(model, config)
        if seeds is not None:
            self.seed = seeds.to(model.device).unsqueeze(1)
        else:
            self.seed = draw_seed() if config.seed is None else config.seed
        copies = config.num_return_sequences
        canvas = canvas.to(model.device).repeat_interleave(copies, 0)
        key_mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            key_mask = attention_mask.to(model.device).bool().repeat_interleave(copies, 0)
        if sequence is None:
            sequence = torch.arange(len(canvas)) % copies
        self.sequence = sequence.to(model.device).unsqueeze(1)
        self.causal = model.config.block_causal if config.block_causal is None else config.block_causal
        from_text = config.blocks_from == "text" or (self.causal and config.blocks_from is None)
        if self.causal:
            config = replace(config, block_length=config.block_length or block_length_of(model))
            self.layout = WholeBlocks(canvas, key_mask, config.block_length, self.mask_token_id, not from_text)
            canvas, key_mask = self.layout.canvas, self.layout.key_mask
        self.config = config
        self._check()

        self.tokens, self.key_mask = canvas, key_mask
        self.editable = canvas == self.mask_token_id
        if key_mask is not None:
            self.editable &= key_mask
        self.filled = int(self.editable.sum())
        self.confidence = torch.full(canvas.shape, -torch.inf, device=canvas.device)  # with which each was committed
        self.scorer = self._make_scorer()
        if self.causal or config.blocks_from == "text":
            place = torch.arange(canvas.shape[1], device=canvas.device).expand_as(canvas)
            place = place if self.causal else self.scorer.position_ids
        else:
            place = self.editable.cumsum(1) - 1
        self.blocks = split_into_blocks(self.editable, place, config, even=not (self.causal or from_text))
        self.gap = None
        if config.expand_token_id is not None:
            self.gap = ElasticGap(canvas, model.config.vocab_size, expand=config.expand_token_id,
                                  delete=self.ends[0] if config.delete_eos_token else None,
                                  max_length=config.max_infill_length)
        self.strategy = choose_strategy(config, config.block_length, config.steps)
        self.steps_before = 0  # of a block, beside those that its strategy counts
        if config.cache != "none" and model.config.shift_logits:
            self.strategy, self.steps_before = partial(begin_with_first, then=self.strategy), 1
        # A constraint may keep a step from committing all that the strategy chose, so the last one may be repeated.
        self.steps_after = self.filled if config.constraint is not None and config.constraint.final else 0
        # On a GPU, to count what is left is to wait for it. Where every step commits as many as it was asked to, only
        # the last step of a block does. (A model that predicts the mask token commits fewer.)
        self.recount = (canvas.device.type == "cpu" or config.constraint is not None or config.stop_at_eos
                        or self.gap is not None or (config.remasking or config.alg) == "remdm")
        self.damaged = torch.zeros((), dtype=torch.long, device=canvas.device)  # confidences that were no numbers
        self.history: list[Tensor] = []
        self.steps = 0

    @torch.no_grad()
    def __iter__(self) -> Iterator[CanvasStep]:
        config = self.config
        for number, block, total, columns in self.blocks:
            size = block.sum(1).cpu()
            left = None if self.recount else size
            settled = torch.zeros_like(size, dtype=torch.bool)  # nothing is left to edit
            edits = torch.zeros_like(size)  # steps since no position is masked
            planned = total + self.steps_before
            for count in range(planned + self.steps_after):
                index = min(count, planned - 1)
                masked = (self.tokens == self.mask_token_id) & block
                if left is None or index == planned - 1:
                    left = masked.sum(1).cpu()
                filled = left == 0
                working = ~filled
                if config.editing_threshold is not None:
                    working |= (size > 0) & ~settled & (edits < config.max_post_steps)
                elif config.alg == "remdm" and config.remasking is None:
                    working = size > 0
                if not working.any():
                    break
                before = self.tokens
                # Not by the steps taken: how many a block takes depends on the other rows.
                step = Step(index, total, config.eps, before, masked, block, self.mask_token_id,
                            self._uniform(number * (planned + self.steps_after) + count), self._allowed(masked, block),
                            columns, left, size, working)
                self.scorer.committed = None
                confidence = self._take(step)
                if self.recount or (confidence is not None and self.scorer.committed is None):
                    left = None
                elif confidence is not None:
                    left = left - self.scorer.committed
                if config.editing_threshold is not None:
                    edits += filled
                    settled |= filled & (self.tokens == before).all(1).cpu()
                if self.gap is not None:
                    confidence = self._resize(masked, confidence)
                    block, size = self.editable, self.editable.sum(1).cpu()
                yield self._note(confidence)
            self._check_damage()

    def result(self) -> GenerationOutput:
        """The canvas as it is now."""
        visible = None if self.gap is None else self.key_mask
        filled = self.filled if self.gap is None else int(self.editable.sum())
        return GenerationOutput(
            self._given(self.tokens), self.history if self.config.output_history else None, self.steps,
            self.scorer.forwards, filled / max(self.scorer.row_forwards, 1), self._given(self.confidence), visible)

    def drop(self, row: int) -> None:
        """Fill what is masked in a row with any token, between two steps: nothing more is computed for it."""
        masked = self.editable[row] & (self.tokens[row] == self.mask_token_id)
        self.tokens = self.tokens.clone()
        self.tokens[row, masked] = 0 if self.mask_token_id else 1
        self.recount = True

    def _take(self, step: Step) -> Tensor | None:
        """Let the strategy take a step; the confidences it gave."""
        tokens, confidence = self.strategy(step, self.scorer.at(step))
        if confidence is not None:
            self.damaged += confidence.isnan().sum()
            if self.recount:
                self._check_damage()
        if self.config.constraint is not None:
            tokens = self.config.constraint.keep(step.tokens, tokens, confidence, self._constrained(),
                                                 self.mask_token_id)
        if self.config.stop_at_eos:
            tokens = fill_after_end(tokens, self.editable, self.mask_token_id, self.ends)
        if self.gap is not None and self.config.pad_eos_to_right:
            after = (step.masked & (tokens == self.ends[0])).cumsum(1) > 0
            tokens = torch.where(step.masked & after, self.ends[0], tokens)
        given = self.confidence if confidence is None else confidence
        self.confidence = torch.where(tokens == step.tokens, self.confidence, given)
        self.confidence = self.confidence.masked_fill(tokens == self.mask_token_id, -torch.inf)
        self.tokens = tokens
        return confidence

    def _check_damage(self) -> None:
        if self.damaged:
            raise UserError(f"step {self.steps}: the model's logits at {int(self.damaged)} positions are NaN or "
                            "infinite: its weights are damaged, or too large for its dtype (try float32)")

    def _resize(self, masked: Tensor, confidence: Tensor | None) -> Tensor:
        """Let the gaps grow and shrink by what was committed where `masked`."""
        visible = torch.ones_like(masked) if self.key_mask is None else self.key_mask
        given = torch.full_like(self.confidence, -torch.inf) if confidence is None else confidence
        self.tokens, self.key_mask, (self.editable, kept, given) = self.gap.resize(
            self.tokens, masked, visible, self.mask_token_id, (self.editable, self.confidence, given))
        still_masked = self.tokens == self.mask_token_id
        self.confidence = kept.masked_fill(still_masked | ~self.editable, -torch.inf)
        before, self.scorer = self.scorer, self._make_scorer()
        self.scorer.forwards, self.scorer.row_forwards = before.forwards, before.row_forwards
        return given.masked_fill(~self.editable, -torch.inf)

    def _note(self, confidence: Tensor | None) -> CanvasStep:
        tokens = self._given(self.tokens)
        if self.config.output_history:
            self.history.append(tokens)
        self.steps += 1
        return CanvasStep(self.steps - 1, tokens, None if confidence is None else self._given(confidence),
                          self._given(self.confidence), None if self.gap is None else self.key_mask)

    def _given(self, x: Tensor) -> Tensor:
        """x [B, L] on the canvas that was given."""
        return self.layout.restore(x) if self.causal else x

    def _uniform(self, draw: int) -> Tensor | None:
        config = self.config
        if (config.temperature > 0 or config.alg_temp > 0
                or (config.remasking or config.alg) in ("origin", "random", "remdm")):
            return philox_uniform(self.seed, self.sequence, draw, self.scorer.position_ids)
        return None

    def _allowed(self, masked: Tensor, block: Tensor) -> Tensor | None:
        if self.gap is not None:
            return self.gap.allowed(block)
        if self.config.constraint is not None:
            return self.config.constraint.allowed(self.tokens, self._constrained(), self.mask_token_id)
        return None

    def _constrained(self) -> Tensor:
        """[B, L] bool: the positions to fill, without those that only complete a block."""
        return self.editable & self.layout.real if self.causal else self.editable

    def _make_scorer(self) -> HeadScorer:
        kind = CachedScorer if self.causal else HeadScorer if self.config.cache == "none" else StaleScorer
        positions = number_tokens(self.tokens, self.key_mask, None)
        return kind(self.model, self.config, self.mask_token_id, self.key_mask, positions, ~self.editable)

    @property
    def ends(self) -> list[int]:
        return find_ends(self.model)

    def _check(self):
        config = self.config
        if config.cache != "none" and (self.causal or config.cfg_scale > 0 or config.block_length is None):
            raise UserError(f"cache {config.cache!r} needs a block_length, and neither a block-causal model (which "
                            "keeps its finished blocks anyway) nor cfg_scale")
        if config.cuda_graphs and self.model.device.type != "cuda":
            raise UserError(f"cuda_graphs needs a model on a GPU, this one is on {self.model.device}; leave it out")
        if config.constraint is not None and config.constraint.final and config.rewrites:
            raise UserError("what later tokens were chosen to fit must stay: such a constraint goes with neither p2, "
                            "remdm nor editing_threshold")
        if config.expand_token_id is not None:
            if config.block_length is not None or config.constraint is not None or self.causal:
                raise UserError("expand_token_id goes with neither blocks nor a constraint: they count on positions "
                                "that stay where they are")
            if not 0 <= config.expand_token_id < self.model.config.vocab_size:
                raise UserError(f"expand_token_id {config.expand_token_id} is outside the model's vocabulary of "
                                f"{self.model.config.vocab_size}")


def denoise(model: DiffusionLM, canvas: Tensor, config: MDMGenerationConfig, attention_mask: Tensor | None = None,
            on_step: OnStep | None = None, sequence: Tensor | None = None) -> GenerationOutput:
    """Fill every masked position of the canvas; see `Denoising`.

    on_step: called after each step with a `CanvasStep`.
    """
    return finish(Denoising(model, canvas, config, attention_mask, sequence), on_step)


def finish(denoising: Denoising, on_step: OnStep | None = None) -> GenerationOutput:
    """Take all steps that are left."""
    for step in denoising:
        if on_step is not None:
            on_step(step)
    return denoising.result()


def split_into_blocks(editable: Tensor, place: Tensor, config: MDMGenerationConfig, *,
                      even: bool) -> list[tuple[int, Tensor, int, tuple[int, int]]]:
    """Of each block its number, the positions [B, L] to fill, the denoising steps it gets, and the columns it spans.

    Args:
        place: [B, L] int64, by which the positions are counted off into blocks: among those to fill, or in the row.
        even: whether block_length must divide the positions to fill, and their number the steps, as in LLaDA. Else how
            many blocks there are is for the prompt to say, and each gets an equal whole number of the steps.
    Raises: UserError if block_length does not divide the positions of a row, or the number of blocks the steps.
    """
    longest = int(place[editable].max()) + 1 if editable.any() else 0
    length = config.block_length or max(longest, 1)
    counts = place.masked_fill(~editable, -1).amax(1) + 1 if editable.numel() else editable.sum(1)
    if even and config.block_length is not None and (uneven := counts[counts % length > 0]).numel():
        raise UserError(f"block_length {length} does not divide the {int(uneven[0])} positions to fill; choose one "
                        "that does")
    numbers = (place // length)[editable].unique().tolist()
    if config.editing_threshold is not None:
        steps = length + config.max_post_steps
    elif config.remasking != "low_confidence_dynamic" and (config.threshold, config.factor) != (None, None):
        steps = length  # as many as it takes
    elif even and config.steps % max(len(numbers), 1):
        raise UserError(f"steps must be a multiple of the {len(numbers)} blocks of {length} positions, not "
                        f"{config.steps}; {-(-config.steps // len(numbers)) * len(numbers)} would be")
    elif config.steps < len(numbers):
        raise UserError(f"steps must be at least {len(numbers)}, one for each of the blocks of {length} positions, not "
                        f"{config.steps}")
    else:
        steps = config.steps // max(len(numbers), 1)
    blocks = []
    for number in numbers:
        block = editable & (place // length == number)
        columns = block.any(0).nonzero().flatten()
        start, end = int(columns[0]), int(columns[-1]) + 1
        if config.cache != "none" and not block[block.any(1), start:end].all():
            raise UserError(f"cache {config.cache!r} needs the positions to fill of all rows in the same columns, one "
                            "after the other; pad prompts on the left")
        blocks.append((number, block, steps, (start, end)))
    return blocks


def block_length_of(model: DiffusionLM) -> int:
    """Positions of a block of a block-causal model."""
    return model.config.block_length or BLOCK_LENGTH


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
