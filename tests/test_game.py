"""The rules: draws, answers in units, counting them, who is closest."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from games.average import Average
from simulation.errors import Ended, UnusableAnswer
from simulation.game.rules import draw, to_units
from simulation.game.tally import RoundResult, Tally, has_converged, value_counts


def game(seed: int = 7, max_value: int = 100, decimals: int = 0) -> Average:
    return Average(seed, max_value, decimals, 0.0)


def test_draws_equal_known_values():
    assert [draw(game(7), 1, index) for index in range(10)] == [61, 41, 100, 10, 52, 76, 51, 15, 85, 76]
    assert [draw(game(8), 1, index) for index in range(10)] == [77, 41, 33, 8, 87, 52, 78, 34, 73, 47]
    assert [draw(game(7), 2, index) for index in range(6)] == [16, 5, 23, 31, 60, 21]
    assert draw(game(2**64 - 1, 10**9, 6), 10_000, 10**9) == 461585616786214


@pytest.mark.parametrize("seed", [0, 7, 8, 2**32 + 1])
def test_draws_are_uniform_and_independent_of_their_neighbours(seed):
    numbers = [draw(game(seed, 99), 1, index) for index in range(100_000)]
    assert chisquare(np.bincount(numbers, minlength=100)).pvalue > 1e-4
    pairs = np.add(np.multiply(np.array(numbers[:-1]) // 10, 10), np.array(numbers[1:]) // 10)
    assert chisquare(np.bincount(pairs, minlength=100)).pvalue > 1e-4
    rounds = [draw(game(seed, 99), number, 3) for number in range(1, 50_001)]
    assert chisquare(np.bincount(rounds, minlength=100)).pvalue > 1e-4


def test_draws_include_both_bounds():
    numbers = {draw(game(1, 3), 1, index) for index in range(200)}
    assert numbers == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "answer", [None, True, "x", -1, 101, 100.5, float("nan"), float("inf"), [5], 5j, b"5", np.True_]
)
def test_an_unusable_answer_raises_a_known_cause(answer):
    with pytest.raises(UnusableAnswer):
        to_units(answer, game())


@pytest.mark.parametrize(
    ("answer", "units"),
    [
        (0, 0),
        (100, 100),
        (49.5, 50),
        (50.5, 50),
        ("37", 37),
        (np.float64(3), 3),
        (np.int32(4), 4),
        (Decimal("4.5"), 4),
        (Fraction(100, 3), 33),
    ],
)
def test_answers_are_counted_in_whole_units(answer, units):
    assert to_units(answer, game()) == units
    assert type(to_units(answer, game())) is int


@pytest.mark.parametrize("answer", [Decimal("0.575"), Fraction(575, 1000), "0.58", np.int8(1), np.float32(0.5)])
def test_exact_number_types_are_rounded_exactly(answer):
    units = {np.int8(1): 100, np.float32(0.5): 50}.get(answer, 58)
    assert to_units(answer, game(decimals=2)) == units


@given(units=st.integers(0, 10**15), decimals=st.integers(0, 6))
def test_values_convert_back_to_their_units(units, decimals):
    rules = game(max_value=10**9, decimals=decimals)
    units = min(units, 10**9 * rules.scale)
    assert to_units(units / rules.scale, rules) == units


def test_large_sums_are_exact():
    tally = Tally(30_000_000, np.array([10**15 - 1, 10**15]), np.array([10_000_000, 20_000_000]))
    assert tally.total == (10**15 - 1) * 10_000_000 + 10**15 * 20_000_000


def rounds_of(*answers: list[int], ended: Ended = Ended.COMPLETE, error: str = "") -> list[RoundResult]:
    """Return the results of rounds in which each participant gives one of `answers`. `ended` and `error`: the last."""
    tallies = [
        Tally(3, *value_counts(np.array(each)), {"x": 3 - len(each)} if len(each) < 3 else {}) for each in answers
    ]
    tallies[-1] = replace(tallies[-1], ended=ended)
    results = [RoundResult(number, tally) for number, tally in enumerate(tallies, start=1)]
    return [*results[:-1], replace(results[-1], error=error)]


@pytest.mark.parametrize(
    ("results", "limit", "scale", "converged"),
    [
        (rounds_of([10, 20, 30], [10, 20, 30]), 1.0, 1, False),  # two rounds moved only once
        (rounds_of([10, 20, 30], [10, 20, 30], [10, 20, 30]), 1.0, 1, True),
        (rounds_of([10, 20, 30], [10, 20, 30], [10, 20, 30]), None, 1, False),
        (rounds_of([10, 20, 30], [10, 20, 30], [10, 20, 30]), 0.0, 1, False),
        (rounds_of([0, 50, 90], [10, 20, 30], [10, 20, 33], [9, 19, 34]), 1.01, 1, True),
        (rounds_of([10, 20, 30], [10, 20, 33], [10, 20, 36]), 1.0, 1, False),  # the mean moved by exactly 1
        (rounds_of([10, 20, 30], [10, 22, 28], [10, 22, 28]), 2.0, 1, False),  # the median moved by exactly 2
        (rounds_of([10, 20, 30], [10, 22, 28], [10, 22, 28]), 2.1, 1, True),
        (rounds_of([10, 22, 28], [10, 22, 28], [10, 20, 30]), 2.0, 1, False),
        (rounds_of([1, 2, 3], [2, 3, 4], [3, 4, 5]), 0.1, 10, False),  # by exactly 0.1
        (rounds_of([1, 2, 3], [2, 3, 4], [3, 4, 5]), 0.11, 10, True),
        (rounds_of([5], [], [5]), 1.0, 1, False),
        (rounds_of([], [], []), 1.0, 1, False),
        (rounds_of([5], [5], [5], [], [5]), 1.0, 1, False),
        (rounds_of([5], [5], [5], ended=Ended.INTERRUPTED), 1.0, 1, False),
        (rounds_of([5], [5], [5], error="a division by zero"), 1.0, 1, False),
    ],
)
def test_a_game_has_converged_if_mean_and_median_moved_less_in_both_last_rounds(results, limit, scale, converged):
    assert has_converged(results, limit, scale) is converged


def test_a_tally_that_loses_a_participant_is_refused():
    with pytest.raises(ValueError, match="asked 3"):
        Tally(3, np.array([5]), np.array([2]))
