"""Many requests on one model: all of them take their next denoising step in one forward pass.

One thread drives the model. Each cohort (requests of the same settings that began together, one batch of the sampler)
runs in a greenlet, as if it were alone. A cohort that asks the model for hidden states is suspended; when all cohorts
have asked, their calls are computed together. So requests of any length, method and cache join and leave between
denoising steps, and the denoising loop is the sampler's own.
"""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from dllm.errors import Failure, UserError
from dllm.generation.checks import find_mask_token
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.infilling import Gap, find_texts, lay_out, settle_length
from dllm.generation.rows import contents_of, name_rows
from dllm.generation.sampler import begin
from dllm.model.layouts import Cached, Padded
from dllm.model.ragged import Call, Ragged
from dllm.model.transformer import Transformer

BETWEEN_STEPS = 0.02  # seconds at most, of all cohorts together, that constraints may take between two steps
IDLE = 0.2  # seconds more that a cohort may take for steps that do not ask the model; giving way costs it a round


class Busy(Failure):
    """The queue is full."""


class Ending(Failure):
    """The server takes no more."""


class TooLate(Failure):
    """The request has exceeded its deadline."""


@dataclass(slots=True)
class Progress:
    """One text after a denoising step."""

    tokens: list[int]  # in the gap, masked ones included
    confidence: list[float]  # of each token when it was committed, -inf where masked
    steps: int  # denoising steps of this text that needed the model
    forwards: int  # forward passes that included this text
    done: bool


@dataclass(eq=False, slots=True)
class Job:
    """A gap to fill, in one or more copies.

    config: needs a seed; num_return_sequences is the number of copies.
    notify: called from the scheduler's thread with (copy, Progress), or once with (None, exception) at a failure.
    every_step: notify after every step, not only after the last one.
    """

    gap: Gap
    config: MDMGenerationConfig
    notify: Callable[[int | None, Any], None]
    every_step: bool = False
    deadline: float | None = None  # on time.monotonic()'s clock
    stops: Callable[[list[int]], bool] | None = None  # True: a text that begins with these tokens is complete
    first: int = 0  # copies of the same gap, by the same seed, in other jobs before this one
    cancelled: bool = False
    open: set[int] = field(default_factory=set)  # unfinished copies

    def __post_init__(self):
        if self.config.seed is None:
            raise ValueError("a job needs a seed, so that it can be repeated")
        self.open = set(range(self.copies))

    @property
    def copies(self) -> int:
        return self.config.num_return_sequences

    def fail(self, error: Exception) -> None:
        if self.open and not self.cancelled:
            self.notify(None, error)
        self.open.clear()

    def check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.fail(TooLate("the time of a request is over; ask for fewer tokens or steps"))


def give_way(more: float = 0.0) -> None:
    """Let the other cohorts take their step, if this one has used up its share of the time between two steps, and so
    many seconds more.

    Called in the midst of long work other than the model's.
    """
    cohort = getcurrent()
    if cohort.parent is not None and time.monotonic() > cohort.give_way_at + more:
        cohort.parent.switch(None)


class SharedModel:
    """The model as a cohort sees it; the scheduler computes its forward passes together with those of the others."""

    def __init__(self, model: Transformer):
        self._model = model

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def hidden_states(self, input_ids: Tensor, layout: Padded | Cached, *, predicted: Tensor | None = None) -> Tensor:
        if layout.queries is None:  # calls that are computed together say what they want
            places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            layout = replace(layout, queries=places)
        return getcurrent().parent.switch(Call(input_ids, layout, predicted))


@dataclass(eq=False, slots=True)
class Cohort:
    jobs: list[Job]
    greenlet: greenlet
    call: Call | None = None  # the forward pass that it waits for; None: it has given way, and goes on at once
    answer: Tensor | Exception | None = None
    ended: bool = False  # all jobs are done, failed or cancelled


class Scheduler:
    """Denoises jobs, first come first served, at most `max_rows` texts at a time.

    At most `max_waiting` further jobs wait: `submit` raises Busy for more, and Ending after `drain`.
    """

    def __init__(self, model: Transformer, max_rows: int = 32, max_waiting: int = 128):
        self.model, self.shared = model, SharedModel(model)
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.waiting: deque[Job] = deque()
        self.cohorts: list[Cohort] = []
        self.forwards = 0  # shared forward passes, so fewer than the sum over requests
        self._wake = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="denoising", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Refuse new jobs, and wait until all others are done."""
        with self._wake:
            self._ending = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def rows(self) -> int:
        """Texts being denoised."""
        return sum(len(job.open) for cohort in list(self.cohorts) for job in cohort.jobs)

    def submit(self, job: Job) -> None:
        if job.copies > self.max_rows:
            raise UserError(f"{job.copies} texts at a time, at most {self.max_rows} are allowed; lower n")
        with self._wake:
            if self._ending:
                raise Ending("the server is about to end; ask another one")
            if sum(not waiting.cancelled for waiting in self.waiting) >= self.max_waiting:
                raise Busy(f"{len(self.waiting)} requests are waiting already; try again later")
            self.waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Stop working on a job, which is not notified again."""
        job.cancelled = True
        with self._wake:
            self._wake.notify()

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self.waiting or self.cohorts or self._ending):
                    self._wake.wait()
                if self._ending and not (self.waiting or self.cohorts):
                    return
                admitted = self._admit()
            self._begin(admitted)
            self._round()

    def _admit(self) -> list[Job]:
        for job in self.waiting:
            job.check_time()
        self.waiting = deque(job for job in self.waiting if job.open and not job.cancelled)
        admitted, rows = [], self.rows
        while self.waiting and rows + self.waiting[0].copies <= self.max_rows:
            admitted.append(self.waiting.popleft())
            rows += admitted[-1].copies
        return admitted

    def _begin(self, jobs: Iterable[Job]) -> None:
        groups: dict[object, list[Job]] = {}
        for job in jobs:
            groups.setdefault(self._key(job), []).append(job)
        for group in groups.values():
            self.cohorts.append(Cohort(group, greenlet(self._denoise)))

    def _key(self, job: Job) -> object:
        """Jobs of equal keys can form one batch of the sampler, in which each gets the tokens that it gets alone."""
        config = job.config
        causal = self.model.config.block_causal if config.block_causal is None else config.block_causal
        if job.gap.length == "auto" or config.constraint is not None or config.expand_token_id is not None:
            return job
        if config.cache != "none" or causal or config.blocks_from == "text":  # a batch shares its blocks
            return job
        gap = None if config.block_length is None else job.gap.length  # which decides the number of blocks
        growth = 1 if job.gap.text is None else config.max_new_tokens  # of a text to edit; else the gap says it
        return replace(config, seed=None, max_new_tokens=growth, num_return_sequences=1), gap, job.gap.text is None

    def _round(self) -> None:
        """Run each cohort up to its next call of the model, then compute all calls."""
        share = BETWEEN_STEPS / max(len(self.cohorts), 1)
        for cohort in self.cohorts:
            cohort.greenlet.give_way_at = time.monotonic() + share
            for job in cohort.jobs:
                job.check_time()
                if job.cancelled:
                    job.open.clear()
            if not any(job.open for job in cohort.jobs):
                cohort.ended = True
                if cohort.greenlet:  # not started yet: there is nothing to throw into
                    cohort.greenlet.throw(GreenletExit)
            elif isinstance(cohort.answer, Exception):
                cohort.call = cohort.greenlet.throw(cohort.answer)
            else:
                answer = cohort.answer if cohort.greenlet else cohort.jobs
                cohort.call = cohort.greenlet.switch(answer)
            cohort.answer = None
        self.cohorts = [cohort for cohort in self.cohorts if not (cohort.ended or cohort.greenlet.dead)]
        asking = [cohort for cohort in self.cohorts if cohort.call is not None]
        if asking:
            answers = self._compute([cohort.call for cohort in asking])
            for cohort, answer in zip(asking, answers, strict=True):
                cohort.answer = answer

    def _compute(self, calls: list[Call]) -> list[Tensor | Exception]:
        if len(calls) > 1 or calls[0].layout.key_mask is not None:  # together, padding is not computed
            try:
                self.forwards += 1
                batch = Ragged.of(calls)
                return batch.split(self.model.hidden_states(batch.row, batch, **with_predictions(batch)))
            except Exception as error:  # one call is invalid, or memory is too small for all: compute each alone
                if not (isinstance(error, UserError) or lacks_memory(error)):
                    traceback.print_exception(error, file=sys.stderr)
                if self.model.device.type == "cuda":
                    torch.cuda.empty_cache()
        answers = []
        for call in calls:
            try:
                self.forwards += 1
                answers.append(self.model.hidden_states(call.input_ids, call.layout, **with_predictions(call)))
            except Exception as error:
                answers.append(error)
        return answers

    def _denoise(self, jobs: list[Job]) -> None:
        """The body of a cohort's greenlet."""
        try:
            self._fill(jobs)
        except GreenletExit:
            raise
        except Exception as error:
            if not isinstance(error, (UserError, Failure)):
                if lacks_memory(error):
                    error = Failure("out of memory: ask for fewer tokens, or fewer texts")
                else:
                    traceback.print_exception(error, file=sys.stderr)
            for job in jobs:
                job.fail(error)

    def _fill(self, jobs: list[Job]) -> None:
        model, config = self.shared, replace(jobs[0].config, num_return_sequences=1)
        mask_token_id = find_mask_token(model, config)
        for job in jobs:
            job.gap = settle_length(model, job.gap, job.config)
        rows = [(job, copy) for job in jobs for copy in range(job.copies)]
        gaps = [job.gap for job, _ in rows]
        canvas, visible = lay_out(gaps, mask_token_id)
        renoises = model.config.canvas_length is not None  # it runs the model itself, and words change until settled
        named = visible & (canvas != mask_token_id) if renoises else visible
        denoising = begin(
            model, canvas, config, visible,
            sequence=name_rows(contents_of(canvas, named), torch.tensor([job.first + copy for job, copy in rows])),
            seeds=torch.tensor([job.config.seed for job, _ in rows]), editable=find_texts(gaps, canvas))
        final = not (config.revises or config.remasks_at_random or config.edits)
        steps, forwards = [0] * len(rows), [0] * len(rows)
        last, edited = None, [True] * len(rows)
        for last in denoising:
            give_way(0.0 if renoises else IDLE)  # steps that change nothing do not ask the model
            tokens, kept = last.tokens.cpu(), last.kept.cpu()
            if renoises:
                self.forwards += 1
                tokens = tokens.where(denoising.settled.cpu(), mask_token_id)
            seen = visible if last.visible is None else last.visible.cpu()
            asked = [False] * len(rows)
            if last.confidence is not None:
                asked = last.confidence.isfinite().any(1).tolist()
            if last.edits is not None:  # a deletion has no confidence
                asked = [any(both) for both in zip(asked, last.edits.deleted.any(1).tolist(), strict=True)]
            needed = asked
            if config.edits:  # the model computes a text at first, and after each change
                needed, edited = edited, asked
            left = ((tokens == mask_token_id) & seen).any(1).tolist()
            for row, (job, copy) in enumerate(rows):
                if copy not in job.open:
                    if left[row] or config.edits:
                        denoising.drop(row)
                    continue
                steps[row] += needed[row]
                forwards[row] += needed[row]
                done = final and not left[row]
                if not done and job.stops is not None:
                    text = job.gap.inside(tokens[row][seen[row]]).tolist()
                    done = mask_token_id in text and job.stops(text[:text.index(mask_token_id)])
                if done or job.every_step and asked[row]:
                    self._tell(job, copy, make_progress(job.gap, tokens[row], kept[row], seen[row], steps[row],
                                                        forwards[row], done))
                if done and left[row]:
                    denoising.drop(row)
        out = denoising.result()
        seen = visible if out.attention_mask is None else out.attention_mask.cpu()
        for row, (job, copy) in enumerate(rows):
            if copy in job.open:
                tokens, kept = out.sequences[row].cpu(), out.confidence[row].cpu()
                self._tell(job, copy, make_progress(job.gap, tokens, kept, seen[row], steps[row], forwards[row], True))

    def _tell(self, job: Job, copy: int, progress: Progress) -> None:
        if progress.done:
            job.open.discard(copy)
        job.notify(copy, progress)


def with_predictions(call: Call | Ragged) -> dict[str, Tensor]:
    """The argument of `hidden_states` that models with self-conditioning have."""
    return {} if call.predicted is None else {"predicted": call.predicted}


def lacks_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def make_progress(gap: Gap, tokens: Tensor, confidence: Tensor, seen: Tensor, steps: int, forwards: int,
                  done: bool) -> Progress:
    """The progress of a row of the canvas; tokens, confidence and seen are [L]."""
    return Progress(gap.inside(tokens[seen]).tolist(), gap.inside(confidence[seen]).tolist(), steps, forwards, done)
