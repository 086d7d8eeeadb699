"""The entry point of all roles. The role `main` plays the game, on temporary servers if none are running.

README.md lists the exit statuses. The loop over the rounds of a run is in simulation/runs/run.py. Modules that need
AgentScope are imported inside functions, so that --help, usage errors and --stop respond at once.
"""

import os
import sys

MODULES = ("simulation", "games", "moderator", "participant")  # the program's own top-level modules

if __name__ != "main":  # run as a program, not imported by a test
    # Before any other import, remove this folder and the working directory from the import path. A file there, such as
    # random.py, must not shadow a module of Python or of a library, or an optional module that a library imports.
    HERE = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120
    sys.path[:] = [folder for folder in sys.path if folder and os.path.realpath(folder) != HERE]
    from importlib.machinery import ModuleSpec, PathFinder
    from types import SimpleNamespace

    def find_own(name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        """Return the import spec of the module `name` in this folder if `name` is in MODULES; otherwise None."""
        return PathFinder.find_spec(name, [HERE]) if name in MODULES else None

    sys.meta_path.insert(0, SimpleNamespace(find_spec=find_own))

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until something needs cleanup, Ctrl-C exits without a traceback
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the program itself reports a refused handshake, in one line
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")  # gRPC's own resolver queries DNS even for names in /etc/hosts
OF_OTHER_PROGRAMS = ("LOGURU_", "MPLBACKEND", "PROTOCOL_BUFFERS_PYTHON_", "SSLKEYLOGFILE")  # may make libraries fail
for name in [name for name in os.environ if name.startswith(OF_OTHER_PROGRAMS)]:
    del os.environ[name]

import io
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from simulation.cli import OTHER_ROLES, Command, describe_damage, exclude_from_proxy, parse
from simulation.errors import Interrupted, SettingsError, SimulationError, say
from simulation.files import shown
from simulation.settings import SimulationConfig

if TYPE_CHECKING:
    from simulation.monitoring.control import Control
    from simulation.runs.console import ConsoleProgress
    from simulation.runs.run import Run
    from simulation.runs.session import Observe


def main(arguments: list[str] | None = None) -> int:
    """Run the role that `arguments` select (default: sys.argv). Print an error as one line. Return the exit status."""
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        if command is None:  # a help page was printed
            return 0
        exclude_from_proxy(*command.config.hosts, command.config.host_name)
        return {**OTHER_ROLES, "main": play, "verify": verify}[command.config.role](command)
    except SimulationError as error:
        say(f"error: {error}", sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:  # noqa: BLE001 - a defect of this program; the traceback is written to a file
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in MODULES:
            say(f"error: {describe_damage(error)}", sys.stderr)
            return SettingsError.exit_status
        from simulation.runs.console import keep_traceback

        say(f"error: a defect of the program: {type(error).__name__}: {error}; see {keep_traceback()}", sys.stderr)
        return 1


def play(command: Command) -> int:
    """Check the settings, start servers if none are running, play, and clean up. Return the exit status."""
    from simulation.cluster.preflight import check_models_here
    from simulation.monitoring.control import Control
    from simulation.rpc.channels import install_tls
    from simulation.rpc.cluster_key import load, load_or_make
    from simulation.runs.console import ConsoleProgress, log_to_stderr, on_stop_signals
    from simulation.runs.session import session_of

    log_to_stderr(command.config.quiet)
    with ExitStack() as cleanup:
        session = session_of(command.config, command.given, cleanup)
        if command.config.dry_run:
            say("\n".join(session.plan_lines()))
            return 0
        folder = session.config.cluster_key_dir
        # If only the resumed run names this key folder, make no key in it: a new key would not match its servers
        named = folder in (command.config.cluster_key_dir, SimulationConfig.cluster_key_dir)
        install_tls((load_or_make if named else load)(Path(folder)))
        progress = ConsoleProgress(command.config.quiet, command.config.json)
        on_stop_signals(progress.signalled)
        control = cleanup.enter_context(closing(Control(progress)))
        observe = observers_of(command.config, control, cleanup)  # of this command, not of the resumed run
        cleanup.callback(session.close)
        cleanup.callback(progress.close)
        needs_servers = bool(session.unfinished) and has_no_servers(session.config)
        if needs_servers and "keep_agents" in command.given:
            raise SettingsError("--keep-agents: needs servers that stay up; run ./start_all_server.sh first")
        if needs_servers:
            games = [(spec.game, spec.asked_models) for spec in session.unfinished if not spec.config.offline]
            check_models_here(games, session.config.connect_timeout)
        session.open()
        cleanup.enter_context(control.announce(session.folder))
        if needs_servers:
            start_servers(session.config, progress, cleanup)
        cleanup.callback(progress.close)  # called before all other cleanup, to remove the progress bar
        return session.play_runs(progress, observe)


def observers_of(config: SimulationConfig, control: "Control", cleanup: ExitStack) -> "Observe":
    """Start what observes runs. Return a function that returns a context in which all of it observes a run."""
    observers: list[Observe] = [control.observe]
    if config.dashboard is not None:
        from simulation.monitoring.dashboard import Dashboard

        observers.append(cleanup.enter_context(closing(Dashboard(config.dashboard, control))).observe)
    if config.metrics is not None:
        from simulation.monitoring.metrics import Metrics

        observers.append(cleanup.enter_context(closing(Metrics(config.metrics, control.console))).observe)
    if config.hook is not None:
        from simulation.monitoring.hooks import HookCaller, load_hook

        observers.append(HookCaller(load_hook(config.hook)).observe)

    @contextmanager
    def observe(run: "Run") -> Iterator[None]:
        with ExitStack() as stack:
            for each in observers:
                stack.enter_context(each(run))
            yield

    return observe


def verify(command: Command) -> int:
    """Ask each round of a saved run again, on temporary servers if none are running. Return the exit status."""
    from simulation.cluster.preflight import check_models_here
    from simulation.rpc.channels import install_tls
    from simulation.rpc.cluster_key import load_or_make
    from simulation.rpc.lean_import import import_agentscope
    from simulation.runs.console import ConsoleProgress, log_to_stderr, on_stop_signals
    from simulation.runs.run_spec import resumed_run

    log_to_stderr()
    if len(command.runs) != 1:
        raise SettingsError("--role verify: give the folder of one run")
    given = {**command.given, "role": "main", "replay": None, "offline": False}
    spec = resumed_run(Path(shown(command.runs[0])), given, flag="--role verify ")
    install_tls(load_or_make(Path(spec.config.cluster_key_dir)))
    with ExitStack() as cleanup:
        progress = cleanup.enter_context(closing(ConsoleProgress()))
        on_stop_signals(progress.signalled)
        if has_no_servers(spec.config):
            check_models_here([(spec.game, spec.asked_models)], spec.config.connect_timeout)
            start_servers(spec.config, progress, cleanup)
        import_agentscope()
        from simulation.runs.verify import verify as ask_again

        return ask_again(spec, progress)


def has_no_servers(config: SimulationConfig) -> bool:
    """Return whether the only host is localhost and has no servers. Raises ClusterError if another run owns servers."""
    from simulation.hosts.pid_files import any_port_in_use, check_not_owned

    if config.hosts != ("localhost",):
        return False
    check_not_owned()
    if not any_port_in_use(config.ports):
        return True  # the usual case on a laptop, decided without importing AgentScope
    from simulation.cluster.preflight import identify_all

    return not identify_all(config)[0]


def start_servers(config: SimulationConfig, progress: "ConsoleProgress", cleanup: ExitStack) -> None:
    """Start agent servers on this host, and stop them when `cleanup` exits. Raises Interrupted on a stop signal."""
    from loguru import logger

    from simulation.hosts import local_cluster

    def show_ready(done: int, total: int) -> None:
        progress.progress("agent servers ready", done, total)
        if progress.stop_signal is not None:
            raise Interrupted(progress.stop_signal)

    def import_meanwhile() -> None:
        from simulation.rpc.lean_import import import_agentscope

        import_agentscope()
        import simulation.runs.run  # noqa: F401

    logger.info(
        f"no agent servers of this cluster run here: starting {config.server_per_host} for participants and "
        f"{config.moderator_per_host} for moderators, for this run"
    )
    started = time.monotonic()
    stop = local_cluster.start(config, True, show_ready, import_meanwhile)
    if stop is not None:
        cleanup.callback(logger.info, f"stopped the {len(config.ports)} agent servers of this run")
        cleanup.callback(stop)
    logger.info(f"{len(config.ports)} agent servers are ready [takes {time.monotonic() - started:.2f} s]")


if __name__ == "__main__":
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # this stream is closed; the next opened file would get its descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a model may return text that cannot be encoded
        sys.stdout.reconfigure(errors="backslashreplace")
    status = main()
    for stream in (sys.stdout, sys.stderr):  # if a flush failed at exit, Python would exit with status 120
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)
