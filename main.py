"""The command line: reads settings, starts what is missing, plays, and ends with the status the README lists.

What needs AgentScope is imported inside the functions, so that --help, a mistyped flag and stop answer at once.
"""

import os
import sys

MODULES = ("simulation", "moderator", "participant")  # the program's own, at the top level

if __name__ != "main":  # the program, not a module that a test imports
    # Before any other import: files beside this one and in the current folder, such as random.py, must not stand
    # in for modules of Python and the libraries, or for those that a library tries to import and can do without.
    HERE = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120
    sys.path[:] = [folder for folder in sys.path if folder and os.path.realpath(folder) != HERE]
    from importlib.machinery import ModuleSpec, PathFinder

    class Own:
        """Finds the program's own modules, and nothing else, beside this file."""

        @staticmethod
        def find_spec(name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
            """Return where one of them is."""
            return PathFinder.find_spec(name, [HERE]) if name in MODULES else None

    sys.meta_path.insert(0, Own)

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to clean up: no traceback of an import
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a refused handshake is told by us, in one line
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")  # its own asks DNS for what /etc/hosts tells

import argparse
import contextlib
import io
import re
import time
import types
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from simulation.config import DASHBOARD_PORT, SimulationConfig, flag_of, real_number, whole_number
from simulation.errors import ClusterError, Interrupted, SettingsError, SimulationError, printable

if TYPE_CHECKING:
    from simulation.console import ProgressWatch
    from simulation.local_servers import OwnedServers
    from simulation.security import ClusterKey

ACTIONS = {
    "--status": "show a row per server of this host (roles participant and vllm)",
    "--stop": "stop the servers of this host (roles participant and vllm)",
    "--make-key": "make the cluster key unless there is one, and print its folder (role participant)",
    "--launch": argparse.SUPPRESS,  # what the launcher process is started with
    "--owned": argparse.SUPPRESS,
    "--draw": argparse.SUPPRESS,  # what the process that draws reports is started with
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others, and that takes -1/2 for a number, not a flag."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-[0-9.]")

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (--help lists all flags)")


def make_parser() -> Parser:
    """A flag for every setting, and folders of runs."""
    parser = Parser(prog="main.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    types_of = typing.get_type_hints(SimulationConfig)
    for item in fields(SimulationConfig):
        flag = flag_of(item.name)
        default = " ".join(item.default) if isinstance(item.default, tuple) else item.default
        text = item.metadata["help"] + ("" if default in (None, False) else f" (default: {default})")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        kind = types_of[item.name]
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        if kind is bool:
            options["action"] = "store_true"
        elif kind in (int, float):
            read = whole_number if kind is int else real_number
            options["type"] = lambda text, read=read, flag=flag: read(flag, text)
            options["metavar"] = "N" if kind is int else "X"
        elif item.metadata["choices"]:
            options["metavar"] = "|".join(item.metadata["choices"])
        if item.name == "hosts":
            options |= {"nargs": "+", "metavar": "HOST"}
        elif item.name == "dashboard":
            options |= {"nargs": "?", "const": DASHBOARD_PORT, "metavar": "PORT"}
        parser.add_argument(flag, **options)
    for flag, text in ACTIONS.items():
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs, or of a sweep of runs (role report)")
    return parser


def _parsed(flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings and actions that are given, and folders of runs. Raises SettingsError."""
    known, unknown = make_parser().parse_known_intermixed_args(flags)
    given = vars(known)
    folders: list[str] = given.pop("runs")
    hint = "--help lists all flags" if unknown else "folders of runs go with --role report"
    if given.get("role", SimulationConfig.role) != "report":  # in --colour red the folder is no folder
        unknown = [flag for flag in flags if flag in {*unknown, *folders}]
    if unknown:
        raise SettingsError(f"unrecognized arguments: {' '.join(unknown)} ({hint})")
    return given, folders


def main(arguments: list[str] | None = None) -> int:
    """Run one role; returns the exit status. Every error is one line on standard error."""
    try:
        flags, for_vllm = _split(sys.argv[1:] if arguments is None else arguments)
        given, folders = _parsed(flags)
        actions = {flag[2:] for flag in ACTIONS if given.pop(flag[2:].replace("-", "_"))}
        if "hosts" in given:
            given["hosts"] = tuple(given["hosts"])
        config = SimulationConfig(**given)
        _ask_without_proxy(*config.hosts, config.host_name)
        if actions and config.role not in ("participant", "vllm") and (config.role, actions) != ("report", {"draw"}):
            raise SettingsError(f"--{min(actions)} goes with --role participant or vllm")
        if for_vllm and config.role != "vllm":
            raise SettingsError(f"{for_vllm[0]}: only flags for vLLM may follow --, with --role vllm")
        roles: dict[str, Callable[[], int]] = {
            "main": lambda: play(config, given),
            "participant": lambda: serve(config, actions),
            "ask": lambda: ask(config),
            "report": lambda: draw_reports() if actions else report(config, folders),
            "vllm": lambda: serve_models(config, actions, for_vllm),
        }
        return roles[config.role]()
    except SimulationError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        repair = "./run_simulation.sh --install-only repairs the environment, or makes a new one once .venv is removed"
        print(f"error: {sys.prefix} has no module {error.name}: {repair}", file=sys.stderr)
        return SettingsError.exit_status
    except Exception as error:  # noqa: BLE001 - a defect of ours: one line, and the traceback where it can be found
        from simulation.console import keep_traceback

        where = keep_traceback()
        print(f"error: a defect of the program: {type(error).__name__}: {error}; see {where}", file=sys.stderr)
        return 1


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our flags, and those after --, which are for vLLM."""
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def _ask_without_proxy(*hosts: str) -> None:
    """Keep all requests of this process, and of those that it starts, to these hosts and this one from any proxy."""
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    excepted = ",".join(filter(None, dict.fromkeys([named, *hosts, "localhost", "127.0.0.1", "::1", "[::1]"])))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = excepted


def _give_up(number: int, _frame: types.FrameType | None) -> NoReturn:
    raise Interrupted(number)


def _interruptible() -> None:
    """Raise Interrupted on a signal, so that what was started so far is stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _give_up)


def serve(config: SimulationConfig, actions: set[str]) -> int:
    """Role participant: the agent servers of this host."""
    from simulation import local_servers
    from simulation.security import load_or_make

    if "launch" in actions:
        from simulation import launcher

        launcher.launch(config, "owned" in actions)
    elif "make-key" in actions:
        load_or_make(Path(config.cluster_key_dir))
        print(config.cluster_key_dir)
    elif "stop" in actions:
        stopped = local_servers.stop()
        print(f"stopped {stopped} agent servers" if stopped else "no agent servers were running")
    elif "status" in actions:
        rows, all_answer = local_servers.status(config)
        print("\n".join(rows) if rows else "no agent servers are running")
        return 0 if all_answer else ClusterError.exit_status
    else:
        from simulation.console import ProgressWatch

        _interruptible()
        started = time.monotonic()
        watch = ProgressWatch()
        with contextlib.closing(watch):
            local_servers.start(config, False, lambda done, total: watch.progress("agent servers ready", done, total))
        print(
            f"{config.server_per_host} participant servers and {config.moderator_per_host} moderator servers are "
            f"ready on {config.host_name}, ports {config.ports[0]}-{config.ports[-1]} "
            f"[takes {time.monotonic() - started:.1f} s]"
        )
    return 0


def serve_models(config: SimulationConfig, actions: set[str], for_vllm: list[str]) -> int:
    """Role vllm: the vLLM servers of this host."""
    from simulation import inference

    if "stop" in actions:
        stopped = inference.stop()
        print(f"stopped {stopped} vLLM servers" if stopped else "no vLLM servers were running")
    elif "status" in actions:
        rows, all_healthy = inference.status()
        print("\n".join(rows) if rows else "no vLLM servers are running")
        return 0 if all_healthy else ClusterError.exit_status
    elif config.dry_run:
        print("\n".join(f"port {each.port}: {each.model} on {each.place}" for each in inference.plan(config)))
    else:
        from simulation.console import ProgressWatch

        _interruptible()
        with contextlib.closing(ProgressWatch()) as watch:
            rows = inference.start(
                config, for_vllm, lambda done, total: watch.progress("vLLM servers ready", done, total)
            )
        print("\n".join(rows))
    return 0


def play(config: SimulationConfig, given: dict[str, Any]) -> int:
    """Role main: check everything, start what is missing, play, and leave nothing behind but the results.

    Args:
        config: The settings.
        given: Those that were given by hand, which is what counts where others are read from a file.
    """
    from loguru import logger

    from simulation.console import ProgressWatch, log_to_stderr
    from simulation.report_process import ReportProcess
    from simulation.security import load_or_make
    from simulation.session import session_of

    log_to_stderr()
    session = session_of(config, given)
    if config.dry_run:
        print("\n".join(session.plan()))
        return 0
    key = load_or_make(Path(session.config.cluster_key_dir))
    watch = ProgressWatch()
    watch.listen()
    dashboard = None
    if config.dashboard is not None:  # of this command, not of the run that it resumes
        from simulation.dashboard import Dashboard  # what is not asked for is not imported

        dashboard = Dashboard(config.dashboard, watch)
    servers = reports = None
    try:
        session.open()
        servers = start_missing(session.config, key, watch) if session.needs_servers else None
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


def start_missing(config: SimulationConfig, key: "ClusterKey", watch: "ProgressWatch") -> "OwnedServers | None":
    """Start agent servers here, if this is the only host and none is up; returns them. Raises Interrupted."""
    from loguru import logger

    from simulation import local_servers

    if config.hosts != ("localhost",) or any_of_ours(config, key):
        return None

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
    """Import AgentScope, and what plays a run with it."""
    from simulation.lean_import import import_agentscope

    import_agentscope()
    import simulation.run  # noqa: F401


def any_of_ours(config: SimulationConfig, key: "ClusterKey") -> bool:
    """Whether an agent server that this run could use is up on this host."""
    from simulation.processes import anything_listens, refuse_borrowed

    refuse_borrowed()
    if not anything_listens(config.ports):
        return False  # the usual case on a laptop, told without waiting for AgentScope
    from simulation.readiness import shake_hands

    return bool(shake_hands(config, key)[0])


def ask(config: SimulationConfig) -> int:
    """Role ask: one message to one participant."""
    from simulation.game import Question, announcement_of
    from simulation.lean_import import import_agentscope
    from simulation.past_runs import first_winner, read_agents, read_results, read_summary
    from simulation.security import load

    path = Path(str(config.run_dir))
    played, summary = read_summary(path)
    participant = first_winner(path, summary) if config.winner else config.participant
    if participant >= played.participant_num:
        raise SettingsError(f"--participant {participant}: the run has participants 0 to {played.participant_num - 1}")
    given = config.cluster_key_dir != SimulationConfig().cluster_key_dir
    key = load(Path(config.cluster_key_dir if given else played.cluster_key_dir))
    import_agentscope()
    from simulation.rounds import ask as ask_participant

    told = tuple(announcement_of(each, 10**played.decimals) for each in read_results(path, played, summary))
    question = Question(0, str(config.text), played.max_value, told, played.decimals)
    server, oid = read_agents(path, participant)
    said = ask_participant(server, oid, key, question)
    print("\n".join(map(printable, said.splitlines())))  # a model may say anything
    return 0


def draw_reports() -> int:
    """Role report, for a run that plays: draw the reports that main asks for."""
    from simulation.report_process import serve

    serve()
    return 0


def report(config: SimulationConfig, folders: list[str]) -> int:
    """Role report: what one run came to, or several runs beside each other, from their folders alone."""
    from simulation.comparison import common_folder, comparison_lines, run_folders, write_comparison
    from simulation.console import say
    from simulation.past_runs import read_run
    from simulation.report import run_lines
    from simulation.report_page import draw_all

    named = [Path(folder) for folder in folders or filter(None, [config.run_dir])]
    if not named:
        raise SettingsError("--role report: give --run-dir, the folder of a finished run, or several folders")
    paths = run_folders(named)
    if paths == named[:1]:
        if folders and config.run_dir is not None:
            raise SettingsError(f"--run-dir {config.run_dir}: where several runs are compared; {paths[0]} is one")
        run = read_run(paths[0])
        say("\n".join(run_lines(run)))
        draw_all(run)
        return 0
    folder = Path(config.run_dir) if folders and config.run_dir is not None else common_folder(paths)
    runs = [read_run(path) for path in paths]
    say("\n".join(comparison_lines(runs)))
    write_comparison(folder, runs)
    say(f"compared in {folder / 'comparison.html'}")
    return 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # half a character, which models do say, or one the terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
