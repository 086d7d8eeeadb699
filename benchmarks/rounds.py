"""Benchmark of the creation and one round: compares three programs on the same machine.

    .venv/bin/python benchmarks/rounds.py

- this program: groups and moderators, on 10 + 4 agent servers that the benchmark starts;
- one object: AgentScope's own pattern, one RPC object per participant, on the same servers;
- bare asyncio: `gather` over as many coroutines in one process, without agents or servers.

Times are medians of --repeats runs (default 5; at most 3 for one object). One object with 64,000 participants takes
minutes and runs once. Memory is the sampled peak of all processes together (PSS), from a separate run without timing.

Profile of 64,000 participants without think time, on two cores: the creation of the agents took 1.2 s
through AgentScope's metaclass, 0.55 s without garbage collection, and 0.08 s if the metaclass was bypassed as well
(`ParticipantGroup._build`). A round of 32,000 participants in one process took 0.43 s with a callback per task, 0.27 s
without callbacks, and 0.16 s with uvloop as well.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.append(str(Path(__file__).resolve().parent.parent))

from agentscope.agents import AgentBase
from agentscope.message import Msg
from agentscope.rpc import DistConf, RpcClient
from common import agent_servers, peak_mb
from loguru import logger

from simulation.cluster.rounds import Simulation
from simulation.hosts.pid_files import AGENT_SERVERS
from simulation.results.run_directory import new_run_id
from simulation.runs.console import ConsoleProgress
from simulation.runs.scenario import build_game
from simulation.settings import SimulationConfig

SCENES = ((1_000, 1.0), (10_000, 0.0), (64_000, 0.0))  # participants, think time in seconds
IN_FLIGHT = 2_000  # maximum number of concurrent calls of the one-object pattern; each call takes a thread


@dataclass
class Figures:
    """The median durations in seconds, the peak memory in MB, and the number of runs."""

    create_s: float
    round_s: float
    memory_mb: float
    runs: int

    @property
    def total_s(self) -> float:
        return self.create_s + self.round_s


class PlainParticipant(AgentBase):
    """A participant in the style of AgentScope's documentation."""

    def __init__(self, think_s: float, *_: object) -> None:
        super().__init__(name="participant", use_memory=False)
        self.think_s = think_s

    def reply(self, x: Msg | None = None) -> Msg:
        time.sleep(self.think_s)
        return Msg(self.name, str(random.randint(0, 100)), "assistant")


def ours(config: SimulationConfig, participants: int, think_s: float) -> tuple[float, float]:
    """Play one round with this program. Return the seconds for the creation and for the round."""
    scene = SimulationConfig(
        base_port=config.base_port, participant_num=participants, sleep_time=think_s, seed=random.getrandbits(32)
    )
    with Simulation(scene, build_game(scene, {}), new_run_id(), ConsoleProgress()) as simulation:
        create_s = simulation.create()
        result = simulation.play(1)
    assert result.tally.answered == participants
    return create_s, result.seconds


def one_object(config: SimulationConfig, participants: int, think_s: float) -> tuple[float, float]:
    """Play one round with one RPC object per participant. Return the seconds for the creation and for the round."""
    ports = range(config.base_port, config.base_port + config.server_per_host)
    for port in ports:  # the class is sent as an argument, as the servers cannot import it
        hello = {"args": (0.0, PlainParticipant), "kwargs": {}, "class_name": "PlainParticipant"}
        assert RpcClient("localhost", port).create_agent(hello, f"hello-{port}-{time.monotonic_ns()}")
    began = time.perf_counter()
    agents = []
    for start in range(0, participants, IN_FLIGHT):
        batch = [
            PlainParticipant(think_s, to_dist=DistConf(host="localhost", port=ports[index % len(ports)]))
            for index in range(start, min(start + IN_FLIGHT, participants))
        ]
        for agent in batch:
            agent._check_created()
        agents += batch
    created = time.perf_counter()
    question = Msg("Moderator", "a number from 0 to 100, please", "user")
    numbers = []
    for start in range(0, participants, IN_FLIGHT):
        answers = [agent(question) for agent in agents[start : start + IN_FLIGHT]]
        numbers += [int(answer.content) for answer in answers]
    statistics.fmean(numbers)
    ended = time.perf_counter()
    assert len(numbers) == participants
    for port in ports:
        RpcClient("localhost", port).delete_all_agent()
    return created - began, ended - created


BARE = """
import asyncio, pathlib, random, resource, statistics, sys, time

async def participant(think_s):
    await asyncio.sleep(think_s)
    return random.randint(0, 100)

async def main(participants, think_s):
    began = time.perf_counter()
    numbers = await asyncio.gather(*(participant(think_s) for _ in range(participants)))
    statistics.fmean(numbers)
    return time.perf_counter() - began

seconds = asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
if sys.platform == "linux":  # ru_maxrss includes the memory before exec, of the parent program
    status = pathlib.Path("/proc/self/status").read_text()
    peak_mb = int(status.split("VmHWM:")[1].split()[0]) / 2**10
else:
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(seconds, peak_mb)
"""


def bare(participants: int, think_s: float, runs: int) -> Figures:
    """Run `gather` over bare coroutines, each time in a new process. Return the figures."""
    command = [sys.executable, "-c", BARE, str(participants), str(think_s)]
    printed = [subprocess.run(command, capture_output=True, check=True, text=True).stdout for _ in range(runs)]
    seconds, memory = zip(*(map(float, line.split()) for line in printed), strict=True)
    return Figures(0.0, statistics.median(seconds), max(memory), runs)


def measure(play: Callable[[], tuple[float, float]], runs: int, pids: list[int]) -> Figures:
    """Return the median durations of `runs` runs, and the peak memory of an extra run. A single run measures both."""
    times: list[tuple[float, float]] = [play() for _ in range(runs)] if runs > 1 else []
    memory = peak_mb((lambda: times.append(play())) if runs == 1 else play, pids)
    return Figures(statistics.median(t[0] for t in times), statistics.median(t[1] for t in times), memory, runs)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs that the medians are of (default 5)")
    parser.add_argument("--base-port", type=int, default=12330, help="first port of the servers (default 12330)")
    parser.add_argument("--quick", action="store_true", help="leave out the minutes of 64,000 RPC objects")
    arguments = parser.parse_args()
    logger.remove()
    config = SimulationConfig(base_port=arguments.base_port)
    row = "| {:>12} | {:>7} | {:<12} | {:>9} | {:>9} | {:>9} | {:>11} | {:>13} | {:>4} |".format
    print(row("participants", "think", "program", "creation", "round", "both", "peak memory", "ours is faster", "runs"))
    print(row(*("---:", "---:", ":---", "---:", "---:", "---:", "---:", "---:", "---:")))
    with agent_servers(config):
        everyone = [*(process.pid for process in AGENT_SERVERS.running().values()), os.getpid()]
        for participants, think_s in SCENES:
            scene = (config, participants, think_s)
            figures = {"this program": measure(lambda scene=scene: ours(*scene), arguments.repeats, everyone)}
            figures["bare asyncio"] = bare(participants, think_s, arguments.repeats)
            large = participants > 10_000
            if not (large and arguments.quick):
                runs = 1 if large else min(arguments.repeats, 3)
                figures["one object"] = measure(lambda scene=scene: one_object(*scene), runs, everyone)
            for name, each in figures.items():
                ratio = each.total_s / figures["this program"].total_s
                seconds = [f"{value:.2f} s" for value in (each.create_s, each.round_s, each.total_s)]
                rest = (f"{each.memory_mb:,.0f} MB", f"{ratio:.2f} x", each.runs)
                print(row(f"{participants:,}", f"{think_s:g} s", name, *seconds, *rest), flush=True)


if __name__ == "__main__":
    main()
