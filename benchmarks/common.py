"""What the benchmarks share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from simulation import local_servers
from simulation.config import SimulationConfig
from simulation.console import ProgressWatch


@contextlib.contextmanager
def agent_servers(config: SimulationConfig) -> Iterator[None]:
    """Agent servers for as long as they are needed."""
    with contextlib.closing(ProgressWatch()) as watch:
        servers = local_servers.start(config, True, lambda done, total: watch.progress("servers ready", done, total))
    assert servers is not None, "stop the servers that run first: ./stop_all_server.sh"
    try:
        yield
    finally:
        servers.stop()
