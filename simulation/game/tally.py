"""The counting of answers in whole units of 10^-decimals, so that every sum is exact, and the result of a round."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from simulation.errors import Ended
from simulation.game.rules import Announcement, Game

Units = NDArray[np.int64]

WINNERS_NAMED = 10  # number of winners that are listed: those with the lowest indices
CAUSES_COUNTED = 100  # failure causes counted separately per group; further causes are merged into OTHER_CAUSES
OTHER_CAUSES = "other causes"
INTERRUPTED = "interrupted"  # the failure cause if the user ended the round


@dataclass(frozen=True, eq=False)
class Tally:  # noqa: PLW1641 - arrays are not hashable
    """The number of participants per answer and per failure cause. Tallies can be added with `+`, in any order."""

    asked: int  # number of participants asked; always answered + failed
    units: Units = field(default_factory=lambda: np.empty(0, np.int64))  # the distinct answers in units, ascending
    counts: Units = field(default_factory=lambda: np.empty(0, np.int64))  # participants who gave each of these answers
    failures: dict[str, int] = field(default_factory=dict)  # number of participants without a usable answer, by cause
    ended: Ended = Ended.COMPLETE  # how the round ended for these participants

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
        """Return the exact sum of answers in units. High and low 32 bits are summed separately to avoid overflow."""
        high = int(np.dot(self.units >> 32, self.counts))
        return (high << 32) + int(np.dot(self.units & 0xFFFFFFFF, self.counts))

    def __add__(self, other: "Tally") -> "Tally":
        return merge((self, other))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tally):
            return NotImplemented
        same_answers = np.array_equal(self.units, other.units) and np.array_equal(self.counts, other.counts)
        others = other.asked, other.failures, other.ended
        return same_answers and (self.asked, self.failures, self.ended) == others

    def average(self) -> Fraction | None:
        """Return the exact mean of all answers in units, or None if there are no answers."""
        return Fraction(self.total, self.answered) if self.answered else None

    def median(self) -> Fraction | None:
        """Return the median of all answers in units, or None if there are no answers."""
        if not self.answered:
            return None
        up_to = np.cumsum(self.counts)
        low, high = np.searchsorted(up_to, [(self.answered - 1) // 2, self.answered // 2], side="right")
        return Fraction(int(self.units[low]) + int(self.units[high]), 2)

    def std(self) -> float | None:
        """Return the population standard deviation in units, or None if there are no answers."""
        average = self.average()
        if average is None:
            return None
        return float(np.sqrt(np.dot((self.units - float(average)) ** 2, self.counts) / self.answered))

    def closest(self, target: Fraction) -> tuple[int, ...]:
        """Return the distinct answers closest to the target, in units: none, one, or one on each side of the target."""
        after = int(np.searchsorted(self.units, target.__floor__(), side="right"))
        near = [int(unit) for unit in self.units[max(after - 1, 0) : after + 1]]
        best = min((abs(unit - target) for unit in near), default=None)
        return tuple(unit for unit in near if abs(unit - target) == best)

    def parts(self, distinct: int) -> "list[Tally]":
        """Split the tally into tallies of at most `distinct` distinct answers, so that each fits into one message."""
        pieces = [slice(at, at + distinct) for at in range(0, len(self.units), distinct)]
        parts = [Tally(int(self.counts[piece].sum()), self.units[piece], self.counts[piece]) for piece in pieces]
        if self.failures or not parts:
            parts.append(Tally(self.failed, failures=self.failures, ended=self.ended))
        return parts


def merge(tallies: Iterable[Tally]) -> Tally:
    """Merge all tallies into one. Return an empty tally if there are none."""
    every = [Tally(0), *tallies]
    units = np.concatenate([tally.units for tally in every])
    counts = np.concatenate([tally.counts for tally in every])
    if not (np.diff(units) > 0).all():  # the parts of one tally are already sorted
        units, index = np.unique(units, return_inverse=True)
        counts, each = np.zeros(len(units), np.int64), counts
        np.add.at(counts, index, each)
    failures = sum((Counter(tally.failures) for tally in every), Counter())
    ended = max(tally.ended for tally in every)
    return Tally(sum(tally.asked for tally in every), units, counts, dict(failures), ended)


@dataclass(frozen=True)
class Winners:
    """The number of winners, and the lowest of their indices (at most WINNERS_NAMED), ascending."""

    count: int
    lowest: tuple[int, ...]

    def __add__(self, other: "Winners") -> "Winners":
        return Winners(self.count + other.count, tuple(sorted(self.lowest + other.lowest)[:WINNERS_NAMED]))


@dataclass(frozen=True)
class Times:
    """The duration of a round in seconds, split by activity. The first three figures are means over the groups."""

    model_s: float  # participants wait for models or think
    client_s: float  # CPU time of the agent servers
    slowest_s: float  # a group waits for the slowest group
    rpc_s: float  # outside answering: calls for question, tally and announcement, and calls to lost servers


@dataclass(frozen=True)
class RoundResult:
    """The result of one round. All numbers are in units; `closest` are the answers closest to the winning number."""

    round: int
    tally: Tally
    average: Fraction | None = None
    winning_number: Fraction | None = None
    closest: tuple[int, ...] = ()
    winners: Winners = Winners(0, ())
    seconds: float = 0.0
    reassigned: int = 0  # number of participants that were moved to another server or moderator during the round
    times: Times | None = None  # None if unknown, as in a saved run
    teams: tuple[tuple[str, Fraction | None], ...] = ()  # the name and the average of each team, in a game with teams

    @property
    def closest_teams(self) -> tuple[str, ...]:
        """Return the names of all teams whose averages are closest to the winning number."""
        if self.winning_number is None:
            return ()
        distances = {name: abs(average - self.winning_number) for name, average in self.teams if average is not None}
        return tuple(name for name in distances if distances[name] == min(distances.values()))


def score(game: Game, round_number: int, tally: Tally) -> RoundResult:
    """Return the result of a round from its tally, still without winners and times."""
    average = tally.average()
    if average is None:
        return RoundResult(round_number, tally)
    winning_number = game.winning_number(average)
    return RoundResult(round_number, tally, average, winning_number, tally.closest(winning_number))


def announcement_of(result: RoundResult, scale: int) -> Announcement:
    """Return the announcement of a round. It states 0 winners until they are counted. One unit is 1 / `scale`."""

    def number(units: Fraction | None) -> float | None:
        return None if units is None else float(units / scale)

    teams = tuple((name, number(average)) for name, average in result.teams)
    figures = number(result.average), number(result.winning_number), result.closest, result.winners.count
    return Announcement(result.round, *figures, teams, result.closest_teams)


def top_causes(counts: Units, cause: Callable[[int], str]) -> dict[str, int]:
    """Return the count `counts[k]` of each cause `cause(k)`. Merge all but the CAUSES_COUNTED most frequent."""
    most_frequent = np.argsort(-counts, kind="stable")[:CAUSES_COUNTED].tolist()
    failures = {cause(number): int(counts[number]) for number in most_frequent if counts[number]}
    others = int(counts.sum()) - sum(failures.values())
    if others:
        failures[OTHER_CAUSES] = failures.get(OTHER_CAUSES, 0) + others
    return failures


def value_counts(units: Units) -> tuple[Units, Units]:
    """Return the distinct values in ascending order, and how often each occurs."""
    if len(units) and units.max() <= len(units):  # needs at most one counter per answer, and takes a tenth of the time
        counts = np.bincount(units)
        distinct = np.flatnonzero(counts)
        return distinct, counts[distinct]
    distinct, counts = np.unique(units, return_counts=True)
    return distinct, counts
