"""The rules of the game as pure functions: the question, the announcement, and the conversion of an answer to units."""

import re
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from numbers import Integral, Rational, Real
from typing import Any

import numpy as np

from simulation.errors import NO_NUMBER, OUT_OF_RANGE, UNCERTAIN, KnownCause, SettingsError, printable
from simulation.files import shown
from simulation.game.game import Game, PromptTemplate, game_class
from simulation.game.parameters import declared, values_of
from simulation.game.population import GAMMA, MASK, Population, mix
from simulation.settings import FLAGS_OF_GAMES, SimulationConfig, flag_of

_BARE_NUMBER = re.compile(r"\s{0,99}(\d{1,15}(?:\.\d{1,15})?)\s{0,99}", re.ASCII)
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}\.\d{3}(?![\d.])")
NUMBER_LENGTH = 50  # maximum number of characters of a number in a message


@dataclass(frozen=True)
class Announcement:
    """The result of a round, as sent to all participants."""

    round: int
    average: float | None  # the mean of all answers; None if there are no answers
    winning_number: float | None  # the figure of this name in the game's outcome; None if there is none
    winning_units: tuple[int, ...]  # all distinct answers that win, in units
    winners: int = 0  # number of participants with one of `winning_units`; 0 until they are counted
    teams: tuple[tuple[str, float | None], ...] = ()  # name and average (None without answers) of each team
    closest_teams: tuple[str, ...] = ()  # the names of all teams whose averages are closest to the winning number
    winning_numbers: tuple[float, ...] = ()  # `winning_units` as numbers
    outcome: tuple[tuple[str, float | None], ...] = ()  # name and value of each figure of the game's outcome
    text: str = ""  # the result in words, as prompts state it
    numbers: tuple[tuple[float, int], ...] = ()  # each number and how often it was given, if the game announces them


@dataclass(frozen=True)
class Question:
    """A question to a participant."""

    round: int  # from 1; 0 for a question that a user asks outside the game
    text: str
    max_value: int  # the highest answer
    announcements: tuple[Announcement, ...] = ()  # of all earlier rounds
    decimals: int = 0
    min_value: int = 0  # the lowest answer


def question_for(game: Game, round_number: int, announcements: tuple[Announcement, ...]) -> Question:
    """Return the moderator's question for one round."""
    text = f"Round {round_number}: {game.words.question}"
    return Question(round_number, text, int(game.high), announcements, game.decimals, int(game.low))


@lru_cache(maxsize=1024)
def _round_key(seed: int, round_number: int) -> int:
    return int(mix((mix((seed + GAMMA) & MASK) + round_number * GAMMA) & MASK) + GAMMA)


def draw(game: Game, round_number: int, participant: int) -> int:
    """Return the random answer of a participant in units. A change here would change the results of every seed."""
    key = (_round_key(game.seed, round_number) + participant * GAMMA) & MASK
    return game.lowest + int((mix(key) * game.numbers) >> 64)  # not `draw_below`: one more call takes too long


def draw_below(limit: int, seed: int, round_number: int, participant: int) -> int:
    """Return a random number from 0 to limit - 1 that seed, round and participant determine."""
    key = (_round_key(seed, round_number) + participant * GAMMA) & MASK
    return int((mix(key) * limit) >> 64)


def parse_number(text: str) -> float:
    """Return the number that a text states. Raises KnownCause if no number is certain (see answer_parser.py)."""
    if bare := _BARE_NUMBER.fullmatch(text):
        return float(bare[1])
    from simulation.game.answer_parser import stated_number  # noqa: PLC0415 - takes 0.1 s; many texts are bare numbers

    return stated_number(text)


def plain_number(number: float | None, digits: int) -> str:
    """Format a number with up to `digits` decimal places. Return "none" for None."""
    text = "none" if number is None else f"{Decimal(repr(round(number, digits))):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def to_units(answer: Any, game: Game) -> int:
    """Convert `answer`, a number or a text, to units (see `Game.scale`), rounded half to even.

    Raises KnownCause if `answer` is neither a number nor a text that certainly states one, or is not in low..high.
    """
    number, text = answer, None
    if isinstance(answer, str):
        number, text = parse_number(answer), answer
        if game.scale < 1000 <= game.high and _THOUSANDS.search(answer):  # 12.345 means 12,345 in many languages
            raise KnownCause(UNCERTAIN, answer)
    if isinstance(number, (bool, np.bool_)) or not isinstance(number, (Real, Decimal)):
        raise KnownCause(NO_NUMBER)
    if not game.low <= number <= game.high:  # also true for NaN
        raise KnownCause(out_of_range(game), printable(str(number), NUMBER_LENGTH) if text is None else text)
    if not isinstance(number, (Rational, Decimal)):
        number = float(number)
    elif isinstance(number, Integral):
        number = int(number)  # products of small numpy integers may overflow
    return round(number * game.scale)


def out_of_range(game: Game) -> str:
    return f"{OUT_OF_RANGE} ({game.low} to {game.high})"


def game_of(config: SimulationConfig, prompt: PromptTemplate | None, population: Population) -> Game:
    """Return the game that the settings describe. Raises SettingsError if the game or one of its settings is invalid.

    Values in `config.set` that are not settings of the game are ignored: they may be parameters of participants.
    """
    cls = game_class(config.game)
    parameters = declared(cls, Game)
    values = values_of(config.set, cls.__name__, parameters)
    for name, text in ((name, getattr(config, name)) for name in FLAGS_OF_GAMES if getattr(config, name) is not None):
        if name not in parameters:
            raise SettingsError(f"{flag_of(name)} {text}: the game {shown(config.game)} has no such setting")
        values[name] = parameters[name].parse(flag_of(name), text)
    return cls(**game_fields(config, prompt, population), **values)


def game_fields(config: SimulationConfig, prompt: PromptTemplate | None, population: Population) -> dict[str, Any]:
    """Return the fields of `Game` that all games have."""
    return {
        "seed": config.seed or 0,
        "max_value": config.max_value,
        "decimals": config.decimals,
        "sleep_time_s": config.sleep_time,
        "llm": config if config.uses_models else None,
        "prompt": prompt,
        "population": population,
        "teams": config.teams,
    }
