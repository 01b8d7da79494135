"""Scoring: the benchmarks' data, EvalPlus' rules, pass@k, bad input, verdicts of the benchmarks' own solutions."""

import ast
import gzip
import itertools
import json
import math
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import reference_executor
from dllm import cli
from dllm.errors import Failure, UserError
from dllm.evaluators.code import scoring, verdicts
from dllm.evaluators.code.samples import Sample, exact_match, read_samples
from dllm.evaluators.code.scoring import score_samples
from dllm.evaluators.code.tasks import BENCHMARKS, TaskSet, read_tasks
from dllm.evaluators.code.verdicts import Bench
from dllm.evaluators.estimates import pass_at_k
from dllm.evaluators.sandbox import judging
from dllm.evaluators.sandbox.host import LAYERS, Limits, Outcome, Sandbox
from tests.dllm.evaluators.programs import PROGRAMS

ROWS = [{"task_id": f"HumanEval/{i}", "prompt": f"def add{i}(a, b):\n", "entry_point": f"add{i}",
         "canonical_solution": "    return a + b\n",
         "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4\n"}
        for i in range(3)]
RIGHT, WRONG = "    return a + b\n", "    return a - b\n"
EQUAL = "    class Equal:\n        def __eq__(self, other): return True\n    return Equal()\n"


@pytest.fixture(scope="session")
def data(shared) -> str:
    if not (shared / "data" / "humaneval").is_dir():
        pytest.skip("the benchmarks' data (../shared/data) is not on this machine")
    return str(shared / "data")


@pytest.fixture
def tasks(tmp_path) -> TaskSet:
    """Three tasks of our own."""
    return read_tasks("humaneval", str(write_lines(tmp_path / "HumanEval.jsonl", ROWS)))


@pytest.fixture
def samples(tmp_path):
    """Write a file of samples: (task number, completion) pairs, or lines as they are."""
    def write(*lines) -> Path:
        rows = [{"task_id": f"HumanEval/{line[0]}", "completion": line[1]} if isinstance(line, tuple) else line
                for line in lines]
        return write_lines(tmp_path / "samples.jsonl", rows)
    return write


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def canonical_samples(tasks: TaskSet, path: Path) -> Path:
    return write_lines(path, [{"task_id": task.task_id, "completion": task.canonical} for task in tasks.tasks.values()])


# pass@k


@pytest.mark.parametrize("samples, passed, k, wanted", [
    (1, 0, 1, 0), (1, 1, 1, 1), (10, 3, 1, 0.3), (10, 3, 10, 1), (10, 0, 10, 0), (10, 1, 10, 1), (5, 2, 2, 0.7),
    (200, 1, 100, 0.5), (20, 4, 10, 1 - (10 * 9 * 8 * 7) / (20 * 19 * 18 * 17)),
])
def test_pass_at_k_by_hand(samples, passed, k, wanted):
    assert pass_at_k(samples, passed, k) == pytest.approx(wanted, abs=1e-12)


def test_pass_at_k_is_the_share_of_draws_with_a_pass():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("samples, passed, k", [(5, 0, 10), (5, 6, 1), (5, 1, 0)])
def test_pass_at_k_refuses_what_it_cannot_estimate(samples, passed, k):
    with pytest.raises(ValueError, match=f"pass@{k} needs at least"):
        pass_at_k(samples, passed, k)


# The data


@pytest.mark.parametrize("name, count, md5", [
    ("humaneval", 164, None), ("humaneval_plus", 164, "fe585eb4df8c88d844eeb463ea4d0302"), ("mbpp", 500, None),
    ("mbpp_plus", 378, "ee43ecabebf20deef4bb776a405ac5b1"), ("humaneval_infill_single_line", 1033, None),
    ("humaneval_infill", 1033, None), ("humaneval_infill_multi_line", 5815, None),
    ("humaneval_infill_random_span", 1640, None), ("santacoder_fim", 1043, None),
])
def test_counts_and_published_hashes_of_the_data(name, count, md5, data):
    tasks = read_tasks(name, data)
    assert len(tasks.tasks) == count and md5 in (None, tasks.md5)
    assert all(task.names for task in tasks.tasks.values())


def test_infilled_programs_join_without_losing_a_character(data):
    humaneval = read_tasks("humaneval", data).tasks
    for task in read_tasks("humaneval_infill_random_span", data).tasks.values():
        whole = humaneval["/".join(task.task_id.split("/")[1:3])]
        assert task.program(task.canonical) == whole.program(whole.canonical)


def test_arguments_of_mbpp_plus_are_those_of_its_assertions(data):
    """The arguments are JSON in the data; its assertions are Python, with the tuples, sets and complex numbers.

    Eleven tasks differ in the data itself, and EvalPlus takes those of the JSON.
    """
    rows = [json.loads(line) for line in gzip.open(Path(data) / "mbppplus" / "MbppPlus.jsonl.gz")]
    tasks, compared, differing = read_tasks("mbpp_plus", data).tasks, 0, []
    for row in rows:
        written = {}
        for node in ast.walk(ast.parse(row["assertion"])):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == row["entry_point"]:
                try:
                    written[node.lineno] = [eval(ast.unparse(argument), {}) for argument in node.args]
                except Exception:
                    continue  # not literals
        ours = tasks[row["task_id"]].base_input
        if len(written) == len(ours):
            compared += 1
            same = [list(got) == wanted for wanted, got in zip(written.values(), ours, strict=True)]
            differing += [] if all(same) else [row["task_id"]]
    own = (87, 98, 104, 140, 145, 301, 596, 737, 781, 787, 803)
    assert compared == 378 and differing == [f"Mbpp/{i}" for i in own]


def test_santacoder_reads_its_parquet_too(data):
    parquet = read_tasks("santacoder_fim", str(Path(data) / "santacoder_fim" / "train.parquet"))
    lines = read_tasks("santacoder_fim", data)
    assert parquet.tasks == lines.tasks and parquet.md5 != lines.md5


def test_data_by_hub_repository(tmp_path, monkeypatch):
    import huggingface_hub
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "openai_humaneval").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "openai_humaneval" / "test-0.parquet")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **keywords: asked.append((name, keywords["repo_type"])) or str(tmp_path))
    for name in (None, "someone/else"):
        assert list(read_tasks("humaneval", name).tasks) == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    assert asked == [("openai/openai_humaneval", "dataset"), ("someone/else", "dataset")]

    def unreachable(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"openai/openai_humaneval is neither here nor .* \(no network\); name a file"):
        read_tasks("humaneval")


@pytest.mark.parametrize("name, content, message", [
    ("HumanEval.jsonl", "{", "is not JSON lines"),
    ("HumanEval.jsonl", '{"task_id": 1}', r"row 1 is no task of humaneval \(KeyError: 'entry_point'\)"),
    ("HumanEval.jsonl", "", "has no task of humaneval; its file is HumanEval.jsonl"),
    ("HumanEval.jsonl.gz", "not compressed", "cannot read"),
    ("x.parquet", "not parquet", "is not Parquet"),
])
def test_data_that_is_not_the_benchmarks_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_tasks("humaneval", str(tmp_path / name))


def test_tasks_and_data_that_do_not_exist(tmp_path):
    with pytest.raises(UserError, match="there is no task 'humanevil'; the tasks are humaneval, "):
        read_tasks("humanevil")
    with pytest.raises(UserError, match="/nowhere/at/all does not exist; give a file, a folder, or a hub"):
        read_tasks("humaneval", "/nowhere/at/all")
    with pytest.raises(UserError, match="has neither HumanEval.jsonl nor HumanEval.jsonl.gz nor one file"):
        read_tasks("humaneval", str(tmp_path))
    with pytest.raises(UserError, match="get MbppPlus.jsonl of github.com/evalplus/mbppplus_release"):
        read_tasks("mbpp_plus")


# Values that cross to a judge


class Odd(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


def test_plain_data_crosses_exactly():
    for value in (
            None, True, 0, -5, 10**6000, 0.1, -0.0, math.inf, 1e-320, 1 + 2j, "", "ä\ud800\0", b"\xff", bytearray(b"x"),
            [], [1, [2.5, (3,)]], (), (1, (2, [3])), {1, 2}, frozenset({(1, 2)}), {"a": [1], (2, 3): {4: None}},
            range(3, 9, 2), [10**5000, 1], {True: 1.0}, list(range(40000)), [(i, str(i)) for i in range(20000)]):
        back = judging.decode_value(judging.encode_value(value))
        assert back == value and type(back) is type(value)
        assert str(type(value)) == "<class 'int'>" or value == [10**5000, 1] or repr(back) == repr(value)


def test_what_is_not_plain_arrives_as_something_equal_to_nothing():
    opaque = judging.decode_value(judging.encode_value([object(), len, Odd]))
    assert [type(item) for item in opaque] == [judging.Opaque] * 3 and opaque[0] != opaque[1] and opaque[0] == opaque[0]
    odd = judging.decode_value(judging.encode_value(Odd(7)))
    assert type(odd) is int and odd != 8  # its plain value
    assert list(judging.decode_value(judging.encode_value(i * i for i in range(3)))) == [0, 1, 4]
    nested = []
    for _ in range(10**5):
        nested = [nested]
    assert isinstance(judging.decode_value(judging.encode_value(nested)), judging.Opaque)


@pytest.mark.parametrize("text", [b"", b"{}", b"[", b'["z", 1]', b'["l", 5]', b'["c", ["x", 1]]', b'["s", [["l", []]]]',
                                  b'["n", "xyz"]', b"\xff", b"[" * 10**5])
def test_what_is_not_an_encoded_value_is_refused(text):
    with pytest.raises(judging.Ended):
        judging.decode_value(text)


def test_large_values_cross_as_their_hash(monkeypatch):
    monkeypatch.setattr(judging, "_LARGE", 1000)
    values = [(i, i + 1) for i in range(30000)]
    encoded = judging.encode_value(values)
    assert len(encoded) < 200 and encoded == judging.encode_value(list(values))
    assert encoded != judging.encode_value(values[:-1] + [(0, 0)])
    assert isinstance(judging.decode_value(encoded), judging.Opaque)


# EvalPlus' rules


@pytest.mark.parametrize("dataset, entry_point, arguments, output, wanted, atol, right", [
    ("humaneval", "f", [], 1, 1, 0, True), ("humaneval", "f", [], 1, 2, 0, False),
    ("humaneval", "f", [], (1,), [1], 0, False),
    ("humaneval", "f", [], 1.0, 1, 0, True), ("humaneval", "f", [], 0.5000005, 0.5, 1e-6, True),
    ("humaneval", "f", [], 0.500002, 0.5, 1e-6, False), ("humaneval", "f", [], 5e8, 5e8 + 40, 1e-6, True),
    ("humaneval", "f", [], [0.5, 1.0000001], [0.5, 1.0], 1e-6, True),
    ("humaneval", "f", [], [0.5], [0.5, 1.0], 1e-6, False),
    ("humaneval", "f", [], 1, 1.0000001, 1e-6, False),  # another type, and not equal
    ("humaneval", "f", [], math.nan, math.nan, 1e-6, False), ("humaneval", "f", [], math.inf, math.inf, 1e-6, True),
    ("humaneval", "f", [], 1e300, math.inf, 1e-6, False), ("humaneval", "f", [], "a", "b", 1e-6, False),
    ("humaneval", "find_zero", [[-4, 0, 1]], -2.0, 2.0, 1e-4, True),
    ("humaneval", "find_zero", [[-4, 0, 1]], 2.1, 2.0, 1e-4, False),
    ("mbpp", "are_equivalent", [36, 57], True, False, 0, True), ("mbpp", "sum_div", [7], 0, 1, 0, True),
    ("mbpp", "sum_div", [7], 2, 1, 0, False), ("mbpp", "surface_Area", [3, 4], 35, 33, 0, True),
    ("mbpp", "surface_Area", [3, 4], 34, 33, 0, False), ("mbpp", "digit_distance_nums", [123, 256], 7, 6, 0, True),
    ("mbpp", "digit_distance_nums", [1, 999], 26, 1, 0, True),
    ("mbpp", "digit_distance_nums", [1, 999], 25, 1, 0, False),
    ("mbpp", "find_dissimilar", [], (1, 2, 2), [2, 1], 0, True), ("mbpp", "Diff", [], [1], [2], 0, False),
    ("mbpp", "check_str", [], "a match", True, 0, True), ("mbpp", "check_str", [], None, True, 0, False),
    ("mbpp", "check_str", [], False, True, 0, False), ("mbpp", "check_str", [], judging.Opaque("Match"), True, 0, True),
    ("humaneval", "are_equivalent", [36, 57], True, False, 0, False),  # MBPP's rules are MBPP's
])
def test_evalplus_rules(dataset, entry_point, arguments, output, wanted, atol, right):
    assert judging.agree(dataset, entry_point, arguments, output, wanted, atol) is right


def test_the_tolerance_of_floats_stays_for_the_calls_that_follow():
    rows = [(b"a", judging.encode_value(value), 4.0) for value in (1, 0.5, 1)]
    table = judging.write_table(rows, "humaneval", "f", 0)
    size, found = 0, []
    while size < len(table):
        request, expected, seconds, atol = judging.struct.unpack_from("<QQdd", table, size)
        size += 32 + request + expected
        found.append((seconds, atol))
    assert found == [(4.0, 0), (4.0, 1e-6), (4.0, 1e-6)]


@pytest.mark.parametrize("seconds, used, answers_after, told", [
    (0.5, (0.0, 0.1), 0.6, ""),  # in time by its CPU time, not by the wall clock, of which it has 3 s
    (0.05, (0.0, 0.06), None, "no answer in 0.05 s of CPU time"),
    (0.05, (0.0, 0.01), None, "no answer in 0.3 s of wall-clock time")])
def test_a_call_is_limited_by_the_programs_cpu_time(seconds, used, answers_after, told):
    """used: CPU seconds before the call, then at each question."""
    (ours, theirs), (asked, asks) = socket.socketpair(), socket.socketpair()
    with ours, theirs, asked, asks:
        program, values = judging.Program(ours.fileno(), asks.fileno()), iter(used)

        def clock() -> None:
            while asked.recv(1):
                asked.send(judging.struct.pack("<d", next(values, used[-1])))

        def answer() -> None:
            time.sleep(answers_after)
            judging.send(theirs.fileno(), b"=5")

        for thread in (clock, answer) if answers_after else (clock,):
            threading.Thread(target=thread, daemon=True).start()
        if told:
            with pytest.raises(judging.TooLong, match=told):
                program.ask(b"[]", seconds=seconds)
        else:
            assert program.ask(b"[]", seconds=seconds) == b"5"
        asks.shutdown(socket.SHUT_RDWR)


PLUS = {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "entry_point": "f",
        "canonical_solution": "    return x / 3\n",
        "base_input": [[1], [2]], "plus_input": [[10], [0]], "atol": 0, "test": ""}


@pytest.mark.slow
@pytest.mark.parametrize("completion, verdict, base", [
    ("    return x / 3\n", "pass", "pass"), ("    return x / 3 + 1e-9\n", "pass", "pass"),
    ("    return x / 3 + 1e-3\n", "fail", "fail"), ("    return x / 3 if x < 10 else 0\n", "fail", "pass"),
    ("    while True: pass\n", "timeout", "timeout"), ("    import os; os._exit(0)\n", "crash", "crash"),
    ("    raise SystemExit\n", "fail", "fail"), ("    return [0] * 10**12\n", "oom", "oom"),
    ("    return 'x' * 10**7\n", "crash", "crash"),
    (EQUAL, "fail", "fail"), (":", "fail", "fail"),
    ("    if x == 10:\n        import time; time.sleep(100)\n    return x / 3\n", "timeout", "pass"),
    ("    import sys\n    f = sys._getframe(1)\n    return f.f_locals.get('expected', 0)\n", "fail", "fail"),
])
def test_a_task_judged_by_its_solutions_outputs(completion, verdict, base, tmp_path):
    tasks = read_tasks("humaneval_plus", str(write_lines(tmp_path / "HumanEvalPlus.jsonl", [PLUS])))
    samples = write_lines(tmp_path / "samples.jsonl", [{"task_id": "HumanEval/0", "completion": completion}])
    record = score_samples(samples, tasks, timeout=0.2, limits=Limits(memory=1 << 30), warn=lambda _: None)
    result, = record["results"]
    assert (result["verdict"], result["base"]) == (verdict, base), result
    assert record["pass@1"] == (verdict == "pass") and record["base_pass@1"] == (base == "pass")


# Scores


@pytest.mark.slow
def test_a_score_of_several_samples(tasks, samples, capsys):
    file = samples(*[(0, RIGHT)] * 3, *[(0, WRONG)] * 7, *[(1, WRONG)] * 10, *[(2, RIGHT)] * 10)
    record = score_samples(file, tasks, workers=2)
    assert record["pass@1"] == pytest.approx((0.3 + 0 + 1) / 3) and record["pass@10"] == pytest.approx(2 / 3)
    assert "pass@100" not in record and record["verdicts"] == {"fail": 17, "pass": 13}
    low, high = record["intervals_95"]["pass@1"]
    assert 0 <= low < record["pass@1"] < high <= 1
    assert [result["line"] for result in record["results"]] == list(range(1, 31))
    assert record["data"]["md5"] == tasks.md5 and record["settings"]["timeout"] == 3.0
    assert record["settings"]["timeout_counts"] == "CPU seconds" and record["settings"]["wall_clock_backstop"] == 18
    again = score_samples(file, tasks, workers=1)
    for one in (record, again):
        for result in one["results"]:
            del result["seconds"]
    for key in ("pass@1", "pass@10", "intervals_95", "verdicts", "results"):
        assert again[key] == record[key]


def test_of_a_completion_and_a_solution_in_one_sample_the_solution_is_run(tasks, samples):
    both = {"task_id": "HumanEval/0", "completion": WRONG, "solution": "def add0(a, b):\n    return a + b\n"}
    found, _, _ = read_samples(samples(both), tasks, skip_bad=True)
    assert found[0].whole and found[0].text == both["solution"]


@pytest.mark.slow
@pytest.mark.parametrize("workers, order", [(1, 1), (2, 1), (2, -1)])
def test_the_verdict_of_each_kind_of_sample(workers, order, tasks, samples):
    """The result does not depend on the number of workers and the order."""
    kinds = {"pass": RIGHT, "fail": WRONG, "timeout": "    while True: pass\n", "crash": "    import os; os._exit(0)\n",
             "oom": "    return [0] * 10**12\n"}
    lines = [(i, text) for i in range(3) for text in kinds.values()]
    lines.append({"task_id": "HumanEval/0", "solution": "def add0(a, b):\n    return a + b\n"})
    record = score_samples(samples(*lines[::order]), tasks, workers=workers, timeout=0.2, warn=lambda _: None)
    assert [result["verdict"] for result in record["results"]] == ([*kinds] * 3 + ["pass"])[::order]
    assert record["judged_again"] == 3 == sum("judged_again" in result for result in record["results"])


@pytest.mark.parametrize("audit", [False, True])
def test_what_times_out_is_judged_once_more_alone(audit, tasks, samples, monkeypatch):
    """A timeout of the first judgement does not count, because a busy machine can reach the backstop."""
    judge, running, seen = (Bench.audit if audit else Bench.run), set(), []

    def late_at_first(bench: Bench, task, sample: Sample, seconds: float):
        running.add(sample.line)
        seen.append((sample.line, len(running)))
        outcome = judge(bench, task, sample, seconds)
        time.sleep(0.02)
        running.discard(sample.line)
        late = sample.line == 2 and [line for line, _ in seen].count(2) == 1
        return Outcome(verdict="timeout") if late else outcome

    file = samples(*[(i % 3, RIGHT) for i in range(9)], *[(i % 3, WRONG) for i in range(3)])
    with monkeypatch.context() as patched:
        patched.setattr(verdicts, "self_test", lambda bench: None)
        patched.setattr(Bench, "audit" if audit else "run", late_at_first)
        record = score_samples(file, tasks, workers=2, audit=audit)
    assert record["verdicts"] == {"fail": 3, "pass": 9} and record.get("audit", {"pass": 9}) == {"pass": 9}
    assert seen[-1] == (2, 1) and [line for line, _ in seen].count(2) == 2 and max(count for _, count in seen) == 2
    assert [result["line"] for result in record["results"] if "judged_again" in result] == [2]
    assert record["judged_again"] == 1


@pytest.mark.slow
def test_audit_flags_what_passes_by_deception(tasks, samples):
    reads = ("    import dis, sys\n    code = dis.get_instructions(sys._getframe(1).f_code)\n"
             "    found = [i.argval for i in code if type(i.argval) is int and i.opname.startswith('LOAD')]\n"
             "    return next(z for x, y, z in zip(found, found[1:], found[2:]) if (x, y) == (a, b))\n")
    warnings = []
    record = score_samples(samples((0, RIGHT), (1, EQUAL), (2, reads)), tasks, audit=True, warn=warnings.append)
    assert [r["verdict"] for r in record["results"]] == ["pass", "pass", "pass"]
    assert [r["audit"] for r in record["results"]] == ["pass", "fail", "fail"]
    assert record["pass@1"] == 1 and record["audited_pass@1"] == pytest.approx(1 / 3)
    assert warnings[-1] == ("2 passes do not hold with the tests out of the program's reach: "
                            "HumanEval/1 (line 2), HumanEval/2 (line 3)")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, program in PROGRAMS.items()
                                  if name.startswith("ok") or program.verdict == "fail" or name in
                                  ("crlf", "always_eq", "always_eq_int", "os_exit0", "abort", "read_tests")])
def test_verdicts_agree_with_the_usual_executor(name):
    """The programs are harmless enough for the usual executor."""
    from tests.dllm.evaluators.programs import TESTS

    with Sandbox() as sandbox:
        ours = sandbox.run(PROGRAMS[name].text + TESTS, 3).passed
    if name in ("ok_asyncio", "ok_tempfile"):
        assert ours  # it removes os.getcwd and others from programs, which these need
        return
    done = subprocess.run([sys.executable, "-c", "import sys; from benchmarks.reference_executor import check; "
                           "print(check(sys.stdin.buffer.read().decode('utf-8', 'surrogatepass')))"],
                          input=(PROGRAMS[name].text + TESTS).encode("utf-8", "surrogatepass"), capture_output=True,
                          check=True, cwd=Path(reference_executor.__file__).parents[1])
    assert done.stdout == f"{ours}\n".encode()


def test_exact_match_by_both_rules(data):
    task = next(iter(read_tasks("santacoder_fim", data).tasks.values()))
    line = task.canonical
    for text, first, strict in ((line, True, True), ("\n" + line, True, True), (line + "\n    more", True, False),
                                ("\n\n" + line, False, True), (line.strip(), True, True), (line + "x", False, False)):
        assert exact_match(task, text) == {"exact_match": first, "exact_match_strict": strict}


# The benchmarks' own solutions


@pytest.mark.slow
@pytest.mark.parametrize("name, count", [("humaneval", 164)])
def test_own_solutions_pass_with_and_without_audit(name, count, data, tmp_path):
    tasks = read_tasks(name, data)
    record = score_samples(canonical_samples(tasks, tmp_path / "samples.jsonl"), tasks, audit=True)
    assert record["verdicts"] == {"pass": count} == record["audit"]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Programs with their tests -> outcome; the infilling tasks are all cut from HumanEval's 164 solutions."""
    return {}


all_or_some = pytest.mark.parametrize("chosen", [
    pytest.param(slice(None), marks=pytest.mark.exhaustive, id="all"),
    pytest.param(slice(1, None, 10), id="some")])  # of the tenths one without HumanEval/130, which takes 12 seconds


@pytest.mark.slow
@all_or_some
@pytest.mark.parametrize("name, count", [
    ("humaneval_infill_single_line", 1033), ("humaneval_infill_multi_line", 5815),
    ("humaneval_infill_random_span", 1640),
    ("santacoder_fim", 1043), ("humaneval_plus", 164), ("mbpp_plus", 378)])
def test_own_solutions_pass(name, count, chosen, data, tmp_path, outcomes, monkeypatch):
    """Equal programs run once."""
    run = Bench.run

    def run_once(bench: Bench, task, sample: Sample, seconds: float):
        program = f"{sample.program(task)}\n{task.tests}"
        if program not in outcomes:
            outcomes[program] = run(bench, task, sample, seconds)
        return outcomes[program]

    monkeypatch.setattr(Bench, "run", run_once)
    tasks = read_tasks(name, data)
    assert len(tasks.tasks) == count
    tasks = replace(tasks, tasks=dict(list(tasks.tasks.items())[chosen]))
    record = score_samples(canonical_samples(tasks, tmp_path / "samples.jsonl"), tasks)
    assert record["verdicts"] == {"pass": len(tasks.tasks)} and record["pass@1"] == 1
    if name.endswith("plus"):
        assert record["base_pass@1"] == 1
    if name == "santacoder_fim":
        assert record["exact_match"] == record["exact_match_strict"] == 1


@pytest.mark.slow
@all_or_some
def test_own_solutions_of_mbpp_pass_and_are_audited(chosen, data, tmp_path):
    """With ten seconds, because task 123 takes three. Four tasks pass objects, which no judge outside can."""
    tasks = read_tasks("mbpp", data, every_row=True)
    assert len(tasks.tasks) == 974
    tasks = replace(tasks, tasks=dict(list(tasks.tasks.items())[chosen]))
    record = score_samples(canonical_samples(tasks, tmp_path / "samples.jsonl"), tasks, audit=True, timeout=10)
    assert record["verdicts"] == {"pass": len(tasks.tasks)}
    not_judged = {task: "cannot judge" for task in ("367", "533", "601", "927") if task in tasks.tasks}
    assert {r["task_id"]: r["audit"] for r in record["results"] if r["audit"] != "pass"} == not_judged


@pytest.mark.slow
@pytest.mark.parametrize("name, ids", [
    ("humaneval_plus", ["HumanEval/0", "HumanEval/32", "HumanEval/4", "HumanEval/106"]),
    ("mbpp_plus", [f"Mbpp/{i}" for i in (2, 63, 75, 106, 124, 250, 252, 259, 278, 558, 580, 581, 722)])])
def test_own_solutions_of_the_plus_tasks_with_rules_or_types_of_their_own(name, ids, data, tmp_path):
    tasks = read_tasks(name, data)
    few = TaskSet(name=name, tasks={i: tasks.tasks[i] for i in ids}, source="", md5="", sha256="")
    record = score_samples(canonical_samples(few, tmp_path / "samples.jsonl"), few)
    assert record["verdicts"] == {"pass": len(ids)}


@pytest.mark.slow
def test_plus_verdicts_agree_with_evalplus(data, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(sys.prefix, "evalplus"))])
    evaluation = pytest.importorskip("evalplus.eval", reason="EvalPlus is not there; make .venv/evalplus puts it there")
    groundtruth = pytest.importorskip("evalplus.gen.util")
    checked = {"humaneval_plus": ["HumanEval/0", "HumanEval/2", "HumanEval/21", "HumanEval/53"],
               "mbpp_plus": ["Mbpp/2", "Mbpp/7", "Mbpp/63", "Mbpp/124", "Mbpp/558", "Mbpp/581"]}
    for name, ids in checked.items():
        tasks, dataset = read_tasks(name, data), name.removesuffix("_plus")
        with Sandbox() as programs:
            for task in (tasks.tasks[i] for i in ids):
                bench = Bench(Sandbox)
                bench.programs.close()
                bench.programs = programs
                program, entry_point = task.program(task.canonical), task.names[0]
                for text in (program, program + f"\n_f = {entry_point}\ndef {entry_point}(*x):\n    return None\n",
                             program + f"\n_f = {entry_point}\ndef {entry_point}(*x):\n    y = _f(*x)\n"
                             "    return y + 1e-9 if isinstance(y, float) else y\n"):
                    sample = Sample(task_id=task.task_id, line=1, text=text, whole=True)
                    ours, = verdicts.judge_plus(bench, task, [sample], dataset, 4.0)
                    theirs = []
                    for calls in (task.base_input, task.plus_input):
                        expected, times = groundtruth.trusted_exec(program, list(calls), entry_point, record_time=True)
                        theirs.append(evaluation.untrusted_check(
                            dataset, text, list(calls), entry_point, expected, task.atol, times, True, 4.0)[0])
                    assert (ours["verdict"] == "pass") == (theirs == ["pass", "pass"]), (task.task_id, text)
                bench.judges.close()


# Bad input


def test_bad_lines_are_named_by_number_and_the_rest_scored_only_if_asked(tasks, samples):
    file = samples((0, RIGHT), "{not json", (7, RIGHT), {"completion": "x"}, (1, RIGHT), "",
                   {"task_id": "HumanEval/2", "completion": 5}, [], (2, WRONG))
    with pytest.raises(UserError) as error:
        score_samples(file, tasks)
    assert str(error.value) == (
        f"{file}: line 2 is not JSON; line 3 is of task HumanEval/7, which is not in humaneval; line 4 has no task_id; "
        "line 7 has neither completion nor solution as text; line 8 has no task_id; correct them, or score the rest "
        "with --skip-bad")
    warnings = []
    record = score_samples(file, tasks, skip_bad=True, warn=warnings.append)
    assert record["pass@1"] == pytest.approx(2 / 3) and len(record["skipped_lines"]) == 5
    assert warnings[0].startswith("5 bad lines are left out: line 2 is not JSON; ")


def test_missing_samples_are_named(tasks, samples):
    file = samples((1, RIGHT))
    with pytest.raises(UserError, match="no sample for 2 of 3 tasks: HumanEval/0, HumanEval/2; score .* --skip-bad"):
        score_samples(file, tasks)
    warnings = []
    record = score_samples(file, tasks, skip_bad=True, warn=warnings.append)
    assert record["pass@1"] == 1 and (record["attempted_tasks"], record["tasks"]) == (1, 3)
    assert record["missing_tasks"] == ["HumanEval/0", "HumanEval/2"] and "2 tasks without samples" in warnings[0]


def test_no_sample_at_all(tasks, samples, tmp_path, capsys):
    with pytest.raises(UserError, match="has no sample of humaneval: line 1 is not JSON"):
        score_samples(samples("x"), tasks, skip_bad=True)
    with pytest.raises(UserError, match="cannot read .*no.jsonl: No such file"):
        score_samples(tmp_path / "no.jsonl", tasks)
    assert cli.main(["score", str(tmp_path / "no.jsonl"), "--task", "humaneval", "--data", str(tmp_path / "none")]) == 2
    assert "no.jsonl: No such file" in capsys.readouterr().err  # before the data are looked for


def test_data_other_than_the_manifests_is_refused(tasks, samples, tmp_path):
    file = samples(*((i, RIGHT) for i in range(3)))
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"data": {"md5": tasks.md5, "sha256": tasks.sha256}}))
    assert score_samples(file, tasks)["pass@1"] == 1
    manifest.write_text(json.dumps({"data": {"md5": "0" * 32}}))
    with pytest.raises(UserError, match=f"data with md5 {'0' * 32}, as .*manifest.json says; .* has {tasks.md5}; give"):
        score_samples(file, tasks)
    manifest.write_text("[]")
    with pytest.raises(UserError, match="is no manifest"):
        score_samples(file, tasks)


@pytest.mark.slow
def test_fewer_layers_are_refused_when_strict_and_warned_of_else(tasks, samples):
    file = samples(*((i, RIGHT) for i in range(3)))
    without = tuple(layer for layer in LAYERS if layer != "seccomp")
    with pytest.raises(UserError, match=r"--require-sandbox strict: this machine lacks seccomp \(switched off\): "
                                        "programs may start processes"):
        score_samples(file, tasks, require="strict", layers=without)
    for layers, wanted in ((without, "the sandbox lacks "), ((), "no layer of the sandbox works on this machine")):
        warnings = []
        assert score_samples(file, tasks, layers=layers, warn=warnings.append)["pass@1"] == 1
        assert warnings[0].startswith(wanted)


@pytest.mark.parametrize("broken, told", [("pass", "wanted fail and got pass"), ("fail", "wanted pass and got fail")])
def test_the_self_test_finds_a_sandbox_that_judges_everything_the_same(broken, told, tasks, samples, monkeypatch):
    monkeypatch.setattr(Sandbox, "run", lambda *_: Outcome(verdict=broken))
    with pytest.raises(Failure, match=told):
        score_samples(samples(*((i, RIGHT) for i in range(3))), tasks)


@pytest.mark.slow
def test_a_sandbox_that_breaks_is_renewed_once(tasks, samples, monkeypatch):
    run, broken = Sandbox.run, []

    def break_once(self, program, timeout):
        if "return a - b" in program and "def add1" in program and len(broken) < limit:
            broken.append(self)
            self._process.kill()
        return run(self, program, timeout)

    monkeypatch.setattr(Sandbox, "run", break_once)
    file, limit = samples((0, RIGHT), (1, WRONG), (2, RIGHT)), 1
    assert score_samples(file, tasks, workers=1)["verdicts"] == {"fail": 1, "pass": 2} and len(broken) == 1
    limit = 3
    with pytest.raises(Failure, match="template"):
        score_samples(file, tasks, workers=1)


# The command


def test_the_command_prints_the_score_and_writes_every_sample(tasks, samples, tmp_path, capsys):
    file = samples((0, RIGHT), (1, WRONG), (2, RIGHT))
    assert cli.main(["score", str(file), "--task", "humaneval", "--data", str(tmp_path), "--workers", "1",
                     "--timeout", "5", "--audit", "--output", str(tmp_path / "out" / "result.json")]) == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads((tmp_path / "out" / "result.json").read_text())
    assert [result["verdict"] for result in written.pop("results")] == ["pass", "fail", "pass"]
    assert printed == written and printed["pass@1"] == pytest.approx(2 / 3) and printed["settings"]["timeout"] == 5
    assert set(printed["sandbox"]) == set(LAYERS) and printed["audit"] == {"pass": 2}


@pytest.mark.parametrize("flags, message", [
    (["--task", "humanevil"], "not 'humanevil'; did you mean humaneval?"),
    (["--task", "humaneval", "--timeout", "0"], "must be above 0"),
    (["--task", "humaneval", "--workers", "-1"], "must be above 0"),
    ([], "the following arguments are required: --task"),
    (["--task", "humaneval", "--require-sandbox", "some"], "--require-sandbox is one of strict, best, not 'some'"),
])
def test_wrong_flags_are_one_line(flags, message, tasks, samples, tmp_path, capsys):
    file = samples(*((i, RIGHT) for i in range(3)))
    assert cli.main(["score", str(file), *flags, "--data", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_doctor_tells_the_layers(capsys, monkeypatch):
    from dllm import doctor
    from dllm.evaluators.sandbox import host as sandbox

    monkeypatch.setattr(sandbox.Sandbox.__init__, "__defaults__", (("landlock", "seccomp"), None))
    doctor._describe_sandbox()
    out = capsys.readouterr().out
    assert "pid namespace (switched off): programs see other processes" in out
    assert out.startswith("sandbox          landlock, seccomp\n") or "landlock (" in out or "seccomp (" in out


def test_scoring_needs_no_torch():
    code = "import sys, dllm.evaluators.code.scoring; assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(scoring.__file__).parents[3])


def test_the_flag_for_tasks_names_them(capsys):
    assert cli.main(["score", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told or name.startswith("humaneval_infill") for name in BENCHMARKS)
