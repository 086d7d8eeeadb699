"""The answers of consecutive participants in one round: one integer each, the number or the code of a failure."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

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
    """The answers of participants first .. first+len(units)-1: units, or FAILED - k for a failure with causes[k]."""

    first: int
    units: Units
    causes: list[str]
    texts: dict[int, str] = field(default_factory=dict)  # the answers of some failed participants, by index

    def cause_of(self, participant: int) -> str | None:
        """Return why this participant has no answer; None if it has one."""
        units = int(self.units[participant - self.first])
        return None if units >= 0 else self.causes[FAILED - units]


class AnswerSheet:
    """The outcomes of participants first .. first+count-1, each recorded once, at its offset from the first."""

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self.done = 0
        self.texts: dict[int, str] = {}
        self.ended = Ended.COMPLETE
        self._causes: dict[str, int] = {}  # the code of each cause
        self._entries = array("q", [UNDECIDED]) * count
        self._units: Units = np.frombuffer(
            self._entries, np.int64
        )  # a view; an array stores a number in a third of its time

    def record(self, offset: int, units: int) -> None:
        """Record the answer of one participant."""
        if units < 0:
            raise ValueError(f"an answer of {units} units")
        self._entries[offset] = units
        self.done += 1

    def record_many(self, offsets: Sequence[int], answers: Sequence[Any], game: Game) -> None:
        """Record the answers of several participants; an unusable answer is a failure.

        Plain numbers in range are converted together, exactly (0.1 us each); one by one they take 1.2 us each.
        """
        if len(offsets) != len(answers):
            raise ValueError(f"{len(answers)} answers for {len(offsets)} offsets")
        try:
            are_plain = set(map(type, answers)) <= {int, float}
            numbers = np.fromiter(answers, np.float64, len(answers)) if are_plain else None
        except OverflowError:
            numbers = None
        if numbers is None:
            for offset, answer in zip(offsets, answers, strict=True):
                try:
                    self.record(offset, to_units(answer, game))
                except BaseException as error:  # noqa: BLE001 - a user's number type may raise anything
                    self.fail(offset, *failure_of(error))
            return
        usable = (numbers >= 0) & (numbers <= game.max_value)  # NaN is in no range
        units = np.rint(np.where(usable, numbers, 0) * game.scale).astype(np.int64)
        if not usable.all():
            units[~usable] = self._code(OUT_OF_RANGE)
        self._units[offsets] = units
        self.done += len(units)

    def fail(self, offset: int, cause: str, text: str | None = None, ended: Ended = Ended.COMPLETE) -> None:
        """Record that a participant failed, and keep its text if it is one of the first TEXTS_KEPT."""
        if text is not None and len(self.texts) < TEXTS_KEPT:
            self.texts[offset] = text[:TEXT_KEPT]
        self._entries[offset] = self._code(cause)
        self.ended = max(self.ended, ended)
        self.done += 1

    def _code(self, cause: str) -> int:
        return self._causes.setdefault(cause, FAILED - len(self._causes))

    def with_missing_failed(self) -> AnswerSheet:
        """Return a copy with undecided participants recorded as interrupted; the original may still receive answers."""
        copy = AnswerSheet(self.first, self.count)
        copy._units[:] = self._units  # before the causes: a cause is stored before its code
        copy._causes, copy.texts = dict(self._causes), dict(self.texts)
        undecided = copy._units == UNDECIDED
        copy._units[undecided] = copy._code(CUT_SHORT.cause)
        copy.ended = CUT_SHORT.ended if undecided.any() else self.ended
        copy.done = self.count
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
        answered, failed = np.zeros(bins, np.int64), np.zeros(CAUSES_COUNTED + 1, np.int64)
        for at in range(0, self.count, PIECE):
            piece = self._units[at : at + PIECE]
            answered += np.bincount(piece[piece >= 0] // width, minlength=bins)
            codes = np.minimum(FAILED - piece[piece <= FAILED], CAUSES_COUNTED)
            failed += np.bincount(codes, minlength=len(failed))
        causes = [*islice(self._causes, CAUSES_COUNTED), OTHER_CAUSES]  # after the codes: each has its cause by now
        return answered, {cause: count for cause, count in zip(causes, failed.tolist(), strict=False) if count}

    def winners(self, winning_units: tuple[int, ...]) -> Winners:
        """Return the participants who answered one of the winning numbers."""
        offsets = np.flatnonzero(np.isin(self._units, winning_units))
        return Winners(len(offsets), tuple((self.first + offsets[:WINNERS_NAMED]).tolist()))

    def answers(self, first: int, count: int) -> Answers:
        """Return the answers of those participants of first .. first+count-1 that are on this sheet."""
        start = max(first, self.first) - self.first
        stop = max(start, min(first + count - self.first, self.count))
        units = self._units[start:stop].copy()
        failed = units <= FAILED
        used, codes = np.unique(FAILED - units[failed], return_inverse=True)  # the causes of these answers
        units[failed] = FAILED - codes
        causes = list(self._causes) if len(used) else []
        texts = {self.first + offset: text for offset, text in self.texts.items() if start <= offset < stop}
        return Answers(self.first + start, units, [causes[code] for code in used.tolist()], texts)
