"""Runs beside figures of people: announcing all numbers as in the laboratory, human data, and the comparison."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from games.average import Average
from simulation.errors import SettingsError
from simulation.game.human import HumanData, HumanRound, Row, distance, rows
from simulation.game.population import Population
from simulation.game.tally import Tally, announcement_of, score, value_counts
from simulation.results.reader import SavedRun, read_run
from simulation.results.report_page import draw_all
from simulation.results.run_files import game_to_json, parse_game, parse_people, people_to_json
from simulation.runs.experiment import Experiment
from simulation.runs.human_data import people_beside, read_people
from simulation.runs.run_spec import new_run, resumed_run
from simulation.settings import SimulationConfig

NAGEL = ROOT / "configs/human/nagel_1995.yaml"
CLASS = "source: my course, sheet 3\nratio: 2/3\nnumbers: [0, 22, 22, 33, 67.5]\n"


def tally_of(answers) -> Tally:
    return Tally(len(answers), *value_counts(np.array(answers, np.int64)))


# --- All numbers are announced ---------------------------------------------------------------------------------------


def test_all_numbers_are_announced_if_the_setting_says_so():
    result = score(Average(decimals=1), 1, tally_of([0, 0, 0, 170, 225, 225]))
    silent, full = (announcement_of(result, Average(decimals=1, numbers_announced=each)) for each in (False, True))
    assert full.numbers == ((0.0, 3), (17.0, 1), (22.5, 2))
    assert full.text == f"{silent.text} The numbers were 0 (3 times), 17 and 22.5 (2 times)."
    assert silent == replace(full, numbers=(), text=silent.text)
    alone = score(Average(), 1, tally_of([7]))
    assert announcement_of(alone, Average(numbers_announced=True)).text.endswith(" The numbers were 7.")
    nothing = announcement_of(score(Average(), 1, Tally(0)), Average(numbers_announced=True))
    assert nothing.numbers == () and nothing.text == "Round 1: nobody answered."


def test_a_saved_game_of_ones_own_announces_numbers_as_it_was_played(tmp_path):
    game = Average(numbers_announced=True, population=Population(total=3))
    config = SimulationConfig(game=f"{tmp_path}/own.py:Own", participant_num=3)
    assert parse_game(json.dumps(game_to_json(game)), config).numbers_announced
    assert not parse_game(json.dumps(game_to_json(replace(game, numbers_announced=False))), config).numbers_announced


@pytest.mark.parametrize("settings", [{"decimals": 1}, {"decimals": 6, "participant_num": 1001}, {}])
def test_only_announcements_of_bounded_length_are_accepted(settings):
    config = SimulationConfig(**{"participant_num": 10**6} | settings, set=("numbers_announced=true",), seed=1)
    assert new_run(config).game.numbers_announced
    with pytest.raises(SettingsError, match=r"^--set numbers_announced=true: would list up to 1,002 different numbers"):
        new_run(replace(config, decimals=2, participant_num=1002))


@pytest.mark.parametrize("answers", [range(9_983, 10_001), [each // 2 for each in range(19_966, 19_984)], [9_999] * 18])
def test_the_estimate_counts_announced_numbers(answers):
    config = SimulationConfig(agent_type="llm", participant_num=18, rounds=3, decimals=2, ratio="2/3", seed=1)
    silent, full = (new_run(replace(config, set=(f"numbers_announced={each}",))) for each in ("false", "true"))
    one, other = ([each.prompt_tokens for each in spec.estimate(range(1, 4))] for spec in (silent, full))
    texts = [announcement_of(score(each.game, 1, tally_of(answers)), each.game).text for each in (silent, full)]
    longer = 18 * (len(texts[1]) - len(texts[0])) / 4  # tokens of all participants
    assert other[0] == one[0] and other[1] - one[1] >= longer > 0 and other[2] - one[2] >= 2 * longer


# --- Figures of people -----------------------------------------------------------------------------------------------


def test_the_shipped_figures_name_their_source_and_what_is_uncertain():
    every = {str(each.ratio): each for each in read_people(NAGEL)}
    assert {ratio: each.players for ratio, each in every.items()} == {"1/2": 48, "2/3": 67, "4/3": 51}
    for each in every.values():
        assert (
            "American Economic Review 85(5)" in each.source and "HumanStudy-Bench" in each.extracted and each.uncertain
        )
    half, two_thirds, more = every.values()
    assert [each.rounds[1].mean for each in every.values()] == [27.05, 36.73, 60.12]
    assert [each.rounds[1].median for each in every.values()] == [17, 33, 66]
    assert "gaps" in half.uncertain["steps"] and "gaps" in two_thirds.uncertain["steps"]
    for each in (half, two_thirds):
        assert all(abs(sum(each.rounds[number].steps.values()) - 100) < 0.15 for number in (2, 3, 4))
    assert (
        two_thirds.rounds[4].steps["2"] == 47.8 and two_thirds.learning == 73 and half.median_fall == (0.88, 0.98, 0.97)
    )
    assert [more.rounds[number].chosen["100"] for number in (2, 3, 4)] == [16, 59, 68] and more.moves == (133, 153)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("numbers: [1, 2]", 1, "source is missing"),
        ("source: ' '\nnumbers: [1]", 1, "source must not be empty"),
        (
            "source: x\nnumbers: [1]\nhistogram: {1: 2}",
            3,
            "histogram does not go with numbers",
        ),
        ("source: x", 1, "source needs numbers, a histogram or rounds beside it"),
        ("source: x\nmax_value: 50\nnumbers: [1, 51]", 3, "numbers has 51, which is not from 0 to 50 (max_value)"),
        ("source: x\nhistogram: {-1: 3}", 2, "histogram has -1, which is not from 0 to 100 (max_value)"),
        ("source: x\nhistogram: {5: -3}", 2, "histogram needs counts from 0 to 1,000,000,000"),
        ("source: x\nhistogram: {5: 100000000000000000000}", 2, "histogram needs counts from 0 to 1,000,000,000"),
        ("source: x\nlearning: 730\nrounds: {1: {mean: 5}}", 2, "learning must be from 0 to 100 percent"),
        ("source: x\nrounds: {1: {mean: 500}}", 2, "rounds has a mean or median that is not from 0 to 100"),
        ("source: x\nhistogram: {5: 0}", 2, "histogram needs counts from 0 to 1,000,000,000, and at least one player"),
        ("source: x\nhistogram:\n  5: 2\n  5.0: 3", 2, "histogram has a number twice"),
        ("source: x\nnumbers:\n- 1\n- many", 4, "numbers must be a valid number"),
        ("source: x\nnumbers: [.nan]", 2, "numbers must be a valid number"),
        ("source: x\nratio: two thirds\nnumbers: [1]", 2, "ratio two thirds: must be a number such as 2/3 or 0.51"),
        ("source: x\nround: 0\nnumbers: [1]", 2, "round must be 1 or more"),
        ("source: x\nnumber: [1]", 2, "number is not known here; did you mean numbers?"),
        ("source: x\nrounds:\n  1: {mena: 5}", 3, "mena is not known here; did you mean mean?"),
        ("source: x\nrounds:\n  1: {above: {50: 101}}", 2, "rounds has a round 1 with 101 %; shares are from 0 to 100"),
        ("source: x\nrounds:\n  1: {steps: {4: 1}}", 2, "rounds has other steps than above,"),
        (
            "source: x\ngames:\n- ratio: 1/2\n  numbers: [1]\n- ratio: 0\n  numbers: [1]",
            5,
            "ratio 0: must be from 1/1000000 to 10",
        ),
        ("source: x\ngames: 5", 2, "games must be a list of mappings"),
        ("source: x\nsource: y", 2, "source is already set in line 1"),
    ],
)
def test_an_invalid_file_is_refused_with_its_line(tmp_path, text, line, problem):
    (tmp_path / "people.yaml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_people(tmp_path / "people.yaml")
    assert re.search(rf"people\.yaml, line {line}: {re.escape(problem)}", str(caught.value)), caught.value


def test_numbers_and_a_histogram_of_the_same_people_are_the_same(tmp_path):
    (tmp_path / "numbers.yaml").write_text(CLASS)
    (tmp_path / "histogram.yaml").write_text(re.sub("numbers:.*", "histogram: {22: 2, 0: 1, 33: 1, 67.5: 1}", CLASS))
    one, other = (read_people(tmp_path / f"{name}.yaml")[0] for name in ("numbers", "histogram"))
    assert one.known_rounds() == other.known_rounds()
    steps = {"above": 20, "0": 0, "1": 20, "2": 40, "3": 0, "higher": 20}
    assert one.known_rounds() == {1: HumanRound(mean=28.9, median=22, above={200 / 3: 20}, steps=steps)}
    assert one.size == other.size == 5 and [each.tolist() for each in one.counts] == [[0, 22, 33, 67.5], [1, 2, 1, 1]]


def played_like(**settings) -> tuple[SimulationConfig, Average]:
    config = SimulationConfig(**{"ratio": "2/3", "seed": 1} | settings)
    return config, new_run(config).game


def test_figures_of_the_same_game_are_shown_by_default(tmp_path):
    (tmp_path / "class.yaml").write_text(CLASS)
    own = str(tmp_path / "class.yaml")
    for ratio in ("1/2", "2/3", "4/3"):
        (people,) = people_beside(*played_like(ratio=ratio))
        assert (people.name, people.ratio) == ("nagel_1995", Fraction(ratio))
        assert people_beside(*played_like(ratio=ratio, compare_with="nagel_1995")) == (people,)
    assert people_beside(*played_like(compare_with="none")) == ()
    assert [each.name for each in people_beside(*played_like(compare_with=own))] == ["class"]
    for others in ({"ratio": "3/4"}, {"offset": "5"}, {"max_value": 50}, {"set": ("statistic=median",)}):
        config, game = played_like(**others)
        assert people_beside(config, game) == ()
        for name in ("nagel_1995", own):
            with pytest.raises(SettingsError, match=r"has figures for .*ratio 2/3 and offset 0 with numbers to 100"):
                people_beside(replace(config, compare_with=name), game)
    with pytest.raises(SettingsError, match=r"--compare-with nagel: there is no such file .*did you mean nagel_1995\?"):
        new_run(SimulationConfig(compare_with="nagel"))
    (tmp_path / "class.yaml").write_text(CLASS.replace("ratio: 2/3", "max_value: 90"))  # for any game to 90
    assert people_beside(*played_like(game="lowest_unique", ratio=None, max_value=90, compare_with=own))


def test_an_experiment_file_names_figures_and_gets_the_line_of_an_error(tmp_path):
    (tmp_path / "class.yaml").write_text(CLASS)
    (tmp_path / "runs.yaml").write_text("ratio: [1/2, 2/3]\ncompare_with: class.yaml\n")
    experiment = Experiment(str(tmp_path / "runs.yaml"), {})
    half, two_thirds = experiment.sweep.configs.values()
    assert two_thirds.compare_with == str(tmp_path / "class.yaml")
    assert new_run(two_thirds).people[0].source == "my course, sheet 3"
    with pytest.raises(SettingsError) as caught:
        new_run(half)
    assert "runs.yaml, line 2: compare_with " in str(experiment.with_line(caught.value, half))


# --- Comparing -------------------------------------------------------------------------------------------------------


def test_each_figure_is_compared_in_words():
    first = HumanRound(36.73, 33, {67: 10}, {"1, 100": 5})
    people = {1: first, 2: HumanRound(steps={"above": 12.0, "2": 30.0})}
    more = {"median_fall": (0.4, 0.7), "moves": (163, 200), "learning": 73}
    people = HumanData("x", "y", ratio=Fraction(2, 3), rounds=people, **more)
    tallies = [tally_of([1_000, 3_300, 6_700, 6_701]), tally_of([1_650, 1_650, 0, 1_650])]
    learning = {"above": 3, "below": 1, "agree": 0.9, "factor_agree": 0.5}
    found = rows(people, 100, tallies, [{}, {"steps": {"above": 0.5, "2": 0.3}, "learning": learning}], [3, 0, 4])
    assert [(each.figure, each.round, each.run, each.people, each.difference) for each in found] == [
        ("mean", "1", 44.2525, (36.73,), "7.52 higher than people"),
        ("median", "1", 50, (33,), "17 higher than people"),
        ("dominated numbers above 67", "1", 25, (10,), "15 points higher than people"),
        ("the numbers 1, 100", "1", 0, (5,), "5 points lower than people"),
        ("above step 0", "2", 50, (12,), "38 points higher than people"),
        ("step 2", "2", 30, (30,), "as people"),
        ("fall of the median, as a share", "1 to 2", 0.67, (0.4, 0.7), "between the sessions of people"),
        ("moves down, towards the equilibrium, or none at it", "1 to 2", 75, (81.5,), "6.5 points lower than people"),
        ("moves that agree with learning direction", "1 to 2", 50, (73,), "23 points lower than people"),
    ]
    assert rows(people, 100, tallies[:1], [{}], None) == found[:4]  # the run has one round
    above = Row("fall", "", 0.9, (0.4, 0.7))
    assert above.difference == "0.2 higher than in all sessions of people"
    assert Row("step 1", "2", None, (3,), "%").difference.startswith("unknown")
    assert rows(people, 100, [Tally(0), Tally(0)], [{}, {}], None)[0].run is None


def test_moves_up_count_where_the_ratio_exceeds_1():
    people = HumanData("x", "y", ratio=Fraction(4, 3), rounds={2: HumanRound()}, moves=(9, 10))
    (moved,) = rows(people, 1, [tally_of([5]), tally_of([6])], [{}, {}], [1, 3, 4])
    assert moved.figure.startswith("moves up") and moved.run == 75 and moved.people == (90,)


def test_distributions_are_compared(monkeypatch):
    shifted = HumanData("x", "y", numbers=(5, 6, 8))
    assert distance(shifted, 10, tally_of([0, 10, 30]))["wasserstein"] == pytest.approx(5)
    apart = distance(HumanData("x", "y", histogram={4: 1, 5: 1, 6: 1}), 1, tally_of([1, 2, 3]))
    assert apart == {"wasserstein": pytest.approx(3), "u": 0, "p": pytest.approx(0.1)}  # 2 of 20 orders are as extreme
    many = Tally(2 * 10**6, np.array([33, 34]), np.array([10**6, 10**6]))  # ties whose cubes exceed 64 bits
    assert distance(HumanData("x", "y", numbers=(33, 33, 34, 34)), 1, many)["p"] == pytest.approx(1)
    assert distance(HumanData("x", "y", numbers=(40,) * 20), 1, many)["p"] < 1e-5
    monkeypatch.setattr("simulation.game.human.MOST_TESTED", 5)
    assert {*distance(shifted, 1, tally_of([1, 2, 3]))} == {"wasserstein"}


# --- Reports ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> SavedRun:
    """A run of three rounds of 2/3 of the average, among 40 players."""
    return read_run(Path(shutil.copytree(ROOT / "tests/data/old_runs/two_thirds", tmp_path / "saved")))


def page_of(run: SavedRun) -> str:
    draw_all(run)
    return " ".join((run.path / "report.html").read_text().split())


def test_the_report_shows_source_and_uncertainty_beside_each_figure(saved):
    assert saved.people == () and "Beside people" not in page_of(saved)  # an old run names no figures
    page = page_of(replace(saved, people=people_beside(saved.config, saved.game)))
    assert "<h2>Beside people</h2>" in page and "American Economic Review 85(5), 1313-1326" in page
    assert (
        "<strong>Extracted, not by us:</strong>" in page
        and "<strong>steps:</strong> the classes of people add up" in page
    )
    first = saved.summary["rounds"][0]
    figures = dict(re.findall(r'<tr data-figure="([^"]*)" data-round="1">.*?data-key="run" data-value="([^"]*)"', page))
    assert float(figures["mean"]) == first["average"] and float(figures["median"]) == first["median"]
    share = 100 * sum(row > 67 for row in answers_of(saved, 1)) / 40
    assert float(figures["dominated numbers above 67"]) == pytest.approx(share)
    steps = re.findall(r'<tr data-figure="(step \d)" data-round="([23])">.*?data-value="([\d.]+)"', page)
    assert [each[:2] for each in steps] == [(f"step {step}", f"{number}") for number in (2, 3) for step in range(4)]
    assert "after round 3 are left out" in page and "Wasserstein" not in page


def answers_of(run: SavedRun, number: int) -> list[float]:
    tally = run.results[number - 1].tally
    return np.repeat(tally.units / run.game.scale, tally.counts).tolist()


def test_the_report_compares_a_users_numbers(saved, tmp_path):
    (tmp_path / "class.yaml").write_text(CLASS.replace("my course", "<b>my course</b>"))
    run = replace(saved, people=tuple(read_people(tmp_path / "class.yaml")))
    page = page_of(replace(run, people=parse_people(json.dumps(people_to_json(run.people)))))
    found = {key: float(value) for key, value in re.findall(r'data-key="(wasserstein|u|p)" data-value="([^"]*)"', page)}
    expected = distance(run.people[0], run.game.scale, run.results[0].tally)
    assert found == expected and "40 answers of the run and 5 of people" in page
    assert (
        "&lt;b&gt;my course" in page
        and "does not say how large the difference is" in page
        and "<strong>People</strong>" in page
    )


def test_moves_are_counted_by_participant(saved):
    lower = higher = 0
    for rounds in itertools.pairwise(values_by_round(saved)):
        lower += sum(now < before or now == before == 0 for before, now in zip(*rounds, strict=True))
        higher += sum(now > before or now == before == 100 for before, now in zip(*rounds, strict=True))
    assert saved.moves(3) == [lower, higher, 80] and saved.moves(2)[2] == 40 and lower > 0


def values_by_round(run: SavedRun) -> list[list[float]]:
    table = pq.read_table(run.path / "answers.parquet").to_pylist()
    return [[row["value"] for row in table if row["round"] == number] for number in (1, 2, 3)]


def test_a_resumed_run_may_be_compared_with_another_file(saved, tmp_path):
    (tmp_path / "class.yaml").write_text(CLASS)
    changed = resumed_run(saved.path, {"rounds": 4, "compare_with": str(tmp_path / "class.yaml")})
    assert [each.name for each in changed.people] == ["class"]
    assert {each.name: each.path for each in changed.sources}["class.yaml"] == str(tmp_path / "class.yaml")
    assert [each.name for each in resumed_run(saved.path, {"rounds": 4}).people] == ["nagel_1995"]
