"""Commands that start, show and stop the agent servers of this host.

This module starts a separate process, the launcher (simulation/hosts/launcher.py), which forks the servers.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from simulation.errors import ClusterError, ServerUnreachable
from simulation.files import ROOT, SERVERS, files_in, is_there
from simulation.hosts import pid_files as processes
from simulation.llm.model_configs import has_models, read_models
from simulation.rpc.channels import call_all, call_all_or_raise, handshake, identify, install_tls
from simulation.rpc.cluster_key import load
from simulation.rpc.endpoints import Endpoint, ranges
from simulation.rpc.lean_import import add_extra_folders
from simulation.rpc.messages import MEMORY, OWN_VERSIONS
from simulation.settings import SimulationConfig, flag_of

READY_TIMEOUT_S = 60.0
LOOK_AGAIN_S = 0.5
HANDED_ON = (  # settings passed to the servers
    *("host_name", "base_port", "server_per_host", "moderator_per_host", "cluster_key_dir"),
    *("model_per_host", "model_configs", "vllm_base_port", "agent_type", "extra_pythonpath"),
)
STATUS = ("port", "role", "pid", "up since", "agents", "memory", "restarts")
STOP = "./stop_all_server.sh"
STOP_FIRST = f"run {STOP} first"


class OwnedServers:
    """Servers that end with this process, however it ends: their launcher reads a pipe that this process holds open."""

    def __init__(self, launcher: subprocess.Popen[bytes]) -> None:
        self._launcher = launcher

    def stop(self) -> None:
        """Stop the servers and wait until they have ended; kill those that hang."""
        if self._launcher.stdin is not None:
            self._launcher.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._launcher.wait(processes.TERM_TIMEOUT_S)
        if processes.own_processes():  # the launcher hangs, or was killed and left servers running
            with processes.one_at_a_time():
                processes.terminate_all()
        self._launcher.wait()


def start(
    config: SimulationConfig,
    owned: bool,
    progress: Callable[[int, int], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> OwnedServers | None:
    """Start this host's agent servers, and return when all of them answer. Needs `install_tls`.

    Args:
        config: Host name, ports and key folder of the servers.
        owned: Whether the servers end with this process.
        progress: Called with the number of ready servers and their total.
        meanwhile: Called while the launcher imports its modules (about 1 s).

    Returns:
        The servers if they are owned; None if not, or if exactly these servers are already running.

    Raises:
        ClusterError: A port is taken, other servers run, or one did not start; no new server is left running.
        SettingsError: The model settings or the folder for pid files and logs is unusable.
    """
    add_extra_folders(config.extra_pythonpath)  # the launcher does it, too; here an error takes one line
    models = read_models(config) if has_models(config) else {}
    with processes.one_at_a_time():
        processes.check_not_owned()
        processes.check_same_host(SERVERS, STOP)
        running = processes.own_processes()
        if running:
            urls = {name: model.base_url for name, model in models.items()}
            _check_same(config, [int(name) for name in running if name.isdigit()], urls)
            progress(len(config.ports), len(config.ports))
            return None
        for port in config.ports:
            processes.check_free(config.host_name, port)
            processes.pid_file(str(port)).unlink(missing_ok=True)
            (SERVERS / f"{port}.log").unlink(missing_ok=True)
            processes.write_restart_count(port, 0)
        processes.remove_drafts()
        processes.check_room()
        launcher = None
        try:
            with processes.signals_later():  # a signal before the assignment would leave it running
                launcher = _spawn_launcher(config, owned)
            meanwhile()
            _wait_ready(config, launcher, progress)
        except BaseException:
            if launcher is not None:
                _end_launcher(launcher)
            raise
    return OwnedServers(launcher) if owned else None


def _check_same(config: SimulationConfig, ports: list[int], models: dict[str, str]) -> None:
    """Raise ClusterError unless the running servers are the requested ones, and answer."""
    if ports != list(config.ports):
        raise ClusterError(
            f"{len(ports)} agent servers are already running on ports {ranges(ports)}, but {len(config.ports)} were "
            f"requested on {ranges(list(config.ports))}; {STOP_FIRST}"
        )
    endpoints = [Endpoint(config.host_name, port) for port in config.ports]
    shakes = call_all_or_raise({each: partial(handshake, each, config.connect_timeout) for each in endpoints})
    for shake in shakes.values():
        if shake.versions != OWN_VERSIONS:
            raise ClusterError(f"the running agent servers are of another version of the program; {STOP_FIRST}")
        if (shake.server_per_host, shake.moderator_per_host) != (config.server_per_host, config.moderator_per_host):
            raise ClusterError(
                f"the running agent servers are {shake.server_per_host} for participants and "
                f"{shake.moderator_per_host} for moderators; {STOP_FIRST}"
            )
        if shake.models != models:
            raise ClusterError(
                f"the running agent servers know {_listed(shake.models)}, but {_listed(models)} were requested; "
                f"{STOP_FIRST}"
            )


def _listed(models: dict[str, str]) -> str:
    """Return a short list of the models and their addresses."""
    return (
        ", ".join(f"{name} at {url}" for name, url in list(models.items())[:3]) + ", ..." * (len(models) > 3)
        or "no model"
    )


def _end_launcher(launcher: subprocess.Popen[bytes]) -> None:
    """End the launcher and its servers, including those whose pid files it has not written yet."""
    with processes.signals_later():  # a second Ctrl-C would leave servers running
        launcher.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(processes.TERM_TIMEOUT_S)  # it passes the signal on, and waits for its servers
        processes.terminate_all()
        launcher.wait()


def _spawn_launcher(config: SimulationConfig, owned: bool) -> subprocess.Popen[bytes]:
    # -P is for servers that are spawned, not forked: their Python would search the current folder first
    command = [sys.executable, "-P", str(ROOT / "main.py"), "--role", "participant", "--launch"]
    command += ["--owned"] if owned else []
    for name in HANDED_ON:
        if getattr(config, name) is not None:
            command += [flag_of(name), str(getattr(config, name))]
    with (SERVERS / f"{processes.LAUNCHER}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE if owned else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # OpenBLAS would start threads, and forking is safe with one only; nothing here needs a fast numpy
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            cwd=ROOT,
            start_new_session=True,  # a Ctrl-C in the terminal reaches main only
        )


def _wait_ready(
    config: SimulationConfig, launcher: subprocess.Popen[bytes], progress: Callable[[int, int], None]
) -> None:
    """Return when all servers answer; raise ClusterError with the log tail of the first one that failed."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    for ready, port in enumerate(config.ports):
        while True:
            progress(ready, len(config.ports))
            try:
                identify(Endpoint(config.host_name, port), timeout_s=LOOK_AGAIN_S, starting=True)
                break
            except ServerUnreachable:
                pass  # not ready yet; check that it still runs
            if is_there(processes.pid_file(str(port))) and processes.own_process(str(port)) is None:
                raise ClusterError(f"the agent server on port {port} did not start{processes.log_tail(str(port))}")
            if launcher.poll() is not None:
                raise ClusterError(f"the agent servers did not start{processes.log_tail(processes.LAUNCHER)}")
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the agent server on port {port} does not answer after {READY_TIMEOUT_S:g} s"
                    f"{processes.log_tail(str(port))}"
                )
    progress(len(config.ports), len(config.ports))


def stop() -> int:
    """Stop all agent servers of this checkout (KILL after 5 s), and return how many were running.

    Raises ClusterError if there may be others that this host cannot see.
    """
    with processes.one_at_a_time():
        stopped = processes.terminate_all()
        processes.check_same_host(SERVERS, STOP)
    return stopped


def status(config: SimulationConfig) -> tuple[list[list[str]], bool]:
    """Return the cells of STATUS for each agent server of this host, or its port and error; and whether all answer."""
    ports = [int(path.stem) for path in files_in(SERVERS, ".pid") if path.stem.isdigit()]
    if not ports:
        return [], True
    install_tls(load(Path(config.cluster_key_dir)))
    calls = {
        port: partial(handshake, Endpoint(config.host_name, port), config.connect_timeout, directives={MEMORY: ""})
        for port in sorted(ports)
    }
    shakes, errors = call_all(calls)
    rows = []
    for port in sorted(ports):
        if port in shakes:
            shake = shakes[port]
            since = datetime.datetime.fromtimestamp(shake.started).strftime("%Y-%m-%d %H:%M:%S")
            size, restarts = f"{shake.memory_mb:.1f} MB", processes.restarts(port)
            rows.append([str(port), shake.role, str(shake.pid), since, str(shake.agents), size, str(restarts)])
        else:
            rows.append([str(port), f"does not answer after {processes.restarts(port)} restarts: {errors[port]}"])
    launcher = processes.ProcessId.read(processes.pid_file(processes.LAUNCHER))
    if processes.own_process(processes.LAUNCHER) is None and not (launcher and launcher.elsewhere):
        rows.append(
            [f"the launcher has exited: servers that exit are not restarted; run {STOP}, then start them again"]
        )
    return rows, not errors
