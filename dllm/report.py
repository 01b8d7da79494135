"""Pages with everything inside them, made for no network, phones, dark and light screens: the demo's report, and the
denoising of a sample."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dllm.evaluators.baselines import BaselineResult
from dllm.evaluators.infilling import InfillingExample, InfillingResult
from dllm.evaluators.perplexity import MaskedResult, PerplexityResult
from dllm.visualize import ANIMATION_SCRIPT, ANIMATION_STYLE

EXAMPLES_SHOWN = 8
CONTEXT_LINES = 7  # shown of a function before, and after, the infilled line


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the page says. Text is plain text; only `animation` is HTML."""

    verdict: str
    success: bool
    perplexity: PerplexityResult
    masked: Sequence[MaskedResult]  # one per share ...
    baselines: Sequence[BaselineResult]  # ... and the baselines at the same shares
    infilling: InfillingResult
    training: Sequence[tuple[float, float]]  # (step, loss in nats per corrupted token)
    validation: Sequence[tuple[float, float]]
    animation: str
    animation_source: str
    animation_truth: str
    facts: Mapping[str, str]  # machine, versions, sizes
    command: str
    config: str  # YAML


def write_report(report: Report) -> str:
    """The whole page."""
    shares = [f"{result.share:.0%}" for result in report.masked]
    last = len(report.masked) - 1
    return f"""{page_head("dllm demo: a masked diffusion language model of Python")}
<header>
<h1>A masked diffusion language model, trained on this machine</h1>
<p class="lead">{html.escape(_lead(report.facts))}</p>
<p class="verdict {"good" if report.success else "bad"}">
<span aria-hidden="true">{"✓" if report.success else "✗"}</span> <span>{html.escape(report.verdict)}</span></p>
<div class="tiles">
{_tile(f"{report.masked[last].accuracy:.1%}", f"of hidden tokens predicted with {shares[last]} hidden",
       f"bigram {report.baselines[last].bigram.accuracy:.1%}, unigram {report.baselines[last].unigram.accuracy:.1%}")}
{_tile(f"{report.perplexity.bits_per_byte:.2f}", "bits per byte at most",
       f"{report.perplexity.nats_per_token:.2f} nats per token, perplexity at most "
       f"{math.exp(report.perplexity.nats_per_token):.0f}")}
{_tile(f"{report.infilling.exact_match:.0%}", f"of {report.infilling.lines} held-out lines infilled exactly",
       f"95% interval {report.infilling.low:.0%} to {report.infilling.high:.0%}")}
</div>
</header>

<section aria-labelledby="watch">
<h2 id="watch">Watch it write</h2>
<p>Statements of a held-out function are hidden and filled in, the surest token first. Source:
<code>{html.escape(report.animation_source)}</code></p>
<div class="card">{report.animation}</div>
<details><summary>What the author had written</summary>
<pre class="card">{html.escape(report.animation_truth)}</pre></details>
</section>

<section aria-labelledby="numbers">
<h2 id="numbers">Against counting words</h2>
<p>Tokens of held-out files are hidden at random and must be predicted. The baselines count the training files and are
asked about exactly the same tokens: <em>unigram</em> knows how frequent each token is, <em>bigram</em> (interpolated
Kneser-Ney) also what follows the left neighbour, where that is visible.</p>
{_comparison(report.masked, report.baselines)}
<p class="soft">± is the standard error were other files held out. The perplexity bound is a Monte Carlo estimate over
{report.perplexity.windows:,} windows ({report.perplexity.tokens:,} tokens, {report.perplexity.samples} copies corrupted
differently): at most
{report.perplexity.nats_per_token:.3f}{_error(report.perplexity.nats_per_token_stderr)} nats per token,
{report.perplexity.bits_per_byte:.3f}{_error(report.perplexity.bits_per_byte_stderr)} bits per byte.</p>
</section>

<section aria-labelledby="loss">
<h2 id="loss">Loss</h2>
<figure class="card">{loss_curve(report.training, report.validation)}
<figcaption class="key"><span class="train">training</span><span class="validation">validation</span></figcaption>
</figure>
</section>

<section aria-labelledby="infilled">
<h2 id="infilled">Lines filled in</h2>
<p>One line of each function is hidden, and the model is told how many tokens it has. These are the first
{min(EXAMPLES_SHOWN, len(report.infilling.examples))} of {report.infilling.lines} drawn by the seed, not chosen.</p>
<div class="examples">{"".join(map(_example, report.infilling.examples[:EXAMPLES_SHOWN]))}</div>
</section>

<section aria-labelledby="how">
<h2 id="how">How this was made</h2>
<div class="card"><dl>{"".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in report.facts.items())}
<dt>Command</dt><dd><code>{html.escape(report.command)}</code></dd></dl></div>
<details><summary>Configuration</summary><pre class="card">{html.escape(report.config)}</pre></details>
</section>
</main>
<script>{ANIMATION_SCRIPT}</script>
</body>
</html>
"""


def write_sample(animations: Sequence[str], facts: Mapping[str, str], command: str) -> str:
    """The page of `dllm sample --save-html`: each text being denoised, and how that was done."""
    cards = "".join(f'<div class="card">{animation}</div>' for animation in animations)
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    return f"""{page_head("dllm: a text being denoised")}
<h1>A text being denoised</h1>
<p class="soft">Grey is still hidden. A committed token has the colour of the confidence with which it was committed;
tick “order” for the step that committed it.</p>
<div class="examples">{cards}</div>
<h2>How</h2>
<div class="card"><dl>{rows}<dt>Command</dt><dd><code>{html.escape(command)}</code></dd></dl></div>
</main>
<script>{ANIMATION_SCRIPT}</script>
</body>
</html>
"""


def page_head(title: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{PAGE_STYLE}{ANIMATION_STYLE}</style>
</head>
<body>
<main>"""


def _lead(facts: Mapping[str, str]) -> str:
    return f"{facts['Parameters']} parameters, trained for {facts['Training time']} on {facts['Training data']}."


def _tile(value: str, label: str, beside: str) -> str:
    return (f'<div class="tile card"><strong>{html.escape(value)}</strong><span>{html.escape(label)}</span>'
            f'<small>{html.escape(beside)}</small></div>')


def _error(error: float | None) -> str:
    return "" if error is None else f" ± {error:.3f}"


def _comparison(masked: Sequence[MaskedResult], baselines: Sequence[BaselineResult]) -> str:
    """The table: a row for each predictor, accuracy and nats for each share; the best of each column stands out."""
    rows = {"model": masked, "bigram": [b.bigram for b in baselines], "unigram": [b.unigram for b in baselines]}
    head = "".join(f'<th colspan="2" scope="colgroup">{result.share:.0%} hidden</th>' for result in masked)
    units = '<th scope="col">accuracy</th><th scope="col">nats per token</th>' * len(masked)
    body = ""
    for name, results in rows.items():
        cells = ""
        for column, result in enumerate(results):
            rivals = [others[column] for others in rows.values()]
            accuracy = result.accuracy == max(rival.accuracy for rival in rivals)
            nats = result.nats == min(rival.nats for rival in rivals)
            spread = "" if result.accuracy_stderr is None else f"<small> ± {100 * result.accuracy_stderr:.1f}</small>"
            cells += (f'<td{" class=best" * accuracy}>{100 * result.accuracy:.1f}%{spread}</td>'
                      f'<td{" class=best" * nats}>{result.nats:.2f}</td>')
        body += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    return (f'<div class="card scroll"><table><thead><tr><td></td>{head}</tr><tr><td></td>{units}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def _example(example: InfillingExample) -> str:
    """A function with the masked tokens filled in, above the truth; long functions are shortened around the line."""
    before, _, start = example.prefix.rpartition("\n")
    rest, _, after = example.suffix.partition("\n")
    lines_before = before.split("\n") if before else []
    lines_after = after.rstrip().split("\n") if after.strip() else []
    lines_before = ["…"] * (len(lines_before) > CONTEXT_LINES) + lines_before[-CONTEXT_LINES:]
    lines_after = lines_after[:CONTEXT_LINES] + ["…"] * (len(lines_after) > CONTEXT_LINES)
    indent = min((len(line) - len(line.lstrip()) for line in [*lines_before, start + "x", *lines_after]
                  if line.strip() not in ("", "…")), default=0)

    def code(lines: Sequence[str]) -> str:
        return html.escape("\n".join(line if line == "…" else line[indent:] for line in lines))

    def row(kind: str, label: str, text: str) -> str:
        middle = html.escape(text).replace("\n", "↵\n")
        return f'<span class="row {kind}"><b>{label}</b>{code([start])}<mark>{middle}</mark>{html.escape(rest)}</span>'

    verdict = "exact" if example.exact else "differs"
    rows = row(verdict, "model ", example.infilled)
    rows += "" if example.exact else row("truth", "truth ", example.truth)
    badge = "✓ exact" if example.exact else "✗ differs"
    return (f'<article class="card"><h3><span class="badge {verdict}">{badge}</span>'
            f'<code>{html.escape(example.source)}</code><small>{example.tokens} tokens</small></h3>'
            f'<pre><span class="context">{code(lines_before)}</span>{rows}'
            f'<span class="context">{code(lines_after)}</span></pre></article>')


def loss_curve(training: Sequence[tuple[float, float]], validation: Sequence[tuple[float, float]]) -> str:
    """An SVG line chart of (step, loss) points; the training loss raw and faint, and smoothed over 1/20 of the run."""
    if not training:
        return "<p>No training step was recorded.</p>"
    width, height, left, bottom, top, right = 720, 300, 48, 34, 14, 34
    smooth = moving_average([loss for _, loss in training], max(1, len(training) // 40))
    values = [*smooth, *(loss for _, loss in validation)]
    highest = max(values + [loss for _, loss in training[len(training) // 50:]])
    low, high, tick = round_axis(min(values), highest)
    last = max(training[-1][0], 1)

    def x(step: float) -> float:
        return left + (width - left - right) * step / last

    def y(loss: float) -> float:
        return top + (height - top - bottom) * (high - min(max(loss, low), high)) / (high - low)

    def line(points: Sequence[tuple[float, float]], kind: str) -> str:
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
        return f'<polyline class="{kind}" points="{path}"/>'

    grid = ""
    for n in range(round((high - low) / tick) + 1):
        value = low + n * tick
        grid += (f'<line x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
                 f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    _, step_high, step_tick = round_axis(0, last)
    for n in range(int(step_high / step_tick) + 1):
        if n * step_tick <= last:
            grid += f'<text x="{x(n * step_tick):.1f}" y="{height - 12}" text-anchor="middle">{n * step_tick:,g}</text>'
    steps = [step for step, _ in training]
    dots = "".join(
        f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="3"><title>step {step:,g}: {loss:.3f}</title></circle>'
        for step, loss in validation)
    smooth_points = list(zip(steps, smooth, strict=True))
    lines = line(training, "raw") + line(smooth_points, "train") + line(validation, "validation")
    return (f'<svg class="curve" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="Loss in nats over {last:,g} steps: training ends at {smooth[-1]:.2f}">'
            f'<g class="grid">{grid}</g>{lines}<g class="dots">{dots}</g></svg>')


def moving_average(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and its up to `reach` neighbours on either side."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    bounds = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in bounds]


def round_axis(low: float, high: float) -> tuple[float, float, float]:
    """An axis around low..high, about five ticks, 1, 2 or 5 times a power of ten apart: (start, end, that distance)."""
    high = max(high, low + 1e-3 * max(abs(low), 1))  # one value alone makes an axis too
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    tick = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return math.floor(low / tick) * tick, math.ceil(high / tick) * tick, tick


PAGE_STYLE = """
:root { --ground: #f7f7f4; --card: #ffffff; --ink: #1c2024; --soft: #5b636b; --line: #dcdfe2; --accent: #2266b3;
  --mask: #c6ccd2; --good: #1b7a3d; --good-ground: #e0f3e4; --bad: #a8480a; --bad-ground: #fcebdc; --raw: #2266b340;
  --valid: #b8510c; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --card: #1c2126; --ink: #e6e9ec; --soft: #9aa4ae;
  --line: #343b43; --accent: #6fb1f5; --mask: #4a535c; --good: #7fd69a; --good-ground: #193524; --bad: #f5ab74;
  --bad-ground: #402617; --raw: #6fb1f540; --valid: #f5ab74; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 56rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.3rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .6rem;
  text-wrap: balance; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 2.8rem 0 .5rem; }
p { margin: .5rem 0 .9rem; max-width: 46rem; }
.lead { font-size: 1.1rem; color: var(--soft); }
.soft, small { color: var(--soft); font-size: .87rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .84rem; }
code { overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.1rem; }
pre { line-height: 1.5; margin: 0; overflow-x: auto; }
.verdict { display: flex; gap: .7rem; max-width: none; padding: .75rem 1rem; border-radius: 12px; font-weight: 600;
  margin: 1.2rem 0; }
.verdict.good { color: var(--good); background: var(--good-ground); }
.verdict.bad { color: var(--bad); background: var(--bad-ground); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .9rem; }
.tile { display: flex; flex-direction: column; }
.tile strong { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tile small { margin-top: .35rem; }
.scroll { overflow-x: auto; padding: .4rem .6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .5rem .6rem; white-space: nowrap; }
th[scope=row] { text-align: left; font-weight: 600; }
th[scope=colgroup] { border-bottom: 1px solid var(--line); }
th[scope=col] { color: var(--soft); font-weight: 400; font-size: .87rem; }
tbody tr { border-top: 1px solid var(--line); }
td.best { font-weight: 700; }
td small { font-weight: 400; }
figure { margin: 0; }
.curve { display: block; width: 100%; height: auto; }
.curve polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.curve .raw { stroke: var(--raw); stroke-width: 1; }
.curve .train { stroke: var(--accent); }
.curve .validation { stroke: var(--valid); }
.curve circle { fill: var(--valid); }
.curve .grid line { stroke: var(--line); }
.curve text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; color: var(--soft); font-size: .87rem; margin-top: .4rem; }
.key span::before { content: ""; display: inline-block; width: 1.4rem; height: 3px; border-radius: 2px;
  margin-right: .45rem; vertical-align: middle; background: var(--accent); }
.key .validation::before { background: var(--valid); }
.examples { display: grid; gap: .9rem; grid-template-columns: minmax(0, 1fr); }
.examples h3 { display: flex; flex-wrap: wrap; align-items: baseline; gap: .3rem .7rem; margin: 0 0 .6rem;
  font-weight: 400; }
.badge { font-size: .8rem; font-weight: 600; padding: .05rem .55rem; border-radius: 99px; white-space: nowrap; }
.exact, .row.truth { color: var(--good); }
.differs { color: var(--bad); }
.badge.exact, .row.exact mark, .row.truth mark { background: var(--good-ground); }
.badge.differs, .row.differs mark { background: var(--bad-ground); }
pre .row, pre .context { display: block; }
pre .context { color: var(--soft); padding-left: 3.8rem; }
pre .row { padding-left: 3.8rem; position: relative; }
pre .row b { position: absolute; left: 0; font-weight: 600; font-size: .78rem; line-height: 1.6; }
mark { color: inherit; border-radius: 3px; }
dl { display: grid; grid-template-columns: minmax(7rem, auto) 1fr; gap: .35rem 1.2rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: .8rem; }
summary { cursor: pointer; color: var(--accent); padding: .3rem 0; }
summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
@media (max-width: 34rem) { main { padding: 1.5rem .9rem 3rem; } .card { padding: .8rem; border-radius: 10px; }
  th, td { padding: .45rem .35rem; } th[scope=col] { white-space: normal; } td small { display: none; }
  .curve text { font-size: 22px; } dl { grid-template-columns: 1fr; gap: .1rem; } dd { margin-bottom: .55rem; } }
"""
