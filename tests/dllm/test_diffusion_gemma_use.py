"""DiffusionGemma as users meet it: the commands, the evaluations and the server, on a tiny folder."""

import json
import re
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from dllm import cli
from dllm.data import Document
from dllm.errors import UserError
from dllm.evaluators.held_out import HeldOutSettings
from dllm.evaluators.likelihood import masked_accuracy, perplexity_bound
from dllm.generation.checks import NO_MASK
from dllm.generation.config import MDMGenerationConfig, published_settings
from dllm.generation.sampler import generate
from dllm.model.loading import load_with_tokenizer
from dllm.model.tokenizer import begin_text, cut_at_end, decode_after, encode
from dllm.pages.denoising import animation, record

TEXT = "def add(x, y):\n    return x + y\n"
TEMPLATE = "<bos>{% for message in messages %}{{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def loaded(gemma_folder):
    return load_with_tokenizer(gemma_folder)


@pytest.fixture
def fails(capsys):
    """Run a command that must fail, with one line on stderr, which is returned."""
    def run(*arguments) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("dllm: error: ") and err.count("\n") == 1, err
        return err
    return run


def test_the_tokenizer_has_no_mask_token_and_texts_begin_with_bos(loaded):
    model, tokenizer = loaded
    assert model.mask_token_id is None and tokenizer.mask_token is None and model.end_token_ids == [0]
    ids = begin_text(tokenizer, encode(tokenizer, "a<mask>b"))
    assert ids[0] == tokenizer.bos_token_id == 400 and 401 not in ids
    assert tokenizer.decode(ids[1:]) == "a<mask>b"


def test_sample_gives_the_samplers_text_and_shows_it(gemma_folder, loaded, capsys, tmp_path):
    model, tokenizer = loaded
    flags = ["sample", str(gemma_folder), "--prompt", "def <mask>", "--seed", "3"]
    outputs = ["--save-html", str(tmp_path / "page.html"), "--output", str(tmp_path / "record.json")]
    assert cli.main([*flags, *outputs]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"(\d+) steps, \1 forward passes, .* seed 3\n$", err)
    ids = begin_text(tokenizer, encode(tokenizer, "def <mask>"))
    sequence = generate(model, ids, None, MDMGenerationConfig(
        **published_settings(model.generation_defaults), seed=3)).sequences[0]
    assert sequence.shape == (len(ids) + 20,)
    assert out == "def <mask>" + decode_after(tokenizer, ids, cut_at_end(tokenizer, sequence[len(ids):])) + "\n"
    settings = json.loads((tmp_path / "record.json").read_text())["settings"]
    assert (settings["alg"], settings["steps"], settings["entropy_bound"]) == ("entropy_bound", 3, 8.0)
    assert (tmp_path / "page.html").read_text().count("entropy_bound") >= 1
    assert cli.main([*flags, "--watch", "--steps", "2", "--max-new-tokens", "8"]) == 0
    assert "2 steps" in capsys.readouterr().err


def test_a_page_plays_words_that_change(loaded):
    model, tokenizer = loaded
    prompt = torch.cat((begin_text(tokenizer, encode(tokenizer, "def")), torch.full((12,), NO_MASK)))
    trace = record(model, prompt, MDMGenerationConfig(alg="entropy_bound", steps=3, entropy_bound=8.0, seed=0))
    played = animation(trace, tokenizer)
    assert played["start"][-12:] == [None] * 12 and len(played["start"]) == len(prompt)
    places = [place for step in played["steps"] for place, *_ in step]
    assert len(places) > len(set(places)) and trace.masked == 0  # some words changed again; none is missing


@pytest.mark.parametrize("flags, message", [
    (["sample", "--mask-token", "<mask>"], "DiffusionGemma has no mask token"),
    (["sample", "--temperature", "0.5"], "temperature does not go with .*; set t_min and t_max"),
    (["sample", "--regex", "a+"], r"a constraint \(response_format, --regex, --json-schema\) does not go with"),
    (["sample", "--alg", "p2"], "entropy_bound needs alg entropy_bound|p2 fills masks"),
    (["sample", "--block-length", "9"], "block_length 9 is a longer canvas than the 8 tokens"),
    (["sample", "--t-min", "0.9"], "t_min 0.9 must be below t_max 0.8"),
    (["infill", "--prefix", "a", "--suffix", "b", "--length", "3"], "cannot fill a gap that text follows"),
    (["infill", "--prefix", "a", "--suffix", "b"], "no length of a gap to choose"),
    (["edit", "--text", "a b"], "alg edit needs|edit fills masks"),
    (["eval", "masked_accuracy"], "nor accuracies of masked tokens"),
    (["eval", "infill"], "cannot fill a gap that text follows|fills masks"),
])
def test_what_it_cannot_do_is_one_line(gemma_folder, fails, tmp_path, flags, message):
    command, *rest = flags
    extra = ["--prompt", "a"] if command == "sample" else []
    if command == "eval":
        (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT * 4}) + "\n")
        command, *rest = command, *rest, gemma_folder, "--data", tmp_path / "text.jsonl"
        assert re.search(message, fails(command, *rest))
    else:
        assert re.search(message, fails(command, gemma_folder, *extra, *rest))


@torch.no_grad()
def test_perplexity_is_exact_by_the_encoder(loaded, gemma_folder, capsys, tmp_path):
    model, tokenizer = loaded
    documents = [Document(TEXT * 3, "a"), Document("x = 1\n", "b")]
    settings = HeldOutSettings(max_seq_len=20)
    result = perplexity_bound(model, tokenizer, documents, settings)
    assert result.exact and result.samples == 0 and result.monte_carlo_stderr is None
    total, count = 0.0, 0
    for document in documents:
        ids = torch.cat((encode(tokenizer, document.text), torch.tensor([0])))
        for window in ids.split(20):
            if len(window) > 1:
                row = begin_text(tokenizer, window)
                logs = model(row.unsqueeze(0)).logits[0].double().log_softmax(-1)
                total -= float(logs[1:-1].gather(1, row[2:, None]).sum())
                count += len(window) - 1
    assert result.tokens == count and result.nats_per_token == pytest.approx(total / count, abs=1e-5)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": document.text}) + "\n" for document in documents))
    assert cli.main(["eval", "perplexity", str(gemma_folder), "--data", str(tmp_path / "text.jsonl"), "--max-seq-len",
                     "20"]) == 0
    told = json.loads(capsys.readouterr().out)["result"]
    assert told["exact"] and told["nats_per_token"] == pytest.approx(result.nats_per_token)
    for refused in (lambda: model_bound(gemma_folder), lambda: masked_accuracy(model, tokenizer, documents)):
        with pytest.raises(UserError, match="has no bound of masked diffusion"):
            refused()


def model_bound(folder):
    from dllm.diffusion_lm import DiffusionLM

    return DiffusionLM.from_pretrained(folder).perplexity_bound([[5, 6, 7]])


def test_lm_eval_gets_exact_likelihoods_and_canvases(loaded):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from dllm.evaluators.harness.lm import HarnessLM

    model, tokenizer = loaded
    lm = HarnessLM(model, tokenizer)
    pairs = [("def f", "(x):"), ("", "import os")]
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], True)
    row = begin_text(tokenizer, torch.tensor(lm.tok_encode("def f(x):")))
    n = len(lm.tok_encode("(x):"))
    logs = model(row.unsqueeze(0)).logits[0].log_softmax(-1)
    assert found[0][0] == pytest.approx(float(logs[-n - 1:-1].gather(1, row[-n:, None]).sum()), abs=1e-4)
    assert found[0][1] is False
    likeliest = int(logs[len(row) - n - 1].argmax())
    assert lm._exact(tuple(row[:-n].tolist()), (likeliest,))[1] is True
    text, = lm.generate_until([Instance("generate_until", {}, ("def f", {
        "max_gen_toks": 12, "until": ["zz"], "temperature": 0.3}), 0)], True)
    config = lm.config({"max_gen_toks": 12})
    assert (config.alg, config.steps, config.temperature, config.max_new_tokens) == ("entropy_bound", 3, 0.0, 12)
    assert isinstance(text, str) and lm.get_model_info()["loglikelihood"] == "log p"


def test_code_benchmarks_take_its_preset(gemma_folder, capsys, tmp_path):
    task = {"task_id": "HumanEval/0", "prompt": "def one():\n", "canonical_solution": "    return 1\n",
            "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    command = ["eval", "humaneval", str(gemma_folder), "--data", str(tmp_path / "tasks.jsonl"), "--max-new-tokens",
               "12", "--steps", "2", "--output-dir", str(tmp_path / "run")]
    assert cli.main([*command, "--preset", "diffusion_gemma"]) == 0
    assert json.loads(capsys.readouterr().out)["preset"] == "diffusion_gemma"
    assert json.loads((tmp_path / "run" / "samples.jsonl").read_text())["unfilled"] == 0
    assert cli.main([*command[:-1], str(tmp_path / "other")]) == 2
    assert "fills masks; set alg to entropy_bound" in capsys.readouterr().err


@contextmanager
def running(model, tokenizer):
    from dllm.server.app import make_app
    from dllm.server.listening import bind, make_server

    tokenizer.chat_template = TEMPLATE
    defaults = MDMGenerationConfig(**published_settings(model.generation_defaults))
    listening = bind("127.0.0.1", 0)
    server = make_server(make_app(model, tokenizer, "tiny", defaults))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def test_the_server_streams_canvas_after_canvas_and_refuses_the_rest(loaded):
    httpx, _, _ = map(pytest.importorskip, ("httpx", "greenlet", "fastapi"))
    model, tokenizer = loaded
    with running(model, tokenizer) as url:
        asked = {"prompt": "def f", "max_tokens": 20, "seed": 5}
        answer = httpx.post(f"{url}/completions", json=asked).json()
        ids = begin_text(tokenizer, encode(tokenizer, "def f"))
        alone = generate(model, ids, None, MDMGenerationConfig(
            **published_settings(model.generation_defaults), seed=5)).sequences[0, len(ids):]
        text = decode_after(tokenizer, ids[-4:], cut_at_end(tokenizer, alone))
        assert answer["choices"][0]["text"] == text and answer["diffusion"]["method"] == "entropy_bound"
        lines = httpx.post(f"{url}/completions", json={**asked, "stream": True}).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        parts = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]]
        assert "".join(parts) == text and 1 <= sum(map(bool, parts)) <= 3  # canvases of 8, 8 and 4 tokens
        drafts = httpx.post(f"{url}/completions", json={**asked, "stream": True, "diffusing": True}).text
        assert "\u2592" in drafts
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "n": 2, "seed": 1}
        both = httpx.post(f"{url}/chat/completions", json=chat).json()
        assert len(both["choices"]) == 2
        for path, body, message in (
                ("completions", {"suffix": "x"}, "suffix, fim and edit are not supported"),
                ("completions", {"temperature": 0.7}, "temperature does not go"),
                ("completions", {"diffusion": {"cache": "dual"}}, "cache does not go"),
                ("completions", {"diffusion": {"cfg_scale": 1.0}}, "cfg_scale does not go"),
                ("completions", {"response_format": {"type": "regex", "regex": "a+"}}, "response_format"),
                ("completions", {"prompt": [5, 403, 6]}, "image token 403"),
                ("edit/completions", {"messages": [{"role": "user", "content":
                    "<|code_to_edit|>\na\n<|/code_to_edit|>"}]}, "suffix, fim and edit are not supported")):
            got = httpx.post(f"{url}/{path}", json={"max_tokens": 8, **({"prompt": "a"} if path == "completions" else
                                                                        {}), **body})
            assert got.status_code == 400 and message in got.json()["error"]["message"], got.text


def test_many_requests_share_the_server(loaded):
    httpx, _, _ = map(pytest.importorskip, ("httpx", "greenlet", "fastapi"))
    model, tokenizer = loaded
    with running(model, tokenizer) as url, httpx.Client(timeout=60) as client:
        bodies = [{"prompt": f"def f{i}", "max_tokens": 9 + 4 * i, "seed": i} for i in range(4)]
        alone = [client.post(f"{url}/completions", json=body).json()["choices"][0]["text"] for body in bodies]
        together: dict[int, str] = {}

        def ask(i):
            together[i] = client.post(f"{url}/completions", json=bodies[i]).json()["choices"][0]["text"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [together[i] for i in range(4)] == alone
