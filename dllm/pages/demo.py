"""The demo's report, and the page of a sample being denoised."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup
from torch.nn.functional import avg_pool1d

from dllm.evaluators.baselines import BaselineResult
from dllm.evaluators.likelihood import MaskedResult, PerplexityResult
from dllm.evaluators.line_infilling import InfillingExample, InfillingResult
from dllm.pages.base import color_of, fill, plot
from dllm.pages.denoising import Animation

EXAMPLES_SHOWN = 6  # of each kind
CONTEXT_LINES = 7  # shown of a function before, and after, the infilled line


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the page says. Text is plain text."""

    verdict: str
    success: bool
    perplexity: PerplexityResult
    masked: Sequence[MaskedResult]  # one per share ...
    baselines: Sequence[BaselineResult]  # ... and the baselines at the same shares
    infilled: Mapping[str, InfillingResult]  # by what was hidden: words, lines
    before: Mapping[str, InfillingResult] | None  # the same by the model that was adapted
    training: Sequence[tuple[float, float]]  # (step, loss in nats per corrupted token)
    validation: Sequence[tuple[float, float]]
    animation: Animation
    animation_source: str
    animation_truth: str
    facts: Mapping[str, str]  # machine, versions, sizes
    command: str
    config: str  # YAML


def write_report(report: Report) -> str:
    """The whole page."""
    predictors = {"model": report.masked, "bigram": [baseline.bigram for baseline in report.baselines],
                  "unigram": [baseline.unigram for baseline in report.baselines]}
    best = [(max(result.accuracy for result in column), min(result.nats for result in column))
            for column in zip(*predictors.values(), strict=True)]
    return fill("demo.html", report=report, predictors=predictors, best=best,
                perplexity=math.exp(report.perplexity.nats_per_token),
                curve=report.training and loss_curve(report.training, report.validation),
                examples={kind: list(map(_shorten, result.examples[:EXAMPLES_SHOWN]))
                          for kind, result in report.infilled.items()})


def write_sample(animations: Sequence[Animation], details: Mapping[str, str], command: str) -> str:
    """The page of `dllm sample --save-html`: each text being denoised, and how that was done."""
    return fill("sample.html", animations=animations, details=details, command=command)


def _shorten(example: InfillingExample) -> dict:
    """The infilled line with the nearest lines of its function, without their common indentation."""
    before, _, start = example.prefix.rpartition("\n")
    rest, _, after = example.suffix.partition("\n")
    lines_before = before.split("\n") if before else []
    lines_after = after.rstrip().split("\n") if after.strip() else []
    lines_before = ["…"] * (len(lines_before) > CONTEXT_LINES) + lines_before[-CONTEXT_LINES:]
    lines_after = lines_after[:CONTEXT_LINES] + ["…"] * (len(lines_after) > CONTEXT_LINES)
    indent = min((len(line) - len(line.lstrip()) for line in [*lines_before, start + "x", *lines_after]
                  if line.strip() not in ("", "…")), default=0)

    def dedent(lines: Sequence[str]) -> str:
        return "\n".join(line if line == "…" else line[indent:] for line in lines)

    return {"source": example.source, "tokens": example.tokens, "exact": example.exact, "before": dedent(lines_before),
            "start": dedent([start]), "infilled": example.infilled, "truth": example.truth, "rest": rest,
            "after": dedent(lines_after)}


def loss_curve(training: Sequence[tuple[float, float]], validation: Sequence[tuple[float, float]]) -> Markup:
    """SVG of (step, loss) points; the training loss raw and faint, and averaged over 1/20 of the run."""
    steps, losses = zip(*training, strict=True)
    reach = max(1, len(losses) // 40)
    smooth = avg_pool1d(torch.tensor([losses], dtype=torch.double), 2 * reach + 1, 1, reach, count_include_pad=False)[0]
    settled = losses[len(losses) // 50:]  # the first losses would flatten the rest

    def draw(axes):
        axes.plot(steps, losses, color=color_of("s0"), alpha=0.25, linewidth=1)
        axes.plot(steps, smooth, color=color_of("s0"), label="training")
        if validation:
            axes.plot(*zip(*validation, strict=True), "o-", color=color_of("s1"), markersize=5, label="validation")
        axes.set_ylim(top=1.02 * max([*smooth.tolist(), *settled, *(loss for _, loss in validation)]))
        axes.locator_params("x", integer=True)
        axes.locator_params("y", nbins=6)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set(title="loss, nats", xlabel="step")
        axes.legend(loc="upper right")

    return plot(f"Loss in nats over {steps[-1]:,g} steps: training ends at {smooth[-1]:.2f}", draw)
