"""The rules of the game, pure: what is asked, what an answer is in units, how answers are counted, who is closest.

It knows nothing of agents, servers or clocks. Answers are counted in units, whole multiples of 10^-decimals, so
every sum is exact and tallies merge to the same result in any order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import cached_property, lru_cache
from numbers import Integral, Rational, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulation.cast import Cast
from simulation.errors import Ended, KnownCause
from simulation.reading import NO_NUMBER, UNCERTAIN, parse_number
from simulation.shares import GAMMA, MASK, mix

Units = NDArray[np.int64]

WINNERS_NAMED = 10  # of all winners, the lowest so many are named
OTHER_CAUSES = "other causes"
OUT_OF_RANGE = "number out of range"
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}\.\d{3}(?![\d.])")
INTERRUPTED = "interrupted"  # the cause where a person ended the round


@dataclass(frozen=True)
class Sampling:
    """How LLM participants ask their models: the settings of the same names."""

    models: int  # participant i asks model_{i mod models + 1}
    structured_output: str
    samples_per_request: int
    max_attempts: int
    max_in_flight: int | None
    attempt_timeout_s: float
    reply_timeout_s: float


@dataclass(frozen=True)
class Wording:
    """What LLM participants are told: a prompt of the prompts file, its braces not yet filled in (see prompts.py).

    Attributes:
        name: What it is called.
        system: Who they are and what the rules are.
        instruction: How to answer; said last in every round, and not where they are asked about something else.
        reasoning_tokens: How long they may think aloud before the number; None where they say the number at once.
    """

    name: str
    system: str
    instruction: str
    reasoning_tokens: int | None = None


@dataclass(frozen=True)
class Game:
    """What is the same for all participants in all rounds: whoever is closest to offset + ratio * average wins."""

    seed: int
    max_value: int
    decimals: int
    sleep_time_s: float
    sampling: Sampling | None = None  # None where no participant asks a model
    ratio: Fraction = Fraction(1)
    offset: Fraction = Fraction(0)
    wording: Wording | None = None  # likewise
    cast: Cast | None = None  # who they are, where that matters
    teams: str | None = None  # the topic of the cast that makes teams, if anything does

    @cached_property
    def scale(self) -> int:
        """Units in 1: 10^decimals."""
        return 10**self.decimals

    @cached_property
    def numbers(self) -> int:
        """How many different answers there are, in units."""
        return self.max_value * self.scale + 1

    @property
    def target(self) -> str:
        """What to be closest to, in words: "the average", "2/3 of the average" or "5 plus 1/2 of the average"."""
        return target_in_words(self.ratio, self.offset)

    @property
    def target_or_it(self) -> str:
        """The same where the average was spoken of just before."""
        return "it" if self.ratio == 1 and not self.offset else self.target

    @property
    def equilibria(self) -> tuple[float, ...]:
        """The numbers that nobody would move away from if all gave them, ascending; empty where that is any number."""
        return equilibria(self.ratio, self.offset, self.max_value)

    def winning_number(self, average: Fraction) -> Fraction:
        """What to be closest to, in units, as the average is."""
        return self.offset * self.scale + self.ratio * average


def target_in_words(ratio: Fraction, offset: Fraction) -> str:
    """What to be closest to; see Game.target."""
    share = "the average" if ratio == 1 else f"{in_words(ratio)} {'of' if ratio < 1 else 'times'} the average"
    return f"{in_words(offset)} plus {share}" if offset else share


def in_words(number: Fraction) -> str:
    """A short decimal, if it is one exactly, and is not better known as a fraction."""
    if number.denominator == 1 or (number.denominator > 10 and Fraction(f"{float(number):.6g}") == number):
        return f"{float(number):.6g}" if number.denominator > 1 else str(number)
    return str(number)


def equilibria(ratio: Fraction, offset: Fraction, max_value: int) -> tuple[float, ...]:
    """The pure symmetric Nash equilibria in many players' game over 0..max_value; empty where every number is one.

    Best replies lead from any number to offset + ratio * number, within the range: its fixed points (Nagel, "Unraveling
    in Guessing Games: An Experimental Study", 1995).
    """
    if ratio == 1:
        return (float(max_value),) if offset else ()
    inner = offset / (1 - ratio)
    if ratio < 1:
        return (min(float(inner), float(max_value)),)
    return (0.0, float(max_value)) if offset == 0 else (float(max_value),)


@dataclass(frozen=True)
class Announcement:
    """What everyone hears after a round.

    Attributes:
        round: Which one.
        average: Of all answers; None if there was none.
        winning_number: What to be closest to.
        winning_units: The answers that are closest, all of them.
        winners: How many gave them; None before they are counted.
        teams: Each team with its average, in a game with teams; None where nobody of it answered.
        closest_teams: Those whose averages are closest to the winning number, all of them.
    """

    round: int
    average: float | None
    winning_number: float | None
    winning_units: tuple[int, ...]
    winners: int | None = None
    teams: tuple[tuple[str, float | None], ...] = ()
    closest_teams: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What a participant is asked: the round (from 1), the words, the range, and what was announced so far.

    Round 0 is a question of a person's, beside the game.
    """

    round: int
    text: str
    max_value: int
    announcements: tuple[Announcement, ...] = ()
    decimals: int = 0


def question_for(game: Game, round_number: int, announcements: tuple[Announcement, ...]) -> Question:
    """The moderator's question of one round."""
    text = (
        f"Round {round_number}: give a number from 0 to {game.max_value}. "
        f"The average of all answers is announced, and whoever is closest to {game.target_or_it} wins."
    )
    return Question(round_number, text, game.max_value, announcements, game.decimals)


# --- The seeded draw -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _round_key(seed: int, round_number: int) -> int:
    key: int = mix((mix((seed + GAMMA) & MASK) + round_number * GAMMA) & MASK) + GAMMA
    return key


def draw(game: Game, round_number: int, participant: int) -> int:
    """The random answer, in units from 0 to max_value, that (seed, round, participant) stands for.

    A change here changes every seed's game: the known answers are held by a test.
    """
    z = (_round_key(game.seed, round_number) + participant * GAMMA) & MASK
    units: int = (mix(z) * game.numbers) >> 64
    return units


# --- An answer in units ----------------------------------------------------------------------------------------------


def to_units(answer: Any, game: Game) -> int:
    """An answer in units, rounded half to even. Raises UnusableAnswer unless it is a number from 0 to max_value."""
    text = answer if isinstance(answer, str) else None
    if text is not None:
        answer = parse_number(text)
        if game.scale < 1000 <= game.max_value and _THOUSANDS.search(text):  # 12.345 is 12,345 in many languages
            raise KnownCause(UNCERTAIN, text)
    if isinstance(answer, (bool, np.bool_)) or not isinstance(answer, (Real, Decimal)):
        raise KnownCause(NO_NUMBER)
    number: Any = answer
    if not 0 <= number <= game.max_value:  # not a number is in no range
        raise KnownCause(OUT_OF_RANGE, text)
    if isinstance(number, Integral):
        number = int(number)  # of numpy's there are some that overflow
    elif not isinstance(number, (Rational, Decimal)):
        number = float(number)
    return round(number * game.scale)


# --- Counting answers ------------------------------------------------------------------------------------------------


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
