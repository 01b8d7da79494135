"""The scheduler: requests computed together give the results that each gives alone."""

import gc
import queue
import threading
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("greenlet")

from dllm.constraints import Regex, json_schema
from dllm.diffusion_lm import DiffusionLM
from dllm.errors import Failure, UserError
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.infilling import Gap, infill
from dllm.generation.sampler import Denoising, finish, generate
from dllm.model.families import ModelConfig
from dllm.model.ragged import Ragged
from dllm.model.tokenizer import train_tokenizer
from dllm.server.scheduler import Busy, Ending, Job, Scheduler, TooLate, give_way
from tests.dllm.tiny_models import tiny_of

NOTHING = torch.empty(0, dtype=torch.long)


class Request:
    """A job and its notifications."""

    def __init__(self, prefix, length, config, suffix=NOTHING, **keywords):
        self.events = queue.Queue()
        text = keywords.pop("text", None)
        self.job = Job(Gap(torch.as_tensor(prefix), suffix, length, text), config,
                       lambda *event: self.events.put(event), **keywords)

    def wait(self) -> dict[int, object]:
        """The last progress of each copy, or the error."""
        done = {}
        while len(done) < self.job.copies:
            copy, event = self.events.get(timeout=60)
            if copy is None:
                raise event
            if event.done:
                done[copy] = event
        return done


@pytest.fixture
def scheduler(model):
    scheduler = Scheduler(model, max_rows=16)
    yield scheduler
    scheduler.drain()


def prompt(length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed))


METHODS = [
    MDMGenerationConfig(steps=12, seed=1),
    MDMGenerationConfig(steps=12, alg="maskgit_plus", temperature=0.8, alg_temp=0.3, seed=2, num_return_sequences=2),
    MDMGenerationConfig(steps=6, alg="p2", temperature=0.7, seed=3),
    MDMGenerationConfig(steps=9, alg="remdm", seed=4),
    MDMGenerationConfig(steps=12, alg="topk_margin", threshold=0.3, block_length=4, cache="dual", seed=5),
    MDMGenerationConfig(steps=12, remasking="low_confidence", block_length=6, cache="prefix", seed=6),
    MDMGenerationConfig(steps=12, remasking="low_confidence", cfg_scale=0.5, seed=7),
    MDMGenerationConfig(steps=12, seed=1),
    MDMGenerationConfig(steps=12, seed=9, temperature=0.5),
    MDMGenerationConfig(steps=12, seed=10, temperature=0.5),
]


def test_requests_of_all_methods_and_lengths_come_to_what_each_comes_to_alone(scheduler, model):
    requests = [Request(prompt(5 + 3 * i, i), 12, config, every_step=i % 2 == 0) for i, config in enumerate(METHODS)]
    for request in requests:
        scheduler.submit(request.job)
    scheduler.start()
    for request in requests:
        ids = request.job.gap.prefix
        alone = generate(model, ids, config=replace(request.job.config, max_new_tokens=12))
        done = request.wait()
        for copy, sequence in enumerate(alone.sequences):
            assert done[copy].tokens == sequence[len(ids):].tolist(), request.job.config
            assert done[copy].confidence == pytest.approx(alone.confidence[copy, len(ids):].tolist(), abs=1e-4)


@pytest.mark.slow
def test_requests_that_join_later_change_nothing(scheduler, model):
    scheduler.start()
    config = MDMGenerationConfig(steps=24, temperature=0.6, alg="maskgit_plus")
    requests = []
    for i in range(8):
        block = 4 if i % 2 else None
        requests.append(Request(prompt(4 + i, i), 12 + 4 * i, replace(config, seed=i, block_length=block, steps=120)))
        scheduler.submit(requests[-1].job)
        time.sleep(0.004)
    for i, request in enumerate(requests):
        alone = generate(model, request.job.gap.prefix, config=replace(request.job.config, max_new_tokens=12 + 4 * i))
        assert request.wait()[0].tokens == alone.sequences[0, len(request.job.gap.prefix):].tolist()


@pytest.mark.parametrize("causal, shift", [(False, False), (True, False), (False, True), (True, True)])
def test_a_block_causal_model_serves_rows_at_different_blocks(causal, shift):
    torch.manual_seed(0)
    model = DiffusionLM(ModelConfig(
        family="qwen3", vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, qk_norm=True, max_position_embeddings=128, initializer_range=0.2,
        mask_token_id=1, eos_token_id=0, block_causal=True, causal_blocks=causal,
        shift_logits=shift)).eval()
    scheduler = Scheduler(model)
    config = MDMGenerationConfig(block_length=4, steps=24, remasking="low_confidence", seed=0)
    methods = [{}, {"threshold": 0.2}, {"threshold": 0.2, "window_blocks": 2},
               {"threshold": 0.2, "sub_block_length": 2},
               {"remasking": None, "alg": "entropy_bound", "entropy_bound": 4.0},
               {"remasking": None, "alg": "soft_parallel", "threshold": 0.1}]
    if causal and shift:
        methods += [{"remasking": None, "alg": "self_speculation", "draft_length": n, "temperature": n / 4}
                    for n in (3, 2, 0)]
    requests = [Request(torch.arange(2, 7 + 5 * i), 8, replace(config, **method)) for i, method in enumerate(methods)]
    for request in requests:
        scheduler.submit(request.job)
    scheduler.start()
    for request in requests:
        alone = generate(model, request.job.gap.prefix, config=replace(request.job.config, max_new_tokens=8))
        assert request.wait()[0].tokens == alone.sequences[0, len(request.job.gap.prefix):].tolist()
    scheduler.drain()


def test_gaps_are_filled_as_infill_does_with_the_length_that_the_model_is_surest_of(scheduler, model):
    config = MDMGenerationConfig(steps=8, seed=0, infill_lengths=(2, 5, 8))
    fixed = Request(prompt(6, 0), 7, config, suffix=prompt(9, 1))
    chosen = Request(prompt(6, 0), "auto", config, suffix=prompt(9, 1))
    scheduler.submit(fixed.job)
    scheduler.submit(chosen.job)
    scheduler.start()
    for request, length in ((fixed, 7), (chosen, "auto")):
        out = infill(model, request.job.gap.prefix, request.job.gap.suffix, length=length, generation_config=config)
        assert request.wait()[0].tokens == out.sequences[0, 6:-9].tolist()


def test_all_requests_of_a_step_share_a_forward_pass(scheduler):
    config = MDMGenerationConfig(steps=8, alg="maskgit_plus")
    requests = [Request(prompt(5 + i, i), 8, replace(config, temperature=i / 10, seed=i)) for i in range(10)]
    for request in requests:
        scheduler.submit(request.job)
    scheduler.start()
    forwards = [request.wait()[0].forwards for request in requests]
    assert scheduler.forwards <= max(forwards) + 1 < sum(forwards) / 5


def test_every_step_is_told_where_it_was_asked_for(scheduler):
    shown, quiet = (Request(prompt(5, 0), 6, MDMGenerationConfig(steps=6, seed=0), every_step=every)
                    for every in (True, False))
    for request in (shown, quiet):
        scheduler.submit(request.job)
    scheduler.start()
    shown.job.notify(0, "the last")
    quiet.wait()
    scheduler.drain()
    seen = [event for _, event in shown.events.queue if event != "the last"]
    assert [event.done for event in seen] == [False] * (len(seen) - 1) + [True] and len(seen) >= 4
    masked = [event.tokens.count(scheduler.model.mask_token_id) for event in seen]
    assert masked == sorted(masked, reverse=True) and masked[-1] == 0


def test_a_text_ends_with_the_step_in_which_it_is_complete(scheduler):
    begun = []

    def stops(tokens: list[int]) -> bool:
        begun.append(tokens)
        return len(tokens) >= 3

    request = Request(prompt(5, 0), 40, MDMGenerationConfig(steps=40, block_length=1, seed=0), stops=stops)
    scheduler.submit(request.job)
    scheduler.start()
    assert request.wait()[0].steps == 3 and len(begun[-1]) == 3


def test_a_cancelled_request_leaves_and_the_others_go_on(scheduler):
    gone, stays = (Request(prompt(5, 0), 200, MDMGenerationConfig(steps=200, seed=0), every_step=True)
                   for _ in range(2))
    scheduler.submit(gone.job)
    scheduler.submit(stays.job)
    scheduler.start()
    gone.events.get(timeout=60)
    scheduler.cancel(gone.job)
    assert stays.wait()[0].done
    assert not any(event.done for _, event in gone.events.queue)
    scheduler.drain()
    assert scheduler.rows == 0 and not scheduler.cohorts


def test_more_than_the_queue_holds_and_what_comes_after_the_end_are_refused(model):
    scheduler = Scheduler(model, max_rows=1, max_waiting=2)
    requests = [Request(prompt(5, 0), 4, MDMGenerationConfig(steps=4, seed=0)) for _ in range(3)]
    scheduler.submit(requests[0].job)
    scheduler.submit(requests[1].job)
    with pytest.raises(Busy, match="2 requests are waiting already; try again later"):
        scheduler.submit(requests[2].job)
    many = replace(requests[2].job.config, num_return_sequences=2)
    with pytest.raises(UserError, match="2 texts at a time, at most 1 are allowed; lower n"):
        scheduler.submit(Request(prompt(5, 0), 4, many).job)
    scheduler.start()
    ender = threading.Thread(target=scheduler.drain)
    ender.start()
    assert [len(request.wait()) for request in requests[:2]] == [1, 1]  # accepted jobs are answered
    ender.join()
    with pytest.raises(Ending, match="about to end"):
        scheduler.submit(requests[2].job)


def test_a_request_whose_time_is_over_is_ended_waiting_or_not(scheduler):
    late = [Request(prompt(5, 0), 8, MDMGenerationConfig(steps=8, seed=0), deadline=time.monotonic() - 1)
            for _ in range(2)]
    for request in late:
        scheduler.submit(request.job)
    scheduler.start()
    for request in late:
        with pytest.raises(TooLate, match="ask for fewer tokens or steps"):
            request.wait()


def test_what_one_request_breaks_the_others_do_not_feel(scheduler, model, monkeypatch, capfd):
    whole = model.hidden_states

    def alone(input_ids, layout):
        if isinstance(layout, Ragged):
            raise torch.OutOfMemoryError("all at once")
        if input_ids.shape[1] > 30:
            raise torch.OutOfMemoryError("too large")
        return whole(input_ids, layout)

    monkeypatch.setattr(model, "hidden_states", alone)
    config = MDMGenerationConfig(steps=4, seed=0)
    small, large = Request(prompt(5, 0), 4, config), Request(prompt(40, 0), 4, replace(config, steps=3))
    wrong = Request(prompt(5, 0), 4, replace(config, block_length=3))
    for request in (small, large, wrong):
        scheduler.submit(request.job)
    scheduler.start()
    with pytest.raises(Failure, match="out of memory: ask for fewer tokens"):
        large.wait()
    with pytest.raises(UserError, match="block_length 3 does not divide the 4 positions"):
        wrong.wait()
    assert small.wait()[0].done


def test_a_job_that_ends_between_its_admission_and_its_first_step_is_left_out(scheduler, monkeypatch):
    first, second = (Request(prompt(4, i), 4, MDMGenerationConfig(steps=4, seed=i)) for i in range(2))
    begin = scheduler._begin

    def cancel_then_begin(jobs):
        first.job.cancelled = True
        begin(jobs)

    monkeypatch.setattr(scheduler, "_begin", cancel_then_begin)
    scheduler.submit(first.job)
    scheduler.start()
    scheduler.submit(second.job)
    assert second.wait()[0].done
    scheduler.drain()
    assert not scheduler.alive and not scheduler.cohorts


@pytest.fixture(scope="module")
def spelling_model():
    tokenizer = train_tokenizer(['{"name": "ab", "age": 12}', "2024-01-31", "Grüße"] * 3, 300)
    return tokenizer, tiny_of("qwen2", vocab_size=len(tokenizer), mask_token_id=2, eos_token_id=0,
                              max_position_embeddings=512)


CONSTRAINTS = [lambda *given: json_schema({"type": "object"}, *given, pause=give_way),
               lambda *given: Regex(".{0,900}", *given, pause=give_way),
               lambda *given: Regex("(a|b)*a(a|b){20}", *given, pause=give_way)]  # too large, as is seen late


@pytest.mark.slow
@pytest.mark.parametrize("make", CONSTRAINTS)
def test_a_constraint_is_built_and_held_between_the_steps_of_others(spelling_model, make):
    """By the processor time of the denoising thread between two steps, because the machine may be busy."""
    gc.collect()
    gc.freeze()  # as `dllm serve` does
    tokenizer, model = spelling_model
    scheduler, times = Scheduler(model), []
    config = MDMGenerationConfig(steps=64, temperature=1.0, seed=1)
    plain = Request(prompt(5, 0) % 250, 64, config, every_step=True)
    tell = plain.job.notify
    plain.job.notify = lambda *event: (times.append(time.thread_time()), tell(*event))
    constrained = Request(prompt(5, 1) % 250, 64, replace(config, constraint=make(tokenizer, len(tokenizer))))
    for request in (plain, constrained):
        scheduler.submit(request.job)
    scheduler.start()
    plain.wait()
    gc.unfreeze()
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert len(gaps) > 50 and max(gaps) < 0.15, max(gaps)
    try:
        constrained.wait()
    except UserError as error:
        assert "needs an automaton of more than 30000 states" in str(error)
    scheduler.drain()


def test_the_deadline_holds_while_an_automaton_is_built(spelling_model):
    tokenizer, model = spelling_model
    scheduler = Scheduler(model)
    constraint = Regex(".{0,900}", tokenizer, len(tokenizer), pause=give_way)
    config = MDMGenerationConfig(steps=64, seed=1, constraint=constraint)
    late, next_one = (Request(prompt(5, 0) % 250, 64, config, deadline=time.monotonic() + seconds)
                      for seconds in (0.05, 60))
    scheduler.submit(late.job)
    scheduler.start()
    began = time.monotonic()
    with pytest.raises(TooLate):
        late.wait()
    assert time.monotonic() - began < 5 and constraint.matcher is None
    scheduler.submit(next_one.job)  # which builds it from the start
    assert next_one.wait()[0].done
    scheduler.drain()


def edited_alone(model, job) -> list[list[int]]:
    """What the sampler makes of a job's gap, or of its text to edit: the tokens of each copy."""
    gap = job.gap
    if gap.text is None:
        return [gap.inside(row).tolist() for row in infill(model, gap.prefix, gap.suffix, length=gap.length,
                                                           generation_config=job.config).rows()]
    ids = torch.cat((gap.prefix, gap.text, gap.suffix)).unsqueeze(0)
    place = torch.arange(ids.shape[1]).unsqueeze(0)
    editable = (place >= len(gap.prefix)) & (place < ids.shape[1] - len(gap.suffix))
    return [gap.inside(row).tolist() for row in finish(Denoising(model, ids, job.config, editable=editable)).rows()]


def test_edits_of_gaps_and_of_texts_come_to_what_each_comes_to_alone(edit_folder):
    """In float64, because computing together rounds differently."""
    model = DiffusionLM.from_pretrained(edit_folder, dtype=torch.float64)
    config = MDMGenerationConfig(alg="edit", steps=10, temperature=1.0)
    requests = [
        Request(prompt(5, 0), 12, replace(config, seed=1), prompt(3, 1), every_step=True),
        Request(prompt(8, 2), 5, replace(config, seed=2, num_return_sequences=2)),
        Request(prompt(2, 3), "auto", replace(config, seed=3, max_infill_length=9), prompt(4, 4)),
        Request(prompt(3, 5), 6, replace(config, seed=4, max_new_tokens=4), prompt(1, 6), text=prompt(6, 7)),
        Request(prompt(4, 8), 9, replace(config, seed=5, max_new_tokens=4, num_return_sequences=2), text=prompt(9, 9),
                every_step=True),
        Request(prompt(4, 8), 3, replace(config, seed=6, max_new_tokens=1), prompt(2, 1), text=prompt(3, 2)),
        Request(prompt(7, 1), 7, replace(config, seed=7, edit_source="masks", edit_source_length=4)),
        Request(prompt(7, 1), 7, MDMGenerationConfig(steps=7, seed=8))]
    scheduler = Scheduler(model, max_rows=16)
    keys = [scheduler._key(request.job) for request in requests]
    assert keys[0] == keys[1] and keys[3] == keys[4] and len(set(keys)) == 6  # a text's growth is its batch's
    for request in requests:
        scheduler.submit(request.job)
    scheduler.start()
    for request in requests:
        done, alone = request.wait(), edited_alone(model, request.job)
        assert [done[copy].tokens for copy in range(request.job.copies)] == alone, request.job
        assert all(len(progress.confidence) == len(progress.tokens) for progress in done.values())
        most = request.job.gap.length + (request.job.config.max_new_tokens if request.job.gap.text is not None else 0)
        assert all(len(tokens) <= most for tokens in alone)
    scheduler.drain()


def test_edits_tell_each_change_and_count_the_forward_passes_of_the_text(edit_folder):
    model = DiffusionLM.from_pretrained(edit_folder)
    config = MDMGenerationConfig(alg="edit", steps=10, temperature=1.0, seed=3, max_new_tokens=5)
    request = Request(prompt(3, 5), 6, config, prompt(2, 6), text=prompt(6, 7), every_step=True)
    scheduler = Scheduler(model)
    scheduler.submit(request.job)
    scheduler.start()
    events = []
    while not events or not events[-1].done:
        events.append(request.events.get(timeout=60)[1])
    scheduler.drain()
    texts = [event.tokens for event in events]
    assert len(events) > 4 and len({*map(len, texts)}) > 2 and texts[-1] == texts[-2]
    assert events[-1].forwards == events[-1].steps == scheduler.forwards <= 10


def test_the_deadline_holds_over_steps_that_change_nothing_and_others_go_on(edit_folder):
    model = DiffusionLM.from_pretrained(edit_folder)
    with torch.no_grad():
        model.rate_head.weight.zero_()
        model.rate_head.bias.fill_(-50.0)
    config = MDMGenerationConfig(alg="edit", steps=1_000_000, seed=0)
    late, other = (Request(prompt(5, 0), 8, changed, deadline=time.monotonic() + seconds) for changed, seconds in (
        (config, 0.5), (MDMGenerationConfig(steps=4, seed=0), 60)))
    scheduler = Scheduler(model)
    for request in (late, other):
        scheduler.submit(request.job)
    began = time.monotonic()
    scheduler.start()
    assert other.wait()[0].done
    with pytest.raises(TooLate):
        late.wait()
    assert time.monotonic() - began < 20
    scheduler.drain()


def test_a_dropped_text_is_edited_no_more_and_changes_no_other(edit_folder):
    model = DiffusionLM.from_pretrained(edit_folder)
    config = MDMGenerationConfig(alg="edit", steps=12, temperature=1.0, seed=1)
    canvas = torch.tensor([[5, *[2] * 12], [7, *[2] * 12]])
    alone = finish(Denoising(model, canvas[1:], config)).rows()[0]
    denoising = Denoising(model, canvas, config)
    for step in denoising:
        if step.index == 5:
            dropped = step.tokens[0][step.visible[0]].tolist()
            denoising.drop(0)
    rows = denoising.result().rows()
    assert rows[0].tolist() == dropped and rows[1].tolist() == alone.tolist() and len(alone) > 3


@pytest.mark.parametrize("share", [None, 0.3, 1.0])
def test_self_conditioning_and_uniform_words_are_served_as_each_request_alone(share):
    model = tiny_of("a2d-qwen3", uniform_share=share, self_conditioning=True, mask_token_id=60, eos_token_id=0)
    torch.nn.init.normal_(model.self_condition.weight, std=0.5)
    alg = {"alg": "p2"} if share is None else {"alg": "ancestral", "correction_steps": 2}
    config = MDMGenerationConfig(steps=5, temperature=0.8, **alg)
    scheduler, suffix = Scheduler(model), torch.tensor([4, 5])
    requests = [Request(prompt(3 + 2 * i, i) % 60, 6, replace(config, seed=i, num_return_sequences=1 + i % 2),
                        suffix=suffix) for i in range(4)]
    for request in requests:
        scheduler.submit(request.job)
    scheduler.start()
    for request in requests:
        ids = request.job.gap.prefix
        alone = infill(model, ids, suffix, length=6, generation_config=request.job.config).sequences
        done = request.wait()
        for copy, row in enumerate(alone):
            assert done[copy].tokens == row[len(ids):-2].tolist()
    scheduler.drain()
