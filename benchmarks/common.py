"""What the benchmarks share."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import psutil

from simulation.hosts import local_cluster as local_servers
from simulation.hosts import pid_files as processes
from simulation.runs.console import ConsoleProgress
from simulation.settings import SimulationConfig

SAMPLE_S = 0.05
SAMPLED_PART = 0.1  # of the time at most: who looks at pages holds up who asks for more of them


@contextlib.contextmanager
def agent_servers(config: SimulationConfig, owned: bool = True) -> Iterator[None]:
    """Agent servers for as long as they are needed; owned ones are for this process alone, others for any main."""
    assert not processes.own_processes(), "stop the servers that run first: ./stop_all_server.sh"
    with contextlib.closing(ConsoleProgress()) as watch:
        servers = local_servers.start(config, owned, lambda done, total: watch.progress("servers ready", done, total))
    try:
        yield
    finally:
        if servers is not None:
            servers.stop()
        else:
            local_servers.stop()


def memory_mb(pids: Iterable[int]) -> float:
    """Memory of these processes together (PSS): what they share counts once, and who has ended not at all."""
    found = 0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += psutil.Process(pid).memory_full_info().pss
    return found / 2**20


def peak_mb(work: Callable[[], object], pids: list[int]) -> float:
    """The peak of `memory_mb` while the work is done."""
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
    """Rows of Markdown: a name, and figures at least as wide as their titles."""

    def __init__(self, title: str, name: str, *figures: str, name_format: str = "<50", width: int = 8) -> None:
        widths = [max(len(figure), width) for figure in figures]
        self._row = " | ".join([f"| {{:{name_format}}}", *(f"{{:>{width}}}" for width in widths)]) + " |"
        print(f"\n{title}\n")
        self.add(name, *figures)
        self.add(":---" if name_format.startswith("<") else "---:", *["---:"] * len(figures))

    def add(self, name: str, *figures: object) -> None:
        print(self._row.format(name, *map(str, figures)), flush=True)
