"""Writing canvas after canvas from random words (DiffusionGemma, arXiv:2608.00146): the loop of models that renoise.

A canvas of C tokens begins as uniform noise over the vocabulary. In each step the decoder says what every position
holds; the surest positions take a sampled word (`accept_within_entropy`), all others new noise, so that a word that was
accepted may be noise again. The text of a canvas is its likeliest words in the step in which they are stable and sure.
It is then encoded, and the next canvas begins. Temperatures fall over a canvas' steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dllm.errors import UserError
from dllm.generation.canvas import AsGiven
from dllm.generation.checks import NO_MASK, check_prompts, check_renoising
from dllm.generation.config import DEFAULT_STEPS, MDMGenerationConfig
from dllm.generation.output import CanvasStep, GenerationOutput
from dllm.generation.rows import contents_of, draw_seed, name_rows, number_equal
from dllm.generation.strategies import accept_within_entropy
from dllm.model.diffusion_gemma import Context, DiffusionGemma
from dllm_kernels import linear_denoiser_statistics, philox_uniform

# Of (canvas, step): uniforms [B, C, 2] float64, of which [..., 0] picks the word and [..., 1] the noise. Step 0 is the
# noise that the canvas begins with, the denoising steps count from 1.
Draws = Callable[[int, int], Tensor]


class Renoising:
    """Texts being continued: iterate over the steps, each a `CanvasStep`; `result()` is the state so far.

    The face of `sampler.Denoising`. A step's tokens are the likeliest ones, and may change until `settled` [B, L] says
    that they do not; their confidence is minus the entropy, in nats. Canvases that have not begun hold `NO_MASK`. Rows
    do not depend on each other, and one that is done leaves.

    Args:
        canvas: [B, L] int64, in each row a prompt, then `NO_MASK` where the text goes on.
        attention_mask: [B, L], nonzero where there is no padding; None: nowhere.
        sequence, seeds: as of `Denoising`.
        draws: random numbers to take instead of Philox's, of all rows with their copies.
    Raises: UserError if settings, prompts and model do not go together.
    """

    mask_token_id = NO_MASK

    def __init__(self, model: DiffusionGemma, canvas: Tensor, config: MDMGenerationConfig,
                 attention_mask: Tensor | None = None, sequence: Tensor | None = None, seeds: Tensor | None = None,
                 draws: Draws | None = None):
        check_renoising(model, config)
        if config.steps == DEFAULT_STEPS:  # nobody chose it
            config = replace(config, steps=model.generation_defaults["max_denoising_steps"])
        self.model, self.config, self.draws = model, config, draws
        self._lay_out(canvas.to(model.device), attention_mask)
        check_prompts(model, self.canvas, self.real)
        self.ends = torch.tensor(config.eos_token_id or model.end_token_ids, dtype=torch.long, device=model.device)
        self.pad = model.config.pad_token_id or 0
        if sequence is None:
            contents = contents_of(self.canvas, self.real & ~self.gap)
            sequence = name_rows(contents, number_equal(contents))
        self.sequence = sequence.to(model.device).unsqueeze(1)
        if seeds is not None:
            self.seed = seeds.to(model.device).unsqueeze(1)
        else:
            self.seed = draw_seed() if config.seed is None else config.seed
        self.working = self.sequence.new_empty(0)  # [R] rows whose canvas is not done
        self.history: list[Tensor] = []
        self.steps = self.forwards = self.row_forwards = self.written = 0

    def _lay_out(self, canvas: Tensor, attention_mask: Tensor | None) -> None:
        """The canvas as it was given, and the new text [B, K C] that goes where it has `NO_MASK`."""
        copies, length = self.config.num_return_sequences, self.config.block_length or self.model.config.canvas_length
        self.canvas = canvas = canvas.repeat_interleave(copies, 0)
        self.real = torch.ones_like(canvas, dtype=torch.bool)
        if attention_mask is not None:
            self.real = attention_mask.to(canvas.device).bool().repeat_interleave(copies, 0)
        self.layout = AsGiven(canvas, None if bool(self.real.all()) else self.real)
        self.gap = (canvas == NO_MASK) & self.real
        self.wanted = self.gap.sum(1)  # tokens of each row
        self.length = length
        self.canvases = -(-int(self.wanted.max()) // length) if len(canvas) else 0
        self.text = canvas.new_full((len(canvas), self.canvases * length), NO_MASK)
        self.sure = torch.full(self.text.shape, -torch.inf, device=canvas.device)
        self.done = torch.zeros_like(self.text, dtype=torch.bool)  # words that stay
        self.ended = self.wanted == 0

    def _shown(self, new: Tensor, given: Tensor) -> Tensor:
        """What belongs to the new text [B, K C], on the canvas [B, L]; elsewhere what was given there."""
        wanted = torch.arange(new.shape[1], device=new.device) < self.wanted.unsqueeze(1)
        return given.masked_scatter(self.gap, new[wanted])

    @property
    def settled(self) -> Tensor:
        """[B, L] bool, the words that stay."""
        return self._shown(self.done, torch.ones_like(self.gap))

    @torch.no_grad()
    def __iter__(self) -> Iterator[CanvasStep]:
        context, alive = self._encode_prompts(), torch.arange(len(self.canvas), device=self.canvas.device)
        for number in range(self.canvases):
            stay = ~self.ended[alive]
            context, alive = (context, alive) if bool(stay.all()) else (context.take(stay), alive[stay])
            if not len(alive):
                return
            if number > 0:
                self.model.encode(self.text[alive, self._columns(number - 1)], context)
            self.working, self.context, self.soft, self.argmaxes = alive, context, None, []
            self.noisy = self._noise(self._draw(number, 0))  # [R, C], what the decoder gets
            for index in range(self.config.steps):
                if not len(self.working):
                    break
                yield self._step(number, index)

    def _encode_prompts(self) -> Context:
        """The prompts, padded on the left, so that what follows each is next to it."""
        context, given = Context(), self.real & ~self.gap
        order = given.long().argsort(dim=1, stable=True)[:, len(given[0]) - int(given.sum(1).max()):]
        mask = given.gather(1, order)
        ids = self.canvas.gather(1, order).masked_fill(~mask, self.pad)
        copies = self.config.num_return_sequences
        if ids.shape[1]:
            self.model.encode(ids[::copies], context, None if bool(mask.all()) else mask[::copies])
        return context if copies == 1 else context.take(torch.arange(len(ids), device=ids.device) // copies)

    def _columns(self, number: int) -> slice:
        """Of the text, those of a canvas."""
        return slice(number * self.length, (number + 1) * self.length)

    def _draw(self, number: int, step: int) -> Tensor:
        """Uniforms [R, C, 2] of the working rows."""
        if self.draws is not None:
            return self.draws(number, step)[self.working]
        place = torch.arange(self.length, device=self.canvas.device).expand(len(self.working), -1)
        seed = self.seed if isinstance(self.seed, int) else self.seed[self.working]
        return philox_uniform(seed, self.sequence[self.working], number * (self.config.steps + 1) + step, place)

    def _noise(self, uniform: Tensor) -> Tensor:
        """Words [R, C], each of the vocabulary as likely as any other."""
        words = self.model.config.vocab_size
        return (uniform[..., 1] * words).long().clamp(max=words - 1)

    def _step(self, number: int, index: int) -> CanvasStep:
        config, model = self.config, self.model
        left = config.steps - index
        hidden = model.decode(self.noisy, self.context, self.soft)
        uniform = self._draw(number, index + 1)
        found = linear_denoiser_statistics(
            hidden, model.head_weight, None, softcap=model.config.logit_softcap, soft=left > 1,
            generator=uniform.flatten(0, 1),
            temperature=config.t_min + (config.t_max - config.t_min) * left / config.steps)
        token, argmax, entropy = (x.view(self.noisy.shape) for x in (found.token, found.argmax, found.entropy))
        self.soft = None if found.soft is None else found.soft.view(hidden.shape)
        accepted = accept_within_entropy(entropy, config.entropy_bound)
        self.noisy = torch.where(accepted, token, self._noise(uniform))
        done, damaged = torch.stack((self._stopped(argmax, entropy), ~entropy.isfinite().all(1))).cpu()  # the one wait
        self._check_damage(damaged)
        if left == 1:
            done = torch.ones_like(done)
        self.forwards, self.row_forwards = self.forwards + 1, self.row_forwards + len(argmax)
        here = self._columns(number)
        scored = torch.full_like(self.sure, -torch.inf)
        scored[self.working, here] = confidence = -entropy
        self.text[self.working, here], self.sure[self.working, here] = argmax, confidence
        if done.any():
            self._finish(number, done.to(argmax.device))
        return self._note(scored)

    def _stopped(self, argmax: Tensor, entropy: Tensor) -> Tensor:
        """[R] bool: the likeliest words are those of the steps before, and sure."""
        wanted = self.config.stability_threshold
        before = self.argmaxes[-wanted:] if wanted else []
        stable = torch.full_like(self.working, len(before) == wanted, dtype=torch.bool)
        for other in before:
            stable &= (argmax == other).all(1)
        self.argmaxes = [*before, argmax]
        return stable & (entropy.mean(1) < self.config.confidence_threshold)

    def _finish(self, number: int, done: Tensor) -> None:
        """Keep the words of the working rows that are `done` [R], up to an end of text, and leave these rows out of
        further steps."""
        rows, here = self.working[done], self._columns(number)
        is_end = torch.isin(self.text[rows, here], self.ends)
        after = is_end.cumsum(1) > is_end
        self.text[rows, here] = self.text[rows, here].masked_fill(after, self.pad)
        self.sure[rows, here] = self.sure[rows, here].masked_fill(after, -torch.inf)
        self.done[rows, here] = True
        place = torch.arange(here.start, here.stop, device=rows.device)
        self.written += int((~after & (place < self.wanted[rows].unsqueeze(1))).sum())
        for row in rows[is_end.any(1) | (self.wanted[rows] <= here.stop)].tolist():
            self._end(row)
        self._keep(~done)

    def _end(self, row: int) -> None:
        """What is not written of a row is padding."""
        self.text[row] = torch.where(self.text[row] == NO_MASK, self.pad, self.text[row])
        self.done[row], self.ended[row] = True, True

    def _keep(self, stay: Tensor) -> None:
        """Leave the working rows where `stay` [R] is False out of further steps."""
        self.soft = None if self.soft is None else self.soft[stay]
        self.working, self.noisy, self.context = self.working[stay], self.noisy[stay], self.context.take(stay)
        self.argmaxes = [argmax[stay] for argmax in self.argmaxes]

    def _note(self, scored: Tensor) -> CanvasStep:
        self.steps += 1
        tokens, nothing = self._shown(self.text, self.canvas), torch.full_like(self.gap, -torch.inf, dtype=torch.float)
        if self.config.output_history:
            self.history.append(tokens)
        return CanvasStep(self.steps - 1, tokens, self._shown(scored, nothing), self._shown(self.sure, nothing), None)

    def _check_damage(self, damaged: Tensor) -> None:
        if damaged.any():
            raise UserError(f"step {self.steps}: the model's logits in {int(damaged.sum())} texts are NaN or infinite: "
                            "its weights are damaged, or too large for its dtype (try float32)")

    def drop(self, row: int) -> None:
        """Between two steps: end the text of a row, which costs nothing more."""
        self._end(row)
        if len(self.working):
            self._keep(self.working != row)

    def result(self) -> GenerationOutput:
        """The texts as they are now. tokens_per_forward: tokens up to each row's end / decoder passes of the row."""
        nothing = torch.full_like(self.gap, -torch.inf, dtype=torch.float)
        return GenerationOutput(self._shown(self.text, self.canvas),
                                self.history if self.config.output_history else None, self.steps, self.forwards,
                                self.written / max(self.row_forwards, 1), self._shown(self.sure, nothing))
