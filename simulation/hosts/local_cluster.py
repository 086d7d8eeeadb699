"""Starting, stopping and checking the agent servers of this host.

This module starts a separate process, the launcher (simulation/hosts/launcher.py). The launcher starts the servers.
"""

import contextlib
import datetime
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from simulation.errors import ClusterError, ServerUnreachable, listed
from simulation.files import ROOT
from simulation.hosts.pid_files import AGENT_SERVERS, LAUNCHER, check_not_owned, one_at_a_time
from simulation.llm.model_configs import read_models
from simulation.rpc.channels import call_all, call_all_or_raise, handshake, identify, install_tls
from simulation.rpc.cluster_key import load
from simulation.rpc.endpoints import Endpoint, ranges
from simulation.rpc.lean_import import add_extra_folders
from simulation.rpc.messages import MEMORY, OWN_VERSIONS
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


def _stop_owned(launcher: subprocess.Popen[bytes]) -> None:
    """Stop this run's launcher and its servers by closing the launcher's standard input. Kill processes that hang."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.communicate(timeout=AGENT_SERVERS.term_timeout_s)
    if AGENT_SERVERS.running():  # the launcher hangs, or was killed before its servers
        stop()
    launcher.wait()


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
        with AGENT_SERVERS.starting(config.host_name, config.ports, "BASE_PORT"):
            launcher = _spawn_launcher(config, owned)
            meanwhile()
            AGENT_SERVERS.wait_until_ready(
                config.ports, partial(_answers, config), lambda done, total, _: progress(done, total), READY_TIMEOUT_S
            )
    return partial(_stop_owned, launcher) if owned else None


def _check_same(config: SimulationConfig, ports: list[int], models: dict[str, str]) -> None:
    """Raise ClusterError if a running server does not answer or differs from the requested servers."""
    if ports != list(config.ports):
        raise ClusterError(
            f"{len(ports)} agent servers are already running on ports {ranges(ports)}, but {len(config.ports)} were "
            f"requested on {ranges(list(config.ports))}; {STOP_FIRST}"
        )
    endpoints = [Endpoint(config.host_name, port) for port in ports]
    shakes = call_all_or_raise({each: partial(handshake, each, config.connect_timeout) for each in endpoints})
    for shake in shakes.values():
        if shake.versions != OWN_VERSIONS:
            difference = "are of another version of the program"
        elif (shake.server_per_host, shake.moderator_per_host) != (config.server_per_host, config.moderator_per_host):
            difference = f"are {shake.server_per_host} for participants and {shake.moderator_per_host} for moderators"
        elif shake.models != models:
            known = listed(f"{name} at {url}" for name, url in shake.models.items())
            requested = listed(f"{name} at {url}" for name, url in models.items())
            difference = f"know {known} as models, but this command has {requested}"
        else:
            continue
        raise ClusterError(f"the running agent servers {difference}; {STOP_FIRST}")


def _spawn_launcher(config: SimulationConfig, owned: bool) -> subprocess.Popen[bytes]:
    # -P: a spawned server must not import modules from the current folder
    command = [sys.executable, "-P", str(ROOT / "main.py"), "--role", "participant"]
    command.append("--owned" if owned else "--launch")
    for name in SERVER_SETTINGS:
        if getattr(config, name) is not None:
            command += [flag_of(name), str(getattr(config, name))]
    command += ["--agent-type", "llm"] if config.uses_models else []
    # Prevent OpenBLAS from starting threads, because a process with several threads cannot fork safely
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    stdin = subprocess.PIPE if owned else subprocess.DEVNULL
    return AGENT_SERVERS.spawn(LAUNCHER, command, stdin=stdin, env=env, cwd=ROOT)


def _answers(config: SimulationConfig, port: int) -> bool:
    with contextlib.suppress(ServerUnreachable):
        return bool(identify(Endpoint(config.host_name, port), timeout_s=LOOK_AGAIN_S, starting=True))
    return False


def status(config: SimulationConfig) -> tuple[list[list[str]], bool]:
    """Return table rows (STATUS names the columns), and whether all agent servers of this host answer.

    The row of a server that does not answer contains only the port and the error.
    """
    names = [name for name in AGENT_SERVERS.names() if name != LAUNCHER]
    if not names:
        return [], True
    install_tls(load(Path(config.cluster_key_dir)))
    endpoints = {name: Endpoint(config.host_name, int(name)) for name in names}
    ask = partial(handshake, timeout_s=config.connect_timeout, directives={MEMORY: ""})
    shakes, errors = call_all({name: partial(ask, each) for name, each in endpoints.items()})
    rows = []
    for name in names:
        restarts = AGENT_SERVERS.noted(name).restarts
        if name in errors:
            rows.append([name, f"does not answer after {restarts} restarts: {errors[name]}"])
            continue
        shake = shakes[name]
        since = datetime.datetime.fromtimestamp(shake.started).strftime("%Y-%m-%d %H:%M:%S")
        memory = f"{shake.memory_mb:.1f} MB"
        rows.append([name, shake.role, str(shake.pid), since, str(shake.agents), memory, str(restarts)])
    if AGENT_SERVERS.process(LAUNCHER) is None and not AGENT_SERVERS.noted(LAUNCHER).elsewhere:
        stop_first = f"run {AGENT_SERVERS.stop_command}, then start them again"
        rows.append([f"the launcher has exited: servers that exit are not restarted; {stop_first}"])
    return rows, not errors
