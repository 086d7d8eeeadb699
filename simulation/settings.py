"""All settings. Each setting is declared once, with its type, default, range, help text and roles.

The flags, their help, the keys of experiment files and `config` in summary.json are derived from these declarations.
Every value is checked before anything starts.
"""

import itertools
import json
import os
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from simulation.errors import SettingsError, meant_by, nearest, printable
from simulation.files import CONFIGS, HOME, from_root, full_path, names_file, real, shown, to_root

DASHBOARD_PORT = 8050
LAST_PORT = 65_535
FRACTION = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20}|/0*[1-9][0-9]{0,19})?")
FINEST = 10**9  # largest denominator of a fraction
OF_SET = "set."  # prefix of the names of parameters (see --set) where they stand beside settings
FLAGS_OF_GAMES = ("ratio", "offset")  # parameters of games that have flags of their own
KIND_OF_PLAYER = re.compile(
    r"random|surrogate:(?P<run>.+)|(?:llm:)?(?P<agent_class>.+\.(?:py|pkl)(?::[^:]+)?)|llm(?::(?P<model>.+))?",
    re.DOTALL,
)
KEEP_TEXTS = re.compile(r"auto|all|none|[1-9][0-9]{0,8}")
KINDS_OF_PLAYERS = ("random", "llm", "llm:MODEL", "FILE.py:CLASS", "surrogate:RUN")
NEXT_KIND = re.compile(r"\s*(random\b|llm\b|surrogate:|/|[^=]*\.(py|pkl))")
SHARE = re.compile(rf"=\s*({FRACTION.pattern})\s*(?:,|$)")
MOST_KINDS = 100  # fewer than 256: a group stores the kind of a participant in one byte
COMMAS_FROM = 100_000  # smaller numbers, such as ports, are shown without commas
ROLES = {
    "main": "play the game",
    "participant": "start, stop or show the agent servers of this host",
    "ask": "question one participant of a run that kept its agents",
    "report": "show a finished run again, or compare several",
    "control": "show a run in progress, pause it, stop it, or change its settings",
    "verify": "ask each round of a run again, and compare the answers",
    "vllm": "start, stop or show the vLLM servers of this host",
}
DATA_FILES = (".yaml", ".yml")  # endings of files with figures of people; other values of --compare-with are names
SERVERS = ("main", "participant", "verify")  # roles that use the settings of agent servers
MODELS = ("main", "participant", "verify", "vllm")  # roles that use the settings of models


@dataclass(frozen=True)
class Setting:
    """The declaration of a setting."""

    default: Any
    about: str  # description, with the unit
    low: float | None = None  # None: any value is allowed
    high: float = 0
    choices: tuple[str, ...] = ()
    without: str = ""  # text that the help shows instead of the default value
    roles: tuple[str, ...] = ("main",)  # the roles that use this setting
    group: str = ""  # title of the help section that this setting starts
    game: bool = False  # whether an experiment file may contain this setting
    fixed_on_resume: bool = False
    path: bool = False  # whether the value is a path, or has paths in it, which become absolute (see full_path)

    def check(self, flag: str, value: Any) -> None:
        """Raise SettingsError unless the value is in the range and among the choices. None is in every range."""
        if self.choices and value not in self.choices:
            guess = f"; {meant_by(str(value), self.choices)}".rstrip("; ")
            raise SettingsError(f"{flag} {value}: must be one of {', '.join(self.choices)}{guess}")
        if self.low is not None and value is not None and not self.low <= value <= self.high:
            raise SettingsError(f"{flag} {value}: must be from {as_written(self.low)} to {as_written(self.high)}")

    @property
    def help(self) -> str:
        """Return the help text: description, range and default."""
        default = self.without or ("off" if self.default is False else self.default)
        default = as_written(default) if isinstance(default, int | float) else default
        bounds = f"; from {as_written(self.low)} to {as_written(self.high)}" if self.low is not None else ""
        return f"{self.about}{bounds} (default: {from_root(default) if self.path and default else default or 'none'})"


def setting(*declaration: Any, **options: Any) -> Any:
    """Return a dataclass field whose metadata contains a Setting with the given arguments."""
    return field(default=declaration[0], metadata={"setting": Setting(*declaration, **options)})


rule = partial(setting, game=True, fixed_on_resume=True)  # a rule of the game: a resumed run cannot change it


@dataclass(frozen=True)
class SimulationConfig:
    """The settings of one command. The constructor raises SettingsError, with flag and range, if a value is invalid."""

    role: str = setting("main", "; ".join(map(": ".join, ROLES.items())), choices=tuple(ROLES), roles=tuple(ROLES))
    dry_run: bool = setting(False, "print what would be done and cost, and start nothing", roles=("main", "vllm"))

    experiment: str | None = setting(None, "YAML file of settings; a list runs a sweep", path=True, group="the game")
    agent_type: str = rule("random", "random numbers or a language model", choices=("random", "llm"), roles=SERVERS)
    agent_class: str | None = rule(None, "your own participant, as my_file.py or my_file.py:MyParticipant", path=True)
    players: str | None = rule(None, "shares of kinds of players, as llm=1/5,my_file.py:MyParticipant=4/5", path=True)
    game: str = rule("average", "the game: one in games/, or your own as my_file.py:MyGame", path=True)
    set: tuple[str, ...] = rule((), "parameter of the game or of your own participant, as name=value; repeatable")
    extra_pythonpath: str | None = setting(None, "more import folders, separated by colons", roles=SERVERS, path=True)
    participant_num: int = rule(1000, "number of participants", 1, 10**9)
    max_value: int = rule(100, "upper bound of the numbers, which start at 0", 1, 10**9)
    decimals: int = rule(0, "decimal places of the numbers", 0, 6)
    rounds: int = setting(1, "number of rounds", 1, 100, game=True)
    until_converged: float | None = setting(
        None, "end when mean and median moved less than this in each of the last two rounds", 0, 10**9, game=True
    )
    repeats: int = setting(1, "number of times to play each game, each time with another seed", 1, 1000, game=True)
    ratio: str | None = rule(None, "short for --set ratio=X, such as 2/3 or 0.51", without="that of the game")
    offset: str | None = rule(None, "short for --set offset=X, such as 5, or 1/2", without="that of the game")
    sleep_time: float = setting(1.0, "think time of a random participant, in seconds", 0, 86_400, game=True)
    seed: int | None = rule(None, "seed of random draws, to repeat a game", 0, 2**64 - 1, without="drawn, and printed")
    prompt: str = rule("basic", "prompt of LLM participants: a name in the prompts file")
    personas: str | None = rule(None, "set of personas in the personas file, or several: education+occupation")
    models: str | None = rule(None, "shares of models, as model_1=2/3,model_2=1/3", without="all of a host in turn")
    teams: str | None = rule(None, "teams, whose averages are announced too: a set of personas, or model")
    prompts_file: str = rule(f"{CONFIGS}/prompts.yaml", "prompts, in YAML", path=True)
    personas_file: str = rule(f"{CONFIGS}/personas.yaml", "personas, in YAML", path=True)
    compare_with: str | None = setting(
        None,
        "figures of people for the report: a name in configs/human, your own YAML file, or none",
        without="all of this game",
        roles=("main", "report"),
        game=True,
        path=True,
    )
    dispatch: str = setting(
        "group", "ask participants in groups, or each through its AgentScope proxy", choices=("group", "agent")
    )

    hosts: tuple[str, ...] = setting(
        ("localhost",), "hosts of the agent servers", without="localhost", roles=SERVERS, group="the cluster"
    )
    host_name: str = setting("localhost", "name of this host, as other hosts reach it", roles=("participant",))
    base_port: int = setting(12330, "first port of the agent servers on each host", 1, LAST_PORT, roles=SERVERS)
    server_per_host: int = setting(10, "participant servers per host", 1, 4096, roles=SERVERS)
    moderator_per_host: int = setting(4, "moderator servers per host, on the next ports", 1, 4096, roles=SERVERS)
    cluster_key_dir: str = setting(f"{HOME}/.cluster", "folder of the cluster key", roles=(*SERVERS, "ask"), path=True)
    connect_timeout: float = setting(5.0, "seconds to wait for all agent servers to answer", 0.1, 3600, roles=SERVERS)
    heartbeat_timeout: float = setting(10.0, "seconds without a heartbeat until a server is dropped", 0.5, 3600)
    min_servers: int | None = setting(None, "end the game when fewer participant servers are left", 1, 10**6)
    lease: float = setting(60.0, "seconds without contact until a server deletes the agents of a run", 2, 86_400)
    reply_threads: int = setting(32, "threads per agent server for participants with a blocking reply", 1, 1024)

    model_per_host: int = setting(
        None, "model servers per host", 1, 1024, without="set by start_vllm.sh", roles=SERVERS, group="LLM participants"
    )
    model_configs: str = setting(
        f"{CONFIGS}/model_configs.json", "the models, in AgentScope's format", roles=MODELS, path=True
    )
    allow_remote_model: bool = setting(False, "allow models outside the cluster's hosts, which may cost money")
    structured_output: str = setting(
        "structured_outputs",
        "how answers are constrained to numbers in range: by vLLM's field, by the OpenAI API's field, or not at all",
        choices=("structured_outputs", "response_format", "none"),
        game=True,
    )
    samples_per_request: int = setting(100, "maximum answers per request (n), for equal prompts", 1, 10_000, game=True)
    max_attempts: int = setting(3, "attempts per participant to get a valid number", 1, 100, game=True)
    max_in_flight: int | None = setting(
        None, "concurrent requests per model and host", 1, 10**6, without="enough for 512 answers"
    )
    replay: str | None = setting(
        None, "folder of a run: take its recorded answers where model, sampling and prompt are the same", path=True
    )
    offline: bool = setting(False, "send no requests to models: answers that --replay does not give are failures")
    keep_texts: str = setting(
        "auto",
        "what models write is kept: all, none, or a number of participants per round",
        without="auto: all up to 100,000 answers, else 1,000 participants",
        game=True,
    )
    attempt_timeout: float = setting(300.0, "time limit of one request, in seconds", 0.1, 86_400)
    reply_timeout: float = setting(600.0, "seconds to retry requests that a model does not answer", 0.1, 864_000)
    max_tokens: int | None = setting(None, "token budget of the game, for prompts and answers", 1, 10**15, game=True)
    price_per_million_tokens: float | None = setting(None, "price of 1,000,000 tokens, for the estimate", 0, 10**9)

    vllm_base_port: int = setting(8010, "first port of vLLM servers", 1, LAST_PORT, roles=MODELS, group="vLLM servers")
    gpu_num: int | None = setting(None, "GPUs to use; 0: one server on the CPU", 0, 1024, roles=MODELS, without="all")
    tensor_parallel: int = setting(1, "GPUs per vLLM server", 1, 1024, roles=MODELS)
    model_path: str | None = setting(None, "folder of the model, or its name on a hub; required", roles=("vllm",))
    repeatable: bool = setting(False, "serve so that games with the same seed repeat; slower", roles=("vllm",))

    resume: str | None = setting(None, "folder of a run or experiment to continue", path=True, group="the results")
    run_dir: str | None = setting(
        None,
        "folder of a run or comparison",
        without="a new one in runs/; for --role control runs/latest",
        roles=("main", "ask", "report", "control"),
        path=True,
    )
    trust: bool = setting(False, "count again with the code of games kept in run folders", roles=("report",))
    keep_going: bool = setting(False, "continue after a round in which every participant failed", game=True)
    payoffs: bool = setting(False, "add payoff and won to answers.parquet, as in games other than average", game=True)
    csv: bool = setting(False, "write answers.csv, too", roles=("report",))
    all_runs: bool = setting(False, "also show single runs where repeats are compared", roles=("main", "report"))
    quiet: bool = setting(False, "print only results, warnings and errors")
    json: bool = setting(
        False, "print only JSON: summary.json, or an array of several", roles=("main", "report", "control")
    )
    keep_agents: bool = setting(False, "leave the agents on their servers, for --role ask")
    dashboard: int | None = setting(None, f"live status page (port {DASHBOARD_PORT} unless given)", 0, LAST_PORT)
    metrics: int | None = setting(None, "serve metrics for Prometheus on this port (0: a free one)", 0, LAST_PORT)
    hook: str | None = setting(None, "your class to call at each round, as my_hook.py:MyHook", path=True)

    participant: int | None = setting(None, "participant to question", 0, 10**9, roles=("ask",), group="a question")
    winner: bool = setting(False, "question the first winner of the last round", roles=("ask",))
    text: str | None = setting(None, "the question; required", roles=("ask",))

    def __post_init__(self) -> None:

        def full(name: str, path: str) -> str:
            found = full_path(flag_of(name), path)
            return str(real(found)) if name == "players" else found  # runs/latest will be another run

        changed = with_paths(vars(self), full)
        changed["model_per_host"] = 1 if self.model_per_host is None else self.model_per_host
        changed["set"] = tuple(each for each in self.set if each.partition("=")[0].strip() not in FLAGS_OF_GAMES)
        for name in FLAGS_OF_GAMES:
            texts = [each.partition("=")[2].strip() for each in self.set if each.partition("=")[0].strip() == name]
            texts = [text for text in (getattr(self, name), *texts) if text is not None]
            values = {str(fraction(flag_of(name), text, Fraction(-(10**9)), 10**9)) for text in texts}
            if len(values) > 1:
                raise SettingsError(f"{flag_of(name)}: is given as {' and as '.join(sorted(values))}")
            changed[name] = values.pop() if values else None
        for name, value in changed.items():
            object.__setattr__(self, name, value)  # because the class is frozen
        for name, declared in SETTINGS.items():
            declared.check(flag_of(name), getattr(self, name))
        self._check_combinations()

    def _check_combinations(self) -> None:
        agents = f"{self.server_per_host} participant and {self.moderator_per_host} moderator servers"
        ends = {f"--base-port {self.base_port}: {agents}": self.ports[-1]}
        ends[f"--vllm-base-port {self.vllm_base_port}: vLLM servers"] = self.vllm_base_port + self.model_per_host - 1
        for servers_from, end in ends.items():
            if end > LAST_PORT:
                raise SettingsError(f"{servers_from} would end at port {end}, beyond port {LAST_PORT}")
        hosts = f"--hosts {' '.join(self.hosts)}"
        if not self.hosts or len({host.lower() for host in self.hosts}) < len(self.hosts):
            raise SettingsError(f"{hosts}: must name at least one host, and none twice")
        if "localhost" in self.hosts and len(self.hosts) > 1:
            raise SettingsError(f"{hosts}: localhost is another machine on each of them; use names that all can reach")
        servers = len(self.hosts) * self.server_per_host
        if self.min_servers is not None and self.min_servers > servers and self.resume is None:
            raise SettingsError(f"--min-servers {self.min_servers}: there are {servers} participant servers")
        if not KEEP_TEXTS.fullmatch(self.keep_texts):
            allowed = "all, none, auto, or a number of participants from 1 to 999,999,999"
            raise SettingsError(f"--keep-texts {printable(self.keep_texts)}: must be {allowed}")
        if self.players is not None:
            parse_players(self.players)  # again: two paths may name the same file
        if self.winner and self.participant is not None:
            raise SettingsError(f"--winner: does not go with --participant {self.participant}")
        asks_somebody = self.winner or self.participant is not None
        if self.role == "ask" and not (self.run_dir and asks_somebody and (self.text or "").strip()):
            raise SettingsError("--role ask: give --run-dir, --text, and --participant or --winner")
        if self.offline and self.replay is None:
            raise SettingsError("--offline: give --replay, the folder of the run whose answers are taken")
        if self.experiment is not None and self.resume is not None:
            raise SettingsError("--experiment: does not go with --resume")

    def to_json(self) -> dict[str, Any]:
        """Return the settings for a run folder. Make paths inside the checkout relative, because it can be moved."""
        values = {name: _from_text(value) for name, _, value in (each.partition("=") for each in self.set)}
        return asdict(self) | with_paths(vars(self), lambda _name, path: from_root(path)) | {"set": values}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SimulationConfig":
        """Convert `to_json` output to settings. Raises KeyError, TypeError or SettingsError if `data` is malformed."""
        assigned = data.get("set", {}).items()  # absent in old runs
        texts = (f"{name}={each if isinstance(each, str) else json.dumps(each)}" for name, each in assigned)
        data = {**data, "set": tuple(texts)}
        for name in data.keys() & KINDS.keys():
            kinds = {*KINDS[name], int} if float in KINDS[name] else {*KINDS[name]}
            if not {type(value) for value in (data[name] if ... in KINDS[name] else [data[name]])} <= kinds:
                raise TypeError(f"{name} has a value of another type")
        moved_from = f"{_checkout_of(data)}/"
        paths = with_paths(data, lambda _name, path: str(to_root(f"{path}/".removeprefix(moved_from))))
        return cls(**{**data, **paths, "hosts": tuple(data["hosts"])})

    def value_of(self, name: str) -> Any:
        """Return the value of a setting, or the text of the parameter NAME if `name` is `set.NAME` (None: not set)."""
        if not name.startswith(OF_SET):
            return getattr(self, name)
        return {key: text for key, _, text in (each.partition("=") for each in self.set)}.get(name.removeprefix(OF_SET))

    @staticmethod
    def check_who_plays(given: Collection[str]) -> None:
        """Raise SettingsError if the settings `given` say twice who plays."""
        for name in ("agent_type", "agent_class"):
            if "players" in given and name in given:
                raise SettingsError(f"--players: does not go with {flag_of(name)}; players alone says who plays")

    @property
    def kinds(self) -> tuple["Kind", ...]:
        """Return the kinds of players."""
        if self.players is not None:
            return parse_players(self.players)
        if self.agent_class is None:
            return (Kind.of("--agent-type", self.agent_type),)
        if not KIND_OF_PLAYER.fullmatch(self.agent_class):  # an absolute path, so it can match a class only
            raise SettingsError(f"--agent-class {shown(self.agent_class)}: write it as my_file.py:MyParticipant")
        return (Kind.of("--agent-class", "llm:" * (self.agent_type == "llm") + self.agent_class),)

    @property
    def who_flag(self) -> str:
        """Return the flag that says who plays."""
        return "--players" if self.players is not None else "--agent-class" if self.agent_class else "--agent-type"

    @property
    def uses_models(self) -> bool:
        """Return whether any participant asks a language model."""
        return any(kind.asks_models for kind in self.kinds)

    @property
    def ports(self) -> range:
        """Return the ports of one host: first the ports of participant servers, then those of moderator servers."""
        return range(self.base_port, self.base_port + self.server_per_host + self.moderator_per_host)


SETTINGS: dict[str, Setting] = {item.name: item.metadata["setting"] for item in fields(SimulationConfig)}
KINDS: dict[str, tuple[Any, ...]] = {  # the types of each setting, such as (int, NoneType)
    name: typing.get_args(kind) or (kind,) for name, kind in typing.get_type_hints(SimulationConfig).items()
}


def with_paths(values: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """Return only those settings in `values` that contain paths, with each path replaced by `change(name, path)`."""
    found = {name: values.get(name) for name, each in SETTINGS.items() if each.path}
    return {name: moved(name, value, partial(change, name)) for name, value in found.items() if value is not None}


def moved(name: str, value: str, change: Callable[[str], str]) -> str:
    """Return the value of the setting `name`, with each path in it replaced by `change(path)`."""
    if name == "players":
        paths = [(kind, kind.run or kind.agent_class or "") for kind in parse_players(value)]
        return ",".join(f"{kind.text.removesuffix(path)}{path and change(path)}={kind.share}" for kind, path in paths)
    if name == "extra_pythonpath":
        return ":".join(change(each) for each in value.split(":") if each)
    is_file = {"game": names_file(value), "compare_with": value.endswith(DATA_FILES)}  # else a name in the program
    return change(value) if is_file.get(name, True) else value


class Kind(NamedTuple):
    """A kind of player, as in KINDS_OF_PLAYERS; `llm:FILE.py:CLASS` is a class of the user that asks models."""

    text: str
    share: Fraction
    run: str | None = None  # the folder of the run whose answers surrogates draw from
    agent_class: str | None = None  # the user's class
    model: str | None = None  # the model that these players ask, if the kind names one

    @classmethod
    def of(cls, flag: str, text: str) -> "Kind":
        match = KIND_OF_PLAYER.fullmatch(text)
        if match is None:
            raise SettingsError(f"{flag}: {printable(text)!r} is no kind of player; {nearest(text, KINDS_OF_PLAYERS)}")
        return cls(text, Fraction(1), **match.groupdict())

    @property
    def asks_models(self) -> bool:
        return self.text.partition(":")[0] == "llm"

    @property
    def label(self) -> str:
        """Return a short name, such as `LevelK`, `llm` or `surrogate`."""
        path = Path(self.agent_class or "").name
        _, of_class, name = path.rpartition(":")
        return "surrogate" if self.run else name if of_class else path or self.text

    def named(self, parts: int) -> str:
        """Return the kind with the last `parts` parts of its path, such as `surrogate:recorded`; 0: its label."""
        path = self.run or self.agent_class or ""
        return self.text.removesuffix(path) + "/".join(Path(path).parts[-parts:]) if parts else self.label


def labels_of(kinds: Sequence[Kind]) -> list[str]:
    """Return a label for each kind of player, all different and as short as possible."""
    forms = ([kind.named(parts) for kind in kinds] for parts in itertools.count())
    return next(labels for labels in forms if len({*labels}) == len(labels))


def players_text(players: str) -> str:
    """Return shares of kinds of players without the folders of files and runs, as in `P=1/2,surrogate:recorded=1/2`."""
    return ",".join(f"{kind.named(1) if kind.run else kind.label}={kind.share}" for kind in parse_players(players))


def parse_players(text: str) -> tuple[Kind, ...]:
    """Return the kinds in shares such as `llm=1/5,random=4/5`. A single kind needs no share. Raises SettingsError."""
    flag, named, start = f"--players {printable(text)}", list[tuple[str, str]](), 0
    run = text.strip().removeprefix("surrogate:")
    if run != text.strip() and os.path.isdir(run):  # noqa: PTH112 - raises nothing; a folder such as `x,repeat=1`
        named, start = [(text.strip(), "1")], len(text)
    for match in SHARE.finditer(text, start):  # a path may contain commas and equals signs, too
        name, follows = text[start : match.start()].strip(), text[match.end() :]
        is_kind = KIND_OF_PLAYER.fullmatch(name) and not name.startswith("surrogate:")  # the run may be longer
        if is_kind or not follows or NEXT_KIND.match(follows):
            named.append((name, match[1]))
            start = match.end()
    if (rest := text[start:].strip()) or text.endswith(",") or not named:  # a kind that has no share, or is no kind
        name, equals, share = map(str.strip, rest.rpartition("="))
        if not equals or (not named and name not in KINDS_OF_PLAYERS and not FRACTION.fullmatch(share)):
            name, share = rest, "" if named else "1"
        named.append((name, share))
    kinds = [Kind.of(flag, name) for name, _ in named]
    if len(kinds) > MOST_KINDS:
        raise SettingsError(f"{flag}: has {len(kinds)} kinds of players; the maximum is {MOST_KINDS}")
    shares = parse_shares(flag, named)
    return tuple(kind._replace(share=shares[kind.text]) for kind in kinds)


def parse_shares(flag: str, parts: Iterable[tuple[str, str]]) -> dict[str, Fraction]:
    """Return the exact shares by name. Raises SettingsError unless all names differ and the shares add up to 1."""
    shares: dict[str, Fraction] = {}
    for name, share in parts:
        if name in shares:
            raise SettingsError(f"{flag}: names {printable(name)} twice")
        shares[name] = share_in(f"{flag}: the share of {printable(name)},", share)
    if (total := sum(shares.values())) != 1:
        raise SettingsError(f"{flag}: the shares add up to {total}; they must add up to exactly 1")
    return shares


def _from_text(text: str) -> Any:
    """Return the number or truth value that `text` is in JSON; otherwise `text` itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) else text


def _checkout_of(data: Mapping[str, Any]) -> str:
    """Guess the checkout that saved `data` from its paths of default files. If any is relative, return HOME."""
    defaults = {name: each.default for name, each in SETTINGS.items() if each.path and "/" in str(each.default)}
    paths = {f"/{from_root(path)}": data[name] for name, path in defaults.items() if name in data}
    roots = [path.removesuffix(end) for end, path in paths.items() if path.endswith(end)]
    is_old = all(path.startswith("/") for path in paths.values())
    return max(roots, key=roots.count, default=str(HOME)) if is_old else str(HOME)


def as_written(number: float) -> str:
    """Return a number as shown to users: with commas from COMMAS_FROM on, such as 1000, 0.1 or 1,000,000."""
    number = int(number) if number == int(number) else number
    return f"{number:,}" if abs(number) >= COMMAS_FROM else str(number)


def flag_of(name: str) -> str:
    """Return the flag of a setting, such as `--max-value` for `max_value`."""
    return "--" + name.replace("_", "-")


def to_number(kind: type, flag: str, text: str) -> Any:
    """Parse a number of type `kind` (int or float) from the command line. Raises SettingsError if `text` is invalid."""
    try:
        return kind(text)
    except ValueError:
        form = "a whole number, in digits such as 1000" if kind is int else "a number, such as 0.5"
        raise SettingsError(f"{flag} {text!r}: must be {form}") from None


def fraction(flag: str, text: str, low: Fraction, high: float) -> Fraction:
    """Parse an exact number such as 2/3 or 0.51. Raises SettingsError if it is invalid or outside `low` .. `high`."""
    text = str(text)
    if not FRACTION.fullmatch(text):  # an exponent could expand to more digits than fit in memory
        raise SettingsError(f"{flag} {text}: must be a number such as 2/3 or 0.51")
    value = Fraction(text)
    if value.denominator > FINEST or not low <= value <= high:
        bounds = f"from {low} to {as_written(high)}, as a fraction such as 2/3 or as 0.51"
        raise SettingsError(f"{flag} {text}: must be {bounds}, with a denominator of at most {FINEST:,}")
    return value


share_in = partial(fraction, low=Fraction(1, FINEST), high=1)
