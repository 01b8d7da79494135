"""The scoreboard as one page with everything inside it: tables, pass@k by k, and score by tokens per forward pass."""

import html
import math
from collections.abc import Sequence

from dllm.evaluators.scoreboard import Board, Group, Run, letter, to_cells, unit_of
from dllm.report import page_head, round_axis

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 300, 38, 34, 26, 44  # of a plot, in its own units
_LABEL = 14  # units that a mark's label takes
_COLOURS = 6  # then they begin again; every mark has its row's number too


def to_page(board: Board) -> str:
    sections = "".join(map(_section, board.groups))
    problems = "".join(f"<li>{html.escape(problem)}</li>" for problem in board.problems)
    if problems:
        problems = f"<section><h2>Not shown</h2><ul>{problems}</ul></section>"
    return f"""{page_head("dllm: scoreboard")}
<style>{_STYLE}</style>
<h1>Scoreboard</h1>
<p class="lead">Runs of <code>dllm eval</code> by task, beside published results. Numbers and letters in the plots are
those of the rows.</p>
{sections}{problems}
</main>
</body>
</html>
"""


def _section(group: Group) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in (
        "", "run", "model", *group.metrics, "tokens per forward", "tokens/s", "method"))
    body = ""
    for number, (mark, *names, how) in enumerate(to_cells(group)):
        kind = f"s{number % _COLOURS}" if number < len(group.runs) else "published"
        cells = "".join(f'<td class="text">{html.escape(cell)}</td>' for cell in names[:2])
        cells += "".join(f"<td>{_score(cell)}</td>" for cell in names[2:])
        body += (f'<tr class="{kind}"><th scope="row"><b>{mark}</b></th>{cells}'
                 f'<td class="text how">{html.escape(how)}</td></tr>')
    warnings = "".join(f'<p class="warning"><strong>Warning.</strong> {html.escape(warning)}</p>'
                       for warning in group.warnings)
    notes = "".join(f'<p class="soft">{html.escape(note)}</p>' for note in (unit_of(group), *group.notes))
    figures = "".join(f'<figure class="card">{plot}<figcaption class="soft">{caption}</figcaption></figure>'
                      for plot, caption in (_curves(group), _frontier(group)) if plot)
    return f"""<section>
<h2>{html.escape(group.title)}</h2>
{warnings}
<div class="card scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
{notes}
<div class="plots">{figures}</div>
</section>
"""


def _score(cell: str) -> str:
    value, bracket, interval = cell.partition(" [")
    return html.escape(value) + (f"<small>{bracket.strip()}{html.escape(interval)}</small>" if bracket else "")


class _Plot:
    """SVG of percent by something. `place` turns that into 0..1."""

    def __init__(self, values: Sequence[float], place):
        _, self.top, self.tick = round_axis(0, 100 * max(*values, 0.01))
        self.place = place
        self.parts, self.labels = [], []
        for n in range(round(self.top / self.tick) + 1):
            y = self.y(n * self.tick / 100)
            self.parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                              f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{n * self.tick:g}</text>')

    def x(self, value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * self.place(value)

    def y(self, share: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - 100 * share / self.top)

    def ticks(self, values: Sequence[float]) -> None:
        for value in values:
            self.parts.append(f'<text x="{self.x(value):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">'
                              f"{value:g}</text>")

    def line(self, kind: str, points: Sequence[tuple[float, float]]) -> None:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.parts.append(f'<polyline class="{kind}" points="{path}"/>')

    def mark(self, kind: str, x: float, y: float, title: str, low: float | None = None, high: float | None = None):
        if low is not None:
            self.parts.append(f'<line class="{kind} whisker" x1="{self.x(x):.1f}" x2="{self.x(x):.1f}" '
                              f'y1="{self.y(low):.1f}" y2="{self.y(high):.1f}"/>')
        self.parts.append(f'<circle class="{kind}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="4">'
                          f"<title>{html.escape(title)}</title></circle>")

    def label(self, kind: str, x: float, y: float, text: str) -> None:
        """To the right of a mark, later moved off those of others."""
        self.labels.append((self.x(x), self.y(y), kind, text))

    def svg(self, title: str, across: str, up: str) -> str:
        columns = []
        for label in sorted(self.labels):
            if not columns or label[0] - columns[-1][-1][0] >= 2 * _LABEL:
                columns.append([])
            columns[-1].append(label)
        for column in columns:
            column.sort(key=lambda label: label[1])
            for (x, y, kind, text), moved in zip(column, spread([y for _, y, _, _ in column]), strict=True):
                self.parts.append(
                    f'<line class="leader {kind}" x1="{x + 5:.1f}" y1="{y:.1f}" x2="{x + 12:.1f}" y2="{moved:.1f}"/>'
                    f'<text class="label {kind}" x="{x + 14:.1f}" y="{moved + 4:.1f}">{text}</text>')
        return (f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
                f'{"".join(self.parts)}<text x="4" y="13">{html.escape(up)}</text>'
                f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">'
                f"{html.escape(across)}</text></svg>")


def spread(places: Sequence[float]) -> list[float]:
    """Ascending places, moved apart to `_LABEL` between neighbours and as little as that takes."""
    blocks = []  # [sum of what their first label's place should be, labels]
    for place in places:
        blocks.append([place, 1])
        while len(blocks) > 1 and blocks[-1][0] / blocks[-1][1] < (
                blocks[-2][0] / blocks[-2][1] + _LABEL * blocks[-2][1]):
            total, count = blocks.pop()
            blocks[-1][0] += total - _LABEL * blocks[-1][1] * count
            blocks[-1][1] += count
    return [total / count + _LABEL * n for total, count in blocks for n in range(count)]


def _curves(group: Group) -> tuple[str, str]:
    """pass@k by k, where a run has more than one sample of each task."""
    published = [[(int(name.removeprefix("pass@")), score.value) for name, score in row.scores.items()
                  if name.startswith("pass@")] for row in group.published]
    longest = max(len(run.curve) for run in group.runs)
    if longest < 2:
        return "", ""
    last = max([longest, *(k for points in published for k, _ in points)])
    plot = _Plot([score for run in group.runs for score in run.curve] + [y for points in published for _, y in points]
                 + [_high(run, name) for run in group.runs for name in run.scores if name.startswith("pass@")],
                 lambda k: math.log(k) / math.log(last))
    plot.ticks([k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= last])
    for number, points in enumerate(published):
        if points:
            plot.line("published", points)
            for k, y in points:
                plot.mark("published", k, y, f"{group.published[number].method}: pass@{k} {100 * y:.1f}")
            plot.label("published", *points[-1], letter(number))
    for number, run in enumerate(group.runs):
        if run.curve:
            kind = f"s{number % _COLOURS}"
            plot.line(kind, list(enumerate(run.curve, start=1)))
            for name, score in run.scores.items():
                if name.startswith("pass@"):
                    plot.mark(kind, int(name.removeprefix("pass@")), score.value,
                              f"{run.name}: {name} {100 * score.value:.1f}", score.low, score.high)
            plot.label(kind, len(run.curve), run.curve[-1], str(number + 1))
    dashed = " Dashed: published, between the two k that are stated." if any(published) else ""
    return (plot.svg("pass@k by k", "k, samples of a task", "pass@k, percent"),
            f"The share of tasks that one of k samples solves.{dashed}")


def _frontier(group: Group) -> tuple[str, str]:
    """The first metric by tokens per forward pass of two runs or more, with those that none beats in both."""
    metric = next(iter(group.runs[0].scores))
    runs = [(number, run, run.tokens_per_forward, run.scores[metric]) for number, run in enumerate(group.runs)
            if run.tokens_per_forward is not None and metric in run.scores]
    if len(runs) < 2:
        return "", ""
    _, end, tick = round_axis(0, max(tokens for _, _, tokens, _ in runs))
    published = [(number, row.scores[metric].value) for number, row in enumerate(group.published)
                 if metric in row.scores]
    plot = _Plot([_high(run, metric) for _, run, _, _ in runs] + [y for _, y in published], lambda x: x / end)
    plot.ticks([round(n * tick, 9) for n in range(round(end / tick) + 1)])
    for number, y in published:
        plot.line("published", [(0, y), (end, y)])
        plot.label("published", end, y, letter(number))
    best, points = -1.0, []
    for _, _, tokens, score in sorted(runs, key=lambda row: (-row[2], -row[3].value)):
        if score.value > best:
            points += [(tokens, best), (tokens, score.value)] if points else [(tokens, score.value)]
            best = score.value
    plot.line("frontier", points)
    for number, run, tokens, score in runs:
        kind = f"s{number % _COLOURS}"
        plot.mark(kind, tokens, score.value, f"{run.name}: {100 * score.value:.1f} at {tokens:.3g}", score.low,
                  score.high)
        plot.label(kind, tokens, score.value, str(number + 1))
    dashed = " Dashed: published, whose tokens per forward pass are not known." if published else ""
    return (plot.svg(f"{metric} by tokens per forward pass", "tokens per forward pass, of one text",
                     f"{metric}, percent"),
            f"Up is more accurate, right is faster. The line joins the runs that no other beats in both.{dashed}")


def _high(run: Run, metric: str) -> float:
    score = run.scores[metric]
    return score.value if score.high is None else score.high


_STYLE = """
:root { --s0: #2266b3; --s1: #b8510c; --s2: #1b7a3d; --s3: #8a3fb0; --s4: #b3265e; --s5: #5f6b00; }
@media (prefers-color-scheme: dark) { :root { --s0: #6fb1f5; --s1: #f5ab74; --s2: #7fd69a; --s3: #cfa0ee;
  --s4: #f58db4; --s5: #d3d96a; } }
.s0 { --colour: var(--s0); } .s1 { --colour: var(--s1); } .s2 { --colour: var(--s2); } .s3 { --colour: var(--s3); }
.s4 { --colour: var(--s4); } .s5 { --colour: var(--s5); } .published { --colour: var(--soft); }
main { max-width: 68rem; }
th[scope=row] { color: var(--colour); padding-left: .3rem; }
th[scope=col]:nth-child(-n+3), th[scope=col]:last-child, td.text { text-align: left; }
td.text { white-space: normal; min-width: 8rem; overflow-wrap: anywhere; }
td.how { min-width: 15rem; font-size: .87rem; color: var(--soft); }
td small { display: block; }
tr.published td { color: var(--soft); font-style: italic; }
.warning { color: var(--bad); background: var(--bad-ground); border-radius: 12px; padding: .7rem 1rem; max-width: none;
  overflow-wrap: anywhere; }
.plots { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.plots figure { max-width: 36rem; }
.plot { display: block; width: 100%; height: auto; }
.plot text { font-size: 13px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.plot .label { fill: var(--colour); font-weight: 700; paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
.plot .grid { stroke: var(--line); }
.plot polyline { fill: none; stroke: var(--colour); stroke-width: 2; stroke-linejoin: round; }
.plot polyline.published { stroke-dasharray: 4 4; stroke-width: 1; }
.plot polyline.frontier { stroke: var(--soft); stroke-width: 1.5; }
.plot .leader { stroke: var(--colour); opacity: .5; }
.plot circle { fill: var(--colour); }
.plot circle.published { fill: var(--card); stroke: var(--colour); }
.plot .whisker { stroke: var(--colour); opacity: .5; }
li { overflow-wrap: anywhere; }
@media (max-width: 34rem) { td small { display: block; } td.text { min-width: 5.4rem; font-size: .84rem; }
  td.how { min-width: 14rem; } }
"""
