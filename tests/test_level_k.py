"""A known strategy, as a person writes it: the averages of its rounds follow theory to the digit."""

from __future__ import annotations

import json
import re
from fractions import Fraction

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, one_line, until

from games.average import Average
from simulation.game.analysis import reasoning_steps
from simulation.game.rules import draw
from simulation.game.tally import Tally, value_counts
from simulation.results.reader import read_run

COUNT, ROUNDS, DECIMALS = 1000, 5, 6
LEVEL_K = ("--agent-class", "examples/level_k.py:LevelK", "--sleep-time", "0", "--seed", "7")
THINKERS = """
levels:
  - {name: level 1, share: 1/2}
  - {name: level 2, share: 0.3}
  - {name: level 3, share: 1/5}
"""


def played_by_levels(ratio, offset, heard, level):
    """What level k answers, in units: the rule of the game, applied k times."""
    number = heard
    for _ in range(level):
        number = offset + ratio * number
    return round(float(number) * 10**DECIMALS)


@pytest.mark.parametrize(("ratio", "offset"), [("2/3", "0"), ("1/2", "5"), ("51/100", "0")])
def test_averages_equal_theory(cluster, tmp_path, ratio, offset):
    (tmp_path / "thinkers.yaml").write_text(THINKERS)
    flags = (*LEVEL_K, "--personas", "levels", "--personas-file", str(tmp_path / "thinkers.yaml"))
    game = ("--ratio", ratio, "--offset", offset, "--rounds", str(ROUNDS), "--decimals", str(DECIMALS))
    summary = cluster.play("3", str(COUNT), *flags, *game)
    rule = Fraction(ratio), Fraction(offset)
    shares = {1: 500, 2: 300, 3: 200}
    heard, exact = Fraction(50), Fraction(50)
    for entry in summary["rounds"]:
        units = sum(count * played_by_levels(*rule, heard, level) for level, count in shares.items())
        assert entry["average"] == float(Fraction(units, COUNT * 10**DECIMALS))
        assert entry["winning_number"] == float(rule[1] + rule[0] * Fraction(units, COUNT * 10**DECIMALS))
        heard = Fraction(entry["average"])
        # without the rounding of the answers: the closed form, round after round
        one, two, three = (rule[0] ** k * exact + rule[1] * sum(rule[0] ** j for j in range(k)) for k in (1, 2, 3))
        exact = one / 2 + two * Fraction(3, 10) + three / 5
        assert entry["average"] == pytest.approx(float(exact), abs=ROUNDS / 10**DECIMALS)
    equilibrium = rule[1] / (1 - rule[0])
    averages = [entry["average"] for entry in summary["rounds"]]
    assert abs(averages[-1] - equilibrium) < abs(averages[0] - equilibrium) / 8


def test_level_0_adds_the_random_draw(cluster):
    flags = (*LEVEL_K, "--personas", "levels", "--ratio", "2/3", "--decimals", str(DECIMALS), "--rounds", "2")
    summary = cluster.play("3", str(COUNT), *flags)
    run = read_run(cluster.path / "runs/latest")
    (parts,) = run.game.population.groupings
    levels = [int(parts.names[place].removeprefix("level ")) for place in parts.name_indices(0, COUNT)]
    game, heard = Average(7, 100, DECIMALS, 0.0), Fraction(50)
    for entry in summary["rounds"]:
        units = [
            played_by_levels(Fraction(2, 3), Fraction(0), heard, level) if level else draw(game, entry["round"], index)
            for index, level in enumerate(levels)
        ]
        assert entry["average"] == float(Fraction(sum(units), COUNT * 10**DECIMALS))
        heard = Fraction(entry["average"])
        tallies = run.tallies_by_part["levels"][entry["round"] - 1]
        assert {name: tally.asked for name, tally in tallies.items()} == dict(
            zip(parts.names, parts.counts, strict=True)
        )
        assert tallies["level 1"].units.tolist() == [
            played_by_levels(Fraction(2, 3), 0, heard_before(summary, entry), 1)
        ]


def heard_before(summary, entry):
    """What was announced before a round; 50 before the first."""
    return Fraction(50) if entry["round"] == 1 else Fraction(summary["rounds"][entry["round"] - 2]["average"])


def test_personas_do_not_depend_on_servers_or_dispatch(cluster):
    flags = (*LEVEL_K, "--personas", "levels+education", "--ratio", "2/3", "--decimals", "2", "--rounds", "2")
    whole = cluster.play("3", "200", *flags)
    answers = cluster.answers()
    alone = cluster.play("3", "200", *flags, "--dispatch", "agent")
    assert cluster.answers() == answers
    assert [each["average"] for each in alone["rounds"]] == [each["average"] for each in whole["rounds"]]


def test_a_class_without_its_personas_names_them(cluster):
    summary = cluster.play("3", "10", *LEVEL_K, status=4)
    (cause,) = summary["rounds"][0]["failures"]
    assert "--personas levels" in cause


def test_analyses_equal_those_of_the_saved_answers(cluster):
    flags = (*LEVEL_K, "--personas", "levels", "--ratio", "2/3", "--decimals", "2", "--rounds", "3", "--run-dir")
    summary = cluster.play("3", "400", *flags, str(cluster.path / "runs/analysed"))
    path = cluster.path / "runs/analysed"
    written = json.loads((path / "analysis.json").read_text())
    table = pq.read_table(path / "answers.parquet")
    values = {
        each: table.filter(np.array(table["round"]) == each)["value"].to_numpy().astype(float) for each in (1, 2, 3)
    }
    levels = np.array(table.filter(np.array(table["round"]) == 1)["levels"].to_pylist())
    for entry, parts in zip(summary["rounds"], written["rounds"], strict=True):
        number, found = entry["round"], entry["analysis"]
        assert found.items() <= parts.items() and parts["mean_payoff"] == entry["winners"]["count"] / 400
        units = np.rint(values[number] * 100).astype(np.int64)
        expected = Tally(400, *value_counts(units))
        reference = Fraction(50) if number == 1 else Fraction(summary["rounds"][number - 2]["average"])
        steps = reasoning_steps(expected, 100, Fraction(2, 3), reference)
        assert found["steps"] == {name: round(share, 4) for name, share in steps.items()}
        assert set(parts["by"]["levels"]) == {"level 0", "level 1", "level 2", "level 3"}
        assert parts["by"]["levels"]["level 2"]["steps"]["2"] == 1
        if number > 1:
            before, after, won = values[number - 1], values[number], summary["rounds"][number - 2]["winning_number"]
            above, below = before > won, before < won
            for who, learned in ((levels != "", found), (levels == "level 0", parts["by"]["levels"]["level 0"])):
                went_down, went_up = (after < before)[above & who], (after > before)[below & who]
                known = {name: each for name, each in learned["learning"].items() if name != "factor_agree"}
                assert known == {
                    **{"above": len(went_down), "below": len(went_up)},
                    "went_down": pytest.approx(went_down.mean(), abs=1e-4),
                    "went_up": pytest.approx(went_up.mean(), abs=1e-4),
                    "agree": pytest.approx(np.concatenate([went_down, went_up]).mean(), abs=1e-4),
                }
    tau = summary["rounds"][0]["analysis"]["tau"]
    assert tau["low"] <= tau["estimate"] <= tau["high"]
    resumed = cluster.run("run_simulation.sh", "--resume", str(path), "--rounds", "4")
    assert resumed.returncode == 0, resumed.stderr
    longer = json.loads((path / "summary.json").read_text())["rounds"]
    assert [each["analysis"] for each in longer[:3]] == [each["analysis"] for each in summary["rounds"]]
    assert longer[3]["analysis"]["learning"]["above"] > 0
    run = read_run(path)
    assert [dict(each.analysis) for each in run.results] == [each["analysis"] for each in longer]


def test_the_example_of_the_documentation_is_what_is_played(cluster):
    summary = cluster.play("3", "1000", "--experiment", "configs/experiments/two_thirds.yaml")
    lines = (ROOT / "docs/analysis.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == ["1", "2", "5"]
    for number, average, *figures in rows:
        entry = summary["rounds"][int(number) - 1]
        found = entry["analysis"]
        every = [*found["steps"].values(), found["between_steps"], found["dominated"]]
        every += [found.get("fall", {}).get("mean"), found.get("learning", {}).get("agree")]
        assert average == f"{entry['average']:.2f}"
        assert figures == ["" if each is None else f"{each:.3f}" for each in every]
    assert (summary["rounds"][0]["analysis"]["tau"]) == {"estimate": 1.7552, "low": 1.5916, "high": 1.9144}


def test_mean_payoffs_by_kind_equal_those_of_the_answers(cluster):
    mixture = f"random=1/4,{ROOT}/examples/level_k.py:LevelK=3/4"
    cluster.play(
        "3", "200", "--players", mixture, "--personas", "levels", "--payoffs", "--ratio", "1/2", "--sleep-time", "0"
    )
    path = cluster.path / "runs/latest"
    table = pq.read_table(path / "answers.parquet")
    parts = json.loads((path / "analysis.json").read_text())["rounds"][0]["by"]
    for topic in ("kind", "levels"):
        labels, payoffs = np.array(table[topic].to_pylist()), table["payoff"].to_numpy()
        expected = {label: payoffs[labels == label].mean() for label in set(labels)}
        assert {name: each["mean_payoff"] for name, each in parts[topic].items()} == pytest.approx(expected, rel=1e-3)


def test_averages_of_teams_are_announced(cluster):
    flags = (*LEVEL_K, "--personas", "levels", "--teams", "levels", "--ratio", "2/3", "--decimals", "2")
    done = cluster.run("run_simulation.sh", "3", "300", *flags, "--rounds", "2")
    assert done.returncode == 0, done.stderr
    run = read_run(cluster.path / "runs/latest")
    lines = [line for line in done.stdout.splitlines() if "teams' averages" in line]
    assert len(lines) == 2
    for result, line, tallies in zip(run.results, lines, run.tallies_by_part["levels"], strict=True):
        averages = {name: tally.average() / 100 for name, tally in tallies.items()}
        assert dict(result.teams) == averages
        assert all(f"{name} {float(average):.5f}" in line for name, average in averages.items())
        closest = min(averages, key=lambda name: abs(averages[name] - result.winning_number))
        assert line.endswith(f"; {closest} is closest.")
    unknown = cluster.run("run_simulation.sh", "3", "300", *LEVEL_K, "--personas", "levels", "--teams", "model")
    assert unknown.returncode == 2 and "--teams model" in one_line(unknown.stderr)


def test_a_run_killed_in_its_first_round_is_reported_and_resumed(cluster):
    flags = ("--personas", "levels", "--teams", "levels", "--seed", "7", "--rounds", "2")
    run = cluster.path / "runs/killed"
    play = cluster.start("run_simulation.sh", "3", "60", *flags, "--sleep-time", "60", "--run-dir", str(run))
    until((run / "summary.json").exists, 60, "it has begun")
    play.kill()
    play.communicate()
    report = cluster.run("main.py", "--role", "report", str(run))
    assert report.returncode == 0 and "is interrupted: 0 of 2 rounds" in report.stdout, report.stderr
    assert "0 of 2 rounds" in (run / "report.html").read_text()
    resumed = cluster.run("run_simulation.sh", "--resume", str(run), "--sleep-time", "0")
    assert resumed.returncode == 0 and resumed.stdout.count("teams' averages") == 2, resumed.stderr
