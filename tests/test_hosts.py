"""Several hosts for real: network namespaces, each with the agent servers that its own scripts started."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import one_line, until
from hosts import BASE_PORT, MODERATOR_NUM, NODES, SERVER_PER_HOST, UNTRUSTED

from games.average import Average
from simulation.game.rules import draw
from simulation.settings import SimulationConfig

PORTS = range(BASE_PORT, BASE_PORT + SERVER_PER_HOST + MODERATOR_NUM)
MAIN = ("main.py", "--role", "participant", "--server-per-host", str(SERVER_PER_HOST), "--base-port", str(BASE_PORT))
MAIN = (*MAIN, "--moderator-per-host", str(MODERATOR_NUM))  # which, unlike the scripts, heeds PYTHONPATH
NOBODY = "10.77.0.99"  # an address in the hosts' network that no host has
CHECK_TIMEOUT_S = 15.0
MARGIN_S = 13.0  # a busy machine; two deadlines one after the other would be 30 s
CHECKED = ("--connect-timeout", str(CHECK_TIMEOUT_S))

LISTENS = """
import socket, sys
for address in sys.argv[1:3]:
    for port in range(int(sys.argv[3]), int(sys.argv[4])):
        with socket.socket() as probe:
            print(probe.connect_ex((address, port)))
"""
TIMED = """
import sys, time
import main, simulation.results.charts, simulation.runs.run
began = time.monotonic()
status = main.main(sys.argv[1:])
print(time.monotonic() - began)
sys.exit(status)
"""
OTHER_VERSIONS = """
import importlib.metadata, platform
platform.python_version = lambda: "3.12.99"
importlib.metadata.version = lambda name: "0.1.5"
"""
PATIENT = """
import asyncio, pathlib
from participant import RandomParticipant
class Patient(RandomParticipant):
    async def answer(self, question):
        while not pathlib.Path({over!r}).exists():
            await asyncio.sleep(0.5)
        return await super().answer(question)
"""
SILENT_NAME_SERVER = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind((sys.argv[1], 53))
    print("listening", flush=True)
    while True:
        server.recv(2000)
"""


def python(host, code, *arguments, **options):
    """Run code in the host's checkout and environment."""
    return host.run(".venv/bin/python", "-c", code, *arguments, **options)


def drawn(seed: int, participants: int) -> list[int]:
    """What this game's participants answer, wherever they are."""
    game = Average(seed, SimulationConfig().max_value, 0, 0.0)
    return [draw(game, 1, participant) for participant in range(participants)]


def agents(host) -> list[int]:
    """How many agents each of the host's servers holds, by --status."""
    return [int(row.split()[5]) for row in host.run("start_all_server.sh", "--status").stdout.splitlines()[1:]]


def check(host, *flags: str) -> tuple[dict[str, str], float]:
    """Play a game that the check of the hosts refuses; returns the line about each host, and the seconds it took."""
    runs = host.runs()
    done = python(host, TIMED, "--server-per-host", "4", "--moderator-per-host", "1", *flags, *CHECKED)
    assert done.returncode == 3, done
    assert host.runs() == runs
    lines = dict(re.fullmatch(r"error: ([^:]*): (.*)", line).groups() for line in done.stderr.splitlines())
    assert len(lines) == len(done.stderr.splitlines())
    return lines, float(done.stdout)


def test_servers_listen_at_the_address_of_their_host_only(hosts):
    for host in hosts.nodes:
        done = python(host, LISTENS, host.address, "127.0.0.1", str(PORTS.start), str(PORTS.stop))
        results = [int(line) for line in done.stdout.split()]
        assert results == [0] * len(PORTS) + [errno.ECONNREFUSED] * len(PORTS), done


@pytest.mark.slow  # test_recovery.py plays on as many hosts
def test_64000_participants_on_four_hosts_answer_as_on_one(hosts):
    summary = hosts["node1"].play("4", "64000", "--seed", "7", "--sleep-time", "0")
    assert summary["status"] == "complete" and summary["rounds"][0]["answered"] == 64_000
    assert summary["cluster"]["hosts"] == list(NODES)
    assert (summary["cluster"]["servers"], summary["cluster"]["moderators"]) == (16, 4)
    assert hosts["node1"].values() == drawn(7, 64_000)


def test_an_untrusted_client_on_the_network_is_refused_for_any_request(hosts, tmp_path):
    node1, written = hosts["node1"], tmp_path / "written by an untrusted client"
    pids = [host.pid_at(port) for host in hosts.nodes for port in PORTS]
    patient, over = tmp_path / "patient.py", tmp_path / "the attack is over"
    patient.write_text(PATIENT.format(over=str(over)))
    groups = node1.logs()[BASE_PORT].count("group-0")
    flags = ("--sleep-time", "0", "--seed", "7", "--agent-class", f"{patient}:Patient")
    game = node1.start("run_simulation.sh", "4", "400", *flags)
    try:
        until(lambda: node1.logs()[BASE_PORT].count("group-0") > groups, 20, "the round has begun")
        certificate, own = node1.path / ".cluster/cluster.crt", tmp_path / "a key of their own"
        targets = (f"node1:{PORTS[0]}", f"node2:{PORTS[1]}", f"node3:{PORTS[-1]}")
        attack = ("-m", "tests.untrusted", str(written), str(own), str(certificate), *targets)
        done = hosts[UNTRUSTED].run(".venv/bin/python", *attack)
    finally:
        over.touch()
        _, err = game.communicate(timeout=120)
    for target, became in json.loads(done.stdout).items():
        assert len(became) == 15 and set(became.values()) == {"UNAVAILABLE"}, (target, became)
    assert not written.exists()
    assert game.returncode == 0, err
    assert node1.values() == drawn(7, 400)
    assert [host.pid_at(port) for host in hosts.nodes for port in PORTS] == pids


def test_each_failing_host_gets_its_own_line(hosts, tmp_path):
    node1, node4, untrusted = hosts["node1"], hosts["node4"], hosts[UNTRUSTED]
    (tmp_path / "sitecustomize.py").write_text(OTHER_VERSIONS)
    participant = node4.path / "participant.py"
    source = participant.read_bytes()
    hung = hosts["node2"].pid_at(PORTS[2])
    hosts.stop_servers(("node3", "node4"))
    name_server = untrusted.start(".venv/bin/python", "-c", SILENT_NAME_SERVER, untrusted.address)
    try:
        participant.write_bytes(source + b"\n# edited on this host alone\n")
        with ThreadPoolExecutor() as pool:
            starts = [
                pool.submit(hosts.start_servers, ("node3",), 3),
                pool.submit(node4.run, *MAIN, "--host-name", "node4", env={"PYTHONPATH": str(tmp_path)}),
                pool.submit(hosts.start_servers, (UNTRUSTED,)),
            ]
        assert all(start.result() is None or start.result().returncode == 0 for start in starts)
        os.kill(hung, signal.SIGSTOP)
        node1.names({**hosts.names, "looped": "127.0.1.1", "gone": NOBODY})
        assert name_server.stdout.readline() == "listening\n"
        node1.etc("resolv.conf", f"nameserver {untrusted.address}\noptions timeout:30\n")
        before = node1.logs()
        lines, seconds = check(node1, "--hosts", *NODES, UNTRUSTED, "gone", "looped", "nowhere")
        assert node1.logs() == before and agents(node1) == [0] * 5  # nothing was created where all was well
    finally:
        os.kill(hung, signal.SIGCONT)
        name_server.kill()
        name_server.communicate()
        (node1.etc_folder / "resolv.conf").unlink(missing_ok=True)
        node1.names(hosts.names)
        participant.write_bytes(source)
        hosts.stop_servers(("node3", "node4", UNTRUSTED))
        hosts.start_servers(("node3", "node4"))
    restart = "restart them: ./stop_all_server.sh, then ./start_all_server.sh 4"
    expected = {
        "node2": rf"4 of 5 agent servers are ready; node2:{PORTS[2]}: does not answer in time; {restart}",
        "node3": f"it has 3 participant and 1 moderator servers from port {BASE_PORT}; this run asks for 4 and 1 from "
        f"{BASE_PORT}; {restart}",
        "node4": rf"node4:{BASE_PORT} runs another version of the program \(\w+ there, \w+ here\), "
        rf"Python \(3.12.99 there, {platform.python_version()} here\), AgentScope \(0.1.5 there, 0.1.6 here\); "
        f"make the host like this one, and {restart}",
        "untrusted": f"0 of 5 agent servers are ready; untrusted:{BASE_PORT}: what listens there does not hold this "
        f"cluster's key; copy the folder of the cluster key there, and {restart}",
        "gone": rf"0 of 5 agent servers are ready; gone:{BASE_PORT}: "
        r"(cannot be reached \(.*\)|does not answer in time); "
        f"see whether the host is up and in reach, or {restart}",
        "looped": "the name stands for 127.0.1.1 here, where no other host can reach it; .*",
        "nowhere": f"no address is known for this name after {CHECK_TIMEOUT_S:g} s; check /etc/hosts or DNS",
    }
    assert list(lines) == list(expected)
    for host, line in lines.items():
        assert re.fullmatch(expected[host], line), line
    assert seconds < CHECK_TIMEOUT_S + MARGIN_S


@pytest.mark.slow
def test_unreachable_hosts_share_one_deadline(hosts):
    lost = NODES[1:]
    for name in lost:
        hosts.cut(name)
    try:
        lines, seconds = check(hosts["node1"], "--server-per-host", "20", "--hosts", *lost, "node1")
    finally:
        for name in lost:
            hosts.mend(name)
    assert list(lines) == [*lost, "node1"]
    assert lines["node1"].startswith("it has 4 participant and 1 moderator servers")  # heard, although asked last
    for name in lost:
        assert lines[name].startswith("0 of 21 agent servers are ready; ")
    assert seconds < CHECK_TIMEOUT_S + MARGIN_S
    assert hosts["node1"].play("4", "16", "--sleep-time", "0")["status"] == "complete"


@pytest.mark.parametrize(
    ("name", "trouble"),
    [
        (UNTRUSTED, "the name stands for 127.0.1.1 here, where no other host can reach it"),
        ("127.0.0.1", "the name stands for 127.0.0.1 here"),
        ("0.0.0.0", "the name stands for 0.0.0.0 here"),
        ("nowhere", "no address is known for this name; check /etc/hosts or DNS"),
        ("no..name", "no address is known for this name"),
        ("node2", "is not an address of this host"),
    ],
)
def test_a_loopback_host_name_of_a_cluster_is_refused(network, name, trouble):
    host = network[UNTRUSTED]
    host.names({**network.names, UNTRUSTED: "127.0.1.1"})  # as Debian writes it
    try:
        done = host.run("start_all_server.sh", "1", env={"HOST_NAME": name})
    finally:
        host.names(network.names)
    assert done.returncode == 2
    assert f"--host-name {name}: {trouble}" in one_line(done.stderr)
    assert host.inside() == [] and not list((host.path / "run/servers").glob("*.pid"))
