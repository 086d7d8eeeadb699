"""Analyses of the guessing game against known answers. Those of real runs are checked in test_level_k.py."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import poisson

from games.average import Average
from games.minority import Minority
from simulation.game import Game, Rules
from simulation.game.analysis import (
    ANALYSIS_LENGTH,
    MOST_TAU,
    NOTES,
    analyse,
    fit_tau,
    hierarchy_mean,
    learning_direction,
    mean_payoffs,
    reasoning_steps,
)
from simulation.game.tally import RoundResult, Tally, merge, score, value_counts
from simulation.results.run_directory import SUMMARY_BYTES, RunDirectory
from simulation.results.run_files import round_entry

TWO_THIRDS = Fraction(2, 3)
NAMES = ("above", "0", "1", "2", "3", "higher")


def tally_of(numbers, decimals: int = 0) -> Tally:
    units = np.rint(np.array(numbers, float) * 10**decimals).astype(np.int64)
    return Tally(len(units), *value_counts(units))


def analysis_of(game: Average, *rounds, pairs=None):
    """The analysis of the last of several rounds, whose answers are given as numbers."""
    results = [score(game, number, tally_of(each, game.decimals)) for number, each in enumerate(rounds, start=1)]
    return analyse(game, [each.tally for each in results], [each.outcome for each in results], pairs)


# --- Reasoning steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "step"),
    [
        *[(100, "above"), (50.0001, "above"), (50, "above"), (49.9999, "0"), (25, "0"), (24.9999, None)],
        *[(6.25, None), (6.2499, "1"), (1.5625, "1"), (1.5624, None), (0.3907, None), (0.3906, "2"), (0.0977, "2")],
        *[(0.0976, None), (0.0245, None), (0.0244, "3"), (0.0062, "3"), (0.0061, "higher"), (0, "higher")],
    ],
)
def test_intervals_of_steps_are_closed_below_and_open_above(number, step):
    shares = reasoning_steps(
        tally_of([number], 4), 10**4, Fraction(1, 16), Fraction(50)
    )  # p^(1/4) is 1/2: 50, 25, 6.25
    assert shares == {name: float(name == step) for name in NAMES}


@given(
    st.integers(0, 10**6), st.fractions(Fraction(1, 20), Fraction(19, 20), max_denominator=20), st.integers(1, 10**6)
)
def test_steps_agree_with_the_definition_in_floats(units, ratio, reference):
    shares = reasoning_steps(tally_of([units / 10**4], 4), 10**4, ratio, Fraction(reference, 10**4))
    edges = [reference * float(ratio) ** (quarters / 4) for quarters in (0, 1, 3, 5, 7, 9, 11, 13)]
    if all(abs(units - edge) > 1e-6 * edge for edge in edges):
        order = ["above", "0", None, "1", None, "2", None, "3", "higher"]
        found = order[sum(units < edge for edge in edges)]
        assert shares == {name: float(name == found) for name in NAMES}


def test_levels_of_nagel_are_given_back_as_steps():
    counts, game = {0: 100, 1: 300, 2: 400, 3: 150, 4: 50}, Average(1, 100, 4, ratio=TWO_THIRDS)
    for number, reference in ((1, 50.0), (2, 40.0)):
        numbers = [
            reference * (2 / 3) ** step if step else reference * 0.95 for step in counts for _ in range(counts[step])
        ]
        before = [[40.0] * 1000] * (number - 1)
        found = analysis_of(game, *before, numbers)
        assert found["steps"] == {"above": 0, "0": 0.1, "1": 0.3, "2": 0.4, "3": 0.15, "higher": 0.05}
        assert found["between_steps"] == 0


def test_every_answer_is_in_one_class():
    game, numbers = Average(1, 100, 0, ratio=TWO_THIRDS), np.random.default_rng(3).integers(0, 101, 5000)
    for rounds in ([numbers], [numbers, numbers // 2]):
        found = analysis_of(game, *rounds)
        assert sum(found["steps"].values()) + found["between_steps"] == pytest.approx(1, abs=1e-9)


# --- The cognitive hierarchy -----------------------------------------------------------------------------------------


def level_numbers(tau: float, ratio: float, levels: int) -> list[float]:
    """What each level gives, by the definition: `ratio` times the mean of the lower levels in their proportions."""
    numbers = [50.0]
    for level in range(1, levels):
        weights = poisson.pmf(np.arange(level), tau)
        numbers.append(ratio * float(weights @ numbers / weights.sum()))
    return numbers


@pytest.mark.parametrize("ratio", [0.5, 2 / 3, 0.9])
@pytest.mark.parametrize("tau", [0.1, 1, 1.5, 4, 20])
def test_predicted_means_follow_the_definition(tau, ratio):
    numbers = level_numbers(tau, ratio, 120)
    assert hierarchy_mean(tau, ratio, 100) == pytest.approx(float(poisson.pmf(np.arange(120), tau) @ numbers), rel=1e-9)


def test_predicted_means_of_known_cases():
    assert hierarchy_mean(0, 0.5, 100) == 50  # level 0 alone
    means = [hierarchy_mean(tau / 10, 2 / 3, 100) for tau in range(10 * MOST_TAU + 1)]
    assert all(one > following for one, following in pairwise(means))
    # at a small tau there are only levels 0 and 1, which give 50 and p * 50
    assert hierarchy_mean(1e-6, 0.5, 100) == pytest.approx(50 - 25e-6, abs=1e-9)


@pytest.mark.parametrize(("tau", "ratio", "count"), [(1.5, 2 / 3, 400), (0.8, 0.5, 100)])
def test_tau_of_populations_is_in_its_interval(tau, ratio, count):
    within, numbers, estimates = 0, np.array(level_numbers(tau, ratio, 30)), []
    for seed in range(100):
        random = np.random.default_rng(seed)
        levels = random.poisson(tau, count)
        answers = np.where(levels == 0, random.uniform(0, 100, count), numbers[levels])
        found = fit_tau(tally_of(answers, 2), 100, ratio, 100, seed)["tau"]
        within += found["low"] <= tau <= found["high"]
        assert found["low"] <= found["estimate"] <= found["high"]
        estimates.append(found["estimate"])
    assert within >= 90
    assert np.mean(estimates) == pytest.approx(tau, abs=0.1)


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [([60, 70], "the mean is above 50"), ([0, 0], f"any tau up to {MOST_TAU}"), ([30], "a single answer")],
)
def test_no_tau_states_why(numbers, reason):
    found = fit_tau(tally_of(numbers), 1, 2 / 3, 100, 7)
    assert found["tau"] is None and reason in found["tau_reason"]


def test_an_interval_may_end_where_the_model_ends():
    assert fit_tau(tally_of([0, 100]), 1, 2 / 3, 100, 7)["tau"] == {"estimate": 0, "low": 0, "high": None}


def test_many_distinct_answers_are_binned_without_a_visible_difference():
    random = np.random.default_rng(5)
    fine = tally_of(100 * random.random(20_000) ** 2, 6)
    coarse = Tally(fine.asked, *value_counts(np.repeat(fine.units, fine.counts) // 10**6 * 10**6 + 5 * 10**5))
    one, other = (fit_tau(tally, 10**6, 2 / 3, 100, 7)["tau"] for tally in (fine, coarse))
    assert len(fine.units) > 10_000 and len(coarse.units) <= 101
    assert all(one[name] == pytest.approx(other[name], abs=0.01) for name in one)


# --- Other figures ---------------------------------------------------------------------------------------------------


def test_dominated_equilibrium_distance_and_fall():
    game = Average(1, 90, 0, ratio=TWO_THIRDS)  # above 60 is dominated
    first = analysis_of(game, [0, 60, 61, 90])
    assert (first["dominated"], first["at_equilibrium"], first["distance_to_equilibrium"]) == (0.5, 0.25, 52.75)
    assert "fall" not in first and "learning" not in first
    second = analysis_of(game, [0, 60, 61, 90], [0, 0, 30, 30], pairs=())
    assert second["fall"] == {"mean": round(1 - 15 / 52.75, 4), "median": round(1 - 15 / 60.5, 4)}
    assert "tau" not in second and second["at_equilibrium"] == 0.5
    assert analysis_of(game, [0, 0], [0, 3])["fall"] == {"mean": None, "median": None}


def test_learning_direction_of_known_pairs():
    before, after = np.array([10, 10, 20, 30, 30, 30, 40, 20]), np.array([15, 10, 40, 20, 29, 31, 40, 5])
    pairs, alike = [(before[:3], after[:3]), (before[3:], after[3:])], (30.0, 30.0)
    found = learning_direction(pairs, Fraction(20), alike)  # of 30, 30, 30, 40 two go down; of 10, 10 one goes up
    shares = {"went_down": 0.5, "went_up": 0.5, "agree": 0.5}
    assert found == {"above": 4, "below": 2, **shares, "factor_agree": 2 / 6}  # from 30 to 29 may be rounding
    assert learning_direction(pairs, Fraction(41, 2), alike)["below"] == 4  # 20 is below 20.5
    nothing = dict.fromkeys(("went_down", "went_up", "agree", "factor_agree"))
    assert learning_direction([], Fraction(20), alike) == {"above": 0, "below": 0} | nothing


def test_adjustment_factors_are_relative_to_the_mean_that_was_known():
    """A player who halves the last mean keeps the factor, although the number falls."""
    before, after = (
        np.array([2500, 2500, 2500]),
        np.array([1500, 1400, 1700]),
    )  # means 50 and 30: factors 0.5, 0.467, 0.567
    found = learning_direction([(before, after)], Fraction(2000), (50.0, 30.0))
    assert (found["agree"], found["factor_agree"]) == (1, 1 / 3)


@pytest.mark.parametrize(
    "game",
    [
        *[Average(1, 100, 0), Average(1, 100, 0, ratio=Fraction(4, 3)), Minority()],
        *[Average(1, 100, 0, ratio=TWO_THIRDS, offset=Fraction(5))],
        *[Average(1, 100, 0, ratio=TWO_THIRDS, statistic="median")],
    ],
)
def test_other_games_have_no_analysis(game):
    result = score(game, 1, tally_of([0, 1, 1]))
    assert analyse(game, [result.tally], [result.outcome], None) == {}
    assert "analysis" not in round_entry(result, 1)


def test_rounds_without_answers_have_no_analysis():
    game, empty = Average(1, 100, 0, ratio=TWO_THIRDS), RoundResult(1, Tally(2, failures={"x": 2}))
    assert analyse(game, [empty.tally], [empty.outcome], None) == {}
    after = score(game, 2, tally_of([10, 20]))
    found = analyse(game, [empty.tally, after.tally], [{}, after.outcome], ())
    assert found["fall"] == {"mean": None, "median": None}
    assert not {"steps", "learning", "tau"} & found.keys()  # no average was announced before


@given(st.lists(st.integers(0, 100), min_size=2, max_size=60), st.integers(1, 5))
def test_placement_does_not_change_the_analysis(numbers, servers):
    game, whole = Average(1, 100, 0, ratio=TWO_THIRDS), tally_of(numbers)
    parts = merge(tally_of(numbers[start::servers]) for start in range(servers) if numbers[start::servers])
    outcome = score(game, 1, whole).outcome
    assert analyse(game, [parts], [outcome], None) == analyse(game, [whole], [outcome], None)


def test_mean_payoffs_of_parts_are_those_of_the_whole_round():
    game = Average(1, 100, 0, ratio=TWO_THIRDS)
    parts = {"one": tally_of([30, 30, 33, 90]), "other": tally_of([0, 1]), "silent": Tally(1, failures={"x": 1})}
    whole = merge(parts.values())
    result = score(game, 1, whole)  # the average is 30.67, so 30 * 2/3 = 20.4: 30 wins
    assert result.winning_units == (30,)
    assert mean_payoffs(game, whole, result.outcome, parts) == {"one": 0.5, "other": 0, "silent": None}
    assert mean_payoffs(game, whole, {}, parts) == dict.fromkeys(parts)


# --- Games of users --------------------------------------------------------------------------------------------------


class Own(Game):
    returned: str = ""

    def rules(self):
        return Rules("give a number.", "any number", notes={"spread": "How far apart the answers are."})

    def outcome(self, tally):
        return {"answers": tally.answered}

    def payoffs(self, units, outcome):
        return units

    def analyses(self, tallies, outcomes, pairs):
        values = {"spread": Fraction(1, 3), "nested": {"whole": np.int64(3), "none": None}, "text": "x"}
        wrong = {"nan": math.nan, "long": "x" * ANALYSIS_LENGTH, "list": [1]}
        return {self.returned: wrong[self.returned]} if self.returned else values


@pytest.mark.parametrize(
    ("returned", "error"), [("nan", "nan, which is no finite number"), ("long", "characters as JSON"), ("list", "[1]")]
)
def test_what_a_users_game_returns_is_checked(returned, error):
    tally = tally_of([1, 2])
    assert analyse(Own(), [tally], [{"answers": 2}], None) == {
        **{"spread": 0.3333, "nested": {"whole": 3, "none": None}, "text": "x"}
    }
    assert error in analyse(Own(returned=returned), [tally], [{"answers": 2}], None)["error"]


def test_a_summary_that_would_be_too_long_has_no_analyses(tmp_path, monkeypatch):
    monkeypatch.setattr("simulation.results.run_directory.LATEST", tmp_path / "runs/latest")
    directory = RunDirectory(tmp_path / "run")
    entries = [{"failures": {}, "analysis": {"text": "x" * 3000}} for _ in range(100)]
    directory.write_summary({"rounds": entries, "cluster": {"lost": []}})
    directory.close()
    written = (tmp_path / "run/summary.json").read_text()
    assert len(written) < SUMMARY_BYTES and json.loads(written)["rounds"] == [{"failures": {}}] * 100


def test_every_figure_has_a_note():
    game = Average(1, 100, 0, ratio=TWO_THIRDS)
    names = {*analysis_of(game, [1, 2]), *analysis_of(game, [1, 2], [1, 2], pairs=())} - {"tau_reason"}
    assert names == NOTES.keys() == game.rules().notes.keys()
