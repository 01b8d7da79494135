"""The denoising loop: fills the masked positions of a canvas by any strategy of strategies.py.

Each step runs the model once, on the rows that still change, and multiplies the head only at the positions that the
strategy asks about (scorers.py). A row's random numbers depend on the seed, its own tokens, how many rows before it
have the same, the step and the position. So a prompt gives the same text alone and in any batch, its copies give
others, and different prompts draw independently.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dllm.diffusion.uniform import Noise
from dllm.errors import UserError
from dllm.generation.ancestral import Patience, begin_with_noise, renoise
from dllm.generation.canvas import (
    AsGiven,
    Block,
    ElasticGap,
    WholeBlocks,
    counts_from_text,
    fill_after_end,
    fit_blocks,
    split_into_blocks,
)
from dllm.generation.checks import check_constraint, check_settings, find_ends, find_mask_token
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.drafting import DraftScorer, plan_drafts
from dllm.generation.editing import begin_edits
from dllm.generation.inputs import read_prompts
from dllm.generation.output import CanvasStep, GenerationOutput, OnStep
from dllm.generation.renoising import Renoising
from dllm.generation.rows import contents_of, draw_seed, name_rows, number_equal
from dllm.generation.scorers import CachedScorer, EditScorer, HeadScorer, StaleScorer
from dllm.generation.steps import Step, Update
from dllm.generation.strategies import begin_with_first, choose_strategy, has_converged
from dllm.model.transformer import Transformer
from dllm_kernels import philox_uniform


def generate(model: Transformer, inputs: Any, attention_mask: Any = None,
             config: MDMGenerationConfig | None = None, on_step: OnStep | None = None) -> GenerationOutput:
    """Append `max_new_tokens` masked positions to each prompt and denoise them.

    Args:
        inputs: [B, P] or [P] whole numbers, or a tokenizer's output; see `inputs.read_prompts`. Prompts of different
            lengths are padded, on the left or on the right.
        attention_mask: [B, P], one where there is a token; without it every position counts.
        on_step: called after each step with a `CanvasStep`.
    Returns: sequences [B * num_return_sequences, P + max_new_tokens].
    Raises: UserError if the result would not fit into the model's positions, or nothing names the mask token.
    """
    return finish(start(model, inputs, attention_mask, config), on_step)


def start(model: Transformer, inputs: Any, attention_mask: Any = None,
          config: MDMGenerationConfig | None = None) -> "Denoising | Renoising":
    """`generate` step by step: `for step in start(...)` takes one step at a time and gives the canvas after it.

    Args and errors: as `generate`.
    """
    config = config or MDMGenerationConfig()
    inputs, attention_mask = read_prompts(model, inputs, attention_mask)
    limit = model.config.max_position_embeddings
    if inputs.shape[1] + config.max_new_tokens > limit:
        raise UserError(f"a prompt of {inputs.shape[1]} tokens and {config.max_new_tokens} new ones need "
                        f"{inputs.shape[1] + config.max_new_tokens} positions, the model has {limit}; "
                        "shorten the prompt or lower max_new_tokens")
    new = inputs.new_full((len(inputs), config.max_new_tokens), find_mask_token(model, config))
    if attention_mask is not None:
        attention_mask = torch.cat((attention_mask, torch.ones_like(new, dtype=torch.bool)), 1)
    return begin(model, torch.cat((inputs, new), 1), config, attention_mask)


def begin(model: Transformer, canvas: Tensor, config: MDMGenerationConfig, attention_mask: Tensor | None = None,
          sequence: Tensor | None = None, seeds: Tensor | None = None,
          editable: Tensor | None = None) -> "Denoising | Renoising":
    """`Denoising` of a canvas, by the loop that the model is for."""
    if model.config.canvas_length is not None:
        return Renoising(model, canvas, config, attention_mask, sequence, seeds)
    return Denoising(model, canvas, config, attention_mask, sequence, seeds, editable)


class RowCounts:
    """Counts of a block's rows on the CPU, [B] each, so that most steps need not wait for a GPU."""

    def __init__(self, editable: Tensor):
        self.size = editable.sum(1).cpu()  # positions to fill
        self.left: Tensor | None = self.size  # of these, still masked; None: to be counted
        self.settled = torch.zeros_like(self.size, dtype=torch.bool)  # the last editing step changed nothing
        self.edits = torch.zeros_like(self.size)  # editing steps since the row has no masked position
        self.patience = Patience(len(self.size))


class Denoising:
    """A canvas being denoised: iterate over its steps, each a `CanvasStep`; `result()` is the state so far.

    Args:
        canvas: [B, L] int64; the positions that equal the mask token are filled, the others never change.
        attention_mask: [B, L], nonzero where there is a token; padding is never attended and takes no position.
        sequence: [B] int64 below 2**32, the number by which a row draws its random numbers; by default the `name_rows`
            of its tokens and its number among equal rows. With numbers of their own, num_return_sequences is 1.
        seeds: [B] int64, a seed for each row instead of the config's; the same conditions.
        editable: [B, L] bool, with alg "edit": the tokens that are edited; None: the masked positions are gaps, filled
            with as many tokens at most.
    A model may predict the mask token itself (the originals allow it); such positions can stay masked at the end. On a
    GPU, steps that commit by count learn of them only at the end of a block, so tokens can differ from those of a CPU.
    Raises: UserError if settings, canvas and model do not go together.
    """

    def __init__(self, model: Transformer, canvas: Tensor, config: MDMGenerationConfig,
                 attention_mask: Tensor | None = None, sequence: Tensor | None = None,
                 seeds: Tensor | None = None, editable: Tensor | None = None):
        self.model, self.mask_token_id = model, find_mask_token(model, config)
        self.causal = model.config.block_causal if config.block_causal is None else config.block_causal
        if config.speculates:
            config, self.causal = plan_drafts(model, config), False  # one block, written from left to right
        if self.causal:
            config = fit_blocks(model, config)
        self.config = config
        check_settings(model, config, self.causal)
        self._lay_out(canvas.to(model.device), attention_mask)
        if config.constraint is not None:
            check_constraint(model, config.constraint, self._constrained(), self.key_mask)
        self._number_rows(sequence, seeds)
        self.text = None
        if config.method == "ancestral":
            noise = Noise.of(model.config, self.mask_token_id)
            self.renoise = partial(renoise, noise=noise, greedy=config.greedy_end)
            self.tokens = begin_with_noise(noise, self.tokens, self.editable, self.key_mask, self.seed, self.sequence)
        if config.edits:
            self.text = begin_edits(model, config, self.tokens, self.key_mask, editable, self.mask_token_id,
                                    self.seed, self.sequence)
            self._show_text()
            self.confidence = torch.full(self.tokens.shape, -torch.inf, device=self.tokens.device)
        self.scorer = self._make_scorer()
        self.blocks = self._split()
        self._choose_strategy()
        self.damaged = torch.zeros((), dtype=torch.long, device=model.device)  # confidences that were NaN
        self.history: list[Tensor] = []
        self.steps = 0

    def _lay_out(self, canvas: Tensor, attention_mask: Tensor | None) -> None:
        """The working canvas: tokens, key_mask (None: no padding), editable, confidence, each [B, L]."""
        copies = self.config.num_return_sequences
        canvas, key_mask = canvas.repeat_interleave(copies, 0), None
        if attention_mask is not None and not bool(attention_mask.all()):
            key_mask = attention_mask.to(canvas.device).bool().repeat_interleave(copies, 0)
        self.contents = contents_of(canvas, key_mask)
        if self.causal:
            self.layout = WholeBlocks(canvas, key_mask, self.config.block_length, self.mask_token_id,
                                      from_masked=not self.from_text)
        else:
            self.layout = AsGiven(canvas, key_mask)
        self.tokens, self.key_mask = self.layout.canvas, self.layout.key_mask
        self.editable = self.tokens == self.mask_token_id
        if self.key_mask is not None:
            self.editable &= self.key_mask
        self.filled = int(self.editable.sum())
        # The confidence with which each token was committed.
        self.confidence = torch.full(self.tokens.shape, -torch.inf, dtype=torch.float32, device=canvas.device)

    def _show_text(self) -> None:
        self.tokens, self.editable, self.key_mask = self.text.tokens, self.text.editable, self.text.visible

    def _number_rows(self, sequence: Tensor | None, seeds: Tensor | None) -> None:
        if sequence is None:
            sequence = name_rows(self.contents, number_equal(self.contents))
        self.sequence = sequence.to(self.tokens.device).unsqueeze(1)
        if seeds is not None:
            self.seed = seeds.to(self.tokens.device).unsqueeze(1)
        else:
            self.seed = draw_seed() if self.config.seed is None else self.config.seed

    @property
    def from_text(self) -> bool:
        """Whether blocks are counted from the first token, instead of the first masked position."""
        return counts_from_text(self.model, self.config)

    def _split(self) -> list[Block]:
        if self.text is not None:
            steps = torch.full((len(self.tokens),), self.config.steps, device="cpu")
            return [Block(self.text.open, steps, (0, self.tokens.shape[1]))] if self.text.open.any() else []
        if self.config.window_blocks > 1:  # the strategy opens its blocks
            sizes = self.editable.sum(1).cpu()
            return [Block(self.editable, sizes.clamp(min=1), (0, 0))] if sizes.any() else []
        if self.causal:
            place = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        elif self.from_text:
            place = self.scorer.position_ids
        else:
            place = self.editable.cumsum(1) - 1
        return split_into_blocks(
            self.editable, place, self.config, even=not (self.causal or self.from_text),
            first_alone=self.config.sub_block_length is not None and self.model.config.shift_logits)

    def _choose_strategy(self) -> None:
        config = self.config
        self.gap = None
        if config.expand_token_id is not None:
            real = torch.ones_like(self.editable) if self.key_mask is None else self.key_mask
            self.gap = ElasticGap((real & ~self.editable).sum(1), self.model.config.vocab_size,
                                  expand=config.expand_token_id,
                                  delete=self.ends[0] if config.delete_eos_token else None,
                                  max_length=config.max_infill_length,
                                  positions=self.model.config.max_position_embeddings)
        self.steps_before = 0  # steps of a block that its strategy does not count
        if config.method == "ancestral":
            self.strategy, self.steps_before = self.renoise, config.correction_steps
        else:
            self.strategy = choose_strategy(config, config.block_length, config.steps)
        if config.cache != "none" and self.model.config.shift_logits:
            self.strategy, self.steps_before = partial(begin_with_first, then=self.strategy), 1
        # A constraint may keep a step from committing all that the strategy chose; then the last step is repeated.
        again = config.constraint is not None and config.constraint.final
        self.steps_after = self.editable.sum(1).cpu() if again else None
        # Counting the masked positions waits for a GPU. Where every step commits as many as the strategy chose, only
        # the last step of a block counts. (A model that predicts the mask token commits fewer.)
        self.recount = (self.tokens.device.type == "cpu" or config.constraint is not None or config.stop_at_eos
                        or self.gap is not None or config.remasks_at_random)

    @torch.no_grad()
    def __iter__(self) -> Iterator[CanvasStep]:
        for block in self.blocks:
            yield from self._denoise_block(block)
            self._check_damage()

    def _denoise_block(self, block: Block) -> Iterator[CanvasStep]:
        rows, editable = RowCounts(block.editable), block.editable if self.text is None else self.editable
        steps, after = block.steps, self.steps_after
        same = after is None and len({*steps[rows.size > 0].tolist()}) == 1  # then numbers do, which cost less
        if same:
            steps = int(steps[rows.size > 0][0])
        planned = steps + self.steps_before
        most = planned if same else planned + (0 if after is None else after)
        if self.recount:
            rows.left = None
        for count in range(most if same else int(most[rows.size > 0].max())):
            index = min(count, planned - 1) if same else (planned - 1).clamp(max=count)
            masked = (self.tokens == self.mask_token_id) & editable
            last = index == planned - 1
            if rows.left is None or (last if same else (last & (rows.left > 0)).any()):
                rows.left = masked.sum(1).cpu()
            working = self._working(rows)
            if not same:
                working = torch.where(count >= planned, rows.left > 0, working)  # repeated steps only fill
                if (over := count >= most).any():  # rows of fewer steps
                    masked = masked & ~over.to(masked.device, non_blocking=True).unsqueeze(1)
                    working, rows.left = working & ~over, torch.where(over, 0, rows.left)
            if not working.any():
                break
            step = Step(index, steps, self.config.eps, self.tokens, masked, editable, self.mask_token_id,
                        self._uniform(count), self._allowed(masked, editable), block.columns, rows.left, rows.size,
                        working, *(() if self.text is None else (self.text.open, self.text.room)))
            update = self._take(step)
            confidence = update.confidence
            self._count(rows, step, update)
            if self.gap is not None:
                confidence = self._resize(masked, confidence)
                editable, rows.size = self.editable, self.editable.sum(1).cpu()
            if self.text is not None:
                confidence = self._edit(step, update)
                editable = self.editable
            yield self._note(confidence, None if update.inserted is None else update)

    def _working(self, rows: RowCounts) -> Tensor:
        """[B] bool: the rows that this step may change."""
        if self.config.revises:
            editing = (rows.size > 0) & ~rows.settled & (rows.edits < self.config.max_post_steps)
            return (rows.left > 0) | editing
        every_step = self.config.remasks_at_random or self.config.edits
        return (rows.size > 0) & ~rows.settled if every_step else rows.left > 0

    def _count(self, rows: RowCounts, step: Step, update: Update) -> None:
        """Update the counts after a step."""
        if update.agreement is not None:
            rows.settled |= rows.patience.is_over(update.agreement, (self.tokens != step.tokens).any(1))
        elif self.config.method == "soft_parallel":
            rows.settled |= has_converged(step, self.tokens, update.confidence)
        elif self.config.revises:
            filled = step.left == 0
            rows.edits += filled
            rows.settled |= filled & (self.tokens == step.tokens).all(1).cpu()
        if self.recount:
            rows.left = None
        elif update.confidence is not None:
            rows.left = None if self.scorer.committed is None else rows.left - self.scorer.committed

    def result(self) -> GenerationOutput:
        """The canvas as it is now."""
        restore = self.layout.restore
        moves = self.gap is not None or self.text is not None
        filled = int(self.editable.sum()) if moves else self.filled
        return GenerationOutput(
            restore(self.tokens), self.history if self.config.output_history else None, self.steps,
            self.scorer.forwards, filled / max(self.scorer.row_forwards, 1), restore(self.confidence),
            self.key_mask if moves else None)

    def drop(self, row: int) -> None:
        """Between two steps: fill the masked positions of a row with any token, and edit it no more, so that it costs
        nothing more."""
        if self.text is not None:
            self.text.close(row)
            return
        masked = self.editable[row] & (self.tokens[row] == self.mask_token_id)
        self.tokens = self.tokens.clone()
        self.tokens[row, masked] = 0 if self.mask_token_id else 1
        self.recount = True

    def _take(self, step: Step) -> Update:
        """Let the strategy take a step."""
        self.scorer.committed = None
        update = self.strategy(step, self.scorer.at(step))
        tokens, confidence = update.tokens, update.confidence
        if self.text is not None:
            self.damaged += self.scorer.damaged
            self._check_damage()
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
        stays = tokens == step.tokens
        if self.config.method == "ancestral":  # every token is chosen again in every step
            stays = given == -torch.inf
        self.confidence = torch.where(stays, self.confidence, given)
        self.confidence = self.confidence.masked_fill(tokens == self.mask_token_id, -torch.inf)
        self.tokens = tokens
        return update

    def _edit(self, step: Step, update: Update) -> Tensor | None:
        """Let the texts change by the tokens that a step deletes and inserts."""
        if update.inserted is None:
            return update.confidence
        missing = torch.full_like(self.confidence, -torch.inf)
        substituted, inserted = (missing if given is None else given for given in (
            update.confidence, update.inserted_confidence))
        for given in (substituted, inserted):
            self.damaged += given.isnan().sum()
        changed = (update.deleted | (update.inserted >= 0) | (update.tokens != step.tokens)).any(1)
        self.confidence, given = self.text.apply(update._replace(tokens=self.tokens), (
            (self.confidence, inserted), (substituted, inserted)))
        self._show_text()
        self.confidence, given = (x.masked_fill(~self.editable, -torch.inf) for x in (self.confidence, given))
        self.scorer = EditScorer(self.model, self.config, self.mask_token_id, self.text, self.scorer, changed)
        return given

    def _check_damage(self) -> None:
        if self.damaged:
            raise UserError(f"step {self.steps}: the model's logits at {int(self.damaged)} positions are NaN or "
                            "infinite: its weights are damaged, or too large for its dtype (try float32)")

    def _resize(self, masked: Tensor, confidence: Tensor | None) -> Tensor:
        """Let the gaps grow and shrink by the tokens committed where `masked`."""
        visible = torch.ones_like(masked) if self.key_mask is None else self.key_mask
        given = torch.full_like(self.confidence, -torch.inf) if confidence is None else confidence
        self.tokens, self.key_mask, (self.editable, kept, given) = self.gap.resize(
            self.tokens, masked, visible, self.mask_token_id, (self.editable, self.confidence, given))
        still_masked = self.tokens == self.mask_token_id
        self.confidence = kept.masked_fill(still_masked | ~self.editable, -torch.inf)
        before, self.scorer = self.scorer, self._make_scorer()
        self.scorer.forwards, self.scorer.row_forwards = before.forwards, before.row_forwards
        return given.masked_fill(~self.editable, -torch.inf)

    def _note(self, confidence: Tensor | None, edits: Update | None) -> CanvasStep:
        restore = self.layout.restore  # from whole blocks to the canvas that was given
        tokens = restore(self.tokens)
        if self.config.output_history:
            self.history.append(tokens)
        self.steps += 1
        return CanvasStep(self.steps - 1, tokens, None if confidence is None else restore(confidence),
                          restore(self.confidence), self.key_mask if self.gap or self.text else None, edits)

    def _uniform(self, draw: int) -> Tensor | None:
        config = self.config
        draw = 0 if config.speculates else draw  # a position has one number, whichever step commits it
        calls = 4 if config.edits else 2 if config.method == "ancestral" else 1  # of two numbers a position
        if calls > 1:
            return torch.cat([philox_uniform(self.seed, self.sequence, calls * draw + part, self.scorer.position_ids)
                              for part in range(calls)], -1)
        if config.temperature > 0 or config.alg_temp > 0 or config.method in ("origin", "random", "remdm", "flow"):
            return philox_uniform(self.seed, self.sequence, draw, self.scorer.position_ids)
        return None

    def _allowed(self, masked: Tensor, editable: Tensor) -> Callable[[], Tensor] | None:
        if self.gap is not None:
            return partial(self.gap.allowed, editable)
        if self.config.constraint is not None:
            return partial(self.config.constraint.allowed, self.tokens, self._constrained(), self.mask_token_id,
                           editable if self.config.rewrites else masked)
        return None

    def _constrained(self) -> Tensor:
        """[B, L] bool: the positions to fill, without those that only complete a block."""
        return self.editable & self.layout.real

    def _make_scorer(self) -> HeadScorer:
        if self.text is not None:
            return EditScorer(self.model, self.config, self.mask_token_id, self.text)
        kind = CachedScorer if self.causal else HeadScorer if self.config.cache == "none" else StaleScorer
        kind = DraftScorer if self.config.speculates else kind
        return kind(self.model, self.config, self.mask_token_id, self.key_mask, ~self.editable)

    @property
    def ends(self) -> list[int]:
        named = self.config.eos_token_id
        return find_ends(self.model) if named is None else [*named]


def denoise(model: Transformer, canvas: Tensor, config: MDMGenerationConfig, attention_mask: Tensor | None = None,
            on_step: OnStep | None = None, sequence: Tensor | None = None) -> GenerationOutput:
    """Fill every masked position of the canvas; see `Denoising`.

    on_step: called after each step with a `CanvasStep`.
    """
    return finish(begin(model, canvas, config, attention_mask, sequence), on_step)


def finish(denoising: Denoising | Renoising, on_step: OnStep | None = None) -> GenerationOutput:
    """Take all remaining steps."""
    for step in denoising:
        if on_step is not None:
            on_step(step)
    return denoising.result()


