"""Who the participants are: their personas and their models, by exact shares and by the seed; pure.

A cast is the same wherever participants sit, and whoever knows it can tell for each of them alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODEL = "model"  # the topic of a mixture, beside the names of persona sets


@dataclass(frozen=True)
class Persona:
    """What a share of the participants are, and how an LLM participant is told so."""

    name: str
    share: Fraction
    text: str = ""


@dataclass(frozen=True)
class PersonaSet:
    """Personas of which everyone is one; their shares add up to 1."""

    name: str
    personas: tuple[Persona, ...]


@dataclass(frozen=True)
class ModelShare:
    """What share of the participants ask a model: its name in the models' file, and what its server calls it."""

    name: str
    share: Fraction
    model: str


@dataclass(frozen=True)
class Grouping:
    """One way to tell the participants apart: the names of the parts, and how many are in each."""

    topic: str
    names: tuple[str, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Population:
    """Who all participants are.

    Attributes:
        seed: The game's.
        total: How many participants there are.
        persona_sets: Everyone is one persona of each.
        models: The mixture of models; without one they take turns.
        turns: What the models are called, by their servers, that participants ask in turn; none without models.
    """

    seed: int
    total: int
    persona_sets: tuple[PersonaSet, ...] = ()
    models: tuple[ModelShare, ...] = ()
    turns: tuple[str, ...] = ()

    def personas_of(self, participant: int) -> tuple[Persona, ...]:
        """One persona of each set, in their order."""
        return tuple(
            each.personas[assign_one(self.seed, each.name, parts.counts, participant)]
            for each, parts in zip(self.persona_sets, self._persona_parts, strict=True)
        )

    def model_of(self, participant: int) -> str | None:
        """The name of the model that it asks; None where they take turns."""
        if not self.models:
            return None
        return self.models[assign_one(self.seed, MODEL, self._model_counts, participant)].name

    @property
    def groupings(self) -> tuple[Grouping, ...]:
        """All ways to tell the participants apart: by each set of personas, and by model where there are several."""
        called = self.called
        names = tuple(dict.fromkeys(called))
        counts = (
            self._model_counts
            if self.models
            else largest_remainder(self.total, [Fraction(1, len(called) or 1)] * len(called))
        )
        each = tuple(sum(count for name, count in zip(called, counts, strict=True) if name == one) for one in names)
        return self._persona_parts + ((Grouping(MODEL, names, each),) if len(names) > 1 else ())

    def places(self, parts: Grouping, first: int, count: int) -> NDArray[np.int64]:
        """In which of the parts participants first .. first+count-1 are: int64 of shape (count,)."""
        if parts.topic != MODEL:
            return assign_many(self.seed, parts.topic, parts.counts, first, count)
        if self.models:
            place = assign_many(self.seed, MODEL, self._model_counts, first, count)
        else:
            place = np.arange(first, first + count) % len(self.turns)
        return np.array([parts.names.index(name) for name in self.called])[place]

    def part_of(self, topic: str, participant: int) -> str:
        """In which part one participant is; the same as `places` says, without its arrays. `topic` is one there is."""
        if topic != MODEL:
            named = zip(self.persona_sets, self.personas_of(participant), strict=True)
            return next(persona.name for each, persona in named if each.name == topic)
        if self.models:
            return self.called[assign_one(self.seed, MODEL, self._model_counts, participant)]
        return self.called[participant % len(self.turns)]

    @cached_property
    def _persona_parts(self) -> tuple[Grouping, ...]:
        return tuple(
            Grouping(
                each.name,
                tuple(persona.name for persona in each.personas),
                largest_remainder(self.total, [persona.share for persona in each.personas]),
            )
            for each in self.persona_sets
        )

    @cached_property
    def _model_counts(self) -> tuple[int, ...]:
        return largest_remainder(self.total, [each.share for each in self.models])

    @cached_property
    def called(self) -> tuple[str, ...]:
        """What the models are called in results: as their servers call them, several of which may serve the same one.

        Those of a mixture that share such a name, as with several temperatures, are told apart by their names in the
        models' file.
        """
        called = [each.model for each in self.models]
        apart = (each.name if called.count(each.model) > 1 else each.model for each in self.models)
        return tuple(apart) or self.turns

    def to_json(self) -> dict[str, Any]:
        """As it is written to a run's folder; seed and total are among the run's settings."""
        return {
            "personas": {
                each.name: [{"name": one.name, "share": str(one.share), "text": one.text} for one in each.personas]
                for each in self.persona_sets
            },
            "models": [{"name": one.name, "share": str(one.share), "model": one.model} for one in self.models],
            "turns": list(self.turns),
        }

    @classmethod
    def from_json(cls, said: dict[str, Any], seed: int, total: int) -> Population:
        """The cast that was written so. Raises KeyError, TypeError or ValueError if it was not."""
        sets = (
            PersonaSet(name, tuple(Persona(one["name"], Fraction(one["share"]), one["text"]) for one in personas))
            for name, personas in said["personas"].items()
        )
        models = (ModelShare(one["name"], Fraction(one["share"]), one["model"]) for one in said["models"])
        return cls(seed, total, tuple(sets), tuple(models), tuple(said["turns"]))


STEPS = 4  # of the Feistel network; three make a permutation that cannot be told from a random one (Luby, Rackoff 1988)


MASK = 2**64 - 1


GAMMA = 0x9E3779B97F4A7C15


def mix(z: Any) -> Any:
    """The SplitMix64 finaliser, of a number or a uint64 array.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
    """
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def largest_remainder(total: int, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """How many of `total` each share comes to: all of them, each at most one off, the largest remainders rounded up.

    The shares add up to 1.
    """
    exact = [share * total for share in shares]
    counts = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: (counts[place] - exact[place], place))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return tuple(counts)


def assign_many(seed: int, topic: str, counts: tuple[int, ...], first: int, count: int) -> NDArray[np.int64]:
    """Which of the parts, of these sizes, participants first .. first+count-1 are in: int64 of shape (count,).

    What is dealt for one topic says nothing about another one.
    """
    total = sum(counts)
    if first < 0 or first + count > total:  # of others there is no end to the walk below
        raise ValueError(f"participants {first} to {first + count - 1} are not among {total}")
    half_bits, keys = _network(seed, topic, total)
    places = _permuted(np.arange(first, first + count, dtype=np.uint64), half_bits, keys)
    beyond = np.flatnonzero(places >= total)
    while len(beyond):  # walked on within the larger range until it is inside: a permutation of 0 .. total-1
        places[beyond] = _permuted(places[beyond], half_bits, keys)
        beyond = beyond[places[beyond] >= total]
    return np.searchsorted(np.cumsum(counts), places.astype(np.int64), side="right").astype(np.int64)


def assign_one(seed: int, topic: str, counts: tuple[int, ...], participant: int) -> int:
    """Which of the parts one participant is in; the same as `dealt` says, without its arrays."""
    total = sum(counts)
    half_bits, keys = _network(seed, topic, total)
    place = _permuted(participant, half_bits, keys)
    while place >= total:
        place = _permuted(place, half_bits, keys)
    return next(part for part, stop in enumerate(accumulate(counts)) if place < stop)


@lru_cache(maxsize=256)
def _network(seed: int, topic: str, total: int) -> tuple[int, tuple[int, ...]]:
    """Half the bits of the smallest network that holds `total` numbers, and the key of each of its steps."""
    key = seed
    for byte in topic.encode():
        key = mix((key + byte + 1) & MASK)
    half_bits = max((total - 1).bit_length() + 1, 2) // 2
    return half_bits, tuple(mix((key + step * GAMMA) & MASK) for step in range(1, STEPS + 1))


def _permuted(numbers, half_bits: int, keys: tuple[int, ...]):  # type: ignore[no-untyped-def]  # int, or a uint64 array
    """A permutation of 0 .. 4^half_bits - 1, made of the draw's own hash by a balanced Feistel network."""
    low = (1 << half_bits) - 1
    left, right = numbers >> half_bits, numbers & low
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & low)
    return (left << half_bits) | right
