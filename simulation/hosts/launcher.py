"""The process that forks the agent servers of this host and restarts those that fail.

It imports AgentScope once and forks a server per port; importing it in each server would take a second of CPU and
125 MB. Where forking is unsafe (macOS), it spawns the servers instead.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loguru import logger

from simulation.files import SERVERS
from simulation.hosts import pid_files as processes
from simulation.rpc.cluster_key import ClusterKey, load
from simulation.rpc.lean_import import add_extra_folders, import_agentscope
from simulation.settings import SimulationConfig

DEATHS_IN_VAIN = 3  # consecutive failed starts after which a server is not restarted
RESTART_EVERY_S = 1.0  # minimum interval between starts of a server
ENDING = (signal.SIGTERM, signal.SIGINT)


def launch(config: SimulationConfig, owned: bool) -> None:
    """Fork a server per port, restart those that fail, pass TERM on, and return when all servers have ended.

    Args:
        config: Host name, ports and key.
        owned: Whether to stop at the end of standard input, which the parent process holds open.
    """
    processes.ProcessId.of(os.getpid()).write(processes.pid_file(processes.LAUNCHER))
    key = load(Path(config.cluster_key_dir))
    add_extra_folders(config.extra_pythonpath)
    import_agentscope()
    import simulation.hosts.agent_server  # noqa: F401 - once, for all servers to share

    if config.agent_type == "llm":
        from simulation.llm.chat import import_client

        import_client()  # likewise; otherwise each server imports it for its first participants that ask a model

    gc.collect()
    gc.freeze()  # all servers keep sharing the memory pages of the imports
    wake, woken = os.pipe()
    for number in ENDING:  # before the first fork: a signal that ends the launcher would leave its servers running
        signal.signal(number, lambda *_: os.write(woken, b"."))
    stop_signs: list[Any] = [wake, *([sys.stdin.fileno()] if owned else [])]
    servers = _start_all(config, key, lambda: bool(multiprocessing.connection.wait(stop_signs, 0)))
    while servers:
        alive = [server.process.sentinel for server in servers.values() if server.restart_at is None]
        due = [server.restart_at for server in servers.values() if server.restart_at is not None]
        timeout_s = max(min(due) - time.monotonic(), 0.0) if due else None
        ready = multiprocessing.connection.wait([*stop_signs, *alive], timeout_s)
        if any(sign in ready for sign in stop_signs):
            stop_signs = []
            for server in servers.values():
                server.stop()
        for port, server in list(servers.items()):
            if server.process.sentinel in ready and server.restart_at is None:
                server.see_to_its_end()
            elif not server.given_up and server.restart_at is not None and server.restart_at <= time.monotonic():
                server.start_again()
            if server.given_up:
                del servers[port]
    processes.remove_pid(processes.LAUNCHER, os.getpid())


def _start_all(config: SimulationConfig, key: ClusterKey, stopped: Callable[[], bool]) -> dict[int, _Server]:
    """Start a server per port, until `stopped` returns True."""
    servers: dict[int, _Server] = {}
    try:
        for port in config.ports:
            if stopped():
                break
            servers[port] = _Server(config, port, key)
    except OSError:  # no memory or disk space: the parent process finds the reason in the log
        for server in servers.values():
            server.process.kill()
        raise
    return servers


class _Server:
    """One agent server from its parent's side: restarted when it fails, unless its starts keep failing."""

    def __init__(self, config: SimulationConfig, port: int, key: ClusterKey) -> None:
        self._arguments = (config, port, key)
        self._port = port
        self._context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._stopping = False
        self._restarts = 0
        self._failed_starts = 0  # consecutive failures before it was ready
        self.restart_at: float | None = None  # time of the pending restart
        self.given_up = False
        self.start()

    def start(self) -> None:
        self._ready, told = self._context.Pipe(duplex=False)
        self.process = self._context.Process(target=_child, args=(*self._arguments, told))
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until the child has set its handlers
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        self._started = time.monotonic()
        self.restart_at = None
        told.close()  # the child's end of the pipe
        try:
            processes.ProcessId.of(self.process.pid).write(processes.pid_file(str(self._port)))
            processes.write_restart_count(self._port, self._restarts)
        except OSError:  # without a pid file no command could find it
            self.process.kill()
            self.process.join()
            raise

    def start_again(self) -> None:
        """Start the server, or retry later if there is no memory or disk space."""
        try:
            self.start()
        except OSError as error:
            logger.error(f"the server on port {self._port} cannot be started again yet: {error}")
            self.restart_at = time.monotonic() + RESTART_EVERY_S

    def stop(self) -> None:
        self._stopping = True
        if self.restart_at is None:
            self.process.terminate()
        else:
            self.given_up = True

    def see_to_its_end(self) -> None:
        """Log how the server ended, and schedule a restart if it failed."""
        self.process.join()
        status = self.process.exitcode
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        was_ready = self._was_ready()
        self._failed_starts = 0 if was_ready else self._failed_starts + 1
        if status == 0:
            processes.remove_pid(str(self._port), self.process.pid)
        if status == 0 or self._stopping:
            logger.info(f"the server on port {self._port} {how}")
            self.given_up = True
        elif not was_ready and (self._restarts == 0 or self._failed_starts == DEATHS_IN_VAIN):
            tries = f" {self._failed_starts} times in a row" if self._failed_starts > 1 else ""
            logger.error(f"the server on port {self._port} {how} before it was ready{tries}: it is not started again")
            self.given_up = True
        else:
            logger.error(f"the server on port {self._port} {how}: starting it again")
            self._restarts += 1
            self.restart_at = max(self._started + RESTART_EVERY_S, time.monotonic())

    def _was_ready(self) -> bool:
        """Return whether the server reported that it was ready before it ended."""
        try:
            return bool(self._ready.poll() and self._ready.recv())
        except EOFError:
            return False
        finally:
            self._ready.close()


def _child(config: SimulationConfig, port: int, key: ClusterKey, ready: Any) -> None:
    """Run the agent server of one port with its log file, and report when it is ready."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)  # the launcher's handlers would stop all servers
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    log = os.open(SERVERS / f"{port}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    logger.remove()
    logger.add(sys.stderr, format="{time:YYYY-MM-DD HH:mm:ss.SSS} | {level} | {message}")
    from simulation.hosts.agent_server import serve

    serve(config, port, key, lambda: ready.send(True))
