"""Run folders of earlier versions (tests/data/old_runs) are read, reported and resumed in another checkout."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, Checkout, one_line
from fake_model import ANSWER_TOKENS, PROMPT_TOKENS, FakeModel

from games.average import Average
from simulation.errors import Ended, SettingsError
from simulation.game.rules import draw
from simulation.results import comparison
from simulation.results.reader import read_run, runs_in
from simulation.rpc.cluster_key import load_or_make
from simulation.runs.session import session_of
from simulation.settings import SimulationConfig

OLD_RUNS = ROOT / "tests/data/old_runs"
CLASS_BEFORE = "/srv/simulation/examples/level_k.py:LevelK"  # the absolute path in two_thirds
EXPERIMENT = json.loads((OLD_RUNS / "sweep/sweep.json").read_text())["experiment"]
COLUMNS = ["round", "participant", "value", "failure"]
LEVEL_K = "examples/level_k.py:LevelK"
FOLDERS = sorted(path.parent.relative_to(OLD_RUNS).as_posix() for path in OLD_RUNS.glob("**/summary.json"))
SINGLE_RUNS = [name for name in FOLDERS if "/" not in name]
ROUNDS_PLAYED = {
    "interrupted": 2,
    "killed": 2,
    "language_model": 2,
    "level_k": 3,
    "random": 3,
    "two_thirds": 3,
    "sweep/01-ratio=1-2,seed=1": 2,
    "sweep/02-ratio=1-2,seed=2": 2,
    "sweep/03-ratio=2-3,seed=1": 1,  # round 2 is in the summary, but was interrupted
}
# A fresh game of level_k, and of two_thirds
FRESH_LEVEL_K = (
    *("3", "40", "--decimals", "2", "--ratio", "2/3", "--seed", "1", "--sleep-time", "0"),
    *("--agent-class", LEVEL_K, "--personas", "levels"),
)


def answers_in(folder: Path) -> list[dict[str, Any]]:
    """The rows of answers.parquet, or of the files per round of a run that was killed: the columns of all versions."""
    files = [folder / "answers.parquet"]
    files = files if files[0].exists() else sorted(folder.glob("answers-*.parquet"))
    return [row for file in files for row in pq.read_table(file, columns=COLUMNS).to_pylist()]


def summary_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def copy_of(name: str, target: Path) -> Path:
    return Path(shutil.copytree(OLD_RUNS / name, target))


def test_all_folders_are_complete():
    assert set(FOLDERS) == set(ROUNDS_PLAYED)
    for name in FOLDERS:
        assert {"game.json", "summary.json"} < {path.name for path in (OLD_RUNS / name).iterdir()}
    assert (OLD_RUNS / "sweep/sweep.json").exists() and (OLD_RUNS / "language_model/failed_answers.jsonl").exists()


@pytest.mark.parametrize("name", FOLDERS)
def test_an_old_run_is_read(name: str, tmp_path: Path):
    run = read_run(copy_of(name, tmp_path / "run"))
    entries, answers = run.summary["rounds"], answers_in(OLD_RUNS / name)
    whole = [entry["round"] for entry in entries if "interrupted" not in entry["failures"]]
    assert whole == list(range(1, ROUNDS_PLAYED[name] + 1))
    assert [result.round for result in run.results] == [entry["round"] for entry in entries]
    for result, entry in zip(run.results, entries, strict=True):
        rows = [row for row in answers if row["round"] == entry["round"]]
        assert [row["participant"] for row in rows] == list(range(entry["asked"]))
        values = np.array([row["value"] for row in rows if row["value"] is not None])
        assert (len(rows), len(values)) == (entry["asked"], entry["answered"])
        assert (result.tally.asked, result.tally.answered, result.tally.failed) == (
            *(entry["asked"], entry["answered"], entry["failed"]),
        )
        assert result.tally.failures == entry["failures"]
        assert sum(row["failure"] is not None for row in rows) == entry["failed"] == sum(entry["failures"].values())
        if not len(values):
            assert entry["average"] is None and not result.tally.answered
            continue
        figures = (values.mean(), np.median(values), values.min(), values.max(), values.std())
        assert figures == pytest.approx([entry[key] for key in ("average", "median", "min", "max", "std")])
        winning_number = float(run.game.offset + run.game.ratio * entry["average"])
        assert entry["winning_number"] == pytest.approx(winning_number)
        assert float(result.tally.average() / run.game.scale) == entry["average"]
        assert result.winners.count == entry["winners"]["count"]
        distance = [abs(row["value"] - winning_number) if row["value"] is not None else 1e9 for row in rows]
        winners = [row["participant"] for row, off in zip(rows, distance, strict=True) if off < min(distance) + 1e-9]
        assert entry["winners"] == {"count": len(winners), "participants": [f"P{each}" for each in winners[:10]]}
    for rounds in run.tallies_by_part.values():
        assert [sum(tally.asked for tally in tallies.values()) for tallies in rounds] == [
            entry["asked"] for entry in entries
        ]
    assert set(run.tallies_by_part) == {
        "level_k": {"levels"},
        "two_thirds": {"levels"},
        "language_model": {"education"},
    }.get(name, set())


def test_only_in_old_runs_causes_determine_how_a_round_ended(tmp_path: Path):
    folder = copy_of("sweep/03-ratio=2-3,seed=1", tmp_path / "run")
    ended = [result.tally.ended for result in read_run(folder).results]
    assert ended == [Ended.COMPLETE, Ended.INTERRUPTED]
    summary = summary_in(folder)
    summary["rounds"][0]["ended"], summary["rounds"][1]["ended"] = "out_of_tokens", "complete"
    (folder / "summary.json").write_text(json.dumps(summary))
    ended = [result.tally.ended for result in read_run(folder).results]
    assert ended == [Ended.OUT_OF_TOKENS, Ended.COMPLETE]
    summary["rounds"][0]["ended"] = "some day"
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(SettingsError, match="damaged, or of another version"):
        read_run(folder)


@pytest.fixture
def reported(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Call `--role report` in this process, and return what it printed."""
    handler = signal.getsignal(signal.SIGINT)
    import main

    def report(folder: Path, *flags: str) -> str:
        status = main.main(["--role", "report", str(folder), *flags])
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return out

    yield report
    signal.signal(signal.SIGINT, handler)


def averages_printed(folder: Path) -> list[str]:
    """The averages of a run's rounds as they are printed: with 3 more digits than the answers."""
    summary = summary_in(folder)
    digits = summary["config"]["decimals"] + 3
    return [f"{entry['average']:.{digits}f}" for entry in summary["rounds"] if entry["average"] is not None]


@pytest.mark.parametrize(
    "name",
    [  # all are resumed below, which reports them, too
        pytest.param(each, marks=() if each in ("killed", "language_model") else pytest.mark.slow)
        for each in SINGLE_RUNS
    ],
)
def test_an_old_run_is_reported(name: str, tmp_path: Path, reported: Any):
    folder = copy_of(name, tmp_path / "run")
    lines = reported(folder).splitlines()
    said = [line.removeprefix("Moderator: The average value is ") for line in lines if "The average value is" in line]
    assert [line.split()[0] for line in said] == averages_printed(OLD_RUNS / name)
    status, rounds = summary_in(OLD_RUNS / name)["status"], summary_in(OLD_RUNS / name)["config"]["rounds"]
    assert lines[-1].endswith(f" is {status}: {ROUNDS_PLAYED[name]} of {rounds} rounds")
    for picture in ("histogram.png", "rounds.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert page.rstrip().endswith("</html>") and summary_in(folder)["run_id"] in page
    for entry in summary_in(OLD_RUNS / name)["rounds"]:
        value = "" if entry["average"] is None else entry["average"]
        assert f'<td data-round="{entry["round"]}" data-key="average" data-value="{value}">' in page
    for file in (OLD_RUNS / name).iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


NO_JSON = [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"null", b"[]", b"7", b'{"rounds": 1}']
DAMAGES = [
    *(("language_model", "summary.json", content) for content in NO_JSON),
    *(("language_model", "game.json", content) for content in NO_JSON),
    *(("language_model", "failed_answers.jsonl", content) for content in NO_JSON[1:]),
    *(("language_model", "agents.jsonl", content) for content in NO_JSON[1:]),
    (
        "language_model",
        "agents.jsonl",
        json.dumps({"oid": "\x1b[2J", "host": "h", "port": 1, "first": 0, "count": 1}).encode(),
    ),
    *(("sweep", "sweep.json", content) for content in NO_JSON),
    *(("language_model", "answers.parquet", content) for content in (b"", b"PAR1", b"PAR1" * 100)),
    ("killed", "answers-00002.parquet", b"PAR1"),
]


@pytest.mark.parametrize(("name", "file", "content"), DAMAGES, ids=lambda each: repr(each)[:20])
def test_a_damaged_file_of_a_run_is_one_line(name: str, file: str, content: bytes, tmp_path: Path, command: Any):
    folder = copy_of(name, tmp_path / "run")
    if file == "agents.jsonl":
        load_or_make(tmp_path / "key")
        (folder / file).write_bytes(content + b"\n")
        uses = [("--role", "ask", "--participant", "0", "--run-dir", folder, "--text", "x")]
    else:
        (folder / file).write_bytes(content)
        uses = [("--resume", folder, "--rounds", "5", "--dry-run")]
    if file not in ("agents.jsonl", "failed_answers.jsonl", "sweep.json"):
        uses.append(("--role", "report", folder))
    for use in uses:
        status, err = command(*use)
        assert status == 2 and str(folder) in one_line(err) and file.partition("-")[0].partition(".")[0] in err, err


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("config", "rounds"), 2.5),
        (("config", "seed"), True),
        (("config", "prompt"), None),
        (("config", "hosts"), [1]),
        (("config", "max_value"), 0),
        (("cluster", "times", 0, "rpc_s"), 10**30),
        (("rounds", 0, "winners", "participants", 0), "P" + "9" * 5000),
    ],
)
def test_a_summary_with_a_value_of_another_kind_is_damaged(place: Any, value: Any, tmp_path: Path, command: Any):
    folder = copy_of("random", tmp_path / "run")
    summary = inner = summary_in(folder)
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (folder / "summary.json").write_text(json.dumps(summary))
    status, err = command("--role", "report", folder)
    assert status == 2 and "its summary.json is damaged" in one_line(err)


def test_an_old_sweep_is_reported(tmp_path: Path, reported: Any):
    folder = copy_of("sweep", tmp_path / "sweep")
    rows = [line for line in reported(folder, "--all-runs").splitlines() if line.startswith("0")]
    runs = [name for name in FOLDERS if name.startswith("sweep/")]
    assert [f"sweep/{row.split()[0]}" for row in rows] == runs
    page = (folder / "comparison.html").read_text()
    for row, name in zip(rows, runs, strict=True):
        average = summary_in(OLD_RUNS / name)["rounds"][0]["average"]
        assert f"{average:.2f}" in row and f'data-value="{average}"' in page
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    alone = reported(folder / "02-ratio=1-2,seed=2")
    assert alone.endswith(f"; it is run 2 of 4 of {EXPERIMENT}\n")
    assert f"Run 2 of 4 of {EXPERIMENT}" in (folder / "02-ratio=1-2,seed=2/report.html").read_text()


# --- Resuming, in a checkout at another place and with other ports ---------------------------------------------------


def resume(cluster: Checkout, name: str, *flags: str, status: int = 0) -> tuple[Path, str]:
    """Resume a copy; returns its folder and the log.

    The folders store absolute paths of the checkout that played them, which stand for the same files of this one.
    """
    folder = cluster.path / "runs" / name
    done = cluster.run("run_simulation.sh", "--resume", f"runs/{name}", *flags)
    assert done.returncode == status, done.stderr
    return folder, done.stderr


def check_resumed(name: str, folder: Path, rounds: int) -> None:
    """What was there is unchanged, and the rounds after it are numbered on."""
    before, after = summary_in(OLD_RUNS / name), summary_in(folder)
    played = ROUNDS_PLAYED[name]
    assert [entry["round"] for entry in after["rounds"]] == list(range(1, rounds + 1))
    for new, old in zip(after["rounds"][:played], before["rounds"][:played], strict=True):
        kept = {each: new[each] for each in old} | {"winners": {each: new["winners"][each] for each in old["winners"]}}
        assert kept == old | {"std": pytest.approx(old["std"])}  # its last bit depends on the processor
        assert new.get("ended", "complete") == "complete"
        assert new.get("outcome", old)["winning_number"] == old["winning_number"]
    assert [each["ended"] for each in after["rounds"][played:]] == ["complete"] * (rounds - played)
    assert after["run_id"] == before["run_id"] and after["config"]["rounds"] == rounds
    assert after["seconds"]["total"] >= before["seconds"]["total"]
    old = [row for row in answers_in(OLD_RUNS / name) if row["round"] <= played]
    new = answers_in(folder)
    assert new[: len(old)] == old
    participants = before["config"]["participant_num"]
    assert [(row["round"], row["participant"]) for row in new] == [
        (number + 1, participant) for number in range(rounds) for participant in range(participants)
    ]
    assert not list(folder.glob("answers-*"))
    read_run(folder)


def drawn(folder: Path) -> list[dict[str, Any]]:
    """The answers of a fresh game of random participants with the settings of this run."""
    config = SimulationConfig(**{**summary_in(folder)["config"], "hosts": ("localhost",)})
    game = Average(config.seed, config.max_value, config.decimals, 0.0)
    return [
        {"round": number, "participant": index, "value": draw(game, number, index) / game.scale, "failure": None}
        for number in range(1, config.rounds + 1)
        for index in range(config.participant_num)
    ]


@pytest.mark.parametrize("name", ["interrupted", "killed", "random"])
def test_an_old_run_of_random_participants_is_resumed(name: str, cluster: Checkout):
    copy_of(name, cluster.path / "runs" / name)
    rounds = ROUNDS_PLAYED[name] + 1
    folder, log = resume(cluster, name, "--rounds", str(rounds), "--sleep-time", "0")
    assert f"round {rounds}: asking" in log and f"round {rounds - 1}: asking" not in log
    check_resumed(name, folder, rounds)
    assert summary_in(folder)["status"] == "complete" and answers_in(folder) == drawn(folder)


def test_old_runs_of_a_class_are_resumed(cluster: Checkout):
    cluster.play(*FRESH_LEVEL_K, "--rounds", "4")
    fresh = answers_in(cluster.path / "runs/latest")
    for name in ("level_k", "two_thirds"):
        folder = copy_of(name, cluster.path / "runs" / name)
        _, log = resume(cluster, name, "--rounds", "4", "--sleep-time", "0")
        assert "round 4: asking" in log and "round 3: asking" not in log
        check_resumed(name, folder, 4)
        assert summary_in(folder)["status"] == "complete" and answers_in(folder) == fresh
        levels = pq.read_table(folder / "answers.parquet")["levels"]
        assert levels.null_count == 3 * 40 and levels[3 * 40 :].null_count == 0  # none in the rounds of older versions


def test_a_missing_class_outside_the_checkout_is_named(cluster: Checkout, tmp_path: Path):
    folder = copy_of("two_thirds", cluster.path / "runs/class_gone")
    text = (folder / "summary.json").read_text()
    assert text.count(CLASS_BEFORE) == 1
    text = text.replace(CLASS_BEFORE, f"{tmp_path}/mine.py:Mine")
    (folder / "summary.json").write_text(text)
    done = cluster.run("run_simulation.sh", "--resume", "runs/class_gone", "--rounds", "4")
    assert done.returncode == 2 and f"there is no file {tmp_path}/mine.py" in one_line(done.stderr)
    assert (folder / "summary.json").read_text() == text


def test_an_old_run_of_language_models_is_resumed(cluster: Checkout):
    name = "language_model"
    copy_of(name, cluster.path / "runs" / name)
    model = FakeModel(port=cluster.model_port)
    try:
        folder, log = resume(cluster, name, "--rounds", "3", status=4)  # 4 failures of round 1 stay
    finally:
        model.close()
    assert "round 3: asking" in log and "round 2: asking" not in log
    check_resumed(name, folder, 3)
    before, after = summary_in(OLD_RUNS / name), summary_in(folder)
    assert after["status"] == "partial" and after["rounds"][2]["answered"] == 30
    assert after["llm"] == {
        "requests": before["llm"]["requests"] + len(model.bodies),
        "prompt_tokens": before["llm"]["prompt_tokens"] + PROMPT_TOKENS * len(model.bodies),
        "completion_tokens": before["llm"]["completion_tokens"] + ANSWER_TOKENS * 30,
        "retries": before["llm"]["retries"],
    }
    failed = "failed_answers.jsonl"
    assert (folder / failed).read_bytes() == (OLD_RUNS / name / failed).read_bytes()
    users = [body["messages"][1]["content"] for body in model.bodies]
    average = f"{before['rounds'][1]['average']:.3f}"
    assert all(f"Round 2: the average was {average}" in user for user in users)  # it hears of the rounds before


def test_an_old_sweep_is_resumed(cluster: Checkout):
    copy_of("sweep", cluster.path / "runs/sweep")
    folder, log = resume(cluster, "sweep", "--sleep-time", "0")
    assert log.count(": asking") == 3  # round 2 of run 3, and run 4
    runs = [each["folder"] for each in json.loads((folder / "sweep.json").read_text())["runs"]]
    assert len(runs) == 4 and (folder / "comparison.html").exists()
    for run in runs:
        if f"sweep/{run}" in FOLDERS:
            check_resumed(f"sweep/{run}", folder / run, 2)
    for run in runs[:2]:
        for file in (OLD_RUNS / "sweep" / run).iterdir():
            assert (folder / run / file.name).read_bytes() == file.read_bytes()
    for run in runs:
        assert summary_in(folder / run)["status"] == "complete" and answers_in(folder / run) == drawn(folder / run)


def test_converged_runs_of_an_experiment_are_finished(tmp_path: Path):
    """Unless they are to move less: then all of them have rounds left."""
    sweep = copy_of("sweep", tmp_path / "sweep")
    content = json.loads((sweep / "sweep.json").read_text())
    content["runs"] = content["runs"][:2]
    content["config"] |= {"rounds": 5, "until_converged": 9.0}
    (sweep / "sweep.json").write_text(json.dumps(content))
    shutil.rmtree(sweep / "03-ratio=2-3,seed=1")
    for run in runs_in(sweep):
        summary = summary_in(run)
        summary["config"] |= {"rounds": 5, "until_converged": 9.0}
        (run / "summary.json").write_text(json.dumps(summary | {"converged_after": 2}))

    def left(**given: Any) -> tuple[list[int], str | None]:
        with contextlib.ExitStack() as cleanup:
            session = session_of(SimulationConfig(resume=str(sweep), **given), given, cleanup)
            return [len(spec.rounds_left) for spec in session.specs], session.how_to_resume()

    assert left() == ([0, 0], None) and left(rounds=7) == ([0, 0], None)
    assert left(until_converged=0.5)[0] == [3, 3]
    runs = [read_run(run) for run in runs_in(sweep)]
    assert comparison.unfinished_lines([sweep], runs) == []
    del runs[0].summary["converged_after"]
    (line,) = comparison.unfinished_lines([sweep], runs)
    assert line.startswith("1 of 2 runs of ")


def test_the_example_reads_the_last_run_of_an_experiment(tmp_path):
    command = [sys.executable, ROOT / "examples/read_answers.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "there are no answers in runs/latest" in one_line(done.stderr)
    for number, name in enumerate(("02-ratio=2-3", "01-ratio=1")):
        run = shutil.copytree(OLD_RUNS / "random", tmp_path / "runs/x" / name)
        os.utime(run / "answers.parquet", (0, number))
    (tmp_path / "runs/latest").symlink_to("x")
    for given in ([], ["runs/x"], ["runs/x/01-ratio=1"], ["runs/x/01-ratio=1/answers.parquet"]):
        done = subprocess.run([*command, *given], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "01-ratio=1/answers.parquet" in done.stdout.splitlines()[0], done.stderr
