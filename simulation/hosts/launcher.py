"""The launcher: a process that starts the agent servers of this host and restarts servers that fail.

The launcher imports AgentScope once, then forks one server per port. A separate import would cost each server 1 s of
CPU time and 125 MB. On macOS, where forks are unsafe, the launcher spawns the servers instead.
"""

import asyncio
import gc
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger

from simulation.errors import SettingsError
from simulation.hosts.pid_files import AGENT_SERVERS, LAUNCHER
from simulation.hosts.process_id import ProcessId
from simulation.rpc.cluster_key import ClusterKey, load
from simulation.rpc.lean_import import add_extra_folders, import_agentscope
from simulation.settings import SimulationConfig

FAILED_STARTS = 3  # consecutive failed starts after which a server is not restarted
RESTART_EVERY_S = 1.0  # minimum interval between starts of a server
LONGEST_WAIT_S = 3600.0
ENDING = (signal.SIGTERM, signal.SIGINT)


def launch(config: SimulationConfig, owned: bool) -> None:
    """Run one server per port until all have ended, at a TERM or INT signal or, if `owned`, the end of the input."""
    key = load(Path(config.cluster_key_dir))
    add_extra_folders(config.extra_pythonpath)
    import_agentscope()
    import simulation.hosts.agent_server

    if config.agent_type == "llm":
        import simulation.llm.http_client  # noqa: F401 - all servers share this import, too

    gc.collect()
    gc.freeze()  # all servers share the memory pages of the imports
    wake_reader, wake_writer = os.pipe()
    for number in ENDING:  # set these handlers before any server runs
        signal.signal(number, lambda *_: os.write(wake_writer, b"."))
    stop_signs: list[Any] = [wake_reader, *([sys.stdin.fileno()] if owned else [])]
    servers = [_Server(config, port, key) for port in config.ports]
    stopping = False
    try:
        while servers := [each for each in servers if each.process is not None or each.start_at < math.inf]:
            running = {each.process.sentinel: each for each in servers if each.process is not None}
            timeout_s = min(each.start_at for each in servers) - time.monotonic()
            ready = multiprocessing.connection.wait([*stop_signs, *running], min(timeout_s, LONGEST_WAIT_S))
            if any(sign in ready for sign in stop_signs):
                stopping, stop_signs = True, []
                for each in servers:
                    each.stop()
            for sentinel in running.keys() & ready:
                running[sentinel].on_exit(stopping)
            due = [each for each in servers if each.start_at <= time.monotonic()]
            for each in due[:1]:  # one at a time: check the stop signs before the next
                each.start()
    finally:  # servers remain only after an error such as a lack of memory; the log contains the reason
        for each in servers:
            each.kill()
    AGENT_SERVERS.remove(LAUNCHER, os.getpid())


class _Server:
    """An agent server process, restarted if it fails, except after a failed first start or FAILED_STARTS in a row."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments, self._port = arguments, arguments[1]  # of `_child`, without `ready`
        self._restarts = self._failed_starts = 0  # _failed_starts counts consecutive failures
        self._started = self.start_at = 0.0  # times (time.monotonic) of the latest start, and of the next (inf: none)
        self.process: Any = None

    def start(self) -> None:
        """Start the server. If memory or disk is full, raise OSError at the first start; at a restart, plan a retry."""
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._ready = context.RawValue("b")  # 1 as soon as the server accepts calls
        process = context.Process(target=_child, args=(*self._arguments, self._ready))
        self._started, self.start_at = time.monotonic(), math.inf
        try:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until the child has its own handlers
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self.process = process
            ProcessId.of(process.pid, self._restarts).write(AGENT_SERVERS.pid_file(self._port))
        except OSError as error:
            self.kill()  # without a pid file, no command can stop the server
            if self._restarts == 0:
                raise
            logger.error(f"the server on port {self._port} cannot be started again yet: {error}")
            self.start_at = time.monotonic() + RESTART_EVERY_S

    def stop(self) -> None:
        self.start_at = math.inf
        if self.process is not None:
            self.process.terminate()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def on_exit(self, stopping: bool) -> None:
        """Log how the server ended. If it failed, plan a restart, unless `stopping` is True or starts keep failing."""
        self.process.join()
        status, pid, self.process = self.process.exitcode, self.process.pid, None
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        self._failed_starts = 0 if self._ready.value else self._failed_starts + 1
        if status == 0:
            AGENT_SERVERS.remove(self._port, pid)
        if status == 0 or stopping:
            logger.info(f"the server on port {self._port} {how}")
        elif self._failed_starts == FAILED_STARTS or (self._failed_starts and self._restarts == 0):
            tries = f" {self._failed_starts} times in a row" if self._failed_starts > 1 else ""
            logger.error(f"the server on port {self._port} {how} before it was ready{tries}: it is not started again")
        else:
            logger.error(f"the server on port {self._port} {how}: starting it again")
            self._restarts += 1
            self.start_at = max(self._started + RESTART_EVERY_S, time.monotonic())


def _child(config: SimulationConfig, port: int, key: ClusterKey, ready: Any) -> None:
    """Run the agent server of one port, with output to its log. Set `ready` to 1 as soon as it accepts calls."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)  # replace the launcher's handlers, which stop all servers
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    log = os.open(AGENT_SERVERS.log(port), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    logger.remove()
    logger.add(sys.stderr, format="{time:YYYY-MM-DD HH:mm:ss.SSS} | {level} | {message}")
    from simulation.hosts.agent_server import serve

    try:
        asyncio.run(serve(config, port, key, partial(setattr, ready, "value", 1)))
    except SettingsError as error:
        logger.error(str(error))
        sys.exit(error.exit_status)
