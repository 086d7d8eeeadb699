"""The failure detector on real agent servers, and calls that a group receives late."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import psutil
import pytest
from conftest import until
from waiting import Gates

from games.average import Average
from participant import RandomParticipant
from simulation.agents.group import ParticipantGroup
from simulation.cluster.agent_class import serialize_agent_class
from simulation.cluster.failure_detector import FailureDetector
from simulation.errors import ServerUnreachable
from simulation.game.rules import question_for
from simulation.llm.responses import Usage
from simulation.rpc.channels import call_all_or_raise, handshake, install_tls, translated_error
from simulation.rpc.client import RemoteObject
from simulation.rpc.cluster_key import load
from simulation.rpc.endpoints import Endpoint
from simulation.rpc.messages import HeartbeatReply, Progress

GAME = Average(7, 100, 0, 0.0)
TIMEOUT_S = 6.0  # on a busy machine, too, a server that answers is not taken for lost


@pytest.fixture
def server(cluster):
    """The address of a participant server, and its pid."""
    install_tls(load(Path(cluster.path / ".cluster")))
    return Endpoint("localhost", cluster.base_port), cluster.pid(0)


@pytest.fixture
def detector(server):
    endpoint, _ = server
    with FailureDetector("run~1", {endpoint: handshake(endpoint, 5).incarnation}, TIMEOUT_S, 60) as made:
        made.poll_now(0)
        until(lambda: made.statuses[endpoint].requested_at > 0, 5, "the first reply")
        yield made


def group_on(endpoint: Endpoint, oid: str) -> RemoteObject:
    kwargs = {
        **{
            "oid": oid,
            "first": 0,
            "count": 10,
            "game": GAME,
            "participant_class": serialize_agent_class(RandomParticipant),
        },
        **{"reply_threads": 1, "lease_s": 60.0},
    }
    return RemoteObject(ParticipantGroup, oid, endpoint, 600.0, kwargs)


def without_cost(progress: Progress) -> Progress:
    return replace(progress, usage=[])


def test_a_heartbeat_reports_the_progress_of_the_objects_of_the_run(server, detector):
    endpoint, _ = server
    group = group_on(endpoint, "run~1/group-0")

    def progress() -> dict[str, Progress]:
        return {oid: without_cost(each) for oid, each in detector.statuses[endpoint].reply.objects.items()}

    detector.poll_now(0)
    until(lambda: progress() == {"run~1/group-0": Progress(10, 10)}, 5, "the group is reported")
    group.begin(question_for(GAME, 1, ()))
    detector.poll_now(1)
    until(lambda: progress() == {"run~1/group-0": Progress(10, 10, 1)}, 5, "the round is over")
    used = Usage(*detector.statuses[endpoint].reply.objects["run~1/group-0"].usage)
    assert used.answering_s > 0 and used == Usage(answering_s=used.answering_s, client_s=used.client_s)
    group.begin(question_for(GAME, 2, ()))
    until(lambda: without_cost(group.progress(1.0)) == Progress(10, 10, 2), 5, "round 2 is over")
    assert Usage(*group.progress().usage).answering_s > used.answering_s
    group.begin(question_for(GAME, 1, ()))  # as a moderator may that had hung meanwhile
    assert without_cost(group.progress(0.0)) == Progress(10, 10, 2)
    assert group.client.delete_agent("run~1/group-0")


def test_calls_to_a_hanging_server_end_when_its_heartbeats_stop(server, detector):
    endpoint, pid = server
    group = group_on(endpoint, "run~1/group-1")
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(2):  # one that waits when the server is given up on, and one that is made later
            with pytest.raises(ServerUnreachable, match="was given up on"):
                group.progress(0.0)
        status = detector.statuses[endpoint]
        assert re.fullmatch(r"sent no heartbeat for \d+\.\d s", status.why)
        assert not status.up and not status.has_recovered and status.losses == 1
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: detector.statuses[endpoint].has_recovered, 10, "it answers again")
    assert not detector.statuses[endpoint].up
    detector.mark_up(endpoint)
    assert detector.statuses[endpoint].up and without_cost(group.progress(0.0)) == Progress(10, 10)
    assert group.client.delete_agent("run~1/group-1")


def suspended_main(cluster, log: Path, *flags: str):
    """A game in its first round, with seed 7, and its main process, which was stopped."""
    with log.open("w") as stderr:
        game = cluster.start("run_simulation.sh", "3", "60", "--seed", "7", *flags, stderr=stderr)
    until(lambda: "round 1: asking" in log.read_text(), 30, "round 1")
    (main,) = (process for process in cluster.processes() if "--participant-num" in process.info["cmdline"])
    main.suspend()
    return game, main


def test_a_suspended_main_does_not_mark_servers_down(cluster, tmp_path):
    log, gates = tmp_path / "stderr", Gates(tmp_path)
    game, main = suspended_main(cluster, log, *gates.flags, "--heartbeat-timeout", "5")
    time.sleep(9)  # what is tested is a time in which main does nothing, longer than that
    main.resume()
    gates.open()
    game.communicate(timeout=120)
    assert game.returncode == 0, log.read_text()
    assert cluster.summary()["cluster"]["lost"] == [] and "is lost" not in log.read_text()


@pytest.mark.slow
def test_a_main_suspended_beyond_its_lease_recreates_all_participants(cluster, tmp_path):
    log, gates = tmp_path / "stderr", Gates(tmp_path)
    game, main = suspended_main(cluster, log, *gates.flags, "--lease", "5")
    servers = [cluster.path / f"run/servers/{cluster.base_port + offset}.log" for offset in range(7)]
    until(lambda: all("dropping 2" in server.read_text() for server in servers), 20, "all have dropped their agents")
    main.resume()
    gates.open()
    game.communicate(timeout=120)
    assert game.returncode == 0, log.read_text()
    played = cluster.summary()["rounds"][0]
    assert (played["answered"], played["reassigned"]) == (60, 60)
    cluster.play("3", "60", "--sleep-time", "0", "--seed", "7")
    assert cluster.summary()["rounds"][0]["average"] == played["average"]


def test_a_reply_of_another_program_is_recognised():
    reply = HeartbeatReply("abc", {"run/group-0": Progress(1, 2, 3, "", [4, 0.5])})
    assert HeartbeatReply.from_json(reply.to_json()) == reply
    for text in ("", "[]", "{}", '{"incarnation": "a", "objects": {"x": {}}}', '{"incarnation": "a", "objects": 5}'):
        assert HeartbeatReply.from_json(text) is None


def test_the_channels_of_earlier_runs_are_closed(cluster):
    """As in a sweep, whose runs each make their own: a main has but so many files."""
    servers = [Endpoint("localhost", cluster.base_port + offset) for offset in range(7)]
    ports = {server.port for server in servers}

    def connections() -> int:
        return sum(bool(each.raddr) and each.raddr.port in ports for each in psutil.Process().net_connections("tcp"))

    install_tls(load(cluster.path / ".cluster"))
    before = connections()
    for _ in range(5):
        install_tls(load(cluster.path / ".cluster"))
        call_all_or_raise({server: partial(handshake, server, 60) for server in servers})
    until(lambda: connections() <= before + len(servers), 60, "only the last channels are open")


class _Refusal(grpc.RpcError):
    """An error of a call with the status `code`."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.code, self.details = lambda: code, lambda: "the words of the library"


@pytest.mark.parametrize("name", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"])
def test_a_call_that_its_server_does_not_finish_is_the_loss_of_the_server(name):
    """A server that is stopped cancels the calls that it is executing."""
    error = translated_error(_Refusal(grpc.StatusCode[name]), Endpoint("localhost", 12330))
    assert isinstance(error, ServerUnreachable) and str(error).startswith("localhost:12330: ")
