"""The answers of consecutive participants in one round, recorded as they arrive: one integer per participant.

Ten million participants may fail with as many different texts: a failure is a code among the answers, and each
distinct cause is stored once.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulation.errors import Ended, Failure, failure_of
from simulation.game.rules import OUT_OF_RANGE, Game, to_units
from simulation.game.tally import (
    CAUSES_COUNTED,
    INTERRUPTED,
    OTHER_CAUSES,
    WINNERS_NAMED,
    Tally,
    Units,
    Winners,
    top_causes,
    value_counts,
)

PIECE = 65_536  # entries counted at a time; they and their copies fit a CPU cache
TEXTS_KEPT, TEXT_KEPT = 20, 2000  # texts of failures: the first 20, of up to 2000 characters each
CUT_SHORT = Failure(INTERRUPTED, ended=Ended.INTERRUPTED)
UNDECIDED = -1
FAILED = -2  # the code of the first cause on a sheet; FAILED - k is cause k


@dataclass(frozen=True)
class Answers:
    """The answers of participants first .. first+len(units)-1: units, or FAILED - k for a failure with causes[k].

    `texts` holds the answer texts of some failed participants, by index.
    """

    first: int
    units: Units
    causes: list[str]
    texts: dict[int, str] = field(default_factory=dict)

    def cause_of(self, participant: int) -> str | None:
        """Return why this participant has no answer; None if it has one."""
        units = int(self.units[participant - self.first])
        return None if units >= 0 else self.causes[FAILED - units]


class AnswerSheet:
    """The outcomes of `count` participants; each is recorded once."""

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self.done = 0
        self.texts: dict[int, str] = {}
        self.ended = Ended.COMPLETE
        self._causes: dict[str, int] = {}  # the code of each cause
        self._fill(array("q", [UNDECIDED]) * count)

    def _fill(self, places: array[int]) -> None:
        self._places = places  # two views of one buffer: array stores one number in a third of numpy's time
        self._units: Units = np.frombuffer(places, np.int64)

    def record(self, place: int, units: int) -> None:
        """Record the answer of participant first + place."""
        if units < 0:
            raise ValueError(f"an answer of {units} units")
        self._places[place] = units
        self.done += 1

    def record_many(self, places: Sequence[int], answers: Sequence[Any], game: Game) -> None:
        """Record the answers of the participants at these distinct places; an unusable answer is a failure.

        Plain numbers are converted together (0.1 us each), because one by one they take 1.2 us each.
        """
        if len(places) != len(answers):
            raise ValueError(f"{len(answers)} answers for {len(places)} places")
        numbers = _plain_numbers(answers)
        if numbers is None:
            for place, answer in zip(places, answers, strict=True):
                self._put_any(place, answer, game)
            return
        usable = (numbers >= 0) & (numbers <= game.max_value)  # NaN is in no range
        units = np.rint(np.where(usable, numbers, 0) * game.scale).astype(np.int64)
        if not usable.all():
            units[~usable] = self._code(OUT_OF_RANGE)
        self._units[slice(places.start, places.stop, places.step) if isinstance(places, range) else places] = units
        self.done += len(units)

    def _put_any(self, place: int, answer: Any, game: Game) -> None:
        try:
            self.record(place, to_units(answer, game))
        except BaseException as error:  # noqa: BLE001 - a user's number type may raise anything
            self.fail(place, *failure_of(error))

    def fail(self, place: int, cause: str, text: str | None = None, ended: Ended = Ended.COMPLETE) -> None:
        """Record that participant first + place failed, and keep its text if it is one of the first TEXTS_KEPT."""
        if text is not None and len(self.texts) < TEXTS_KEPT:
            self.texts[place] = text[:TEXT_KEPT]
        self._places[place] = self._code(cause)
        self.ended = max(self.ended, ended)
        self.done += 1

    def _code(self, cause: str) -> int:
        return self._causes.setdefault(cause, FAILED - len(self._causes))

    def with_missing_failed(self) -> AnswerSheet:
        """Return a copy with undecided participants recorded as interrupted; the original may still receive answers."""
        copy = AnswerSheet(self.first, 0)
        copy._fill(self._places[:])  # before the causes: a cause is stored before its code
        copy._causes, copy.texts = dict(self._causes), dict(self.texts)
        undecided = copy._units == UNDECIDED
        copy._units[undecided] = copy._code(CUT_SHORT.cause)
        copy.ended = CUT_SHORT.ended if undecided.any() else self.ended
        copy.count = copy.done = self.count
        return copy

    def tally(self) -> Tally:
        """Count the answers and failures. Raises ValueError while a participant is undecided."""
        distinct, counts = value_counts(self._units[self._units >= 0])
        failed = np.bincount(FAILED - self._units[self._units <= FAILED])
        return Tally(self.count, distinct, counts, top_causes(failed, list(self._causes).__getitem__), self.ended)

    def partial_histogram(self, width: int, bins: int) -> tuple[Units, dict[str, int]]:
        """Return a partial histogram of a round in progress: int64 of shape (bins,), and failures by cause.

        Bins are `width` units wide and start at 0. Only the first CAUSES_COUNTED causes are counted separately, as
        there may be as many causes as participants.
        """
        answered = np.zeros(bins, np.int64)
        failed = np.zeros(CAUSES_COUNTED + 1, np.int64)
        units, any_failed = self._units, bool(self._causes)
        for at in range(0, len(units), PIECE):
            piece = units[at : at + PIECE]
            usable = piece[piece >= 0]
            answered += np.bincount(usable if width == 1 else usable // width, minlength=bins)
            if any_failed:
                codes = np.minimum(FAILED - piece[piece <= FAILED], CAUSES_COUNTED)
                failed += np.bincount(codes, minlength=len(failed))
        causes = [*islice(self._causes, CAUSES_COUNTED), OTHER_CAUSES]  # after the codes: each has its cause by now
        return answered, {cause: often for cause, often in zip(causes, failed.tolist(), strict=False) if often}

    def winners(self, winning_units: tuple[int, ...]) -> Winners:
        """Return the participants who answered one of the winning numbers."""
        places = np.flatnonzero(np.isin(self._units, winning_units))
        return Winners(len(places), tuple(self.first + int(place) for place in places[:WINNERS_NAMED]))

    def answers(self, first: int, count: int) -> Answers:
        """Return the answers of those participants of first .. first+count-1 that are on this sheet."""
        start = max(first, self.first) - self.first
        stop = max(start, min(first + count - self.first, self.count))
        units = self._units[start:stop].copy()
        failed = units <= FAILED
        used = np.unique(FAILED - units[failed])  # the causes of these answers
        units[failed] = FAILED - np.searchsorted(used, FAILED - units[failed])
        causes = list(self._causes) if len(used) else []
        texts = {self.first + place: text for place, text in self.texts.items() if start <= place < stop}
        return Answers(self.first + start, units, [causes[code] for code in used.tolist()], texts)


def _plain_numbers(answers: Sequence[Any]) -> NDArray[np.float64] | None:
    """Return the answers as float64 if all are plain int or float, otherwise None; numbers in range are exact."""
    if not set(map(type, answers)) <= {int, float}:
        return None
    try:
        return np.fromiter(answers, np.float64, len(answers))
    except OverflowError:
        return None
