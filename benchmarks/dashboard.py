"""Benchmark of the overhead of the dashboard or, with --metrics, of metrics: rounds with and without polling.

    .venv/bin/python benchmarks/dashboard.py [--metrics]

One run on 2 + 1 servers with 1 s think time writes answers and summary.json as usual. One round of each pair is polled:
alternately the first and the second round. During a polled round, a separate process requests the state every 0.5 s, as
the page does, so every group is sampled once a second. Metrics are scraped once a second. The rendering in a browser is
not measured. The cost compares the duration of the polled round with the other round of the pair, as a median over all
pairs. The CPU time of main and all servers is compared in the same way, and is more reliable on a busy machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["OPENBLAS_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import psutil
from common import Table, agent_servers
from loguru import logger

from simulation.cluster.rounds import Simulation
from simulation.game.population import Population
from simulation.game.rules import game_of
from simulation.hosts.pid_files import AGENT_SERVERS
from simulation.monitoring.dashboard import Dashboard
from simulation.monitoring.metrics import Metrics
from simulation.results import run_directory as results
from simulation.results.run_directory import RunDirectory, new_run_id
from simulation.runs.console import ConsoleProgress
from simulation.runs.run import Run
from simulation.runs.run_spec import RunSpec
from simulation.settings import SimulationConfig

GOAL = 2.0  # percent
WARM = 2  # number of warm-up rounds
POLL = """
import http.client, select, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))  # for all requests, as in a browser
polling = False
while True:
    if select.select([sys.stdin], [], [], float(sys.argv[3]) if polling else None)[0]:
        word = sys.stdin.readline()
        if not word:
            break
        polling = word == "start\\n"
    connection.request("GET", sys.argv[2] + ("?page=benchmark" if polling else "?page=benchmark&done=1"))
    connection.getresponse().read()
    if not polling:
        print("stopped", flush=True)
"""


class Alternating(Run):
    """A run that is polled in some of its rounds. `used_s` lists the CPU seconds of all processes by round."""

    poller: subprocess.Popen[str]
    pids: list[int]

    def _play_round(self, simulation: Simulation, number: int) -> None:
        if is_polled(number):
            self._send("start")
        began = self._cpu_s()
        super()._play_round(simulation, number)
        self.used_s.append(self._cpu_s() - began)
        if is_polled(number):
            self._send("stop")
            assert self.poller.stdout is not None and self.poller.stdout.readline() == "stopped\n"

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.used_s: list[float] = []

    def _send(self, word: str) -> None:
        assert self.poller.stdin is not None
        self.poller.stdin.write(word + "\n")
        self.poller.stdin.flush()

    def _cpu_s(self) -> float:
        times = [psutil.Process(pid).cpu_times() for pid in self.pids]
        return sum(each.user + each.system for each in times)


def is_polled(number: int) -> bool:
    """Return whether a round is polled: the second and the third of every four rounds."""
    return number % 4 in (2, 3)


def play(config: SimulationConfig, folder: Path, metrics: bool) -> Alternating:
    """Play the run with a dashboard or metrics, and a process that polls them. Return the run."""
    run_id, watch = new_run_id(), ConsoleProgress()
    page = Metrics(0, watch) if metrics else Dashboard(0, watch)
    path, every_s = ("/metrics", "1") if isinstance(page, Metrics) else (f"{page.path}state", "0.5")
    spec = RunSpec(config, {}, game_of(config, None, Population()), folder / run_id, run_id)
    run = Alternating(spec, RunDirectory(spec.folder), watch)
    run.pids = [os.getpid(), *(process.pid for process in AGENT_SERVERS.running().values())]
    command = [sys.executable, "-c", POLL, str(page.port), path, every_s]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run.poller:
        try:
            with contextlib.redirect_stdout(io.StringIO()), page.observe(run):
                assert run.play_rounds() == 0
        finally:
            run.poller.terminate()
    page.close()
    return run


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="pairs of rounds, of 49 at most (default 40)")
    parser.add_argument("--participants", type=int, default=1_000_000, help="participants (default 1,000,000)")
    parser.add_argument("--metrics", action="store_true", help="measure metrics in place of the dashboard")
    parser.add_argument("--base-port", type=int, default=12330, help="first port of the servers (default 12330)")
    arguments = parser.parse_args()
    logger.remove()
    config = SimulationConfig(
        base_port=arguments.base_port,
        server_per_host=2,
        moderator_per_host=1,
        participant_num=arguments.participants,
        rounds=WARM + 2 * arguments.pairs,
        seed=7,
    )
    (ROOT / "runs").mkdir(exist_ok=True)
    with (
        agent_servers(config),
        tempfile.TemporaryDirectory(dir=ROOT / "runs", prefix="benchmark-") as name,
        patch.object(results, "LATEST", Path(name) / "latest"),
    ):
        run = play(config, Path(name), arguments.metrics)
    took = [result.seconds for result in run.results]
    table = Table(
        f"{arguments.participants:,} participants, 1 s think time, 2 + 1 servers, {arguments.pairs} pairs of rounds",
        *("", "not polled", "polled", "cost", "goal"),
    )
    for text, figures in (("a round", took), ("CPU time of main and servers in it", run.used_s)):
        by_round = list(enumerate(figures, 1))[WARM:]
        ways = [[figure for number, figure in by_round if is_polled(number) == way] for way in (False, True)]
        cost = statistics.median(100 * (there / without - 1) for without, there in zip(*ways, strict=True))
        table.add(text, *(f"{statistics.median(way):.3f} s" for way in ways), f"{cost:+.1f} %", f"{GOAL:.1f} %")


if __name__ == "__main__":
    main()
