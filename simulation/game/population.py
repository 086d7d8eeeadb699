"""The assignment of kinds of player, personas and models to participants, by shares and the seed, on any servers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulation.errors import listed

KIND, MODEL = "kind", "model"  # the topics of two partitions; every other topic is the name of a persona set
# Names of columns in answers.parquet, so of no persona set
RESERVED = (KIND, MODEL, "round", "participant", "value", "failure", "team", "payoff", "won")
MOST_TEXTS, TEXTS_SAMPLED = 100_000, 1000  # a game with more answers of models keeps a sample (--keep-texts auto)
MOST_STRATA = 10_000  # maximum number of combinations of kind, personas and model that samples represent
COUNTED_AT_ONCE = 250_000  # number of participants whose strata are in memory at the same time
NO_MODEL = "none"  # the label of players without a model
NEIGHBOURS = 100  # number of neighbouring participants that ask the same model in turn if requests have seeds


@dataclass(frozen=True)
class Persona:
    name: str
    share: Fraction  # of the participants
    text: str = ""  # for the prompts of LLM participants


@dataclass(frozen=True)
class ModelShare:
    name: str  # in the models file
    share: Fraction
    model: str  # its name on the model server


@dataclass(frozen=True)
class PlayerShare:
    label: str
    share: Fraction
    models: tuple[ModelShare, ...] = ()  # the shares of the models that these players ask; empty if they ask none
    source: str | None = None  # of a surrogate: which answers it draws from


@dataclass(frozen=True)
class Grouping:
    """A partition of the participants into parts, by their kinds, their personas of one set, or their models."""

    topic: str  # KIND, MODEL, or the name of the persona set
    labels: tuple[str, ...]  # the name of each part; several parts may have the same name
    counts: tuple[int, ...]  # number of participants in each part; empty if parts are assigned round-robin
    seed: int
    assigned_by: str = ""  # the topic whose assignment this partition has, if not its own
    block: int = 1  # number of neighbouring participants that a round-robin assigns to the same part

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.labels))

    def part_of(self, participant: int) -> int:
        """Return the part of one participant, as an index in `labels`."""
        if not self.counts:
            return participant // self.block % len(self.labels)
        block, place = divmod(participant, BLOCK)
        return _parts_in(self.seed, self.assigned_by or self.topic, self.counts, block)[place]

    def name_indices(self, first: int, count: int) -> NDArray[np.int64]:
        """For each participant first .. first+count-1, return the index of its label in `names`, as an array."""
        if not self.counts:
            parts = np.arange(first, first + count) // self.block % len(self.labels)
        else:
            parts = assign_many(self.seed, self.assigned_by or self.topic, self.counts, first, count)
        return np.array([self.names.index(label) for label in self.labels])[parts]


@dataclass(frozen=True)
class Combination:
    """The partition of the participants by several partitions at once. A name has one label of each of them."""

    groupings: tuple[Grouping, ...]
    topic: str = ""

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        return tuple(product(*(each.names for each in self.groupings)))

    def name_indices(self, first: int, count: int) -> NDArray[np.int64]:
        indices = np.zeros(count, np.int64)
        for each in self.groupings:
            indices = indices * len(each.names) + each.name_indices(first, count)
        return indices


@dataclass(frozen=True)
class Population:
    """The kinds, personas and models of all participants."""

    seed: int = 0  # the seed of the game
    total: int = 0  # number of participants
    persona_sets: dict[str, tuple[Persona, ...]] = field(default_factory=dict)  # by name; each set's shares add up to 1
    models: tuple[ModelShare, ...] = ()  # the mixture of models; empty if models are assigned round-robin
    round_robin_models: tuple[str, ...] = ()  # the models assigned round-robin, by their names on the servers
    players: tuple[PlayerShare, ...] = ()  # the mixture of kinds (then without the two before); empty if all are alike
    block: int = 1  # of `round_robin_models` (see `Grouping`)

    def personas_of(self, participant: int) -> tuple[Persona, ...]:
        """Return the participant's personas, one of each set, in the order of the sets."""
        return tuple(each[self.by_topic[topic].part_of(participant)] for topic, each in self.persona_sets.items())

    def model_of(self, participant: int) -> str | None:
        """Return the name of the participant's model in the models file, or None if models are not mixed."""
        model = self.part_models[self.by_topic[MODEL].part_of(participant)] if self.part_models else None
        return None if model is None else model.name

    def label_of(self, topic: str, participant: int) -> str:
        """Return the label of a participant's part of `topic`, such as the name of its persona in that set."""
        grouping = self.by_topic[topic]
        return grouping.labels[grouping.part_of(participant)]

    @property
    def groupings(self) -> tuple[Grouping, ...]:
        """Return one partition of the participants per persona set, and those by kind and by model if these differ."""
        models = {*self.by_topic[MODEL].names} - ({NO_MODEL} if self.players else set())
        several = {KIND: len(self.players) > 1, MODEL: len(models) > 1}
        return tuple(each for topic, each in self.by_topic.items() if several.get(topic, True))

    @cached_property
    def part_models(self) -> tuple[ModelShare | None, ...]:
        """Return the model of each part of the partition by model; () if models are assigned round-robin."""
        return tuple(model for each in self.players for model in each.models or (None,)) or self.models

    def kind_indices(self, first: int, count: int) -> NDArray[np.int64]:
        """For each participant first .. first+count-1, return the index of its kind in `players`, as an array."""
        alike = len(self.players) < 2
        return np.zeros(count, np.int64) if alike else self.by_topic[KIND].name_indices(first, count)

    def asking(self, first: int, count: int) -> int:
        """Return how many of the participants first .. first+count-1 ask a model, if any do in this game."""
        kinds = np.array([bool(each.models) for each in self.players] or [True])
        return int(kinds[self.kind_indices(first, count)].sum())

    def texts_per_round(self, keep: str, rounds: int) -> int:
        """Return of how many participants texts are kept in each round. `keep` is the value of --keep-texts."""
        parts = zip(self.part_models, self.by_topic[MODEL].counts, strict=False)
        asking = sum(count for model, count in parts if model is not None) if self.players else self.total
        sizes = {"auto": asking if asking * rounds <= MOST_TEXTS else TEXTS_SAMPLED, "all": asking, "none": 0}
        return min(asking, sizes[keep] if keep in sizes else int(keep))

    def panel(self, keep: str, rounds: int, first: int, count: int) -> NDArray[np.bool_]:
        """Return of which of the participants first .. first+count-1 texts are kept, in all rounds.

        A sample has its share of each combination of kind, personas and model (see `stratified`). Within a combination,
        the sampled participants are equally spaced.
        """
        size = self.texts_per_round(keep, rounds)
        kinds = np.array([bool(each.models) for each in self.players] or [True])  # whether they ask models
        if size in (0, self.texts_per_round("all", rounds)):
            return kinds[self.kind_indices(first, count)] & (size > 0)
        groupings = self.groupings
        while math.prod(len(each.names) for each in groupings) > MOST_STRATA:
            groupings = groupings[:-1]
        strata = Combination(groupings)
        sizes = _sizes(strata, self.total)
        sizes = sizes * np.repeat(kinds, len(sizes) // len(kinds))  # kinds are the first of the groupings
        quotas = np.array(stratified(sizes.tolist(), size), np.int64)
        own, sizes = strata.name_indices(first, count), np.maximum(sizes, 1)
        order, of_stratum = np.argsort(own, kind="stable"), np.bincount(own, minlength=len(sizes))
        ranks = np.empty(count, np.int64)  # of each participant in its stratum, in the order of indices
        ranks[order] = np.arange(count) - np.repeat(np.cumsum(of_stratum) - of_stratum, of_stratum)
        starts = mix(np.arange(len(sizes), dtype=np.uint64) * np.uint64(GAMMA) + np.uint64(self.seed))
        starts = (starts % sizes.astype(np.uint64)).astype(np.int64)
        places = (ranks + _sizes(strata, first)[own]) * quotas[own] + starts[own]
        return places % sizes[own] < quotas[own]

    @property
    def server_models(self) -> list[str]:
        """Return the models that participants ask, by their names on the servers."""
        return [*(each.model for each in self.part_models if each is not None), *self.round_robin_models]

    @property
    def players_in_words(self) -> str:
        """Return the number of players of each kind, such as `200 llm, 800 random`; "" without a mixture."""
        players = zip(_counts(self.total, self.players), self.players, strict=True)
        return listed(f"{count:,} {each.label}" for count, each in players) if self.players else ""

    @cached_property
    def by_topic(self) -> dict[str, Grouping]:
        """Return the partitions of the participants by topic: KIND if kinds are mixed, each persona set, and MODEL.

        A model's label is its name on its server, or that in the models file if several models share the first, for
        example with different temperatures. Kinds and models are one assignment, so that all shares are exact.
        """
        models, counts = self.part_models, _counts(self.total, self.models)
        sets = {
            topic: Grouping(topic, tuple(each.name for each in parts), _counts(self.total, parts), self.seed)
            for topic, parts in self.persona_sets.items()
        }
        if not models:
            return sets | {MODEL: Grouping(MODEL, self.round_robin_models, (), self.seed, block=self.block)}
        if not self.players:
            names = [each.model for each in self.models]
            labels = tuple(each.name if names.count(each.model) > 1 else each.model for each in self.models)
            return sets | {MODEL: Grouping(MODEL, labels, counts, self.seed)}
        kinds = tuple(each.label for each in self.players for _ in each.models or (None,))
        players = zip(self.players, _counts(self.total, self.players), strict=True)
        counts = tuple(part for each, count in players for part in (_counts(count, each.models) or (count,)))
        labels = tuple(NO_MODEL if each is None else each.model for each in models)
        by_model = Grouping(MODEL, labels, counts, self.seed, assigned_by=KIND)
        return {KIND: Grouping(KIND, kinds, counts, self.seed), **sets, MODEL: by_model}


BLOCK = 1024  # number of participants whose parts are computed together and cached
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


def _counts(total: int, parts: Sequence[Persona | ModelShare | PlayerShare]) -> tuple[int, ...]:
    return largest_remainder(total, [each.share for each in parts])


def stratified(sizes: Sequence[int], size: int) -> tuple[int, ...]:
    """Split a sample of `size` participants over strata in proportion to their sizes, by largest remainder.

    If `size` allows it, each stratum that is not empty gets at least 1. A stratum never gets more than its size.
    """
    total = sum(sizes)
    enough = size >= sum(each > 0 for each in sizes)
    least = [int(enough and each > 0) for each in sizes]
    beyond = [max(each * size - one * total, 0) for each, one in zip(sizes, least, strict=True)]  # of its exact share
    whole = max(sum(beyond), 1)
    more = largest_remainder(size - sum(least), [Fraction(each, whole) for each in beyond])
    return tuple(one + other for one, other in zip(least, more, strict=True))


@lru_cache(maxsize=64)
def _sizes(strata: Combination, stop: int) -> NDArray[np.int64]:
    """Return how many of the participants 0 .. stop-1 are in each of the strata."""
    sizes = np.zeros(math.prod(len(each.names) for each in strata.groupings), np.int64)
    for first in range(0, stop, COUNTED_AT_ONCE):
        sizes += np.bincount(strata.name_indices(first, min(COUNTED_AT_ONCE, stop - first)), minlength=len(sizes))
    return sizes


def assign_many(seed: int, topic: str, counts: tuple[int, ...], first: int, count: int) -> NDArray[np.int64]:
    """Assign participants to parts at random: part k gets counts[k] of the participants 0 .. sum(counts)-1.

    Return the part indices of the participants first .. first+count-1, int64 of shape (count,). Assignments for
    different topics are independent. Raises ValueError if a participant is not in 0 .. sum(counts)-1.
    """
    total = sum(counts)
    if first < 0 or first + count > total:  # otherwise, the loop below may not end
        raise ValueError(f"participants {first} to {first + count - 1} are not among {total}")
    key = seed
    for byte in topic.encode():
        key = mix((key + byte + 1) & MASK)
    keys = [mix((key + step * GAMMA) & MASK) for step in range(1, STEPS + 1)]
    half_bits = max((total - 1).bit_length() + 1, 2) // 2  # of the smallest network that permutes 0 .. total-1
    ranks = _permuted(np.arange(first, first + count, dtype=np.uint64), half_bits, keys)
    beyond = np.flatnonzero(ranks >= total)
    while len(beyond):  # cycle walking: permute again until each rank is below `total`
        ranks[beyond] = _permuted(ranks[beyond], half_bits, keys)
        beyond = beyond[ranks[beyond] >= total]
    return np.searchsorted(np.cumsum(counts), ranks.astype(np.int64), side="right").astype(np.int64)


@lru_cache(maxsize=256)
def _parts_in(seed: int, topic: str, counts: tuple[int, ...], block: int) -> list[int]:
    first = block * BLOCK
    return assign_many(seed, topic, counts, first, min(BLOCK, sum(counts) - first)).tolist()


def _permuted(numbers: NDArray[np.uint64], half_bits: int, keys: Sequence[int]) -> Any:
    """Permute numbers from 0 to 4^half_bits - 1 with a balanced Feistel network whose round function is `mix`."""
    low = (1 << half_bits) - 1
    left, right = numbers >> half_bits, numbers & low
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & low)
    return (left << half_bits) | right
