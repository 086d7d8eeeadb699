"""The charts of a run. PNG files and HTML pages use the same drawing functions."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from simulation.game.game import Game
from simulation.game.tally import Tally
from simulation.results.console_report import histogram
from simulation.results.figures import LINE_STYLES, WIDTH_INCHES, limit_ticks, series_style, svg
from simulation.results.reader import SavedRun
from simulation.results.tables import number_text

BINS, PART_BINS = 101, 51
DASH = 3  # length of the dashes of lines at the same position, in line widths
MARKERS = "os^"  # for each of LINE_STYLES
PICTURE_INCHES = 10  # width of a PNG file with several charts
MARKED_ROUNDS = 25  # if there are more rounds, lines have no markers
LABELLED_ROUNDS = 12  # if there are more rounds, averages are not labelled
SMALL_MULTIPLES = 6  # maximum number of histograms in a PNG file
PARTS_DRAWN, PART_LINES = 24, 8  # maximum number of personas or models in histograms, and in a line chart
NAME_LENGTH = 18  # maximum length of a persona's or model's name in a chart
BEYOND = 1.25  # a winning number above BEYOND * max_value is labelled, but not drawn


def selection(count: int, limit: int) -> list[int]:
    """Select at most `limit` of the indices 0 .. count-1 at equal distances, including the first and the last."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, limit))}) if count else []


def largest(tallies: Mapping[str, Tally], limit: int) -> list[str]:
    """Return the `limit` names in `tallies` with the most participants, in the order of `tallies`."""
    by_size = sorted(tallies, key=lambda name: -tallies[name].asked)[:limit]
    return [name for name in tallies if name in by_size]


def draw_answers(axes: Axes, run: SavedRun, index: int) -> None:
    """Draw a histogram of the answers in `run.results[index]`, and mark the average and the winning number."""
    game, entry, digits = run.game, run.summary["rounds"][index], run.game.decimals + 3
    _draw_histogram(axes, game, run.results[index].tally, BINS, game.lowest + game.numbers - 1)
    average, winning = entry["average"], entry["winning_number"]
    if average is not None:
        axes.axvline(average, color="average", label=f"average {number_text(average, digits)}")
    if winning is None:
        return
    label = f"winning number {number_text(winning, digits)}"
    line = axes.axvline(math.nan, color="winning", linestyle="dashed", label=label)
    if winning <= BEYOND * game.high:
        line.set_xdata([winning, winning])
        axes.set_xlim(right=max(axes.get_xlim()[1], winning * 1.01))


def _draw_histogram(axes: Axes, game: Game, tally: Tally, bins: int, top: int) -> None:
    """Draw a histogram of the answers up to `top` units with at most `bins` bins."""
    edges, counts = histogram(tally, game.lowest, top, bins)
    borders = (edges - 0.5) / game.scale  # a bin starts half a unit below its lowest answer
    axes.stairs(counts, borders, fill=True, color="bars", label="answers")
    if not tally.answered:
        axes.set_ylim(0, 1)
    axes.set_xlim(float(borders[0]), max(float(borders[-1]), (top + 0.5) / game.scale))
    limit_ticks(axes, across=5, up=4, whole="y" if game.decimals else "xy")


def draw_equilibria(axes: Axes, game: Game, **style: Any) -> None:
    """Draw a horizontal dotted line at each equilibrium of the game."""
    if equilibria := game.equilibrium():
        across = axes.get_yaxis_transform()
        axes.hlines(equilibria, 0, 1, linestyles="dotted", clip_on=False, transform=across, **style)


def line_style(index: int) -> dict[str, Any]:
    """Return the style of a chart's line `index` (from 0)."""
    colour, dashes = series_style(index)
    return {"color": colour, "linestyle": dashes, "marker": MARKERS[LINE_STYLES.index(dashes)]}


def draw_lines(
    axes: Axes, rounds: Iterable[int], lines: Mapping[str, Mapping[int, float]], styles: Sequence[dict[str, Any]] = ()
) -> None:
    """Draw a line for each entry of `lines`, which maps a name to numbers by round. A missing number leaves a gap.

    Lines at the same position share it by alternating dashes and markers. The x-axis spans `rounds`, the y-axis 0 to
    slightly above the highest number. `styles`, if given, has one per line.
    """
    positions = [{each: f"{number:.3g}" for each, number in numbers.items()} for numbers in lines.values()]
    for index, (name, numbers) in enumerate(lines.items()):
        style = line_style(index) | (styles[index] if styles else {})
        shared, before = positions.count(positions[index]), positions[:index].count(positions[index])
        if shared > 1:
            style |= {"linestyle": (DASH * before, (DASH, DASH * (shared - 1))), "markevery": (before, shared)}
        drawn = range(min(numbers), max(numbers) + 1) if numbers else ()
        axes.plot(list(drawn), [numbers.get(each, math.nan) for each in drawn], label=name, **style)
    limit_ticks(axes, across=8, up=4, whole="x")
    axes.spines.bottom.set_visible(False)  # the line of an equilibrium of 0 has the same position
    all_rounds = sorted(set(rounds))
    margin = max(0.25, (all_rounds[-1] - all_rounds[0]) / 60)
    axes.set_xlim(all_rounds[0] - margin, all_rounds[-1] + margin)
    axes.set_ylim(0, max(axes.dataLim.y1, 0) * 1.12 or 1)
    for line in axes.lines if len(all_rounds) > MARKED_ROUNDS else ():
        line.set_marker("")


def draw_band(axes: Axes, intervals: Mapping[int, tuple[float, float]], colour: str) -> None:
    """Shade the intervals by round, with gaps for missing rounds. The interval of a single round becomes a line."""
    rounds = [*range(min(intervals), max(intervals) + 1)] if intervals else []
    lows, highs = ([intervals.get(each, (math.nan, math.nan))[end] for each in rounds] for end in (0, 1))
    axes.fill_between(rounds, lows, highs, color=colour, alpha=0.2, linewidth=0)
    axes.vlines(rounds[: len(rounds) == 1], lows[:1], highs[:1], color=colour, linewidth=1.2)


def draw_averages(axes: Axes, run: SavedRun) -> None:
    """Draw the average and the winning number of each round as lines, and the equilibria."""
    label = f"equilibrium {run.game.equilibrium_words()}"
    draw_equilibria(axes, run.game, color="equilibrium", linewidth=3, label=label)
    highest = BEYOND * run.game.high
    winning = {index: each if each <= highest else math.nan for index, each in run.by_round("winning_number").items()}
    dashes = {"color": "winning", "linestyle": "dashed", "marker": "D", "clip_on": False}
    lines = {"average": run.by_round("average")} | ({"winning number": winning} if winning else {})
    draw_lines(axes, [result.round for result in run.results], lines, [{"color": "average"}, dashes])


def draw_times(axes: Axes, times: Sequence[Mapping[str, float]], kinds: Sequence[str]) -> None:
    """Draw a stacked bar for each round in `times`. Its segments are the durations named in `kinds`, in seconds."""
    rounds = [each["round"] for each in times]
    below = np.zeros(len(times))
    for index, kind in enumerate(kinds):
        seconds = np.array([each.get(kind, 0.0) for each in times])
        axes.bar(rounds, seconds, 0.7, bottom=below, color=series_style(index)[0])
        below += seconds
    limit_ticks(axes, across=10, up=4, whole="x")
    axes.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)


def parts_chart(label: str, game: Game, tallies: Mapping[str, Tally]) -> Markup:
    """Return inline SVG: a histogram for each of the PARTS_DRAWN largest `tallies`, scaled to its own highest bar."""
    names = largest(tallies, PARTS_DRAWN)
    texts = [name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…" for name in names]
    top = max([int(tally.units[-1]) for tally in tallies.values() if tally.answered], default=0) or game.lowest + 1
    height = 0.42 * len(names) + 0.35
    sides = {"left": 0.03 + 0.0172 * max(map(len, texts)), "right": 0.955, "top": 1.0, "bottom": 0.35 / height}
    figure = Figure(figsize=(WIDTH_INCHES, height))
    grid = figure.subplots(len(names), 1, sharex=True, squeeze=False, gridspec_kw={**sides, "hspace": 0.16})
    for axes, name, text in zip(grid.flat, names, texts, strict=True):
        _draw_histogram(axes, game, tallies[name], PART_BINS, top)
        axes.grid(visible=False)
        axes.set_yticks([])
        axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9.5, color="ink")
        if (average := tallies[name].average()) is not None:
            axes.axvline(float(average / game.scale), color="average")
    return svg(label, figure)


def last_round(run: SavedRun) -> Figure:
    """Return a figure for a PNG file: the histogram of the last round."""
    tally, figure = run.results[-1].tally, Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    draw_answers(axes, run, -1)
    axes.set_title(f"Round {run.results[-1].round}: {tally.answered:,} of {tally.asked:,} participants answered")
    axes.set(xlabel=f"number, {run.game.low:,} to {run.game.high:,}", ylabel="participants")
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


def all_rounds(run: SavedRun) -> Figure:
    """Return a figure for a PNG file: small histograms of some rounds, and below them the averages by round."""
    entries, digits = run.summary["rounds"], run.game.decimals + 3
    indices = selection(len(entries), SMALL_MULTIPLES)
    figure, above, below, grid = two_parts([(run, index) for index in indices], 3.4)
    title = f"{run.config.participant_num:,} participants, {run.game.words.goal} wins"
    above.suptitle(title, fontsize=15, weight="bold")
    above.supylabel("participants", fontsize=11, color="muted")
    for axes, entry in zip(grid, [entries[index] for index in indices], strict=True):
        axes.set_title(f"Round {entry['round']}", loc="left", fontsize=11, weight="bold")
        if entry["average"] is not None:
            axes.set_title(
                f"average {number_text(entry['average'], digits)}", loc="right", fontsize=10.5, color="average"
            )
    axes = below.subplots()
    draw_averages(axes, run)
    above_point: dict[str, Any] = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
    for point in run.by_round("average").items() if len(run.results) <= LABELLED_ROUNDS else ():
        axes.annotate(number_text(point[1], digits), point, color="average", fontsize=10, **above_point)
    axes.set(xlabel="round", ylabel=f"number, {run.game.low:,} to {run.game.high:,}")
    below.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=10.5)
    return figure


def two_parts(
    rounds: Sequence[tuple[SavedRun, int]], lines_inches: float, lines_first: bool = False
) -> tuple[Figure, SubFigure, SubFigure, list[Axes]]:
    """Return a figure for a PNG file, its upper part, its lower part, and the axes of its histograms.

    One part has a histogram for each of `rounds`, which are pairs of a run and an index in its `results`. The other
    part, `lines_inches` high, is left empty for a line chart. It is the upper part if `lines_first` is True.
    """
    columns = 2 if len(rounds) == 4 else min(len(rounds) or 1, 3)
    rows = -(-len(rounds) // columns) or 1
    heights = (lines_inches, 2.4 * rows) if lines_first else (2.3 * rows + 0.7, lines_inches)
    figure = Figure(figsize=(PICTURE_INCHES, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    grid = list(parts[1 if lines_first else 0].subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(rounds) :]:
        axes.set_visible(False)
    for axes, (run, index) in zip(grid, rounds, strict=False):
        draw_answers(axes, run, index)
    return figure, *parts, grid[: len(rounds)]
