"""The base class of all games. A game is one class in one file, such as games/average.py.

The program knows a game only by the methods of this class. A game does not know about agents, servers or files.
"""

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from simulation.errors import SettingsError, nearest
from simulation.files import CODE, files_in, names_file
from simulation.game.population import Population
from simulation.settings import SimulationConfig
from simulation.user_code import find_class

if TYPE_CHECKING:
    from simulation.game.tally import Tally

Units = NDArray[np.int64]
Pairs = tuple[Units, Units]  # the answers of some participants in two successive rounds, in units
AllPairs = Iterable[Pairs] | None  # the same of all participants, one part after the other; None if unknown
Outcome = Mapping[str, Any]  # the figures that are announced, by name: int, float or Fraction, or None if there is none
HIGHEST = 10**9  # the highest answer of any game


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt for LLM participants, from the prompts file. prompts.py fills in the placeholders in braces."""

    name: str
    system: str  # the participant's role and the rules
    instruction: str  # the end of each round's prompt, which states how to answer; not used outside the game
    reasoning_tokens: int | None = None  # token limit of the reasoning before the number; None without reasoning


@dataclass(frozen=True)
class Rules:
    """The words of a game, from which all texts about it are made."""

    question: str  # asks for a number and states who wins, as in "choose 0 or 1. The side that fewer choose wins."
    goal: str  # what wins, as in "the side that fewer choose"
    prompt: str = ""  # the text of {rules} in prompts (default: "In every round, " and the question)
    won: str = ""  # what winners have, as in "P7 wins with 33, ..."; may contain {winning_number} (default: the goal)
    labels: Mapping[str, str] = field(default_factory=dict)  # words for figures (default: the name, _ as a space)
    notes: Mapping[str, str] = field(default_factory=dict)  # what the figures of `analyses` mean, for reports

    def label(self, figure: str) -> str:
        """Return the words for a figure of the outcome."""
        return self.labels.get(figure, figure.replace("_", " "))


@dataclass(frozen=True)
class Game:
    """A game: who wins, and the parameters of a run that are equal in all rounds.

    A subclass declares its settings as annotated attributes (see `setting`), and defines `rules`, `outcome` and
    `payoffs`. It becomes a frozen dataclass. Answers are counted in units: one unit is one step in the last decimal
    place, so an answer of 3.5 with one decimal place is 35 units.
    """

    low: ClassVar[Any] = 0  # the lowest answer, a whole number of at least 0; may be a property
    high: ClassVar[Any] = property(lambda self: self.max_value)  # the highest answer, a whole number
    whole_numbers: ClassVar[bool] = False  # whether --decimals is refused

    seed: int = 0
    max_value: int = 100
    decimals: int = 0
    sleep_time_s: float = 0.0
    llm: SimulationConfig | None = None  # the settings of requests to models; None if no participant asks a model
    prompt: PromptTemplate | None = None  # None if no participant asks a model
    seeds_models: bool = False  # whether requests to models have seeds, because the servers repeat seeded answers
    population: Population = field(default_factory=Population)
    teams: str | None = None  # the topic (see `Grouping`) whose labels are the teams, if any
    numbers_announced: bool = False  # whether all answers are announced; a game may declare this as a setting

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        dataclass(frozen=True)(cls)

    def rules(self) -> Rules:
        """Return the words of the game."""
        raise NotImplementedError(f"{type(self).__name__} does not define rules")

    def outcome(self, tally: "Tally") -> Outcome:
        """Return the figures that are announced after a round, by name, in numbers (not units).

        `tally` has at least one answer. The figure `winning_number`, if there is one, is shown as such in all results;
        None then means that the round has no winner.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define outcome")

    def payoffs(self, units: Units, outcome: Outcome) -> NDArray[Any]:
        """Return the payoff of each of the answers `units` (int64, shape (k,)), shape (k,). The highest payoff wins."""
        raise NotImplementedError(f"{type(self).__name__} does not define payoffs")

    def equilibrium(self) -> tuple[float, ...] | None:
        """Return the pure symmetric Nash equilibria with many players; () if every number is one; None if unknown."""
        return None

    def analyses(self, tallies: "Sequence[Tally]", outcomes: Sequence[Outcome], pairs: AllPairs) -> Outcome:
        """Return figures of the latest round for results and reports: numbers, texts, None, or dictionaries of these.

        `tallies` has the answers to all rounds so far, of all participants or of a part of them (such as a persona).
        `outcomes` has the figures of these rounds, {} for a round without answers. `pairs` has the answers of those
        participants that answered in the last round and in this one; None if single answers are unknown.
        """
        return {}

    @cached_property
    def words(self) -> Rules:
        return self.rules()

    @cached_property
    def scale(self) -> int:
        """Return the number of units in 1."""
        return 10**self.decimals

    @cached_property  # read for every random answer
    def lowest(self) -> int:
        """Return the lowest answer in units."""
        return int(self.low) * self.scale

    @cached_property
    def numbers(self) -> int:
        """Return the number of possible answers."""
        return (int(self.high) - int(self.low)) * self.scale + 1

    @property
    def most_distinct(self) -> int:
        """Return the maximum number of distinct answers in a round."""
        return min(self.numbers, max(self.population.total, 1))

    @property
    def number_words(self) -> str:
        """Return what an answer is, as prompts name it."""
        return "a whole number" if self.decimals == 0 else f"a number with up to {self.decimals} digits after the point"

    def equilibrium_words(self) -> str:
        """Return the equilibria as text; "" if they are unknown."""
        known = self.equilibrium()
        any_number = "" if known is None else "any number, if all participants give it"
        return " and ".join(f"{each:,.6g}" for each in known or ()) or any_number


def closest(units: Units, target: Fraction) -> NDArray[np.bool_]:
    """Return which of the ascending `units` are closest to the target: none, one, or one on each side. Exact."""
    after = int(np.searchsorted(units, math.floor(target), side="right"))
    near = range(max(after - 1, 0), min(after + 1, len(units)))
    distances = {index: abs(int(units[index]) - target) for index in near}
    return np.isin(np.arange(len(units)), [at for at in near if distances[at] == min(distances.values())])


def game_class(spec: str) -> type[Game]:
    """Return the class of the game in games/ that is named `spec`, or that of `FILE.py:CLASS`. Raises SettingsError."""
    if names_file(spec):
        return find_class("--game", spec, Game)
    names = [path.stem for path in files_in(CODE / "games", ".py") if not path.stem.startswith("_")]
    if spec not in names:
        advice = "(a game of your own is written as my_file.py:MyGame)"
        raise SettingsError(f"--game {spec}: there is no such game; {nearest(spec, names)} {advice}")
    module = importlib.import_module(f"games.{spec}")
    own = (each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__)
    return next(each for each in own if issubclass(each, Game))
