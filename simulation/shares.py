"""Dealing participants out by exact shares, pure: who gets what, the seed decides, by arithmetic alone.

Whoever wants to know what one participant was dealt, of a billion, asks for that one: no list is made, and nothing
depends on where participants sit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def quotas(total: int, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """How many of `total` each share comes to: all of them, each at most one off, the largest remainders rounded up.

    The shares add up to 1.
    """
    exact = [share * total for share in shares]
    counts = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: (counts[place] - exact[place], place))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return tuple(counts)


def dealt(seed: int, topic: str, counts: tuple[int, ...], first: int, count: int) -> NDArray[np.int64]:
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


def dealt_one(seed: int, topic: str, counts: tuple[int, ...], participant: int) -> int:
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
