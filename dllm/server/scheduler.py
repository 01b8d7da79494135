"""Many requests on one model: all that are being denoised take their next step in one forward pass.

One thread drives the model. Each cohort (requests of the same settings that began together, one batch of the sampler)
runs in a greenlet, as if it were alone; where it asks the model for hidden states it is put aside, and when all have
asked, the calls are computed together. So requests join and leave between denoising steps, whatever their lengths,
methods and caches, and the denoising loop is the sampler's own.
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
from torch.nn.utils.rnn import pad_sequence

from dllm.errors import Failure, UserError
from dllm.lengths import choose_lengths
from dllm.model import DiffusionLM
from dllm.sampler import Denoising, MDMGenerationConfig, find_mask_token


class Busy(Failure):
    """The queue is full."""


class Ending(Failure):
    """The server takes no more."""


class TooLate(Failure):
    """The time of a request is over."""


@dataclass(slots=True)
class Progress:
    """One text after a denoising step; at last `done`."""

    tokens: list[int]  # of the gap, masked ones included
    confidence: list[float]  # with which each was committed, -inf where none was
    steps: int  # denoising steps of this text, free ones left out
    forwards: int  # forward passes that it took part in
    done: bool


@dataclass(eq=False, slots=True)
class Job:
    """A gap to fill between two texts, in some copies.

    prefix, suffix: [P] and [S] int64. gap: masked positions between them; None: `choose_lengths` says how many.
    config: its seed is drawn from for each copy; num_return_sequences is the number of copies.
    notify: called from the scheduler's thread with (copy, Progress), or (None, exception) once, as the end.
    every_step: whether steps before the last are told.
    """

    prefix: Tensor
    suffix: Tensor
    gap: int | None
    config: MDMGenerationConfig
    notify: Callable[[int | None, Any], None]
    every_step: bool = False
    deadline: float | None = None  # on time.monotonic()'s clock
    stops: Callable[[list[int]], bool] | None = None  # whether a text that begins with these tokens is complete
    cancelled: bool = False
    open: set[int] = field(default_factory=set)  # copies that are not done

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


class SharedModel:
    """The model as a cohort sees it: its forward passes are computed with the others'."""

    def __init__(self, model: DiffusionLM):
        self._model = model

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def hidden_states(self, input_ids: Tensor, **keywords) -> Tensor:
        return getcurrent().parent.switch({"input_ids": input_ids, **keywords})


@dataclass(eq=False, slots=True)
class Cohort:
    jobs: list[Job]
    greenlet: greenlet
    call: dict | None = None  # what it waits for
    answer: Tensor | Exception | None = None
    ended: bool = False  # no job is open any more


class Scheduler:
    """Denoises the jobs it is given, first come first served, at most `max_rows` texts at a time.

    Jobs beyond that wait, `max_waiting` at most: `submit` raises Busy for more, and Ending after `drain`.
    """

    def __init__(self, model: DiffusionLM, max_rows: int = 32, max_waiting: int = 128):
        self.model, self.shared = model, SharedModel(model)
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.waiting: deque[Job] = deque()
        self.cohorts: list[Cohort] = []
        self.forwards = 0  # together, so fewer than the requests'
        self.step_seconds = self.model_seconds = 0.0  # of all rounds, and of them in the model and the sampler
        self._wake = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="denoising", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Take no more jobs, and return when all are done."""
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
        """Stop working on a job; it is told nothing more."""
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
        """Jobs of equal keys can be one batch of the sampler, and each comes to what it comes to alone."""
        config = job.config
        causal = self.model.config.block_causal if config.block_causal is None else config.block_causal
        if job.gap is None or config.constraint is not None or config.expand_token_id is not None:
            return job
        if config.cache != "none" or causal or config.blocks_from == "text":  # their blocks would have to be the same
            return job
        gap = None if config.block_length is None else job.gap  # the steps are shared out among as many blocks
        return replace(config, seed=None, max_new_tokens=1, num_return_sequences=1), gap

    def _round(self) -> None:
        """Let each cohort come to its next question to the model, and answer all."""
        began = time.perf_counter()
        inside = 0.0
        for cohort in self.cohorts:
            for job in cohort.jobs:
                job.check_time()
                if job.cancelled:
                    job.open.clear()
            entered = time.perf_counter()
            if not any(job.open for job in cohort.jobs):
                cohort.ended = True
                if cohort.greenlet:  # a job may end before its first step: then there is nothing to leave
                    cohort.greenlet.throw(GreenletExit)
            elif isinstance(cohort.answer, Exception):
                cohort.call = cohort.greenlet.throw(cohort.answer)
            else:
                answer = cohort.answer if cohort.greenlet else cohort.jobs
                cohort.call = cohort.greenlet.switch(answer)
            inside += time.perf_counter() - entered
            cohort.answer = None
        self.cohorts = [cohort for cohort in self.cohorts if not (cohort.ended or cohort.greenlet.dead)]
        entered = time.perf_counter()
        if self.cohorts:
            answers = self._compute([cohort.call for cohort in self.cohorts])
            for cohort, answer in zip(self.cohorts, answers, strict=True):
                cohort.answer = answer
        ended = time.perf_counter()
        self.model_seconds += inside + ended - entered
        self.step_seconds += ended - began

    def _compute(self, calls: list[dict]) -> list[Tensor | Exception]:
        if len(calls) > 1 or calls[0].get("attention_mask") is not None:  # whose padding is then not computed
            try:
                self.forwards += 1
                return self.model.hidden_states_together(calls)
            except Exception:  # one that cannot be computed, or all that do not fit into memory: each for itself
                if self.model.device.type == "cuda":
                    torch.cuda.empty_cache()
        answers = []
        for call in calls:
            try:
                self.forwards += 1
                answers.append(self.model.hidden_states(**call))
            except Exception as error:
                answers.append(error)
        return answers

    def _denoise(self, jobs: list[Job]) -> None:
        """What a cohort does, in its greenlet."""
        try:
            self._fill(jobs)
        except GreenletExit:
            raise
        except Exception as error:
            if not isinstance(error, (UserError, Failure)):
                if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                    error = Failure("out of memory: ask for fewer tokens, or fewer texts")
                else:
                    traceback.print_exception(error, file=sys.stderr)
            for job in jobs:
                job.fail(error)

    def _fill(self, jobs: list[Job]) -> None:
        model, config = self.shared, replace(jobs[0].config, num_return_sequences=1)
        mask_token_id = find_mask_token(model, config)
        for job in jobs:
            if job.gap is None:
                job.gap = (min(config.infill_lengths) if config.expand_token_id is not None else
                           choose_lengths(model, job.prefix.unsqueeze(0), job.suffix.unsqueeze(0), job.config)[0])
        rows = [(job, copy) for job in jobs for copy in range(job.copies)]
        canvases = [torch.cat((job.prefix, job.prefix.new_full((job.gap,), mask_token_id), job.suffix))
                    for job, _ in rows]
        sizes = torch.tensor([len(canvas) for canvas in canvases])
        visible = torch.arange(int(sizes.max())) < sizes.unsqueeze(1)
        denoising = Denoising(
            model, pad_sequence(canvases, batch_first=True), config, visible,
            sequence=torch.tensor([copy for _, copy in rows]), seeds=torch.tensor([job.config.seed for job, _ in rows]))
        final = config.editing_threshold is None and (config.alg != "remdm" or config.remasking is not None)
        steps, forwards = [0] * len(rows), [0] * len(rows)
        last = None
        for last in denoising:
            tokens, kept = last.tokens.cpu(), last.kept.cpu()
            seen = visible if last.visible is None else last.visible.cpu()
            asked = [False] * len(rows)
            if last.confidence is not None:
                asked = last.confidence.isfinite().any(1).tolist()
            left = ((tokens == mask_token_id) & seen).any(1).tolist()
            for row, (job, copy) in enumerate(rows):
                if copy not in job.open:
                    if left[row]:
                        denoising.drop(row)
                    continue
                steps[row] += asked[row]
                forwards[row] += asked[row]
                done = final and not left[row]
                if not done and job.stops is not None:
                    text = gap_of(job, tokens[row], seen[row])
                    done = mask_token_id in text and job.stops(text[:text.index(mask_token_id)])
                if done or job.every_step and asked[row]:
                    self._tell(job, copy, Progress(gap_of(job, tokens[row], seen[row]),
                                                   gap_of(job, kept[row], seen[row]), steps[row], forwards[row], done))
                if done and left[row]:
                    denoising.drop(row)
        out = denoising.result()
        seen = visible if out.attention_mask is None else out.attention_mask.cpu()
        for row, (job, copy) in enumerate(rows):
            if copy in job.open:
                tokens, kept = out.sequences[row].cpu(), out.confidence[row].cpu()
                self._tell(job, copy, Progress(gap_of(job, tokens, seen[row]), gap_of(job, kept, seen[row]),
                                               steps[row], forwards[row], True))

    def _tell(self, job: Job, copy: int, progress: Progress) -> None:
        if progress.done:
            job.open.discard(copy)
        job.notify(copy, progress)


def gap_of(job: Job, row: Tensor, seen: Tensor) -> list:
    """Of a row [L] of the canvas what stands between prefix and suffix."""
    row = row[seen]
    return row[len(job.prefix):len(row) - len(job.suffix)].tolist()
