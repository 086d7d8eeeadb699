"""The command line: the flags of all roles, and the work of all roles except main. Only functions import AgentScope."""

import argparse
import contextlib
import itertools
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from simulation.errors import ClusterError, Interrupted, SettingsError, meant_by, printable, say
from simulation.files import ROOT, full_path, shown
from simulation.settings import DASHBOARD_PORT, KINDS, ROLES, SETTINGS, Setting, SimulationConfig, flag_of, to_number

HELP_WIDTH = 100  # maximum number of columns
VERY_LIKE = 0.8  # a flag of the same role that is at least so similar is preferred to other roles' flags
DASHES = tuple("-–—−")  # word processors replace the first by one of the others
USAGES = {
    "main": "main.py [flags]",
    "participant": "main.py --role participant [--status | --stop | --make-key] [flags]",
    "ask": "main.py --role ask --run-dir RUN (--participant N | --winner) --text TEXT",
    "report": "main.py --role report [RUN ...] [--run-dir DIR]",
    "vllm": "main.py --role vllm [--status | --stop] [flags] [-- flags for vLLM]",
}
EPILOG = f"Each role has its own flags: main.py --role {'|'.join(ROLES)} --help lists them."
ACTIONS = {  # flags that replace the usual work of a role; flags without a help text are internal
    "status": Setting(False, "show the servers of this host", roles=("participant", "vllm")),
    "stop": Setting(False, "stop the servers of this host", roles=("participant", "vllm")),
    "make_key": Setting(False, "make the cluster key unless it exists, and print its folder", roles=("participant",)),
    "print_gpu_count": Setting(False, "", roles=("vllm",)),  # for start_vllm.sh
    "launch": Setting(False, "", roles=("participant",)),  # this process becomes the launcher
    "draw_for_main": Setting(False, "", roles=("report",)),  # this process becomes the report process
}
USED_BY = {  # the settings that each action uses
    "status": ("host_name", "cluster_key_dir", "connect_timeout"),
    "make_key": ("cluster_key_dir",),
    "launch": ("owned", *SETTINGS),
}
HELP = Setting(False, "show this page, or with --role that of another role", roles=tuple(ROLES))
OWNED = Setting(False, "", roles=("participant",))  # like --launch, but stops at the end of standard input
FLAGS = {"help": HELP, **ACTIONS, "owned": OWNED, **SETTINGS}


class Command(NamedTuple):
    """A parsed command line.

    `given` contains the settings that flags have set. `action` is a name in ACTIONS, or "owned". `runs` are the run
    folders, and `for_vllm` are the flags after `--`.
    """

    config: SimulationConfig
    given: dict[str, Any]
    action: str | None
    runs: list[str]
    for_vllm: list[str]


def make_parser(role: str | None = None) -> argparse.ArgumentParser:
    """Return a parser for the flags of all roles. If `role` is given, include only the flags of this role."""
    about: dict[str, Any] = {}
    if role is not None:
        about = {"description": f"Role {role}: {ROLES[role]}.", "usage": USAGES[role], "epilog": EPILOG}
    width = min(shutil.get_terminal_size((HELP_WIDTH, 0)).columns, HELP_WIDTH)
    layout = partial(argparse.HelpFormatter, max_help_position=30, width=width)
    parser = argparse.ArgumentParser(
        **about, formatter_class=layout, allow_abbrev=False, add_help=False, exit_on_error=False
    )
    parser._negative_number_matcher = re.compile(r"-[0-9.]")  # -1/2 is a number, not a flag
    group = parser.add_argument_group("what to do")
    for name, flag in FLAGS.items():
        group = parser.add_argument_group(flag.group) if flag.group else group
        if role in (None, *flag.roles):
            text = flag.help if flag.about else argparse.SUPPRESS
            group.add_argument(flag_of(name), help=text, default=argparse.SUPPRESS, **_options_of(name))
    runs = "folders of runs or experiments (default: that of --run-dir)" if role == "report" else argparse.SUPPRESS
    parser.add_argument("runs", nargs="*", metavar="RUN", help=runs)
    return parser


def _options_of(name: str) -> dict[str, Any]:
    """Return the keyword arguments of `add_argument` that depend on the type of a flag."""
    flag, kind = FLAGS[name], KINDS.get(name, (bool,))[0]
    if kind is bool:
        return {"action": "store_true"}
    options: dict[str, Any]
    if kind in (int, float):
        options = {"type": partial(to_number, kind, flag_of(name)), "metavar": "N" if kind is int else "X"}
    else:
        is_path = flag.path or name in ("model_path", "extra_pythonpath")
        metavar = "|".join(flag.choices) or name.rpartition("_")[2].upper()
        options = {"type": str if is_path else _in_utf8, "metavar": metavar}
    if name == "hosts":
        options |= {"nargs": "+", "metavar": "HOST"}
    elif name == "dashboard":
        options |= {"nargs": "?", "metavar": "PORT", "const": DASHBOARD_PORT}
    return options


def _in_utf8(text: str) -> str:
    """Decode a command-line argument as UTF-8, independently of the locale. Return other arguments unchanged."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text


def parse(arguments: list[str]) -> Command | None:
    """Parse and check the command line. For --help, print the help page and return None.

    Raises SettingsError if an argument is invalid or has no effect.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags, for_vllm = arguments[:end], arguments[end + 1 :]
    words = itertools.pairwise([*flags, ""])  # without the parser: other flags may be invalid
    roles = [after if word == "--role" else word[7:] for word, after in words if f"{word}=".startswith("--role=")]
    *others, role = list(dict.fromkeys(roles)) or [SimulationConfig.role]
    SETTINGS["role"].check("--role", role)
    if {"-h", "--help"} & {*flags}:
        say(make_parser(role).format_help().rstrip("\n"))
        return None
    if others:
        raise SettingsError(f"--role {' and --role '.join([*others, role])}: do not go together; give one of them")
    given, runs = parse_flags(flags, role)
    action = _check_used(role, given)
    if runs and (role != "report" or action is not None):
        raise SettingsError(f"unrecognized arguments: {' '.join(runs)} (folders of runs go with --role report)")
    if for_vllm and (role != "vllm" or action is not None):
        raise SettingsError(f"{for_vllm[0]}: only flags for vLLM may follow --, where --role vllm starts servers")
    config = SimulationConfig(**given)
    may_ask = role == "main" and (config.agent_type == "llm" or config.experiment is not None)
    asks = role == "participant" or (may_ask and config.resume is None)  # a resumed run has saved this number
    if action is None and asks and "model_per_host" not in given:
        from simulation.hosts.vllm_servers import servers_per_host

        given["model_per_host"] = servers_per_host(config)
    return Command(SimulationConfig(**given), given, action, runs, for_vllm)


def parse_flags(flags: list[str], role: str) -> tuple[dict[str, Any], list[str]]:
    """Return the values of all flags, of any role, and the run folders. Raises SettingsError if a flag is invalid."""
    try:
        known, unknown = make_parser().parse_known_intermixed_args(flags)
    except argparse.ArgumentError as error:
        raise SettingsError(f"{error} (--help lists all flags)") from None
    given = vars(known)
    if "hosts" in given:
        given["hosts"] = tuple(given["hosts"])
    runs: list[str] = given.pop("runs")
    unknown += [folder for folder in runs if folder.startswith(DASHES)]
    if unknown:
        if role != "report":  # in --colour red, "red" is not a run folder
            unknown = [flag for flag in flags if flag in {*unknown, *runs}]
        flag = next((word for word in unknown if word.startswith(DASHES)), unknown[0]).partition("=")[0]
        every = [each for other in ROLES for each in flags_of(other)]
        guess = meant_by(flag, flags_of(role), VERY_LIKE) or meant_by(flag, every)
        hint = f"{guess} --help lists all flags".lstrip()
        raise SettingsError(f"unrecognized arguments: {' '.join(unknown)} ({hint})")
    return given, runs


def flags_of(role: str) -> list[str]:
    """Return the flags that the help page of a role shows."""
    return [flag_of(name) for name, flag in FLAGS.items() if role in flag.roles and flag.about]


def _check_used(role: str, given: dict[str, Any]) -> str | None:
    """Remove the action from `given`, and return the action. Raises SettingsError if a flag has no effect."""
    for name in given:
        if role not in (roles := FLAGS[name].roles):
            raise SettingsError(f"{flag_of(name)}: goes with --role {' or '.join(roles)}, not with --role {role}")
    actions = [name for name in ACTIONS if given.pop(name, False)]
    if len(actions) > 1:
        raise SettingsError(f"{' and '.join(map(flag_of, actions))}: do not go together; give one of them")
    for action in actions:
        if unused := [name for name in given if name not in ("role", *USED_BY.get(action, ()))]:
            raise SettingsError(f"{flag_of(unused[0])}: does not go with {flag_of(action)}")
    return "owned" if given.pop("owned", False) else next(iter(actions), None)


def exclude_from_proxy(*hosts: str) -> None:
    """Disable proxies for requests to these hosts and localhost, in this process and its children.

    Raises SettingsError if the file SSLKEYLOGFILE cannot be written, because the TLS library always opens this file.
    """
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    if named != "*":  # "*" means all hosts, but only as the whole value
        named = ",".join(filter(None, [named, *hosts, "localhost", "127.0.0.1", "::1", "[::1]"]))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = named
    keys = os.environ.get("SSLKEYLOGFILE")
    try:
        if keys:
            Path(keys).open("a", encoding="utf-8").close()
    except OSError as error:
        raise SettingsError(f"SSLKEYLOGFILE={keys}: cannot be written: {error.strerror}; unset it") from None


def describe_damage(error: ImportError) -> str:
    """Return the error text for a damaged environment. If this is .venv, the next script installs it again."""
    for stamp in Path(sys.prefix).glob("installed-*") if Path(sys.prefix) == ROOT / ".venv" else ():
        with contextlib.suppress(OSError):
            stamp.unlink()
    what = f"has no module {error.name}" if isinstance(error, ModuleNotFoundError) else f"is damaged: {error}"
    repair = "./run_simulation.sh --install-only repairs the environment, or makes a new one once .venv is removed"
    return f"{sys.prefix} {what}: {repair}"


def raise_on_signals() -> None:
    """Raise Interrupted at a TERM, HUP or INT signal, so that the caller stops the processes it has started."""

    def interrupt(number: int, _frame: object) -> NoReturn:
        raise Interrupted(number)

    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(each) is not signal.SIG_IGN:  # nohup ignores HUP
            signal.signal(each, interrupt)


def serve(command: Command) -> int:
    """Start, stop or show the agent servers of this host. Return the exit status."""
    from simulation.hosts import local_cluster
    from simulation.rpc.channels import install_tls
    from simulation.rpc.cluster_key import load_or_make

    config, action = command.config, command.action
    if action == "stop":
        return say_stopped("agent servers", local_cluster.stop())
    if action == "status":
        return say_status("agent servers", local_cluster.STATUS, *local_cluster.status(config))
    if action in ("launch", "owned"):
        from simulation.hosts.launcher import launch

        launch(config, action == "owned")
    elif action == "make_key":
        load_or_make(Path(config.cluster_key_dir))
        sys.stdout.buffer.write(os.fsencode(config.cluster_key_dir) + b"\n")  # as bytes: the path may not be UTF-8
    else:
        from simulation.runs.console import ConsoleProgress

        raise_on_signals()
        started = time.monotonic()
        install_tls(load_or_make(Path(config.cluster_key_dir)))
        with contextlib.closing(ConsoleProgress()) as progress:
            local_cluster.start(config, False, partial(progress.progress, "agent servers ready"))
        say(
            f"{config.server_per_host} participant servers and {config.moderator_per_host} moderator servers are "
            f"ready on {config.host_name}, ports {config.ports[0]}-{config.ports[-1]} "
            f"[takes {time.monotonic() - started:.1f} s]"
        )
    return 0


def serve_models(command: Command) -> int:
    """Start, stop or show the vLLM servers of this host. Return the exit status."""
    from simulation.hosts import vllm_servers

    config, action = command.config, command.action
    if action == "stop":
        return say_stopped("vLLM servers", vllm_servers.stop())
    if action == "status":
        return say_status("vLLM servers", vllm_servers.STATUS, *vllm_servers.status())
    if action == "print_gpu_count":
        say(str(len(vllm_servers.gpus_here())))
    elif config.dry_run:
        servers = vllm_servers.plan(config, command.for_vllm)
        say("\n".join(f"port {each.port}: {each.model} on {each.place}" for each in servers))
    else:
        from simulation.results.tables import table_lines
        from simulation.runs.console import ConsoleProgress

        raise_on_signals()
        with contextlib.closing(ConsoleProgress()) as progress:
            rows = vllm_servers.start(config, command.for_vllm, partial(progress.progress, "vLLM servers ready"))
        say("\n".join(table_lines(vllm_servers.STARTED, rows, ("pid", "on", "ready after"), left=("on", "model"))))
    return 0


def say_stopped(what: str, number: int) -> int:
    say(f"stopped {number} {what}" if number else f"no {what} were running")
    return 0


def say_status(what: str, head: Sequence[str], rows: list[list[str]], all_work: bool) -> int:
    """Print a table with a row for each server. Return the exit status."""
    from simulation.results.tables import table_lines

    dropped = ("up since", "restarts", "pid", "memory", "agents")
    say(
        "\n".join(table_lines(head, rows, dropped, ("role", "up since", "state"))) if rows else f"no {what} are running"
    )
    return 0 if all_work else ClusterError.exit_status


def ask(command: Command) -> int:
    """Send one message to one participant and print its answer. Return the exit status."""
    from simulation.game.rules import Question
    from simulation.game.tally import announcement_of
    from simulation.results.reader import first_winner, read_agents, read_run
    from simulation.rpc.channels import install_tls
    from simulation.rpc.cluster_key import load
    from simulation.rpc.lean_import import import_agentscope

    config = command.config
    path = Path(shown(str(config.run_dir)))
    run = read_run(path)
    played = run.config
    participant = config.participant if config.participant is not None else first_winner(run)
    if participant >= played.participant_num:
        raise SettingsError(f"--participant {participant}: the run has participants 0 to {played.participant_num - 1}")
    install_tls(load(Path((config if "cluster_key_dir" in command.given else played).cluster_key_dir)))
    import_agentscope()
    from simulation.cluster.rounds import ask as ask_participant

    announcements = tuple(announcement_of(each, run.game.scale) for each in run.results)
    question = Question(0, str(config.text), played.max_value, announcements, played.decimals)
    answer = ask_participant(*read_agents(path, participant), question)
    say("\n".join(map(printable, answer.splitlines())))  # a model may return control characters
    return 0


def report(command: Command) -> int:
    """Report one run, or compare several runs. Only the run folders are needed. Return the exit status."""
    if command.action is not None:
        from simulation.results.report_process import serve as draw_for_main

        draw_for_main()
        return 0
    from simulation.results import comparison
    from simulation.results.console_report import run_lines
    from simulation.results.reader import read_run
    from simulation.results.report_page import draw_all

    run_dir = command.config.run_dir
    named = [Path(shown(full_path("RUN", run))) for run in command.runs or filter(None, [run_dir])]
    if not named:
        raise SettingsError("--role report: give --run-dir, the folder of a finished run, or several folders")
    paths = comparison.run_folders(named)
    target = Path(shown(run_dir)) if run_dir is not None and command.runs else None  # the folder of the comparison
    if paths != named[:1]:
        target = target or comparison.common_folder(paths)
        runs = [read_run(path) for path in paths]
        say("\n".join([*comparison.comparison_lines(runs), *comparison.unfinished_lines(named, runs)]))
        comparison.write_comparison(target, runs)
        say(f"compared in {target / 'comparison.html'}")
    elif target is not None:
        raise SettingsError(f"--run-dir {target}: is for a comparison of several runs; {paths[0]} is a single run")
    else:
        run = read_run(paths[0])
        say("\n".join(run_lines(run)))
        draw_all(run)
    return 0


OTHER_ROLES = {"participant": serve, "vllm": serve_models, "ask": ask, "report": report}
