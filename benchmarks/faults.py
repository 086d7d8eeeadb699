"""Benchmark of fault tolerance: its overhead, the cost of a fault, and server start-up. Prints three tables of medians.

    .venv/bin/python benchmarks/faults.py

- cost: a round of 64,000 participants with 1 s think time on 10 + 4 servers, in three variants in random order. In
  "bare", each server sends one heartbeat reply, at the end of its part, and nothing is recorded. "Heartbeats" is the
  normal mode. In "heartbeats and record", the answers and summary.json are also written to disk (fsync, rename).
- kill: the same round, in which a server is killed (-9) or stopped (-STOP) after 0.5 s. The answers must equal those of
  the undisturbed round, and every participant must be counted once. A stopped server is marked down if no reply
  arrives for --heartbeat-timeout (here 2 s). The measured times include this timeout.
- ready: ./start_all_server.sh 10, from start to end, on one host and on four hosts at once. The hosts are network
  namespaces (tests/hosts.py) of this machine and share its cores. The import of a server's modules is also timed
  separately. This table requires root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["OPENBLAS_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]

import numpy as np
import psutil
from common import Table, agent_servers
from loguru import logger

from simulation.cluster import failure_detector as heartbeat
from simulation.cluster.rounds import Simulation
from simulation.game.tally import RoundResult
from simulation.hosts.pid_files import AGENT_SERVERS
from simulation.llm.responses import Usage
from simulation.results import run_directory as results
from simulation.results.run_directory import RunDirectory, new_run_id
from simulation.results.run_files import summarise
from simulation.rpc.channels import call_all_or_raise, handshake
from simulation.rpc.endpoints import Endpoint
from simulation.runs.console import ConsoleProgress
from simulation.runs.scenario import build_game
from simulation.settings import SimulationConfig

PARTICIPANTS, THINK_S, SEED = 64_000, 1.0, 7
FAULT_AT_S = 0.5
HELD_S = 60.0  # longer than a round, so servers delay heartbeat replies until the end of the round
PATIENCE_S = 60.0  # timeout for the restart of a server
IMPORT = "import simulation.hosts.agent_server"  # the launcher of a host imports this module once for all servers


@dataclass(frozen=True)
class Fault:
    """A fault: a signal, the port of the server that receives the signal, and the --heartbeat-timeout of the run."""

    name: str
    signal: int
    port_offset: int = 5
    timeout_s: float = SimulationConfig().heartbeat_timeout


FAULTS = (
    Fault("none", 0),
    Fault("kill -9 of a participant server", signal.SIGKILL),
    Fault("kill -9 of a moderator server", signal.SIGKILL, 11),
    Fault("kill -STOP of a participant server, timeout 2 s", signal.SIGSTOP, 5, 2.0),
    Fault("kill -STOP of a moderator server, timeout 2 s", signal.SIGSTOP, 11, 2.0),
)


# --- The cost of being ready -----------------------------------------------------------------------------------------


def recorded_round(config: SimulationConfig, held_s: float, folder: Path | None) -> tuple[float, int]:
    """Play a round. Return the seconds until the next round could begin, and the number of heartbeat requests."""
    run_id = new_run_id()
    record = RunDirectory(folder / run_id) if folder is not None else None
    with (
        patch.object(heartbeat, "WAIT_S", held_s),
        patch.object(heartbeat, "heartbeat", wraps=heartbeat.heartbeat) as beats,
        Simulation(config, build_game(config, {}), run_id, ConsoleProgress(), record) as simulation,
    ):
        simulation.create()
        beats_before, began = beats.call_count, time.perf_counter()
        result = simulation.play(1)
        if record is not None:
            seconds = {"rounds": result.seconds}
            record.write_summary(summarise(config, run_id, "interrupted", {}, seconds, [result], Usage()))
        took = time.perf_counter() - began
        asked = beats.call_count - beats_before
    check(result)
    return took, asked


def check(result: RoundResult) -> None:
    """Assert that every participant was asked once and answered once."""
    assert result.tally.asked == result.tally.answered == PARTICIPANTS, result.tally


def cost(config: SimulationConfig, repeats: int) -> None:
    """Play the round in three variants, and print the table."""
    table = Table(
        f"{PARTICIPANTS:,} participants, {THINK_S:g} s think time, 10 + 4 servers",
        *("a round", "time", "more than bare", "heartbeats", "runs"),
    )
    scene = replace(config, heartbeat_timeout=HELD_S)  # a shorter timeout would shorten the delay of heartbeat replies
    (ROOT / "runs").mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=ROOT / "runs", prefix="benchmark-") as name,  # on the same disk as real results
        patch.object(results, "LATEST", Path(name) / "latest"),
    ):
        ways: dict[str, Callable[[], tuple[float, int]]] = {
            "bare": partial(recorded_round, scene, HELD_S, None),
            "heartbeats": partial(recorded_round, scene, heartbeat.WAIT_S, None),
            "heartbeats and record": partial(recorded_round, scene, heartbeat.WAIT_S, Path(name)),
        }
        for play in ways.values():
            play()  # warm-up
        played: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way in random.sample(list(ways), len(ways)):  # so that no variant always follows the same one
                played[way].append(ways[way]())
    bare_s = statistics.median(seconds for seconds, _ in played["bare"])
    for way, runs in played.items():
        round_s = statistics.median(seconds for seconds, _ in runs)
        beats = statistics.median(asked for _, asked in runs)
        table.add(way, f"{round_s:.3f} s", f"{round_s / bare_s - 1:+.1%}", f"{beats:g}", len(runs))


# --- The cost of a fault ----------------------------------------------------------------------------------------------


def disturbed_round(config: SimulationConfig, fault: Fault) -> tuple[RoundResult, float, Any]:
    """Play a round with the fault. Return its result, the seconds from the fault to the end, and the answers."""
    port = config.base_port + fault.port_offset
    victim = AGENT_SERVERS.process(str(port))
    assert victim is not None, f"no server runs on port {port}"
    struck_at: list[float] = []

    def strike() -> None:
        victim.send_signal(fault.signal)
        struck_at.append(time.monotonic())

    timer = threading.Timer(FAULT_AT_S, strike)
    scene = replace(config, heartbeat_timeout=fault.timeout_s)
    try:
        with Simulation(scene, build_game(scene, {}), new_run_id(), ConsoleProgress()) as simulation:
            simulation.create()
            began = time.monotonic()
            timer.start()
            result = simulation.play(1)
            answers = np.concatenate([part.units for part in simulation.answers()])
    finally:
        timer.cancel()
        restart(config, victim)
    check(result)
    assert (result.reassigned > 0) == (fault.signal != 0), result.reassigned
    return result, began + result.seconds - struck_at[0], answers


def restart(config: SimulationConfig, server: psutil.Process) -> None:
    """Kill a server, even if it is suspended, so that the launcher restarts it. Wait until all servers answer."""
    with contextlib.suppress(psutil.NoSuchProcess):
        server.kill()
    _, alive = psutil.wait_procs([server], timeout=PATIENCE_S)
    assert not alive, f"{server} cannot be killed"
    servers = [Endpoint(config.host_name, port) for port in config.ports]
    call_all_or_raise({each: partial(handshake, each, PATIENCE_S, starting=True) for each in servers})


def kill(config: SimulationConfig, repeats: int) -> None:
    """Play the round repeatedly with each fault, and print the table."""
    table = Table(
        f"The same round, with a fault {FAULT_AT_S:g} s after it began",
        *("fault", "round", "from fault to end", "reassigned", "runs"),
    )
    _, _, expected = disturbed_round(config, FAULTS[0])  # warm-up
    played: dict[Fault, list[tuple[RoundResult, float]]] = {fault: [] for fault in FAULTS}
    for _ in range(repeats):
        for fault, runs in played.items():
            result, after_s, answers = disturbed_round(config, fault)
            assert np.array_equal(answers, expected), f"{fault.name}: other answers than undisturbed"
            runs.append((result, after_s))
    for fault, runs in played.items():
        round_s = statistics.median(result.seconds for result, _ in runs)
        after_s = statistics.median(seconds for _, seconds in runs)
        moved = statistics.median(result.reassigned for result, _ in runs)
        table.add(fault.name, f"{round_s:.2f} s", f"{after_s:.2f} s", f"{moved:,.0f}", len(runs))


# --- When servers are ready ------------------------------------------------------------------------------------------


def import_at_once(count: int) -> None:
    """Import the modules of a server in `count` processes at the same time."""
    started = [subprocess.Popen([sys.executable, "-c", IMPORT], cwd=ROOT) for _ in range(count)]
    statuses = [process.wait() for process in started]
    assert not any(statuses), statuses


def ready(config: SimulationConfig, repeats: int) -> None:
    """Start the servers of one host, then of four hosts at once, and print the table."""
    from hosts import NODES, network_of  # noqa: PLC0415 - hosts.py needs pytest, which only tests install

    moderators = str(config.moderator_per_host)
    title = f"Until all servers answer, {config.server_per_host} + {moderators} on each host"
    table = Table(title, *("command", "hosts", "servers", "time", "runs"))
    with tempfile.TemporaryDirectory() as name, network_of(Path(name)) as network:

        def start(nodes: tuple[str, ...]) -> None:
            network.start_servers(nodes, config.server_per_host, env={"MODERATOR_NUM": moderators})

        start(NODES)  # warm-up: compile the copies of the program
        network.stop_servers()
        for nodes in (NODES[:1], NODES):
            importing, starting = [], []
            for _ in range(repeats):
                began = time.perf_counter()
                import_at_once(len(nodes))
                imported = time.perf_counter()
                start(nodes)
                importing.append(imported - began)
                starting.append(time.perf_counter() - imported)
                network.stop_servers(nodes)
            servers = len(nodes) * len(config.ports)
            table.add(f'python -c "{IMPORT}"', len(nodes), "", f"{statistics.median(importing):.2f} s", repeats)
            command = f"./start_all_server.sh {config.server_per_host}"
            table.add(command, len(nodes), servers, f"{statistics.median(starting):.2f} s", repeats)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs that the medians are of (default 5)")
    parser.add_argument("--base-port", type=int, default=12330, help="first port of the servers (default 12330)")
    parser.add_argument("--only", choices=("cost", "kill", "ready"), help="one of the three tables")
    arguments = parser.parse_args()
    chosen = {arguments.only} if arguments.only is not None else {"cost", "kill", "ready"}
    if "ready" in chosen and (os.geteuid() != 0 or shutil.which("ip") is None):
        parser.error("network namespaces take root and the command ip; --only cost and --only kill do without")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that the servers are stopped
    logger.remove()
    config = SimulationConfig(
        base_port=arguments.base_port, participant_num=PARTICIPANTS, sleep_time=THINK_S, seed=SEED
    )
    if chosen & {"cost", "kill"}:
        with agent_servers(config):
            if "cost" in chosen:
                cost(config, arguments.repeats)
            if "kill" in chosen:
                kill(config, arguments.repeats)
    if "ready" in chosen:
        ready(config, arguments.repeats)


if __name__ == "__main__":
    main()
