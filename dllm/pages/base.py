"""What every page shares: templates, and plots by matplotlib as SVG in the page's colours.

A page is one file that fetches nothing. A plot follows the page into dark mode, because its colours are CSS variables.
"""

import io
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

# Backgrounds from unsure to sure; black text has a contrast of at least 7 on each.
RAMP = ("#f4a582", "#fdc98f", "#fdeaa7", "#d3ecab", "#a6dba0")
INSERTED, DELETED = "#3fd07c", "#ff6b6b"  # of the step that does it; black text has the same contrast
SERIES = 6  # colours of lines, --s0 to --s5; then they begin again
WIDTH, HEIGHT = 440, 300  # points of a plot; the page scales them
TEMPLATES = Path(__file__).with_name("templates")
# matplotlib cannot write var(--soft), so colour number n stands for the n-th variable until the SVG is written.
_VARIABLES = ("ink", "soft", "line", "card", *(f"s{n}" for n in range(SERIES)))


def color_of(variable: str) -> str:
    return f"#0000{_VARIABLES.index(variable):02x}"


_BOX = {"left": 0.09, "right": 0.93, "top": 0.93, "bottom": 0.13}  # of the figure; leaves room for labels on the right
_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), color_of("soft")),
    **dict.fromkeys((f"axes.spines.{side}" for side in ("left", "right", "top", "bottom")), False),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": color_of("line"),
    "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 2, "lines.markersize": 6, "legend.frameon": False,
    "font.size": 12, "axes.titlesize": 12, "axes.titlelocation": "left", "text.parse_math": False,
    "svg.fonttype": "none", "figure.dpi": 72, "figure.figsize": (WIDTH / 72, HEIGHT / 72),
    **{f"figure.subplot.{side}": place for side, place in _BOX.items()}}


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot(title: str, draw: Callable) -> Markup:
    """The SVG of what `draw(axes)` draws, the same for the same drawing; empty without matplotlib.

    The title is what a screen reader says, and is not shown. Colours come from `color_of`.
    """
    if not can_plot():
        return Markup()
    from matplotlib.figure import Figure  # here, because it takes half a second
    from matplotlib.style import context

    file = io.StringIO()
    with context({**_STYLE, "svg.hashsalt": title}, after_reset=True):
        figure = Figure()
        draw(figure.subplots())
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    inside = re.search(r"<svg[^>]*>(.*)</svg>", file.getvalue(), re.DOTALL)[1]
    inside = re.sub(r"<style.*?</style>|<metadata.*?</metadata>", "", inside, flags=re.DOTALL)  # they are for a file
    inside = re.sub(r'<g id="[^"]*"', "<g", inside)  # figure_1 would stand twice in a page with two plots
    inside = re.sub(r"#0000(\d\w)\b", lambda found: f"var(--{_VARIABLES[int(found[1], 16)]})", inside)
    head = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)
    return head + Markup(inside) + Markup("</svg>")


def fill(template: str, **values) -> str:
    """A page from a template of this package. Values are escaped unless they are Markup."""
    return _ENVIRONMENT.get_template(template).render(values)


def _asset(name: str) -> Markup:
    """A CSS or JavaScript file as it is, because its braces are no Jinja2."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


_ENVIRONMENT = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                           trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.globals.update(asset=_asset, can_plot=can_plot, ramp=RAMP,
                            edit_colours={"inserted": INSERTED, "deleted": DELETED})
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
