"""Benchmark of LLM participants: answers per second of four programs in rounds 1 and 2, on the same servers.

    .venv/bin/python benchmarks/llm.py

- this program: participants with equal prompts share requests;
- one request each: this program with --samples-per-request 1;
- one object: AgentScope's own pattern, an RPC object with its own model client for each participant;
- the limit: a bare aiohttp loop that sends requests like those of "this program", with the same concurrency. In round
  2, another average is announced, so that the server has not processed the prompts before.

The first table uses a real vLLM server on this machine's CPUs, with the model in the folder --model (such as
run/smollm2, the demo model), or with a tiny one of random weights in float32. The second table
uses a stand-in server that answers immediately, and one agent server with all participants. The second table therefore
shows the overhead of the program. Figures are medians. Memory is the growth (PSS) of a new agent server after two
rounds, and at the peak.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import aiohttp
import numpy as np
import psutil
import uvloop
from agentscope.agents import AgentBase
from agentscope.message import Msg
from agentscope.rpc import DistConf, RpcClient
from common import agent_servers
from loguru import logger

from simulation.cluster.placement import PlacementPlan
from simulation.cluster.rounds import Simulation
from simulation.game.game import Game
from simulation.game.rules import question_for
from simulation.game.tally import Tally, announcement_of, score, value_counts
from simulation.hosts import vllm_servers
from simulation.hosts.pid_files import AGENT_SERVERS
from simulation.llm.model_configs import read_models
from simulation.llm.prompts import Prompt, answer_tokens, instruction, prompt_for, rules, structured_fields
from simulation.llm.request_queue import ANSWERS_IN_FLIGHT
from simulation.results.run_directory import new_run_id
from simulation.rpc.endpoints import endpoints
from simulation.runs.console import ConsoleProgress
from simulation.runs.scenario import build_game
from simulation.settings import SimulationConfig

TINY_FLAGS = ["--dtype", "float32", "--max-model-len", "1024"]
SAMPLE_S = 0.05

STAND_IN = """
import asyncio, itertools, json, sys, uvloop

def head_and_body(n, shift):
    choices = [{"index": i, "message": {"role": "assistant", "content": str((i * 37 + shift) % 101)},
                "finish_reason": "stop"} for i in range(n)]
    usage = {"prompt_tokens": 90, "completion_tokens": 2 * n, "total_tokens": 90 + 2 * n}
    body = json.dumps({"object": "chat.completion", "model": "m", "choices": choices, "usage": usage}).encode()
    return b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body

class Server(asyncio.Protocol):
    replies, shift = {}, itertools.count()

    def connection_made(self, transport):
        self.transport, self.received = transport, b""

    def data_received(self, data):
        self.received += data
        while (end := self.received.find(b"\\r\\n\\r\\n")) >= 0:
            head = self.received[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\\r\\n")[0]) if at >= 0 else 0
            if len(self.received) < end + 4 + size:
                return
            body, self.received = self.received[end + 4 : end + 4 + size], self.received[end + 4 + size :]
            key = (json.loads(body).get("n", 1) if size else 1, next(self.shift) % 101)
            if key not in self.replies:
                self.replies[key] = head_and_body(*key)
            self.transport.write(self.replies[key])

async def main():
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", int(sys.argv[1]))
    print("ready", flush=True)
    await server.serve_forever()

uvloop.run(main())
"""


@dataclass(frozen=True)
class Timing:
    """The durations of the creation and of two rounds, in seconds."""

    participants: int
    create_s: float
    rounds_s: tuple[float, float]

    @property
    def rates(self) -> tuple[float, float, float]:
        """Return the answers per second in round 1, in round 2, and in round 1 including the creation."""
        one, two = self.rounds_s
        return self.participants / one, self.participants / two, self.participants / (self.create_s + one)


class PlainParticipant(AgentBase):
    """An LLM participant in the style of AgentScope's documentation, with a model object and a blocking reply."""

    def __init__(self, system: str, fields: dict[str, Any], *_: object) -> None:
        super().__init__(name="participant", sys_prompt=system, model_config_name="model_1", use_memory=False)
        self.fields = fields

    def reply(self, x: Msg | None = None) -> Msg:
        messages = [{"role": "system", "content": self.sys_prompt}, {"role": "user", "content": x.content}]
        return Msg(self.name, self.model(messages, **self.fields).text, "assistant")


def ours(config: SimulationConfig) -> tuple[Timing, list[int]]:
    """Play two rounds with this program. Return the durations and the answers of round 1."""
    scene = replace(config, rounds=2, seed=random.getrandbits(32))
    with Simulation(scene, build_game(scene, read_models(scene)), new_run_id(), ConsoleProgress()) as simulation:
        create_s = simulation.create()
        one = simulation.play(1)
        first = [int(unit) for part in simulation.answers() for unit in part.units]
        two = simulation.play(2)
    assert one.tally.answered == two.tally.answered == config.participant_num
    return Timing(config.participant_num, create_s, (one.seconds, two.seconds)), first


def requests_like_ours(config: SimulationConfig, first: list[int]) -> list[list[bytes]]:
    """Return the bodies of this program's requests, one list per round. `first` contains the answers of round 1."""
    game = build_game(config, read_models(config))
    numbers = (config.server_per_host, config.moderator_per_host)
    groups = PlacementPlan("", len(first), *(endpoints(["localhost"], 0, each) for each in numbers)).assignments
    announced = [0, *first[1:]] if first[0] else [int(game.high), *first[1:]]  # another average than in our round 2
    tally = Tally(len(first), *value_counts(np.array(announced)))
    announcement = announcement_of(score(game, 1, tally), game)
    one, two = question_for(game, 1, ()), question_for(game, 2, (announcement,))
    rounds: list[list[bytes]] = [[], []]
    for group in groups:
        rounds[0] += _bodies(config, game, prompt_for(rules(game), one, (), instruction(game)), group.count)
        for number, count in Counter(first[group.first : group.first + group.count]).items():
            prompt = prompt_for(rules(game), two, (float(number),), instruction(game))
            rounds[1] += _bodies(config, game, prompt, count)
    return rounds


def _bodies(config: SimulationConfig, game: Game, prompt: Prompt, count: int) -> Iterator[bytes]:
    model, kind = read_models(config)["model_1"], config.structured_output
    fields = model.fields(answer_tokens(kind, game), structured_fields(kind, game))
    for start in range(0, count, config.samples_per_request):
        samples = min(config.samples_per_request, count - start)
        yield json.dumps({"model": model.model, "messages": prompt.messages, **fields, "n": samples}).encode()


def limit(config: SimulationConfig, rounds: list[list[bytes]]) -> Timing:
    """Send the requests from one event loop, with ANSWERS_IN_FLIGHT answers in flight. Return the durations."""
    url = f"http://127.0.0.1:{config.vllm_base_port}/v1/chat/completions"

    async def post_all(bodies: list[bytes]) -> float:
        at_a_time = -(-ANSWERS_IN_FLIGHT * len(bodies) // config.participant_num)
        answers = 0
        waiting = iter(bodies)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def post_next() -> None:
                nonlocal answers
                for body in waiting:
                    async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as reply:
                        answers += len(json.loads(await reply.read())["choices"])

            began = time.perf_counter()
            await asyncio.gather(*(post_next() for _ in range(at_a_time)))
            took = time.perf_counter() - began
        assert answers == config.participant_num
        return took

    return Timing(config.participant_num, 0.0, (uvloop.run(post_all(rounds[0])), uvloop.run(post_all(rounds[1]))))


def one_object(config: SimulationConfig, participants: int) -> Timing:
    """Play two equal rounds with one RPC object and one model client per participant. Return the durations."""
    ports = range(config.base_port, config.base_port + config.server_per_host)
    game = build_game(config, read_models(config))
    fields = {
        "max_tokens": answer_tokens(config.structured_output, game),
        "extra_body": structured_fields(config.structured_output, game),
    }
    for port in ports:  # the class is sent as an argument, as the servers cannot import it
        hello = {"args": ("", fields, PlainParticipant), "kwargs": {}, "class_name": "PlainParticipant"}
        assert RpcClient("localhost", port).create_agent(hello, f"hello-{port}-{time.monotonic_ns()}")
    began = time.perf_counter()
    agents = [
        PlainParticipant(rules(game), fields, to_dist=DistConf(host="localhost", port=ports[index % len(ports)]))
        for index in range(participants)
    ]
    for agent in agents:
        agent._check_created()
    create_s = time.perf_counter() - began
    rounds_s = []
    for number in (1, 2):
        question = Msg("Moderator", question_for(game, number, ()).text, "user")
        began = time.perf_counter()
        numbers = [int(answer.content) for answer in [agent(question) for agent in agents]]
        assert len(numbers) == participants
        rounds_s.append(time.perf_counter() - began)
    for port in ports:
        RpcClient("localhost", port).delete_all_agent()
    return Timing(participants, create_s, (rounds_s[0], rounds_s[1]))


def memory_per_participant(config: SimulationConfig) -> tuple[float, float]:
    """Return the growth of an agent server in KB (PSS) per participant: after two rounds, and at the peak."""
    server = AGENT_SERVERS.process(str(config.base_port))
    assert server is not None
    seen = [_pss_kb(server)]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_S):
            seen.append(_pss_kb(server))

    sampler = threading.Thread(target=sample)
    with Simulation(
        replace(config, rounds=2, seed=1),
        build_game(replace(config, rounds=2, seed=1), read_models(config)),
        new_run_id(),
        ConsoleProgress(),
    ) as simulation:
        sampler.start()
        simulation.create()
        for number in (1, 2):
            simulation.play(number)
        ended.set()
        sampler.join()
        after = _pss_kb(server)
    return (after - seen[0]) / config.participant_num, (max(seen) - seen[0]) / config.participant_num


def _pss_kb(process: psutil.Process) -> float:
    return process.memory_full_info().pss / 2**10


@contextlib.contextmanager
def real_vllm(config: SimulationConfig, model: str | None, flags: list[str]) -> Iterator[None]:
    """Run a vLLM server on the CPU with the model in the folder `model`, or with a tiny generated model."""
    python = ROOT / ".venv-vllm/bin/python"
    assert python.exists(), "./start_vllm.sh --install makes the environment first"
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            subprocess.run([python, ROOT / "tests/tiny_model.py", folder], check=True, capture_output=True)
        with contextlib.closing(ConsoleProgress()) as watch:
            serving = replace(config, role="vllm", model_path=model or folder, gpu_num=0)
            flags = flags + (TINY_FLAGS if model is None else [])
            vllm_servers.start(serving, flags, partial(watch.progress, "vLLM ready"))
        try:
            yield
        finally:
            vllm_servers.stop()


@contextlib.contextmanager
def stand_in(config: SimulationConfig) -> Iterator[None]:
    """Run a stand-in model server that answers immediately."""
    command = [sys.executable, "-c", STAND_IN, str(config.vllm_base_port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            server.terminate()


class Table:
    """A Markdown table of the rates of the programs, printed row by row."""

    def __init__(self, title: str) -> None:
        print(f"\n{title}\n")
        self._row = "| {:<16} | {:>12} | {:>8} | {:>9} | {:>9} | {:>13} | {:>18} | {:>4} |".format
        titles = ("creation", "round 1", "round 2", "with creation", "of the limit (1, 2)", "runs")
        print(self._row("program", "participants", *titles))
        print(self._row(":---", *["---:"] * 7))

    def add(self, program: str, runs: list[Timing], limits: list[Timing] | None) -> None:
        """Print one row: the median answers per second, and the median ratios to the limit of the same repeat."""
        create_s = statistics.median(played.create_s for played in runs)
        rates = [statistics.median(played.rates[number] for played in runs) for number in range(3)]
        pairs = [*zip(runs, limits, strict=True)] if limits else []
        ratios = [[ours.rates[number] / theirs.rates[number] for ours, theirs in pairs] for number in (0, 1)]
        part = ", ".join(f"{statistics.median(each):.2f}" for each in ratios if each)
        shown = [f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.1f}/s" for rate in rates]
        print(self._row(program, f"{runs[0].participants:,}", f"{create_s:.2f} s", *shown, part, len(runs)), flush=True)


def compare(title: str, config: SimulationConfig, repeats: int, each: int, objects: int) -> None:
    """Measure all four programs and print the table.

    This program and the limit take turns in going first, because the server keeps the prompts' common beginning.
    """
    table = Table(title)
    _, first = ours(config)  # warm-up
    ours_played, limits = list[Timing](), list[Timing]()
    for repeat in range(repeats):
        for ours_now in (True, False) if repeat % 2 == 0 else (False, True):
            if ours_now:
                played, first = ours(config)
                ours_played.append(played)
            else:
                limits.append(limit(config, requests_like_ours(config, first)))
    table.add("the limit", limits, limits)
    table.add("this program", ours_played, limits)
    alone = replace(config, participant_num=each, samples_per_request=1)
    table.add("one request each", [ours(alone)[0] for _ in range(min(repeats, 3))], None)
    if objects:
        table.add("one object", [one_object(config, objects) for _ in range(min(repeats, 3))], None)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs that the medians are of (default 5)")
    parser.add_argument("--base-port", type=int, default=12330, help="first port of the agent servers (default 12330)")
    parser.add_argument("--vllm-base-port", type=int, default=8010, help="port of the model server (default 8010)")
    parser.add_argument("--only", choices=("vllm", "stand-in"), help="one of the two tables")
    parser.add_argument("--model", help="folder of the model that vLLM serves (default: a tiny one of random weights)")
    parser.add_argument("--participants", type=int, default=10_000, help="with vLLM (default 10000)")
    parser.add_argument("flags", nargs="*", help="flags for vLLM, after --, such as --enforce-eager")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    logger.remove()
    config = SimulationConfig(agent_type="llm", base_port=arguments.base_port, vllm_base_port=arguments.vllm_base_port)
    if arguments.only != "stand-in":
        config = replace(config, participant_num=arguments.participants)
        each, objects = (2_000, 200) if arguments.model is None else (200, 50)
        with real_vllm(config, arguments.model, arguments.flags), agent_servers(config):
            title = f"Real vLLM on the CPU, 10 + 4 agent servers, model {arguments.model or 'tiny'}"
            compare(title, config, arguments.repeats, each, objects)
    if arguments.only != "vllm":
        one_server = replace(config, participant_num=64_000, server_per_host=1, moderator_per_host=1)
        with stand_in(config):
            with agent_servers(one_server):
                compare("A stand-in that answers at once, one agent server", one_server, arguments.repeats, 16_000, 0)
            with agent_servers(one_server):
                after, peak = memory_per_participant(one_server)
        print(f"\nMemory per participant: {after:.1f} KB after two rounds, {peak:.1f} KB at the peak")


if __name__ == "__main__":
    main()
