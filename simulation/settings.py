"""All settings, each defined once with default, range and help, and checked before anything starts.

`main.py` builds the command line from these fields, so a setting added here is also a flag.
"""

from __future__ import annotations

import os
import re
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from types import UnionType
from typing import Any

from simulation.errors import SettingsError, meant_by
from simulation.files import ROOT, full_path

DASHBOARD_PORT = 8050
FRACTION = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20}|/[0-9]{1,20})?")
FINEST = 10**9  # the largest denominator
ROLES = ("main", "participant", "ask", "report", "vllm")
SERVERS = ("main", "participant")  # roles with the settings of agent servers
MODELS = ("main", "participant", "vllm")  # roles with the settings of models
COMMAS_FROM = 100_000  # smaller numbers, such as ports, have no commas
GROUPS = {  # the heading of each group of settings, by its first setting
    "experiment": "the game",
    "hosts": "the cluster",
    "model_per_host": "participants that ask a language model",
    "vllm_base_port": "the vLLM servers",
    "resume": "the results",
    "participant": "a question",
}


def setting(
    default: Any,
    help_text: str,
    low: float | None = None,
    high: float | None = None,
    *,
    choices: tuple[str, ...] = (),
    without: str = "",
    roles: tuple[str, ...] = ("main",),
    fixed_on_resume: bool = False,
    game: bool = False,
    path: bool = False,
) -> Any:
    """Return a field with its flag's help, range or choices, and roles. A resumed run cannot change a `fixed_on_resume`
    setting, and a `path` is made absolute (see full_path). `without` describes the behavior without the flag, where the
    default value does not.
    """
    allowed = {"low": low, "high": high, "choices": choices, "roles": roles}
    told = {"help": help_text, "without": without}
    return field(
        default=default, metadata={**told, **allowed, "fixed_on_resume": fixed_on_resume, "game": game, "path": path}
    )


def game_setting(default: Any, help_text: str, *allowed: Any, fixed_on_resume: bool = True, **options: Any) -> Any:
    """Return a setting of the game, which an experiment file may contain."""
    return setting(default, help_text, *allowed, fixed_on_resume=fixed_on_resume, game=True, **options)


@dataclass(frozen=True)
class SimulationConfig:
    """The settings of one command. Raises SettingsError with flag, value and range if a value is invalid."""

    role: str = setting(
        "main",
        "main plays the game; participant starts, stops or shows the agent servers of this host; "
        "ask talks to one participant of a run that kept its agents; report shows a finished run again; "
        "vllm starts, stops or shows the vLLM servers of this host",
        choices=ROLES,
        roles=ROLES,
    )
    # The game
    experiment: str | None = setting(
        None,
        "a YAML file with settings of the game; a list of values for one of them plays a run with each",
        without="one game, with the settings given here",
        path=True,
    )
    agent_type: str = game_setting(
        "random", "what answers: a random source, or an LLM", choices=("random", "llm"), roles=SERVERS
    )
    agent_class: str | None = game_setting(
        None,
        "your own participant, as my_file.py:MyParticipant",
        without="the participants of --agent-type",
        path=True,
    )
    extra_pythonpath: str | None = setting(
        None,
        "folders, separated by colons, of what your own participants import beside what lies in their folder",
        without="none",
        roles=SERVERS,
    )
    dry_run: bool = setting(False, "print what would be done and cost, and start nothing", roles=("main", "vllm"))
    participant_num: int = game_setting(1000, "participants in all", 1, 10**9)
    max_value: int = game_setting(100, "the upper bound of the numbers, which begin at 0", 1, 10**9)
    decimals: int = game_setting(0, "digits after the point that answers are counted in", 0, 6)
    rounds: int = game_setting(1, "rounds to play", 1, 100, fixed_on_resume=False)
    ratio: str = game_setting("1", "whoever is closest to so much of the average wins: a fraction such as 2/3, or 0.51")
    offset: str = game_setting("0", "what is added to that: 5 and a ratio of 1/2 is 5 plus half the average")
    sleep_time: float = game_setting(
        1.0, "think time of a random participant, in seconds", 0, 86_400, fixed_on_resume=False
    )
    seed: int | None = game_setting(
        None, "repeats a game exactly", 0, 2**64 - 1, without="one that is drawn, and printed"
    )
    prompt: str = game_setting("basic", "what LLM participants are told: a name in the prompts file")
    personas: str | None = game_setting(
        None,
        "who the participants are: a name in the personas file, or several, as education+occupation",
        without="nobody in particular",
    )
    models: str | None = game_setting(
        None,
        "shares of models, as model_1=2/3,model_2=1/3",
        without="participants use all models of a host in turn",
    )
    teams: str | None = game_setting(
        None,
        "what makes teams, whose averages are announced, too: a name of --personas, or model",
        without="no teams",
    )
    prompts_file: str = setting(
        str(ROOT / "configs/prompts.yaml"), "the prompts, by name", fixed_on_resume=True, path=True
    )
    personas_file: str = setting(
        str(ROOT / "configs/personas.yaml"), "the personas, by name", fixed_on_resume=True, path=True
    )
    dispatch: str = setting(
        "group",
        "group asks the participants of a server together; agent asks each through its own AgentScope proxy",
        choices=("group", "agent"),
    )
    # The cluster
    hosts: tuple[str, ...] = setting(("localhost",), "the hosts whose agent servers play", roles=SERVERS)
    host_name: str = setting("localhost", "the name of this host, as the others reach it", roles=("participant",))
    base_port: int = setting(12330, "first port of the agent servers on every host", 1, 65_535, roles=SERVERS)
    server_per_host: int = setting(10, "participant servers on every host", 1, 4096, roles=SERVERS)
    moderator_per_host: int = setting(
        4, "moderator servers on every host, on the ports after those", 1, 4096, roles=SERVERS
    )
    cluster_key_dir: str = setting(
        str(ROOT / ".cluster"), "folder of the cluster key", roles=(*SERVERS, "ask"), path=True
    )
    connect_timeout: float = setting(
        5.0, "how long all agent servers have to answer, in seconds", 0.1, 3600, roles=SERVERS
    )
    heartbeat_timeout: float = setting(
        10.0,
        "seconds without a heartbeat after which a server is given up on, and its participants go to others",
        0.5,
        3600,
    )
    min_servers: int | None = setting(
        None,
        "end the game when fewer participant servers are left in a round",
        1,
        10**6,
        without="it ends when none is left",
    )
    lease: float = setting(60.0, "seconds after which a server drops the agents of a silent run", 2, 86_400)
    reply_threads: int = setting(32, "threads per agent server for participants with a blocking reply", 1, 1024)
    # LLM participants
    model_per_host: int = setting(
        None,
        "model servers on every host, which participants use in turn",
        1,
        1024,
        without="as many as ./start_vllm.sh starts here",
        roles=SERVERS,
    )
    model_configs: str = setting(
        str(ROOT / "configs/model_configs.json"), "the models, in AgentScope's format", roles=MODELS, path=True
    )
    allow_remote_model: bool = setting(False, "let models be outside the cluster's hosts, where they may cost money")
    structured_output: str = game_setting(
        "structured_outputs",
        "how the model is held to a number in range: by vLLM's field, by the field of the OpenAI API, or not at all",
        fixed_on_resume=False,
        choices=("structured_outputs", "response_format", "none"),
    )
    samples_per_request: int = game_setting(
        100, "participants with the same prompt that share a request, by n", 1, 10_000, fixed_on_resume=False
    )
    max_attempts: int = game_setting(3, "attempts per participant to get a valid number", 1, 100, fixed_on_resume=False)
    max_in_flight: int | None = setting(
        None,
        "requests in flight per model and host, of all its agent servers",
        1,
        10**6,
        without="enough for 512 answers",
    )
    attempt_timeout: float = setting(300.0, "seconds that one request may take", 0.1, 86_400)
    reply_timeout: float = setting(
        600.0, "seconds that a participant is asked again for while its model does not answer", 0.1, 864_000
    )
    max_tokens: int | None = game_setting(
        None,
        "tokens, of prompts and answers, that the game may cost",
        1,
        10**15,
        fixed_on_resume=False,
        without="no limit",
    )
    price_per_million_tokens: float | None = setting(
        None, "price of 1,000,000 tokens, for the estimate", 0, 10**9, without="the estimate is of tokens alone"
    )
    # vLLM servers
    vllm_base_port: int = setting(8010, "first port of the vLLM servers on every host", 1, 65_535, roles=MODELS)
    gpu_num: int | None = setting(
        None, "GPUs of this host; 0 is one server on the CPU", 0, 1024, roles=MODELS, without="all there are"
    )
    tensor_parallel: int = setting(1, "GPUs of each vLLM server", 1, 1024, roles=MODELS)
    model_path: str | None = setting(
        None, "the model's folder, or its name on a hub", roles=("vllm",), without="no server can be started"
    )
    # The results
    resume: str | None = setting(
        None,
        "folder of a run, or of an experiment, to go on with after its last finished round",
        without="a new run",
        path=True,
    )
    run_dir: str | None = setting(
        None,
        "folder of the results of a run; with several runs to report, where their comparison is written",
        roles=("main", "ask", "report"),
        without="runs/<run id> for a new run, the folder around several runs",
        path=True,
    )
    keep_agents: bool = setting(False, "leave the agents on their servers, for --role ask")
    dashboard: int | None = setting(
        None,
        f"serve a live status page for the run on this host (port {DASHBOARD_PORT} unless given)",
        0,
        65_535,
        without="no page",
    )
    participant: int | None = setting(
        None, "which participant to talk to", 0, 10**9, roles=("ask",), without="none; give it, or --winner"
    )
    winner: bool = setting(False, "talk to the first winner of the last round", roles=("ask",))
    text: str | None = setting(None, "what to say to it", roles=("ask",), without="none; it must be given")

    def __post_init__(self) -> None:
        for name in PATHS:  # servers read them too, from another working directory
            if getattr(self, name) is not None:
                object.__setattr__(self, name, full_path(flag_of(name), getattr(self, name)))
        if self.extra_pythonpath is not None:
            flag = flag_of("extra_pythonpath")
            folders = [full_path(flag, each) for each in self.extra_pythonpath.split(":") if each]
            object.__setattr__(self, "extra_pythonpath", ":".join(folders) or None)
        if self.model_per_host is None:
            object.__setattr__(self, "model_per_host", 1)
        for item in fields(self):
            check(flag_of(item.name), getattr(self, item.name), item.metadata)
        for name, low, high in (("ratio", Fraction(1, 10**6), 10), ("offset", Fraction(0), 10**9)):
            object.__setattr__(self, name, str(fraction(flag_of(name), getattr(self, name), low, high)))
        last_port = self.base_port + self.server_per_host + self.moderator_per_host - 1
        if last_port > 65_535:
            raise SettingsError(
                f"--base-port {self.base_port}: {self.server_per_host} participant and {self.moderator_per_host} "
                f"moderator servers would end at port {last_port}; the last one there is, is 65535"
            )
        if not self.hosts or len({host.lower() for host in self.hosts}) < len(self.hosts):
            raise SettingsError(f"--hosts {' '.join(self.hosts)}: must name at least one host, and none twice")
        if "localhost" in self.hosts and len(self.hosts) > 1:
            raise SettingsError(
                f"--hosts {' '.join(self.hosts)}: localhost is another machine on each of them; name all hosts as they "
                "reach each other"
            )
        if self.vllm_base_port + self.model_per_host - 1 > 65_535:
            raise SettingsError(
                f"--vllm-base-port {self.vllm_base_port}: {self.model_per_host} models would end beyond port 65535"
            )
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.winner and self.participant is not None:
            raise SettingsError(f"--winner: does not go with --participant {self.participant}")
        nobody = self.participant is None and not self.winner
        if self.role == "ask" and (self.run_dir is None or nobody or not (self.text or "").strip()):
            raise SettingsError("--role ask: give --run-dir, --text, and --participant or --winner")
        servers = len(self.hosts) * self.server_per_host
        if self.min_servers is not None and self.min_servers > servers and self.resume is None:
            raise SettingsError(f"--min-servers {self.min_servers}: there are {servers} participant servers")
        if self.experiment is not None and self.resume is not None:
            raise SettingsError("--experiment: does not go with --resume")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as stored in a run folder; paths inside the checkout are relative, as it may be moved."""
        said = asdict(self)
        paths = {name: _from_root(said[name]) for name in PATHS if said[name] is not None}
        folders = filter(None, (said["extra_pythonpath"] or "").split(":"))
        return said | paths | {"extra_pythonpath": ":".join(map(_from_root, folders)) or None}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> SimulationConfig:
        """Return settings stored by `to_json`. Raises KeyError, TypeError or SettingsError if they are malformed."""
        for name in said.keys() & KINDS.keys() - {"hosts"}:
            kinds = typing.get_args(KINDS[name]) if isinstance(KINDS[name], UnionType) else (KINDS[name],)
            if type(said[name]) not in (*kinds, *([int] if float in kinds else [])):
                raise TypeError(f"{name} is no {KINDS[name]}")
        if not all(isinstance(host, str) for host in said["hosts"]):
            raise TypeError("hosts are no texts")
        moved_from = _root_of(said)
        paths = {name: _from_here(said[name], moved_from) for name in PATHS if said.get(name) is not None}
        folders = (said.get("extra_pythonpath") or "").split(":")
        extra = ":".join(_from_here(each, moved_from) for each in folders if each) or None
        return cls(**{**said, **paths, "extra_pythonpath": extra, "hosts": tuple(said["hosts"])})

    @property
    def ports(self) -> range:
        """Return the ports of one host: participant servers first, then moderator servers."""
        return range(self.base_port, self.base_port + self.server_per_host + self.moderator_per_host)


KINDS = typing.get_type_hints(SimulationConfig)
PATHS = tuple(item.name for item in fields(SimulationConfig) if item.metadata["path"])
DEFAULT_PATHS = {  # relative to the checkout
    item.name: Path(item.default).relative_to(ROOT)
    for item in fields(SimulationConfig)
    if item.metadata["path"] and isinstance(item.default, str)
}


# --- Paths -----------------------------------------------------------------------------------------------------------


def _from_root(path: str) -> str:
    """Return a path as stored: relative if it is inside the checkout, as given or with links resolved."""
    for form in (Path(path), Path(os.path.realpath(path))):
        if form.is_relative_to(ROOT) and ".." not in form.parts:
            return str(form.relative_to(ROOT))
    return path


def _from_here(path: str, moved_from: Path | None) -> str:
    """Return the absolute form of a stored path; a path inside `moved_from` is mapped to this checkout."""
    if moved_from is not None and Path(path).is_relative_to(moved_from):
        path = str(Path(path).relative_to(moved_from))
    return str(ROOT / path)


def _root_of(said: Mapping[str, Any]) -> Path | None:
    """Return the checkout in which an earlier version stored absolute paths; None if a path is relative.

    It is the most frequent prefix of the paths that end like their defaults.
    """
    paths = {name: Path(said[name]) for name in DEFAULT_PATHS if name in said}
    if not all(path.is_absolute() for path in paths.values()):
        return None
    roots = Counter[Path]()
    for name, path in paths.items():
        end = DEFAULT_PATHS[name].parts
        if path.parts[-len(end) :] == end:
            roots[Path(*path.parts[: -len(end)])] += 1
    return max(roots, key=lambda root: roots[root], default=None)


# --- Values ----------------------------------------------------------------------------------------------------------


def check(flag: str, value: Any, allowed: Any) -> None:
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


def whole_number(flag: str, text: str) -> int:
    """Parse an integer from the command line. Raises SettingsError."""
    try:
        return int(text)
    except ValueError:
        raise SettingsError(f"{flag} {text!r}: must be a whole number, in digits such as 1000") from None


def real_number(flag: str, text: str) -> float:
    """Parse a number such as 0.5. Raises SettingsError."""
    try:
        return float(text)
    except ValueError:
        raise SettingsError(f"{flag} {text!r}: must be a number, such as 0.5") from None


def fraction(flag: str, text: str, low: Fraction, high: float) -> Fraction:
    """Parse an exact number such as 2/3 or 0.51, with a denominator of at most 10^9. Raises SettingsError."""
    text = str(text)
    try:
        if not FRACTION.fullmatch(text):  # an exponent could expand to more digits than fit in memory
            raise ValueError
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise SettingsError(f"{flag} {text}: must be a number such as 2/3 or 0.51") from None
    if value.denominator > FINEST:
        raise SettingsError(f"{flag} {text}: is finer than can be counted with; write a fraction such as 2/3")
    if not low <= value <= high:
        raise SettingsError(
            f"{flag} {text}: must be from {low} to {as_written(high)}, as a fraction such as 2/3 or as 0.51"
        )
    return value
