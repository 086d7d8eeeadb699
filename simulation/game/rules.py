"""The rules of the game as pure functions: the question, the announcement, and the conversion of an answer to units."""

import re
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import cached_property, lru_cache
from numbers import Integral, Rational, Real
from typing import Any

import numpy as np

from simulation.errors import NO_NUMBER, OUT_OF_RANGE, UNCERTAIN, KnownCause
from simulation.game.average import equilibria, target_in_words
from simulation.game.population import GAMMA, MASK, Population, mix
from simulation.settings import SimulationConfig

_BARE_NUMBER = re.compile(r"\s{0,99}(\d{1,15}(?:\.\d{1,15})?)\s{0,99}", re.ASCII)
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}\.\d{3}(?![\d.])")


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt for LLM participants, from the prompts file. prompts.py fills in the placeholders in braces."""

    name: str
    system: str  # the system prompt: the participant's role and the rules
    instruction: str  # the end of each round's prompt, which states how to answer; not used outside the game
    reasoning_tokens: int | None = None  # token limit of the reasoning before the number; None without reasoning


@dataclass(frozen=True)
class Game:
    """The parameters of the game, equal in all rounds. The answers closest to offset + ratio * average win."""

    seed: int
    max_value: int
    decimals: int
    sleep_time_s: float
    llm: SimulationConfig | None = None  # the settings of requests to models; None if no participant asks a model
    ratio: Fraction = Fraction(1)
    offset: Fraction = Fraction(0)
    prompt: PromptTemplate | None = None  # None if no participant asks a model
    population: Population = field(default_factory=Population)
    teams: str | None = None  # the topic (see `Grouping`) whose labels are the teams, if any

    @cached_property
    def scale(self) -> int:
        """Return the number of units in 1: 10^decimals. One unit is one step in the last decimal place of an answer."""
        return 10**self.decimals

    @cached_property
    def numbers(self) -> int:
        """Return the number of possible answers."""
        return self.max_value * self.scale + 1

    @property
    def target(self) -> str:
        """Return the target in words: "the average", "2/3 of the average" or "5 plus 1/2 of the average"."""
        return target_in_words(self.ratio, self.offset)

    @property
    def target_or_it(self) -> str:
        """Return "it" if the target is the average (already named in the caller's sentence), otherwise `target`."""
        return "it" if self.ratio == 1 and not self.offset else self.target

    @property
    def equilibria(self) -> tuple[float, ...]:
        """Return the symmetric Nash equilibria of the game, ascending; () if every number is an equilibrium."""
        return equilibria(self.ratio, self.offset, self.max_value)

    def winning_number(self, average: Fraction) -> Fraction:
        """Return the winning number in units for an average in units."""
        return self.offset * self.scale + self.ratio * average


@dataclass(frozen=True)
class Announcement:
    """The result of a round, as sent to all participants."""

    round: int
    average: float | None  # the mean of all answers; None if there are no answers
    winning_number: float | None  # offset + ratio * average; None if there are no answers
    winning_units: tuple[int, ...]  # all distinct answers closest to the winning number, in units
    winners: int | None = None  # number of participants with one of `winning_units`; 0 until counted; None: unknown
    teams: tuple[tuple[str, float | None], ...] = ()  # name and average (None without answers) of each team
    closest_teams: tuple[str, ...] = ()  # the names of all teams whose averages are closest to the winning number


@dataclass(frozen=True)
class Question:
    """A question to a participant."""

    round: int  # from 1; 0 for a question that a user asks outside the game
    text: str
    max_value: int
    announcements: tuple[Announcement, ...] = ()  # of all earlier rounds
    decimals: int = 0


def question_for(game: Game, round_number: int, announcements: tuple[Announcement, ...]) -> Question:
    """Return the moderator's question for one round."""
    text = (
        f"Round {round_number}: give a number from 0 to {game.max_value}. "
        f"The average of all answers is announced, and whoever is closest to {game.target_or_it} wins."
    )
    return Question(round_number, text, game.max_value, announcements, game.decimals)


@lru_cache(maxsize=1024)
def _round_key(seed: int, round_number: int) -> int:
    return int(mix((mix((seed + GAMMA) & MASK) + round_number * GAMMA) & MASK) + GAMMA)


def draw(game: Game, round_number: int, participant: int) -> int:
    """Return the random answer of a participant in units. A change here would change the results of every seed."""
    key = (_round_key(game.seed, round_number) + participant * GAMMA) & MASK
    return int((mix(key) * game.numbers) >> 64)


def parse_number(text: str) -> float:
    """Return the number that a text states. Raises KnownCause if no number is certain (see answer_parser.py)."""
    if bare := _BARE_NUMBER.fullmatch(text):
        return float(bare[1])
    from simulation.game.answer_parser import stated_number  # noqa: PLC0415 - takes 0.1 s; many texts are bare numbers

    return stated_number(text)


def to_units(answer: Any, game: Game) -> int:
    """Convert `answer`, a number or a text, to units (see `Game.scale`), rounded half to even.

    Raises KnownCause if `answer` is neither a number nor a text that certainly states one, or is not in 0..max_value.
    """
    text = answer if isinstance(answer, str) else None
    if text is not None:
        answer = parse_number(text)
        if game.scale < 1000 <= game.max_value and _THOUSANDS.search(text):  # 12.345 means 12,345 in many languages
            raise KnownCause(UNCERTAIN, text)
    if isinstance(answer, (bool, np.bool_)) or not isinstance(answer, (Real, Decimal)):
        raise KnownCause(NO_NUMBER)
    number: Any = answer
    if not 0 <= number <= game.max_value:  # also true for NaN
        raise KnownCause(OUT_OF_RANGE, text)
    if isinstance(number, Integral):
        number = int(number)  # products of small numpy integers may overflow
    elif not isinstance(number, (Rational, Decimal)):
        number = float(number)
    return round(number * game.scale)


def game_of(config: SimulationConfig, prompt: PromptTemplate | None, population: Population) -> Game:
    """Return the game that the settings describe."""
    return Game(
        seed=config.seed or 0,
        max_value=config.max_value,
        decimals=config.decimals,
        sleep_time_s=config.sleep_time,
        llm=config if config.agent_type == "llm" else None,
        ratio=Fraction(config.ratio),
        offset=Fraction(config.offset),
        prompt=prompt,
        population=population,
        teams=config.teams,
    )
