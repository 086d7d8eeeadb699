"""The flags of all roles, and functions for all roles except main. AgentScope is imported only inside functions."""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from simulation.errors import ClusterError, Interrupted, SettingsError, meant_by, printable, say
from simulation.files import CODE, full_path, shown
from simulation.settings import DASHBOARD_PORT, KINDS, ROLES, SETTINGS, Setting, SimulationConfig, flag_of, to_number

HELP_WIDTH = 100  # maximum number of columns
DASHES = tuple("-–—−")  # word processors replace the first by one of the others
USAGES = {
    "main": "main.py [flags]",
    "participant": "main.py --role participant [--status | --stop | --make-key] [flags]",
    "ask": "main.py --role ask --run-dir RUN (--participant N | --winner) --text TEXT",
    "report": "main.py --role report [RUN ...] [--run-dir DIR]",
    "control": "main.py --role control [--run-dir RUN] [status | pause | continue | stop | set NAME VALUE] [--json]",
    "verify": "main.py --role verify RUN [flags]",
    "vllm": "main.py --role vllm [--status | --stop] [flags] [-- flags for vLLM]",
}
WORDS = {  # the arguments of a role that are no flags: their name and their help
    "report": ("RUN", "folders of runs or experiments (default: that of --run-dir)"),
    "verify": ("RUN", "folder of the run"),
    "control": ("COMMAND", "status (default), pause, continue, stop, or: set NAME VALUE, such as set rounds 10"),
}
EPILOG = f"Each role has its own flags: main.py --role {'|'.join(ROLES)} --help lists them."
ACTIONS = {  # flags that replace the usual work of a role; flags without a help text are internal
    "status": Setting(False, "show the servers of this host", roles=("participant", "vllm")),
    "stop": Setting(False, "stop the servers of this host", roles=("participant", "vllm")),
    "make_key": Setting(False, "make the cluster key unless it exists, and print its folder", roles=("participant",)),
    "print_gpu_count": Setting(False, "", roles=("vllm",)),  # for start_vllm.sh
    "launch": Setting(False, "", roles=("participant",)),  # this process becomes the launcher
    "owned": Setting(False, "", roles=("participant",)),  # like launch; stops at the end of standard input
}
USED_BY: dict[str, Iterable[str]] = {  # the settings that each action uses
    "status": ("host_name", "cluster_key_dir", "connect_timeout"),
    "make_key": ("cluster_key_dir",),
    "launch": SETTINGS,
    "owned": SETTINGS,
}
HELP = Setting(False, "show this page, or with --role that of another role", roles=tuple(ROLES))
FLAGS = {"help": HELP, **ACTIONS, **SETTINGS}


class Command(NamedTuple):
    """A parsed command line."""

    config: SimulationConfig
    given: dict[str, Any]  # the settings that flags have set
    action: str | None  # a name in ACTIONS, or None for the usual work of the role
    runs: list[str]  # the run folders for --role report, or the command for --role control
    for_vllm: list[str]  # the flags after `--`


def make_parser(role: str) -> argparse.ArgumentParser:
    """Return a parser that knows only the flags of `role`."""
    width = min(shutil.get_terminal_size((HELP_WIDTH, 0)).columns, HELP_WIDTH)
    parser = argparse.ArgumentParser(
        usage=USAGES[role],
        description=f"Role {role}: {ROLES[role]}.",
        epilog=EPILOG,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=30, width=width),
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
    )
    parser._negative_number_matcher = re.compile(r"-[0-9.]")  # -1/2 is a number, not a flag
    group = parser.add_argument_group("what to do")
    for name, flag in FLAGS.items():
        group = parser.add_argument_group(flag.group) if flag.group else group
        if role in flag.roles:
            text = flag.help if flag.about else argparse.SUPPRESS
            group.add_argument(flag_of(name), help=text, default=argparse.SUPPRESS, **_options_of(name))
    if role in WORDS:
        parser.add_argument("runs", nargs="*", metavar=WORDS[role][0], help=WORDS[role][1])
    return parser


def _options_of(name: str) -> dict[str, Any]:
    """Return the keyword arguments of `add_argument` that depend on the type of the flag `name`."""
    flag, kind = FLAGS[name], KINDS.get(name, (bool,))[0]
    if kind is bool:
        return {"action": "store_true"}
    options: dict[str, Any] = {"type": partial(to_number, kind, flag_of(name)), "metavar": "N" if kind is int else "X"}
    if kind is str:
        is_path = flag.path or name == "model_path"
        metavar = "|".join(flag.choices) or name.rpartition("_")[2].upper()
        options = {"type": str if is_path else _in_utf8, "metavar": metavar}
    if name == "hosts":
        options |= {"nargs": "+", "metavar": "HOST"}
    elif name == "set":
        options |= {"action": "append", "metavar": "NAME=VALUE"}
    elif name == "dashboard":
        options |= {"nargs": "?", "metavar": "PORT", "const": DASHBOARD_PORT}
    return options


def _in_utf8(text: str) -> str:
    """Decode a command-line argument as UTF-8 in any locale. If the argument is not UTF-8, return it unchanged."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text


def parse(arguments: list[str]) -> Command | None:
    """Parse and check `arguments`. For --help, print help and return None. Raises SettingsError if one is invalid."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags, for_vllm = arguments[:end], arguments[end + 1 :]
    words = itertools.pairwise([*flags, ""])  # find --role without the parser, because the parser depends on the role
    roles = [after if word == "--role" else word[7:] for word, after in words if f"{word}=".startswith("--role=")]
    role = roles[-1] if roles else SimulationConfig.role
    SETTINGS["role"].check("--role", role)
    if len({*roles}) > 1:
        raise SettingsError(f"--role {' and --role '.join(dict.fromkeys(roles))}: do not go together; give one of them")
    if {"-h", "--help"} & {*flags}:
        say(make_parser(role).format_help().rstrip("\n"))
        return None
    given, runs = parse_flags(flags, role)
    action = next((name for name in ACTIONS if given.pop(name, False)), None)
    if action is not None and (unused := [name for name in given if name not in {"role", *USED_BY.get(action, ())}]):
        raise SettingsError(f"{flag_of(unused[0])}: does not go with {flag_of(action)}")
    if for_vllm and (role != "vllm" or action is not None):
        raise SettingsError(f"{for_vllm[0]}: only flags for vLLM may follow --, where --role vllm starts servers")
    if {"json", "dry_run"} <= given.keys():
        raise SettingsError("--json: does not go with --dry-run, which writes no results")
    SimulationConfig.check_who_plays(given)
    config = SimulationConfig(**given)
    return Command(config if action is not None else count_models(config, given), given, action, runs, for_vllm)


def count_models(config: SimulationConfig, given: dict[str, Any]) -> SimulationConfig:
    """Return the settings with the number of model servers of this host, unless `given` has it, and add it to it."""
    plays = config.role == "main" and config.resume is None  # a resumed run has a saved model_per_host
    asks = config.role == "participant" or (plays and (config.uses_models or config.experiment is not None))
    if not asks or "model_per_host" in given:
        return config
    from simulation.hosts.vllm_servers import servers_per_host

    given["model_per_host"] = servers_per_host(config)
    return replace(config, model_per_host=given["model_per_host"])


def parse_flags(flags: list[str], role: str) -> tuple[dict[str, Any], list[str]]:
    """Parse the flags of a role. Return their values by name, and the run folders. Raises SettingsError on an error."""
    try:
        known, unknown = make_parser(role).parse_known_intermixed_args(flags)
    except argparse.ArgumentError as error:
        raise SettingsError(f"{error} (--help lists all flags)") from None
    given = vars(known)
    given |= {name: tuple(given[name]) for name in ("hosts", "set") if name in given}
    runs: list[str] = given.pop("runs", [])
    unknown += [folder for folder in runs if folder.startswith(DASHES)]
    if not unknown:
        return given, runs
    flag = next((word for word in unknown if word.startswith(DASHES)), "").partition("=")[0]
    every = {flag_of(name): each.roles for name, each in FLAGS.items()}
    if flag in every:
        raise SettingsError(f"{flag}: goes with --role {' or '.join(every[flag])}, not with --role {role}")
    hint = "folders of runs go with --role report"
    if flag:
        guess = meant_by(flag, (flag_of(name) for name, each in FLAGS.items() if each.about))
        hint = f"{guess} --help lists all flags".lstrip()
    raise SettingsError(f"unrecognized arguments: {' '.join(unknown)} ({hint})")


def exclude_from_proxy(*hosts: str) -> None:
    """Disable proxies for requests to `hosts` and localhost, in this process and its children."""
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    if named != "*":  # "*" excludes all hosts, but only if it is the whole value
        named = ",".join(filter(None, [named, *hosts, "localhost", "127.0.0.1", "::1", "[::1]"]))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = named


def describe_damage(error: ImportError) -> str:
    """Return the error text for a damaged environment. If it is .venv, mark it so that the next script repairs it."""
    for stamp in Path(sys.prefix).glob("installed-*") if Path(sys.prefix) == CODE / ".venv" else ():
        with contextlib.suppress(OSError):
            stamp.unlink()
    what = f"has no module {error.name}" if isinstance(error, ModuleNotFoundError) else f"is damaged: {error}"
    repair = "./run_simulation.sh --install-only repairs the environment, or makes a new one once .venv is removed"
    return f"{sys.prefix} {what}: {repair}"


def serve(command: Command) -> int:
    """Start, stop or show this host's agent servers, become their launcher, or make a key. Return the exit status."""
    from simulation.hosts import local_cluster

    config = command.config
    if command.action in ("stop", "status"):
        return stop_or_show("agent servers", local_cluster, command)
    if command.action in ("launch", "owned"):
        from simulation.hosts.launcher import launch

        launch(config, command.action == "owned")
        return 0
    from simulation.rpc.channels import install_tls
    from simulation.rpc.cluster_key import load_or_make

    started = time.monotonic()
    key = load_or_make(Path(config.cluster_key_dir))
    if command.action == "make_key":
        sys.stdout.buffer.write(os.fsencode(config.cluster_key_dir) + b"\n")  # as bytes: the path may not be UTF-8
        return 0
    install_tls(key)
    with interruptible_progress() as progress:
        local_cluster.start(config, False, partial(progress, "agent servers ready"))
    say(
        f"{config.server_per_host} participant servers and {config.moderator_per_host} moderator servers are "
        f"ready on {config.host_name}, ports {config.ports[0]}-{config.ports[-1]} "
        f"[takes {time.monotonic() - started:.1f} s]"
    )
    return 0


def serve_models(command: Command) -> int:
    """Start, stop or show the vLLM servers of this host, or print its number of GPUs. Return the exit status."""
    from simulation.hosts import vllm_servers

    if command.action in ("stop", "status"):
        return stop_or_show("vLLM servers", vllm_servers, command)
    if command.action == "print_gpu_count":
        say(str(len(vllm_servers.gpus_here())))
    elif command.config.dry_run:
        servers = vllm_servers.plan(command.config, command.for_vllm)
        say("\n".join(f"port {each.port}: {each.model} on {each.place}" for each in servers))
    else:
        from simulation.results.tables import table_lines

        with interruptible_progress() as progress:
            rows = vllm_servers.start(command.config, command.for_vllm, partial(progress, "vLLM servers ready"))
        say("\n".join(table_lines(vllm_servers.STARTED, rows, ("pid", "on", "ready after"), left=("on", "model"))))
    return 0


def stop_or_show(what: str, servers: Any, command: Command) -> int:
    """Stop or show the servers that the module `servers` manages; messages call them `what`. Return the exit status."""
    from simulation.results.tables import table_lines

    if command.action == "stop":
        stopped = servers.stop()
        say(f"stopped {stopped} {what}" if stopped else f"no {what} were running")
        return 0
    rows, all_work = servers.status(command.config)
    dropped = ("up since", "restarts", "pid", "memory", "agents")
    lines = table_lines(servers.STATUS, rows, dropped, ("role", "up since", "state"))
    say("\n".join(lines) if rows else f"no {what} are running")
    return 0 if all_work else ClusterError.exit_status


@contextlib.contextmanager
def interruptible_progress() -> Iterator[Callable[..., None]]:
    """Yield a function that shows progress. In the block, a stop signal raises Interrupted, which stops new servers."""
    from simulation.runs.console import ConsoleProgress, log_to_stderr, on_stop_signals

    def interrupt(number: int, _frame: object) -> NoReturn:
        raise Interrupted(number)

    log_to_stderr()
    on_stop_signals(interrupt)
    with contextlib.closing(ConsoleProgress()) as progress:
        yield progress.progress


def ask(command: Command) -> int:
    """Send one message to one participant and print its answer. Return the exit status."""
    from simulation.playing import ask as ask_participant

    config = command.config
    key_folder = config.cluster_key_dir if "cluster_key_dir" in command.given else None
    answer = ask_participant(Path(shown(str(config.run_dir))), config.participant, str(config.text), key_folder)
    say("\n".join(map(printable, answer.splitlines())))  # a model may return control characters
    return 0


def verify(command: Command) -> int:
    """Ask each round of a saved run again, on temporary servers if none are running. Return the exit status."""
    from simulation.cluster.preflight import check_models_here
    from simulation.playing import has_no_servers, start_servers
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
    with contextlib.ExitStack() as cleanup:
        console = cleanup.enter_context(contextlib.closing(ConsoleProgress()))
        on_stop_signals(console.signalled)
        if has_no_servers(spec.config):
            check_models_here([(spec.game, spec.asked_models)], spec.config.connect_timeout)
            start_servers(spec.config, console, cleanup)
        import_agentscope()
        from simulation.runs.verify import verify as ask_again

        return ask_again(spec, console)


def control(command: Command) -> int:
    """Send a command to a run in progress, and print what it shows then. Return the exit status."""
    from simulation.monitoring.control import send, state_lines
    from simulation.results.run_directory import LATEST

    reply = send(Path(shown(command.config.run_dir or LATEST)), command.runs or ["status"])
    say(json.dumps(reply) if command.config.json else "\n".join(state_lines(reply)))
    return 0


def report(command: Command) -> int:
    """Recreate the report of one run, or compare several runs. Return the exit status."""
    from simulation.results import comparison
    from simulation.results.answers_parquet import write_csv
    from simulation.results.console_report import run_lines, summaries_text
    from simulation.results.reader import common_folder, read_run, run_folders, unfinished_lines
    from simulation.results.report_page import draw_all
    from simulation.results.run_directory import WHOLE, results_errors
    from simulation.runs.console import ConsoleProgress, log_to_stderr
    from simulation.runs.human_data import people_beside

    log_to_stderr(quiet=command.config.json)
    console = ConsoleProgress(json=command.config.json)
    run_dir = command.config.run_dir
    named = [Path(shown(full_path("RUN", run))) for run in command.runs or filter(None, [run_dir])]
    if not named:
        raise SettingsError("--role report: give --run-dir, the folder of a finished run, or several folders")
    paths = run_folders(named)
    target = Path(shown(run_dir)) if run_dir is not None and command.runs else None  # the folder of the comparison
    people = command.config.compare_with
    if paths != named[:1] and people is not None:
        raise SettingsError(f"--compare-with {printable(people)}: is for the report of a single run")
    if paths != named[:1]:
        target = target or common_folder(paths)
        runs = [read_run(path, trusted=command.config.trust) for path in paths]
        lines = comparison.comparison_lines(runs, command.config.all_runs)
        console.say([*lines, *unfinished_lines(named, runs)])
        with console.during("drawing pictures"):
            comparison.write_comparison(target, runs, command.config.all_runs)
        console.say([f"compared in {target / 'comparison.html'}"])
    elif target is not None:
        raise SettingsError(f"--run-dir {target}: is for a comparison of several runs; {paths[0]} is a single run")
    else:
        run = read_run(paths[0], trusted=command.config.trust)
        if people is not None:
            run = replace(run, people=people_beside(replace(run.config, compare_with=people), run.game))
        console.say(run_lines(run))
        with console.during("drawing pictures"):
            draw_all(run)
    for path in paths if command.config.csv else ():
        with results_errors(f"write {path / 'answers.csv'}"):
            write_csv(path / WHOLE, path / "answers.csv")
        console.say([f"answers in {path / 'answers.csv'}"])
    if console.json:
        say(summaries_text(paths, paths != named[:1]))
    return 0


OTHER_ROLES = {
    **{"participant": serve, "vllm": serve_models},
    **{"ask": ask, "control": control, "report": report, "verify": verify},
}
