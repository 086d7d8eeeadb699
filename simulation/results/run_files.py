"""The JSON files of a run folder: their schemas, and functions that build, read and validate their content."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar, get_args

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from simulation.errors import SettingsError, printable, reason
from simulation.files import is_there, names_file, read_text
from simulation.game.game import Game, PromptTemplate, Rules
from simulation.game.human import HumanData
from simulation.game.population import ModelShare, Persona, PlayerShare, Population
from simulation.game.rules import game_fields, game_of
from simulation.game.tally import INTERRUPTED, NUMBERS_NAMED, OTHER_CAUSES, RoundResult
from simulation.llm.responses import OUT_OF_TOKENS, Usage
from simulation.settings import SimulationConfig

CAUSES_SHOWN = 20
# Raised for a file that is not text or not JSON, is nested too deeply, or has wrong types, keys or numbers
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
SHAPE = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
Seconds = Annotated[int | float, Field(ge=0, le=1e12)]
Printable = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
LLMCounts = Literal["requests", "prompt_tokens", "completion_tokens", "retries", "replayed"]
TimesKeys = Literal["round", "model_s", "client_s", "rpc_s", "slowest_s"]
T = TypeVar("T")


def read_run_file(path: Path, name: str, parse: Callable[[str], T], flag: str = "") -> T:
    """Parse the file `name` in `path`. If it is missing or damaged, raise a SettingsError that starts with `flag`."""
    try:
        return parse(read_text(path / name))
    except OSError as error:
        raise SettingsError(f"{flag}{path}: cannot read its {name}: {reason(error)}") from None
    except (SettingsError, *DAMAGED) as error:
        detail = f": {error}" if isinstance(error, SettingsError) else ""
        raise SettingsError(f"{flag}{path}: its {name} is damaged, or of another version{detail}") from None


@with_config(SHAPE)
class SweepPosition(TypedDict):
    """The position of a run in its experiment."""

    sweep_id: str
    experiment: str  # a file name
    run: int  # from 1 to `runs`
    runs: int
    about: NotRequired[str]  # what the experiment is about, if its file states it


def position_in_words(position: SweepPosition) -> str:
    """Return the position as text, such as `run 2 of 4 of x.yaml`."""
    return f"run {position['run']} of {position['runs']} of {printable(position['experiment'])}"


class SourceEntry(TypedDict):
    """A file of the user's that a run uses, and its copy in the run folder."""

    name: str  # of the copy, in source/
    file: str  # relative to the checkout, or absolute
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


SOURCES: TypeAdapter[list[SourceEntry]] = TypeAdapter(list[SourceEntry])
# The analysis of a round (see `Game.analyses`)
Figure = int | float | str | None
Analysis = dict[str, Figure | dict[str, Figure | dict[str, Figure]]]
# How many texts are kept, and how many of them could not be encoded as they were
TextsEntry = Annotated[dict[Literal["kept", "replaced"], int], Field(min_length=2)]


class WinnersEntry(TypedDict):
    count: int
    participants: list[Annotated[str, Field(pattern=r"^P[0-9]{1,10}$")]]


class RoundEntry(TypedDict):
    round: int
    asked: int
    answered: int
    failed: int
    failures: dict[str, int]
    ended: NotRequired[Literal["complete", "model_failed", "out_of_tokens", "interrupted"]]  # absent in old runs
    error: NotRequired[str]  # why the game could not compute the outcome
    reassigned: int
    average: float | None
    median: float | None
    std: float | None
    min: float | None
    max: float | None
    outcome: NotRequired[dict[str, int | float | None]]  # absent in old runs
    analysis: NotRequired[Analysis]  # absent in old runs, and where the game has none
    winning_number: float | None
    winning_answers: NotRequired[list[int | float]]  # the lowest ones; absent in old runs
    winners: WinnersEntry
    texts: NotRequired[TextsEntry]  # absent if no texts of models were to be kept
    seconds: Seconds


class ClusterEntry(TypedDict):
    hosts: list[str]
    servers: int
    moderators: int
    lost: list[str]
    times: list[Annotated[dict[TimesKeys, Seconds], Field(min_length=5)]]
    llm_seconds: NotRequired[Annotated[dict[Literal["model", "client", "rpc"], Seconds], Field(min_length=3)]]


@with_config(SHAPE)
class Summary(TypedDict):
    """The content of summary.json."""

    run_id: str
    part_of: NotRequired[SweepPosition]
    status: Literal["complete", "partial", "interrupted", "failed"]
    converged_after: NotRequired[int]  # the number of rounds, if --until-converged ended the game
    about: NotRequired[Printable]  # what the experiment file states about its only run
    started: NotRequired[Printable]  # in ISO 8601; old runs have neither this nor the next keys
    program: NotRequired[Annotated[dict[Literal["version", "code", "git"], Printable | None], Field(min_length=3)]]
    python: NotRequired[Printable]
    packages: NotRequired[dict[str, str | None]]
    resumed: NotRequired[list[dict[str, Any]]]  # rounds from which on another program or another Python was used
    sources: NotRequired[list[SourceEntry]]
    model_settings: NotRequired[str | None]  # a SHA-256
    repeatable: NotRequired[bool]  # whether the answers of models had seeds that their servers repeat
    config: dict[str, Any]
    cluster: ClusterEntry
    seconds: Annotated[dict[Literal["connect", "create", "rounds", "total"], Seconds], Field(min_length=4)]
    waited: NotRequired[Seconds]  # the time from the command to the end, with the start of servers; not in old runs
    rounds: list[RoundEntry]
    texts: NotRequired[TextsEntry]  # of all rounds; absent in old runs and without models
    llm: Annotated[dict[LLMCounts, int], Field(min_length=4)] | None


@with_config(SHAPE)
class AnalysedRound(TypedDict):
    round: int
    by: dict[str, dict[str, Analysis]]


@with_config(SHAPE)
class AnalysisFile(TypedDict):
    rounds: list[AnalysedRound]


POSITION, ANALYSIS_FILE = TypeAdapter(SweepPosition), TypeAdapter(AnalysisFile)
SUMMARY: TypeAdapter[Any] = TypeAdapter(Summary)


def parse_summary(text: str) -> tuple[SimulationConfig, dict[str, Any]]:
    """Return settings and content of a summary.json, new or old. Raises SettingsError or an error in DAMAGED."""
    summary = SUMMARY.validate_python(json.loads(text))
    if [entry["round"] for entry in summary["rounds"]] != list(range(1, len(summary["rounds"]) + 1)):
        raise ValueError("its rounds are not 1, 2, ...")
    by_cause = {INTERRUPTED: "interrupted", OUT_OF_TOKENS: "out_of_tokens"}
    for entry in summary["rounds"]:
        entry.setdefault("outcome", {"average": entry["average"], "winning_number": entry["winning_number"]})
        entry.setdefault("ended", next((by_cause[each] for each in by_cause if each in entry["failures"]), "complete"))
    return SimulationConfig.from_json(summary["config"]), summary


def summarise(
    config: SimulationConfig,
    run_id: str,
    status: str,
    cluster: dict[str, Any],
    seconds: dict[str, float],
    rounds: list[RoundResult],
    usage: Usage,
    position: SweepPosition | None = None,
) -> dict[str, Any]:
    """Return the content of summary.json. `status` is one of the values that `Summary` allows."""
    llm, texts = config.uses_models, [each.texts for each in rounds if each.texts]
    rpc_s = seconds["rounds"] - usage.answering_s  # `answering_s` and `client_s` are times of the slowest group
    llm_s = {"model": usage.answering_s - usage.client_s, "client": usage.client_s, "rpc": rpc_s}
    llm_seconds = {"llm_seconds": {name: round(max(value, 0.0), 4) for name, value in llm_s.items()}}
    counts = [each for each in get_args(LLMCounts) if each != "replayed" or config.replay is not None or usage.replayed]
    return {
        "run_id": run_id,
        **({"part_of": position} if position is not None else {}),
        "status": status,
        "config": config.to_json(),
        "cluster": cluster | (llm_seconds if llm else {}),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "rounds": [round_entry(result, 10**config.decimals) for result in rounds],
        **(
            {"texts": {"kept": sum(each[0] for each in texts), "replaced": sum(each[1] for each in texts)}}
            if llm
            else {}
        ),
        "llm": {name: getattr(usage, name) for name in counts} if llm else None,
    }


def round_entry(result: RoundResult, scale: int) -> dict[str, Any]:
    """Return the entry of one round in summary.json. `scale` is 10^decimals."""
    tally = result.tally
    lowest, highest = tally.units[[0, -1]].tolist() if tally.answered else (None, None)
    figures = {"average": tally.average(), "median": tally.median(), "std": tally.std(), "min": lowest, "max": highest}
    winning, outcome = result.winning_number, result.outcome
    return {
        "round": result.round,
        "asked": tally.asked,
        "answered": tally.answered,
        "failed": tally.failed,
        "failures": most_frequent(tally.failures),
        "ended": tally.ended.name.lower(),
        **({"error": result.error} if result.error else {}),
        "reassigned": result.reassigned,
        **{name: None if units is None else float(units / scale) for name, units in figures.items()},
        "outcome": {name: float(each) if isinstance(each, Fraction) else each for name, each in outcome.items()},
        **({"analysis": result.analysis} if result.analysis else {}),
        "winning_number": None if winning is None else float(winning),
        "winners": {"count": result.winners.count, "participants": [f"P{index}" for index in result.winners.lowest]},
        "winning_answers": [units / scale for units in result.winning_units[:NUMBERS_NAMED]],
        **({"texts": {"kept": texts[0], "replaced": texts[1]}} if (texts := result.texts) is not None else {}),
        "seconds": round(result.seconds, 4),
    }


def most_frequent(failures: dict[str, int], kept: int = CAUSES_SHOWN) -> dict[str, int]:
    """Return the `kept` most frequent failure causes with their counts. Merge the remaining causes into one entry."""
    named = sorted(failures.keys() - {OTHER_CAUSES}, key=lambda cause: (-failures[cause], cause))
    first = {cause: failures[cause] for cause in named[:kept]}
    others = sum(failures.values()) - sum(first.values())
    return first | ({OTHER_CAUSES: others} if others else {})


class PopulationEntry(TypedDict):
    personas: dict[str, Annotated[tuple[Persona, ...], Field(min_length=1)]]
    models: tuple[ModelShare, ...]
    turns: tuple[str, ...]
    players: NotRequired[tuple[PlayerShare, ...]]  # absent in old runs
    block: NotRequired[Annotated[int, Field(ge=1)]]  # as above


class RecordedRules(TypedDict):
    """The words, the range and the equilibrium of a game, for reports that must not run the game's code."""

    words: Rules
    low: int
    high: int
    equilibrium: tuple[float, ...] | None
    numbers_announced: NotRequired[bool]  # absent in old runs


@with_config(SHAPE)
class GameFile(TypedDict):
    """The content of game.json: the prompt, personas and models of a game, copied from files that may change later."""

    wording: PromptTemplate | None
    cast: PopulationEntry
    rules: NotRequired[RecordedRules]  # absent in old runs


GAME_FILE: TypeAdapter[Any] = TypeAdapter(GameFile)
PEOPLE = TypeAdapter(dict[Literal["people"], tuple[HumanData, ...]])  # the content of human.json


def game_to_json(game: Game) -> dict[str, Any]:
    cast, known = game.population, {"equilibrium": game.equilibrium(), "numbers_announced": game.numbers_announced}
    entry: dict[str, Any] = {"personas": cast.persona_sets, "models": cast.models, "turns": cast.round_robin_models}
    entry |= {"players": cast.players, "block": cast.block}
    rules = {"words": game.words, "low": game.low, "high": game.high, **known}
    return GAME_FILE.dump_python({"wording": game.prompt, "cast": entry, "rules": rules}, mode="json")


class RecordedGame(Game):
    """The game of a saved run, without the code of the user's class: it has its words, but computes no outcome."""

    recorded: Any = None  # RecordedRules
    low = property(lambda self: self.recorded["low"])
    high = property(lambda self: self.recorded["high"])

    def rules(self) -> Rules:
        return self.recorded["words"]

    def equilibrium(self) -> tuple[float, ...] | None:
        return self.recorded["equilibrium"]


def parse_game(text: str, config: SimulationConfig, trusted: bool = False) -> Game:
    """Return a game. Only if `trusted`, execute the file of a user's. Raises SettingsError or one of DAMAGED."""
    content = GAME_FILE.validate_json(text)
    cast, players = content["cast"], content["cast"].get("players", ())
    parts = (cast["personas"], cast["models"], cast["turns"], players, cast.get("block", 1))
    population = Population(config.seed or 0, config.participant_num, *parts)
    mixtures: list[Any] = [*cast["personas"].values(), cast["models"], players, *(each.models for each in players)]
    if len({each.label for each in players}) < len(players) or bool(players) is (config.players is None):
        raise ValueError("its kinds of players are not those of the settings")
    if any(mixture and sum(each.share for each in mixture) != 1 for mixture in mixtures):
        raise ValueError("shares do not add up to 1")
    if any(name != printable(name) for parts in population.groupings for name in (parts.topic, *parts.names)):
        raise ValueError("a name cannot be displayed")
    if trusted or not names_file(config.game):
        return game_of(config, content["wording"], population)
    recorded = {"recorded": content["rules"], "numbers_announced": content["rules"].get("numbers_announced", False)}
    return RecordedGame(**{**game_fields(config, content["wording"], population), **recorded})


def people_to_json(people: tuple[HumanData, ...]) -> dict[str, Any]:
    return PEOPLE.dump_python({"people": people}, mode="json", exclude_defaults=True)


def parse_people(text: str) -> tuple[HumanData, ...]:
    """Return the figures of people in a human.json. Raises an error in DAMAGED."""
    return PEOPLE.validate_json(text)["people"]


class KeptGroup(TypedDict):
    """A line of agents.jsonl: a group of participants first .. first+count-1 that its server keeps after the run."""

    oid: Printable  # the remote id of the group
    host: Printable
    port: Annotated[int, Field(ge=1, le=65_535)]
    first: Annotated[int, Field(ge=0)]
    count: Annotated[int, Field(ge=0)]


class FailedAnswer(TypedDict):
    """A line of failed_answers.jsonl: a failure, with the unusable answer or the traceback of an exception."""

    round: int
    participant: int
    failure: str | None
    text: NotRequired[str]
    traceback: NotRequired[str]


def read_json_lines(path: Path, name: str, shape: type[T]) -> list[T]:
    """Parse a JSON lines file of `shape` entries. Return [] if it is missing. Raises SettingsError if it is damaged."""

    def parse(text: str) -> list[T]:
        lines = [json.loads(line) for line in text.split("\n") if line.strip()]
        return TypeAdapter(list[shape], config=SHAPE).validate_python(lines)  # type: ignore[valid-type]

    return read_run_file(path, name, parse) if is_there(path / name) else []
