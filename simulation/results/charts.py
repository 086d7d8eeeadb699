"""The charts of a run, as PNG files and as inline SVG in HTML pages. Both use the same drawing functions.

Charts refer to colours by the CSS variables in style.css. An SVG chart therefore adapts to light and dark mode.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import get_named_colors_mapping, to_hex
from matplotlib.figure import Figure
from matplotlib.path import Path as Curve
from matplotlib.transforms import Affine2D, Transform

from simulation.game.game import Game
from simulation.game.tally import RoundResult, Tally
from simulation.results.console_report import histogram
from simulation.results.reader import SavedRun, largest
from simulation.results.run_directory import write_whole
from simulation.results.tables import decimals_of, number_text

PAGES = Path(__file__).resolve().parent / "pages"
LIGHT_MODE = (PAGES / "style.css").read_text(encoding="utf-8").partition("@media")[0]
COLOURS = dict(re.findall(r"--([\w-]+): (#\w{6});", LIGHT_MODE))
NAMES = {colour: name for name, colour in COLOURS.items()}
COMMANDS = {Curve.MOVETO: "M", Curve.LINETO: "L", Curve.CURVE3: "Q", Curve.CURVE4: "C"}
ANCHORS = {"left": "start", "center": "middle", "right": "end"}
SERIES, LINE_STYLES = 8, ("solid", "dashed", "dotted")  # 8 colours * 3 line styles = 24 distinct lines
WIDTH_INCHES = 4.8  # of a chart in a page; legible on a phone, and wider screens show several charts per row
BELOW, ABOVE = 0.5, 0.32  # room for the titles of the axes in inches
BINS = 101
DASH = 3  # length of the dashes of lines at the same position, in line widths
MARKERS = "os^"  # for each of LINE_STYLES
PICTURE_INCHES = 10  # width of a PNG file with several charts
MARKED_ROUNDS = 25  # if there are more rounds, lines have no markers
TITLE_WIDTH = 36  # maximum number of characters in a line of a histogram's title and in a legend
SMALL_MULTIPLES = 6  # maximum number of histograms in a PNG file
PARTS_DRAWN, PART_LINES = 24, 8  # maximum number of personas or models in histograms, and in a line chart
NAME_LENGTH = 18  # maximum length of a persona's or model's name in a chart
BEYOND = 1.4  # a winning number above BEYOND * max_value is labelled, but not drawn
Lines = Mapping[str, Mapping[int, float]]  # numbers by name and round

mpl.rcdefaults()  # discard the user's matplotlibrc, which may require LaTeX, for example
get_named_colors_mapping().update(COLOURS)
mpl.rcParams.update(mpl.rc_params_from_file(PAGES / "charts.mplstyle", use_default_template=False))


def selection(count: int, limit: int) -> list[int]:
    """Select at most `limit` of the indices 0 .. count-1 at equal distances, including the first and the last."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, limit))}) if count else []


def number_axis(game: Game) -> str:
    return f"number ({game.low:,} to {game.high:,})"


def rounded(game: Game, number: Fraction | float | None) -> str:
    """Format a figure of a game with about 4 significant digits."""
    digits = decimals_of([number], game.decimals + 3)
    return number_text(number if number is None else float(number), digits, padded=digits < game.decimals + 3)


def statistic_of(game: Game, result: RoundResult) -> tuple[str, Fraction | None]:
    """Return name and value of the statistic of the answers in the outcome of a round (default: the average)."""
    name = next((each for each in ("average", "median", "maximum") if each in result.outcome), "average")
    units = getattr(result.tally, name)()
    return name, units and units / game.scale


def histogram_rows(game: Game, tally: Tally) -> list[tuple[Any, ...]]:
    """Return the rows of a CSV file with the histogram of all answers, after a row of headings."""
    edges, counts = histogram(tally, game.lowest, game.lowest + game.numbers - 1, BINS)
    first, last = ([f"{each / game.scale:.{game.decimals}f}" for each in ends] for ends in (edges[:-1], edges[1:] - 1))
    return [("from", "to", "participants"), *zip(first, last, counts.tolist(), strict=True)]


def line_rows(rounds: int, lines: Lines) -> list[tuple[Any, ...]]:
    """Return the rows of a CSV file with numbers by round, after a row of headings. A missing number is empty."""
    return [("round", *lines)] + [(at, *(each.get(at, "") for each in lines.values())) for at in range(1, rounds + 1)]


def draw_answers(axes: Axes, game: Game, result: RoundResult) -> None:
    """Draw a histogram of the answers of a round. Mark the statistic that decides, and the winning number."""
    _draw_histogram(axes, game, result.tally, game.lowest + game.numbers - 1)
    axes.set(xlabel=number_axis(game), ylabel="participants")
    (name, middle), winning = statistic_of(game, result), result.winning_number
    if middle is not None:
        axes.axvline(float(middle), color="average", label=f"{name} {rounded(game, middle)}")
    if winning is not None:
        label = f"winning number {rounded(game, winning)}"
        line = axes.axvline(math.nan, color="winning", linestyle="dashed", label=label)
        if winning <= BEYOND * game.high:
            line.set_xdata([float(winning)] * 2)
            axes.set_xlim(right=max(axes.get_xlim()[1], float(winning) * 1.01))


def _draw_histogram(axes: Axes, game: Game, tally: Tally, top: int) -> None:
    edges, counts = histogram(tally, game.lowest, top, BINS)
    borders = (edges - 0.5) / game.scale  # a bin starts half a unit below its lowest answer
    heights = counts * (edges[1] - edges[0]) / np.diff(edges)  # the area of a narrower last bin is its count
    axes.stairs(heights, borders, fill=True, color="bars", label="answers")
    if not tally.answered:
        axes.set_ylim(0, 1)
    axes.set_xlim(float(borders[0]), float(borders[-1]))
    limit_ticks(axes, across=5, up=4, whole="y" if game.decimals else "xy")


def draw_equilibria(axes: Axes, game: Game, **style: Any) -> None:
    """Draw a horizontal dotted line at each equilibrium of the game."""
    if equilibria := game.equilibrium():
        across = axes.get_yaxis_transform()
        axes.hlines(equilibria, 0, 1, linestyles="dotted", clip_on=False, transform=across, **style)


def line_style(index: int) -> dict[str, Any]:
    colour, dashes = series_style(index)
    return {"color": colour, "linestyle": dashes, "marker": MARKERS[LINE_STYLES.index(dashes)]}


def draw_lines(
    axes: Axes, rounds: int, lines: Lines, styles: Sequence[Any] = (), bands: Sequence[Any] = (), unit: str = "average"
) -> None:
    """Draw lines. A missing number leaves a gap. `unit` is the title of the y-axis.

    Lines at the same position share it by alternating dashes and markers. `styles` and `bands`, if given, have one
    entry per line. A band shades intervals by round.
    """
    every = [*range(1, rounds + 1)]
    positions = [{each: f"{number:.3g}" for each, number in numbers.items()} for numbers in lines.values()]
    for index, (name, numbers) in enumerate(lines.items()):
        style = line_style(index) | (styles[index] if styles else {})
        shared, before = positions.count(positions[index]), positions[:index].count(positions[index])
        if shared > 1:
            style |= {"linestyle": (DASH * before, (DASH, DASH * (shared - 1))), "markevery": (before, shared)}
        style |= {"marker": ""} if rounds > MARKED_ROUNDS else {}
        axes.plot(every, [numbers.get(each, math.nan) for each in every], label=name, **style)
    for index, band in enumerate(bands):
        ends = [band.get(each, (math.nan, math.nan)) for each in every]
        lows, highs = np.maximum(ends, 0).T  # there is no space below 0
        axes.fill_between(every, lows, highs, color=series_style(index)[0], alpha=0.2, linewidth=0)
        if len(band) == 1:  # an area would have no width
            axes.vlines(every, lows, highs, color=series_style(index)[0], linewidth=1.2)
    limit_ticks(axes, across=8, up=4, whole="x")
    axes.set(xlabel="round", ylabel=unit)
    axes.spines.bottom.set_visible(False)  # the line of an equilibrium of 0 has the same position
    margin = max(0.25, (rounds - 1) / 60)
    axes.set_xlim(1 - margin, rounds + margin)
    axes.set_ylim(0, max(axes.dataLim.y1, 0) * 1.12 or 1)


def averages_of(run: SavedRun) -> dict[str, dict[int, float]]:
    """Return the statistic that decides (see `statistic_of`), and the winning number if there is one, by round."""
    names = [statistic_of(run.game, result)[0] for result in run.results if result.outcome]
    lines = {name: run.by_round(name) for name in names[:1] or ["average"]}
    return lines | ({"winning number": winning} if (winning := run.by_round("winning_number")) else {})


def draw_averages(axes: Axes, run: SavedRun) -> None:
    """Draw the lines of `averages_of`, and the equilibria."""
    label = f"equilibrium {run.game.equilibrium_words()}"
    draw_equilibria(axes, run.game, color="equilibrium", linewidth=3, label=label)
    dashes = {"color": "winning", "linestyle": "dashed", "marker": "D", "clip_on": False}
    lines, highest = averages_of(run).items(), BEYOND * run.game.high
    drawn = {name: {at: each for at, each in numbers.items() if each <= highest} for name, numbers in lines}
    draw_lines(axes, len(run.results), drawn, [{"color": "average"}, dashes], unit=number_axis(run.game))


def draw_stacks(axes: Axes, parts: Lines, unit: str) -> None:
    """Draw a stacked bar for each round. Its segments are `parts`, which map names to numbers by round, in `unit`."""
    rounds = sorted({each for numbers in parts.values() for each in numbers})
    below = np.zeros(len(rounds))
    for index, numbers in enumerate(parts.values()):
        heights = np.array([numbers.get(each, 0.0) for each in rounds])
        axes.bar(rounds, heights, 0.7, bottom=below, color=series_style(index)[0])
        below += heights
    limit_ticks(axes, across=10, up=4, whole="x")
    axes.set(xlabel="round", ylabel=unit)
    axes.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)


def parts_chart(label: str, game: Game, tallies: Mapping[str, Tally]) -> Markup:
    """Return inline SVG: a histogram for each of the PARTS_DRAWN largest `tallies`, scaled to its own highest bar."""
    names = largest(tallies, PARTS_DRAWN)
    texts = [name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…" for name in names]
    top = max([int(tally.units[-1]) for tally in tallies.values() if tally.answered], default=0) or game.lowest + 1
    height = 0.42 * len(names) + BELOW
    sides = {"left": 0.03 + 0.0172 * max(map(len, texts)), "right": 0.955, "top": 1.0, "bottom": BELOW / height}
    figure = Figure(figsize=(WIDTH_INCHES, height))
    grid = figure.subplots(len(names), 1, sharex=True, squeeze=False, gridspec_kw={**sides, "hspace": 0.16})
    for axes, name, text in zip(grid.flat, names, texts, strict=True):
        _draw_histogram(axes, game, tallies[name], top)
        axes.grid(visible=False)
        axes.set_yticks([])
        axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9.5, color="ink")
        if (average := tallies[name].average()) is not None:
            axes.axvline(float(average / game.scale), color="average")
    figure.text((sides["left"] + sides["right"]) / 2, 0.06 / height, number_axis(game), ha="center", color="muted")
    return svg(label, figure)


def last_round(run: SavedRun) -> Figure:
    """Return a figure for a PNG file: the histogram of the last round."""
    result, figure = run.results[-1], Figure(figsize=(9, 4.5), layout="constrained")
    draw_answers(axes := figure.subplots(), run.game, result)
    title = f"Round {result.round}: {result.tally.answered:,} of {result.tally.asked:,} participants answered"
    axes.set_title(title, loc="center", fontsize=12)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def all_rounds(run: SavedRun) -> Figure:
    """Return a figure for a PNG file: the averages by round, and histograms of some rounds."""
    results = [run.results[index] for index in selection(len(run.results), SMALL_MULTIPLES)]
    title = f"{run.config.participant_num:,} participants, {run.game.words.goal} wins"
    histograms = [(f"Round {result.round}", run.game, result) for result in results]
    return picture(partial(draw_averages, run=run), title, histograms, "Answers by round", {"ncols": 3})


def picture(
    draw: Callable[[Axes], None], title: str, histograms: Sequence[Any], heading: str, legend: Any, inches: float = 0.3
) -> Figure:
    """Return a figure: a line chart, a legend of `inches`, and `histograms` (title, game, result) below a `heading`."""
    columns = 2 if len(histograms) == 4 else min(len(histograms) or 1, 3)
    rows = -(-len(histograms) // columns) or 1
    heights = (3.6 + inches, 2.4 * rows)
    figure = Figure(figsize=(PICTURE_INCHES, sum(heights)), layout="constrained")
    above, below = cast(Any, figure.subfigures(2, 1, height_ratios=heights))
    draw(axes := above.subplots())
    axes.set_title(textwrap.fill(title, 80), weight="bold", fontsize=12)
    above.legend(loc="outside lower center", **legend)
    below.suptitle(heading)
    for place, (text, game, result) in enumerate(histograms, start=1):
        draw_answers(axes := below.add_subplot(rows, columns, place), game, result)
        axes.set_title(textwrap.fill(text, TITLE_WIDTH))
    return figure


# --- Output ---------------------------------------------------------------------------------------------------------


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


def page_chart(label: str, height_inches: float, draw: Callable[..., Any], *arguments: Any, **options: Any) -> Markup:
    """Return `draw(axes, *arguments, **options)` as inline SVG. The titles of both axes are horizontal."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches))
    bottom, top = BELOW / height_inches, 1 - ABOVE / height_inches
    axes = figure.add_axes((0.115, bottom, 0.85, top - bottom))
    draw(axes, *arguments, **options)
    figure.text(0.54, 0.06 / height_inches, axes.get_xlabel(), ha="center", color="muted")
    figure.text(0.015, top + 0.1 / height_inches, axes.get_ylabel(), ha="left", color="muted")
    axes.set(xlabel="", ylabel="")
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
        style += f"; fill-opacity: {rgbFace[3]:g}" if rgbFace is not None and [*rgbFace, 1][3] < 1 else ""
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
