"""Text output of results: the announcements of the moderator, a text histogram and tables."""

import shutil
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from simulation.errors import NO_NUMBER, OUT_OF_RANGE, UNCERTAIN, printable
from simulation.files import is_there
from simulation.game.answer_sheet import bins_of
from simulation.game.game import Game, Units
from simulation.game.tally import INTERRUPTED, NUMBERS_NAMED, RoundResult, Tally
from simulation.llm.responses import NO_TEXT, Usage
from simulation.results.reader import SavedRun
from simulation.results.run_files import FailedAnswer, most_frequent, position_in_words, read_run_file
from simulation.results.tables import number_text, table_lines

BARS = 15
BAR_WIDTH = 50
IGNORED_SHARE = 0.9  # share of unusable answers from which structured output seems to be ignored
ANSWERS_SHOWN, ANSWER_LENGTH = 3, 30  # maximum number and length of unusable answers that are shown for each cause


def announcement_lines(result: RoundResult, game: Game) -> list[str]:
    """Return the lines that announce the result of a round."""
    duration = f"[takes {result.seconds:.2f} s]"
    asked, interrupted = result.tally.asked, result.tally.failures.get(INTERRUPTED, 0)
    if not result.tally.answered and interrupted:
        return [f"Moderator: The round was interrupted before any of {asked} participants answered {duration}"]
    if not result.tally.answered:
        return [f"Moderator: Nobody of {asked} answered, so there is no average {duration}"]
    if result.error:
        return [f"Moderator: The answers have no result: {result.error} {duration}"]
    texts = {name: _text(value, game) for name, value in result.outcome.items() if value is not None}
    winning = texts.pop("winning_number", "")
    words = {name: game.words.label(name) for name in texts}
    words |= {name: f"{name} value" for name in ("average", "median", "maximum") if words.get(name) == name}
    figures = ", ".join(f"the {words[name]} is {text}" for name, text in texts.items())
    figures = figures or (f"the {game.words.label('winning_number')} is {winning}" if winning else "there is no figure")
    lines = [f"Moderator: {figures[0].upper()}{figures[1:]} {duration}"]
    names = ", ".join(f"P{index}" for index in result.winners.lowest)
    more = result.winners.count - len(result.winners.lowest)
    names += f" and {more} more" if more else ""
    numbers = winning_answers(result, game)
    won = game.words.won or game.words.goal + (f" ({winning})" if winning not in ("", numbers, *texts.values()) else "")
    ending = f"win{'s' * (result.winners.count == 1)} with {numbers}, {won.replace('{winning_number}', winning)}."
    lines.append(f"Moderator: {names} {ending}" if names else f"Moderator: Nobody wins with {game.words.goal}.")
    if result.teams:
        averages = ", ".join(f"{name} {_text(average, game, 'none')}" for name, average in result.teams)
        closest = f"{' and '.join(result.closest_teams)} {'is' if len(result.closest_teams) == 1 else 'are'} closest"
        lines.append(f"Moderator: The teams' averages are {averages}{f'; {closest}' if result.closest_teams else ''}.")
    if interrupted:
        lines.append(f"Moderator: The round was interrupted before {interrupted} of {asked} participants answered.")
    return lines


def winning_answers(result: RoundResult, game: Game) -> str:
    """Return the lowest answers that won, as in `33 and 34`, and how many more there are."""
    named = [_number(units, game) for units in result.winning_units[:NUMBERS_NAMED]]
    rest = len(result.winning_units) - NUMBERS_NAMED
    return f"{', '.join(named)} and {rest} more" if rest > 0 else " and ".join(named)


def _number(units: int, game: Game) -> str:
    return f"{units / game.scale:.{game.decimals}f}"


def _text(number: Fraction | float | None, game: Game, missing: str = "-") -> str:
    """Format a figure with three more decimals than an answer has, but an int as it is. None becomes `missing`."""
    text = missing if number is None else number_text(number, game.decimals + 3, padded=True)
    return text if isinstance(number, int) else text.replace(",", "")


def failure_lines(tally: Tally, examples: Sequence[FailedAnswer] = ()) -> list[str]:
    """Return a line that states how many participants failed, why, and some answers in `examples`, if any failed."""
    causes, failures = [], {cause: count for cause, count in tally.failures.items() if cause != INTERRUPTED}
    for cause, count in most_frequent(failures).items():
        texts = dict.fromkeys(each["text"] for each in examples if each["failure"] == cause and "text" in each)
        shown = ", ".join(printable(text, ANSWER_LENGTH) for text in list(texts)[:ANSWERS_SHOWN])
        causes.append(f"{printable(cause)}{shown and f', such as {shown}'}: {count}")
    start = f"{sum(failures.values())} of {tally.asked} participants gave no usable answer"
    return [f"{start}: {'; '.join(causes)}"] if causes else []


def structured_output_lines(tally: Tally, asking: int, kind: str) -> list[str]:
    """Return a line with advice if the models of `asking` participants seem to ignore --structured-output `kind`."""
    unread = (NO_NUMBER, UNCERTAIN, OUT_OF_RANGE, NO_TEXT)
    cut = [cause for cause in tally.failures if cause.startswith("answer cut off") and "while thinking" not in cause]
    failed = sum(tally.failures.get(cause, 0) for cause in {*unread, *cut})
    others = [each for each in ("response_format", "none") if each != kind]
    line = f"the model server seems to ignore {kind}; --structured-output {' or '.join(others)} may help"
    return [line] if kind != "none" and asking and failed >= IGNORED_SHARE * asking else []


def usage_line(before: Usage, after: Usage, round_s: float) -> str:
    """Return a line about the usage in a round of `round_s` seconds. `before` and `after` are cumulative usages."""
    used = Usage(**{name: value - getattr(before, name) for name, value in vars(after).items()})
    return (
        f"{f'{used.replayed:,} recorded answers, ' if used.replayed else ''}"
        f"{used.requests:,} requests ({used.retries:,} repeated), "
        f"{used.prompt_tokens:,} tokens of prompts and {used.completion_tokens:,} of answers; "
        f"{max(used.answering_s - used.client_s, 0):.2f} s waiting for the model, {used.client_s:.2f} s client work, "
        f"{max(round_s - used.answering_s, 0):.2f} s RPC"
    )


def histogram(tally: Tally, low: int, high: int, bars: int) -> tuple[Units, Units]:
    """Return edges and counts of at most `bars` bins (see `bins_of`), in units. The last edge is high + 1."""
    width, bins = bins_of(high - low + 1, bars)
    edges = np.minimum(low + width * np.arange(bins + 1, dtype=np.int64), high + 1)
    return edges, np.bincount((tally.units - low) // width, tally.counts, bins).astype(np.int64)


def histogram_lines(result: RoundResult, game: Game) -> list[str]:
    """Return the lines of a text histogram that fits the terminal. `...` replaces the rows of bins without answers."""
    tally = result.tally
    if not tally.answered:
        return []
    edges, counts = histogram(tally, game.lowest, game.lowest + game.numbers - 1, BARS)
    sizes, filled = np.diff(edges), np.flatnonzero(counts)
    ends = [(_number(edges[row], game), _number(edges[row + 1] - 1, game)) for row in filled]
    labels = [low if low == high else f"{low}-{high}" for low, high in ends]
    label_width, longest = max(map(len, labels)), int(counts.max())
    room = shutil.get_terminal_size().columns - label_width - len(str(longest)) - 5  # 5: the spaces in a line
    bar_width = min(BAR_WIDTH, max(room, 0))
    block = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    lines = [f"Answers of round {result.round}: {tally.answered:,} of {tally.asked:,} participants, by number"]
    for label, row, before in zip(labels, filled, [filled[0] - 1, *filled], strict=False):
        lines += [f"  {'...':>{label_width}}"] if row > before + 1 else []
        bar = block * round(counts[row] / longest * bar_width)
        note = f" (only {sizes[row]} of {sizes[0]} numbers)" if 1 < sizes[row] < sizes[0] else ""
        lines.append(f"  {label:>{label_width}}  {bar} {counts[row]}{note}")
    return lines


def summaries_text(folders: Iterable[Path], several: bool) -> str:
    """Return the content of the summary.json in each of `folders` that has one. If `several`, return a JSON array."""
    there = (folder for folder in folders if is_there(folder / "summary.json"))
    text = ",\n".join(read_run_file(folder, "summary.json", str.strip) for folder in there)
    return f"[{text}]" if several else text


def run_lines(run: SavedRun) -> list[str]:
    """Return a run's text report: announcements, histogram and tables of the last round, and the status of the run."""
    lines: list[str] = []
    for result in run.results:
        lines += announcement_lines(result, run.game) + failure_lines(result.tally)
    lines += histogram_lines(run.results[-1], run.game) if run.results else []
    for topic, rounds in run.tallies_by_part.items():
        rows = []
        for name, tally in rounds[-1].items():
            figures = [_text(each and each / run.game.scale, run.game) for each in (tally.average(), tally.std())]
            rows.append([name, f"{tally.asked:,}", f"{tally.answered:,}", *figures])
        head = [topic, "asked", "answered", "average", "spread"]
        lines += table_lines(head, rows, dropped=("spread", "asked", "answered", "average"))
    players = run.game.population.players
    lines += [f"{each.share} {each.label}: {each.source}" for each in players if each.source is not None]
    played = f"{run.rounds_finished} of {run.config.rounds} rounds{', converged' * ('converged_after' in run.summary)}"
    experiment = f"; it is {position_in_words(run.position)}" if run.position is not None else ""
    lines += [f"started {run.provenance}"] if run.provenance else []
    return [*lines, f"run {run.run_id} is {run.summary['status']}: {played}{experiment}"]
