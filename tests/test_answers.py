"""answers.parquet: columns for what varies between participants, payoffs, and its copy as CSV."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq

from games.minority import Minority

FOUR = ["round", "participant", "value", "failure"]
RANDOM = ("run_simulation.sh", "3", "120", "--sleep-time", "0", "--seed", "7")


def schema_of(cluster) -> pa.Schema:
    return pq.read_schema(cluster.path / "runs/latest/answers.parquet")


def test_a_run_without_differences_has_four_columns(cluster):
    assert cluster.run(*RANDOM).returncode == 0
    schema = schema_of(cluster)
    assert schema.names == FOUR
    settings = json.loads(schema.metadata[b"simulation.settings"])
    assert settings == cluster.summary()["config"] and settings["seed"] == 7


def test_personas_and_teams_are_columns_that_survive_a_resume(cluster):
    flags = ("--agent-class", "examples/level_k.py:LevelK", "--personas", "levels+education", "--teams", "levels")
    assert cluster.run(*RANDOM, *flags, "--rounds", "2").returncode == 0
    schema = schema_of(cluster)
    assert schema.names == [*FOUR, "levels", "education", "team"]
    assert all(pa.types.is_dictionary(schema.field(name).type) for name in schema.names[4:])
    resumed = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "3")
    assert resumed.returncode == 0, resumed.stderr
    rows = cluster.answers()
    assert schema_of(cluster).names == schema.names and len(rows) == 3 * 120
    by_round = [[row["levels"] for row in rows if row["round"] == number] for number in (1, 2, 3)]
    assert by_round[0] == by_round[1] == by_round[2] and len(set(by_round[0])) == 4
    assert all(row["team"] == row["levels"] for row in rows)
    level_1 = {row["value"] for row in rows if row["round"] == 1 and row["levels"] == "level 1"}
    assert level_1 == {50.0}
    report = cluster.run("main.py", "--role", "report", "runs/latest", "--csv")
    assert report.returncode == 0 and "answers.csv" in report.stdout, report.stderr
    with (cluster.path / "runs/latest/answers.csv").open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["participant"], row["education"]) for row in written] == [
        (str(row["participant"]), row["education"]) for row in rows
    ]
    assert [float(row["value"]) for row in written] == [row["value"] for row in rows]


def test_payoffs_are_columns_of_games_other_than_the_default_and_on_request(cluster):
    assert cluster.run(*RANDOM, "--game", "minority").returncode == 0
    (entry,), rows = cluster.summary()["rounds"], cluster.answers()
    assert schema_of(cluster).names == [*FOUR, "payoff", "won"]
    wins = entry["outcome"]["winning_number"]
    assert wins in (Minority.low, Minority.high)
    assert all(row["payoff"] == float(row["value"] == wins) and row["won"] == (row["value"] == wins) for row in rows)
    assert sum(row["won"] for row in rows) == entry["winners"]["count"]
    assert cluster.run(*RANDOM, "--payoffs").returncode == 0
    rows = cluster.answers()
    assert (
        sum(row["won"] for row in rows)
        == sum(row["payoff"] for row in rows)
        == sum(row["value"] in cluster.summary()["rounds"][0]["winning_answers"] for row in rows)
    )


def test_a_failed_answer_has_no_payoff(cluster, tmp_path):
    (tmp_path / "some.py").write_text(
        "from participant import Participant\n\n\nclass Some(Participant):\n    async def answer(self, question):\n"
        "        return 3 if self.index % 3 else 'no'\n"
    )
    done = cluster.run(*RANDOM, "--payoffs", "--agent-class", f"{tmp_path}/some.py")
    assert done.returncode == 4, done.stderr
    for row in cluster.answers():
        failed = row["participant"] % 3 == 0
        assert (row["value"], row["payoff"], row["won"]) == ((None, None, None) if failed else (3.0, 1.0, True))
