"""The counting of answers in whole units of 10^-decimals, so that every sum is exact, and the result of a round."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulation.errors import Ended, SettingsError, one_line, printable
from simulation.game.game import HIGHEST, Game, Outcome, Rules, Units
from simulation.game.rules import Announcement, plain_number

WINNERS_NAMED = 10  # number of winners that are listed: those with the lowest indices
NUMBERS_NAMED = 10  # number of winning answers that texts list: the lowest
MOST_ANNOUNCED = 1001  # maximum number of distinct answers in an announcement
AVERAGE_DIGITS = 3  # decimal places of averages in addition to those of answers
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
        same = np.array_equal(self.units, other.units) and np.array_equal(self.counts, other.counts)
        return same and (self.asked, self.failures, self.ended) == (other.asked, other.failures, other.ended)

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
        if (average := self.average()) is None:
            return None
        return float(np.sqrt(np.dot((self.units - float(average)) ** 2, self.counts) / self.answered))

    def maximum(self) -> Fraction | None:
        """Return the highest answer in units, or None if there are no answers."""
        return Fraction(int(self.units[-1])) if self.answered else None

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
    asked, ended = sum(tally.asked for tally in every), max(tally.ended for tally in every)
    return Tally(asked, units, counts, dict(failures), ended)


@dataclass(frozen=True)
class Winners:
    count: int
    lowest: tuple[int, ...]  # of their indices: at most WINNERS_NAMED, ascending

    def __add__(self, other: "Winners") -> "Winners":
        return Winners(self.count + other.count, tuple(sorted(self.lowest + other.lowest)[:WINNERS_NAMED]))


@dataclass(frozen=True)
class Times:
    """Where the time of a round goes, in seconds. The first three figures are means over the groups."""

    model_s: float  # participants wait for models or think
    client_s: float  # CPU time of the agent servers
    slowest_s: float  # a group waits for the slowest group
    rpc_s: float  # outside answering: calls for question, tally and announcement, and calls to lost servers


@dataclass(frozen=True)
class RoundResult:
    round: int
    tally: Tally
    outcome: Outcome = field(default_factory=dict)  # the figures of the game, in numbers; empty without answers
    winning_units: tuple[int, ...] = ()  # all distinct answers with the highest payoff
    winners: Winners = Winners(0, ())
    seconds: float = 0.0
    reassigned: int = 0  # number of participants that were moved to another server or moderator during the round
    times: Times | None = None  # None if unknown, as in a saved run
    teams: tuple[tuple[str, Fraction | None], ...] = ()  # name and average (a number, not units) of each team, if any
    error: str = ""  # why the game could not compute outcome and payoffs
    analysis: Mapping[str, Any] = field(default_factory=dict)  # see `Game.analyses`
    texts: tuple[int, int] | None = None  # how many texts of models are kept, and how many have replaced characters

    @property
    def winning_number(self) -> Any:
        """Return the figure of this name in the outcome, or None if the game has none or nothing wins."""
        return self.outcome.get("winning_number")

    @property
    def closest_teams(self) -> tuple[str, ...]:
        """Return the names of all teams whose averages are closest to the winning number."""
        averages = {} if self.winning_number is None else dict(self.teams)
        distances = {name: abs(each - self.winning_number) for name, each in averages.items() if each is not None}
        return tuple(name for name in distances if distances[name] == min(distances.values()))


def score(game: Game, round_number: int, tally: Tally) -> RoundResult:
    """Return the result of a round from its tally, still without winners and times. Never raises."""
    if not tally.answered:
        return RoundResult(round_number, tally)
    try:
        figures = game.outcome(replace(tally, units=_read_only(tally.units), counts=_read_only(tally.counts)))
        if not isinstance(figures, Mapping):
            raise TypeError(f"outcome returned {figures!r}, not a dictionary of figures by name")
        outcome = {name: _figure(name, value) for name, value in figures.items()}
        payoffs = payoffs_of(game, tally.units, outcome)
    except BaseException as error:  # noqa: BLE001 - the user's game may raise anything
        return RoundResult(round_number, tally, error=one_line(error))
    wins = (payoffs == payoffs.max()) & (outcome.get("winning_number", 0) is not None)
    return RoundResult(round_number, tally, outcome, tuple(tally.units[wins].tolist()))


def has_converged(results: Sequence[RoundResult], limit: float | None, scale: int) -> bool:
    """Return whether mean and median each moved by less than `limit`, a number, in each of the last two rounds."""
    # Rounds that were interrupted, or have no answers or no result, never count
    last = [each for each in results[-3:] if not each.error and each.tally.ended is not Ended.INTERRUPTED]
    figures: list[Any] = [(each.tally.average(), each.tally.median()) for each in last if each.tally.answered]
    moves = (abs(after - before) for pair in pairwise(figures) for before, after in zip(*pair, strict=True))
    return limit is not None and len(figures) == 3 and max(moves) < Fraction(str(limit)) * scale


def _read_only(array: Units) -> Units:
    """Return a view that a user's game cannot change."""
    return np.broadcast_to(array, array.shape)


def payoffs_of(game: Game, units: Units, outcome: Outcome) -> NDArray[Any]:
    """Return the payoffs of distinct answers, ascending. Raises ValueError if the game returns something unusable."""
    with np.errstate(all="ignore"):  # division by zero is reported below
        payoffs = np.array(game.payoffs(_read_only(units), outcome))
    if payoffs.shape != units.shape:
        raise ValueError(f"payoffs returned an array of shape {payoffs.shape}, not {units.shape}")
    if payoffs.dtype.kind not in "biuf":
        kind = f"{type(payoffs[0]).__name__} in an array of {payoffs.dtype}"
        raise ValueError(f"payoffs returned {kind}, not float or int")
    if len(infinite := payoffs[~np.isfinite(payoffs)]):
        raise ValueError(f"payoffs returned {infinite[0]} for an answer")
    return payoffs


def _figure(name: str, value: Any) -> Any:
    """Return a figure of an outcome as None, Fraction, int or float. Raises ValueError if it is neither."""
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"a figure of the outcome is called {name!r}, which is not a name")
    if value is None or isinstance(value, Fraction):
        return value
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"the figure {name} of the outcome is {value!r}, not a finite number or None")
    return int(value) if isinstance(value, Integral) else float(value)


def try_game(game: Game, name: str) -> None:
    """Raise SettingsError if the game's numbers or words are unusable, or if it cannot compute simple rounds."""
    try:
        low, high, words, equilibrium = game.low, game.high, game.words, game.equilibrium()
        if not isinstance(words, Rules):
            raise TypeError(f"rules returned {words!r}, not Rules(question, goal)")
        texts = [words.question, words.goal, words.prompt, words.won]
        texts += chain(*words.labels.items(), *words.notes.items())
        is_finite = all(math.isfinite(float(each)) for each in equilibrium or ())
    except BaseException as error:  # noqa: BLE001 - the user's class may raise anything
        raise SettingsError(f"--game {name}: {one_line(error)}") from None
    start, problem = f"--game {name}", ""
    if not (isinstance(low, int) and isinstance(high, int) and 0 <= low < high <= HIGHEST):
        needed = f"there must be at least two whole numbers from 0 to {HIGHEST:,}"
        problem = f"its numbers are from {low!r} to {high!r}; {needed}"
    elif game.decimals and game.whole_numbers:
        problem = f"has whole numbers only, and does not go with --decimals {game.decimals}"
    elif not (words.question and words.goal) or any(text != printable(text) for text in texts):
        problem = "its rules need a question and a goal; all its texts must be one line of printable characters"
    elif not is_finite:
        problem = f"its equilibrium is {equilibrium}"
    elif game.numbers_announced and game.most_distinct > MOST_ANNOUNCED:
        many = f"{game.most_distinct:,} different numbers; the maximum is {MOST_ANNOUNCED:,}"
        start, problem = "--set numbers_announced=true", f"would list up to {many}; take fewer decimals or participants"
    if problem:
        raise SettingsError(f"{start}: {problem}")
    players, half = max(game.population.total, 1), max(game.population.total // 2, 1)
    ends, both = np.array([0, game.numbers - 1]) + game.lowest, np.array([max(players - half, 1), half])
    both_ends = Tally(int(both.sum()), ends, both)
    rounds = {f"all players give {low}": Tally(players, ends[:1], np.array([players]))}
    rounds |= {f"all give {high}": Tally(players, ends[1:], np.array([players]))}
    rounds |= {"half of them give the lowest number, the others the highest": both_ends}
    for what, tally in rounds.items():
        if failure := score(game, 1, tally).error:
            raise SettingsError(f"--game {name}: no result if {what}: {failure}")


def announcement_of(result: RoundResult, game: Game) -> Announcement:
    """Return the announcement of a round. It states 0 winners until they are counted."""

    def as_floats(figures: Iterable[tuple[str, Any]]) -> tuple[tuple[str, float | None], ...]:
        return tuple((name, None if value is None else float(value)) for name, value in figures)

    tally, average, numbers = result.tally, result.tally.average(), result.tally.units / game.scale
    announcement = Announcement(
        result.round,
        None if average is None else float(average / game.scale),
        None if result.winning_number is None else float(result.winning_number),
        result.winning_units,
        result.winners.count,
        as_floats(result.teams),
        result.closest_teams,
        tuple(each / game.scale for each in result.winning_units),
        as_floats(result.outcome.items()),
        numbers=tuple(zip(numbers.tolist(), tally.counts.tolist(), strict=True)) if game.numbers_announced else (),
    )
    return replace(announcement, text=_in_words(announcement, game))


def _in_words(result: Announcement, game: Game) -> str:
    """Return the result of a round as prompts state it."""
    if result.average is None:
        return f"Round {result.round}: nobody answered."
    digits, label, winning = game.decimals + AVERAGE_DIGITS, game.words.label, result.winning_number
    figures = [(name, value) for name, value in result.outcome if value is not None and name != "winning_number"]
    parts = [f"the {label(name)} was {plain_number(value, digits)}" for name, value in figures]
    if winning is not None and winning not in [value for _, value in figures[-1:]]:
        parts.append(f"{'so ' * bool(parts)}the {label('winning_number')} was {plain_number(winning, digits)}")
    numbers = " or ".join(f"{number:.{game.decimals}f}" for number in result.winning_numbers[:NUMBERS_NAMED])
    won = f"{result.winners} won with {numbers}" if numbers else "nobody won"
    text = f"Round {result.round}: {'; '.join(filter(None, [', '.join(parts), won]))}."
    if given := [plain_number(each, digits) + f" ({count} times)" * (count > 1) for each, count in result.numbers]:
        text += f" The numbers were {' and '.join(filter(None, [', '.join(given[:-1]), given[-1]]))}."
    if result.teams:
        teams = ", ".join(f"{name} {plain_number(average, digits)}" for name, average in result.teams)
        text += f" The averages of the teams were: {teams}."
    if result.closest_teams:
        text += f" The closest was that of {' and '.join(result.closest_teams)}."
    return text


def value_counts(units: Units) -> tuple[Units, Units]:
    """Return the distinct values in ascending order, and how often each occurs."""
    if len(units) and units.max() <= len(units):  # needs at most one counter per answer, and takes a tenth of the time
        counts = np.bincount(units)
        distinct = np.flatnonzero(counts)
        return distinct, counts[distinct]
    distinct, counts = np.unique(units, return_counts=True)
    return distinct, counts
