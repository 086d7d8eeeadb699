"""The command line: flags of each role, and the roles other than playing. Imports of AgentScope are in functions."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import shutil
import signal
import sys
import time
import types
import typing
from dataclasses import Field, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from simulation.errors import ClusterError, Interrupted, SettingsError, meant_by, printable, say
from simulation.files import ROOT, full_path, shown
from simulation.settings import (
    DASHBOARD_PORT,
    GROUPS,
    PATHS,
    ROLES,
    SimulationConfig,
    as_written,
    check,
    flag_of,
    real_number,
    whole_number,
)


@dataclass(frozen=True)
class Action:
    """An alternative to a role's normal work, such as --status or --stop.

    Attributes:
        help: Help text of its flag.
        roles: The roles that support it.
        settings: The role's settings that it uses (default: none); None means all.
    """

    help: str
    roles: tuple[str, ...]
    settings: tuple[str, ...] | None = ()


ACTIONS = {
    "status": Action(
        "show a row per server of this host",
        ("participant", "vllm"),
        ("host_name", "cluster_key_dir", "connect_timeout"),
    ),
    "stop": Action("stop the servers of this host", ("participant", "vllm")),
    "print_gpu_count": Action(argparse.SUPPRESS, ("vllm",)),  # for start_vllm.sh; --gpus stays an error
    "make_key": Action(
        "make the cluster key unless there is one, and print its folder", ("participant",), ("cluster_key_dir",)
    ),
    # internal: flags that start the launcher process and the report process
    "launch": Action(argparse.SUPPRESS, ("participant",), None),
    "draw_for_main": Action(argparse.SUPPRESS, ("report",)),
}


HELP_WIDTH = 100  # columns; fewer on a narrower terminal


ROLE_HELP = {
    "main": "Play the game",
    "participant": "Start, stop or show the agent servers of this host",
    "ask": "Ask one participant of a run that kept its agents",
    "report": "Show a finished run again, or compare several",
    "vllm": "Start, stop or show the vLLM servers of this host",
}


USAGES = {
    "main": "main.py [flags]",
    "participant": "main.py --role participant [--status | --stop | --make-key] [flags]",
    "ask": "main.py --role ask --run-dir RUN (--participant N | --winner) --text TEXT",
    "report": "main.py --role report [RUN ...] [--run-dir DIR]",
    "vllm": "main.py --role vllm [--status | --stop] [flags] [-- flags for vLLM]",
}


EPILOG = f"Each role has its own flags: main.py --role {'|'.join(ROLES)} --help lists them."


HELP_OF_HELP = "show this, or with --role the flags of another role (default: off)"


VERY_LIKE = 0.8  # similarity from which a flag of the same role is preferred to another role's


DASHES = tuple("-–—−")  # word processors turn the first into the others


class Parser(argparse.ArgumentParser):
    """An argument parser that raises SettingsError with one line, and parses -1/2 as a number, not a flag."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-[0-9.]")

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (--help lists all flags)")


def make_parser(role: str | None = None) -> Parser:
    """Return a parser for one role, with grouped flags and a help page; or for all roles (None), to parse with."""
    about = {"description": f"{ROLE_HELP[role]}.", "usage": USAGES[role], "epilog": EPILOG} if role is not None else {}
    parser = Parser(prog="main.py", allow_abbrev=False, add_help=False, formatter_class=_formatter, **about)
    group = parser.add_argument_group("what to do")
    for item in fields(SimulationConfig):
        group = parser.add_argument_group(GROUPS[item.name]) if item.name in GROUPS else group
        if role is None or role in item.metadata["roles"]:
            group.add_argument(flag_of(item.name), **_options_of(item))
        if item.name == "role":
            for name, action in ACTIONS.items():
                if role is None or role in action.roles:
                    hidden = action.help == argparse.SUPPRESS
                    text = action.help if hidden else f"{action.help} (default: off)"
                    group.add_argument(flag_of(name), action="store_true", default=argparse.SUPPRESS, help=text)
            if role is not None:  # otherwise -hosts would be parsed as -h
                group.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS, help=HELP_OF_HELP)
    parser.add_argument("--owned", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    runs = "folders of runs, or of experiments (default: that of --run-dir)"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=runs if role == "report" else argparse.SUPPRESS)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size((HELP_WIDTH, 0)).columns, HELP_WIDTH)
    return argparse.HelpFormatter(prog, max_help_position=min(30, width // 2), width=width)


def _options_of(item: Field[Any]) -> dict[str, Any]:
    """Return the `add_argument` options of a setting."""
    flag, kind = flag_of(item.name), typing.get_type_hints(SimulationConfig)[item.name]
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_of(item).replace("%", "%%")}
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if kind is bool:
        options["action"] = "store_true"
    elif kind in (int, float):
        read = whole_number if kind is int else real_number
        options["type"] = lambda text: read(flag, text)
        options["metavar"] = "N" if kind is int else "X"
    else:
        options["metavar"] = "|".join(item.metadata["choices"]) or item.name.rpartition("_")[2].upper()
    if item.name == "hosts":
        options |= {"nargs": "+", "metavar": "HOST"}
    elif item.name == "dashboard":
        options |= {"nargs": "?", "const": DASHBOARD_PORT, "metavar": "PORT"}
    return options


def help_of(item: Field[Any]) -> str:
    """Return the help text of a setting: its description, range and default."""
    default, low = item.default, item.metadata["low"]
    if item.metadata["without"]:
        default = item.metadata["without"]
    elif isinstance(default, bool):
        default = "on" if default else "off"
    elif isinstance(default, tuple):
        default = " ".join(default)
    elif isinstance(default, int | float):
        default = as_written(default)
    elif str(default).startswith(f"{ROOT}/"):
        default = str(default).removeprefix(f"{ROOT}/")
    bounds = f"; from {as_written(low)} to {as_written(item.metadata['high'])}" if low is not None else ""
    return f"{item.metadata['help']}{bounds} (default: {default})"


def parse_flags(flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the given settings and actions, and the run folders. Raises SettingsError.

    Unknown flags are errors here; `check_used` rejects flags the role or action does not use. No flag is ignored.
    """
    if len(roles := list(dict.fromkeys(roles_in(flags)))) > 1:
        raise SettingsError(f"--role {' and --role '.join(roles)}: do not go together; give one of them")
    known, unknown = make_parser().parse_known_intermixed_args(flags)
    given = vars(known)
    for name, value in given.items():
        if name not in (*PATHS, "model_path", "extra_pythonpath", "runs") and isinstance(value, str | list):
            given[name] = _in_utf8(value) if isinstance(value, str) else list(map(_in_utf8, value))
    folders: list[str] = given.pop("runs")
    role = given.get("role", SimulationConfig.role)
    unknown += [folder for folder in folders if folder.startswith(DASHES)]
    if unknown:
        if role != "report":  # in --colour red, "red" is not a run folder
            unknown = [flag for flag in flags if flag in {*unknown, *folders}]
        _refuse_flags(unknown, role)
    return given, folders


def _refuse_flags(unknown: list[str], role: str) -> NoReturn:
    """Raise SettingsError with a suggestion for the first unknown flag: a flag of the role, or else of another role."""
    flag = next((word for word in unknown if word.startswith(DASHES)), unknown[0]).partition("=")[0]
    guess = meant_by(flag, flags_of(role), VERY_LIKE) or meant_by(
        flag, [each for other in ROLES for each in flags_of(other)]
    )
    hint = f"{guess} " * bool(guess) + "--help lists all flags"
    raise SettingsError(f"unrecognized arguments: {' '.join(unknown)} ({hint})")


def flags_of(role: str) -> list[str]:
    """Return the visible flags of a role."""
    settings = [item.name for item in fields(SimulationConfig) if role in item.metadata["roles"]]
    actions = [name for name, each in ACTIONS.items() if role in each.roles and each.help != argparse.SUPPRESS]
    return [*map(flag_of, settings + actions), "--help"]


def check_used(role: str, actions: list[str], given: dict[str, Any]) -> None:
    """Raise SettingsError if a flag is given that the role, or its action, does not use.

    Args:
        role: The role as given; it may be invalid.
        actions: The given actions.
        given: The given settings.
    """
    settings = {item.name: item.metadata for item in fields(SimulationConfig)}
    check("--role", role, settings["role"])
    roles_of = {name: ACTIONS[name].roles for name in actions}
    roles_of |= {name: settings[name]["roles"] for name in settings if name in given}
    for name, roles in roles_of.items():
        if role not in roles:
            raise SettingsError(f"{flag_of(name)}: goes with --role {' or '.join(roles)}, not with --role {role}")
    if len(actions) > 1:
        raise SettingsError(f"{' and '.join(map(flag_of, actions))}: do not go together; give one of them")
    used = ACTIONS[actions[0]].settings if actions else None
    for name in given:
        if used is not None and name not in ("role", *used):
            raise SettingsError(f"{flag_of(name)}: does not go with {flag_of(actions[0])}")


def _in_utf8(text: str) -> str:
    """Return a command-line argument decoded as UTF-8, whatever the locale; unchanged if it is not UTF-8."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text


def describe_damage(error: ImportError) -> str:
    """Return an error text for a damaged environment; if it is .venv, make the next script reinstall it."""
    for stamp in Path(sys.prefix).glob("installed-*") if Path(sys.prefix) == ROOT / ".venv" else ():
        with contextlib.suppress(OSError):
            stamp.unlink()
    what = f"has no module {error.name}" if isinstance(error, ModuleNotFoundError) else f"is damaged: {error}"
    repair = "./run_simulation.sh --install-only repairs the environment, or makes a new one once .venv is removed"
    return f"{sys.prefix} {what}: {repair}"


def needs_model_count(config: SimulationConfig) -> bool:
    """Return whether to count the models, which requires a GPU query; a resumed run has the count in its settings."""
    may_ask = config.agent_type == "llm" or config.experiment is not None
    return config.role == "participant" or (config.role == "main" and may_ask and config.resume is None)


def roles_in(flags: list[str]) -> list[str]:
    """Return the roles given by --role, even if other flags are invalid."""
    words = itertools.pairwise([*flags, ""])
    return [after if word == "--role" else word[7:] for word, after in words if f"{word}=".startswith("--role=")]


def split_vllm_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into our flags and, after --, the flags for vLLM."""
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def exclude_from_proxy(*hosts: str) -> None:
    """Bypass proxies for requests to these hosts and localhost, in this process and its children.

    Raises SettingsError if the file named by SSLKEYLOGFILE cannot be written.
    """
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    excepted = ",".join(filter(None, dict.fromkeys([named, *hosts, "localhost", "127.0.0.1", "::1", "[::1]"])))
    if named == "*":  # means all hosts only if it is the whole value
        excepted = named
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = excepted
    keys = os.environ.get("SSLKEYLOGFILE")
    if keys:  # the TLS library opens this file even if nothing is encrypted
        try:
            Path(keys).open("a", encoding="utf-8").close()
        except OSError as error:
            raise SettingsError(f"SSLKEYLOGFILE={keys}: cannot be written: {error.strerror}; unset it") from None


def _raise_interrupted(number: int, _frame: types.FrameType | None) -> NoReturn:
    raise Interrupted(number)


def raise_on_signals() -> None:
    """Make TERM, HUP and INT raise Interrupted, so that processes started so far are stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores HUP
            signal.signal(number, _raise_interrupted)


def serve(config: SimulationConfig, action: str | None, owned: bool) -> int:
    """Run role participant: start, stop or show the agent servers of this host. Return the exit status."""
    from simulation.hosts import local_cluster as local_servers
    from simulation.rpc.cluster_key import load_or_make

    if action == "launch":
        from simulation.hosts import launcher

        launcher.launch(config, owned)
    elif action == "make_key":
        load_or_make(Path(config.cluster_key_dir))
        sys.stdout.buffer.write(os.fsencode(config.cluster_key_dir) + b"\n")  # for scripts, whatever bytes it has
    elif action == "stop":
        stopped = local_servers.stop()
        say(f"stopped {stopped} agent servers" if stopped else "no agent servers were running")
    elif action == "status":
        from simulation.results.tables import table_lines

        rows, all_answer = local_servers.status(config)
        dropped = ("up since", "restarts", "pid", "memory", "agents")
        table = table_lines(local_servers.STATUS, rows, dropped, left=("role", "up since"))
        say("\n".join(table) if rows else "no agent servers are running")
        return 0 if all_answer else ClusterError.exit_status
    else:
        from simulation.runs.console import ConsoleProgress

        raise_on_signals()
        started = time.monotonic()
        watch = ConsoleProgress()
        with contextlib.closing(watch):
            local_servers.start(config, False, lambda done, total: watch.progress("agent servers ready", done, total))
        say(
            f"{config.server_per_host} participant servers and {config.moderator_per_host} moderator servers are "
            f"ready on {config.host_name}, ports {config.ports[0]}-{config.ports[-1]} "
            f"[takes {time.monotonic() - started:.1f} s]"
        )
    return 0


def serve_models(config: SimulationConfig, action: str | None, for_vllm: list[str]) -> int:
    """Run role vllm: start, stop or show the vLLM servers of this host. Return the exit status."""
    from simulation.hosts import vllm_servers as inference

    if action == "stop":
        stopped = inference.stop()
        say(f"stopped {stopped} vLLM servers" if stopped else "no vLLM servers were running")
    elif action == "print_gpu_count":
        say(str(len(inference.gpus_here())))
    elif action == "status":
        from simulation.results.tables import table_lines

        rows, all_healthy = inference.status()
        table = table_lines(inference.STATUS, rows, ("pid",), left=("state",))
        say("\n".join(table) if rows else "no vLLM servers are running")
        return 0 if all_healthy else ClusterError.exit_status
    elif config.dry_run:
        say("\n".join(f"port {each.port}: {each.model} on {each.place}" for each in inference.plan(config, for_vllm)))
    else:
        from simulation.results.tables import table_lines
        from simulation.runs.console import ConsoleProgress

        raise_on_signals()
        with contextlib.closing(ConsoleProgress()) as watch:
            rows = inference.start(config, for_vllm, partial(watch.progress, "vLLM servers ready"))
        say("\n".join(table_lines(inference.STARTED, rows, ("pid", "on", "ready after"), left=("on", "model"))))
    return 0


def ask(config: SimulationConfig) -> int:
    """Run role ask: send one message to one participant and print its answer. Return the exit status."""
    from simulation.game.rules import Question
    from simulation.game.tally import announcement_of
    from simulation.results.reader import first_winner, read_agents, read_results, read_summary
    from simulation.rpc.cluster_key import load
    from simulation.rpc.lean_import import import_agentscope

    path = Path(shown(str(config.run_dir)))
    played, summary = read_summary(path)
    participant = config.participant if config.participant is not None else first_winner(path, summary)
    if participant >= played.participant_num:
        raise SettingsError(f"--participant {participant}: the run has participants 0 to {played.participant_num - 1}")
    given = config.cluster_key_dir != SimulationConfig().cluster_key_dir
    key = load(Path(config.cluster_key_dir if given else played.cluster_key_dir))
    import_agentscope()
    from simulation.cluster.rounds import ask as ask_participant

    announcements = tuple(announcement_of(each, 10**played.decimals) for each in read_results(path, played, summary))
    question = Question(0, str(config.text), played.max_value, announcements, played.decimals)
    server, oid = read_agents(path, participant)
    said = ask_participant(server, oid, key, question)
    say("\n".join(map(printable, said.splitlines())))  # a model may return any characters
    return 0


def draw_reports() -> int:
    """Draw the reports that main requests, in the report process of a run."""
    from simulation.results.report_process import serve

    serve()
    return 0


def report(config: SimulationConfig, folders: list[str]) -> int:
    """Run role report: show one run, or compare several, from their folders alone. Return the exit status."""
    from simulation.results.comparison import (
        common_folder,
        comparison_lines,
        run_folders,
        unfinished_lines,
        write_comparison,
    )
    from simulation.results.console_report import run_lines
    from simulation.results.reader import read_run
    from simulation.results.report_page import draw_all

    given = [full_path("RUN", folder) for folder in folders] or list(filter(None, [config.run_dir]))
    named = [Path(shown(folder)) for folder in given]
    if not named:
        raise SettingsError("--role report: give --run-dir, the folder of a finished run, or several folders")
    paths = run_folders(named)
    if paths == named[:1]:
        if folders and config.run_dir is not None:
            raise SettingsError(
                f"--run-dir {shown(config.run_dir)}: where several runs are compared; {paths[0]} is one"
            )
        run = read_run(paths[0])
        say("\n".join(run_lines(run)))
        draw_all(run)
        return 0
    folder = Path(shown(config.run_dir)) if folders and config.run_dir is not None else common_folder(paths)
    runs = [read_run(path) for path in paths]
    say("\n".join([*comparison_lines(runs), *unfinished_lines(named, runs)]))
    write_comparison(folder, runs)
    say(f"compared in {folder / 'comparison.html'}")
    return 0
