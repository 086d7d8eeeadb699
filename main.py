"""The entry point of all roles. The role `main` plays the game, on temporary servers if none are running.

README.md lists the exit statuses. simulation/playing.py starts servers and plays the runs; the loop over the rounds of
a run is in simulation/runs/run.py. Modules that need AgentScope are imported inside functions, so that --help, usage
errors and --stop respond at once.
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

from simulation.cli import OTHER_ROLES, Command, describe_damage, exclude_from_proxy, parse
from simulation.errors import SettingsError, SimulationError, say
from simulation.rpc.lean_import import import_pyarrow

WITH_RESULTS = ("main", "ask", "report", "control", "verify")  # roles that write or read run folders


def main(arguments: list[str] | None = None) -> int:
    """Run the role that `arguments` select (default: sys.argv). Print an error as one line. Return the exit status."""
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        if command is None:  # a help page was printed
            return 0
        exclude_from_proxy(*command.config.hosts, command.config.host_name)
        if command.config.role in WITH_RESULTS:
            import_pyarrow()
        return {**OTHER_ROLES, "main": play}[command.config.role](command)
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
    """Play the runs that the flags describe, or print what they would play. Return the exit status."""
    from simulation import playing
    from simulation.runs.console import ConsoleProgress, log_to_stderr, on_stop_signals

    config = command.config
    log_to_stderr(config.quiet)
    if config.dry_run:
        say(playing.plan(config, command.given))
        return 0
    console = ConsoleProgress(config.quiet, config.json)
    _, status = playing.play(config, command.given, console, ready=lambda: on_stop_signals(console.signalled))
    return status


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
