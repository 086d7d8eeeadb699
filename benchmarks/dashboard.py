"""What it costs a game to be looked at: rounds of a million, without and with a dashboard that is polled, in turn.

    .venv/bin/python benchmarks/dashboard.py

Each pair of runs plays the same game of --rounds rounds on the same 2 + 1 servers, with 1 s think time, answers and
summary.json written as always; which of the two goes first changes from pair to pair. A process beside it asks for the
state every 0.5 s, as the page does, so every group is glanced at once a second, while a browser's own drawing, which is
not the game's, stays out of the figure. The cost is the median over all pairs of what the rounds took with it, against
without, and the same for the CPU time of all processes of the game, which says more where others use the machine too.
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
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

os.environ["OPENBLAS_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil
from common import Table, agent_servers
from loguru import logger

from simulation import processes, results
from simulation.config import SimulationConfig
from simulation.console import ProgressWatch
from simulation.dashboard import Dashboard
from simulation.library import game_of
from simulation.results import RunDirectory, new_run_id
from simulation.run import Run
from simulation.security import ClusterKey, load_or_make

GOAL = 2.0  # percent
POLL = """
import sys, time, urllib.request
while True:
    urllib.request.urlopen(sys.argv[1] + "state?page=benchmark").read()
    time.sleep(0.5)
"""


def cpu_s() -> float:
    """The CPU time that this process and all agent servers have used."""
    pids = [os.getpid(), *(process.pid for process in processes.own_processes().values())]
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(each.user + each.system for each in times)


def rounds_of_run(config: SimulationConfig, key: ClusterKey, folder: Path, looked_at: bool) -> tuple[float, float]:
    """Play a run; returns the seconds of a round, and of CPU time of all processes while it played."""
    run_id, watch = new_run_id(), ProgressWatch()
    dashboard = Dashboard(0, watch) if looked_at else None
    poller = None
    if dashboard is not None:
        command = [sys.executable, "-c", POLL, f"http://127.0.0.1:{dashboard.port}/"]
        poller = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(0.5)
    directory = RunDirectory(folder / run_id)
    run = Run(config, run_id, key, directory, watch, game_of(config, None, None), None, dashboard)
    began = cpu_s()
    with contextlib.redirect_stdout(io.StringIO()):
        assert run.play() == 0
    used_s = cpu_s() - began
    if poller is not None:
        poller.terminate()
        poller.wait()
    if dashboard is not None:
        dashboard.close()
    return statistics.mean(result.seconds for result in run.results), used_s


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="pairs of runs (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a run (default 3)")
    parser.add_argument("--participants", type=int, default=1_000_000, help="participants (default 1,000,000)")
    parser.add_argument("--base-port", type=int, default=12330, help="first port of the servers (default 12330)")
    arguments = parser.parse_args()
    logger.remove()
    config = SimulationConfig(
        base_port=arguments.base_port,
        server_per_host=2,
        moderator_per_host=1,
        participant_num=arguments.participants,
        rounds=arguments.rounds,
        seed=7,
    )
    key = load_or_make(Path(config.cluster_key_dir))
    (ROOT / "runs").mkdir(exist_ok=True)
    with (
        agent_servers(config),
        tempfile.TemporaryDirectory(dir=ROOT / "runs", prefix="benchmark-") as name,
        patch.object(results, "LATEST", Path(name) / "latest"),
    ):
        rounds_of_run(replace(config, rounds=1), key, Path(name), looked_at=True)  # warm
        figures: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for pair in range(arguments.pairs):
            for looked_at in (False, True) if pair % 2 == 0 else (True, False):
                figures[looked_at].append(rounds_of_run(config, key, Path(name), looked_at))
    table = Table(
        f"{arguments.participants:,} participants, 1 s think time, 2 + 1 servers, {arguments.rounds} rounds a run",
        *("", "a round", "cost", "CPU time of a run", "cost", "goal", "runs"),
    )
    for looked_at, text in ((False, "without"), (True, "with the dashboard, polled")):
        told = []
        for each in (0, 1):
            pairs = zip(figures[True], figures[False], strict=True)
            cost = statistics.median(100 * (with_it[each] / without[each] - 1) for with_it, without in pairs)
            median = statistics.median(figure[each] for figure in figures[looked_at])
            told += [f"{median:.3f} s", f"{cost:+.1f} %" if looked_at else ""]
        table.add(text, *told, f"{GOAL:.1f} %" if looked_at else "", arguments.pairs)


if __name__ == "__main__":
    main()
