"""Benchmark of scaling with the number of participants: measures time, memory and network traffic, and draws a plot.

    .venv/bin/python benchmarks/scale.py

Unless noted, participants have 1 s think time and run on 2 participant servers (--server-per-host) and 1 moderator
server.

- time: the creation and one round. A straight line is fitted to the measured times minus the think time, with the
  smallest possible maximum relative deviation. Times are medians of --repeats runs (default 5). Memory (GB = 10^9
  bytes) is the sampled peak of all processes together (PSS, including main) while run_simulation.sh plays the same game
  and writes its results. This run is not timed, as sampling takes time. "Afterwards" is the memory of the servers after
  the deletion of all agents. Python's allocator keeps this memory for the next run, and does not grow further.
- command: ./run_simulation.sh with running servers, from start to end, including the results on disk.
- wire: network traffic of a round. The interceptor in call_counter/ counts the calls that each server receives, and the
  bytes of their messages. Main calls moderators, moderators call groups, and main sends heartbeats to all servers.
  "Crossed" is the kernel's count for the loopback interface, including TLS, HTTP and TCP. Therefore no other program
  should use the interface.
- own: the cost of custom participant classes (own_participants.py). Memory is the peak growth of the servers per
  participant.
- hosts: rounds with 10 participants on each of many servers, which show the load on main and moderators
  (scale_network.py).

Profile in microseconds of one core per participant (measured by perf, and with each part alone in a loop; Python 3.11):

- The creation takes 0.3, for an object with index, game and home. AgentBase's own attributes (1.4 KB, 6 us) are created
  on first use only. Half of the remaining time was garbage collection, until each object was scanned only once.
- Before the think time, a participant takes 1.4: 0.15 for its coroutine, 0.45 for the calls down to the pause, 0.1 for
  the garbage collector. The timer wheel and new memory were not measured separately. `asyncio.sleep`, which needs a
  task and a timer, takes 25 more.
- After the think time, a participant takes 1.4: 0.8 for its random number, 0.3 for the end of the coroutine.
- The curve bends at about a million participants. With fewer participants, the think time hides the work after it; with
  more participants, the work before and after it adds up. Whole runs deviated from the closest line by 10 to 30 %, and
  one run of four by less than 20 %.
- Two changes were rejected. A random number before the think time saves 0.6 after it, but adds 1.1 before it.
  SplitMix64 inlined in one function saves 1 %. A `__getattr__` for AgentBase's attributes took 12 % of a round, as
  CPython has no fast path for the attributes of such a class.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import numpy as np
import pyarrow.parquet as pq
from common import Table, agent_servers, memory_mb, peak_mb
from loguru import logger
from own_participants import CLASSES
from scale_network import SCENES, hosts, wire

from participant import RandomParticipant
from simulation.cluster.rounds import Simulation
from simulation.hosts.pid_files import AGENT_SERVERS
from simulation.results import run_directory as results
from simulation.results.run_directory import new_run_id
from simulation.rpc.channels import handshake
from simulation.rpc.endpoints import endpoints
from simulation.runs.console import ConsoleProgress
from simulation.runs.scenario import build_game
from simulation.settings import SimulationConfig

THINK_S = 1.0
SIZES = (64_000, 250_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000)
COMMAND_SIZE = 1_000_000
GOALS = {64_000: (1.4, 0.6), 1_000_000: (4.0, 1.5), 10_000_000: (35.0, 13.0)}  # (seconds, GB) by size
COMMAND_GOAL_S = 8.0
PUBLISHED = {1_000_000: 40.0}  # seconds by size, on a cluster of machines with 64 cores (arXiv 2407.17789)
SECONDS_SHOWN = (1, 2, 5, 10, 20, 40)  # on the axis of the picture
PICTURE = ROOT / "docs/scaling.png"
OWN_FILE = ROOT / "benchmarks/own_participants.py"
GONE_S = 30.0  # timeout for the deletion of the agents of a run
MODES = ("time", "command", "wire", "own", "hosts")


@dataclass(frozen=True)
class Timing:
    """The durations of the creation and of one round, in seconds."""

    create_s: float
    round_s: float

    @property
    def both_s(self) -> float:
        return self.create_s + self.round_s


def play(config: SimulationConfig, participants: int) -> Timing:
    """Play one round without writing results. Return the durations."""
    scene = replace(config, participant_num=participants, seed=random.getrandbits(32))
    with Simulation(scene, build_game(scene, {}), new_run_id(), ConsoleProgress()) as simulation:
        create_s = simulation.create()
        result = simulation.play(1)
    assert result.tally.asked == result.tally.answered == participants, result.tally
    return Timing(create_s, result.seconds)


# --- Time and memory -------------------------------------------------------------------------------------------------


def times(config: SimulationConfig, up_to: int, repeats: int, picture: Path | None) -> None:
    """Play games of increasing size. Print the table and the fitted line, and draw the picture."""
    table = Table(
        f"Creation and a round of {THINK_S:g} s think time, {config.server_per_host} + 1 agent servers",
        *(
            "participants",
            "creation",
            "round",
            "both",
            "goal",
            "published",
            "peak memory",
            "goal",
            "afterwards",
            "runs",
        ),
        name_format=">12",
    )
    medians: dict[int, float] = {}
    for participants in (size for size in SIZES if size <= up_to):
        runs = []
        for _ in range(repeats):
            runs.append(play(config, participants))
            wait_until_gone(config)
        peak_gb, afterwards_gb = memory_of(config, participants)
        create_s, round_s, both_s = (
            statistics.median(getattr(each, name) for each in runs) for name in ("create_s", "round_s", "both_s")
        )
        medians[participants] = both_s
        goal_s, goal_gb = GOALS.get(participants, (None, None))
        table.add(
            f"{participants:,}",
            *(in_seconds(create_s), in_seconds(round_s), in_seconds(both_s), in_seconds(goal_s)),
            *(
                in_seconds(PUBLISHED.get(participants)),
                f"{peak_gb:.2f} GB",
                "" if goal_gb is None else f"{goal_gb:g} GB",
            ),
            *(f"{afterwards_gb:.2f} GB", len(runs)),
        )
    if len(medians) > 2:
        line = Line.through({size: both_s - THINK_S for size, both_s in medians.items()})
        print(f"\nPast the {THINK_S:g} s of thinking: {line}")
        if picture is not None:
            draw(picture, medians, line)


def in_seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def memory_of(config: SimulationConfig, participants: int) -> tuple[float, float]:
    """Return the peak memory in GB of all processes during the whole command, and that of the servers afterwards."""
    servers = [process.pid for process in AGENT_SERVERS.running().values()]
    with results_folder() as folder:
        game = start_command(config, participants, folder / "run")
        peak = peak_mb(game.wait, [*servers, game.pid])
        check_command(game, participants, folder / "run")
    wait_until_gone(config)
    return peak * 2**20 / 1e9, memory_mb(servers) * 2**20 / 1e9


def wait_until_gone(config: SimulationConfig) -> None:
    """Wait until the servers have deleted all agents."""
    deadline = time.monotonic() + GONE_S
    servers = endpoints(config.hosts, config.base_port, len(config.ports))
    while any(handshake(server, GONE_S).agents for server in servers):
        assert time.monotonic() < deadline, "the agents of a run are still there"


@dataclass(frozen=True)
class Line:
    """A straight line, and its maximum relative deviation from the measured points."""

    each_s: float
    start_s: float
    deviation: float

    @classmethod
    def through(cls, points: dict[int, float]) -> Line:
        """Return the line with the smallest maximum relative deviation from the points (minimax fit)."""
        closest = cls(0.0, 0.0, 0.0)
        # the minimax line of all points is the minimax line of the three points with the largest deviation
        for three in combinations(sorted(points.items()), 3):
            x, y = np.array(three).T
            equations = np.column_stack((x / y, 1 / y, (1, -1, 1)))  # equal relative deviation, with alternating signs
            each_s, start_s, off = np.linalg.solve(equations, np.ones(3))
            if abs(off) >= closest.deviation:
                closest = cls(float(each_s), float(start_s), float(abs(off)))
        return closest

    def at(self, participants: float) -> float:
        return self.start_s + self.each_s * participants

    def __str__(self) -> str:
        return (
            f"{self.start_s:.2f} s + {self.each_s * 1e6:.2f} us per participant; the largest deviation from this line "
            f"is {self.deviation:.0%}"
        )


def draw(path: Path, medians: dict[int, float], line: Line) -> None:
    """Draw the measurements, the line and the goals on logarithmic axes, with an inset on linear axes."""
    from matplotlib import pyplot as plt  # noqa: PLC0415 - this import would add half a second

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    even = axes.inset_axes((0.70, 0.16, 0.30, 0.19))
    sizes = np.geomspace(min(medians), max(medians), 200)
    label = f"{THINK_S:g} s + {line.start_s:.2f} s + {line.each_s * 1e6:.1f} µs per participant"
    for each in (axes, even):
        each.plot(sizes, THINK_S + line.at(sizes), color="#8fb3d9", linewidth=3, label=label)
        each.plot(list(medians), list(medians.values()), "o", color="#1f4e79", markersize=7, label="measured")
        each.spines[["top", "right"]].set_visible(False)
    goals = {size: goal_s for size, (goal_s, _) in GOALS.items()}
    axes.plot(list(goals), list(goals.values()), "v", color="#c1440e", markersize=10, label="goal, at most")
    published = {"color": "#666666", "markersize": 14, "label": "published, on many machines of 64 cores"}
    axes.plot(list(PUBLISHED), list(PUBLISHED.values()), "*", **published)
    axes.axhline(THINK_S, color="#222222", linestyle=":", label="thinking")
    for size, both_s in medians.items():
        beside = (-42, 6) if both_s > THINK_S + line.at(size) > 2 * THINK_S else (7, -17)  # off the line
        axes.annotate(f"{both_s:.1f} s", (size, both_s), xytext=beside, textcoords="offset points", fontsize=12)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(list(medians), list(map(short, medians)))
    axes.set_xticks([], minor=True)
    axes.set_yticks(SECONDS_SHOWN, [f"{seconds} s" for seconds in SECONDS_SHOWN])
    axes.set_yticks([], minor=True)
    axes.set_ylim(0.6, 60)
    axes.tick_params(labelsize=12)
    axes.set_xlabel("participants, on two cores of one machine", fontsize=12)
    axes.set_ylabel("creation and one round", fontsize=12)
    axes.legend(frameon=False, fontsize=12, loc="upper left")
    even.set_xlim(0, max(medians) * 1.05)
    even.set_ylim(0, max(medians.values()) * 1.1)
    even.set_xticks([max(medians) / 2, max(medians)], [short(max(medians) // 2), short(max(medians))])
    even.set_title("the same on linear axes", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"The curve is drawn in {path}")


def short(size: int) -> str:
    return f"{size / 1e6:g} M" if size >= 1e6 else f"{size / 1e3:g} k"


# --- The whole command -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def results_folder() -> Iterator[Path]:
    """Yield a temporary folder on the disk of the real results. At the end, delete it and restore runs/latest."""
    results.LATEST.parent.mkdir(exist_ok=True)
    latest = results.LATEST.readlink() if results.LATEST.is_symlink() else None
    try:
        with tempfile.TemporaryDirectory(dir=results.LATEST.parent, prefix="benchmark-") as name:
            yield Path(name)
    finally:
        results.LATEST.unlink(missing_ok=True)
        if latest is not None:
            results.LATEST.symlink_to(latest)


def start_command(config: SimulationConfig, participants: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start ./run_simulation.sh as a user would. Its process becomes main by exec."""
    settings = {
        "BASE_PORT": str(config.base_port),
        "HOSTS": "localhost",
        "MODERATOR_PER_HOST": str(config.moderator_per_host),
        "AGENT_TYPE": "random",
    }
    command = ["./run_simulation.sh", str(config.server_per_host), str(participants)]
    return subprocess.Popen(
        [*command, "--sleep-time", f"{THINK_S:g}", "--run-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def check_command(game: subprocess.Popen[bytes], participants: int, folder: Path) -> dict[str, float]:
    """Assert that the command succeeded and wrote a row for each answer. Return the durations in summary.json."""
    assert game.returncode == 0, f"run_simulation.sh ended with exit status {game.returncode}"
    assert pq.read_metadata(folder / "answers.parquet").num_rows == participants
    seconds: dict[str, float] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["seconds"]
    return seconds


def command(config: SimulationConfig, participants: int, repeats: int) -> None:
    """Measure the duration of the whole command, and print the table."""
    table = Table(
        f"The whole command with {config.server_per_host} + 1 agent servers up, from its start to its end",
        *("command", "time", "goal", "creation", "round", "the rest", "runs"),
    )
    taken = []
    for _ in range(repeats):
        with results_folder() as folder:
            began = time.perf_counter()
            game = start_command(config, participants, folder / "run")
            game.wait()
            took_s = time.perf_counter() - began
            taken.append((took_s, check_command(game, participants, folder / "run")))
        wait_until_gone(config)
    create_s, round_s = (statistics.median(seconds[name] for _, seconds in taken) for name in ("create", "rounds"))
    took_s = statistics.median(took_s for took_s, _ in taken)
    table.add(
        f"./run_simulation.sh {config.server_per_host} {participants} --sleep-time {THINK_S:g}",
        *(in_seconds(took_s), in_seconds(COMMAND_GOAL_S if participants == COMMAND_SIZE else None)),
        *(in_seconds(create_s), in_seconds(round_s), in_seconds(took_s - create_s - round_s), repeats),
    )


# --- Participants of one's own ----------------------------------------------------------------------------------------


def own(config: SimulationConfig, repeats: int) -> None:
    """Play games with each custom participant class, and print the table."""
    table = Table(
        f"Participants of one's own, {config.server_per_host} participant servers, {config.reply_threads} threads each",
        *("a participant", "participants", "think", "creation", "round", "memory of one", "runs"),
    )
    for name, cls, participants, think_s in CLASSES:
        file = None if cls is RandomParticipant else f"{OWN_FILE}:{cls.__name__}"
        scene = replace(config, agent_class=file, sleep_time=think_s)
        with agent_servers(config):  # new servers, as used servers would first reuse freed memory
            play(scene, 1000)  # warm-up
            servers = [process.pid for process in AGENT_SERVERS.running().values()]
            before = memory_mb(servers)
            each_b = (peak_mb(lambda: play(scene, participants), servers) - before) * 2**20 / participants  # noqa: B023
            runs = [play(scene, participants) for _ in range(repeats)]
        create_s, round_s = (statistics.median(getattr(run, step) for run in runs) for step in ("create_s", "round_s"))
        figures = (in_seconds(create_s), in_seconds(round_s), f"{each_b / 1e3:.2f} KB", repeats)
        table.add(name, f"{participants:,}", f"{think_s:g} s", *figures)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs that the medians are of (default 5)")
    parser.add_argument("--up-to", type=int, default=SIZES[-1], help="participants of the largest game (default all)")
    parser.add_argument("--servers", type=int, default=SCENES[-1][0], help="servers of the largest mode hosts")
    parser.add_argument("--base-port", type=int, default=12330, help="first port of the servers (default 12330)")
    parser.add_argument("--server-per-host", type=int, default=2, help="participant servers (default 2)")
    parser.add_argument("--picture", type=Path, help=f"where to draw the curve (default {PICTURE}, if it is whole)")
    parser.add_argument("--only", choices=MODES, help="one of the tables")
    arguments = parser.parse_args()
    chosen = {arguments.only} if arguments.only is not None else set(MODES)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that the servers are stopped
    logger.remove()
    config = SimulationConfig(
        base_port=arguments.base_port,
        server_per_host=arguments.server_per_host,
        moderator_per_host=1,
        sleep_time=THINK_S,
    )
    if chosen & {"time", "command"}:
        with agent_servers(config, owned=False):  # so that run_simulation.sh can use them too
            play(config, 1000)  # warm-up
            if "time" in chosen:
                whole = arguments.up_to >= SIZES[-1] and arguments.server_per_host == 2
                times(config, arguments.up_to, arguments.repeats, arguments.picture or (PICTURE if whole else None))
            if "command" in chosen:
                command(config, min(arguments.up_to, COMMAND_SIZE), arguments.repeats)
    if "wire" in chosen:
        with agent_servers(config, counted=True):
            wire(config, arguments.up_to)
    if "own" in chosen:
        own(config, arguments.repeats)
    if "hosts" in chosen:
        hosts(config, arguments.servers)


if __name__ == "__main__":
    main()
