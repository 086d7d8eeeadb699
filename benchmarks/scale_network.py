"""Parts of scale.py: the network traffic of a round, and the load of hundreds of agent servers on main and moderators.

Many servers on one host represent many hosts: for main and for moderators, each server is an address with its own
connection, calls and heartbeats, and a round has no work per host. Unlike on 64 hosts, all these servers share two
cores. Therefore the CPU time of main and of the moderators is reported separately from the elapsed time.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import psutil
from common import Table, agent_servers, memory_mb

from simulation.cluster.rounds import Simulation
from simulation.hosts import local_cluster
from simulation.hosts.pid_files import AGENT_SERVERS, LAUNCHER
from simulation.results.run_directory import new_run_id
from simulation.rpc.channels import channel_to
from simulation.rpc.endpoints import endpoints
from simulation.rpc.messages import HEARTBEAT
from simulation.runs.console import ConsoleProgress
from simulation.runs.scenario import build_game
from simulation.settings import SimulationConfig

WIRE_SIZES = (1_000, 64_000, 1_000_000, 10_000_000)
SCENES = ((16, 1), (64, 4), (256, 16), (256, 1), (512, 32))  # participant servers, moderator servers
EACH = 10  # participants per server
ROUNDS = 4  # the first is a warm-up
READY_S = 600.0  # start-up timeout for the largest scene
ANSWER_S = 30.0  # timeout of the call that returns the call counts
SERVED = "/benchmark/served"  # the method of this call (see call_counter/sitecustomize.py)
SERVER_MB = 20.0  # assumed memory of a server until one is measured
SPARE_MB = 2000.0  # memory left free for other processes


def served(config: SimulationConfig) -> tuple[Counter[str], Counter[str]]:
    """Return by method how many calls all servers have received so far, and the bytes of their requests and replies."""
    channels = [channel_to(str(server)) for server in endpoints(config.hosts, config.base_port, len(config.ports))]
    requests = [channel.unary_unary(SERVED).future(b"", timeout=ANSWER_S) for channel in channels]
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for request in requests:
        for name, (number, received, sent) in json.loads(request.result()).items():
            calls[name] += number
            size[name] += received + sent
    return calls, size


def crossed() -> int:
    """Return the bytes sent over the loopback interface so far."""
    interfaces = psutil.net_io_counters(pernic=True)
    return next(counters.bytes_sent for name, counters in interfaces.items() if name.startswith("lo"))


# --- What a round takes on the network -------------------------------------------------------------------------------


def wire(config: SimulationConfig, up_to: int) -> None:
    """Play games of increasing size, fetch the answers, and print the table."""
    table = Table(
        "Calls and bytes of a round, and of fetching its answers afterwards, 2 + 1 agent servers",
        *("participants", "ask", "collect", "announce", "heartbeats", "a round crossed", "fetching"),
        *("answers crossed", "for one answer"),
        name_format=">12",
        width=17,
    )
    for participants in (size for size in WIRE_SIZES if size <= up_to):
        scene = replace(config, participant_num=participants, seed=random.getrandbits(32))
        with Simulation(scene, build_game(scene, {}), new_run_id(), ConsoleProgress()) as simulation:
            simulation.create()
            before, crossed_before = served(config), crossed()
            simulation.play(1)
            crossed_round, then = crossed() - crossed_before, served(config)
            crossed_before = crossed()
            for _ in simulation.answers():
                pass
            crossed_answers, after = crossed() - crossed_before, served(config)

        def sent(name: str, since: Any = before, until: Any = then) -> str:
            calls, size = (late[name] - early[name] for early, late in zip(since, until, strict=True))
            return f"{calls} calls, {in_bytes(size)}"

        steps = [sent(name) for name in ("begin", "collect", "announce", HEARTBEAT)]
        fetching = (sent("answers", then, after), in_bytes(crossed_answers), in_bytes(crossed_answers / participants))
        table.add(f"{participants:,}", *steps, in_bytes(crossed_round), *fetching)


def in_bytes(size: float) -> str:
    if size < 1000:
        return f"{size:.0f} B"
    return f"{size / 1e3:.1f} KB" if size < 1e6 else f"{size / 1e6:.1f} MB"


# --- What hundreds of servers ask of main and moderators -------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """The elapsed and CPU seconds of one round, and the numbers of calls and heartbeats."""

    ask_s: float
    collect_s: float
    announce_s: float
    round_s: float
    main_cpu_s: float
    moderator_cpu_s: float  # of the busiest moderator server
    servers_cpu_s: float  # of all servers together
    calls: int
    heartbeats: int


def hosts(config: SimulationConfig, at_most: int) -> None:
    """Play rounds on increasing numbers of servers, as far as memory allows, and print the table."""
    table = Table(
        f"A round of {config.sleep_time:g} s think time, {EACH} participants on each participant server",
        *(
            "servers",
            "ready",
            "memory of one",
            "creation",
            "ask",
            "collect",
            "announce",
            "round",
            "calls",
            "heartbeats",
            "RPCs/s",
        ),
        *("main's CPU", "a moderator's CPU", "all servers' CPU"),
        name_format=">10",
    )
    server_mb = SERVER_MB
    for servers, moderators in SCENES:
        needed_mb = server_mb * (servers + moderators) + SPARE_MB
        if servers > at_most:
            continue
        if needed_mb > psutil.virtual_memory().available / 2**20:
            print(f"{servers} + {moderators} servers are left out: they take {needed_mb:,.0f} MB")
            continue
        scene = replace(
            config,
            server_per_host=servers,
            moderator_per_host=moderators,
            participant_num=EACH * servers,
            rounds=ROUNDS,
        )
        began = time.perf_counter()
        with patch.object(local_cluster, "READY_TIMEOUT_S", READY_S), agent_servers(scene, counted=True):
            ready_s = time.perf_counter() - began
            create_s, rounds = rounds_on(scene)
            everyone = [process.pid for process in AGENT_SERVERS.running().values()]
            server_mb = memory_mb(everyone) / len(everyone)
        median = {name: statistics.median(getattr(each, name) for each in rounds) for name in Round.__annotations__}
        table.add(
            f"{servers} + {moderators}",
            *(f"{ready_s:.1f} s", f"{server_mb:.1f} MB", f"{create_s:.2f} s"),
            *(f"{median[name]:.3f} s" for name in ("ask_s", "collect_s", "announce_s", "round_s")),
            *(f"{median[name]:,.0f}" for name in ("calls", "heartbeats")),
            f"{(median['calls'] + median['heartbeats']) / median['round_s']:,.0f}",
            *(f"{median[name]:.3f} s" for name in ("main_cpu_s", "moderator_cpu_s", "servers_cpu_s")),
        )


def rounds_on(config: SimulationConfig) -> tuple[float, list[Round]]:
    """Play the rounds. Return the seconds for the creation, and the measurements of each round after the first."""
    scene = replace(config, seed=random.getrandbits(32))
    own = {int(name): each for name, each in AGENT_SERVERS.running().items() if name != LAUNCHER}
    first_moderator = config.base_port + config.server_per_host
    with Simulation(scene, build_game(scene, {}), new_run_id(), ConsoleProgress()) as simulation:
        create_s = simulation.create()
        simulation.play(1)  # warm-up
        played = [played_round(simulation, number, own, first_moderator) for number in range(2, config.rounds + 1)]
    return create_s, played


def played_round(simulation: Simulation, number: int, own: dict[int, psutil.Process], first_moderator: int) -> Round:
    """Play one round and return its measurements. `own` maps the port of each server to its process."""
    steps: list[float] = []  # durations of ask, collect and announce, in this order

    def timed(call_all: Callable[[Any], Any], call: Any) -> Any:
        began = time.perf_counter()
        result = call_all(call)
        steps.append(time.perf_counter() - began)
        return result

    cluster, call_all = simulation.cluster, simulation.cluster.all
    calls, _ = served(simulation.config)
    cpu = {port: cpu_s(process) for port, process in own.items()}
    gc.collect()
    cluster.all = partial(timed, call_all)  # type: ignore[method-assign]
    began_cpu = time.process_time()
    result = simulation.play(number)
    main_cpu_s = time.process_time() - began_cpu
    cluster.all = call_all  # type: ignore[method-assign]
    cpu = {port: cpu_s(process) - cpu[port] for port, process in own.items()}
    calls = served(simulation.config)[0] - calls
    assert result.tally.answered == simulation.config.participant_num and not result.reassigned, result
    return Round(
        *steps,
        round_s=result.seconds,
        main_cpu_s=main_cpu_s,
        moderator_cpu_s=max(seconds for port, seconds in cpu.items() if port >= first_moderator),
        servers_cpu_s=sum(cpu.values()),
        calls=calls["begin"] + calls["collect"] + calls["announce"],
        heartbeats=calls[HEARTBEAT],
    )


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
