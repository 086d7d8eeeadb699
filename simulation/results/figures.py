"""Common parts of all charts: colours, sizes, and the output as a PNG file or as SVG in a page.

In a page, colours are CSS variables, so that one picture suits light and dark mode.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from simulation.results.run_directory import write_whole

# Colours of a PNG; a page replaces each with the CSS variable of that name. No two may be equal.
INK, MUTED, GRID = "#1d2733", "#566170", "#e4e8ed"
BARS, AVERAGE, WINNING, EQUILIBRIUM = "#5b8fc8", "#c8460b", "#1c2632", "#0a7f5f"
SERIES = ("#1f6fb5", "#d0580e", "#0b7d5c", "#b03a86", "#8a6d00", "#5b56c9", "#3c8d99", "#8c4a3c")
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    BARS: "bars",
    AVERAGE: "average",
    WINNING: "winning",
    EQUILIBRIUM: "equilibrium",
    **{colour: f"series-{place + 1}" for place, colour in enumerate(SERIES)},
}
DASHES = ("-", (0, (5, 2)), (0, (1, 1.4)))  # each dash style multiplies the number of distinct lines
WIDTH_INCHES = 4.8  # of a picture in a page: legible on a phone; wider screens show two or three side by side
STYLE: dict[str, Any] = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.parse_math": False,  # a persona may be called $x$
    "svg.fonttype": "none",  # text stays text, in the page's font
}
mpl.rcdefaults()  # a user's matplotlibrc may require what is not installed, such as LaTeX
mpl.rcParams.update(STYLE)  # type: ignore[arg-type]  # its keys are plain strings


def series_style(place: int) -> tuple[str, Any]:
    """Return the colour and dash style of a line by its index."""
    return SERIES[place % len(SERIES)], DASHES[place // len(SERIES) % len(DASHES)]


def short(number: float, _place: int | None = None) -> str:
    """Format a number for an axis tick: 950, 12k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            return f"{number / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{number:,.6g}"


def few_marks(axes: Axes, across: int = 5, up: int = 4, whole: str = "y") -> None:
    """Limit the number of axis ticks; the axes named in `whole` ("x", "y" or "xy") have them at whole numbers only."""
    for axis, most in ((axes.xaxis, across), (axes.yaxis, up)):
        name = "x" if axis is axes.xaxis else "y"
        axis.set_major_locator(MaxNLocator(most, integer=name in whole, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(short))


def grid_of(count: int) -> tuple[int, int]:
    """Return the columns and rows of a grid of `count` small pictures."""
    across = count if count <= 3 else 2 if count == 4 else 3
    return across, -(-count // across) if count else 0


def tall_figure(height_inches: float) -> Figure:
    """Return a figure for a file with several pictures below each other."""
    room = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09, hspace=0.05)
    return Figure(figsize=(10, height_inches), layout=room)


def page_axes(height_inches: float, left: float = 0.115, bottom: float = 0.12) -> tuple[Figure, Axes]:
    """Return a figure for a page with one pair of axes; it has no title, as the page has a caption."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches))
    axes = figure.add_axes((left, bottom, 0.965 - left, 0.96 - bottom))
    return figure, axes


def two_parts(figure: Figure, above: float, below: float) -> tuple[SubFigure, SubFigure]:
    """Return the upper and the lower part of a figure, with these height ratios."""
    parts: Any = figure.subfigures(2, 1, height_ratios=(above, below))
    return parts[0], parts[1]


def write_png(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG file for a white background. Raises ResultsError."""
    content = io.BytesIO()
    with _missing_letters_allowed():
        figure.savefig(content, dpi=144, format="png", metadata={"Software": None})
    write_whole(path, content.getvalue())


def svg(figure: Figure, name: str, label: str) -> Markup:
    """Return a figure as inline SVG for a page.

    Args:
        figure: The figure.
        name: A name unique in the page; the same figure with the same name gives the same text.
        label: A text description for screen readers.
    """
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    content = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}), _missing_letters_allowed():
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    width, height = (inches * 72 for inches in figure.get_size_inches())
    start = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">').format(width, height, label)
    return start + Markup(_inside(content.getvalue()))


def _inside(text: str) -> str:
    """Return the content of a matplotlib SVG without parts unused in a page, and with CSS variables for colours."""
    text = text[text.index("</defs>", text.index("<style")) + len("</defs>") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids are the same in every picture
    text = re.sub(r'(?<= [dxy]=")[^"]*', _fewer_digits, text)
    text = re.sub(r'(?<= style=")[^"]*', _own_font, text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r"<[^>]*", _own_colours, text)
    return re.sub(r">\s+<", "><", text).replace("<g/>", "").strip()


def _fewer_digits(numbers: re.Match[str]) -> str:
    return re.sub(r"(\.\d)\d+", r"\1", " ".join(numbers[0].split()))


def _own_colours(tag: re.Match[str]) -> str:
    """Replace colours by CSS variables, inside a tag only: a name in the text may look like a colour."""
    text = tag[0]
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def _own_font(style: re.Match[str]) -> str:
    """Keep only the size of a font: a page sets the family."""
    sized = re.sub(r"font: (?:(\d+) )?([\d.]+)px [^;]*", r"font-size: \2px", style[0])
    return re.sub(r"font-family: [^;]*; ", "", sized)


def _missing_letters_allowed() -> warnings.catch_warnings:
    """Suppress warnings about missing glyphs: names may be in scripts that matplotlib's font lacks."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
