"""Starting, stopping and checking the agent servers of this host, by way of a separate process (see launcher.py)."""

import contextlib
import datetime
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from simulation.errors import ClusterError, ServerUnreachable, listed
from simulation.files import HOME, MAIN
from simulation.hosts.pid_files import (
    AGENT_SERVERS,
    LAUNCHER,
    ServerProcesses,
    check_not_owned,
    free_ports,
    one_at_a_time,
    private_servers,
)
from simulation.llm.model_configs import read_models
from simulation.rpc.channels import call_all, call_all_or_raise, handshake, identify, install_tls
from simulation.rpc.cluster_key import load
from simulation.rpc.endpoints import Endpoint, ranges
from simulation.rpc.lean_import import add_extra_folders
from simulation.rpc.messages import MEMORY, OWN_VERSIONS, layout_of
from simulation.settings import SimulationConfig, flag_of

READY_TIMEOUT_S = 60.0
LOOK_AGAIN_S = 0.5
SERVER_SETTINGS = (  # the settings that the servers need
    *("host_name", "base_port", "server_per_host", "moderator_per_host", "cluster_key_dir"),
    *("model_per_host", "model_configs", "vllm_base_port", "extra_pythonpath"),
)
STATUS = ("port", "role", "pid", "up since", "agents", "memory", "restarts")
STOP_FIRST = f"run {AGENT_SERVERS.stop_command} first"

stop = AGENT_SERVERS.stop


def _stop_owned(launcher: subprocess.Popen[bytes], servers: ServerProcesses) -> None:
    """Stop this run's launcher and its servers by closing the launcher's standard input. Kill processes that hang."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.communicate(timeout=servers.term_timeout_s)
    if servers.running():  # the launcher hangs, or was killed before its servers
        servers.stop()
    launcher.wait()
    if servers.is_private:
        shutil.rmtree(servers.folder, ignore_errors=True)


def start(
    config: SimulationConfig,
    owned: bool,
    progress: Callable[[int, int], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> Callable[[], None] | None:
    """Start the agent servers of this host and wait until all answer. The caller must have called `install_tls`.

    If `owned`, return a function that stops the servers, which also stop if this process exits. Return None if not
    `owned`, or if exactly the requested servers already run. `meanwhile` runs while the launcher starts (about 1 s).
    If other servers are running or a server does not start, stop all new servers and raise ClusterError.
    """
    add_extra_folders(config.extra_pythonpath)  # the launcher does this, too; here, an error is reported in one line
    models = {name: model.base_url for name, model in read_models(config, required=False).items()}
    with one_at_a_time():
        check_not_owned()
        AGENT_SERVERS.check_same_host()
        if running := AGENT_SERVERS.running():
            _check_same(config, [int(name) for name in running if name != LAUNCHER], models)
            progress(len(config.ports), len(config.ports))
            return None
        stop_started = _start(config, owned, progress, meanwhile, AGENT_SERVERS)
    return stop_started if owned else None


def start_private(
    config: SimulationConfig, progress: Callable[[int, int], None], meanwhile: Callable[[], None] = lambda: None
) -> tuple[int, Callable[[], None]]:
    """Start agent servers for this process alone, on free ports. Return their first port and a function to stop them.

    The caller must have called `install_tls`. Other processes and commands leave these servers alone. They also stop if
    this process exits. Raises ClusterError if a server does not start.
    """
    add_extra_folders(config.extra_pythonpath)
    with one_at_a_time(quiet=True):
        for folder in (HOME / "run").glob("python-*"):  # records of servers that have stopped with their process
            others = private_servers(folder)
            if not any(others.process(name) or others.noted(name).elsewhere for name in others.names()):
                shutil.rmtree(folder, ignore_errors=True)
        config = replace(config, base_port=free_ports(len(config.ports)))
        servers = private_servers(HOME / "run" / f"python-{config.base_port}")
        return config.base_port, _start(config, True, progress, meanwhile, servers)


def _start(
    config: SimulationConfig,
    owned: bool,
    progress: Callable[[int, int], None],
    meanwhile: Callable[[], None],
    servers: ServerProcesses,
) -> Callable[[], None]:
    """Start servers and return a function that stops those of an `owned` launcher. Callers hold `one_at_a_time`."""
    with servers.starting(config.host_name, config.ports, "BASE_PORT"):
        launcher = _spawn_launcher(config, owned, servers)
        meanwhile()
        servers.wait_until_ready(
            config.ports, partial(_answers, config), lambda done, total, _: progress(done, total), READY_TIMEOUT_S
        )
    return partial(_stop_owned, launcher, servers)


def _check_same(config: SimulationConfig, ports: list[int], models: dict[str, str]) -> None:
    """Raise ClusterError if a running server does not answer or differs from the requested servers."""
    if ports != list(config.ports):
        raise ClusterError(
            f"{len(ports)} agent servers are already running on ports {ranges(ports)}, but {len(config.ports)} were "
            f"requested on {ranges(list(config.ports))}; {STOP_FIRST}"
        )
    ask = partial(handshake, timeout_s=config.connect_timeout)
    shakes = call_all_or_raise({port: partial(ask, Endpoint(config.host_name, port)) for port in ports})
    for shake in shakes.values():
        difference = ""
        if shake.versions != OWN_VERSIONS:
            difference = "are of another version of the program"
        elif shake.layout != layout_of(config):
            difference = "are {1} for participants and {2} for moderators".format(*shake.layout)
        elif shake.models != models:
            known, requested = (listed(map(" at ".join, each.items())) for each in (shake.models, models))
            difference = f"know {known} as models, but this command has {requested}"
        if difference:
            raise ClusterError(f"the running agent servers {difference}; {STOP_FIRST}")


def _spawn_launcher(config: SimulationConfig, owned: bool, servers: ServerProcesses) -> subprocess.Popen[bytes]:
    # -P: a spawned server must not import modules from the current folder
    command = [sys.executable, "-P", str(MAIN), "--role", "participant"]
    command.append("--owned" if owned else "--launch")
    for name in SERVER_SETTINGS:
        if getattr(config, name) is not None:
            command += [flag_of(name), str(getattr(config, name))]
    command += ["--agent-type", "llm"] if config.uses_models else []
    # Prevent OpenBLAS from starting threads, because a process with several threads cannot fork safely
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "SIMULATION_HOME": str(HOME)}
    env["SIMULATION_SERVERS"] = str(servers.folder)
    stdin = subprocess.PIPE if owned else subprocess.DEVNULL
    return servers.spawn(LAUNCHER, command, stdin=stdin, env=env, cwd=HOME)


def _answers(config: SimulationConfig, port: int) -> bool:
    with contextlib.suppress(ServerUnreachable):
        return bool(identify(Endpoint(config.host_name, port), timeout_s=LOOK_AGAIN_S, starting=True))
    return False


def status(config: SimulationConfig) -> tuple[list[list[str]], bool]:
    """Return table rows (STATUS names the columns; errors have shorter rows), and whether all servers here answer."""
    names = [name for name in AGENT_SERVERS.names() if name != LAUNCHER]
    if not names:
        return [], True
    install_tls(load(Path(config.cluster_key_dir)))
    ask = partial(handshake, timeout_s=config.connect_timeout, directives={MEMORY: ""})
    shakes, errors = call_all({name: partial(ask, Endpoint(config.host_name, int(name))) for name in names})
    rows = []
    for name in names:
        restarts = AGENT_SERVERS.noted(name).restarts
        if name in errors:
            rows.append([name, f"does not answer after {restarts} restarts: {errors[name]}"])
            continue
        shake = shakes[name]
        role = "participant" if int(name) < sum(shake.layout[:2]) else "moderator"
        since = f"{datetime.datetime.fromtimestamp(shake.started):%Y-%m-%d %H:%M:%S}"
        rows.append([name, role, str(shake.pid), since, str(shake.agents), f"{shake.memory_mb:.1f} MB", str(restarts)])
    if AGENT_SERVERS.process(LAUNCHER) is None and not AGENT_SERVERS.noted(LAUNCHER).elsewhere:
        stop_first = f"run {AGENT_SERVERS.stop_command}, then start them again"
        rows.append([f"the launcher has exited: servers that exit are not restarted; {stop_first}"])
    return rows, not errors
