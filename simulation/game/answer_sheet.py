"""The answers of consecutive participants in one round. Entries are answers in units (10^-decimals), or codes < 0."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simulation.errors import Ended, failure_of, printable, traceback_of
from simulation.game.game import Game, Units
from simulation.game.rules import NUMBER_LENGTH, out_of_range, to_units
from simulation.game.tally import INTERRUPTED, OTHER_CAUSES, WINNERS_NAMED, Tally, Winners, value_counts

CAUSES_COUNTED = 100  # failure causes counted separately per group; further causes are merged into OTHER_CAUSES
BINS = 101  # maximum number of bins of a partial histogram
TEXT_KEPT = 2000  # maximum length of the kept text of an unusable answer
KEPT = 20  # number of failures whose text and traceback are kept; as many again are kept if their causes are new
UNDECIDED = -1  # the entry of a participant without an outcome so far
FAILED = -2  # the code of the first failure cause of a sheet; the code of cause number k is FAILED - k


@dataclass(frozen=True)
class Answers:
    """The answers of the participants first .. first+len(units)-1."""

    first: int
    units: Units  # of each participant: the answer in units, or FAILED - k for a failure with the cause `causes[k]`
    causes: list[str]
    # By participant index: the `text` of an unusable answer, the `traceback` of an exception, or both, of some failures
    examples: dict[int, dict[str, str]] = field(default_factory=dict)

    def cause_of(self, participant: int) -> str | None:
        units = int(self.units[participant - self.first])
        return None if units >= 0 else self.causes[FAILED - units]


def bins_of(numbers: int, most: int = BINS) -> tuple[int, int]:
    """Return the width in units, and the number of bins (at most `most`), of a histogram of `numbers` possible answers.

    All bins are equal if a third of `most` to `most` equal bins are possible. Otherwise, the width is 1, 2 or 5 times
    a power of ten, and the highest numbers that fill no bin are the last one: 100 alone after 90 .. 99.
    """
    equal = (bins for bins in range(min(numbers, most), most // 3 - 1, -1) if numbers % bins == 0)
    if (bins := next(equal, 0)) > 0:
        return numbers // bins, bins
    width = next(digit * 10**power for power in range(16) for digit in (1, 2, 5) if numbers <= digit * 10**power * most)
    return width, -(-numbers // width)


def top_causes(counts: Units, cause: Callable[[int], str]) -> dict[str, int]:
    """Return the count `counts[k]` of each cause `cause(k)`. Merge all but the CAUSES_COUNTED most frequent."""
    most_frequent = np.argsort(-counts, kind="stable")[:CAUSES_COUNTED].tolist()
    failures = {cause(number): int(counts[number]) for number in most_frequent if counts[number]}
    if others := int(counts.sum()) - sum(failures.values()):
        failures[OTHER_CAUSES] = failures.get(OTHER_CAUSES, 0) + others
    return failures


class AnswerSheet:
    """Outcomes of participants first .. first+count-1 in one round. Each is recorded once, at offset index - first."""

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self.done = 0
        self.examples: dict[int, dict[str, str]] = {}  # as in `Answers`, by offset
        self.ended = Ended.COMPLETE
        self._causes: dict[str, int] = {}  # the code of each failure cause
        self._entries = array("q", [UNDECIDED]) * count
        # A numpy view of `_entries`. The array itself stores a single number in a third of numpy's time
        self._units: Units = np.frombuffer(self._entries, np.int64)

    def record(self, offset: int, units: int) -> None:
        if units < 0:
            raise ValueError(f"an answer of {units} units")
        self._entries[offset] = units
        self.done += 1

    def record_many(self, offsets: Sequence[int], answers: Sequence[Any], game: Game) -> None:
        """Record the answers of several participants. Record an unusable answer as a failure."""
        if len(offsets) != len(answers):
            raise ValueError(f"{len(answers)} answers for {len(offsets)} offsets")
        try:  # numpy converts plain numbers all at once without loss, in a tenth of the time
            numbers = np.fromiter(answers, np.float64, len(answers)) if {*map(type, answers)} <= {int, float} else None
        except OverflowError:
            numbers = None
        if numbers is None:
            for offset, answer in zip(offsets, answers, strict=True):
                try:
                    self.record(offset, to_units(answer, game))
                except BaseException as error:  # noqa: BLE001 - a user's number type may raise anything
                    self.fail(offset, failure_of(error), error)
            return
        usable = (numbers >= game.low) & (numbers <= game.high)  # False for NaN
        units = np.rint(np.where(usable, numbers, 0) * game.scale).astype(np.int64)
        if not usable.all():
            for place in np.flatnonzero(~usable).tolist():
                text = printable(str(answers[place]), NUMBER_LENGTH)
                self.fail(offsets[place], (out_of_range(game), text, Ended.COMPLETE))
            offsets, units = np.asarray(offsets)[usable].tolist(), units[usable]
        self._units[offsets] = units
        self.done += len(units)

    def fail(self, offset: int, failure: tuple[str, str | None, Ended], error: BaseException | None = None) -> None:
        """Record a failure (see `failure_of`). Keep the text and the traceback of the first failures (see KEPT)."""
        cause, text, ended = failure
        if len(self.examples) < (KEPT if cause in self._causes else 2 * KEPT):
            kept = {} if text is None else {"text": text[:TEXT_KEPT]}
            kept |= {"traceback": trace} if error is not None and (trace := traceback_of(error)) else {}
            self.examples |= {offset: kept} if kept else {}
        self._entries[offset] = self._causes.setdefault(cause, FAILED - len(self._causes))
        self.ended = max(self.ended, ended)
        self.done += 1

    def with_missing_failed(self) -> "AnswerSheet":
        """Return a copy that counts undecided participants as failed. Other threads may record answers concurrently."""
        copy = AnswerSheet(self.first, self.count)
        copy._units[:] = self._units  # copied before the causes: `fail` stores a cause before its code
        copy._causes, copy.examples = dict(self._causes), dict(self.examples)
        undecided = copy._units == UNDECIDED
        copy._units[undecided] = copy._causes.setdefault(INTERRUPTED, FAILED - len(copy._causes))
        copy.ended = Ended.INTERRUPTED if undecided.any() else self.ended
        copy.done = self.count
        return copy

    def tally(self) -> Tally:
        """Return the tally of all answers and failures. Raises ValueError if a participant is undecided."""
        distinct, counts = value_counts(self._units[self._units >= 0])
        return Tally(self.count, distinct, counts, self._failures(), self.ended)

    def _failures(self) -> dict[str, int]:
        codes = np.bincount(FAILED - self._units[self._units <= FAILED])
        return top_causes(codes, list(self._causes).__getitem__)  # read last: `fail` stores a cause before its code

    def partial_histogram(self, game: Game) -> tuple[list[int], dict[str, int]]:
        """Return how many answers so far fall into each bin (see `bins_of`), and how many failures have each cause."""
        width, bins = bins_of(game.numbers)
        answers = self._units[self._units >= 0] - game.lowest
        return np.bincount(answers // width, minlength=bins).tolist(), self._failures()

    def winners(self, winning_units: tuple[int, ...]) -> Winners:
        """Return the participants whose answer is one of `winning_units`."""
        offsets = np.flatnonzero(np.isin(self._units, winning_units))
        return Winners(len(offsets), tuple((self.first + offsets[:WINNERS_NAMED]).tolist()))

    def answers(self, first: int, count: int) -> Answers:
        """Return the answers of participants first .. first+count-1, ignoring participants of other sheets."""
        start = max(first, self.first) - self.first
        stop = max(start, min(first + count - self.first, self.count))
        units = self._units[start:stop].copy()
        failed = units <= FAILED
        used, codes = np.unique(FAILED - units[failed], return_inverse=True)  # codes of these participants only
        units[failed] = FAILED - codes
        causes = list(self._causes) if len(used) else []
        examples = {self.first + offset: each for offset, each in self.examples.items() if start <= offset < stop}
        return Answers(self.first + start, units, [causes[code] for code in used.tolist()], examples)
