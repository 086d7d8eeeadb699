"""What goes wrong on one machine: taken ports, dead servers, full disks, signals. Each in one line, nothing left."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, is_free, one_line, open_again, until
from waiting import Gates

from simulation.errors import ClusterError
from simulation.hosts import pid_files
from simulation.hosts.pid_files import ProcessId, ServerProcesses
from simulation.runs import console

BUSY = ("2", "400", "--sleep-time", "600")  # a round that nobody waits for


def last_line(err: str) -> str:
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def test_one_command_starts_plays_and_stops(checkout):
    done = checkout.run("run_simulation.sh", "2", "100", "--sleep-time", "0", cwd="/")
    assert done.returncode == 0, done.stderr
    assert "no agent servers of this cluster run here: starting 2 for participants and 4 for moderators" in done.stderr
    assert "6 agent servers are ready" in done.stderr and "stopped the 6 agent servers" in done.stderr
    assert checkout.processes() == [] and not list((checkout.path / "run/servers").glob("*.pid"))
    assert checkout.summary()["status"] == "complete"


def test_variables_of_other_programs_change_nothing(checkout):
    checkout.cold = True
    env = {
        "LOGURU_LEVEL": "verbose",
        "LOGURU_DEBUG_NO": "ten",
        "LOGURU_SERIALIZE": "1",
        "MPLBACKEND": "none",
        "SSLKEYLOGFILE": "/gone/k",
    }
    env |= {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "C++", "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION_VERSION": "3"}
    done = checkout.run("run_simulation.sh", "1", "10", "--sleep-time", "0", "--dashboard", "0", env=env)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "{" not in done.stderr, done.stderr
    assert "{" not in (checkout.path / f"run/servers/{checkout.base_port}.log").read_text()


def test_three_steps(checkout):
    started = checkout.run("start_all_server.sh", "2", env={"MODERATOR_NUM": "1"}, cwd="/")
    assert started.returncode == 0 and "ready on localhost" in started.stdout
    for participants in ("10", "11"):
        done = checkout.run(
            "run_simulation.sh", "2", participants, "--sleep-time", "0", env={"MODERATOR_PER_HOST": "1"}
        )
        assert done.returncode == 0 and "stopped" not in done.stderr
    checkout.age_pid_files()
    pid_file = checkout.path / f"run/servers/{checkout.base_port}.pid"
    pid_file.write_text(f"{checkout.pid(0)}\n")  # as the previous version wrote it
    status = checkout.run("start_all_server.sh", "--status")
    assert status.returncode == 0 and "launcher" not in status.stdout
    stopped = checkout.run("stop_all_server.sh")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped 3 agent servers\n")
    again = checkout.run("stop_all_server.sh")
    assert (again.returncode, again.stdout) == (0, "no agent servers were running\n")
    nothing = checkout.run("start_all_server.sh", "--status")
    assert (nothing.returncode, nothing.stdout) == (0, "no agent servers are running\n")


def test_a_port_in_use_is_named_and_its_process_left_alone(checkout):
    with socket.create_server(("127.0.0.1", checkout.base_port + 3)):
        for command in (("start_all_server.sh", "2"), ("run_simulation.sh", "2", "10")):
            done = checkout.run(*command)
            assert done.returncode == 3
            assert f"port {checkout.base_port + 3} of localhost is taken" in last_line(done.stderr)
            assert checkout.processes() == []
    assert checkout.runs() == set()


def kill_launcher(checkout) -> None:
    """Let nobody start servers again that die."""
    os.kill(checkout.pid_in("servers/launcher"), signal.SIGKILL)


def test_a_dead_server_is_named_before_the_run(checkout):
    assert checkout.run("start_all_server.sh", "3").returncode == 0
    kill_launcher(checkout)
    os.kill(checkout.pid(1), signal.SIGKILL)
    done = checkout.run("run_simulation.sh", "3", "100")
    assert done.returncode == 3
    assert "6 of 7 agent servers are ready" in last_line(done.stderr)
    assert f"localhost:{checkout.base_port + 1}: no server listens there" in last_line(done.stderr)
    status = checkout.run("start_all_server.sh", "--status")
    assert status.returncode == 3 and "does not answer" in status.stdout
    assert checkout.run("start_all_server.sh", "3").returncode == 3
    assert checkout.run("stop_all_server.sh").stdout == "stopped 6 agent servers\n"
    assert checkout.runs() == set()


def test_the_game_ends_when_all_servers_are_lost(checkout, tmp_path):
    assert checkout.run("start_all_server.sh", "2").returncode == 0
    kill_launcher(checkout)
    flags = ("2", "400", "--rounds", "3", "--heartbeat-timeout", "5", *Gates(tmp_path, "question.round == 2").flags)
    with (tmp_path / "stderr").open("w+") as log:
        game = checkout.start("run_simulation.sh", *flags, stderr=log)
        until(lambda: "round 2: asking" in (tmp_path / "stderr").read_text(), 20, "round 2 has begun")
        for offset in (0, 1):
            os.kill(checkout.pid(offset), signal.SIGKILL)
        game.communicate(timeout=120)
    err = (tmp_path / "stderr").read_text()
    assert game.returncode == 4, err
    assert "round 2 cannot be finished: no participant server has answered for 5 s: localhost:" in last_line(err)
    summary = checkout.summary()
    assert summary["status"] == "failed" and [played["answered"] for played in summary["rounds"]] == [400]
    assert sorted(summary["cluster"]["lost"]) == [f"localhost:{checkout.base_port + offset}" for offset in (0, 1)]
    assert len(checkout.answers()) == 400
    assert checkout.run("stop_all_server.sh").returncode == 0


def test_no_other_process_is_signalled_because_of_a_stale_pid_file(checkout):
    with subprocess.Popen(["sleep", "60"]) as other:
        servers = checkout.path / "run/servers"
        servers.mkdir(parents=True)
        (servers / f"{checkout.base_port}.pid").write_text(f"{other.pid}\n")
        (servers / "launcher.pid").write_text(f"{other.pid}\n")
        assert checkout.run("stop_all_server.sh").stdout == "no agent servers were running\n"
        (servers / f"{checkout.base_port}.pid").write_text(f"{other.pid}\n")
        assert checkout.run("start_all_server.sh", "1").returncode == 0
        assert checkout.pid(0) != other.pid
        assert checkout.run("stop_all_server.sh").stdout == "stopped 5 agent servers\n"
        assert other.poll() is None
        other.kill()


ANOTHER_BOOT = {"boot": "00000000-0000-0000-0000-000000000000"}


@pytest.mark.parametrize(
    ("changed", "state"),
    [
        ({}, "lives"),
        ({"host": "renamed"}, "lives"),
        ({"start": "12"}, "ended"),  # another process has the pid now
        (ANOTHER_BOOT, "ended"),
        ({"boot": "", "namespace": "", "start": ""}, "ended"),  # the pid alone, and the process is no server
        ({"namespace": "12"}, "a container or other pid namespace of this host"),
        (ANOTHER_BOOT | {"host": "node2"}, "host node2"),
    ],
)
def test_a_process_is_identified_without_a_clock(tmp_path, changed, state):
    with subprocess.Popen(["sleep", "60"]) as process:
        path = tmp_path / "1234.pid"
        replace(ProcessId.of(process.pid), **changed).write(path)
        os.utime(path, (0, 0))
        assert path.read_text().splitlines()[0] == str(process.pid)
        servers = ServerProcesses("server", tmp_path, "./stop.sh", 1.0, lambda _: False)
        found = servers.process("1234")
        assert (found is not None) == (state == "lives") and (found is None or found.pid == process.pid)
        servers.terminate([])  # which removes pid files, but signals nothing
        assert path.exists() == (state != "ended")
        if state in ("lives", "ended"):
            servers.check_same_host()
        else:
            with pytest.raises(ClusterError, match=f"{path} is of {state}, .* run ./stop.sh there"):
                servers.check_same_host()
        process.kill()
        until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, 20, "it has ended")
        assert servers.process("1234") is None


def test_pid_files_of_another_host_are_left_alone(checkout):
    servers = checkout.path / "run/servers"
    servers.mkdir(parents=True)
    (servers / "launcher.pid").write_text(f"{os.getpid()}\nnode2:{ANOTHER_BOOT['boot']}:1:1\n")
    for command in (("stop_all_server.sh",), ("start_all_server.sh", "1"), ("run_simulation.sh", "1", "10")):
        done = checkout.run(*command)
        assert done.returncode == 3 and "launcher.pid is of host node2" in last_line(done.stderr)
        assert (servers / "launcher.pid").exists()


def test_a_command_reports_that_it_waits_for_another(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(pid_files, "SERVERS", tmp_path)
    said: list[str] = []

    def begin() -> None:
        with pid_files.one_at_a_time():
            said.append("began")

    with pid_files.one_at_a_time():
        second = threading.Thread(target=begin)
        second.start()
        until(lambda: said.append(capfd.readouterr().err) or "waiting for another command" in "".join(said), 20, "told")
        assert "began" not in said
    second.join()
    assert said[-1] == "began"


def test_term_ends_servers_in_the_middle_of_a_round(checkout, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import time\nfrom participant import Participant\nclass Mine(Participant):\n"
        "    def reply(self, x):\n        time.sleep(600)\n"
    )
    assert checkout.run("start_all_server.sh", "2").returncode == 0
    games = [
        checkout.start("run_simulation.sh", *BUSY),
        checkout.start("run_simulation.sh", *BUSY, "--agent-class", f"{mine}:Mine"),
    ]
    until(
        lambda: sum(log.read_text().count("ParticipantGroup") for log in checkout.path.glob("run/servers/*.log")) >= 8,
        30,
        "both",
    )
    assert checkout.run("stop_all_server.sh").stdout == "stopped 6 agent servers\n"
    for game in games:
        _, err = game.communicate(timeout=120)
        assert game.returncode == 4, err
        assert "Traceback" not in err
    logs = "".join(log.read_text() for log in checkout.path.glob("run/servers/*.log"))
    assert "ended with exit status 0" in logs and "SIGKILL" not in logs


def test_a_server_that_hangs_is_killed(checkout):
    assert checkout.run("start_all_server.sh", "1", env={"MODERATOR_NUM": "1"}).returncode == 0
    os.kill(checkout.pid(0), signal.SIGSTOP)
    assert checkout.run("stop_all_server.sh").stdout == "stopped 2 agent servers\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_round_is_recorded_and_its_agents_deleted(checkout, number, status):
    mine = checkout.path / "mine.py"
    mine.write_text(
        "import asyncio, pathlib\nfrom participant import Participant\nclass Mine(Participant):\n"
        "    async def answer(self, question):\n"
        "        await asyncio.sleep(600 * (self.index >= 30))\n"
        f"        pathlib.Path({str(checkout.path)!r}, f'answered-{{self.index}}').touch()\n        return 50\n"
    )
    log = checkout.path / "stderr"
    with log.open("w") as stderr:
        flags = ("--rounds", "3", "--agent-class", f"{mine}:Mine")
        game = checkout.start("run_simulation.sh", "2", "100", *flags, stderr=stderr)
        until(lambda: len(list(checkout.path.glob("answered-*"))) == 30, 20, "those who answer have answered")
        game.send_signal(number)
        os.killpg(game.pid, number)  # as `timeout` does, which signals its child and then the group
        out, _ = game.communicate(timeout=120)
    err = log.read_text()
    assert game.returncode == status, err
    assert "Traceback" not in err and "stopped the 6 agent servers" in err and "results so far are kept" in err
    summary = checkout.summary()
    assert summary["status"] == "interrupted" and len(summary["rounds"]) == 1
    played = summary["rounds"][0]
    assert (played["asked"], played["answered"], played["failures"]) == (100, 30, {"interrupted": 70})
    assert "The average value is 50.000" in out
    assert [row["value"] for row in checkout.answers()] == [50.0] * 30 + [None] * 70


def test_ctrl_c_ends_a_round_of_blocking_participants(checkout):
    mine = checkout.path / "mine.py"
    mine.write_text(
        "import time\nfrom participant import Participant\nclass Mine(Participant):\n"
        "    async def answer(self, question):\n        time.sleep(600 * (question.round > 1))\n        return 50\n"
    )
    with (checkout.path / "stderr").open("w+") as log:
        game = checkout.start(
            "run_simulation.sh", "2", "100", "--rounds", "2", "--agent-class", f"{mine}:Mine", stderr=log
        )
        until(lambda: "round 2: asking" in (checkout.path / "stderr").read_text(), 20, "round 2 has begun")
        game.send_signal(signal.SIGINT)
        game.communicate(timeout=120)
    assert game.returncode == 130
    summary = checkout.summary()
    assert summary["status"] == "interrupted" and [entry["answered"] for entry in summary["rounds"]] == [100, 0]
    assert summary["rounds"][1]["failures"] == {"interrupted": 100}
    assert len(checkout.answers()) == 200


def test_a_second_ctrl_c_ends_at_once(checkout):
    mine = checkout.path / "mine.py"
    mine.write_text(
        "import time\nfrom participant import Participant\nclass Mine(Participant):\n"
        "    def reply(self, x):\n        time.sleep(600)\n"
    )
    log = checkout.path / "stderr"
    with log.open("w") as stderr:
        flags = ("--agent-class", f"{mine}:Mine", "--dispatch", "agent")
        game = checkout.start("run_simulation.sh", "2", "100", *flags, stderr=stderr)
        until(lambda: "round 1: asking" in log.read_text(), 20, "the round has begun")
        launcher = psutil.Process(checkout.pid_in("servers/launcher"))
        launcher.suspend()  # so that an end that is not at once takes longer
        try:
            game.send_signal(signal.SIGINT)
            until(lambda: "once more to end at once" in log.read_text(), 10, "the first one is heard")
            until(lambda: game.send_signal(signal.SIGINT) or game.poll() is not None, 10, "another one is heard")
            game.communicate(timeout=120)
        finally:
            launcher.resume()
    assert game.returncode == 130
    assert "Traceback" not in log.read_text() and "stopped the 6 agent servers" not in log.read_text()
    assert "the run ends with 0 of 1 rounds played; to go on with it: ./run_simulation.sh --resume" in log.read_text()
    until(lambda: not checkout.processes(), 10, "the servers end with their main")
    open_again(checkout)


def test_a_repeated_signal_counts_once(monkeypatch):
    ended, clock, watch = [], [100.0], console.ConsoleProgress()
    monkeypatch.setattr(console.os, "_exit", ended.append)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for later, exits in ((0, []), (0.001, []), (0.9, []), (0.2, [143])):  # seconds after the one before
        clock[0] += later
        watch.signalled(signal.SIGTERM, None)
        assert (watch.stop_signal, ended) == (signal.SIGTERM, exits)


def test_a_signal_that_is_ignored_stays_so():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        console.on_stop_signals(console.ConsoleProgress().signalled)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_closed_terminal_ends_the_round_early(checkout):
    ours, theirs = pty.openpty()
    flags = ("--rounds", "3", "--sleep-time", "60")
    game = checkout.start("run_simulation.sh", "2", "10", *flags, stderr=theirs, env={"TERM": "xterm"})
    os.close(theirs)
    seen = b""
    while b"answers in" not in seen:
        seen += os.read(ours, 65536)
    os.close(ours)
    game.send_signal(signal.SIGHUP)
    game.communicate(timeout=120)
    assert game.returncode == 129
    assert checkout.summary()["status"] == "interrupted"


def test_servers_of_a_run_end_with_a_main_that_was_killed(checkout):
    game = checkout.start("run_simulation.sh", *BUSY)
    until((checkout.path / "runs/latest/summary.json").exists, 20, "the round has begun")
    game.kill()
    game.communicate()
    until(lambda: not checkout.processes(), 10, "the servers end with their main")
    open_again(checkout)


def test_servers_of_one_run_are_not_used_by_another(checkout, tmp_path):
    gates = Gates(tmp_path)
    game = checkout.start("run_simulation.sh", "2", "20", *gates.flags)
    until((checkout.path / "run/servers/launcher.pid").exists, 20, "it starts its servers")
    for command in (("run_simulation.sh", "2", "10"), ("start_all_server.sh", "2")):
        done = checkout.run(*command)
        assert done.returncode == 3 and "another run of this checkout" in last_line(done.stderr)
    gates.open()
    game.communicate(timeout=120)
    assert game.returncode == 0 and checkout.summary()["rounds"][0]["answered"] == 20


def test_a_key_that_others_can_read_stops_everything(checkout):
    checkout.play("2", "10", "--sleep-time", "0")
    runs = checkout.runs()
    (checkout.path / ".cluster/cluster.key").chmod(0o644)
    for command in (("run_simulation.sh", "2", "10"), ("start_all_server.sh", "2")):
        done = checkout.run(*command)
        assert done.returncode == 2 and "chmod 600" in last_line(done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1
    assert checkout.runs() == runs


def test_a_read_only_runs_folder_is_refused_before_anything_starts(checkout):
    (checkout.path / "runs").mkdir(mode=0o555)
    done = checkout.run("run_simulation.sh", "2", "10", "--seed", "7")
    assert done.returncode == 2 and "read-only" in done.stderr and len(done.stderr.splitlines()) == 1
    assert checkout.processes() == [] and checkout.runs() == set()
    (checkout.path / "runs").rmdir()
    (checkout.path / "runs").write_text("not a folder")
    done = checkout.run("run_simulation.sh", "2", "10", "--seed", "7")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounts a small file system, which takes root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], check=True)
    yield folder
    until(lambda: subprocess.run(["umount", str(folder)], check=False).returncode == 0, 10, "nobody uses it any more")


def test_a_full_disk_is_refused_before_anything_starts(checkout, small_disk):
    (small_disk / "earlier").write_bytes(b"x" * 500_000)
    done = checkout.run("run_simulation.sh", "2", "10", "--seed", "7", "--run-dir", str(small_disk / "run"))
    assert done.returncode == 5 and "No space left" in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in small_disk.iterdir()) == ["earlier"]


def test_a_full_disk_for_pid_files_and_logs_is_refused_before_anything_starts(checkout, small_disk):
    (checkout.path / "run").symlink_to(small_disk)
    (small_disk / "servers").mkdir()
    (small_disk / "earlier").write_bytes(b"x" * 560_000)
    done = checkout.run("start_all_server.sh", "1")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "cannot write in" in done.stderr and "No space left" in done.stderr
    assert checkout.processes() == [] and [path.name for path in (small_disk / "servers").iterdir()] == ["lock"]
    (small_disk / "earlier").unlink()
    assert checkout.run("start_all_server.sh", "1").returncode == 0
    assert checkout.run("stop_all_server.sh").returncode == 0
    (checkout.path / "run").unlink()


def test_a_read_only_run_is_not_resumed(checkout, small_disk):
    checkout.play("2", "10", "--sleep-time", "0", "--run-dir", str(small_disk / "run"))
    before = sorted(path.name for path in (small_disk / "run").iterdir())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = checkout.run("run_simulation.sh", "--resume", str(small_disk / "run"), "--rounds", "2")
    assert done.returncode == 2 and "read-only" in one_line(done.stderr) and "--run-dir" not in done.stderr
    assert sorted(path.name for path in (small_disk / "run").iterdir()) == before


def test_a_full_disk_keeps_the_finished_rounds(checkout, small_disk):
    flags = ("--rounds", "5", "--max-value", "1000000000", "--decimals", "3", "--sleep-time", "0")
    run = small_disk / "run"
    done = checkout.run("run_simulation.sh", "2", "20000", *flags, "--run-dir", str(run))
    assert done.returncode == 5 and "No space left" in last_line(done.stderr)
    summary = checkout.summary(run)
    assert done.stdout.count("The average value is") == len(summary["rounds"]) >= 1  # what is told is written
    assert summary["status"] in ("failed", "interrupted") and len(summary["rounds"]) >= 1
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    kept = sum(len(pq.read_table(path)) for path in run.glob("answers*.parquet"))
    assert kept >= 20_000 * len(summary["rounds"])


def test_a_closed_pipe_on_standard_output_does_not_stop_a_run(checkout):
    checkout.cold = True
    game = checkout.start("run_simulation.sh", "2", "10", "--sleep-time", "0")
    assert game.stdout is not None and game.stderr is not None
    game.stdout.close()
    err = game.stderr.read()
    game.stderr.close()
    assert game.wait(timeout=120) == 0, err
    assert checkout.summary()["status"] == "complete"


@pytest.mark.slow
def test_a_full_disk_behind_standard_output_does_not_stop_a_run(checkout):
    checkout.cold = True
    with Path("/dev/full").open("w") as full:
        game = checkout.start("run_simulation.sh", "2", "10", "--sleep-time", "0", stdout=full)
        _, err = game.communicate(timeout=120)
    assert game.returncode == 0, err
    assert checkout.summary()["status"] == "complete"


LOST_STREAMS = [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", ">/dev/full 2>/dev/full", "| true", "2>&1 | true"]


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("streams", LOST_STREAMS)
def test_output_that_cannot_be_written_changes_no_exit_status(streams, unbuffered):
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    for arguments, status in (("--help", 0), ("--role vllm --status", 0), ("--dry-run", 0), ("--colour red", 2)):
        words = ["bash", "-c", f'"$@" {streams}; exit "${{PIPESTATUS[0]}}"', "", sys.executable, ROOT / "main.py"]
        done = subprocess.run([*words, *arguments.split()], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_game_finishes_without_writable_output(checkout):
    env = {**os.environ, "BASE_PORT": str(checkout.base_port)}
    command = ["bash", "-c", "./run_simulation.sh 2 10 --sleep-time 0 >&- 2>/dev/full"]
    done = subprocess.run(command, cwd=checkout.path, env=env, check=False, timeout=120)
    assert done.returncode == 0 and checkout.summary()["status"] == "complete"


def test_term_while_servers_start_stops_them(checkout):
    start = checkout.start("start_all_server.sh", "4")
    until((checkout.path / "run/servers/launcher.log").exists, 20, "the launcher is there")
    start.send_signal(signal.SIGTERM)
    _, err = start.communicate(timeout=120)
    assert start.returncode == 143 and "Traceback" not in err
    assert checkout.processes() == []


def test_ports_of_four_and_five_digits_are_sorted_as_numbers(checkout):
    env = {"BASE_PORT": "9997"}
    with socket.socket() as guard:  # another run of the tests on this machine waits for its turn
        until(lambda: bound(guard, 9996), 60, "the ports around 10000 are another's")
        if not all(is_free(port) for port in range(9997, 10_003)):
            pytest.skip("the ports around 10000 are taken")
        for _ in range(2):
            assert checkout.run("start_all_server.sh", "2", env=env).returncode == 0
        assert checkout.run("stop_all_server.sh", env=env).stdout == "stopped 6 agent servers\n"


def bound(guard: socket.socket, port: int) -> bool:
    try:
        guard.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def test_a_failing_link_is_refused_before_anything_starts(checkout, tmp_path):
    (checkout.path / "runs/latest").mkdir(parents=True)
    done = checkout.run("run_simulation.sh", "2", "10", "--run-dir", str(tmp_path / "results"))
    assert done.returncode == 2 and "is meant to be a link" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_ctrl_c_with_dispatch_agent_keeps_answers(checkout):
    mine = checkout.path / "mine.py"
    mine.write_text(
        "import pathlib, time\nfrom participant import Participant\nfrom agentscope.message import Msg\n"
        "class Mine(Participant):\n    def reply(self, x):\n        time.sleep(600 * (self.index >= 5))\n"
        f"        pathlib.Path({str(checkout.path)!r}, f'answered-{{self.index}}').touch()\n"
        "        return Msg(self.name, '50', 'assistant')\n"
    )
    with (checkout.path / "stderr").open("w") as log:
        flags = ("--agent-class", f"{mine}:Mine", "--dispatch", "agent")
        game = checkout.start("run_simulation.sh", "2", "10", *flags, stderr=log)
        until(lambda: len(list(checkout.path.glob("answered-*"))) == 5, 20, "those who answer have answered")
        game.send_signal(signal.SIGINT)
        game.communicate(timeout=120)
    assert game.returncode == 130
    played = checkout.summary()["rounds"][0]
    assert (played["answered"], played["failures"]) == (5, {"interrupted": 5})


def test_a_log_gets_occasional_progress_lines(checkout):
    done = checkout.run("run_simulation.sh", "2", "10", "--sleep-time", "7")
    assert "answers in: 0 of 10" in done.stderr and "\x1b" not in done.stderr


def test_a_terminal_gets_a_progress_bar(checkout):
    ours, theirs = pty.openpty()
    game = checkout.start("run_simulation.sh", "2", "10", "--sleep-time", "2", stderr=theirs, env={"TERM": "xterm"})
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    out, _ = game.communicate(timeout=120)
    assert game.returncode == 0
    for stage in (b"agent servers ready", b"answers in"):
        assert stage in seen
    assert "━".encode() in seen and seen.rstrip().endswith(b"agent servers of this run")
    assert "Moderator: The average value is" in out and "\x1b" not in out


def test_no_other_process_is_started(checkout):
    """The launcher forks one process per port, and imports AgentScope once."""
    assert checkout.run("start_all_server.sh", "2").returncode == 0
    launcher = psutil.Process(checkout.pid_in("servers/launcher"))
    assert {child.pid for child in launcher.children()} == {checkout.pid(offset) for offset in range(6)}
    assert len(checkout.processes()) == 7
    assert checkout.run("stop_all_server.sh").returncode == 0
