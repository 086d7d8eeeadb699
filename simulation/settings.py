"""All settings, each declared once with type, default, range, help and roles, and checked before anything starts.

Flags, their help, the keys of experiment files and `config` in summary.json follow from these declarations.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from simulation.errors import SettingsError, meant_by
from simulation.files import ROOT, full_path

DASHBOARD_PORT = 8050
LAST_PORT = 65_535
FRACTION = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20}|/[0-9]{1,20})?")
FINEST = 10**9  # the largest denominator
COMMAS_FROM = 100_000  # smaller numbers, such as ports, have no commas
ROLES = {
    "main": "play the game",
    "participant": "start, stop or show the agent servers of this host",
    "ask": "question one participant of a run that kept its agents",
    "report": "show a finished run again, or compare several",
    "vllm": "start, stop or show the vLLM servers of this host",
}
SERVERS = ("main", "participant")  # roles with the settings of agent servers
MODELS = ("main", "participant", "vllm")  # roles with the settings of models


def setting(
    default: Any,
    help_text: str,
    low: float | None = None,
    high: float | None = None,
    *,
    choices: tuple[str, ...] = (),
    without: str = "",
    roles: tuple[str, ...] = ("main",),
    group: str = "",
    game: bool = False,
    fixed_on_resume: bool = False,
    path: bool = False,
) -> Any:
    """Declare a setting with its default, help (with unit), range or choices, and the roles that use it.

    `without` describes the default where the value does not, and `group` heads the help from this setting on. A `game`
    setting may be in an experiment file, a resumed run cannot change a `fixed_on_resume` setting, and a `path` is made
    absolute (see full_path).
    """
    return field(default=default, metadata=locals())


fixed_game_setting = partial(setting, game=True, fixed_on_resume=True)


@dataclass(frozen=True)
class SimulationConfig:
    """The settings of one command. Raises SettingsError with flag, value and range if a value is invalid."""

    role: str = setting("main", "; ".join(map(": ".join, ROLES.items())), choices=tuple(ROLES), roles=tuple(ROLES))
    dry_run: bool = setting(False, "print what would be done and cost, and start nothing", roles=("main", "vllm"))

    experiment: str | None = setting(
        None, "YAML file with settings of the game; a list of values runs a sweep", path=True, group="the game"
    )
    agent_type: str = fixed_game_setting(
        "random", "source of the numbers: random, or a language model", choices=("random", "llm"), roles=SERVERS
    )
    agent_class: str | None = fixed_game_setting(None, "your own participant, as my_file.py:MyParticipant", path=True)
    extra_pythonpath: str | None = setting(
        None, "folders that your own participant imports from, besides its own, separated by colons", roles=SERVERS
    )
    participant_num: int = fixed_game_setting(1000, "number of participants", 1, 10**9)
    max_value: int = fixed_game_setting(100, "upper bound of the numbers, which start at 0", 1, 10**9)
    decimals: int = fixed_game_setting(0, "decimal places of the numbers", 0, 6)
    rounds: int = setting(1, "number of rounds", 1, 100, game=True)
    ratio: str = fixed_game_setting("1", "the number closest to offset + ratio * average wins; such as 2/3 or 0.51")
    offset: str = fixed_game_setting("0", "see --ratio; such as 5, or 1/2")
    sleep_time: float = setting(1.0, "think time of a random participant, in seconds", 0, 86_400, game=True)
    seed: int | None = fixed_game_setting(
        None, "seed of all random draws, which repeats a game exactly", 0, 2**64 - 1, without="drawn, and printed"
    )
    prompt: str = fixed_game_setting("basic", "prompt of LLM participants: a name in the prompts file")
    personas: str | None = fixed_game_setting(
        None, "set of personas in the personas file, or several: education+occupation"
    )
    models: str | None = fixed_game_setting(
        None, "shares of models, as model_1=2/3,model_2=1/3", without="all models of a host in turn"
    )
    teams: str | None = fixed_game_setting(None, "teams, whose averages are announced too: a set of personas, or model")
    prompts_file: str = setting(f"{ROOT}/configs/prompts.yaml", "YAML file of prompts", fixed_on_resume=True, path=True)
    personas_file: str = setting(
        f"{ROOT}/configs/personas.yaml", "YAML file of sets of personas", fixed_on_resume=True, path=True
    )
    dispatch: str = setting(
        "group",
        "group asks the participants of a server together; agent asks each through its own AgentScope proxy",
        choices=("group", "agent"),
    )

    hosts: tuple[str, ...] = setting(
        ("localhost",), "hosts of the agent servers", without="localhost", roles=SERVERS, group="the cluster"
    )
    host_name: str = setting("localhost", "name of this host, as other hosts reach it", roles=("participant",))
    base_port: int = setting(12330, "first port of the agent servers on each host", 1, LAST_PORT, roles=SERVERS)
    server_per_host: int = setting(10, "participant servers per host", 1, 4096, roles=SERVERS)
    moderator_per_host: int = setting(4, "moderator servers per host, on the next ports", 1, 4096, roles=SERVERS)
    cluster_key_dir: str = setting(f"{ROOT}/.cluster", "folder of the cluster key", roles=(*SERVERS, "ask"), path=True)
    connect_timeout: float = setting(5.0, "seconds to wait for all agent servers to answer", 0.1, 3600, roles=SERVERS)
    heartbeat_timeout: float = setting(
        10.0, "seconds without a heartbeat until a server is dropped and its participants move to others", 0.5, 3600
    )
    min_servers: int | None = setting(
        None, "end the game when fewer participant servers are left", 1, 10**6, without="when none is left"
    )
    lease: float = setting(60.0, "seconds without contact until a server deletes the agents of a run", 2, 86_400)
    reply_threads: int = setting(32, "threads per agent server for participants with a blocking reply", 1, 1024)

    model_per_host: int = setting(
        None,
        "model servers per host, which participants use in turn",
        1,
        1024,
        without="as many as ./start_vllm.sh starts here",
        roles=SERVERS,
        group="participants that ask a language model",
    )
    model_configs: str = setting(
        f"{ROOT}/configs/model_configs.json", "the models, in AgentScope's format", roles=MODELS, path=True
    )
    allow_remote_model: bool = setting(False, "allow models outside the cluster's hosts, which may cost money")
    structured_output: str = setting(
        "structured_outputs",
        "how answers are constrained to numbers in range: by vLLM's field, by the OpenAI API's field, or not at all",
        choices=("structured_outputs", "response_format", "none"),
        game=True,
    )
    samples_per_request: int = setting(
        100, "maximum answers per request, for participants with the same prompt", 1, 10_000, game=True
    )
    max_attempts: int = setting(3, "attempts per participant to get a valid number", 1, 100, game=True)
    max_in_flight: int | None = setting(
        None, "concurrent requests per model and host", 1, 10**6, without="enough for 512 answers"
    )
    attempt_timeout: float = setting(300.0, "time limit of one request, in seconds", 0.1, 86_400)
    reply_timeout: float = setting(600.0, "seconds to retry requests that a model does not answer", 0.1, 864_000)
    max_tokens: int | None = setting(None, "token budget of the game, for prompts and answers", 1, 10**15, game=True)
    price_per_million_tokens: float | None = setting(None, "price of 1,000,000 tokens, for the estimate", 0, 10**9)

    vllm_base_port: int = setting(
        8010, "first port of the vLLM servers on each host", 1, LAST_PORT, roles=MODELS, group="the vLLM servers"
    )
    gpu_num: int | None = setting(
        None, "GPUs of this host; 0 starts one server on the CPU", 0, 1024, roles=MODELS, without="all GPUs found"
    )
    tensor_parallel: int = setting(1, "GPUs per vLLM server", 1, 1024, roles=MODELS)
    model_path: str | None = setting(None, "folder of the model, or its name on a hub; required", roles=("vllm",))

    resume: str | None = setting(
        None, "folder of a run or an experiment to continue after its last round", path=True, group="the results"
    )
    run_dir: str | None = setting(
        None,
        "folder of the results of a run; with several runs to report, folder for their comparison",
        without="runs/<run id> for a new run, the folder around several runs",
        roles=("main", "ask", "report"),
        path=True,
    )
    keep_agents: bool = setting(False, "leave the agents on their servers, for --role ask")
    dashboard: int | None = setting(
        None, f"serve a live status page for the run on this host (port {DASHBOARD_PORT} unless given)", 0, LAST_PORT
    )

    participant: int | None = setting(
        None, "index of the participant to question", 0, 10**9, roles=("ask",), group="a question"
    )
    winner: bool = setting(False, "question the first winner of the last round", roles=("ask",))
    text: str | None = setting(None, "the question; required", roles=("ask",))

    def __post_init__(self) -> None:
        changed = _with_paths(vars(self), lambda name, path: full_path(flag_of(name), path))
        changed["model_per_host"] = 1 if self.model_per_host is None else self.model_per_host
        for name, low, high in (("ratio", Fraction(1, 10**6), 10), ("offset", Fraction(0), 10**9)):
            changed[name] = str(fraction(flag_of(name), getattr(self, name), low, high))
        for name, value in changed.items():
            object.__setattr__(self, name, value)  # as the class is frozen
        for item in fields(self):
            check(flag_of(item.name), getattr(self, item.name), item.metadata)
        self._check_combinations()

    def _check_combinations(self) -> None:
        agents = f"{self.server_per_host} participant and {self.moderator_per_host} moderator servers"
        for flag, what, end in (
            (f"--base-port {self.base_port}", agents, self.ports.stop),
            (f"--vllm-base-port {self.vllm_base_port}", "vLLM servers", self.vllm_base_port + self.model_per_host),
        ):
            if end - 1 > LAST_PORT:
                raise SettingsError(f"{flag}: {what} would end at port {end - 1}, beyond port {LAST_PORT}")
        hosts = f"--hosts {' '.join(self.hosts)}"
        if not self.hosts or len({host.lower() for host in self.hosts}) < len(self.hosts):
            raise SettingsError(f"{hosts}: must name at least one host, and none twice")
        if "localhost" in self.hosts and len(self.hosts) > 1:
            raise SettingsError(f"{hosts}: localhost is another machine on each of them; use names that all can reach")
        servers = len(self.hosts) * self.server_per_host
        if self.min_servers is not None and self.min_servers > servers and self.resume is None:
            raise SettingsError(f"--min-servers {self.min_servers}: there are {servers} participant servers")
        if self.winner and self.participant is not None:
            raise SettingsError(f"--winner: does not go with --participant {self.participant}")
        asks_somebody = self.winner or self.participant is not None
        if self.role == "ask" and not (self.run_dir and asks_somebody and (self.text or "").strip()):
            raise SettingsError("--role ask: give --run-dir, --text, and --participant or --winner")
        if self.experiment is not None and self.resume is not None:
            raise SettingsError("--experiment: does not go with --resume")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as stored in a run folder; paths inside the checkout are relative, as it may be moved."""
        return asdict(self) | _with_paths(vars(self), _from_root)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SimulationConfig:
        """Return settings stored by `to_json`. Raises KeyError, TypeError or SettingsError if they are malformed."""
        for name in data.keys() & KINDS.keys() - {"hosts"}:
            if type(data[name]) not in KINDS[name] and not (type(data[name]) is int and float in KINDS[name]):
                raise TypeError(f"{name} has a value of another type")
        if not all(isinstance(host, str) for host in data["hosts"]):
            raise TypeError("hosts has values of another type")
        paths = _with_paths(data, partial(_from_here, _checkout_of(data)))
        return cls(**{**data, **paths, "hosts": tuple(data["hosts"])})

    @property
    def ports(self) -> range:
        """Return the ports of one host: participant servers first, then moderator servers."""
        return range(self.base_port, self.base_port + self.server_per_host + self.moderator_per_host)


SETTINGS = {item.name: item for item in fields(SimulationConfig)}
KINDS: dict[str, tuple[Any, ...]] = {  # the types of each setting, such as (int, NoneType)
    name: typing.get_args(kind) or (kind,) for name, kind in typing.get_type_hints(SimulationConfig).items()
}
PATHS = tuple(name for name, item in SETTINGS.items() if item.metadata["path"])
DEFAULT_PATHS = {name: Path(str(SETTINGS[name].default)).relative_to(ROOT) for name in PATHS if SETTINGS[name].default}


# --- Paths -----------------------------------------------------------------------------------------------------------


def _with_paths(values: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """Return all settings with paths, after `change(name, path)`; `extra_pythonpath` holds several."""
    folders = (values.get("extra_pythonpath") or "").split(":")
    changed: dict[str, Any] = {name: change(name, values[name]) for name in PATHS if values.get(name) is not None}
    return changed | {
        "extra_pythonpath": ":".join(change("extra_pythonpath", each) for each in folders if each) or None
    }


def _from_root(_name: str, path: str) -> str:
    """Return a path as stored: relative if it is inside the checkout, as given or with links resolved."""
    for form in (Path(path), Path(os.path.realpath(path))):
        if form.is_relative_to(ROOT) and ".." not in form.parts:
            return str(form.relative_to(ROOT))
    return path


def _from_here(moved_from: Path | None, _name: str, path: str) -> str:
    """Return the absolute form of a stored path; a path inside `moved_from` is mapped to this checkout."""
    if moved_from is not None and Path(path).is_relative_to(moved_from):
        path = str(Path(path).relative_to(moved_from))
    return str(ROOT / path)


def _checkout_of(data: Mapping[str, Any]) -> Path | None:
    """Return the checkout in which an earlier version stored absolute paths; None if a path is relative.

    It is the most frequent folder of the paths that end like their defaults.
    """
    paths = {name: Path(data[name]) for name in DEFAULT_PATHS if name in data}
    if not all(path.is_absolute() for path in paths.values()):
        return None
    ends = {
        path: len(DEFAULT_PATHS[name].parts) for name, path in paths.items() if path.match(str(DEFAULT_PATHS[name]))
    }
    roots = [path.parents[parts - 1] for path, parts in ends.items()]
    return max(roots, key=roots.count, default=None)


# --- Values ----------------------------------------------------------------------------------------------------------


def check(flag: str, value: Any, allowed: Mapping[str, Any]) -> None:
    """Raise SettingsError unless the value lies in the allowed range or choices."""
    if value is None:
        return
    if allowed["choices"] and value not in allowed["choices"]:
        guess = meant_by(str(value), allowed["choices"])
        raise SettingsError(
            f"{flag} {value}: must be one of {', '.join(allowed['choices'])}" + f"; {guess}" * bool(guess)
        )
    if allowed["low"] is not None and not allowed["low"] <= value <= allowed["high"]:
        low, high = as_written(allowed["low"]), as_written(allowed["high"])
        raise SettingsError(f"{flag} {value}: must be from {low} to {high}")


def as_written(number: float) -> str:
    """Return a bound or a default for display: 1000, 0.1 or 1,000,000."""
    number = int(number) if number == int(number) else number
    return f"{number:,}" if abs(number) >= COMMAS_FROM else str(number)


def flag_of(name: str) -> str:
    """Return the flag of a setting: `--max-value` for `max_value`."""
    return "--" + name.replace("_", "-")


def number(kind: type, flag: str, text: str) -> Any:
    """Parse an int or float from the command line. Raises SettingsError."""
    try:
        return kind(text)
    except ValueError:
        form = "a whole number, in digits such as 1000" if kind is int else "a number, such as 0.5"
        raise SettingsError(f"{flag} {text!r}: must be {form}") from None


def fraction(flag: str, text: str, low: Fraction, high: float) -> Fraction:
    """Parse an exact number such as 2/3 or 0.51, with a denominator of at most 10^9. Raises SettingsError."""
    text = str(text)
    try:
        if not FRACTION.fullmatch(text):  # an exponent could expand to more digits than fit in memory
            raise ValueError
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise SettingsError(f"{flag} {text}: must be a number such as 2/3 or 0.51") from None
    if value.denominator > FINEST or not low <= value <= high:
        bounds = f"from {low} to {as_written(high)}, as a fraction such as 2/3 or as 0.51"
        raise SettingsError(f"{flag} {text}: must be {bounds}, with a denominator of at most {FINEST:,}")
    return value
