"""The program: parse the command, check it, start missing servers, play, and exit with a status listed in README.md.

Modules that need AgentScope are imported inside functions, so that --help, usage errors and --stop respond at once.
"""

import os
import sys

MODULES = ("simulation", "moderator", "participant")  # the program's own top-level modules

if __name__ != "main":  # run as a program, not imported by a test
    # Before any other import: files in this folder or the working directory, such as random.py, must not shadow
    # modules of Python and the libraries, or optional modules that a library tries to import.
    HERE = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120
    sys.path[:] = [folder for folder in sys.path if folder and os.path.realpath(folder) != HERE]
    from importlib.machinery import ModuleSpec
    from importlib.util import spec_from_file_location

    class Own:
        """The import finder for the program's own modules beside this file, and no others."""

        @staticmethod
        def find_spec(name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
            """Return the spec of one of these modules, or None for any other."""
            if name not in MODULES:
                return None
            file = f"{HERE}/{name}.py" if name != "simulation" else f"{HERE}/simulation/__init__.py"
            return spec_from_file_location(name, file)  # not a folder of the same name

    sys.meta_path.insert(0, Own)

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to clean up: exit without a traceback
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # we report a refused handshake ourselves, in one line
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")  # gRPC's own resolver queries DNS for names in /etc/hosts
for name in [name for name in os.environ if name.startswith(("LOGURU_", "MPLBACKEND", "PROTOCOL_BUFFERS_PYTHON_"))]:
    del os.environ[name]  # set for other programs; the values may not suit the libraries here

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulation.cli import (
    ACTIONS,
    ask,
    check_used,
    describe_damage,
    draw_reports,
    exclude_from_proxy,
    make_parser,
    needs_model_count,
    parse_flags,
    report,
    roles_in,
    serve,
    serve_models,
    split_vllm_flags,
)
from simulation.errors import Interrupted, SettingsError, SimulationError, say
from simulation.settings import (
    SimulationConfig,
    check,
    flag_of,
)

if TYPE_CHECKING:
    from simulation.hosts.local_cluster import OwnedServers
    from simulation.rpc.cluster_key import ClusterKey
    from simulation.runs.console import ConsoleProgress


def main(arguments: list[str] | None = None) -> int:
    """Run one role and return the exit status. Each error is one line on standard error."""
    try:
        flags, for_vllm = split_vllm_flags(sys.argv[1:] if arguments is None else arguments)
        if {"-h", "--help"} & {*flags}:
            role = (roles_in(flags) or [SimulationConfig.role])[-1]
            check("--role", role, SimulationConfig.__dataclass_fields__["role"].metadata)
            say(make_parser(role).format_help().rstrip("\n"))
            return 0
        given, folders = parse_flags(flags)
        actions = [name for name in ACTIONS if given.pop(name, False)]
        owned = given.pop("owned", False)
        check_used(given.get("role", SimulationConfig.role), actions, given)
        action = actions[0] if actions else None
        if folders and given.get("role") != "report":
            raise SettingsError(f"unrecognized arguments: {' '.join(folders)} (folders of runs go with --role report)")
        if "hosts" in given:
            given["hosts"] = tuple(given["hosts"])
        config = SimulationConfig(**given)
        exclude_from_proxy(*config.hosts, config.host_name)
        if action is None and "model_per_host" not in given and needs_model_count(config):
            from simulation.hosts.vllm_servers import servers_per_host

            given["model_per_host"] = servers_per_host(config)
            config = SimulationConfig(**given)
        if for_vllm and (config.role != "vllm" or actions):
            raise SettingsError(f"{for_vllm[0]}: only flags for vLLM may follow --, where --role vllm starts servers")
        if folders and actions:
            raise SettingsError(f"{folders[0]}: does not go with {flag_of(actions[0])}")
        if owned and action != "launch":
            raise SettingsError("--owned: goes with --launch")
        roles: dict[str, Callable[[], int]] = {
            "main": lambda: play(config, given),
            "participant": lambda: serve(config, action, owned),
            "ask": lambda: ask(config),
            "report": lambda: draw_reports() if action else report(config, folders),
            "vllm": lambda: serve_models(config, action, for_vllm),
        }
        return roles[config.role]()
    except SimulationError as error:
        say(f"error: {error}", sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:  # noqa: BLE001 - a bug in this program: one line, and the traceback in a file
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in MODULES:
            say(f"error: {describe_damage(error)}", sys.stderr)
            return SettingsError.exit_status
        from simulation.runs.console import keep_traceback

        where = keep_traceback()
        say(f"error: a defect of the program: {type(error).__name__}: {error}; see {where}", sys.stderr)
        return 1


def play(config: SimulationConfig, given: dict[str, Any]) -> int:
    """Run role main: check everything, start missing servers, play, and clean up all but the results.

    Args:
        config: The settings.
        given: The settings given on the command line; others may be read from a file.
    """
    from loguru import logger

    from simulation.results.report_process import ReportProcess
    from simulation.rpc.cluster_key import load, load_or_make
    from simulation.runs.console import ConsoleProgress, log_to_stderr
    from simulation.runs.session import session_of

    log_to_stderr()
    session = session_of(config, given)
    if config.dry_run:
        say("\n".join(session.plan()))
        return 0
    folder = session.config.cluster_key_dir
    named = folder in (config.cluster_key_dir, SimulationConfig.cluster_key_dir)
    # if only the resumed run names the folder and it is missing, a new key would not match that run's servers
    key = load_or_make(Path(folder)) if named else load(Path(folder))
    watch = ConsoleProgress()
    watch.listen()
    dashboard = None
    if config.dashboard is not None:  # from this command, not from the resumed run
        from simulation.runs.dashboard import Dashboard  # imported only on request

        dashboard = Dashboard(config.dashboard, watch)
    servers = reports = None
    try:
        starts_servers = session.needs_servers and none_here(session.config, key)
        if starts_servers:
            if "keep_agents" in given:
                raise SettingsError("--keep-agents: needs servers that stay up; run ./start_all_server.sh first")
            session.check_models()
        session.open()
        servers = start_servers(session.config, watch) if starts_servers else None
        reports = ReportProcess()
        return session.play(key, watch, reports.draw, dashboard)
    finally:
        watch.close()
        if reports is not None:
            reports.close()
        if servers is not None:
            servers.stop()
            logger.info(f"stopped the {len(session.config.ports)} agent servers of this run")
        session.close()
        if dashboard is not None:
            dashboard.close()


def start_servers(config: SimulationConfig, watch: "ConsoleProgress") -> "OwnedServers | None":
    """Start agent servers on this host for this run, and return them. Raises Interrupted on a stop signal."""
    from loguru import logger

    from simulation.hosts import local_cluster as local_servers

    def servers_ready(done: int, total: int) -> None:
        watch.progress("agent servers ready", done, total)
        if watch.stop_signal is not None:
            raise Interrupted(watch.stop_signal)

    logger.info(
        f"no agent servers of this cluster run here: starting {config.server_per_host} for participants and "
        f"{config.moderator_per_host} for moderators, for this run"
    )
    started = time.monotonic()
    servers = local_servers.start(config, True, servers_ready, meanwhile=import_what_plays)
    logger.info(f"{len(config.ports)} agent servers are ready [takes {time.monotonic() - started:.2f} s]")
    return servers


def import_what_plays() -> None:
    """Import AgentScope and the modules that play a run."""
    from simulation.rpc.lean_import import import_agentscope

    import_agentscope()
    import simulation.runs.run  # noqa: F401


def none_here(config: SimulationConfig, key: "ClusterKey") -> bool:
    """Return whether localhost is the only host and runs no agent server that this run could use."""
    from simulation.hosts.pid_files import any_port_in_use, check_not_owned

    if config.hosts != ("localhost",):
        return False
    check_not_owned()
    if not any_port_in_use(config.ports):
        return True  # the usual case on a laptop, decided without importing AgentScope
    from simulation.cluster.preflight import shake_hands

    return not shake_hands(config, key)[0]


if __name__ == "__main__":
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # it is closed; the next file opened would get its descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # for lone surrogates from models, or an encoding without a character
        sys.stdout.reconfigure(errors="backslashreplace")
    status = main()
    for stream in (sys.stdout, sys.stderr):  # here, because a failed flush at exit makes Python exit with 120
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)
