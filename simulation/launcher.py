"""The agent servers of this host, from outside: start, show and stop them; and the process that forks them.

One launcher process imports AgentScope once and forks a server per port; importing it in each server would take a
second of CPU and 125 MB. It stays as their parent, and starts one that dies again. Where forking is unsafe (macOS) the
servers are spawned instead.
AgentScope is imported inside functions here, so that `stop` is instant.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger

from simulation import processes
from simulation.config import ROOT, SimulationConfig, flag_of
from simulation.errors import ClusterError, ServerUnreachable
from simulation.model_configs import read_models
from simulation.placement import Endpoint
from simulation.security import ClusterKey, load, load_or_make

READY_TIMEOUT_S = 60.0
LOOK_AGAIN_S = 0.5
DEATHS_IN_VAIN = 3  # in a row, before it was ready: then a server is not started again
RESTART_EVERY_S = 1.0  # one that dies at once is not started more often
HANDED_ON = (  # the settings of the servers
    *("host_name", "base_port", "server_per_host", "moderator_per_host", "cluster_key_dir"),
    *("model_per_host", "model_configs", "vllm_base_port"),
)
STOP_FIRST = "stop them with ./stop_all_server.sh first"


class OwnedServers:
    """Servers that end with this process, however it ends: their launcher reads a pipe that we hold open."""

    def __init__(self, launcher: subprocess.Popen[bytes]) -> None:
        self._launcher = launcher

    def stop(self) -> None:
        """Stop them, and wait for their end: firmly, if a server hangs."""
        if self._launcher.stdin is not None:
            self._launcher.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._launcher.wait(processes.TERM_TIMEOUT_S)
        if processes.own_processes():  # it hangs, or was killed and has left them behind
            stop()
        self._launcher.wait()


def start(config: SimulationConfig, owned: bool, progress: Callable[[int, int], None]) -> OwnedServers | None:
    """Start this host's agent servers, and return when every one answers.

    Args:
        config: Host name, ports and key of the servers.
        owned: Whether they are to end with this process.
        progress: Called with how many servers are ready, of how many.

    Returns:
        The servers if they are owned; None if not, or if exactly these run already.

    Raises:
        ClusterError: A port is taken, other servers run, or one did not start; nothing is left running.
        SettingsError: The key, the models' settings or the folder for pid files and logs is unusable.
    """
    key = load_or_make(Path(config.cluster_key_dir))
    models = read_models(config) if Path(config.model_configs).exists() else {}
    with processes.one_at_a_time():
        processes.refuse_borrowed()
        running = processes.own_processes()
        if running:
            urls = {name: model.base_url for name, model in models.items()}
            _check_same(config, key, [int(name) for name in running if name.isdigit()], urls)
            progress(len(config.ports), len(config.ports))
            return None
        for port in config.ports:
            processes.check_free(config.host_name, port)
            processes.pid_file(str(port)).unlink(missing_ok=True)
            (processes.SERVERS / f"{port}.log").unlink(missing_ok=True)
            processes.note_restarts(port, 0)
        launcher = _spawn_launcher(config, owned)
        try:
            _wait_ready(config, key, launcher, progress)
        except BaseException:
            launcher.terminate()
            processes.end_processes()
            launcher.wait()
            raise
    return OwnedServers(launcher) if owned else None


def _check_same(config: SimulationConfig, key: ClusterKey, ports: list[int], models: dict[str, str]) -> None:
    """Raise ClusterError unless the servers that run are the ones asked for, and answer."""
    if ports != list(config.ports):
        raise ClusterError(
            f"{len(ports)} agent servers of this host run already, on ports {processes.ranges(ports)}; asked for were "
            f"{len(config.ports)}, on {processes.ranges(list(config.ports))}: {STOP_FIRST}"
        )
    from simulation.remote import OWN_VERSIONS, all_of, handshake, use_key

    use_key(key)
    endpoints = [Endpoint(config.host_name, port) for port in config.ports]
    shakes = all_of({each: partial(handshake, each, config.connect_timeout) for each in endpoints})
    for shake in shakes.values():
        if shake.versions != OWN_VERSIONS:
            raise ClusterError(
                f"the agent servers that run already are of another version of the program: {STOP_FIRST}"
            )
        if (shake.server_per_host, shake.moderator_per_host) != (config.server_per_host, config.moderator_per_host):
            raise ClusterError(
                f"the agent servers that run already are {shake.server_per_host} for participants and "
                f"{shake.moderator_per_host} for moderators: {STOP_FIRST}"
            )
        if shake.models != models:
            raise ClusterError(
                f"the agent servers that run already know {_listed(shake.models)}; asked for were {_listed(models)}: "
                f"{STOP_FIRST}"
            )


def _listed(models: dict[str, str]) -> str:
    """The models in few words."""
    return (
        ", ".join(f"{name} at {url}" for name, url in list(models.items())[:3]) + ", ..." * (len(models) > 3)
        or "no model"
    )


def _spawn_launcher(config: SimulationConfig, owned: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "main.py"), "--role", "participant", "--launch"]
    command += ["--owned"] if owned else []
    for name in HANDED_ON:
        command += [flag_of(name), str(getattr(config, name))]
    with (processes.SERVERS / f"{processes.LAUNCHER}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE if owned else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # OpenBLAS would start threads, and a fork wants one; what computes here is not numpy
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            cwd=ROOT,
            start_new_session=True,  # a Ctrl-C in the terminal is main's, not theirs
        )


def _wait_ready(
    config: SimulationConfig, key: ClusterKey, launcher: subprocess.Popen[bytes], progress: Callable[[int, int], None]
) -> None:
    """Return when all answer; raise ClusterError with the end of the log of the first one that died."""
    from simulation.remote import handshake, use_key

    use_key(key)
    deadline = time.monotonic() + READY_TIMEOUT_S
    for ready, port in enumerate(config.ports):
        while True:
            progress(ready, len(config.ports))
            try:
                handshake(Endpoint(config.host_name, port), timeout_s=LOOK_AGAIN_S, starting=True)
                break
            except ServerUnreachable:
                pass  # not yet: does it still live?
            if processes.pid_file(str(port)).exists() and processes.own_process(str(port)) is None:
                raise ClusterError(f"the agent server on port {port} did not start{processes.end_of_log(str(port))}")
            if launcher.poll() is not None:
                raise ClusterError(f"the agent servers did not start{processes.end_of_log(processes.LAUNCHER)}")
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the agent server on port {port} does not answer after {READY_TIMEOUT_S:g} s"
                    f"{processes.end_of_log(str(port))}"
                )
    progress(len(config.ports), len(config.ports))


def stop() -> int:
    """Stop all agent servers of this checkout, firmly after five seconds; returns how many ran."""
    with processes.one_at_a_time():
        return processes.end_processes()


def status(config: SimulationConfig) -> tuple[list[str], bool]:
    """A headline and a row per agent server of this host, and whether all of them answer."""
    ports = [int(path.stem) for path in processes.SERVERS.glob("*.pid") if path.stem.isdigit()]
    if not ports:
        return [], True
    from simulation.remote import MEMORY, fan_out, handshake, use_key

    use_key(load(Path(config.cluster_key_dir)))
    calls = {
        port: partial(handshake, Endpoint(config.host_name, port), config.connect_timeout, told={MEMORY: ""})
        for port in sorted(ports)
    }
    shakes, errors = fan_out(calls)
    row = "{:>6}  {:<11}  {:>8}  {:<19}  {:>10}  {:>9}  {:>8}".format
    rows = [row("port", "role", "pid", "up since", "agents", "memory", "restarts")]
    for port in sorted(ports):
        if port in shakes:
            shake = shakes[port]
            since = datetime.datetime.fromtimestamp(shake.started).strftime("%Y-%m-%d %H:%M:%S")
            size, restarts = f"{shake.memory_mb:.1f} MB", processes.restarts(port)
            rows.append(row(port, shake.role, shake.pid, since, shake.agents, size, restarts))
        else:
            rows.append(f"{port:>6}  does not answer after {processes.restarts(port)} restarts: {errors[port]}")
    if processes.own_process(processes.LAUNCHER) is None:
        rows.append(
            "their launcher has died: nobody starts them again when they do; ./stop_all_server.sh, then start anew"
        )
    return rows, not errors


# --- The launcher process --------------------------------------------------------------------------------------------


def launch(config: SimulationConfig, owned: bool) -> None:
    """Be the launcher: fork a server per port, and again when it dies; pass TERM on; return when all have ended.

    Args:
        config: Host name, ports and key.
        owned: Whether the end of standard input, which our starter holds open, means stop.
    """
    processes.write_pid(processes.LAUNCHER, os.getpid())
    key = load(Path(config.cluster_key_dir))
    import simulation.server  # noqa: F401 - once, for all servers to share

    gc.collect()
    gc.freeze()  # what is imported stays in pages shared by all servers
    servers: dict[int, _Server] = {}
    try:
        for port in config.ports:
            servers[port] = _Server(config, port, key)
    except OSError:  # no memory, no room: whoever waits for us reads why in our log
        for server in servers.values():
            server.process.kill()
        raise
    wake, woken = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.write(woken, b"."))
    stop_signs: list[Any] = [wake, *([sys.stdin.fileno()] if owned else [])]
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


class _Server:
    """One agent server as its parent sees it: started, and started again when it dies, unless that is in vain."""

    def __init__(self, config: SimulationConfig, port: int, key: ClusterKey) -> None:
        self._arguments = (config, port, key)
        self._port = port
        self._context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._stopping = False
        self._restarts = 0
        self._in_vain = 0  # deaths in a row before it was ready
        self.restart_at: float | None = None  # when to start it again, if it is to wait
        self.given_up = False
        self.start()

    def start(self) -> None:
        self._ready, told = self._context.Pipe(duplex=False)
        self.process = self._context.Process(target=_child, args=(*self._arguments, told))
        self.process.start()
        self._started = time.monotonic()
        self.restart_at = None
        told.close()  # that is the child's
        try:
            processes.write_pid(str(self._port), self.process.pid)
            processes.note_restarts(self._port, self._restarts)
        except OSError:  # nobody would find it
            self.process.kill()
            self.process.join()
            raise

    def start_again(self) -> None:
        """Start it, or try later where there is no memory or room."""
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
        """Say how it ended, and start it again if it died."""
        self.process.join()
        status = self.process.exitcode
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        was_ready = self._was_ready()
        self._in_vain = 0 if was_ready else self._in_vain + 1
        if status == 0:
            processes.remove_pid(str(self._port), self.process.pid)
        if status == 0 or self._stopping:
            logger.info(f"the server on port {self._port} {how}")
            self.given_up = True
        elif not was_ready and (self._restarts == 0 or self._in_vain == DEATHS_IN_VAIN):
            tries = f" {self._in_vain} times in a row" if self._in_vain > 1 else ""
            logger.error(f"the server on port {self._port} {how} before it was ready{tries}: it is not started again")
            self.given_up = True
        else:
            logger.error(f"the server on port {self._port} {how}: starting it again")
            self._restarts += 1
            self.restart_at = max(self._started + RESTART_EVERY_S, time.monotonic())

    def _was_ready(self) -> bool:
        """Whether it said so before its end."""
        try:
            return bool(self._ready.poll() and self._ready.recv())
        except EOFError:
            return False
        finally:
            self._ready.close()


def _child(config: SimulationConfig, port: int, key: ClusterKey, ready: Any) -> None:
    """Be the agent server of one port, with a log of its own, and say so when it is ready."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # the launcher's handlers would stop all servers
    log = os.open(processes.SERVERS / f"{port}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    logger.remove()
    logger.add(sys.stderr, format="{time:YYYY-MM-DD HH:mm:ss.SSS} | {level} | {message}")
    from simulation.server import serve

    serve(config, port, key, lambda: ready.send(True))
