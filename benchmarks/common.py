"""Shared helpers of the benchmarks: agent servers, memory sampling and tables."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest.mock import patch

import psutil

from simulation.hosts import local_cluster
from simulation.hosts.pid_files import AGENT_SERVERS
from simulation.rpc.channels import install_tls
from simulation.rpc.cluster_key import load_or_make
from simulation.runs.console import ConsoleProgress
from simulation.settings import SimulationConfig

CALL_COUNTER = str(Path(__file__).parent / "call_counter")  # see sitecustomize.py there
SAMPLE_S = 0.05
SAMPLED_PART = 0.1  # maximum share of the time for sampling, as the reading of page tables delays allocations


@contextlib.contextmanager
def agent_servers(config: SimulationConfig, owned: bool = True, counted: bool = False) -> Iterator[None]:
    """Run agent servers for the duration of the context.

    Args:
        config: The settings of the servers.
        owned: Whether the servers serve this process only (default), or any main process.
        counted: Whether the servers count the calls that they receive.
    """
    assert not AGENT_SERVERS.running(), "stop the servers that run first: ./stop_all_server.sh"
    install_tls(load_or_make(Path(config.cluster_key_dir)))
    counter = {"PYTHONPATH": CALL_COUNTER} if counted else {}
    with contextlib.closing(ConsoleProgress()) as watch, patch.dict(os.environ, counter):
        stop = local_cluster.start(config, owned, lambda done, total: watch.progress("servers ready", done, total))
    try:
        yield
    finally:
        (stop or local_cluster.stop)()


def memory_mb(pids: Iterable[int]) -> float:
    """Return the total memory of these processes in MiB (PSS). Shared pages count once, exited processes do not."""
    found = 0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += psutil.Process(pid).memory_full_info().pss
    return found / 2**20


def peak_mb(work: Callable[[], object], pids: list[int]) -> float:
    """Run `work`, sample `memory_mb` meanwhile, and return the maximum of the samples."""
    peak = 0.0
    ended = threading.Event()

    def sample() -> None:
        nonlocal peak
        pause_s = SAMPLE_S
        while not ended.wait(pause_s):
            began = time.perf_counter()
            peak = max(peak, memory_mb(pids))
            pause_s = max(SAMPLE_S, (time.perf_counter() - began) / SAMPLED_PART)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        work()
    finally:
        ended.set()
        sampler.join()
    return peak


class Table:
    """A Markdown table that is printed row by row. Each row consists of a name and several figures."""

    def __init__(self, title: str, name: str, *figures: str, name_format: str = "<50", width: int = 8) -> None:
        widths = [max(len(figure), width) for figure in figures]
        self._row = " | ".join([f"| {{:{name_format}}}", *(f"{{:>{width}}}" for width in widths)]) + " |"
        print(f"\n{title}\n")
        self.add(name, *figures)
        self.add(":---" if name_format.startswith("<") else "---:", *["---:"] * len(figures))

    def add(self, name: str, *figures: object) -> None:
        print(self._row.format(name, *map(str, figures)), flush=True)
