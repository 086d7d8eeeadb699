"""Servers that die, hang or are cut off in mid-round, on four real hosts: no answer lost, made up or counted twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import until
from hosts import BASE_PORT, NODES, SERVER_PER_HOST
from waiting import Gates

from games.average import Average
from simulation.game.rules import draw
from simulation.settings import SimulationConfig

PARTICIPANTS = 1600  # 100 on each server
CHAIR = BASE_PORT + SERVER_PER_HOST  # the moderator server of each host
SOON_S = 8  # on a busy machine, too, what answers is not taken for lost
SOON = ("--heartbeat-timeout", str(SOON_S))


class Playing:
    """A game under way on node1, with seed 7, and what it has logged so far."""

    def __init__(self, hosts, log: Path, *flags: str) -> None:
        self._node1 = hosts["node1"]
        self._log = log
        with log.open("w") as stderr:
            command = ("run_simulation.sh", str(SERVER_PER_HOST), str(PARTICIPANTS), "--seed", "7", *flags)
            self._process = self._node1.start(*command, stderr=stderr)

    def logged(self, text: str, times: int = 1) -> None:
        """Wait until the log holds this text, so often."""
        until(lambda: self._log.read_text().count(text) >= times, 120, f"{text!r} in {self._log}")

    def all_answer(self) -> None:
        """Wait until the log says that, in round 2."""
        said = "20 of 20 servers answer"
        until(lambda: said in self._log.read_text().partition("round 2: asking")[2], 120, f"{said} in {self._log}")

    def end(self, status: int = 0, timeout_s: float = 150) -> dict:
        """Wait for the end, check the exit status, and return summary.json."""
        self._process.communicate(timeout=timeout_s)
        assert self._process.returncode == status, self._log.read_text()
        assert "Traceback" not in self._log.read_text()
        return self._node1.summary()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def play(hosts, tmp_path):
    return lambda *flags: Playing(hosts, tmp_path / "stderr", *flags)


def drawn(rounds: int) -> list[int]:
    """What an undisturbed game is answered, round by round."""
    game = Average(7, SimulationConfig().max_value, 0, 0.0)
    return [draw(game, number + 1, index) for number in range(rounds) for index in range(PARTICIPANTS)]


def check_whole(hosts, summary: dict, rounds: int) -> None:
    """Check that every participant was counted once in every round, with the answer of an undisturbed game."""
    assert summary["status"] == "complete"
    for played in summary["rounds"]:
        assert (played["asked"], played["answered"], played["failed"]) == (PARTICIPANTS, PARTICIPANTS, 0)
    expected = drawn(rounds)
    assert hosts["node1"].values() == expected
    averages = [
        sum(expected[at : at + PARTICIPANTS]) / PARTICIPANTS for at in range(0, rounds * PARTICIPANTS, PARTICIPANTS)
    ]
    assert [played["average"] for played in summary["rounds"]] == pytest.approx(averages)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that hangs, for as long as the context lasts."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("dispatch", "port"),
    [
        pytest.param("group", BASE_PORT + 1, id="group-participant server"),
        pytest.param("group", CHAIR, id="group-moderator server", marks=pytest.mark.slow),
        pytest.param("agent", BASE_PORT + 1, id="agent-participant server", marks=pytest.mark.slow),
        pytest.param("agent", CHAIR, id="agent-moderator server"),
    ],
)
def test_a_server_that_is_killed(hosts, play, tmp_path, port, dispatch):
    flags = ("--participant-num", "400") if dispatch == "agent" else ()
    gates = Gates(tmp_path, "question.round == 1 and self.index % 2", note=dispatch == "agent")
    game = play("--rounds", "2", "--dispatch", dispatch, *flags, *gates.flags)
    game.logged("round 1: asking")
    if dispatch == "agent":
        until(lambda: (tmp_path / "asked").exists() and len(gates.asked()) > 100, 30, "many are asked, some say it")
    os.kill(hosts["node2"].pid_at(port), signal.SIGKILL)
    game.logged(f"node2:{port} is lost")
    gates.open()
    summary = game.end()
    first, second = summary["rounds"]
    assert summary["cluster"]["lost"] == [f"node2:{port}"]
    assert 0 < first["reassigned"] < first["asked"]
    assert second["reassigned"] in (0, first["reassigned"])  # a server that was started again plays again
    if dispatch == "group":
        check_whole(hosts, summary, 2)
    else:
        assert hosts["node1"].values() == drawn(1)[:400] + [
            draw(Average(7, 100, 0, 0.0), 2, index) for index in range(400)
        ]
    if dispatch == "agent" and port == CHAIR:
        assert gates.asked() == [(number, index) for number in (1, 2) for index in range(400)]


@pytest.mark.slow  # a host that is cut off is as silent
@pytest.mark.parametrize("port", [BASE_PORT, CHAIR], ids=["participant server", "moderator server"])
def test_a_server_that_hangs_and_comes_back(hosts, play, tmp_path, port):
    gates = Gates(tmp_path, "question.round == 1", "question.round == 2")
    game = play("--rounds", "6", *gates.flags, *SOON)
    game.logged("round 1: asking")
    with stopped(hosts["node3"].pid_at(port)):
        game.logged(f"node3:{port} is lost: sent no heartbeat for ")
        gates.open(0)
        game.logged("round 2: asking")
    game.all_answer()
    gates.open(1)
    game.logged(f"node3:{port} answers again, and is used from round 3 on")
    summary = game.end()
    assert summary["cluster"]["lost"] == [f"node3:{port}"]
    assert summary["rounds"][0]["reassigned"] > 0 and summary["rounds"][5]["reassigned"] == 0
    check_whole(hosts, summary, 6)


def test_a_host_that_is_cut_off_and_comes_back(hosts, play, tmp_path):
    gates = Gates(tmp_path, "question.round == 1", "question.round == 2")
    game = play("--rounds", "6", *gates.flags, *SOON)
    game.logged("round 1: asking")
    hosts.cut("node4")
    try:
        for port in range(BASE_PORT, CHAIR + 1):
            game.logged(f"node4:{port} is lost")
        gates.open(0)
        game.logged("round 2: asking")
    finally:
        hosts.mend("node4")
    game.all_answer()
    gates.open(1)
    game.logged(f"node4:{BASE_PORT} answers again, and is used from round 3 on")
    summary = game.end()
    assert {name.partition(":")[0] for name in summary["cluster"]["lost"]} == {"node4"}
    assert len(summary["cluster"]["lost"]) == SERVER_PER_HOST + 1
    assert summary["rounds"][5]["reassigned"] == 0
    check_whole(hosts, summary, 6)


def test_a_slow_server_is_not_marked_down(hosts, play, tmp_path):
    gates = Gates(tmp_path)
    game = play(*gates.flags, *SOON, "--lease", str(SOON_S))
    line = f"answers in: 0 of {PARTICIPANTS:,}; 20 of 20 servers answer"
    game.logged(line, times=1 + SOON_S // 5)  # a line every 5 s
    gates.open()
    summary = game.end()
    assert summary["cluster"]["lost"] == []
    check_whole(hosts, summary, 1)


def test_too_few_servers_end_the_game_and_keep_finished_rounds(hosts, play, tmp_path):
    gates = Gates(tmp_path, "question.round == 2")
    game = play("--rounds", "3", *gates.flags, "--min-servers", str(4 * SERVER_PER_HOST))
    game.logged("round 2: asking")
    os.kill(hosts["node2"].pid_at(BASE_PORT), signal.SIGKILL)
    summary = game.end(status=4)
    assert summary["status"] == "failed" and summary["cluster"]["lost"] == [f"node2:{BASE_PORT}"]
    assert [played["answered"] for played in summary["rounds"]] == [PARTICIPANTS]
    assert hosts["node1"].values() == drawn(1)
    game.logged("error: round 2 cannot be finished: 15 of 16 participant servers are left; --min-servers asks for 16")


@pytest.mark.slow
def test_a_main_that_is_killed_is_resumed_on_other_hosts(hosts, play, tmp_path):
    node1, gates = hosts["node1"], Gates(tmp_path, "question.round == 3")
    game = play("--rounds", "4", *gates.flags)
    game.logged("round 3: asking")
    game.kill()
    gates.open()
    run = (node1.path / "runs/latest").resolve()
    assert node1.summary()["status"] == "interrupted" and len(node1.summary()["rounds"]) == 2
    resumed = node1.run("run_simulation.sh", "--resume", str(run), env={"HOSTS": "node1 node2 node3"})
    assert resumed.returncode == 0, resumed.stderr
    summary = node1.summary()
    assert summary["run_id"] == run.name and summary["config"]["hosts"] == ["node1", "node2", "node3"]
    check_whole(hosts, summary, 4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_is_killed_every_second_of_twenty_rounds(hosts, play):
    """A different one each time, participant and moderator servers alike: the launchers start them again."""
    dice = random.Random(11)
    over = threading.Event()
    killed: list[str] = []

    def kill_one_every_second() -> None:
        while not over.wait(1.0):
            host, port = dice.choice(hosts.nodes), dice.randrange(BASE_PORT, CHAIR + 1)
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # not up again yet
                os.kill(host.pid_at(port), signal.SIGKILL)
                killed.append(f"{host.name}:{port}")

    game = play("--rounds", "20", "--sleep-time", "0.5")
    game.logged("round 1: asking")
    chaos = threading.Thread(target=kill_one_every_second)
    chaos.start()
    try:
        summary = game.end(timeout_s=600)
    finally:
        over.set()
        chaos.join()
    assert len(killed) > 10
    assert set(summary["cluster"]["lost"]) <= set(killed)
    assert sum(played["reassigned"] for played in summary["rounds"]) > 0
    check_whole(hosts, summary, 20)
    assert set(summary["config"]["hosts"]) == set(NODES)
