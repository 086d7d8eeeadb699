"""The style that all charts share, and their output as a PNG file or as inline SVG.

Charts refer to colours by the CSS variables in style.css. An SVG chart therefore adapts to light and dark mode.
"""

import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import get_named_colors_mapping, to_hex
from matplotlib.figure import Figure
from matplotlib.path import Path as Curve
from matplotlib.transforms import Affine2D, Transform

from simulation.results.run_directory import write_whole

PAGES = Path(__file__).resolve().parent / "pages"
LIGHT_MODE = (PAGES / "style.css").read_text(encoding="utf-8").partition("@media")[0]
COLOURS = dict(re.findall(r"--([\w-]+): (#\w{6});", LIGHT_MODE))
NAMES = {colour: name for name, colour in COLOURS.items()}
COMMANDS = {Curve.MOVETO: "M", Curve.LINETO: "L", Curve.CURVE3: "Q", Curve.CURVE4: "C"}
ANCHORS = {"left": "start", "center": "middle", "right": "end"}
SERIES, LINE_STYLES = 8, ("solid", "dashed", "dotted")  # 8 colours * 3 line styles = 24 distinct lines
WIDTH_INCHES = 4.8  # of a chart in a page; legible on a phone, and wider screens show several charts per row

mpl.rcdefaults()  # discard the user's matplotlibrc, which may require LaTeX, for example
get_named_colors_mapping().update(COLOURS)
mpl.rcParams.update(mpl.rc_params_from_file(PAGES / "charts.mplstyle", use_default_template=False))


def series_style(index: int) -> tuple[str, str]:
    """Return the colour and line style of a chart's line `index` (from 0). Pages use both names as CSS classes, too."""
    return f"series-{index % SERIES + 1}", LINE_STYLES[index // SERIES % len(LINE_STYLES)]


def short(number: float, _index: float = 0) -> str:
    """Format a number for an axis tick, such as 950, 12k or 1.5M."""
    for limit, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(number) >= limit:
            return f"{number / size:.4g}{letter}"
    return f"{number:,.6g}"


def limit_ticks(axes: Axes, across: int, up: int, whole: str) -> None:
    """Show about `across` ticks on the x-axis and `up` on the y-axis. The axes in `whole` have only whole numbers."""
    axes.locator_params("x", nbins=across, integer="x" in whole, min_n_ticks=1)  # a single round has one tick
    axes.locator_params("y", nbins=up, integer="y" in whole, min_n_ticks=1)
    axes.xaxis.set_major_formatter(short)
    axes.yaxis.set_major_formatter(short)


def write_png(path: Path, figure: Figure) -> None:
    """Write a figure to a PNG file. Raises ResultsError if the file cannot be written."""
    content = io.BytesIO()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # as in `svg`
        figure.savefig(content, dpi=144, format="png", metadata={"Software": None})
    write_whole(path, content.getvalue())


def page_chart(label: str, height_inches: float, draw: Callable[..., Any], *arguments: Any) -> Markup:
    """Draw a chart with `draw(axes, *arguments)`. Return inline SVG, without a title because the page has a caption."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches))
    draw(figure.add_axes((0.115, 0.12, 0.85, 0.84)), *arguments)
    return svg(label, figure)


def svg(label: str, figure: Figure) -> Markup:
    """Return a figure as inline SVG. Screen readers read `label` aloud."""
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    renderer = _PageRenderer(figure)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # the font may lack characters of a name
        figure.draw(renderer)
    start = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">').format(*figure.bbox.size, label)
    return start + Markup("").join(renderer.elements) + Markup("</svg>")


class _PageRenderer(RendererBase):
    """A matplotlib renderer that creates compact SVG elements. The page determines their colours and their font."""

    def __init__(self, figure: Figure) -> None:
        super().__init__()
        self.width, self.height = figure.bbox.size
        self.elements: list[Markup] = []

    def get_canvas_width_height(self) -> tuple[float, float]:
        return self.width, self.height

    def draw_path(self, gc: Any, path: Curve, transform: Transform, rgbFace: Any = None) -> None:  # noqa: N803
        steps: Any = path.iter_segments(transform + Affine2D().scale(1, -1).translate(0, self.height), simplify=False)
        line = " ".join(
            "Z" if code == Curve.CLOSEPOLY else COMMANDS[code] + " ".join(f"{number:.4g}" for number in numbers)
            for numbers, code in steps
        )
        style = f"fill: {'none' if rgbFace is None else _variable(rgbFace)}"
        if rgbFace is not None and len(rgbFace) > 3 and rgbFace[3] < 1:
            style += f"; fill-opacity: {rgbFace[3]:g}"
        if width := gc.get_linewidth():
            offset, lengths = gc.get_dashes()
            dashes = " ".join(f"{length:.4g}" for length in lengths or ()) or "none"
            style += f"; stroke: {_variable(gc.get_rgb())}; stroke-width: {width:.4g}; stroke-dasharray: {dashes}"
            style += f"; stroke-dashoffset: {offset:.4g}" if offset else ""
        self.elements.append(Markup('<path d="{}" style="{}"/>').format(line, style))

    def draw_text(self, gc: Any, x: float, y: float, s: str, prop: Any, *_: Any, mtext: Any = None, **__: Any) -> None:
        # The browser aligns the text, because only the browser knows the font and therefore the width
        x = mtext.get_transform().transform(mtext.get_unitless_position())[0]
        style = f"fill: {_variable(gc.get_rgb())}; font-size: {prop.get_size_in_points():g}px"
        style += f"; text-anchor: {ANCHORS[mtext.get_horizontalalignment()]}"
        self.elements.append(Markup('<text x="{:.4g}" y="{:.4g}" style="{}">{}</text>').format(x, y, style, s))


def _variable(colour: Any) -> str:
    return f"var(--{NAMES[to_hex(colour)]})"
