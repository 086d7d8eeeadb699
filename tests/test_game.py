"""The rules: draws, reading answers, counting them, who is closest."""

from __future__ import annotations

import contextlib
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from simulation.errors import UnusableAnswer
from simulation.game import (
    Game,
    Tally,
    draw,
    to_units,
)
from simulation.reading import TEXT_READ, parse_number


def game(seed: int = 7, max_value: int = 100, decimals: int = 0) -> Game:
    return Game(seed, max_value, decimals, 0.0)


def test_draws_are_the_known_ones():
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


def test_draws_reach_both_ends():
    numbers = {draw(game(1, 3), 1, index) for index in range(200)}
    assert numbers == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("49.5", 49.5),
        ("between 0 and 100 I choose 37", 37),
        ("37 of 100", 37),
        ("37 out of 100", 37),
        ("37/100", 37),
        ("I pick 12, not 40", 12),
        ("0-100: 55", 55),
        ("From 0 to 100, my answer is 66.", 66),
        ("1,000", 1000),
        ("-5", -5),
        ("The number is **42**", 42),
        ("7 and again 7", 7),
        ("1e2", 100),
        (".5", 0.5),
        ('{"number": ".5"}', 0.5),
        ("−5", -5),
        ("0−100: 12", 12),
        ("37%", 37),
        ("Well...37.", 37),
        ("my choice — 37!", 37),
        ("我选择37。", 37),
        ("<answer>37</answer>", 37),
        ("I choose from 0 to 100: 37", 37),
        ("I would not pick 40 or 41, I pick 37", 37),
        ("not 40 but 37", 37),
        ("In the 2nd round I choose 37", 37),
        ("10 million reasons, and I choose 37", 37),
    ],
)
def test_a_text_holds_one_number(text, number):
    assert parse_number(text) == number


NO_ONE_NUMBER = ["", "none", "I like 3 and 7", "between 0 and 100", "1" * 19_999, "7" + " " * 20_000]
NO_ONE_NUMBER += ["I choose 37 or 38", "I pick 37, 38, or 39", "I will not pick 37", "I won't say 37 or 38"]
NO_ONE_NUMBER += ["I choose 2/3 of the average", "I choose 2/3 of 50", "5 plus 5", "5*5", "5,5", "1,0000", "1.2.3"]


@pytest.mark.parametrize("text", NO_ONE_NUMBER)
def test_a_text_without_one_number_is_unusable(text):
    with pytest.raises(UnusableAnswer):
        parse_number(text)


@given(
    number=st.one_of(st.integers(0, 10**9), st.decimals(0, 1000, places=2)),
    before=st.sampled_from(["", "**", "“", "[", "=", "#", "$", "I choose ", "Answer: ", "My number\tis\n", "答案是"]),
    after=st.sampled_from(["", ".", "!", "**", "”", "]", ", I think", " of 1,000", " out of 100", "/100", " (final)"]),
)
def test_a_number_is_read_in_many_surroundings(number, before, after):
    assert parse_number(f"{before}{number}{after}") == float(number)


ODD_BEFORE = [
    "–",
    "- ",
    "– ",
    "− ",
    "minus ",
    "Negative ",
    "P",
    "x",
    "√",
    "±",
    "٫",
    ",",
    "½",
    "²",
    "负",
    "half of ",
    "than ",
]
ODD_AFTER = [
    "k",
    "½",
    " ¾",
    "²",
    "m",
    "th",
    " million",
    " Thousand",
    " k",
    " billions",
    " dozen",
    " point five",
    "e",
    "x3",
]


@given(
    number=st.one_of(st.integers(0, 10**9), st.decimals(0, 1000, places=2)),
    odd=st.sampled_from([(before, "") for before in ODD_BEFORE] + [("", after) for after in ODD_AFTER]),
    around=st.sampled_from(["{}", "I choose {}", '{{"number": "{}"}}', "it is {}.", "{}, as 37"]),
)
def test_a_number_that_may_be_part_of_another_is_not_made_up(number, odd, around):
    with pytest.raises(UnusableAnswer):
        parse_number(around.format(odd[0] + str(number) + odd[1]))


@pytest.mark.parametrize(
    "piece",
    [
        "1",
        "1 ",
        "1,",
        "1.",
        ".",
        "-",
        "- ",
        "1 - ",
        "1e1",
        "1,111,",
        "not ",
        "not 1, ",
        "not be ",
        "minus 1 ",
        "1 to ",
        "/11",
    ]
    + [
        "choose 1 or ",
        "from 1 to ",
        "between 1 and ",
        "number is: ",
        "1 million ",
        "½",
        "P1",
        "9" * 30 + ".9e999 to ",
        "٣",
    ],
)
def test_no_text_holds_up_a_server(piece):
    texts = [(begin + piece * TEXT_READ)[: TEXT_READ - 1] + end for begin in ("", "1", "not 1") for end in ("1", "x")]
    for text in texts:
        began = time.process_time()
        with contextlib.suppress(UnusableAnswer):
            parse_number(text)
        assert time.process_time() - began < 1  # 0.1 s at most here; quadratic in time would be minutes


@pytest.mark.parametrize(
    "answer", [None, True, "x", -1, 101, 100.5, float("nan"), float("inf"), [5], 5j, b"5", np.True_]
)
def test_an_unusable_answer_is_no_number(answer):
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
def test_exact_numbers_are_rounded_as_exactly(answer):
    units = {np.int8(1): 100, np.float32(0.5): 50}.get(answer, 58)
    assert to_units(answer, game(decimals=2)) == units


@given(units=st.integers(0, 10**15), decimals=st.integers(0, 6))
def test_a_value_finds_back_to_its_units(units, decimals):
    rules = game(max_value=10**9, decimals=decimals)
    units = min(units, 10**9 * rules.scale)
    assert to_units(units / rules.scale, rules) == units


def test_large_sums_are_exact():
    tally = Tally(30_000_000, np.array([10**15 - 1, 10**15]), np.array([10_000_000, 20_000_000]))
    assert tally.total == (10**15 - 1) * 10_000_000 + 10**15 * 20_000_000


def test_a_tally_that_loses_someone_is_refused():
    with pytest.raises(ValueError, match="asked 3"):
        Tally(3, np.array([5]), np.array([2]))
