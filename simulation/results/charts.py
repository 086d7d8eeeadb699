"""Charts of a run, as PNG files and as SVG for its report page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulation.game.rules import Game
from simulation.game.tally import RoundResult, Tally
from simulation.results.console_report import brief, histogram, number_of
from simulation.results.figures import (
    AVERAGE,
    BARS,
    EQUILIBRIUM,
    INK,
    MUTED,
    SERIES,
    WIDTH_INCHES,
    WINNING,
    few_marks,
    grid_of,
    page_axes,
    series_style,
    svg,
    tall_figure,
    two_parts,
    write_png,
)
from simulation.results.reader import SavedRun

BINS = 101
PART_BINS = 51
MARKED_ROUNDS = 25  # more rounds are drawn without markers
SMALL_MULTIPLES = 6  # histograms in rounds.png
PARTS_DRAWN, PART_LINES = 24, 8  # the largest personas of a set
NAME_SHOWN = 18  # characters
BEYOND = 1.25  # a winning number above this multiple of the range is labelled, not drawn


def selection(count: int, most: int) -> list[int]:
    """Return at most `most` of the indices 0 .. count-1, evenly spread, including the first and the last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))}) if count else []


def draw_pictures(run: SavedRun) -> None:
    """Draw histogram.png and, for a game of several rounds, rounds.png. Raises ResultsError."""
    if run.results:
        write_png(run.path / "histogram.png", _last_round(run))
    if len(run.results) > 1:
        write_png(run.path / "rounds.png", _all_rounds(run))


# --- Parts of pictures -----------------------------------------------------------------------------------------------


def draw_answers(axes: Axes, game: Game, result: RoundResult, lines: float = 2.0) -> None:
    """Draw the histogram of the answers, the average and the winning number."""
    _fill(axes, game, result.tally, BINS, game.max_value * game.scale)
    few_marks(axes)
    if result.average is None or result.winning_number is None:
        return
    average, winning = number_of(result.average, game), number_of(result.winning_number, game)
    axes.axvline(average, color=AVERAGE, linewidth=lines, label=f"average {average:.{game.decimals + 3}f}")
    dashed: dict[str, Any] = {"color": WINNING, "linestyle": (0, (3, 2)), "linewidth": lines * 0.9}
    dashed["label"] = f"winning number {winning:.{game.decimals + 3}f}"
    if winning <= BEYOND * game.max_value:
        axes.axvline(winning, **dashed)
        axes.set_xlim(right=max(axes.get_xlim()[1], winning * 1.01))
    else:
        axes.plot([], [], **dashed)


def _fill(axes: Axes, game: Game, tally: Tally, bins: int, top: int) -> None:
    """Draw the histogram of the answers from 0 to `top` units."""
    edges, counts = histogram(tally.units, tally.counts, top, bins)
    borders = (edges - 0.5) / game.scale  # each unit spans half a unit to either side of its number
    axes.stairs(counts, borders, fill=True, color=BARS, label="answers")
    if not tally.answered:
        axes.set_ylim(0, 1)
    axes.set_xlim(float(borders[0]), max(float(borders[-1]), (top + 0.5) / game.scale))


def draw_averages(axes: Axes, game: Game, results: Sequence[RoundResult], markers: float = 5.0) -> None:
    """Draw the average and the winning number by round, and the equilibrium."""
    rounds = [each.round for each in results if each.average is not None]
    averages = [number_of(each.average, game) for each in results if each.average is not None]
    winning = [number_of(each.winning_number, game) for each in results if each.winning_number is not None]
    within = [number <= BEYOND * game.max_value for number in winning]
    for place, number in enumerate(game.equilibria):
        label = None if place else f"equilibrium {' and '.join(f'{each:,.6g}' for each in game.equilibria)}"
        axes.axhline(number, color=EQUILIBRIUM, linestyle=(0, (1, 1)), linewidth=3, label=label, clip_on=False)
    dashed: dict[str, Any] = {"color": WINNING, "linestyle": (0, (3, 2)), "marker": "D", "markersize": markers * 0.8}
    axes.plot(rounds, averages, color=AVERAGE, marker="o", markersize=markers, linewidth=2.2, label="average")
    axes.plot(rounds, np.where(within, winning, np.nan), linewidth=1.8, label="winning number", clip_on=False, **dashed)
    highest = max([*averages, *compress(winning, within), *game.equilibria, 0.0])
    scale_rounds(axes, [each.round for each in results], highest)


def scale_rounds(axes: Axes, rounds: Sequence[int], highest: float) -> None:
    """Scale the axes to these rounds, and from 0 to slightly above the highest number."""
    few_marks(axes, across=8, whole="x")
    axes.spines.bottom.set_visible(False)  # an equilibrium of 0 is drawn there
    margin = max(0.25, (max(rounds) - min(rounds)) / 60)
    axes.set_xlim(min(rounds) - margin, max(rounds) + margin)
    if len(rounds) > MARKED_ROUNDS:
        for line in axes.lines:
            line.set_marker("")
    axes.set_ylim(0, highest * 1.12 or 1)


# --- PNG files -------------------------------------------------------------------------------------------------------


def _last_round(run: SavedRun) -> Figure:
    result = run.results[-1]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    draw_answers(axes, run.game, result)
    tally = result.tally
    axes.set_title(f"Round {result.round}: {tally.answered:,} of {tally.asked:,} participants answered")
    axes.set_xlabel(f"number, 0 to {run.game.max_value:,}")
    axes.set_ylabel("participants")
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


def _all_rounds(run: SavedRun) -> Figure:
    """Draw small histograms above the averages by round."""
    shown = [run.results[place] for place in selection(len(run.results), SMALL_MULTIPLES)]
    across, down = grid_of(len(shown))
    figure = tall_figure(2.3 * down + 4.1)
    above, below = two_parts(figure, 2.3 * down + 0.7, 3.4)
    heading = f"{run.config.participant_num:,} participants, closest to {run.game.target} wins"
    above.suptitle(heading, fontsize=15, weight="bold")
    for place, axes in enumerate(above.subplots(down, across, squeeze=False).flat):
        if place >= len(shown):
            axes.set_visible(False)
            continue
        result = shown[place]
        draw_answers(axes, run.game, result, lines=1.8)
        axes.set_title(f"Round {result.round}", loc="left", fontsize=11, weight="bold")
        if result.average is not None:
            told = f"average {brief(number_of(result.average, run.game))}"
            axes.set_title(told, loc="right", fontsize=10.5, color=AVERAGE)
        if place % across == 0:
            axes.set_ylabel("participants")
    axes = below.subplots()
    draw_averages(axes, run.game, run.results, markers=6.5)
    if len(run.results) <= 12:
        for result in run.results:
            if result.average is not None:
                number = number_of(result.average, run.game)
                where: dict[str, Any] = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
                axes.annotate(brief(number), (result.round, number), color=AVERAGE, fontsize=10, **where)
    axes.set_xlabel("round")
    axes.set_ylabel(f"number, 0 to {run.game.max_value:,}")
    below.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=10.5)
    return figure


# --- Pictures of the report's page -----------------------------------------------------------------------------------


def answers_picture(game: Game, result: RoundResult, name: str, label: str) -> Markup:
    """Return the histogram of one round."""
    figure, axes = page_axes(2.3)
    draw_answers(axes, game, result)
    return svg(figure, name, label)


def averages_picture(run: SavedRun, label: str) -> Markup:
    """Return the chart of the averages by round."""
    figure, axes = page_axes(2.9)
    draw_averages(axes, run.game, run.results)
    return svg(figure, "averages", label)


def spread_picture(run: SavedRun, label: str) -> Markup:
    """Return the chart of the standard deviation of the answers by round."""
    figure, axes = page_axes(2.9)
    spreads = [(each.round, each.tally.std()) for each in run.results]
    line = [(number, std / run.game.scale) for number, std in spreads if std is not None]
    axes.plot(*zip(*line, strict=True), color=SERIES[0], marker="o", markersize=5, linewidth=2.2)
    scale_rounds(axes, [number for number, _ in spreads], max(std for _, std in line))
    return svg(figure, "spread", label)


def largest(tallies: dict[str, Tally], most: int) -> list[str]:
    """Return the `most` parts with the most participants, in their original order."""
    by_size = sorted(tallies, key=lambda name: -tallies[name].asked)[:most]
    return [name for name in tallies if name in by_size]


def parts_picture(game: Game, tallies: dict[str, Tally], name: str, label: str) -> Markup:
    """Return stacked histograms of one round, one for each part of the participants, with its average.

    The x-axis ends at the highest answer. Each part is scaled to its own highest bar, so that small parts compare with
    large ones.
    """
    names = largest(tallies, PARTS_DRAWN)
    letters = min(max(map(len, names)), NAME_SHOWN)
    figure = Figure(figsize=(WIDTH_INCHES, 0.42 * len(names) + 0.35))
    top = max([int(tally.units[-1]) for tally in tallies.values() if tally.answered], default=0) or 1
    row = 0.42 / figure.get_size_inches()[1]
    left = 0.03 + 0.0172 * letters
    for place, part in enumerate(names):
        axes = figure.add_axes((left, 1 - row * (place + 0.98), 0.955 - left, row * 0.86))
        _fill(axes, game, tallies[part], PART_BINS, top)
        few_marks(axes)
        axes.grid(visible=False)
        axes.set_yticks([])
        axes.tick_params(labelbottom=place == len(names) - 1)
        average = tallies[part].average()
        if average is not None:
            axes.axvline(number_of(average, game), color=AVERAGE, linewidth=2)
        where: dict[str, Any] = {
            "transform": axes.transAxes,
            "ha": "right",
            "va": "center",
            "fontsize": 9.5,
            "color": INK,
        }
        axes.text(-0.02, 0.4, shortened(part), **where)
    return svg(figure, name, label)


def shortened(name: str) -> str:
    """Return a name of at most NAME_SHOWN characters."""
    return name if len(name) <= NAME_SHOWN else name[: NAME_SHOWN - 1] + "…"


def part_lines_picture(run: SavedRun, topic: str, label: str) -> Markup:
    """Return the chart of the averages of the largest parts by round."""
    rounds = run.tallies_by_part[topic]
    figure, axes = page_axes(2.6)
    numbers = [each.round for each in run.results]
    highest = 0.0
    for place, part in enumerate(largest(rounds[-1], PART_LINES)):
        averages = [each[part].average() for each in rounds]
        line = [float("nan") if each is None else number_of(each, run.game) for each in averages]
        highest = max([highest, *(number_of(each, run.game) for each in averages if each is not None)])
        colour, dashes = series_style(place)
        axes.plot(numbers, line, color=colour, linestyle=dashes, marker="o", markersize=4, linewidth=2)
    scale_rounds(axes, numbers, highest)
    return svg(figure, f"{topic}-lines", label)


def times_picture(times: Sequence[dict[str, float]], kinds: Sequence[str], label: str) -> Markup:
    """Return stacked bars of the time breakdown of each round (seconds)."""
    figure, axes = page_axes(2.3)
    rounds = [each["round"] for each in times]
    below = np.zeros(len(times))
    for kind, colour in zip(kinds, SERIES, strict=False):
        seconds = np.array([each.get(kind, 0.0) for each in times])
        axes.bar(rounds, seconds, 0.7, bottom=below, color=colour)
        below += seconds
    few_marks(axes, across=10, whole="x")
    axes.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)
    axes.tick_params(axis="x", colors=MUTED)
    return svg(figure, "times", label)
