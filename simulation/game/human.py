"""Figures of people who played a game, and their comparison with a run, as pure functions."""

import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import numpy as np

from simulation.game.analysis import reasoning_steps
from simulation.game.game import HIGHEST
from simulation.game.rules import plain_number
from simulation.game.tally import Tally

MOST_TESTED = 10**7  # maximum number of answers that are tested, and of moves that are counted
FINE = 10**6  # units in 1 of the numbers of people
STEPS = {"above": "above step 0", "higher": "more than 3 steps"} | {f"{step}": f"step {step}" for step in range(4)}
NUMBERS = re.compile(r"\d+(\.\d+)?(, ?\d+(\.\d+)?)*", re.ASCII)
CHECKED: Any = {"extra": "forbid", "allow_inf_nan": False}  # for pydantic, which reads this data


@dataclass(frozen=True)
class HumanRound:
    """What is known of a round. Shares are in percent of the players."""

    __pydantic_config__: ClassVar[Any] = CHECKED
    mean: float | None = None
    median: float | None = None
    above: dict[float, float] = field(default_factory=dict)  # share of numbers above a number
    chosen: dict[str, float] = field(default_factory=dict)  # share of numbers in a list such as "99, 100, 1"
    steps: dict[str, float] = field(default_factory=dict)  # by a key of STEPS


@dataclass(frozen=True)
class HumanData:
    """Figures or numbers of people who played a game. Without `ratio`, they are compared in any game."""

    __pydantic_config__: ClassVar[Any] = CHECKED
    name: str
    source: str
    about: str = ""
    extracted: str = ""  # by whom the figures were read out of the source, if not by the authors of the file
    uncertain: dict[str, str] = field(default_factory=dict)  # what is uncertain about which figure
    ratio: Fraction | None = None  # of the game `average` with statistic mean and offset 0
    max_value: int = 100
    players: int | None = None
    rounds: dict[int, HumanRound] = field(default_factory=dict)
    median_fall: tuple[float, ...] = ()  # rates of fall from round 1 to the last round, one of each session
    moves: tuple[int, int] | None = None  # towards the equilibrium, and all
    learning: float | None = None  # percent of moves that agree with learning direction
    numbers: tuple[float, ...] = ()  # of the round `round`
    histogram: dict[float, int] = field(default_factory=dict)  # the same, as counts by number
    round: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError, which begins with the name of a field, if something does not fit."""
        known = [name for name in ("rounds", "numbers", "histogram") if getattr(self, name)]
        if not self.source.strip():
            raise ValueError("source must not be empty: name where the figures are from")
        if not known:
            raise ValueError("source needs numbers, a histogram or rounds beside it")
        if len(known) > 1:
            raise ValueError(f"{known[1]} does not go with {known[0]}")
        outside = f"not from 0 to {self.max_value} (max_value)"
        if wrong := [each for each in (*self.numbers, *self.histogram) if not 0 <= each <= self.max_value]:
            raise ValueError(f"{known[0]} has {wrong[0]:g}, which is {outside}")
        counts = self.histogram.values()
        if not all(0 <= count <= HIGHEST for count in counts) or (counts and not sum(counts)):
            raise ValueError(f"histogram needs counts from 0 to {HIGHEST:,}, and at least one player")
        for number, each in self.rounds.items():
            shares = [*each.above.values(), *each.chosen.values(), *each.steps.values()]
            if not all(0 <= (figure or 0) <= self.max_value for figure in (each.mean, each.median)):
                raise ValueError(f"rounds has a mean or median that is {outside}")
            if number < 1 or not all(0 <= share <= 100 for share in shares):
                has = f"a round {number} with {max(shares, default=0):g} %"
                raise ValueError(f"rounds has {has}; shares are from 0 to 100")
            if not each.steps.keys() <= STEPS.keys() or not all(map(NUMBERS.fullmatch, each.chosen)):
                raise ValueError(f'rounds has other steps than {", ".join(STEPS)}, or chosen is not like "99, 100, 1"')
        if not 0 <= (self.learning or 0) <= 100 or max(self.median_fall, default=0) > 1:
            raise ValueError("learning must be from 0 to 100 percent, and median_fall at most 1")
        if self.round < 1 or (self.moves is not None and not 0 <= self.moves[0] <= self.moves[1] != 0):
            raise ValueError("round must be 1 or more, and moves must be some of all")

    @property
    def counts(self) -> tuple[Any, Any]:
        """Return the distinct numbers, ascending, and how many players gave each."""
        counts = self.histogram or Counter(self.numbers)
        return np.array(sorted(counts), float), np.array([counts[number] for number in sorted(counts)], np.int64)

    @property
    def size(self) -> int | None:
        """Return the number of players, or None if it is unknown."""
        return sum(self.histogram.values()) or len(self.numbers) or self.players

    def known_rounds(self) -> dict[int, HumanRound]:
        """Return what is known by round, counted from the numbers if there are any."""
        if self.rounds:
            return self.rounds
        numbers, counts = self.counts
        tally = Tally(int(counts.sum()), np.rint(numbers * FINE).astype(np.int64), counts)
        above, steps = dict[float, float](), dict[str, float]()
        if self.ratio is not None and self.ratio < 1:
            limit = float(self.max_value * self.ratio)
            above = {limit: 100 * float(counts[numbers > limit].sum() / tally.asked)}
            if self.round == 1:  # later, the last average would have to be known
                shares = reasoning_steps(tally, FINE, self.ratio, Fraction(self.max_value, 2))
                steps = {step: 100 * share for step, share in shares.items()}
        mean, median = (float(each / FINE) for each in (tally.average(), tally.median()) if each is not None)
        return {self.round: HumanRound(mean, median, above, steps=steps)}


class Row(NamedTuple):
    """A figure of a run and of people."""

    figure: str
    round: str
    run: float | None  # None if the run has no such figure
    people: tuple[float, ...]  # several if each session has one
    unit: str = ""  # "%", or "" for numbers and rates

    @property
    def difference(self) -> str:
        low, high = min(self.people), max(self.people)
        if self.run is None:
            return "unknown: the run has no such figure"
        if low <= self.run <= high and low < high:
            return "between the sessions of people"
        nearest, more = (low, "lower") if self.run < low else (high, "higher")
        gap, people = plain_number(abs(self.run - nearest), 2), "in all sessions of people" if low < high else "people"
        return "as people" if gap == "0" else f"{gap}{' points' * bool(self.unit)} {more} than {people}"


def rows(data: HumanData, scale: int, tallies: list[Tally], analyses: list[Any], moves: list[int] | None) -> list[Row]:
    """Return the figures of people beside those of a run, for the rounds that both have played.

    `tallies` and `analyses` are those of the run, and `moves` those of the rounds of people (see `SavedRun.moves`).
    """
    found = []
    for number, people in data.known_rounds().items():
        if number <= len(tallies) and tallies[number - 1].answered:
            steps = {step: 100 * share for step, share in analyses[number - 1].get("steps", {}).items()}
            found += [row._replace(round=str(number)) for row in _of_round(data, people, scale, tallies[number - 1])]
            found += [Row(STEPS[step], str(number), steps.get(step), (of,), "%") for step, of in people.steps.items()]
    last = max(data.known_rounds())
    if len(tallies) < last:
        return found
    every = f"1 to {last}"
    if data.median_fall:
        first, final = tallies[0].median(), tallies[last - 1].median()
        fall = float(1 - final / first) if first and final is not None else None
        found.append(Row("fall of the median, as a share", every, fall, data.median_fall))
    if data.moves is not None:
        down = data.ratio is None or data.ratio < 1
        moved = 100 * moves[0 if down else 1] / moves[2] if moves is not None and moves[2] else None
        figure = f"moves {'down' if down else 'up'}, towards the equilibrium, or none at it"
        found.append(Row(figure, every, moved, (100 * data.moves[0] / data.moves[1],), "%"))
    if data.learning is not None:
        learning = [each.get("learning", {}) for each in analyses[:last]]
        learning = [each for each in learning if each.get("factor_agree") is not None]
        total = sum(each["above"] + each["below"] for each in learning)
        agreed = 100 * sum((each["above"] + each["below"]) * each["factor_agree"] for each in learning)
        agree = agreed / total if total else None
        found.append(Row("moves that agree with learning direction", every, agree, (data.learning,), "%"))
    return found


def _of_round(data: HumanData, people: HumanRound, scale: int, tally: Tally) -> list[Row]:
    """Return the figures of a round that a tally gives."""
    found = []
    for name, value, units in (("mean", people.mean, tally.average()), ("median", people.median, tally.median())):
        if value is not None and units is not None:
            found.append(Row(name, "", float(units / scale), (value,)))
    shares = list[tuple[str, Any, float]]()
    for limit, share in people.above.items():
        is_dominated = data.ratio is not None and data.max_value * data.ratio <= limit
        name = f"{'dominated ' * is_dominated}numbers above {plain_number(limit, 2)}"
        shares.append((name, tally.units > round(limit * scale, 6), share))
    for text, share in people.chosen.items():
        chosen = [round(float(number) * scale) for number in text.split(",")]
        shares.append((f"the number{'s' * (len(chosen) > 1)} {text}", np.isin(tally.units, chosen), share))
    parts = ((name, 100 * float(tally.counts[which].sum() / tally.answered), share) for name, which, share in shares)
    return found + [Row(name, "", part, (share,), "%") for name, part, share in parts]


def distance(data: HumanData, scale: int, tally: Tally) -> dict[str, Any]:
    """Return the Wasserstein distance of a run from people, and of up to MOST_TESTED numbers a two-sided U test."""
    from scipy.stats import mannwhitneyu, wasserstein_distance  # noqa: PLC0415 - slow, and needed in this case only

    numbers, counts = data.counts
    answers = tally.units / scale
    found = {"wasserstein": float(wasserstein_distance(answers, numbers, tally.counts, counts))}
    if tally.answered + counts.sum() <= MOST_TESTED:
        test = mannwhitneyu(np.repeat(answers, tally.counts), np.repeat(numbers, counts))
        found |= {"u": float(test.statistic), "p": float(test.pvalue)}
    return found
