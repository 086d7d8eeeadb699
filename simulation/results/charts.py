"""Charts of a run. Each is drawn by one function on given axes, for PNG files and pages alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from simulation.game.rules import Game
from simulation.game.tally import RoundResult, Tally
from simulation.results.console_report import brief, histogram, number_of
from simulation.results.figures import WIDTH_INCHES, limit_ticks, series_style, svg, two_parts, write_png
from simulation.results.reader import SavedRun

BINS = 101
PART_BINS = 51
MARKED_ROUNDS = 25  # more rounds are drawn without markers
LABELLED_ROUNDS = 12  # more averages are drawn without their numbers
SMALL_MULTIPLES = 6  # histograms in a PNG file
PARTS_DRAWN, PART_LINES = 24, 8  # the largest personas of a set
NAME_LENGTH = 18  # characters
BEYOND = 1.25  # a winning number above this multiple of the range is labelled, not drawn


def selection(count: int, limit: int) -> list[int]:
    """Return at most `limit` of the indices 0 .. count-1, evenly spread, including the first and the last."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, limit))}) if count else []


def largest(tallies: Mapping[str, Tally], limit: int) -> list[str]:
    """Return the `limit` parts with the most participants, in their original order."""
    by_size = sorted(tallies, key=lambda name: -tallies[name].asked)[:limit]
    return [name for name in tallies if name in by_size]


def averages_of(game: Game, tallies: Mapping[int, Tally]) -> dict[int, float]:
    """Return the averages by round, without rounds that have none."""
    averages = {number: tally.average() for number, tally in tallies.items()}
    return {number: number_of(average, game) for number, average in averages.items() if average is not None}


# --- Charts on given axes --------------------------------------------------------------------------------------------


def draw_answers(axes: Axes, game: Game, result: RoundResult) -> None:
    """Draw the histogram of the answers, the average and the winning number."""
    _draw_histogram(axes, game, result.tally, BINS, game.max_value * game.scale)
    if result.average is None or result.winning_number is None:
        return
    average, winning = number_of(result.average, game), number_of(result.winning_number, game)
    within = winning <= BEYOND * game.max_value
    digits = game.decimals + 3
    axes.axvline(average, color="average", label=f"average {average:.{digits}f}")
    label = f"winning number {winning:.{digits}f}"
    axes.axvline(winning if within else math.nan, color="winning", linestyle="dashed", label=label)
    if within:
        axes.set_xlim(right=max(axes.get_xlim()[1], winning * 1.01))


def _draw_histogram(axes: Axes, game: Game, tally: Tally, bins: int, top: int) -> None:
    """Draw the histogram of the answers from 0 to `top` units."""
    edges, counts = histogram(tally.units, tally.counts, top, bins)
    borders = (edges - 0.5) / game.scale  # each unit spans half a unit to either side of its number
    axes.stairs(counts, borders, fill=True, color="bars", label="answers")
    if not tally.answered:
        axes.set_ylim(0, 1)
    axes.set_xlim(float(borders[0]), max(float(borders[-1]), (top + 0.5) / game.scale))
    limit_ticks(axes, across=5, up=4, whole="y")


def draw_averages(axes: Axes, game: Game, results: Sequence[RoundResult]) -> None:
    """Draw the average and the winning number by round, and the equilibrium."""
    label = f"equilibrium {' and '.join(f'{each:,.6g}' for each in game.equilibria)}"
    draw_equilibria(axes, game, color="equilibrium", linewidth=3, label=label)
    winning = {each.round: number_of(each.winning_number, game) for each in results if each.winning_number is not None}
    drawn = {number: value if value <= BEYOND * game.max_value else math.nan for number, value in winning.items()}
    draw_line(axes, averages_of(game, {each.round: each.tally for each in results}), color="average", label="average")
    draw_line(axes, drawn, color="winning", linestyle="dashed", marker="D", clip_on=False, label="winning number")
    scale_rounds(axes, [each.round for each in results])


def draw_equilibria(axes: Axes, game: Game, **style: Any) -> None:
    """Draw a horizontal line at each equilibrium of a game."""
    if game.equilibria:
        across = axes.get_yaxis_transform()
        axes.hlines(game.equilibria, 0, 1, linestyles="dotted", clip_on=False, transform=across, **style)


def draw_line(axes: Axes, numbers: Mapping[int, float], **style: Any) -> None:
    """Draw numbers by round."""
    axes.plot(list(numbers), list(numbers.values()), **{"marker": "o", **style})


def draw_spread(axes: Axes, game: Game, results: Sequence[RoundResult]) -> None:
    """Draw the standard deviation of the answers by round."""
    spreads = {each.round: each.tally.std() for each in results}
    numbers = {number: std / game.scale for number, std in spreads.items() if std is not None}
    draw_line(axes, numbers, color="series-1")
    scale_rounds(axes, list(spreads))


def draw_part_lines(axes: Axes, game: Game, rounds: Mapping[int, Mapping[str, Tally]], names: Sequence[str]) -> None:
    """Draw the averages of these parts of the participants by round."""
    for index, name in enumerate(names):
        colour, line_style = series_style(index)
        averages = averages_of(game, {number: tallies[name] for number, tallies in rounds.items()})
        draw_line(axes, averages, color=colour, linestyle=line_style)
    scale_rounds(axes, list(rounds))


def scale_rounds(axes: Axes, rounds: Sequence[int]) -> None:
    """Scale the axes to these rounds, and from 0 to slightly above the highest number."""
    limit_ticks(axes, across=8, up=4, whole="x")
    axes.spines.bottom.set_visible(False)  # an equilibrium of 0 is drawn there
    margin = max(0.25, (max(rounds) - min(rounds)) / 60)
    axes.set_xlim(min(rounds) - margin, max(rounds) + margin)
    if len(set(rounds)) > MARKED_ROUNDS:
        for line in axes.lines:
            line.set_marker("")
    axes.set_ylim(0, max(axes.dataLim.y1, 0) * 1.12 or 1)


def draw_times(axes: Axes, times: Sequence[Mapping[str, float]], kinds: Sequence[str]) -> None:
    """Draw stacked bars of the time breakdown of each round (seconds)."""
    rounds = [each["round"] for each in times]
    below = np.zeros(len(times))
    for index, kind in enumerate(kinds):
        seconds = np.array([each.get(kind, 0.0) for each in times])
        axes.bar(rounds, seconds, 0.7, bottom=below, color=series_style(index)[0])
        below += seconds
    limit_ticks(axes, across=10, up=4, whole="x")
    axes.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)


def grid_of(count: int) -> tuple[int, int]:
    """Return the rows and columns of a grid of `count` small charts."""
    columns = 2 if count == 4 else min(count, 3)
    return (-(-count // columns), columns) if count else (0, 0)


def draw_small_multiples(part: SubFigure, rounds: Sequence[tuple[Game, RoundResult]]) -> list[Axes]:
    """Draw a grid of histograms; return their axes."""
    if not rounds:
        return []
    grid = part.subplots(*grid_of(len(rounds)), squeeze=False)
    for axes in grid.flat[len(rounds) :]:
        axes.set_visible(False)
    for axes, (game, result) in zip(grid.flat, rounds, strict=False):
        draw_answers(axes, game, result)
    return list(grid.flat[: len(rounds)])


def parts_chart(game: Game, tallies: Mapping[str, Tally], label: str) -> Markup:
    """Return stacked histograms of one round for a page, one for each of the largest parts, with its average.

    The x-axis ends at the highest answer. Each part is scaled to its own highest bar, so that small parts compare with
    large ones.
    """
    names = [(name, short_name(name)) for name in largest(tallies, PARTS_DRAWN)]
    top = max([int(tally.units[-1]) for tally in tallies.values() if tally.answered], default=0) or 1
    height = 0.42 * len(names) + 0.35
    sides = {"left": 0.03 + 0.0172 * max(len(text) for _, text in names), "right": 0.955, "top": 1.0}
    figure = Figure(figsize=(WIDTH_INCHES, height))
    grid = figure.subplots(
        len(names), 1, sharex=True, squeeze=False, gridspec_kw={**sides, "bottom": 0.35 / height, "hspace": 0.16}
    )
    for axes, (name, text) in zip(grid.flat, names, strict=True):
        _draw_histogram(axes, game, tallies[name], PART_BINS, top)
        axes.grid(visible=False)
        axes.set_yticks([])
        axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9.5, color="ink")
        average = tallies[name].average()
        if average is not None:
            axes.axvline(number_of(average, game), color="average")
    return svg(label, figure)


def short_name(name: str) -> str:
    """Return a name of at most NAME_LENGTH characters."""
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


# --- PNG files -------------------------------------------------------------------------------------------------------


def draw_pictures(run: SavedRun) -> None:
    """Draw histogram.png and, for a game of several rounds, rounds.png. Raises ResultsError."""
    if run.results:
        write_png(run.path / "histogram.png", _last_round(run))
    if len(run.results) > 1:
        write_png(run.path / "rounds.png", _all_rounds(run))


def _last_round(run: SavedRun) -> Figure:
    result = run.results[-1]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    draw_answers(axes, run.game, result)
    axes.set_title(f"Round {result.round}: {result.tally.answered:,} of {result.tally.asked:,} participants answered")
    axes.set(xlabel=f"number, 0 to {run.game.max_value:,}", ylabel="participants")
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


def _all_rounds(run: SavedRun) -> Figure:
    """Draw small histograms above the averages by round."""
    results = [run.results[index] for index in selection(len(run.results), SMALL_MULTIPLES)]
    figure, above, below = two_parts(2.3 * grid_of(len(results))[0] + 0.7, 3.4)
    heading = f"{run.config.participant_num:,} participants, closest to {run.game.target} wins"
    above.suptitle(heading, fontsize=15, weight="bold")
    for axes, result in zip(draw_small_multiples(above, [(run.game, each) for each in results]), results, strict=True):
        axes.set_title(f"Round {result.round}", loc="left", fontsize=11, weight="bold")
        if result.average is not None:
            average = f"average {brief(number_of(result.average, run.game))}"
            axes.set_title(average, loc="right", fontsize=10.5, color="average")
    above.supylabel("participants", fontsize=11, color="muted")
    axes = below.subplots()
    draw_averages(axes, run.game, run.results)
    if len(run.results) <= LABELLED_ROUNDS:
        place: dict[str, Any] = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
        for point in averages_of(run.game, {each.round: each.tally for each in run.results}).items():
            axes.annotate(brief(point[1]), point, color="average", fontsize=10, **place)
    axes.set(xlabel="round", ylabel=f"number, 0 to {run.game.max_value:,}")
    below.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=10.5)
    return figure
