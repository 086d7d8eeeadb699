"""Console output of results: the moderator's lines and a text histogram."""

from __future__ import annotations

import shutil
import sys
from fractions import Fraction

import numpy as np

from simulation.errors import printable
from simulation.game.rules import Announcement, Game
from simulation.game.tally import RoundResult, Tally, Units, announcement_of
from simulation.llm.usage import Usage
from simulation.results.reader import SavedRun, rounds_finished
from simulation.results.run_files import most_frequent, position_in_words
from simulation.results.tables import table_lines
from simulation.settings import SimulationConfig

BARS = 15
BAR_WIDTH = 50


def announcement_lines(result: RoundResult, game: Game) -> list[str]:
    """Return the moderator's lines after a round."""
    scale, decimals = game.scale, game.decimals
    if result.average is None or result.winning_number is None:
        return [
            f"Moderator: Nobody of {result.tally.asked} answered, so there is no average [takes {result.seconds:.2f} s]"
        ]
    average = f"{float(result.average / scale):.{decimals + 3}f}"
    names = ", ".join(f"P{index}" for index in result.winners.lowest)
    more = result.winners.count - len(result.winners.lowest)
    names += f" and {more} more" if more else ""
    numbers = " and ".join(f"{unit / scale:.{decimals}f}" for unit in result.closest)
    target = "it"
    if game.target_or_it == game.target:
        target = f"{float(result.winning_number / scale):.{decimals + 3}f}, {game.target}"
    verb = "wins" if result.winners.count == 1 else "win"
    return [
        f"Moderator: The average value is {average} [takes {result.seconds:.2f} s]",
        f"Moderator: {names} {verb} with {numbers}, the closest to {target}.",
        *_team_lines(announcement_of(result, scale), decimals),
    ]


def _team_lines(told: Announcement, decimals: int) -> list[str]:
    """Return the moderator's lines about teams; empty for a game without teams."""
    if not told.closest_teams:
        return []
    averages = (
        f"{name} {'none' if average is None else f'{average:.{decimals + 3}f}'}" for name, average in told.teams
    )
    verb = "is" if len(told.closest_teams) == 1 else "are"
    return [
        f"Moderator: The teams' averages are {', '.join(averages)}; {' and '.join(told.closest_teams)} {verb} closest."
    ]


def failure_line(tally: Tally) -> str:
    """Return a line with the number of failed participants and the causes."""
    causes = "; ".join(f"{printable(cause)}: {count}" for cause, count in most_frequent(tally.failures).items())
    return f"{tally.failed} of {tally.asked} participants gave no usable answer: {causes}"


def usage_line(before: Usage, after: Usage, round_s: float) -> str:
    """Return a line with the usage and time of one round; `before` and `after` are the cumulative usage around it."""
    answering_s, client_s = after.answering_s - before.answering_s, after.client_s - before.client_s
    return (
        f"{after.requests - before.requests:,} requests ({after.retries - before.retries:,} repeated), "
        f"{after.prompt_tokens - before.prompt_tokens:,} tokens of prompts and "
        f"{after.completion_tokens - before.completion_tokens:,} of answers; {answering_s - client_s:.2f} s waiting "
        f"for the model, {client_s:.2f} s client work, {max(round_s - answering_s, 0):.2f} s RPC"
    )


def histogram(units: Units, counts: Units, top: int, bars: int) -> tuple[Units, Units]:
    """Count the answers in at most `bars` bins of equal width over 0 .. top units.

    Returns:
        The bin edges in units, shape (bins + 1,), and the count in each bin, shape (bins,).
    """
    width = -(-(top + 1) // bars)
    edges = np.arange(0, top + width + 1, width, dtype=np.int64)
    binned = np.zeros(len(edges) - 1, np.int64)
    np.add.at(binned, units // width, counts)
    return edges, binned


def histogram_lines(tally: Tally, config: SimulationConfig) -> list[str]:
    """Return a text histogram of the answers, fitted to the width of the terminal."""
    if not tally.answered:
        return []
    scale = 10**config.decimals
    edges, counts = histogram(tally.units, tally.counts, config.max_value * scale, BARS)
    last = np.minimum(edges[1:] - 1, config.max_value * scale)
    labels = [f"{low / scale:.{config.decimals}f}" for low in edges[:-1]]
    if edges[1] > 1:
        labels = [f"{label}-{high / scale:.{config.decimals}f}" for label, high in zip(labels, last, strict=True)]
    label_width = max(len(label) for label in labels)
    longest = max(int(counts.max()), 1)
    beside = label_width + len(str(longest)) + 5  # including spaces
    room = min(BAR_WIDTH, max(shutil.get_terminal_size().columns - beside, 0))
    block = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    rows = zip(labels, counts, strict=True)
    return [
        f"  {label:>{label_width}}  {block * round(count / longest * room)} {count}".rstrip() for label, count in rows
    ]


def number_of(units: Fraction, game: Game) -> float:
    """Convert units to a number of the game."""
    return float(units / game.scale)


def brief(number: float | None) -> str:
    """Format a number with few digits (three decimals; three significant digits below 0.1)."""
    if number is None:
        return "–"
    return f"{number:,.3f}" if abs(number) >= 0.1 or number == 0 else f"{number:.3g}"


def group_lines(run: SavedRun) -> list[str]:
    """Return a table of the last round's answers for each set of personas, and for the models."""
    lines: list[str] = []
    for topic, rounds in run.tallies_by_part.items() if run.results else ():
        rows = []
        for name, tally in rounds[-1].items():
            average, std = tally.average(), tally.std()
            shown = "-" if average is None else f"{number_of(average, run.game):.{run.game.decimals + 3}f}"
            spread = "-" if std is None else f"{std / run.game.scale:.{run.game.decimals + 3}f}"
            rows.append([name, f"{tally.asked:,}", f"{tally.answered:,}", shown, spread])
        dropped = ("spread", "asked", "answered", "average")
        lines += table_lines([topic, "asked", "answered", "average", "spread"], rows, dropped)
    return lines


def run_lines(run: SavedRun) -> list[str]:
    """Return a run's announcements, last histogram, group tables and final status."""
    lines: list[str] = []
    for result in run.results:
        lines += announcement_lines(result, run.game)
        lines += [failure_line(result.tally)] if result.tally.failed else []
    if run.results:
        lines += histogram_lines(run.results[-1].tally, run.config) + group_lines(run)
    played = f"{rounds_finished(run.summary)} of {run.config.rounds} rounds"
    experiment = f"; it is {position_in_words(run.position)}" if run.position is not None else ""
    return [*lines, f"run {run.run_id} is {run.summary['status']}: {played}{experiment}"]
