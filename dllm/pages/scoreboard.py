"""The scoreboard as one page with everything inside it: tables, pass@k by k, and score by tokens per forward pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from dllm.evaluators.scoreboard import Board, Comparison, Score, letter, make_scoreboard, to_cells, to_markdown, unit_of
from dllm.files import write_atomically
from dllm.pages.base import SERIES, color_of, fill, plot

_LABEL = 14  # points that a mark's label takes


class Label(NamedTuple):
    x: float
    y: float
    color: str
    text: str


def write_scoreboard(folders: Sequence[str | Path], output: Path) -> str:
    """Write scoreboard.md and scoreboard.html into a folder. Returns the Markdown. Raises: as `make_scoreboard`."""
    board = make_scoreboard(folders)
    text = to_markdown(board)
    write_atomically(output / "scoreboard.md", text.encode())
    write_atomically(output / "scoreboard.html", to_page(board).encode())
    return text


def to_page(board: Board) -> str:
    return fill("scoreboard.html", problems=board.problems, tables=[
        {"title": table.title, "warnings": table.warnings, "columns": table.columns, "rows": _rows(table),
         "notes": [unit_of(table), *table.notes], "figures": [*_curves(table), *_frontier(table)]}
        for table in board.comparisons])


def _rows(table: Comparison) -> list[tuple[str, list[str]]]:
    """(class of the row, cells)."""
    return [(f"s{number % SERIES}" if number < len(table.runs) else "published", cells)
            for number, cells in enumerate(to_cells(table))]


def _curves(table: Comparison) -> list[tuple[Markup, str]]:
    """pass@k by k and its caption, where a run has more than one sample of each task."""
    if max(len(run.curve) for run in table.runs) < 2:
        return []
    published = {number: points for number, row in enumerate(table.published) if (points := _pass_at(row.scores))}

    def draw(axes):
        labels = []
        for number, points in published.items():
            ks, percents = zip(*((k, 100 * score.value) for k, score in points), strict=True)
            axes.plot(ks, percents, "o--", color=color_of("soft"), linewidth=1, markerfacecolor=color_of("card"))
            labels.append(Label(ks[-1], percents[-1], color_of("soft"), letter(number)))
        for number, run in enumerate(table.runs):
            if run.curve:
                percents, color = [100 * share for share in run.curve], color_of(f"s{number % SERIES}")
                axes.plot(range(1, len(percents) + 1), percents, color=color)
                for k, score in _pass_at(run.scores):
                    _mark(axes, k, score, color)
                labels.append(Label(len(percents), percents[-1], color, str(number + 1)))
        last = max(label.x for label in labels)
        axes.set(title="pass@k, percent", xlabel="k, samples of a task", xscale="log", ylim=(0, None))
        ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= last]
        axes.set_xticks(ticks, labels=map(str, ticks))
        axes.minorticks_off()
        _write_labels(axes, labels)

    dashed = " Dashed: published, between the two k that are stated." if published else ""
    told = ", ".join(f"run {number + 1} from {100 * run.curve[0]:.1f} to {100 * run.curve[-1]:.1f}"
                     for number, run in enumerate(table.runs) if run.curve)
    return [(plot(f"pass@k by k, {table.title}, percent: {told}", draw),
             f"The share of tasks that one of k samples solves.{dashed}")]


def _frontier(table: Comparison) -> list[tuple[Markup, str]]:
    """The first metric by tokens per forward pass of two runs or more, with those that none beats in both."""
    metric = next(iter(table.runs[0].scores))
    runs = {number: (run.tokens_per_forward, run.scores[metric]) for number, run in enumerate(table.runs)
            if run.tokens_per_forward is not None and metric in run.scores}
    if len(runs) < 2:
        return []
    published = {number: row.scores[metric].value for number, row in enumerate(table.published) if metric in row.scores}

    def draw(axes):
        end = 1.08 * max(tokens for tokens, _ in runs.values())
        labels = []
        for number, share in published.items():
            axes.axhline(100 * share, color=color_of("soft"), linewidth=1, linestyle="--")
            labels.append(Label(end, 100 * share, color_of("soft"), letter(number)))
        tokens, shares = zip(*unbeaten([(tokens, score.value) for tokens, score in runs.values()]), strict=True)
        axes.step(tokens, [100 * share for share in shares], where="post", color=color_of("soft"), linewidth=1.5)
        for number, (tokens, score) in runs.items():
            color = color_of(f"s{number % SERIES}")
            _mark(axes, tokens, score, color)
            labels.append(Label(tokens, 100 * score.value, color, str(number + 1)))
        axes.set(title=f"{metric}, percent", xlabel="tokens per forward pass, of one text")
        axes.set(xlim=(0, end), ylim=(0, None))
        _write_labels(axes, labels)

    dashed = " Dashed: published, whose tokens per forward pass are not known." if published else ""
    told = ", ".join(f"run {number + 1} {100 * score.value:.1f} at {tokens:.3g}"
                     for number, (tokens, score) in runs.items())
    return [(plot(f"{metric} by tokens per forward pass, {table.title}, percent: {told}", draw),
             f"Up is more accurate, right is faster. The line joins the runs that no other beats in both.{dashed}")]


def unbeaten(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (speed, score) that no other point exceeds in both, the fastest first."""
    best = []
    for speed, score in sorted(points, reverse=True):
        if not best or score > best[-1][1]:
            best.append((speed, score))
    return best


def _pass_at(scores: dict[str, Score]) -> list[tuple[int, Score]]:
    return [(int(name.removeprefix("pass@")), score) for name, score in scores.items() if name.startswith("pass@")]


def _mark(axes, x: float, score: Score, color: str) -> None:
    """A dot with its interval."""
    if score.low is not None:
        axes.vlines(x, 100 * score.low, 100 * score.high, color=color, alpha=0.5, linewidth=1.5)
    axes.plot(x, 100 * score.value, "o", color=color)


def _write_labels(axes, labels: Sequence[Label]) -> None:
    """To the right of their marks, moved apart where they would overlap. Needs the final limits of the axes."""
    columns = []
    places = axes.transData.transform([label[:2] for label in labels]).tolist()  # points
    for (x, y), label in sorted(zip(places, labels, strict=True)):
        if not columns or x - columns[-1][-1][0] >= 2 * _LABEL:
            columns.append([])
        columns[-1].append((x, y, label))
    for column in columns:
        column.sort(key=lambda entry: entry[1])
        for (_, y, label), moved in zip(column, spread([y for _, y, _ in column]), strict=True):
            axes.annotate(
                label.text, label[:2], (14, moved - y), textcoords="offset points", va="center", color=label.color,
                fontweight="bold", annotation_clip=False, zorder=5,
                arrowprops={"arrowstyle": "-", "color": label.color, "alpha": 0.5, "shrinkA": 1, "shrinkB": 4})


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
