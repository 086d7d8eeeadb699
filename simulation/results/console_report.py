"""Text output of results: the announcements of the moderator, a text histogram and tables."""

import shutil
import sys
from fractions import Fraction

import numpy as np

from simulation.errors import printable
from simulation.game.rules import Game
from simulation.game.tally import RoundResult, Tally, Units
from simulation.llm.responses import Usage
from simulation.results.reader import SavedRun
from simulation.results.run_files import most_frequent, position_in_words
from simulation.results.tables import table_lines
from simulation.settings import SimulationConfig

BARS = 15
BAR_WIDTH = 50


def announcement_lines(result: RoundResult, game: Game) -> list[str]:
    """Return the lines that announce the result of a round."""
    duration = f"[takes {result.seconds:.2f} s]"
    if result.average is None or result.winning_number is None:
        return [f"Moderator: Nobody of {result.tally.asked} answered, so there is no average {duration}"]
    names = ", ".join(f"P{index}" for index in result.winners.lowest)
    more = result.winners.count - len(result.winners.lowest)
    names += f" and {more} more" if more else ""
    numbers = " and ".join(f"{units / game.scale:.{game.decimals}f}" for units in result.closest)
    target = game.target_or_it
    target = target if target == "it" else f"{_text(result.winning_number, game)}, {target}"
    lines = [
        f"Moderator: The average value is {_text(result.average, game)} {duration}",
        f"Moderator: {names} {'wins' if result.winners.count == 1 else 'win'} with {numbers}, the closest to {target}.",
    ]
    if result.closest_teams:
        averages = ", ".join(f"{name} {_text(average, game, 'none')}" for name, average in result.teams)
        closest = f"{' and '.join(result.closest_teams)} {'is' if len(result.closest_teams) == 1 else 'are'} closest"
        lines.append(f"Moderator: The teams' averages are {averages}; {closest}.")
    return lines


def _text(units: Fraction | float | None, game: Game, missing: str = "-") -> str:
    """Format `units` / game.scale with three more decimals than an answer has. If `units` is None, return `missing`."""
    return missing if units is None else f"{float(units / game.scale):.{game.decimals + 3}f}"


def failure_line(tally: Tally) -> str:
    """Return a line that states how many participants failed, and why."""
    causes = "; ".join(f"{printable(cause)}: {count}" for cause, count in most_frequent(tally.failures).items())
    return f"{tally.failed} of {tally.asked} participants gave no usable answer: {causes}"


def usage_line(before: Usage, after: Usage, round_s: float) -> str:
    """Return a line about the usage in a round of `round_s` seconds. `before` and `after` are cumulative usages."""
    answering_s, client_s = after.answering_s - before.answering_s, after.client_s - before.client_s
    return (
        f"{after.requests - before.requests:,} requests ({after.retries - before.retries:,} repeated), "
        f"{after.prompt_tokens - before.prompt_tokens:,} tokens of prompts and "
        f"{after.completion_tokens - before.completion_tokens:,} of answers; {answering_s - client_s:.2f} s waiting "
        f"for the model, {client_s:.2f} s client work, {max(round_s - answering_s, 0):.2f} s RPC"
    )


def histogram(units: Units, counts: Units, top: int, bars: int) -> tuple[Units, Units]:
    """Return edges and counts of at most `bars` bins over 0 .. top. Answer `units[i]` was given `counts[i]` times."""
    width = -(-(top + 1) // bars)
    edges = np.arange(0, top + width + 1, width, dtype=np.int64)
    return edges, np.bincount(units // width, counts, len(edges) - 1).astype(np.int64)


def histogram_lines(tally: Tally, config: SimulationConfig) -> list[str]:
    """Return the lines of a text histogram of the answers. The lines fit the width of the terminal."""
    if not tally.answered:
        return []
    decimals, scale, top = config.decimals, 10**config.decimals, config.max_value * 10**config.decimals
    edges, counts = histogram(tally.units, tally.counts, top, BARS)
    labels = [f"{low / scale:.{decimals}f}" for low in edges[:-1]]
    if edges[1] > 1:
        highest = np.minimum(edges[1:] - 1, top) / scale
        labels = [f"{low}-{high:.{decimals}f}" for low, high in zip(labels, highest, strict=True)]
    label_width, longest = max(map(len, labels)), int(counts.max())
    room = shutil.get_terminal_size().columns - label_width - len(str(longest)) - 5  # 5: the spaces in a line
    bar_width = min(BAR_WIDTH, max(room, 0))
    block = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    return [
        f"  {label:>{label_width}}  {block * round(count / longest * bar_width)} {count}".rstrip()
        for label, count in zip(labels, counts, strict=True)
    ]


def brief(number: float | None) -> str:
    """Format a number with three decimals, or with three significant digits if it is below 0.1. None becomes a dash."""
    if number is None:
        return "–"
    return f"{number:,.3f}" if abs(number) >= 0.1 or number == 0 else f"{number:.3g}"


def run_lines(run: SavedRun) -> list[str]:
    """Return a run's text report: announcements, histogram and tables of the last round, and the status of the run."""
    lines: list[str] = []
    for result in run.results:
        lines += announcement_lines(result, run.game)
        lines += [failure_line(result.tally)] if result.tally.failed else []
    if run.results:
        lines += histogram_lines(run.results[-1].tally, run.config)
    for topic, rounds in run.tallies_by_part.items():
        rows = []
        for name, tally in rounds[-1].items():
            figures = [_text(units, run.game) for units in (tally.average(), tally.std())]
            rows.append([name, f"{tally.asked:,}", f"{tally.answered:,}", *figures])
        head = [topic, "asked", "answered", "average", "spread"]
        lines += table_lines(head, rows, dropped=("spread", "asked", "answered", "average"))
    played = f"{run.rounds_finished} of {run.config.rounds} rounds"
    experiment = f"; it is {position_in_words(run.position)}" if run.position is not None else ""
    return [*lines, f"run {run.run_id} is {run.summary['status']}: {played}{experiment}"]
