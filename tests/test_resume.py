"""Runs that are gone on with, and what participants remember when they were made anew; on one machine."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, drafts_in, one_line, until
from waiting import Gates

from simulation.errors import ClusterError, Interrupted, ResultsError, RunAborted, SettingsError
from simulation.files import warn_once
from simulation.game.population import Population
from simulation.game.rules import game_of
from simulation.game.tally import INTERRUPTED, RoundResult, Tally
from simulation.hosts import pid_files
from simulation.llm.concurrency_limit import SharedSemaphore
from simulation.llm.responses import Usage
from simulation.results.console_report import run_lines
from simulation.results.reader import read_run
from simulation.results.run_directory import SUMMARY_BYTES, RunDirectory, _on_disk, sweep_position, write_whole
from simulation.results.run_files import summarise
from simulation.runs.run import Run
from simulation.runs.run_spec import RunSpec
from simulation.runs.session import Session
from simulation.settings import SimulationConfig

ROUNDS = ("--rounds", "4")
# Every answer follows from the participant's own answers so far: one who has forgotten them gives others.
MINDFUL = """
import asyncio, pathlib
from participant import Participant
class Mindful(Participant):
    def __init__(self, index, game):
        super().__init__(index, game)
        self.own = []
    def recall(self, numbers):
        self.own = list(numbers)
    async def answer(self, question):
        number = (self.index + sum(2 * own + 1 for own in self.own if own is not None)) % 101
        if question.round == 2 and self.index % 50 == 7:
            self.own.append(None)
            raise ValueError("I pass")
        self.own.append(number)
        while question.round == 3 and not pathlib.Path({gate!r}).exists():
            await asyncio.sleep(0.1)
        return number
"""


@pytest.fixture
def gate(checkout):
    """The file for which mindful participants wait in round 3."""
    (checkout.path / "gate").touch()
    return checkout.path / "gate"


@pytest.fixture
def mindful(checkout, gate):
    (checkout.path / "mindful.py").write_text(MINDFUL.format(gate=str(gate)))
    return ("--agent-class", "mindful.py:Mindful", *ROUNDS)


def log_of(checkout):
    return (checkout.path / "stderr").read_text()


def play(checkout, *arguments):
    """Start a game in the background, its log in a file."""
    with (checkout.path / "stderr").open("w") as stderr:
        return checkout.start("run_simulation.sh", *arguments, stderr=stderr)


SLOWLY_MADE = """
import time
from pathlib import Path
import mine
from participant import RandomParticipant

class SlowlyMade(RandomParticipant):
    def __init__(self, index, game):
        super().__init__(index, game)
        Path({gate!r} + ".asked").touch()
        while not Path({gate!r}).exists():
            time.sleep(mine.SECONDS)
"""


def test_the_folder_of_a_run_without_results_can_be_used_again(checkout, gate):
    """Its participants cannot be made, or its process is killed while they are."""
    (checkout.path / "slowly_made.py").write_text(SLOWLY_MADE.format(gate=str(gate)))
    (checkout.path / "more").mkdir()
    (checkout.path / "more/mine.py").write_text("SECONDS = 0.02\n")
    flags = ("2", "50", "--sleep-time", "0", "--agent-class", "slowly_made.py:SlowlyMade", "--run-dir", "runs/once")
    flags = (*flags, "--extra-pythonpath", "more")
    assert checkout.run("start_all_server.sh", "2").returncode == 0  # which do not know the folder more
    refused = checkout.run("run_simulation.sh", *flags)
    assert refused.returncode == 3 and checkout.runs() == set(), refused.stderr
    assert checkout.run("stop_all_server.sh").returncode == 0
    gate.unlink()
    game = play(checkout, *flags)
    until(Path(f"{gate}.asked").exists, 30, "participants are being made")
    game.kill()
    game.communicate(timeout=120)
    gate.touch()
    until(lambda: not checkout.processes(), 30, "the servers have ended, too")
    assert [path.name for path in (checkout.path / "runs/once").iterdir()] == ["control.json"]
    checkout.play(*flags)
    assert checkout.summary(checkout.path / "runs/once")["status"] == "complete"


@pytest.mark.slow
def test_a_resume_killed_while_creating_participants_can_be_resumed(checkout, gate):
    """Its last round was cut, so it is played again: the summary says so before the answers go."""
    (checkout.path / "mine.py").write_text("SECONDS = 0.02\n")
    (checkout.path / "slowly_made.py").write_text(SLOWLY_MADE.format(gate=str(gate)))
    own = ("--agent-class", "slowly_made.py:SlowlyMade")
    flags = ("--rounds", "3", "--sleep-time", "0")
    checkout.play("2", "50", *flags, *own)
    run = (checkout.path / "runs/latest").resolve()
    before = checkout.answers()
    summary = checkout.summary()
    summary["status"], summary["rounds"][2]["ended"] = "interrupted", "interrupted"
    (run / "summary.json").write_text(json.dumps(summary))
    gate.unlink()
    Path(f"{gate}.asked").unlink()
    game = play(checkout, "--resume", str(run))
    until(Path(f"{gate}.asked").exists, 30, "participants are being made")
    game.kill()
    game.communicate(timeout=120)
    gate.touch()
    until(lambda: not checkout.processes(), 30, "the servers have ended, too")
    assert len(checkout.summary()["rounds"]) == 2
    checkout.play("--resume", str(run))
    assert checkout.answers() == before and checkout.summary()["status"] == "complete"


def test_recreated_participants_remember(checkout, mindful, gate):
    assert checkout.run("start_all_server.sh", "3").returncode == 0
    checkout.play("3", "300", *mindful, status=4)
    undisturbed = checkout.answers()
    assert sum(row["failure"] is not None for row in undisturbed) == 6
    gate.unlink()
    game = play(checkout, "3", "300", *mindful)
    until(lambda: "round 3: asking" in log_of(checkout), 30, "round 3")
    os.kill(checkout.pid(1), signal.SIGKILL)
    until(lambda: f":{checkout.base_port + 1} is lost" in log_of(checkout), 30, "the loss is noted")
    gate.touch()
    game.communicate(timeout=120)
    assert game.returncode == 4, log_of(checkout)
    assert checkout.answers() == undisturbed
    assert [played["reassigned"] for played in checkout.summary()["rounds"]] == [0, 0, 100, 0]
    assert checkout.run("stop_all_server.sh").returncode == 0


def test_an_interrupted_round_that_is_no_longer_wanted_leaves_no_answers(checkout, mindful, gate):
    gate.unlink()
    game = play(checkout, "2", "300", *mindful)
    until(lambda: "round 3: asking" in log_of(checkout), 30, "round 3")
    game.send_signal(signal.SIGINT)
    game.communicate(timeout=120)
    assert {row["round"] for row in checkout.answers()} == {1, 2, 3}
    resumed = checkout.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "2")
    assert resumed.returncode in (0, 4), resumed.stderr
    assert [entry["round"] for entry in checkout.summary()["rounds"]] == [1, 2]
    assert Counter(row["round"] for row in checkout.answers()) == {1: 300, 2: 300}


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["killed", "Ctrl-C"]
)
def test_an_interrupted_run_resumes_with_the_same_results(checkout, mindful, gate, number):
    checkout.play("3", "300", *mindful, status=4)
    undisturbed, whole = checkout.answers(), checkout.summary()
    gate.unlink()
    game = play(checkout, "2", "300", *mindful)
    until(lambda: "round 3: asking" in log_of(checkout), 30, "round 3")
    game.send_signal(number)
    game.communicate(timeout=120)
    until(lambda: not checkout.processes(), 10, "its servers have ended")
    run = (checkout.path / "runs/latest").resolve()
    before = checkout.summary()
    assert before["status"] == "interrupted"
    hint = f"the run ends with 2 of 4 rounds played; to go on with it: ./run_simulation.sh --resume runs/{run.name}\n"
    assert (hint in log_of(checkout)) is (number != signal.SIGKILL)
    gate.touch()
    if number == signal.SIGKILL:  # what it leaves if that comes while it writes
        (run / ".summary.json.new").write_text("{")
        (checkout.path / "runs/latest.0123abcd").symlink_to(run)
    resumed = checkout.run("run_simulation.sh", "--resume", "runs/latest", "--server-per-host", "5")
    assert resumed.returncode == 4, resumed.stderr
    assert drafts_in(checkout.path) == []
    assert "has played 2 of 4 rounds" in resumed.stderr and "round 2: asking" not in resumed.stderr
    assert (checkout.path / "runs/latest").resolve() == run
    assert checkout.answers() == undisturbed
    summary = checkout.summary()
    assert summary["run_id"] == before["run_id"] and summary["config"]["server_per_host"] == 5
    assert summary["status"] == "partial" and summary["seconds"]["total"] > before["seconds"]["total"]
    for one, other in zip(summary["rounds"], whole["rounds"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert sorted(path.name for path in run.iterdir()) == [
        *(
            "analysis.json",
            "answers.parquet",
            "failed_answers.jsonl",
            "game.json",
            "histogram.png",
            "report.html",
            "rounds.png",
            "source",
            "summary.json",
        ),
    ]


def test_a_finished_run_can_be_extended(checkout):
    checkout.play("2", "50", "--seed", "7", "--sleep-time", "0", "--rounds", "4")
    four = checkout.answers()
    run = checkout.path / "runs/two"
    checkout.play("2", "50", "--seed", "7", "--sleep-time", "0", "--rounds", "2", "--run-dir", str(run))
    again = checkout.run("run_simulation.sh", "--resume", str(run), "--json")
    assert again.returncode == 0 and "asking" not in again.stderr and "starting" not in again.stderr
    assert checkout.answers(run) == four[:100] and json.loads(again.stdout) == checkout.summary(run)
    converged = checkout.run("run_simulation.sh", "--resume", str(run), "--rounds", "4", "--until-converged", "60")
    moved = "mean and median moved less than 60 in the last two rounds: the game ends after round 3 of 4\n"
    assert converged.returncode == 0 and converged.stderr.count(": asking") == 1 and moved in converged.stderr
    assert "to go on with it" not in converged.stderr and checkout.answers(run) == four[:150]
    assert (summary := checkout.summary(run))["status"] == "complete" and summary["converged_after"] == 3
    assert run_lines(read_run(run))[-1].endswith(" is complete: 3 of 4 rounds, converged")
    again = checkout.run("run_simulation.sh", "--resume", str(run), "--quiet")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "") and checkout.answers(run) == four[:150]
    longer = checkout.run("run_simulation.sh", "--resume", str(run), "--until-converged", "0", "--quiet")
    assert longer.returncode == 0 and longer.stderr == "", longer.stderr
    assert all(line.startswith("Moderator: ") for line in longer.stdout.splitlines()) and "average" in longer.stdout
    assert checkout.answers(run) == four and checkout.summary(run)["status"] == "complete"
    assert "converged_after" not in checkout.summary(run)
    shorter = checkout.run("run_simulation.sh", "--resume", str(run), "--rounds", "3")
    assert shorter.returncode == 2 and "has played 4 already" in one_line(shorter.stderr)


def test_a_run_that_cannot_be_resumed_is_refused_and_unchanged(checkout):
    summary = checkout.play("2", "50", "--seed", "7", "--sleep-time", "0")
    run = checkout.path / "runs" / summary["run_id"]
    files = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = {
        (
            "--resume",
            "runs/latest",
            "--seed",
            "8",
        ): "--seed 8: the run in runs/latest was started with 7; this setting cannot be changed on resume",
        ("--resume", "runs/latest", "--participant-num", "51"): "was started with 50",
        ("--resume", "runs/latest", "--run-dir", "elsewhere"): "--run-dir: does not go with --resume",
        ("--resume", "runs/none"): "cannot read its summary.json",
        ("--resume",): "--resume needs the folder of a run",
        ("2", "50", "--run-dir", "runs/latest"): "go on with that run: --resume",
    }
    for arguments, message in refused.items():
        done = checkout.run("run_simulation.sh", *arguments)
        assert done.returncode == 2 and message in one_line(done.stderr), done.stderr
    assert {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


@pytest.mark.slow
def test_a_moved_checkout_resumes_its_runs(checkout, tmp_path):
    (checkout.path / "my").mkdir()
    code = "from participant import Participant\nclass Calm(Participant):\n    async def answer(self, question):\n"
    (checkout.path / "my/calm.py").write_text(code + "        return 10 * question.round\n")
    checkout.play("2", "20", "--agent-class", "my/calm.py:Calm")
    key = (checkout.path / ".cluster/cluster.key").read_bytes()
    moved = replace(checkout, path=checkout.path.rename(tmp_path / "moved"))
    done = moved.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    assert moved.values() == [10.0] * 20 + [20.0] * 20
    assert not checkout.path.exists() and (moved.path / ".cluster/cluster.key").read_bytes() == key
    assert str(tmp_path) not in (moved.path / "runs/latest/summary.json").read_text()


def test_servers_of_a_moved_checkout_must_be_restarted(checkout, tmp_path):
    assert checkout.run("start_all_server.sh", "2", env={"MODERATOR_NUM": "1"}).returncode == 0
    path = checkout.path
    moved = replace(checkout, path=path.rename(tmp_path / "moved"))
    try:
        done = moved.run("run_simulation.sh", "2", "40", env={"MODERATOR_NUM": "1"})
        error = done.stderr.splitlines()[-1]
        assert done.returncode == 3 and f"its checkout {path} was moved or removed; stop all " in error
        assert moved.runs() == set()
        stopped = moved.run("stop_all_server.sh")
        assert stopped.stdout == "stopped 3 agent servers\n", stopped.stderr
    finally:
        moved.path.rename(path)


def test_a_running_run_is_not_resumed(checkout, tmp_path):
    gates = Gates(tmp_path)
    game = play(checkout, "2", "50", *gates.flags)
    until((checkout.path / "runs/latest/summary.json").exists, 30, "it has begun")
    second = checkout.run("run_simulation.sh", "--resume", "runs/latest")
    assert second.returncode == 2 and "is being written by another run" in one_line(second.stderr)
    gates.open()
    game.communicate(timeout=120)
    assert game.returncode == 0 and checkout.summary()["status"] == "complete"


@pytest.mark.parametrize("finished", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_rounds_recorded_but_missing_in_the_summary_are_played_again(checkout, finished):
    """As after a kill between two files: the summary says what is finished, whatever else lies there."""
    checkout.play("2", "50", "--seed", "7", "--sleep-time", "0", "--rounds", "3")
    three = checkout.answers()
    run = (checkout.path / "runs/latest").resolve()
    summary = json.loads((run / "summary.json").read_text())
    shutil.copy(run / "answers.parquet", run / "answers-00009.parquet")
    (run / "summary.json").write_text(
        json.dumps({**summary, "status": INTERRUPTED, "rounds": summary["rounds"][:finished]})
    )
    resumed = checkout.run("run_simulation.sh", "--resume", str(run))
    assert resumed.returncode == 0, resumed.stderr
    assert f"has played {finished} of 3 rounds" in resumed.stderr
    assert checkout.answers() == three and not list(run.glob("answers-*"))


def test_a_server_that_exits_is_restarted_a_limited_number_of_times(checkout):
    assert checkout.run("start_all_server.sh", "2", env={"MODERATOR_NUM": "1"}).returncode == 0
    launcher = checkout.path / "run/servers/launcher.log"

    def restarts():
        rows = checkout.run("start_all_server.sh", "--status").stdout.splitlines()
        return [row.split()[-1] for row in rows[1:]] if all("answer" not in row for row in rows) else None

    first = checkout.pid(0)
    os.kill(first, signal.SIGKILL)
    assert until(restarts, 20, "all answer again") in (["1", "0", "0"], ["0", "0", "0"])
    until(lambda: restarts() == ["1", "0", "0"], 20, "the restart is reported")
    assert checkout.pid(0) != first
    port = checkout.base_port
    assert f"the server on port {port} was ended by SIGKILL: starting it again" in launcher.read_text()
    (checkout.path / "configs/model_configs.json").write_text("no JSON")  # what a server reads before it is ready
    os.kill(checkout.pid(0), signal.SIGKILL)
    given_up = f"the server on port {port} ended with exit status 2 before it was ready 3 times in a row"
    until(lambda: given_up in launcher.read_text(), 30, "it is given up")
    status = checkout.run("start_all_server.sh", "--status")
    assert status.returncode == 3 and "does not answer after 4 restarts" in status.stdout
    assert checkout.run("stop_all_server.sh").stdout == "stopped 2 agent servers\n"


def test_a_resumed_run_stays_in_its_folder(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "latest").symlink_to("one")
    directory = RunDirectory(tmp_path / "latest", resumed=True)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("another")
    assert directory.path == (tmp_path / "one").resolve()
    with pytest.raises(SettingsError, match="is being written by another run"):
        RunDirectory(tmp_path / "one", resumed=True)


def sweep_in(folder, *names):
    """An experiment's folder, of which these are to be the runs."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{"folder": name} for name in names]
    (folder / "sweep.json").write_text(json.dumps({"sweep_id": folder.name, "experiment": "x.yaml", "runs": runs}))
    return folder


def test_latest_is_the_experiment_that_a_run_belongs_to(tmp_path, monkeypatch):
    monkeypatch.setattr("simulation.results.run_directory.LATEST", tmp_path / "latest")
    nothing = {"rounds": [], "status": "interrupted"}
    alone = RunDirectory(tmp_path / "alone")
    alone.write_summary(nothing)
    assert str((tmp_path / "latest").readlink()) == "alone"
    whole = RunDirectory(sweep_in(tmp_path / "a b", "01-x", "02-y"), resumed=True)
    first = RunDirectory(tmp_path / "a b/01-x", within=whole)
    for directory in (first, alone):  # the latter was begun before
        directory.write_summary(nothing)
    assert str((tmp_path / "latest").readlink()) == "a b"
    first.close()
    RunDirectory(tmp_path / "later").write_summary(nothing)
    first = RunDirectory(tmp_path / "a b/01-x", resumed=True, within=whole)
    first.write_summary(nothing)  # the experiment was begun before
    assert str((tmp_path / "latest").readlink()) == "later"
    assert first.position == {"sweep_id": "a b", "experiment": "x.yaml", "run": 1, "runs": 2}
    with pytest.raises(SettingsError, match="a b is being written by another run"):
        RunDirectory(tmp_path / "a b/02-y")
    for directory in (first, whole, alone):
        directory.close()
    RunDirectory(tmp_path / "alone", resumed=True).write_summary(nothing)
    runs = [RunDirectory(tmp_path / "a b" / name, resumed=name == "01-x") for name in ("01-x", "02-y")]
    with pytest.raises(SettingsError, match="a b is being written by another run"):
        RunDirectory(tmp_path / "a b", resumed=True)
    runs[1].write_summary(nothing)
    assert str((tmp_path / "latest").readlink()) == "a b"
    for directory in runs:
        directory.close()
    (tmp_path / "a b/03-z").mkdir()
    other = RunDirectory(tmp_path / "a b/03-z")  # of which the experiment does not know
    other.write_summary(nothing)
    assert other.position is None and str((tmp_path / "latest").readlink()) == "a b/03-z"


@pytest.mark.parametrize("text", ['{"sweep_id": [], "experiment": "e", "runs": [{"folder": "run"}]}', "[" * 50_000])
def test_a_run_beside_a_damaged_experiment_file_is_a_single_run(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    (tmp_path / "run").mkdir()
    assert sweep_position(tmp_path / "run") is None


@pytest.mark.parametrize("before", [None, "the one before"])
def test_latest_is_unchanged_if_nothing_of_an_experiment_was_played(tmp_path, monkeypatch, before):
    monkeypatch.setattr("simulation.results.run_directory.LATEST", tmp_path / "runs/latest")
    if before is not None:
        RunDirectory(tmp_path / "runs" / before).write_summary({"rounds": [], "status": "complete"})
    directory = RunDirectory(tmp_path / "elsewhere/s")
    directory.write_json("sweep.json", {})
    (tmp_path / "elsewhere/s/sweep.json").unlink()
    directory.close()
    assert not (tmp_path / "elsewhere").exists()
    assert names_in(tmp_path / "runs") == ([] if before is None else ["latest", before])
    assert before is None or str((tmp_path / "runs/latest").readlink()) == before


OLD_RUNS = ROOT / "tests/data/old_runs"
TO_RESUME = {
    "interrupted": "the run ends with 2 of 3 rounds played; to go on with it: {} --resume {}",
    "sweep/03-ratio=2-3,seed=1": "the run ends with 1 of 2 rounds played; to go on with it: {} --resume {}",
    "random": None,
    "no such run": None,
}


@pytest.mark.parametrize("name", TO_RESUME)
def test_the_resume_command_is_printed_if_rounds_are_left(tmp_path, name):
    if (OLD_RUNS / name).exists():
        shutil.copytree(OLD_RUNS / name, tmp_path / "it's a run")
    config = SimulationConfig(seed=1)
    session = Session([RunSpec(config, {}, game_of(config, None, Population()), tmp_path / "it's a run")])
    command = (f"{'.' if Path.cwd() == ROOT else ROOT}/run_simulation.sh", shlex.quote(f"{tmp_path}/it's a run"))
    assert session.how_to_resume() == (TO_RESUME[name] and TO_RESUME[name].format(*command))


def test_a_summary_stays_small_with_many_failures(tmp_path, monkeypatch):
    monkeypatch.setattr("simulation.results.run_directory.LATEST", tmp_path / "latest")
    config = SimulationConfig(rounds=100, decimals=6, seed=1)
    failures = {f"cause {place} in many words": 10**9 for place in range(20)}
    played = [
        RoundResult(each, Tally(sum(failures.values()), failures=failures), seconds=1.2345) for each in range(1, 101)
    ]
    times = [
        {"round": each} | dict.fromkeys(("model_s", "client_s", "slowest_s", "rpc_s"), 1.2345) for each in range(100)
    ]
    lost = [f"a-rather-long-name-of-a-host-{each}.example:12345" for each in range(1000)]
    cluster = {"hosts": ["localhost"], "lost": lost, "times": times}
    seconds = dict.fromkeys(("connect", "create", "rounds", "total"), 1.0)
    RunDirectory(tmp_path / "run").write_summary(summarise(config, "r", "partial", cluster, seconds, played, Usage()))
    text = (tmp_path / "run/summary.json").read_text()
    assert len(text) < SUMMARY_BYTES and len(json.loads(text)["cluster"]["lost"]) >= 100
    assert json.loads(text)["rounds"][99]["failed"] == 20 * 10**9


def test_servers_of_a_run_end_with_it_even_if_their_launcher_was_killed(checkout, tmp_path):
    gates = Gates(tmp_path)
    game = play(checkout, "2", "50", *gates.flags)
    until(lambda: "round 1: asking" in log_of(checkout), 30, "round 1")
    os.kill(checkout.pid_in("servers/launcher"), signal.SIGKILL)
    status = checkout.run("start_all_server.sh", "--status")
    assert status.returncode == 0 and "the launcher has exited" in status.stdout
    gates.open()
    game.communicate(timeout=120)
    assert game.returncode == 0, log_of(checkout)
    assert checkout.processes() == []


# --- Drafts that a killed process leaves -----------------------------------------------------------------------------

HELD_UP = """
import sys, time
from pathlib import Path
from simulation.results import run_directory as results
results.LATEST = Path({latest!r})
directory = results.RunDirectory(Path({run!r}), resumed=True)
def wait(*_):
    print("held up", flush=True)
    time.sleep(600)
{where}
directory.write_summary({{"rounds": [], "status": "complete"}})
"""
BEFORE_THE_FILE = "results.os.fsync = wait"
BEFORE_THE_LINK = "made = Path.symlink_to; Path.symlink_to = lambda *given: made(*given) or wait()"


@contextlib.contextmanager
def held_up(folder, where):
    """A process that writes its summary in folder/run, and does not come further than this."""
    (folder / "run").mkdir(exist_ok=True)
    code = HELD_UP.format(latest=str(folder / "latest"), run=str(folder / "run"), where=where)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held up\n"
            yield process
        finally:
            process.kill()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_half_written_summary_of_a_killed_process_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr("simulation.results.run_directory.LATEST", tmp_path / "latest")
    with held_up(tmp_path, BEFORE_THE_FILE):
        (draft,) = names_in(tmp_path / "run")
        assert re.fullmatch(r"\.summary\.json\.[0-9a-f]{8}\.new", draft)
        with pytest.raises(SettingsError, match="is being written by another run"):
            RunDirectory(tmp_path / "run", resumed=True)
        assert names_in(tmp_path / "run") == [draft]
    (tmp_path / "run/answers-00001.parquet").touch()
    RunDirectory(tmp_path / "run", resumed=True).close()
    assert names_in(tmp_path / "run") == ["answers-00001.parquet"]


def test_a_file_written_concurrently_is_complete_and_the_last_wins(tmp_path):
    """As --role report does, which locks no folder."""
    with _on_disk(tmp_path / "report.html") as file:
        file.write(b"one")
        write_whole(tmp_path / "report.html", b"the other")
    assert (tmp_path / "report.html").read_bytes() == b"one" and names_in(tmp_path) == ["report.html"]


def test_a_folder_with_only_drafts_holds_no_results(tmp_path, monkeypatch):
    monkeypatch.setattr("simulation.results.run_directory.LATEST", tmp_path / "latest")
    with held_up(tmp_path, BEFORE_THE_FILE):
        pass
    for draft in (".probe.new", "..probe.new.new", ".summary.json.new", ".answers-00001.parquet.0a1b2c3d.new"):
        (tmp_path / "run" / draft).touch()
    directory = RunDirectory(tmp_path / "run")
    assert names_in(tmp_path / "run") == []
    directory.close()
    (tmp_path / "run/.hidden").touch()
    with pytest.raises(SettingsError, match="is not empty; name a new folder"):
        RunDirectory(tmp_path / "run")


def test_a_link_made_concurrently_by_another_run_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("simulation.results.run_directory.LATEST", tmp_path / "latest")
    (tmp_path / "latest.txt").touch()
    (tmp_path / "latest.00000000").symlink_to("a folder that is gone")
    with held_up(tmp_path, BEFORE_THE_LINK):
        RunDirectory(tmp_path / "other")
        (draft,) = (path for path in tmp_path.glob("latest.*") if path.is_symlink())
        assert draft.resolve() == tmp_path / "run" and draft.name != "latest.00000000"
    RunDirectory(tmp_path / "run", resumed=True).close()
    assert names_in(tmp_path) == ["latest.txt", "other", "run"]


def test_a_pid_file_that_was_half_written_is_removed_by_start_and_stop(checkout):
    draft = checkout.path / f"run/servers/{checkout.base_port}.pid.new"
    draft.parent.mkdir(parents=True)
    draft.write_text("12")
    assert checkout.run("stop_all_server.sh").returncode == 0 and not draft.exists()
    draft.write_text("12")
    assert checkout.run("start_all_server.sh", "1", env={"MODERATOR_NUM": "1"}).returncode == 0 and not draft.exists()
    draft.write_text("12")
    assert checkout.run("stop_all_server.sh").stdout == "stopped 2 agent servers\n" and not draft.exists()


# --- File systems that cannot do everything, and disks that fail ------------------------------------------------------


@pytest.fixture
def warnings(tmp_path, monkeypatch):
    """The warnings that are logged; all that is written is in a folder of the test's own."""
    from loguru import logger

    monkeypatch.setattr("simulation.results.run_directory.LATEST", tmp_path / "runs/latest")
    monkeypatch.setattr(pid_files, "SERVERS", tmp_path / "servers")
    warn_once.cache_clear()
    lines = []
    number = logger.add(lines.append, format="{message}", level="WARNING")
    yield lines
    logger.remove(number)


def failing(monkeypatch, module, name, number, only=lambda *_: True):
    """Have a function of the system fail with this error."""
    function = getattr(module, name)

    def called(*given, **options):
        if only(*given):
            names = [str(each) for each in given[:1] if isinstance(each, str | Path)]
            raise OSError(number, os.strerror(number), *names)
        return function(*given, **options)

    monkeypatch.setattr(module, name, called)


def a_directory(folder, rounds=2):
    """A run directory with files of rounds, and failed answers."""
    directory = RunDirectory(folder)
    for number in range(1, rounds + 1):
        (folder / f"answers-{number:05d}.parquet").write_bytes((ROOT / ANSWERS).read_bytes())
    (folder / "failed_answers.jsonl").write_text('{"round": 1}\n')
    return directory


ANSWERS = "tests/data/old_runs/killed/answers-00001.parquet"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_without_file_locks_a_warning_is_logged_once(tmp_path, monkeypatch, warnings, number):
    failing(monkeypatch, fcntl, "flock", number)
    places = SharedSemaphore("a", tmp_path / "in-flight")
    assert [places.acquire(2) for _ in range(3)] == [True, True, False]
    for name in ("one", "another"):
        (tmp_path / name).mkdir()
        RunDirectory(tmp_path / name).close()
        with pid_files.one_at_a_time():
            pass
    folders = ("in-flight", "one", "servers", "another")
    assert [line.split(" has no locks")[0] for line in warnings] == [
        f"the file system of {tmp_path / each}" for each in folders
    ]
    draft = tmp_path / "one/.summary.json.new"
    draft.touch()
    RunDirectory(tmp_path / "one", resumed=True).close()
    assert draft.exists()  # it may be another run's


def test_another_lock_failure_is_one_line(tmp_path, monkeypatch, warnings):
    failing(monkeypatch, fcntl, "flock", errno.EIO)
    with pytest.raises(SettingsError, match=r"cannot write results to .*: it cannot be locked .Input/output error"):
        RunDirectory(tmp_path / "run")
    with (
        pytest.raises(SettingsError, match=r"cannot write in .*servers: it cannot be locked .Input/output error"),
        pid_files.one_at_a_time(),
    ):
        pass
    assert not (tmp_path / "run").exists() and warnings == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_disk_that_fails_while_servers_start_is_one_line(tmp_path, monkeypatch, warnings, number):
    with pytest.raises(SettingsError, match=f"cannot write in .*: {os.strerror(number)}"), pid_files.one_at_a_time():
        failing(monkeypatch, os, "replace", number)
        failing(monkeypatch, os, "unlink", number)
        pid_files.ProcessId(1).write(tmp_path / "servers/12330.pid")
    with pytest.raises(ConnectionResetError), pid_files.one_at_a_time():
        raise ConnectionResetError(errno.ECONNRESET, "of a server")


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EROFS])
def test_without_file_locks_each_server_keeps_the_limit(tmp_path, monkeypatch, warnings, number):
    failing(monkeypatch, os, "pwrite", number)
    for _ in range(2):
        places = SharedSemaphore("a", tmp_path)
        assert [places.acquire(1), places.acquire(1)] == [True, False]
    assert [os.strerror(number) in line for line in warnings] == [True]


# What vfat, some network file systems and shared folders of VirtualBox answer
@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EPROTO])
def test_results_are_written_without_links_or_folder_flushes(tmp_path, monkeypatch, warnings, number):
    failing(monkeypatch, os, "symlink", number)
    failing(monkeypatch, os, "fsync", errno.EINVAL)
    directory = RunDirectory(tmp_path / "run")
    for _ in range(2):
        directory.write_summary({"rounds": []})
    directory.close()
    assert len(warnings) == 1 and "name the run by its folder" in warnings[0]
    assert names_in(tmp_path / "run") == ["summary.json"] and names_in(tmp_path / "runs") == []


def test_latest_survives_moves_of_the_checkout_or_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr("simulation.results.run_directory.LATEST", tmp_path / "a/runs/latest")
    for folder, target in ((tmp_path / "a/runs/x", "x"), (tmp_path / "a/y", "../y"), (tmp_path / "z", f"{tmp_path}/z")):
        folder.parent.mkdir(parents=True, exist_ok=True)
        directory = RunDirectory(folder)
        directory.write_summary({"rounds": []})
        assert (tmp_path / "a/runs/latest").readlink() == Path(target)
        directory.close()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize(
    ("rounds", "what", "write"),
    [
        (1, "replace", RunDirectory.join_answers),
        (2, "replace", RunDirectory.join_answers),
        (2, "unlink", RunDirectory.join_answers),
        (2, "unlink", lambda directory: directory.go_back_to(1)),
        (2, "unlink", lambda directory: directory.go_back_to(0)),
        (1, "replace", lambda directory: directory.write_summary({"rounds": []})),
        (1, "symlink", lambda directory: directory.write_summary({"rounds": []})),
        (1, "fsync", lambda directory: directory.write_lines("agents.jsonl", [{}])),
    ],
)
def test_a_disk_that_fails_is_a_failure_to_write_results(tmp_path, monkeypatch, warnings, number, rounds, what, write):
    directory = a_directory(tmp_path / "run", rounds)
    failing(monkeypatch, os, what, number)
    failing(monkeypatch, os, "unlink", number)
    with pytest.raises(ResultsError, match=f"cannot (write|point) .*: {os.strerror(number)}"):
        write(directory)
    assert warnings == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_disk_that_fails_between_the_runs_of_an_experiment_is_a_failure_to_write_results(
    tmp_path, monkeypatch, warnings, number
):
    config = SimulationConfig(seed=1)
    spec = RunSpec(config, {}, game_of(config, None, Population()), tmp_path / "s/02-y")
    directory = RunDirectory(sweep_in(tmp_path / "s", "01-x", "02-y"), resumed=True)
    session = Session([spec], directory=directory)
    failing(monkeypatch, os, "mkdir", number)
    with pytest.raises(ResultsError, match=f"02-y: {os.strerror(number)}$"):
        session._play_one(spec, None)


@pytest.mark.parametrize(
    ("ended", "raised"), [(RunAborted("no server"), True), (Interrupted(2), True), (ClusterError("no key"), False)]
)
def test_a_game_that_ends_early_says_so_if_its_results_are_not_written(warnings, ended, raised):
    def fail(_status):
        raise ResultsError("cannot write x: No space left on device")

    run = SimpleNamespace(results=[1], _finish_files=fail)
    with pytest.raises(ResultsError, match=f"No space .* ended: {ended}") if raised else contextlib.nullcontext():
        Run._write_after_error(run, ended)
    assert [line.strip() for line in warnings] == ([] if raised else ["cannot write x: No space left on device"])
