"""--role control, beside real runs: show, pause, continue, stop, and change settings."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from conftest import one_line, until
from waiting import Gates

from simulation.monitoring.control import Control
from simulation.runs.console import ConsoleProgress

LLM = ("--agent-type", "llm", "--seed", "7", "--samples-per-request", "1")


@pytest.fixture
def control(cluster):
    """Send a command to the latest run. Return its output."""

    def send(*words, status=0, run="runs/latest"):
        done = cluster.run("main.py", "--role", "control", "--run-dir", run, *words)
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else one_line(done.stderr)

    return send


@pytest.fixture
def started(cluster):
    """Start a run in the background. Return it when it accepts commands."""
    runs = []

    def start(*flags):
        folder = f"runs/control-{time.monotonic_ns()}"
        run = cluster.start("run_simulation.sh", "3", *flags, "--run-dir", folder)
        runs.append(run)
        until(lambda: (cluster.path / folder / "control.json").exists() or run.poll() is not None, 60, "it listens")
        return run, folder

    yield start
    for run in runs:
        run.kill()
        run.communicate()


def test_a_paused_game_sends_no_requests_and_survives_a_killed_server(cluster, control, fake, started):
    fake.delay_s = 0.05
    run, folder = started("60", *LLM, "--max-in-flight", "2", "--rounds", "2", "--heartbeat-timeout", "3")
    until(lambda: len(fake.bodies) > 5, 60, "requests arrive")
    assert "paused" in control("pause", run=folder)
    last = [0.0, 0]  # when the number of requests was last seen to change, and the number

    def settled():
        if fake.now or len(fake.bodies) != last[1]:
            last[:] = time.monotonic(), len(fake.bodies)
        return time.monotonic() > last[0] + 2.5  # longer than the interval of heartbeats

    until(settled, 30, "the requests under way have ended")
    assert last[1] < 60
    os.kill(cluster.pid(0), signal.SIGKILL)

    def recreated():
        state = json.loads(control("status", "--json", run=folder))
        rows = state["run"]["servers"]["rows"]
        return rows[0]["losses"] == 1 and sum(row["hosts"] for row in rows if row["participants"]) == 60

    until(recreated, 60, "the participants of the killed server are on others")
    assert len(fake.bodies) == last[1] and run.poll() is None
    control("set", "max-in-flight", "30", run=folder)
    fake.most_at_once = 0
    assert "in progress" in control("continue", run=folder)
    _, log = run.communicate(timeout=120)
    assert run.returncode == 0, log
    summary = cluster.summary(cluster.path / folder)
    assert [entry["answered"] for entry in summary["rounds"]] == [60, 60]
    assert summary["config"]["max_in_flight"] == 30 and fake.most_at_once > 2
    assert "--max-in-flight is 30 from now on" in log and "going on" in log
    assert not (cluster.path / folder / "control.json").exists()


def test_a_paused_game_survives_suspend_and_resume_of_the_machine(cluster, control, fake, started):
    fake.held = lambda text: "Round 2" not in text
    run, folder = started("20", *LLM, "--rounds", "2", "--heartbeat-timeout", "2", "--lease", "4")
    until(lambda: fake.bodies, 60, "requests arrive")
    control("pause", run=folder)
    everything = {psutil.Process(run.pid), *cluster.processes()}
    for process in everything:
        process.suspend()
    time.sleep(5)  # what is tested is a time longer than the timeout of heartbeats and the lease
    for process in everything:
        process.resume()
    fake.held = None
    control("continue", run=folder)
    _, log = run.communicate(timeout=120)
    assert run.returncode == 0, log
    assert [entry["answered"] for entry in cluster.summary(cluster.path / folder)["rounds"]] == [20, 20]


def test_rounds_and_tokens_change_while_the_game_is_played(cluster, control, fake, started):
    fake.held = lambda text: "Round 2" in text
    run, folder = started("20", *LLM, "--rounds", "5")
    until(lambda: any("Round 2" in body["messages"][1]["content"] for body in fake.bodies), 60, "round 2")
    text = control("status", run=folder)
    assert "round 2: 0 answers and 0 failures" in text and "requests" in text and "servers: 7 plays" in text
    assert "round 2 is under way" in control("set", "rounds", "1", status=2, run=folder)
    control("set", "rounds", "3", run=folder)
    control("set", "max_tokens", "1", run=folder)
    control("set", "heartbeat-timeout", "7.5", run=folder)
    fake.held = None
    _, log = run.communicate(timeout=120)
    summary = cluster.summary(cluster.path / folder)
    assert run.returncode == 4 and "the budget of 1 tokens is spent" in log and len(summary["rounds"]) == 2
    config = summary["config"]
    assert (config["rounds"], config["max_tokens"], config["heartbeat_timeout"]) == (3, 1, 7.5)
    resumed = cluster.run("run_simulation.sh", "--resume", folder, "--max-tokens", "100000")
    assert resumed.returncode == 0 and len(cluster.summary(cluster.path / folder)["rounds"]) == 3


def test_a_game_is_paused_between_rounds_and_stopped(cluster, control, started, tmp_path):
    gates = Gates(tmp_path)
    run, folder = started("30", *gates.flags, "--rounds", "4")
    until(lambda: "round 1:" in control(run=folder), 60, "round 1 is under way")
    control("pause", run=folder)
    gates.open()
    until(lambda: len(cluster.summary(cluster.path / folder)["rounds"]) == 1, 60, "the round under way ends")
    lines = control("status", run=folder).splitlines()
    assert lines[0].endswith("paused") and lines[-1].startswith("servers: ")
    assert run.poll() is None and len(cluster.summary(cluster.path / folder)["rounds"]) == 1
    assert "stopping" in control("stop", run=folder)
    run.communicate(timeout=60)
    assert run.returncode == 130 and cluster.summary(cluster.path / folder)["status"] == "interrupted"
    resumed = cluster.run("run_simulation.sh", "--resume", folder)
    assert resumed.returncode == 0 and len(cluster.summary(cluster.path / folder)["rounds"]) == 4


def test_no_further_round_is_played_if_the_last_is_the_present_one(cluster, control, started, tmp_path):
    gates = Gates(tmp_path)
    run, folder = started("30", *gates.flags, "--rounds", "4")
    until(lambda: "round 1:" in control(run=folder), 60, "round 1 is under way")
    control("pause", run=folder)
    gates.open()
    until(lambda: len(cluster.summary(cluster.path / folder)["rounds"]) == 1, 60, "the round under way ends")
    control("set", "rounds", "1", run=folder)
    control("continue", run=folder)
    run.communicate(timeout=60)
    summary = cluster.summary(cluster.path / folder)
    assert run.returncode == 0 and summary["status"] == "complete"
    assert len(summary["rounds"]) == summary["config"]["rounds"] == 1


def test_settings_do_not_change_after_the_last_round(cluster, control, tmp_path):
    hook = tmp_path / "slow.py"
    hook.write_text(
        "from pathlib import Path\nimport time\nfrom simulation.monitoring.hooks import Hook\n\n\nclass Slow(Hook):\n"
        "    def run_finished(self, summary, folder):\n"
        f"        while not Path({str(tmp_path / 'go')!r}).exists():\n            time.sleep(0.02)\n"
    )
    folder = f"runs/control-{time.monotonic_ns()}"
    flags = ("--sleep-time", "0", "--hook", str(hook), "--run-dir", folder)
    run = cluster.start("run_simulation.sh", "3", "30", *flags)
    summary = cluster.path / folder / "summary.json"
    until(lambda: summary.exists() and json.loads(summary.read_text())["status"] == "complete", 60, "it is over")
    assert "rounds: the last round of the run was played" in control("set", "rounds", "5", status=2, run=folder)
    (tmp_path / "go").touch()
    run.communicate(timeout=60)
    assert run.returncode == 0 and len(cluster.summary(cluster.path / folder)["rounds"]) == 1


def test_a_damaged_control_file_is_an_error_in_one_line(cluster, control):
    folder = cluster.path / "runs/damaged"
    folder.mkdir(parents=True)
    for text in ("[]", "null", "{", "{}", '{"host": "\\u001b[1m\\n", "socket": 5}'):
        (folder / "control.json").write_text(text)
        line = control("status", status=3, run="runs/damaged")
        assert "is damaged" in line or "is played on host" in line


def test_an_experiment_is_controlled_through_its_folder(cluster, control, started):
    run, folder = started("10", "--sleep-time", "60", "--repeats", "2")
    until(lambda: "round 1:" in control(run=folder), 60, "round 1 is under way")
    inner = next(path for path in (cluster.path / folder).iterdir() if (path / "control.json").exists())
    assert control("status", run=str(inner.relative_to(cluster.path))).startswith("run ")
    control("stop", run=folder)
    run.communicate(timeout=60)
    assert run.returncode == 130


def test_only_the_owner_opens_the_socket(cluster, control, started):
    run, folder = started("10", "--sleep-time", "60")
    path = Path(json.loads((cluster.path / folder / "control.json").read_text())["socket"])
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700 and len(str(path)) < 100
    control("stop", run=folder)
    run.communicate(timeout=60)
    assert not path.parent.exists()
    assert "no command plays this run now" in control("status", status=3, run=folder)


def test_a_run_without_a_socket_is_played(cluster, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "file"))  # in which no folder can be made
    control = Control(ConsoleProgress())
    with control.announce(tmp_path):
        assert not (tmp_path / "control.json").exists()
    assert control.execute(["pause"])["paused"]  # as the button of the live page
    control.close()


def test_what_is_no_command_ends_no_run(cluster, control, started):
    run, folder = started("10", "--sleep-time", "60")
    path = json.loads((cluster.path / folder / "control.json").read_text())["socket"]
    for text in (b"nonsense\n", b"5\n", b"[]\n", b"\n", b'["set"]\n', b'"stop"\n', b"[" * 4000 + b"\n"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.sendall(text)
            connection.makefile("rb").read()
    assert "in progress" in control("status", run=folder)
    control("stop", run=folder)
    _, log = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in log


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("paus",), "did you mean pause?"),
        (("set", "rounds"), "write set NAME VALUE"),
        (("stop", "now"), "write stop alone"),
        (("set", "ratio", "1/2"), "cannot be changed in a run"),
        (("set", "rounds", "many"), "must be a whole number"),
        (("set", "rounds", "0"), "must be from 1 to 100"),
        (("set", "heartbeat_timeout", "nan"), "heartbeat-timeout"),
    ],
)
def test_a_wrong_command_is_one_line(cluster, control, started, words, problem):
    run, folder = started("10", "--sleep-time", "60")
    until(lambda: "round 1:" in control(run=folder), 60, "round 1 is under way")
    assert problem in control(*words, status=2, run=folder)
    assert run.poll() is None
