"""The rules of the game, pure: what is asked, what is announced, and what an answer is in units.

It knows nothing of agents, servers or clocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property, lru_cache
from numbers import Integral, Rational, Real
from typing import Any

import numpy as np

from simulation.errors import KnownCause
from simulation.game.answer_parser import NO_NUMBER, UNCERTAIN, parse_number
from simulation.game.average import equilibria, target_in_words
from simulation.game.population import GAMMA, MASK, Population, mix
from simulation.settings import SimulationConfig

OUT_OF_RANGE = "number out of range"
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}\.\d{3}(?![\d.])")


@dataclass(frozen=True)
class LLMSettings:
    """How LLM participants ask their models: the settings of the same names."""

    models: int  # participant i asks model_{i mod models + 1}
    structured_output: str
    samples_per_request: int
    max_attempts: int
    max_in_flight: int | None
    attempt_timeout_s: float
    reply_timeout_s: float


@dataclass(frozen=True)
class PromptTemplate:
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
    sampling: LLMSettings | None = None  # None where no participant asks a model
    ratio: Fraction = Fraction(1)
    offset: Fraction = Fraction(0)
    wording: PromptTemplate | None = None  # likewise
    cast: Population | None = None  # who they are, where that matters
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


def game_of(config: SimulationConfig, wording: PromptTemplate | None, cast: Population | None) -> Game:
    """The game that the settings describe."""
    return Game(
        config.seed or 0,
        config.max_value,
        config.decimals,
        config.sleep_time,
        _sampling(config),
        Fraction(config.ratio),
        Fraction(config.offset),
        wording,
        cast,
        config.teams,
    )


def _sampling(config: SimulationConfig) -> LLMSettings | None:
    if config.agent_type != "llm":
        return None
    return LLMSettings(
        config.model_per_host,
        config.structured_output,
        config.samples_per_request,
        config.max_attempts,
        config.max_in_flight,
        config.attempt_timeout,
        config.reply_timeout,
    )
