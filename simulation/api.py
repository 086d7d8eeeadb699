"""The Python interface: play games from a script or a notebook, on agent servers of this process. See docs/python.md.

The settings are those of main.py; `play` has its signature and its documentation from their declarations.
"""

import inspect
import itertools
import math
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from loguru import logger

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as in main.py, and before gRPC is imported
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")

from simulation import playing
from simulation.cli import count_models, exclude_from_proxy
from simulation.errors import ClusterError, SettingsError, nearest, printable
from simulation.files import HOME, full_path
from simulation.hosts.local_cluster import SERVER_SETTINGS
from simulation.monitoring.hooks import Hook, as_hook
from simulation.rpc.lean_import import import_agentscope
from simulation.runs.console import PythonProgress
from simulation.settings import KINDS, OF_SET, SETTINGS, SimulationConfig, moved
from simulation.study import Run, Study, in_python, read, readable_errors
from simulation.user_code import save_class

logger.disable("simulation")  # a library is silent; `play(quiet=False)` shows the log
import_agentscope(silent=True)
from participant import LLMParticipant
from simulation.agents.participant import Participant

FOLDER = HOME / "run" / "python"  # of the classes and the studies that were played from Python
NOT_HERE = ("role", "dry_run", "json")  # settings of main.py that `play` has in another form, or not
OWN = {
    "participant": (type | None, None, "your class of participants; agent_class takes a file"),
    "players": (
        Mapping[Any, Any] | str | None,
        None,
        "shares of kinds of players, as {'random': '1/3', MyClass: '2/3'}",
    ),
    "game": (type | str, "average", "the game: its name, your class, or its file as my_file.py:MyGame"),
    "set": (Mapping[str, Any], None, "parameters of the game or of your participants, as {'noise': 5}"),
    "hook": (Hook | type[Hook] | str | None, None, "your Hook, or its class, which is called at each round"),
    "quiet": (bool, True, "print nothing; False: the log, and the results as main.py prints them"),
    "progress": (bool, False, "show a bar for each stage"),
}
SERVERS = [name for name in SERVER_SETTINGS if name not in ("host_name", "base_port")]  # settings of `servers`
FRACTIONS = ("ratio", "offset")
LARGEST_DENOMINATOR = 10**6  # of a fraction that a float stands for
_playing = threading.RLock()  # one run at a time in this process: its connections are shared
_servers = list["servers"]()  # those whose `with` block is entered


def play(**settings: Any) -> Run | Study:
    """Play a game, or all games of a study, and return the results.

    A list of values for a setting plays each of them, and `repeats` each of them several times; the result is then a
    Study, and otherwise a Run. The agent servers are those of `with simulation.servers(...)`, or those that `hosts` or
    `base_port` name; otherwise this process starts its own on free ports, and stops them afterwards. An interrupt
    (Ctrl-C) ends the game after the answers so far, which are returned. Raises the exceptions of simulation.errors.
    """
    with _playing, readable_errors(), ExitStack() as cleanup:
        config, given, hook, bar = _command(settings)
        console = PythonProgress(config.quiet, bar)
        cleanup.enter_context(_interruptible(console))
        own = cleanup.enter_context(ExitStack())  # stops the servers that are started here
        shared = bool(_servers) or bool({"hosts", "base_port"} & given.keys())
        exclude_from_proxy(*config.hosts)
        if not config.quiet:
            logger.enable("simulation")
            cleanup.callback(logger.disable, "simulation")
        session, _ = playing.play(config, given, console, private=None if shared else own, hook=hook)
        results = read(session.folder, own.pop_all() if config.keep_agents else None)
        results.warnings = [in_python(text) for _, text in console.warnings]
        return results


def plan(**settings: Any) -> str:
    """Return a text about what `play` with these settings would do, with the cost of language models.

    Raises SettingsError.
    """
    with _playing, readable_errors():
        config, given, _, _ = _command(settings)
        return playing.plan(replace(config, dry_run=True), given)


class servers:  # noqa: N801 - used like a function
    """Agent servers of this process, on free ports: `with simulation.servers(10): ...` plays all games on them.

    They start at once and run until the end of the `with` block, `stop()`, or the end of this process. In a notebook,
    assign them to a name and call `enter()` to use them in several cells. Raises SettingsError or ClusterError.
    """

    def __init__(self, server_per_host: int = SimulationConfig.server_per_host, **settings: Any) -> None:
        with _playing, readable_errors():
            from simulation.hosts.vllm_servers import servers_per_host
            from simulation.rpc.channels import install_tls
            from simulation.rpc.cluster_key import load_or_make

            console = PythonProgress(True, bool(settings.pop("progress", False)))
            settings["server_per_host"] = server_per_host
            for name in settings.keys() - {*SERVERS}:
                raise SettingsError(f"{name}: is no setting of servers; {nearest(name, SERVERS)}")
            given = {name: _value(name, value) for name, value in settings.items() if value is not None}
            given.setdefault("model_per_host", servers_per_host(SimulationConfig(**given)))
            config = SimulationConfig(**given)
            install_tls(load_or_make(Path(config.cluster_key_dir)))
            self._stack, self._is_stopped = ExitStack(), False
            with self._stack as started, _interruptible(console):
                base_port = playing.start_servers(config, console, started, private=True)
                console.close()
                self._stack = started.pop_all()
            used = {name: value for name in SERVERS if (value := getattr(config, name)) is not None}
            self.settings = used | {"hosts": config.hosts, "base_port": base_port}

    def enter(self) -> "servers":
        """Play all games on these servers until `stop`. Raises ClusterError if they were stopped."""
        if self._is_stopped:
            raise ClusterError(f"{self!r}: were stopped; start others with simulation.servers")
        _servers.append(self)
        return self

    __enter__ = enter

    def stop(self) -> None:
        """Stop the servers."""
        with _playing:
            self._is_stopped = True
            if self in _servers:
                _servers.remove(self)
            self._stack.close()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        ports = SimulationConfig(**self.settings).ports
        return f"<servers on ports {ports[0]} to {ports[-1]}>"


# --- From keywords to settings ---------------------------------------------------------------------------------------


def _command(settings: dict[str, Any]) -> tuple[SimulationConfig, dict[str, Any], Hook | None, bool]:
    """Return the settings, those that were given, the hook and whether to show a bar. Raises SettingsError."""
    known = {*_parameters()}
    for name in settings.keys() - known:
        raise SettingsError(f"{name}: is no setting; {nearest(name, known)}")
    given = {name: value for name, value in settings.items() if value is not None}
    bar, hook = bool(given.pop("progress", False)), given.pop("hook", None)
    if isinstance(hook, str):
        given["hook"], hook = hook, None
    assigned = given.pop("set", {})
    if not isinstance(assigned, Mapping):
        raise SettingsError(f"set {printable(repr(assigned), 60)}: must be a mapping, as {{'noise': 5}}")
    texts = {name: _values(name, [_text(each) for each in _each(value)]) for name, value in assigned.items()}
    given = {"quiet": True, **_with_players(given)}
    if "game" in given:
        given["game"] = _values("game", [_spec(each) for each in _each(given["game"])])
    if "hosts" in given:
        hosts = given.pop("hosts")
        hosts = (hosts,) if isinstance(hosts, str) else (*_each(hosts),)
        if not all(isinstance(host, str) for host in hosts):
            raise SettingsError(f"hosts {printable(repr(hosts), 60)}: must be names of hosts")
    else:
        hosts = None
    given = {name: _values(name, [_value(name, each) for each in _each(value)]) for name, value in given.items()}
    given |= {"hosts": hosts} if hosts is not None else {}
    if any(isinstance(value, list) for value in (*given.values(), *texts.values())):
        given = _study(given, texts)
    elif texts:
        given["set"] = tuple(f"{name}={text}" for name, text in texts.items())
    for name, value in _servers[-1].settings.items() if _servers else ():
        if given.setdefault(name, value) != value:
            raise SettingsError(f"{name} {given[name]}: the servers of this block have {value}")
    SimulationConfig.check_who_plays(given)
    config = count_models(SimulationConfig(**given), given)
    return config, given, None if hook is None else as_hook(hook), bar


def _with_players(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with texts in place of classes of participants and of mappings of players."""
    for first, second in itertools.combinations(("participant", "players", "agent_class"), 2):
        if {first, second} <= given.keys():
            raise SettingsError(f"{first}: does not go with {second}; one of them says who plays")
    if "players" in given:
        return given | {"players": _values("players", [_players(each) for each in _each(given["players"])])}
    if "participant" not in given:
        return given
    classes = _each(given["participant"])
    if wrong := [each for each in classes if not (isinstance(each, type) and issubclass(each, Participant))]:
        problem = "must be a class derived from simulation.Participant; agent_class takes a file"
        raise SettingsError(f"participant {printable(repr(wrong[0]), 60)}: {problem}")
    chosen = {"agent_class": _values("participant", [_spec(each) for each in classes])}
    chosen["agent_type"] = given.get("agent_type", "llm" if any(map(_asks_models, classes)) else "random")
    return {name: value for name, value in given.items() if name != "participant"} | chosen


def _study(given: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
    """Write an experiment file of the settings of the game. Return the other settings, and the file's name."""
    of_game = {name: _whole(name, value) for name, value in given.items() if SETTINGS[name].game}
    if wrong := [name for name, value in given.items() if isinstance(value, list) and name not in of_game]:
        raise SettingsError(f"{wrong[0]}: is no setting of the game: give one value, not a list")
    for name in {"experiment", "resume"} & given.keys():
        raise SettingsError(f"{name}: does not go with lists of values")
    content = yaml.safe_dump(of_game | ({OF_SET.rstrip("."): texts} if texts else {}), sort_keys=False).encode()
    path = FOLDER / f"study-{sha256(content).hexdigest()[:8]}.yaml"
    FOLDER.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return {name: value for name, value in given.items() if name not in of_game} | {"experiment": str(path)}


def _whole(name: str, value: Any) -> Any:
    """Return the value, or the values, of a setting with absolute paths."""
    if not SETTINGS[name].path:
        return value
    return _values(name, [moved(name, each, partial(full_path, name)) for each in _each(value)])


def _each(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray) and value.ndim:
        return list(value)
    return list(value) if isinstance(value, list | tuple | range) else [value]


def _values(name: str, values: list[Any]) -> Any:
    """Return the value, or a list of several. Raises SettingsError for an empty list."""
    if not values:
        raise SettingsError(f"{name}: has an empty list; give at least one value")
    return values if len(values) > 1 else values[0]


def _spec(value: Any) -> str:
    """Return `FILE:CLASS` for a class, which is saved, the kind of player for a run, and a text as it is."""
    if isinstance(value, os.PathLike):
        return f"surrogate:{os.fspath(value)}"
    return save_class(value, FOLDER) if isinstance(value, type) else str(value)


def _asks_models(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, LLMParticipant)


def _players(value: Any) -> Any:
    """Return shares of kinds of players as text."""
    if not isinstance(value, Mapping):
        return value
    kinds = {f"{'llm:' * _asks_models(kind)}{_spec(kind)}": share for kind, share in value.items()}
    return ",".join(f"{kind}={_fraction('players', share)}" for kind, share in kinds.items())


def _value(name: str, value: Any) -> Any:
    """Return the value of a setting with the type that its declaration names. Raises SettingsError."""
    kinds, kind = KINDS[name], KINDS[name][0]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if name in FRACTIONS:
        return _fraction(name, value)
    if kind in (int, float) and not isinstance(value, bool | str):
        try:
            number = kind(value)
        except (TypeError, ValueError):
            number = None
        if number is not None and number == value:
            return number
    if type(value) not in kinds:
        raise SettingsError(f"{name} {printable(repr(value), 60)}: must be {kind.__name__}, not {type(value).__name__}")
    return value


def _fraction(name: str, value: Any) -> str:
    """Return an exact number as text. A float such as 2/3 stands for the simplest fraction that it is equal to."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SettingsError(f"{name} {value}: must be a finite number")
        simple = Fraction(value).limit_denominator(LARGEST_DENOMINATOR)
        if float(simple) != value:
            raise SettingsError(f"{name} {value}: is not exact; write it as a text, such as '2/3' or '0.51'")
        return str(simple)
    return str(value)


def _text(value: Any) -> str:
    """Return the value of a parameter as text. Raises SettingsError unless it is a number, a truth value or a text."""
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, bool | int | float | str | Fraction | Decimal):
        raise SettingsError(f"set {printable(repr(value), 60)}: must be a number, a truth value or a text")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def _interruptible(console: PythonProgress) -> Iterator[None]:
    """Let an interrupt end the game early in the `with` block. Only the main thread receives interrupts."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if is_main else None
    if before in (None, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGINT, console.signalled)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _parameters() -> dict[str, tuple[Any, Any, str]]:
    """Return type, default and help of each keyword of `play`."""
    names = [name for name, each in SETTINGS.items() if "main" in each.roles and name not in NOT_HERE]
    kinds = {**SimulationConfig.__annotations__, **dict.fromkeys(FRACTIONS, str | float | None)}
    return {**{name: (kinds[name], SETTINGS[name].default, SETTINGS[name].help) for name in names}, **OWN}


def _document(function: Any, parameters: Iterable[tuple[str, tuple[Any, Any, str]]]) -> None:
    """Give a function that takes keywords the signature and the help of its parameters."""
    own, lines = inspect.Parameter, []
    keywords = []
    for name, (kind, default, text) in parameters:
        keywords.append(own(name, own.KEYWORD_ONLY, default=default, annotation=kind))
        lines.append(f"        {name}: {text}")
    function.__signature__ = inspect.Signature(
        keywords, return_annotation=inspect.signature(function).return_annotation
    )
    function.__doc__ = "\n".join([str(function.__doc__).rstrip(), "", "    Args:", *lines, "    "])


for _function in (play, plan):
    _document(_function, _parameters().items())
