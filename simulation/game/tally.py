"""How answers are counted, pure: tallies, which merge in any order, and what a round comes to.

Answers are counted in units, whole multiples of 10^-decimals, so every sum is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from simulation.errors import Ended
from simulation.game.rules import Announcement

Units = NDArray[np.int64]


WINNERS_NAMED = 10  # of all winners, the lowest so many are named


OTHER_CAUSES = "other causes"


INTERRUPTED = "interrupted"  # the cause where a person ended the round


@dataclass(frozen=True, eq=False)
class Tally:
    """How often each value was answered, and why answers are missing. Tallies merge with `+`, in any order.

    Attributes:
        asked: Participants asked; always answered + failed.
        units: The distinct answers, ascending, int64 of shape (distinct,).
        counts: How often each of them was given, int64 of shape (distinct,).
        failures: Participants without a usable answer, by cause.
        ended: How the round ended for them; words of causes say nothing about that.
    """

    asked: int
    units: Units = field(default_factory=lambda: np.empty(0, np.int64))
    counts: Units = field(default_factory=lambda: np.empty(0, np.int64))
    failures: dict[str, int] = field(default_factory=dict)
    ended: Ended = Ended.COMPLETE

    def __post_init__(self) -> None:
        if self.asked != self.answered + self.failed:
            raise ValueError(f"asked {self.asked}, but answered {self.answered} and failed {self.failed}")

    @property
    def answered(self) -> int:
        return int(self.counts.sum())

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    @property
    def total(self) -> int:
        """The exact sum of all answers, in units; in two halves, as it may pass 64 bits."""
        high = int(np.dot(self.units >> 32, self.counts))
        return (high << 32) + int(np.dot(self.units & 0xFFFFFFFF, self.counts))

    def __add__(self, other: Tally) -> Tally:
        return merge((self, other))

    __hash__ = None  # type: ignore[assignment]  # it holds arrays

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tally):
            return NotImplemented
        same_answers = np.array_equal(self.units, other.units) and np.array_equal(self.counts, other.counts)
        same_failures = self.failures == other.failures and self.ended == other.ended
        return self.asked == other.asked and same_answers and same_failures

    def average(self) -> Fraction | None:
        """The exact mean in units; None when nobody answered."""
        return Fraction(self.total, self.answered) if self.answered else None

    def median(self) -> Fraction | None:
        """The middle answer in units, or the mean of the two in the middle; None when nobody answered."""
        if not self.answered:
            return None
        up_to = np.cumsum(self.counts)
        low, high = np.searchsorted(up_to, [(self.answered - 1) // 2, self.answered // 2], side="right")
        return Fraction(int(self.units[low]) + int(self.units[high]), 2)

    def std(self) -> float | None:
        """The population standard deviation in units; None when nobody answered."""
        average = self.average()
        if average is None:
            return None
        return float(np.sqrt(np.dot((self.units - float(average)) ** 2, self.counts) / self.answered))

    def closest(self, target: Fraction) -> tuple[int, ...]:
        """The answers, in units, that are nearest to the target: none, one, or two on either side of it."""
        after = int(np.searchsorted(self.units, target.__floor__(), side="right"))
        near = [int(unit) for unit in self.units[max(after - 1, 0) : after + 1]]
        best = min((abs(unit - target) for unit in near), default=None)
        return tuple(unit for unit in near if abs(unit - target) == best)

    def parts(self, distinct: int) -> list[Tally]:
        """The same tally as several of at most `distinct` values each, for messages of bounded size."""
        pieces = [slice(at, at + distinct) for at in range(0, len(self.units), distinct)]
        parts = [Tally(int(self.counts[piece].sum()), self.units[piece], self.counts[piece]) for piece in pieces]
        if self.failures or not parts:
            parts.append(Tally(self.failed, failures=self.failures, ended=self.ended))
        return parts


def merge(tallies: Iterable[Tally]) -> Tally:
    """All tallies as one; none at all is the tally of nobody."""
    every = [Tally(0), *tallies]
    units = np.concatenate([tally.units for tally in every])
    counts = np.concatenate([tally.counts for tally in every])
    if not (np.diff(units) > 0).all():  # as the parts of one tally are
        units, place = np.unique(units, return_inverse=True)
        counts, each = np.zeros(len(units), np.int64), counts
        np.add.at(counts, place, each)
    failures: Counter[str] = Counter()
    for tally in every:
        failures.update(tally.failures)
    ended = max(tally.ended for tally in every)
    return Tally(sum(tally.asked for tally in every), units, counts, dict(failures), ended)


@dataclass(frozen=True)
class Winners:
    """How many participants are closest, and the lowest WINNERS_NAMED of them, ascending."""

    count: int
    lowest: tuple[int, ...]

    def __add__(self, other: Winners) -> Winners:
        return Winners(self.count + other.count, tuple(sorted(self.lowest + other.lowest)[:WINNERS_NAMED]))


@dataclass(frozen=True)
class Times:
    """Where the seconds of a round went; they add up to it.

    Attributes:
        model_s: Participants waited for their models, or thought; the mean over the groups.
        client_s: Their servers worked, in seconds of CPU; likewise.
        slowest_s: The others were done, and the slowest group was not; likewise.
        rpc_s: Nobody was asked any more, or yet: the question, the tally and the announcement; and what was asked in
            vain, of servers that were lost.
    """

    model_s: float
    client_s: float
    slowest_s: float
    rpc_s: float


@dataclass(frozen=True)
class RoundResult:
    """One round. Values are in units of 10^-decimals; `closest` are those nearest to the winning number."""

    round: int
    tally: Tally
    average: Fraction | None
    winning_number: Fraction | None
    closest: tuple[int, ...]
    winners: Winners
    seconds: float
    reassigned: int = 0  # participants who went to another server, or moderator, meanwhile
    times: Times | None = None  # None where it is not known, as in a run that is read again
    teams: tuple[tuple[str, Fraction | None], ...] = ()  # with their averages, in a game with teams

    @property
    def closest_teams(self) -> tuple[str, ...]:
        """The teams whose averages are closest to the winning number, all of them."""
        if self.winning_number is None:
            return ()
        off = {name: abs(average - self.winning_number) for name, average in self.teams if average is not None}
        return tuple(name for name in off if off[name] == min(off.values()))


def announcement_of(result: RoundResult, scale: int) -> Announcement:
    """What everyone hears of a round that was counted, in units of 1 / scale."""
    average = None if result.average is None else float(result.average / scale)
    winning_number = None if result.winning_number is None else float(result.winning_number / scale)
    teams = tuple((name, None if each is None else float(each / scale)) for name, each in result.teams)
    winners, closest_teams = result.winners.count, result.closest_teams
    return Announcement(result.round, average, winning_number, result.closest, winners, teams, closest_teams)


CAUSES_TOLD_APART = 100  # of the causes of failure in one group; the rest are counted together


def top_causes(often: Units, cause: Callable[[int], str]) -> dict[str, int]:
    """The most frequent of some causes, of which cause(k) led to often[k] failures; the rest are counted together."""
    most = np.argsort(-often, kind="stable")[:CAUSES_TOLD_APART].tolist()
    failures = {cause(place): int(often[place]) for place in most if often[place]}
    others = int(often.sum()) - sum(failures.values())
    if others:
        failures[OTHER_CAUSES] = failures.get(OTHER_CAUSES, 0) + others
    return failures


def value_counts(units: Units) -> tuple[Units, Units]:
    """The distinct units, ascending, and how often there is each."""
    if len(units) and units.max() <= len(units):  # as many counters as answers at most, in a tenth of the time
        counts = np.bincount(units)
        distinct = np.flatnonzero(counts)
        return distinct, counts[distinct]
    distinct, counts = np.unique(units, return_counts=True)
    return distinct, counts
