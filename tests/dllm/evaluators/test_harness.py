"""lm-evaluation-harness: our model in its command and in ours, likelihoods against enumeration, our task files."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dllm import cli
from dllm.diffusion_lm import DiffusionLM
from dllm.errors import UserError
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.sampler import generate
from dllm.model.families import ModelConfig

pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

from dllm.evaluators.harness.lm import TASKS, HarnessLM, evaluate_task  # noqa: E402
from dllm.evaluators.scoreboard import make_scoreboard  # noqa: E402

ROOT = Path(__file__).parents[3]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LMEVAL_LOG_LEVEL": "WARNING"}
ADD = [{"task_id": f"HumanEval/{i}", "prompt": f"def add{i}(a, b):\n", "entry_point": f"add{i}", "suffix": "",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"} for i in range(2)]


@pytest.fixture(scope="module")
def lm(model_folder) -> HarnessLM:
    return HarnessLM.create_from_arg_obj({"pretrained": str(model_folder), "batch_size": 3, "likelihood_samples": 16})


def requests(*arguments: tuple, doc: dict | None = None) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args, doc=doc) for args in arguments]


def write_rows(folder: Path, name: str, rows: list[dict]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_task(folder: Path) -> None:
    """A local task of each kind, on one file."""
    rows = write_rows(folder, "rows.jsonl", [{"question": f"a = {i}\n", "wrong": "zz", "right": "b"} for i in range(3)])
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
    (folder / "written.yaml").write_text(
        common + "task: written\noutput_type: generate_until\ndoc_to_text: question\ndoc_to_target: right\n"
        "generation_kwargs: {until: [\"\\n\\n\"], max_gen_toks: 6, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n")
    (folder / "chosen.yaml").write_text(
        common + "task: chosen\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: 1\n"
        "doc_to_choice: [\"zz\", \"b\"]\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n")


@pytest.mark.slow
def test_their_own_command_runs_the_model_and_our_tasks_offline(model_folder, tmp_path):
    write_task(tmp_path)
    write_rows(tmp_path, "HumanEval.jsonl", ADD)
    done = subprocess.run(
        [sys.executable, "-m", "dllm", "lm_eval", "--model", "dllm", "--model_args",
         f"pretrained={model_folder},max_new_tokens=6,likelihood_samples=4", "--tasks", "written,chosen,dllm_humaneval",
         "--include_path", str(tmp_path), "--metadata", f"data={tmp_path}", "--output_path", str(tmp_path / "out"),
         "--log_samples", "--batch_size", "2"],
        cwd=ROOT, env={**os.environ, **OFFLINE, "HF_HOME": str(tmp_path / "hub")}, capture_output=True, text=True,
        timeout=200)
    assert done.returncode == 0, done.stderr
    results, = (json.loads(path.read_text()) for path in (tmp_path / "out").rglob("results_*.json"))
    assert results["results"].keys() == {"written", "chosen", "dllm_humaneval"}
    assert results["results"]["dllm_humaneval"]["pass@1,all"] == 0.0
    assert results["config"]["likelihood_samples"] == 4 and results["config"]["generation"]["max_new_tokens"] == 6
    assert len(results["config"]["model_weights_sha256"]) == 64
    written, = (path.read_text().splitlines() for path in (tmp_path / "out").rglob("samples_written_*.jsonl"))
    lm = HarnessLM.create_from_arg_obj({"pretrained": str(model_folder), "max_new_tokens": 6, "batch_size": 2})
    answers = lm.generate_until(requests(*((f"a = {i}\n", {"until": ["\n\n"]}) for i in range(3))), disable_tqdm=True)
    assert [json.loads(line)["resps"][0][0] for line in written] == answers


def test_the_entry_point_that_lm_eval_is_to_read_names_the_model():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["dllm"].partition(":")
    assert (module, name) == (HarnessLM.__module__, HarnessLM.__name__)


def test_texts_are_the_samplers(lm, model, tokenizer):
    prompts = ["def f(x):\n", "import os\nimport", "x"]
    texts = lm.generate_until(requests(*((prompt, {"max_gen_toks": 12}) for prompt in prompts)), disable_tqdm=True)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor(tokenizer(prompt)["input_ids"])
        out = generate(model, ids, None, MDMGenerationConfig(max_new_tokens=12, steps=12)).sequences[0, len(ids):]
        end = (out == tokenizer.eos_token_id).nonzero()
        wanted = tokenizer.decode(out[:int(end[0])] if len(end) else out, skip_special_tokens=True)
        assert text == wanted
    stop = texts[0][2:4]
    cut, = lm.generate_until(requests((prompts[0], {"max_gen_toks": 12, "until": ["never", stop]})), disable_tqdm=True)
    assert cut == texts[0][:texts[0].index(stop)]


def test_samples_depend_on_seed_and_repeat_and_on_nothing_else(model_folder):
    def write(prompts, **arguments):
        lm = HarnessLM.create_from_arg_obj({"pretrained": str(model_folder), "max_new_tokens": 8, **arguments})
        return lm.generate_until(requests(*((prompt, {}) for prompt in prompts)), disable_tqdm=True)

    a, b, again = write(["a", "b", "a"], temperature=1.0)
    assert a != again
    assert write(["b", "a"], temperature=1.0, batch_size=1) == [b, a]
    assert write(["a"], temperature=1.0, seed=1) != [a]


def test_what_a_task_asks_holds_where_model_args_say_nothing(lm, caplog):
    config = lm.config({"max_gen_toks": 20, "temperature": 0.5, "do_sample": True, "top_p": 0.9, "until": ["x"]})
    assert (config.max_new_tokens, config.steps, config.temperature, config.top_p) == (20, 20, 0.5, 0.9)
    assert lm.config({"temperature": 0.5, "do_sample": False}).temperature == 0
    caplog.clear()
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):  # lm-eval's other names
        assert lm.config({name: 20, "max_gen_toks": None, "temperature": None, "top_p": None}).max_new_tokens == 20
    assert not caplog.messages
    own = HarnessLM(lm.model, lm.tokenizer, max_new_tokens=32, block_length=8, temperature=0.0, cache="dual")
    config = own.config({"max_gen_toks": 20, "temperature": 0.5, "do_sample": True})
    assert (config.max_new_tokens, config.steps, config.temperature, config.cache) == (32, 32, 0.0, "dual")
    texts = own.generate_until(requests(("a", {}), ("import os", {})), disable_tqdm=True)  # prompts of unequal length
    assert texts[0] == own.generate_until(requests(("a", {})), disable_tqdm=True)[0]


def test_an_empty_stop_string_stops_nothing(lm):
    plain, stopped = (lm.generate_until(requests(("a", {"max_gen_toks": 6, "until": until})), disable_tqdm=True)
                      for until in ([], ["", "\0\0"]))
    assert plain == stopped


def test_a_blank_context_is_the_beginning_of_a_text(lm):
    """lm-eval moves the blank to the continuation, and nothing is left."""
    blank, empty = lm.loglikelihood(requests((" ", "b"), ("", " b")), disable_tqdm=True)
    assert blank == empty


def test_likelihoods_are_the_bound_by_enumeration(tokenizer):
    """-log p <= mean over n of the mean over sets S of n positions of L / n * sum over S of -log p(token | the rest);
    with all 2^L - 1 sets, in float64."""
    torch.manual_seed(1)
    model = DiffusionLM(ModelConfig(
        family="llama", vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.5,
        mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id, shift_logits=False))
    context, continuation = "x = ", "os.path"
    lms = {samples: HarnessLM(model, tokenizer, likelihood_samples=samples) for samples in (64, 1024)}
    values = {samples: lm.loglikelihood(requests((context, continuation)), disable_tqdm=True)[0]
              for samples, lm in lms.items()}
    lm = lms[64]
    before, after = lm._encode_pair(context, continuation)
    length = len(after)
    assert 3 <= length <= 8
    ids = torch.tensor([before + after])
    model.double()
    means, squares = [], []
    for count in range(1, length + 1):
        nats = []
        for chosen in combinations(range(len(before), len(before) + length), count):
            noisy = ids.clone()
            noisy[0, list(chosen)] = tokenizer.mask_token_id
            with torch.no_grad():
                log = model(noisy).logits[0].log_softmax(-1)
            nats.append(-sum(float(log[place, ids[0, place]]) for place in chosen) * length / count)
        means.append(sum(nats) / len(nats))
        squares.append(sum(value**2 for value in nats) / len(nats))
    model.float()
    exact = sum(means) / length
    deviation = math.sqrt(sum(squares) / length - exact**2)
    for samples, (value, greedy) in values.items():
        assert abs(-value - exact) < 4 * deviation / math.sqrt(samples) and greedy is False
    assert values[64] != values[1024] and deviation > 0.1
    written, = lm._write_surest([(tuple(before), tuple(after))]).values()
    (_, greedy), = lm._loglikelihood_tokens([(None, before, list(written))], disable_tqdm=True)
    assert greedy is True


def test_likelihoods_depend_on_seed_and_texts_and_on_nothing_else(lm, model_folder):
    pairs = [("def f", "(x):"), ("", "import os"), ("def f", " = 1")]
    first = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    assert lm.loglikelihood(requests(*pairs[::-1]), disable_tqdm=True) == first[::-1]
    other = HarnessLM(lm.model, lm.tokenizer, likelihood_samples=16, seed=5)
    assert other.loglikelihood(requests(pairs[0]), disable_tqdm=True)[0][0] != first[0][0]


def test_rolling_likelihoods_count_every_token_once(lm, monkeypatch):
    text = "import os\n" * 150
    tokens = lm.tok_encode(text)
    assert len(tokens) > 2 * 256
    scored = []
    monkeypatch.setattr(lm, "_bound", lambda context, window: scored.append((context, window)) or -float(len(window)))
    assert lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True) == [-len(tokens)]
    assert [token for _, window in scored for token in window] == tokens
    assert all(len(context) + len(window) <= 256 for context, window in scored)


def test_prompts_too_long_lose_their_beginning(lm, caplog):
    long = "import os\n" * 90
    kept = lm._continue(long, lm.config({"max_gen_toks": 6}))
    assert kept.prefix.tolist() == lm.tok_encode(long)[-250:] and "cut on the left" in caplog.text
    with pytest.raises(UserError, match="256 new tokens leave no room for a prompt: the model has 256 positions"):
        lm.generate_until(requests(("a", {"max_gen_toks": 256})), disable_tqdm=True)
    with pytest.raises(UserError, match="a continuation of 256 tokens cannot be scored"):
        lm._loglikelihood_tokens([(None, [1], [5] * 256)], disable_tqdm=True)


@pytest.mark.parametrize("arguments, message", [
    ({"stepz": 4}, "model_args has no 'stepz'; did you mean steps\\? It takes pretrained, device"),
    ({"pretrained": None}, "model_args needs pretrained=MODEL"),
    ({"batch_size": "auto"}, "batch_size must be a number, not 'auto'"),
    ({"likelihood_samples": 1}, "likelihood_samples must be a number of at least 2, not 1"),
    ({"dtype": "int8"}, "dtype must be auto, float32, bfloat16, float16 or float64, not 'int8'"),
    ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
    ({"steps": "many"}, "steps must be a whole number, not 'many'"),
    ({"alg": "best"}, "alg must be one of"),
])
def test_bad_model_args(arguments, message, model_folder):
    given = {name: value for name, value in {"pretrained": str(model_folder), **arguments}.items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        HarnessLM.create_from_arg_obj(given)
    assert "\n" not in str(caught.value)


def test_chat_template_and_cache_are_refused_where_they_cannot_be(lm):
    with pytest.raises(UserError, match="this model has no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "x"}])
    sampling = HarnessLM(lm.model, lm.tokenizer, temperature=0.5)
    with pytest.raises(UserError, match="use_cache would give all repeats of a prompt the same sample"):
        sampling.set_cache_hook(SimpleNamespace(dbdict={}))


def test_gaps_are_filled_between_the_documents_texts(lm):
    doc = {"before": "def f(x):\n", "after": "\n    return y\n", "canonical": "    y = x"}
    text, = lm.generate_until(requests(("", {"gap": "oracle", "until": []}), doc=doc), disable_tqdm=True)
    gap = lm._read_gap(requests(("", {}), doc=doc)[0], {"gap": "oracle"}, lm.config({"gap": "oracle"}))
    assert gap.length == len(lm.tok_encode(doc["canonical"])) and gap.suffix.tolist() == lm.tok_encode(doc["after"])
    assert text != lm.generate_until(requests(("", {"gap": 2}), doc=doc), disable_tqdm=True)[0]
    with pytest.raises(UserError, match="gap must be a number of tokens or oracle, not 'long'"):
        lm.generate_until(requests(("", {"gap": "long"}), doc=doc), disable_tqdm=True)


PLUS = {"task_id": "HumanEval/0", "prompt": "def add(a, b):\n", "entry_point": "add", "atol": 0,
        "canonical_solution": "    return a + b\n", "base_input": [[1, 2]], "plus_input": [[5, 5], [0, 7]]}
ALL = [("humaneval", ADD[0], "HumanEval.jsonl", "    return a - b\n"),
       ("humaneval_plus", PLUS, "HumanEvalPlus.jsonl", "    return 3\n"),  # right for the base arguments
       ("mbpp", {"task_id": 11, "text": "Add.", "code": "def add(a, b):\n    return a + b", "test_setup_code": "",
                 "test_list": ["assert add(1, 2) == 3"]}, "mbpp.jsonl", "def add(a, b): return a"),
       ("mbpp_plus", {**PLUS, "task_id": "Mbpp/900", "prompt": '"""Add."""\n',
                      "canonical_solution": "def add(a, b):\n    return a + b\n"}, "MbppPlus.jsonl",
        "def add(a, b):\n    return 3\n"),
       *((f"humaneval_infill_{kind}", {**ADD[0], "canonical_solution": "    c = a + b\n", "suffix": "    return c\n"},
          f"HumanEval-{name}Infilling.jsonl", "    c = a - b\n")
         for kind, name in (("single_line", "SingleLine"), ("multi_line", "MultiLine"), ("random_span", "RandomSpan")))]


@pytest.mark.slow
def test_every_task_file_passes_the_right_answer_and_fails_the_wrong_one(tmp_path, monkeypatch):
    """The base arguments do not find the wrong answer, and the right answer to a gap ends with a newline. The tests of
    lm-eval's own mbpp_plus and single-line infilling would judge both differently."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(tmp_path)})
    assert manager.all_tasks == sorted(f"dllm_{name}" for name, *_ in ALL)
    for name, row, file, wrong in ALL:
        write_rows(tmp_path, file, [row])
        task, = manager.load([f"dllm_{name}"])["tasks"].values()
        doc, = task.eval_docs
        right = row.get("canonical_solution") or row["code"]
        assert task.doc_to_target(doc) == right and task.fewshot_context(doc, 0) == task.doc_to_text(doc)
        assert task.doc_to_text(doc) == (doc["before"] if name == "mbpp" else row["prompt"])
        assert task.process_results(doc, [[right]]) == {"pass@1": 1.0}, name
        assert task.process_results(doc, [[wrong, right]]) == {"pass@1": 0.5}, name


@pytest.mark.slow
def test_dllm_eval_hands_other_tasks_to_lm_eval(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    write_task(tmp_path)
    command = ["eval", "chosen", str(model_folder), "--include-path", str(tmp_path), "--limit", "2",
               "--likelihood-samples", "4", "--output-dir", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main(command) == 0
    shown = json.loads(capsys.readouterr().out)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert results["manifest"] == manifest == shown["manifest"] and "samples" not in shown
    assert len(results["samples"]["chosen"]) == 2 and manifest["likelihood_samples"] == 4
    assert set(manifest) >= {"weights", "tokenizer", "data", "versions"} and "lm_eval" in manifest["versions"]
    group, = make_scoreboard([tmp_path]).comparisons
    assert group.title == "chosen" and group.runs[0].scores.keys() >= {"acc"}
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)  # without theirs, which take seconds
    lm = HarnessLM.create_from_arg_obj({"pretrained": str(model_folder), "likelihood_samples": 4, "device": "cpu"})
    again = evaluate_task(lm, "chosen", manager, tmp_path / "run", limit=2)
    assert json.loads(json.dumps(again["results"])) == shown["results"]
    with pytest.raises(UserError, match="has a run with another"):
        evaluate_task(lm, "chosen", manager, tmp_path / "run", limit=3)


def test_special_tokens_are_those_of_the_chat_template_alone(lm, monkeypatch):
    text, tokenizer = "a<|mask|>b<|endoftext|>", lm.tokenizer
    assert tokenizer.decode(lm.tok_encode(text)) == text and tokenizer.mask_token_id not in lm.tok_encode(text)
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    monkeypatch.setattr(lm, "chats", False)
    ids = lm.tok_encode(lm.apply_chat_template([{"role": "user", "content": text}]))
    assert ids[-1] == tokenizer.eos_token_id and ids[:-1] == tokenizer(text, split_special_tokens=True)["input_ids"]


def test_answers_of_whole_blocks_end_at_the_tasks_length(lm):
    other = HarnessLM(lm.model, lm.tokenizer, block_length=8, remasking="low_confidence")
    config = other.config({"max_gen_toks": 13})
    assert config.steps == 16
    text, = other.generate_until(requests(("a = ", {"max_gen_toks": 13, "until": []})), disable_tqdm=True)
    whole = generate(lm.model, lm.tokenizer("a = ")["input_ids"], None, replace(config, max_new_tokens=16))
    assert lm.tokenizer.decode(whole.sequences[0, 2:]).startswith(text) or len(text) <= 13 * 8


def test_whether_a_model_writes_a_continuation_does_not_depend_on_longer_ones():
    from tests.dllm.tiny_models import tiny_of

    model = tiny_of("sdar", vocab_size=400, block_length=4, mask_token_id=2)
    lm = HarnessLM.__new__(HarnessLM)
    lm.model, lm.batch_size, lm.generation = model, 8, {"seed": 0}
    context = tuple(range(10, 15))
    alone = lm._write_surest([(context, (0,) * 8)])
    together = lm._write_surest([(context, (0,) * 8), (context[:3], (0,) * 30), (context[:2], (0,))])
    assert together[context, 8] == alone[context, 8]


@pytest.mark.slow
def test_an_unknown_task_is_one_line(capsys, tmp_path):
    assert cli.main(["eval", "perplexty", "m", "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dllm: error: there is no task 'perplexty'; did you mean perplexity?")


def test_without_lm_eval_its_tasks_say_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "dllm.evaluators.harness.lm")
    monkeypatch.delattr("dllm.evaluators.harness.lm", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert cli.main(["eval", "gsm8k", "m", "--output-dir", str(tmp_path)]) == 2
    assert "dllm: error: gsm8k needs lm-eval; dllm's own tasks are perplexity" in (error := capsys.readouterr().err)
    assert "pip install 'dllm[eval]'" in error
