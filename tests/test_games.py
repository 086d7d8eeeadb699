"""Games: the shipped ones, one of a user's own, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, one_line
from hypothesis import given
from hypothesis import strategies as st

from games.average import Average
from games.lowest_unique import LowestUnique
from games.minority import Minority
from games.public_goods import PublicGoods
from simulation.game.game import game_class
from simulation.game.population import Population
from simulation.game.rules import draw, game_of, question_for
from simulation.game.tally import Tally, announcement_of, score, value_counts
from simulation.llm.model_configs import read_models
from simulation.llm.prompts import prompt_for, rules
from simulation.runs.experiment import Experiment, Sweep
from simulation.runs.scenario import build_game
from simulation.settings import SimulationConfig

MARKET = '''
import numpy as np
from simulation.game import Game, Rules, setting


class MarketEntry(Game):
    """Each player enters a market or stays out. Players who enter share a pot; staying out pays 1."""

    pot: int = setting(100, "what all who enter share", 1, 10**9)
    low, high = 0, 1
    whole_numbers = True

    def rules(self):
        question = f"stay out (0) or enter (1). All who enter share {self.pot}; staying out pays 1."
        return Rules(question, goal="the highest payoff", labels={"entrants": "number of entrants"})

    def outcome(self, tally):
        return {"entrants": int(tally.counts[tally.units == 1].sum())}

    def payoffs(self, units, outcome):
        return np.where(units == 1, self.pot / max(outcome["entrants"], 1), 1.0)
'''
UNITS = st.lists(st.integers(0, 100), min_size=1, max_size=60)


def tally_of(answers) -> Tally:
    return Tally(len(answers), *value_counts(np.array(answers, np.int64)))


def built(population: int = 0, **settings):
    config = SimulationConfig(**settings)
    return game_of(config, None, Population(total=population))


@pytest.fixture
def market(tmp_path) -> Path:
    (tmp_path / "market.py").write_text(MARKET)
    return tmp_path / "market.py"


# --- Shipped games ---------------------------------------------------------------------------------------------------


def test_each_shipped_game_is_one_class_in_a_short_file():
    files = [path for path in (ROOT / "games").glob("*.py") if path.stem != "__init__"]
    assert {path.stem for path in files} >= {"average", "minority", "public_goods", "lowest_unique"}
    for path in files:
        assert len(path.read_text().splitlines()) <= 70, path
        assert path.read_text().count("(Game):") == 1
        assert game_class(path.stem).__module__ == f"games.{path.stem}"


@given(UNITS, st.fractions(Fraction(1, 100), 3, max_denominator=100), st.fractions(0, 20, max_denominator=7))
def test_the_answers_closest_to_the_winning_number_win(answers, ratio, offset):
    result = score(Average(ratio=ratio, offset=offset), 1, tally_of(answers))
    target = offset + ratio * Fraction(sum(answers), len(answers))
    best = min(abs(each - target) for each in answers)
    assert result.outcome == {"average": Fraction(sum(answers), len(answers)), "winning_number": target}
    assert result.winning_units == tuple(sorted({each for each in answers if abs(each - target) == best}))


@pytest.mark.parametrize(("statistic", "figure", "value"), [("median", "median", 30), ("maximum", "maximum", 90)])
def test_the_winning_number_may_be_a_share_of_another_statistic(statistic, figure, value):
    game = built(set=(f"statistic={statistic}", "ratio=2/3"))
    result = score(game, 1, tally_of([0, 10, 30, 60, 90]))
    assert result.outcome == {figure: value, "winning_number": Fraction(2 * value, 3)}
    assert game.words.goal == f"the number closest to 2/3 of the {figure}"
    assert f"The {figure} of all answers is announced" in question_for(game, 1, ()).text
    assert announcement_of(result, game).text.startswith(f"Round 1: the {figure} was {value}, so the number to be")


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40))
def test_the_side_that_fewer_chose_wins_in_the_minority_game(answers):
    ones = sum(answers)
    result = score(Minority(), 1, tally_of(answers))
    fewer = None if 2 * ones == len(answers) or ones in (0, len(answers)) else int(2 * ones < len(answers))
    assert result.winning_number == fewer and result.winning_units == (() if fewer is None else (fewer,))
    assert result.outcome["share_of_1"] == Fraction(ones, len(answers))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_the_smallest_number_given_once_wins(answers):
    result = score(LowestUnique(), 1, tally_of(answers))
    unique = sorted(each for each in set(answers) if answers.count(each) == 1)
    assert result.winning_units == tuple(unique[:1]) and result.outcome["unique_numbers"] == len(unique)


def test_contributions_to_a_public_good_are_multiplied_and_shared():
    game = PublicGoods(endowment=10, multiplier=1.5, population=Population(total=4))
    tally = tally_of([0, 0, 10, 6])
    result = score(game, 1, tally)
    assert result.outcome == {"average": 4.0, "average_payoff": 12.0}
    assert game.payoffs(tally.units, result.outcome).tolist() == [16.0, 10.0, 6.0] and result.winning_units == (0,)
    assert game.equilibrium() == (0.0,)
    assert replace(game, multiplier=5.0).equilibrium() == (10.0,)


@pytest.mark.parametrize("name", ["average", "minority", "public_goods", "lowest_unique"])
def test_random_answers_are_in_the_range_of_the_game(name):
    game = built(game=name)
    drawn = {draw(game, 1, index) for index in range(3000)}
    assert min(drawn) == game.low and max(drawn) == game.high


@pytest.mark.parametrize("name", ["average", "minority", "public_goods", "lowest_unique"])
def test_shipped_prompts_state_the_rules_of_every_game(name):
    config = SimulationConfig(game=name, agent_type="llm", prompt="step_by_step", participant_num=7)
    game = build_game(config, read_models(config))
    goal_words = {"average": "closest to the average wins", "minority": "fewer players choose wins"}
    text = prompt_for(rules(game), question_for(game, 1, ()), ()).system
    assert goal_words.get(name, "wins.") in text and "{" not in text


def test_a_round_without_a_winner_is_announced():
    game = LowestUnique()
    text = announcement_of(score(game, 1, tally_of([3, 3, 5, 5])), game).text
    assert text == "Round 1: the count of numbers given once was 0; nobody won."


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--game minorty", "--game minorty: there is no such game; did you mean minority? (a game"),
        ("--game none.py:X", "there is no file none.py"),
        ("--game market.py:MarketEntri", "did you mean MarketEntry?"),
        ("--game market.py:MarketEntry --set pott=5", "there is no such parameter; did you mean pot?"),
        ("--game market.py:MarketEntry --set pot=0", "--set pot 0: must be from 1 to 1,000,000,000"),
        ("--game market.py:MarketEntry --set pot=x", "--set pot 'x': must be a whole number"),
        ("--game market.py:MarketEntry --set pot=1 --set pot=2", "pot is set twice"),
        ("--game market.py:MarketEntry --set pot", "must be name=value"),
        ("--game market.py:MarketEntry --ratio 2/3", "--ratio 2/3: the game market.py:MarketEntry has no such setting"),
        ("--game market.py:MarketEntry --max-value 5", "--max-value 5: the numbers of this game are from 0 to 1"),
        ("--game minority --decimals 1", "has whole numbers only"),
        ("--set statistic=mode", "must be one of mean, median, maximum"),
        ("--ratio 1/2 --set ratio=2/3", "--ratio: is given as 1/2 and as 2/3"),
        ("--game lowest_unique --max-value 1", "its numbers are from 1 to 1"),
        ("--game bad.py:OneNumber", "its numbers are from 3 to 3"),
        ("--game bad.py:Shape", "no result if all players give 0: ValueError: payoffs returned an array of shape ()"),
        ("--game bad.py:NotANumber", "payoffs returned nan for an answer"),
        ("--game bad.py:Raises", "no result if all players give 0: KeyError: 'x'"),
        ("--game bad.py:Texts", "its rules need a question and a goal"),
        ("--game bad.py:Fractions", "payoffs returned int in an array of object, not float or int"),
        ("--game bad.py:Exits", "no result if all players give 0: SystemExit: 0"),
        ("--game bad.py:Sorts", "read-only"),
        ("--game bad.py:Shifts", "read-only"),
        ("--game bad.py:NoFigures", "outcome returned 5, not a dictionary"),
        ("--game bad.py:NoRules", "rules returned None, not Rules(question, goal)"),
        ("--game bad.py:Figure", "the figure of_all of the outcome is 'many'"),
    ],
)
def test_unusable_games_and_settings_are_refused(command, tmp_path, monkeypatch, market, flags, words):
    bad = MARKET.replace("class MarketEntry", "class Base") + (
        "\nclass OneNumber(Base):\n  low, high = 3, 3\n"
        "class Shape(Base):\n  def payoffs(self, units, outcome): return np.int64(3)\n"
        "class NotANumber(Base):\n  def payoffs(self, units, outcome): return units * np.nan\n"
        "class Raises(Base):\n  def outcome(self, tally): return {}['x']\n"
        "class Texts(Base):\n  def rules(self): return Rules('q', '')\n"
        "class Fractions(Base):\n  def payoffs(self, units, outcome): return units.astype(object)\n"
        "class Exits(Base):\n  def outcome(self, tally): raise SystemExit(0)\n"
        "class Sorts(Base):\n  def outcome(self, tally): tally.counts.sort(); return {}\n"
        "class Shifts(Base):\n  def payoffs(self, units, outcome): units -= units % 2; return units\n"
        "class NoFigures(Base):\n  def outcome(self, tally): return 5\n"
        "class NoRules(Base):\n  def rules(self): return None\n"
        "class Figure(Base):\n  def outcome(self, tally): return {'of_all': 'many'}\n"
    )
    (tmp_path / "bad.py").write_text(bad)
    monkeypatch.chdir(tmp_path)
    status, err = command(*flags.split())
    assert status == 2 and words in one_line(err), err


# --- On real servers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("minority", "public_goods")), "lowest_unique"]
)
def test_a_shipped_game_is_played_and_reported(cluster, name):
    maximum = ("--max-value", "300") if name == "lowest_unique" else ()
    done = cluster.run("run_simulation.sh", "3", "200", "--game", name, "--rounds", "2", "--sleep-time", "0", *maximum)
    assert done.returncode == 0, done.stderr
    summary, game = cluster.summary(), built(game=name, max_value=300 if maximum else 100, population=200)
    answers = cluster.answers()
    for entry in summary["rounds"]:
        values = [row["value"] for row in answers if row["round"] == entry["round"]]
        result = score(game, entry["round"], tally_of([int(value) for value in values]))
        assert entry["outcome"] == {key: None if each is None else float(each) for key, each in result.outcome.items()}
        wins = [f"P{index}" for index, value in enumerate(values) if value in result.winning_units]
        assert entry["winners"]["participants"] == wins[:10] and entry["winners"]["count"] == len(wins)
    assert game.words.goal in done.stdout
    report = cluster.run("main.py", "--role", "report", "runs/latest")
    assert report.returncode == 0 and game.words.goal in report.stdout, report.stderr
    assert game.words.goal in (cluster.path / "runs/latest/report.html").read_text()


def test_a_game_outside_the_checkout_is_played_reported_resumed_and_swept(checkout, market):
    """This checkout has no other game: the engine needs none."""
    shutil.rmtree(checkout.path / "games")
    flags = ("--game", f"{market}:MarketEntry", "--sleep-time", "0", "--seed", "7")
    played = checkout.run("run_simulation.sh", "2", "100000", *flags, "--set", "pot=40000")
    assert played.returncode == 0, played.stderr
    (entry,) = checkout.summary()["rounds"]
    entered = sum(checkout.values())
    assert entry["outcome"] == {"entrants": entered} and entry["winning_number"] is None
    assert checkout.summary()["config"]["set"] == {"pot": 40000}
    winner = 1.0 if 40000 / entered > 1 else 0.0
    assert entry["winners"]["count"] == checkout.values().count(winner)
    assert f"Moderator: The number of entrants is {int(entered):,} " in played.stdout
    market.write_text("raise ValueError('the run keeps a copy of what was here')")
    resumed = checkout.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "2")
    assert resumed.returncode == 0 and len(checkout.summary()["rounds"]) == 2, resumed.stderr
    for flag in ("--csv", "--trust"):
        report = checkout.run("main.py", "--role", "report", "runs/latest", flag)
        assert report.returncode == 0 and "the highest payoff" in report.stdout, report.stderr
    market.write_text(MARKET)
    (checkout.path / "x.yaml").write_text(
        f"game: {market}:MarketEntry\nset: {{pot: [40, 80]}}\nparticipant_num: 100\nsleep_time: 0\n"
    )
    swept = checkout.run("run_simulation.sh", "--experiment", "x.yaml")
    assert swept.returncode == 0 and "pot" in swept.stdout, swept.stderr
    runs = sorted((checkout.path / "runs/latest").glob("*/summary.json"))
    assert [json.loads(path.read_text())["config"]["set"] for path in runs] == [{"pot": 40}, {"pot": 80}]


def test_a_game_that_fails_in_a_round_ends_the_run_with_its_answers(cluster, tmp_path):
    fails = "if len(tally.units) > 2: raise ArithmeticError('too many')\n        return {"
    (tmp_path / "failing.py").write_text(MARKET.replace("return {", fails).replace("high = 0, 1", "high = 0, 50"))
    flags = ("--game", f"{tmp_path}/failing.py:MarketEntry", "--rounds", "3", "--sleep-time", "0")
    done = cluster.run("run_simulation.sh", "3", "40", *flags)
    assert done.returncode == 4 and "ArithmeticError: too many" in done.stdout, done.stderr
    assert re.search(
        r"ArithmeticError: too many \(failing.py, line \d+\): the game ends after round 1 of 3", done.stderr
    )
    summary = cluster.summary()
    assert summary["status"] == "partial" and len(summary["rounds"]) == 1 and len(cluster.answers()) == 40
    assert summary["rounds"][0]["error"] in done.stderr and summary["rounds"][0]["answered"] == 40
    assert summary["rounds"][0]["outcome"] == {} and summary["rounds"][0]["winners"]["count"] == 0
    report = cluster.run("main.py", "--role", "report", "runs/latest")
    assert report.returncode == 0 and "ArithmeticError: too many" in report.stdout, report.stderr
    page = " ".join((cluster.path / "runs/latest/report.html").read_text().split())
    assert 'class="alert">The game has no result of round 1: ArithmeticError: too many' in page
    assert "gave no usable answer" not in page and "every participant gave a usable answer" in page


def test_a_report_does_not_run_the_code_of_a_game_unless_it_is_trusted(cluster, tmp_path):
    file, witness = tmp_path / "mine.py", tmp_path / "executed"
    file.write_text(f"{MARKET}\nopen({str(witness)!r}, 'a').write('x')\n")
    played = cluster.run("run_simulation.sh", "3", "50", "--game", f"{file}:MarketEntry", "--sleep-time", "0")
    assert played.returncode == 0, played.stderr
    page = (cluster.path / "runs/latest/report.html").read_text()
    witness.unlink()
    report = cluster.run("main.py", "--role", "report", "runs/latest")
    assert report.returncode == 0 and not witness.exists(), report.stderr
    assert (cluster.path / "runs/latest/report.html").read_text() == page
    trusted = cluster.run("main.py", "--role", "report", "runs/latest", "--trust")
    assert trusted.returncode == 0 and witness.exists(), trusted.stderr
    assert trusted.stdout == report.stdout


def test_parameters_in_an_experiment_are_swept_and_checked_with_their_line(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "game: public_goods\nset: {multiplier: [1, 2]}\nparticipant_num: 10\n"
    (tmp_path / "x.yaml").write_text(text)
    sweep = Experiment("x.yaml", {}).sweep
    assert [*sweep.configs] == ["01-multiplier=1", "02-multiplier=2"]
    assert [sweep.label_of(config) for config in sweep.configs.values()] == ["multiplier 1", "multiplier 2"]
    assert Sweep.from_json(json.loads(json.dumps(sweep.to_json()))) == sweep
    flags = Experiment("x.yaml", {"set": ("multiplier=3",)}).sweep
    assert [config.set for config in flags.configs.values()] == [("multiplier=3",)]
    for wrong, words in {
        "{multiplier: [1, x]}": "x.yaml, line 2: multiplier 'x': must be a number",
        "{multiplyer: 1}": "x.yaml, line 2: multiplyer=1: there is no such parameter; did you mean multiplier?",
        "[multiplier]": "x.yaml, line 2: set must be a mapping",
        "{multiplier: }": "x.yaml, line 2: multiplier has no value",
        "{ratio: 1/2}": "x.yaml, line 2: ratio 1/2: the game public_goods has no such setting",
    }.items():
        (tmp_path / "x.yaml").write_text(text.replace("{multiplier: [1, 2]}", wrong))
        status, err = command("--experiment", "x.yaml")
        assert status == 2 and words in one_line(err), err


def test_a_changed_game_is_reported_if_surrogates_draw_from_an_earlier_run(cluster, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MARKET)
    game = ("--game", f"{file}:MarketEntry", "--sleep-time", "0")
    cluster.play("3", "20", *game, "--run-dir", "runs/recorded")
    command = ("run_simulation.sh", "3", "20", *game, "--players", "surrogate:runs/recorded", "--dry-run")
    same = cluster.run(*command)
    assert same.returncode == 0 and "has changed" not in same.stderr, same.stderr
    file.write_text(f"{MARKET}\n# another version\n")
    other = cluster.run(*command)
    assert other.returncode == 0 and f"{file} has changed since run " in other.stderr, other.stderr
