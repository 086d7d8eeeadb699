"""Starting, stopping and checking the agent servers of this host, by way of a separate process (see launcher.py)."""

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
