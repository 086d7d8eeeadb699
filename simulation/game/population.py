"""The assignment of personas and models to participants. It depends on shares and the seed, but not on the servers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODEL = "model"  # the topic of the partition by model; every other topic is the name of a persona set


@dataclass(frozen=True)
class Persona:
    """A persona: its name, its share of the participants, and its text for the prompts of LLM participants."""

    name: str
    share: Fraction
    text: str = ""


@dataclass(frozen=True)
class ModelShare:
    """A model of a mixture: its name in the models file, its share, and `model`, its name on the model server."""

    name: str
    share: Fraction
    model: str


@dataclass(frozen=True)
class Grouping:
    """A partition of the participants into parts, by their personas of one set or by their models."""

    topic: str  # the name of the persona set, or MODEL
    labels: tuple[str, ...]  # the name of each part; several models may have the same name
    counts: tuple[int, ...]  # number of participants in each part; empty if participant i is in part i mod len(labels)
    seed: int

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Return the distinct labels."""
        return tuple(dict.fromkeys(self.labels))

    def part_of(self, participant: int) -> int:
        """Return the part of one participant, as an index in `labels`."""
        if not self.counts:
            return participant % len(self.labels)
        return assign_one(self.seed, self.topic, self.counts, participant)

    def name_indices(self, first: int, count: int) -> NDArray[np.int64]:
        """For each participant first .. first+count-1, return the index of its label in `names`, as an array."""
        if not self.counts:
            parts = np.arange(first, first + count) % len(self.labels)
        else:
            parts = assign_many(self.seed, self.topic, self.counts, first, count)
        return np.array([self.names.index(label) for label in self.labels])[parts]


@dataclass(frozen=True)
class Population:
    """The personas and models of all participants."""

    seed: int = 0  # the seed of the game
    total: int = 0  # number of participants
    persona_sets: dict[str, tuple[Persona, ...]] = field(default_factory=dict)  # by name; each set's shares add up to 1
    models: tuple[ModelShare, ...] = ()  # the mixture of models; empty if models are assigned round-robin
    round_robin_models: tuple[str, ...] = ()  # the models assigned round-robin, by their names on the servers

    def personas_of(self, participant: int) -> tuple[Persona, ...]:
        """Return the participant's personas, one of each set, in the order of the sets."""
        return tuple(each[self.by_topic[topic].part_of(participant)] for topic, each in self.persona_sets.items())

    def model_of(self, participant: int) -> str | None:
        """Return the name of the participant's model in the models file, or None if models are not mixed."""
        return self.models[self.by_topic[MODEL].part_of(participant)].name if self.models else None

    def label_of(self, topic: str, participant: int) -> str:
        """Return the name of a participant's persona in the set `topic`, or its model's label if `topic` is MODEL."""
        grouping = self.by_topic[topic]
        return grouping.labels[grouping.part_of(participant)]

    @property
    def groupings(self) -> tuple[Grouping, ...]:
        """Return one partition of the participants per persona set, and one by model if the model labels differ."""
        return tuple(each for each in self.by_topic.values() if each.topic != MODEL or len(each.names) > 1)

    @cached_property
    def by_topic(self) -> dict[str, Grouping]:
        """Return the partitions of the participants by topic: one per persona set, and one by model (MODEL).

        The label of a model's part is the model's name on its server. If several models of a mixture share this name,
        for example with different temperatures, their labels are their names in the models file.
        """

        def assigned(topic: str, labels: Iterable[str], parts: Sequence[Persona | ModelShare]) -> Grouping:
            counts = largest_remainder(self.total, [each.share for each in parts])
            return Grouping(topic, tuple(labels), counts, self.seed)

        sets = self.persona_sets.items()
        by_topic = {topic: assigned(topic, (each.name for each in personas), personas) for topic, personas in sets}
        names = [each.model for each in self.models]
        labels = (each.name if names.count(each.model) > 1 else each.model for each in self.models)
        in_turn = Grouping(MODEL, self.round_robin_models, (), self.seed)
        return by_topic | {MODEL: assigned(MODEL, labels, self.models) if self.models else in_turn}


STEPS = 4  # steps of the Feistel network; three suffice for a pseudorandom permutation (Luby, Rackoff 1988)
MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(z: Any) -> Any:
    """Apply SplitMix64's finaliser to a number or a uint64 array (Steele, Lea, Flood, "Fast Splittable ...", 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def largest_remainder(total: int, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Split `total` into whole counts in proportion to `shares`, which add up to 1. Rounding errors are less than 1."""
    exact = [share * total for share in shares]
    counts = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return tuple(counts)


def assign_many(seed: int, topic: str, counts: tuple[int, ...], first: int, count: int) -> NDArray[np.int64]:
    """Assign participants to parts at random: part k gets counts[k] of the participants 0 .. sum(counts)-1.

    Return the part indices of the participants first .. first+count-1, int64 of shape (count,). Assignments for
    different topics are independent. Raises ValueError if a participant is not in 0 .. sum(counts)-1.
    """
    total = sum(counts)
    if first < 0 or first + count > total:  # otherwise, the loop below may not end
        raise ValueError(f"participants {first} to {first + count - 1} are not among {total}")
    half_bits, keys = _network(seed, topic, total)
    ranks = _permuted(np.arange(first, first + count, dtype=np.uint64), half_bits, keys)
    beyond = np.flatnonzero(ranks >= total)
    while len(beyond):  # cycle walking: permute again until each rank is below `total`
        ranks[beyond] = _permuted(ranks[beyond], half_bits, keys)
        beyond = beyond[ranks[beyond] >= total]
    return np.searchsorted(np.cumsum(counts), ranks.astype(np.int64), side="right").astype(np.int64)


def assign_one(seed: int, topic: str, counts: tuple[int, ...], participant: int) -> int:
    """Return the part index of one participant, as `assign_many` does, but without arrays."""
    total = sum(counts)
    half_bits, keys = _network(seed, topic, total)
    rank = _permuted(participant, half_bits, keys)
    while rank >= total:
        rank = _permuted(rank, half_bits, keys)
    return next(part for part, stop in enumerate(accumulate(counts)) if rank < stop)


@lru_cache(maxsize=256)
def _network(seed: int, topic: str, total: int) -> tuple[int, tuple[int, ...]]:
    """Return half the bit length and the step keys of the smallest Feistel network that permutes 0 .. total-1."""
    key = seed
    for byte in topic.encode():
        key = mix((key + byte + 1) & MASK)
    half_bits = max((total - 1).bit_length() + 1, 2) // 2
    return half_bits, tuple(mix((key + step * GAMMA) & MASK) for step in range(1, STEPS + 1))


def _permuted(numbers, half_bits: int, keys: tuple[int, ...]):  # type: ignore[no-untyped-def]  # int, or a uint64 array
    """Permute numbers from 0 to 4^half_bits - 1 with a balanced Feistel network whose round function is `mix`."""
    low = (1 << half_bits) - 1
    left, right = numbers >> half_bits, numbers & low
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & low)
    return (left << half_bits) | right
