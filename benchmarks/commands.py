"""Benchmark of interactive commands: measures the wall time of whole processes, started as by a user.

    .venv/bin/python benchmarks/commands.py [--repeats N]

Each line shows the median, minimum and maximum of N sequential runs (default 5). Before, each command runs once to fill
the file cache. Stop all agent servers of this checkout first, as the last command starts its own servers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from simulation.files import CODE
from simulation.hosts.pid_files import AGENT_SERVERS

GAME = ("./run_simulation.sh", "10", "1000", "--sleep-time", "0")
PYTHON = ".venv/bin/python"
TIMED = {
    "a usage error": ("./run_simulation.sh", "10", "0"),
    "--help": (PYTHON, "main.py", "--help"),
    "--dry-run": (*GAME, "--dry-run"),
    "--role report of a run": (PYTHON, "main.py", "--role", "report", "--run-dir", "runs/latest"),
    "--status of 14 servers": ("./start_all_server.sh", "--status"),
    "a game, with servers up": GAME,
}
WITHOUT_SERVERS = {"starting 14 servers": ("./start_all_server.sh", "10"), "a game, without servers": GAME}
EXIT_STATUS = {"a usage error": 2}


def seconds_of(name: str, command: tuple[str, ...]) -> float:
    """Run a command and return its duration in seconds. Raises RuntimeError on an unexpected exit status."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=CODE, capture_output=True, text=True, check=False, env=os.environ)
    took = time.perf_counter() - began
    if done.returncode != EXIT_STATUS.get(name, 0):
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each command (default: 5)")
    repeats = parser.parse_args().repeats
    assert not AGENT_SERVERS.running(), "stop the servers that run first: ./stop_all_server.sh"
    took: dict[str, list[float]] = {name: [] for name in (*TIMED, *WITHOUT_SERVERS)}
    stop = ("./stop_all_server.sh",)
    for number in range(repeats + 1):  # the first repeat is the warm-up
        for name, command in WITHOUT_SERVERS.items():
            took[name].append(seconds_of(name, command))
            seconds_of("stop", stop)
        seconds_of("start", WITHOUT_SERVERS["starting 14 servers"])
        for name, command in TIMED.items():
            took[name].append(seconds_of(name, command))
        seconds_of("stop", stop)
        print(f"{number} of {repeats} repeats", file=sys.stderr)
    print("| command | median | least | most |\n|---|---:|---:|---:|")
    for name, times in took.items():
        counted = times[1:]
        print(f"| {name} | {statistics.median(counted):.2f} s | {min(counted):.2f} s | {max(counted):.2f} s |")


if __name__ == "__main__":
    main()
