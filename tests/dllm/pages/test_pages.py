"""Pages: what the report shows, plots that are the same again, and pages without matplotlib."""

import re
import sys
from dataclasses import replace

import pytest
from jinja2 import UndefinedError

from dllm.evaluators.baselines import BaselineResult
from dllm.evaluators.likelihood import MaskedResult, PerplexityResult
from dllm.evaluators.line_infilling import InfillingExample, InfillingResult
from dllm.pages.base import color_of, fill, plot
from dllm.pages.demo import Report, loss_curve, write_report

EXAMPLE = InfillingExample(source="a<b.py", prefix="    def f():\n        ", suffix="\n        return 1 < 2\n",
                           truth="x = 1", infilled="y = <1>", tokens=3, exact=False)


FILLED = InfillingResult(exact_match=0.25, low=0.1, high=0.5, lines=4, tokens_per_forward=1.5, examples=(EXAMPLE,))


def result(accuracy: float, nats: float) -> MaskedResult:
    return MaskedResult(share=0.5, accuracy=accuracy, accuracy_stderr=0.01, nats=nats, nats_stderr=None, positions=9)


@pytest.fixture
def report() -> Report:
    return Report(
        verdict="It beats <both>.", success=True,
        perplexity=PerplexityResult(perplexity_bound=7.389, nats_per_token=2.0, nats_per_token_stderr=None,
                                    monte_carlo_stderr=None, bits_per_byte=1.25, bits_per_byte_stderr=0.5, documents=2,
                                    windows=3, tokens=1234, bytes=4000, samples=2),
        masked=[result(0.4, 3.0)], baselines=[BaselineResult(unigram=result(0.1, 6.0), bigram=result(0.6, 5.0))],
        infilled={"lines": FILLED}, before=None,
        training=[(1, 6.9), (2, 5.0), (3, 4.0)], validation=[(3, 4.5)], animation={"start": ["a", None], "steps": []},
        animation_source="c.py", animation_truth="a < b",
        facts={"Parameters": "9", "Training time": "1 s", "Training data": "<files>"}, command="dllm demo",
        config="a: 1")


def test_an_example_is_dedented_and_escaped(report):
    page = write_report(report)
    assert '<pre><span class="context">def f():</span><span class="row differs"><b>model </b>    ' in page
    assert "<mark>y = &lt;1&gt;</mark></span>" in page and "a&lt;b.py" in page
    assert '<span class="context">    return 1 &lt; 2</span></pre>' in page and "<b>truth </b>" in page
    exact = replace(EXAMPLE, exact=True)
    page = write_report(replace(report, infilled={"lines": replace(FILLED, examples=(exact,))}))
    assert "<b>truth </b>" not in page and "✓ exact" in page


def test_an_adapted_model_stands_beside_what_it_was(report):
    facts = {**report.facts, "Adapted from": "<base>"}
    page = write_report(replace(report, before={"lines": replace(FILLED, exact_match=0.125)}, facts=facts))
    assert "of &lt;base&gt;,\nwhich writes from left to right" in page and "before, from left to right: 12%" in page
    assert "from left to right" not in write_report(report)


def test_the_best_of_a_column_stands_out_and_everything_else_is_escaped(report):
    page = write_report(report)
    assert re.findall(r'class="best">([\d.]+)', page) == ["3.00", "60.0"]
    assert "at most\n2.000 nats per token,\n1.250 ± 0.500 bits per byte" in page
    assert "It beats &lt;both&gt;." in page and "a &lt; b" in page and "&lt;files&gt;" in page


def test_the_report_has_a_plot_in_the_colours_of_the_page_that_says_what_it_shows(report):
    page = write_report(report)
    assert page.count("<svg") == 1 and write_report(report) == page
    assert 'role="img" aria-label="Loss in nats over 3 steps: training ends at 4.50"' in page
    curve = loss_curve(report.training, report.validation)
    assert "var(--s0)" in curve and "var(--s1)" in curve and "var(--soft)" in curve and "#0000" not in curve
    assert loss_curve([(1, 6.9)], []).count("<svg") == 1
    assert "No training step was recorded." in write_report(replace(report, training=[], validation=[]))


def test_text_in_a_plot_is_text_and_ids_stand_once(report):
    def draw(axes):
        axes.plot([0, 1], [0, 1], "o", color=color_of("s5"))
        axes.set_title("acc <$x$>")

    plots = [plot(title, draw) for title in ('a"<b>', "c")]
    assert "acc &lt;$x$&gt;" in plots[0] and 'aria-label="a&#34;&lt;b&gt;"' in plots[0]
    ids = re.findall(r' id="([^"]*)"', "".join(plots))
    assert ids and len(ids) == len(set(ids))


def test_without_matplotlib_the_page_says_what_plots_need(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = write_report(report)
    assert "<svg" not in page and page.count("pip install 'dllm[plot]'") == 1 and "It beats" in page


def test_a_template_that_lacks_a_value_is_an_error():
    with pytest.raises(UndefinedError, match="'animations' is undefined"):
        fill("sample.html", details={}, command="")
