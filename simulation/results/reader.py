"""Saved runs, read from their folders alone, to resume them, report them or question a participant."""

from __future__ import annotations

import json
import shlex
from collections.abc import Container, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, model_validator

from simulation.errors import ClusterError, Ended, SettingsError, one_line, printable
from simulation.files import files_in, is_there, real
from simulation.game.population import Grouping, Population
from simulation.game.rules import Game, PromptTemplate, game_of
from simulation.game.tally import INTERRUPTED, RoundResult, Tally, Winners
from simulation.llm.usage import OUT_OF_TOKENS, Usage
from simulation.results.answers_parquet import rows_by_round, tally_in
from simulation.results.run_directory import (
    AGENTS,
    GAME,
    PARTS,
    SWEEP,
    WHOLE,
    PartOf,
    part_of,
    read_failed_answers,
    read_written,
)
from simulation.rpc.endpoints import Endpoint
from simulation.settings import SimulationConfig, flag_of

# --- summary.json, as it is written (see results.py) -----------------------------------------------------------------


Seconds = Annotated[float, Field(ge=0, le=1e12)]


PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*$"  # for names that are displayed


class _Part(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class _Winners(_Part):
    count: int
    participants: list[Annotated[str, Field(pattern=r"^P[0-9]{1,10}$")]]


class _Round(_Part):
    round: int
    asked: int
    answered: int
    failed: int
    failures: dict[str, int]
    ended: Literal["complete", "model_failed", "out_of_tokens", "interrupted"] | None = None  # absent in older runs
    reassigned: int
    average: float | None
    median: float | None
    std: float | None
    min: float | None
    max: float | None
    winning_number: float | None
    winners: _Winners
    seconds: Seconds


class _Times(_Part):
    round: int
    model_s: Seconds
    client_s: Seconds
    rpc_s: Seconds
    slowest_s: Seconds


class _LlmSeconds(_Part):
    model: Seconds
    client: Seconds
    rpc: Seconds


class _Cluster(_Part):
    hosts: list[str]
    servers: int
    moderators: int
    lost: list[str]
    times: list[_Times]
    llm_seconds: _LlmSeconds | None = None


class _Seconds(_Part):
    connect: Seconds
    create: Seconds
    rounds: Seconds
    total: Seconds


class _Llm(_Part):
    requests: int
    prompt_tokens: int
    completion_tokens: int
    retries: int


class _PartOf(_Part):
    sweep_id: str
    experiment: str
    run: int
    runs: int


class _Summary(_Part):
    run_id: str
    part_of: _PartOf | None = None
    status: Literal["complete", "partial", "interrupted", "failed"]
    config: dict[str, Any]
    cluster: _Cluster
    seconds: _Seconds
    rounds: list[_Round]
    llm: _Llm | None

    @model_validator(mode="after")
    def _refuse_gaps(self) -> _Summary:
        if [each.round for each in self.rounds] != list(range(1, len(self.rounds) + 1)):
            raise ValueError("its rounds are not 1, 2, ...")
        return self


# --- game.json and agents.jsonl --------------------------------------------------------------------------------------


class _Persona(_Part):
    name: str
    share: str
    text: str


class _ModelShare(_Part):
    name: str
    share: str
    model: str


class _Cast(_Part):
    personas: dict[str, list[_Persona]]
    models: list[_ModelShare]
    turns: list[str]


class _Wording(_Part):
    name: str
    system: str
    instruction: str
    reasoning_tokens: int | None


class _Game(_Part):
    wording: _Wording | None
    cast: _Cast


class _Agents(_Part):
    oid: str = Field(pattern=PRINTABLE)
    host: str = Field(pattern=PRINTABLE)
    port: int = Field(ge=1, le=65_535)
    first: int = Field(ge=0)
    count: int = Field(ge=0)


@dataclass(frozen=True)
class ResumeState:
    """The saved state of a run to resume: its finished rounds, with their usage and time."""

    run_id: str
    results: list[RoundResult]
    usage: Usage
    cluster: dict[str, Any]
    seconds: dict[str, float]
    part_of: PartOf | None = None


def read_played(path: Path, given: dict[str, Any]) -> tuple[SimulationConfig, ResumeState]:
    """Return the settings to resume a run with, and its finished rounds.

    Args:
        path: The run's folder.
        given: New values for some settings.

    Raises:
        SettingsError: The folder holds no run, or a setting cannot change on resume.
    """
    config, summary = read_summary(path, "--resume ")
    config = replace(config_to_resume(path, config, given), run_dir=str(real(path)))
    results = read_results(path, config, summary)
    read_failed_answers(path)  # raises if damaged, before anything is started
    cut = (number for number, result in enumerate(results) if result.tally.ended is Ended.INTERRUPTED)
    results = results[: next(cut, len(results))]
    if config.rounds < len(results):
        raise SettingsError(f"--rounds {config.rounds}: the run in {path} has played {len(results)} already")
    told = summary["cluster"].pop("llm_seconds", {"model": 0.0, "client": 0.0})
    usage = Usage(**(summary["llm"] or {}), answering_s=told["model"] + told["client"], client_s=told["client"])
    cluster, seconds = summary["cluster"], summary["seconds"]
    return config, ResumeState(summary["run_id"], results, usage, cluster, seconds, part_in(path, summary))


def config_to_resume(path: Path, config: SimulationConfig, given: dict[str, Any]) -> SimulationConfig:
    """Return the settings of a run, updated with `given`. Raises SettingsError if one cannot change on resume."""
    staying = {item.name for item in fields(SimulationConfig) if item.metadata.get("fixed_on_resume")}
    changed = replace(config, **given)
    for name in staying & given.keys():
        if getattr(changed, name) != getattr(config, name):  # equal values may be written differently, as 0.5 and 1/2
            raise SettingsError(
                f"{flag_of(name)} {given[name]}: the run in {path} was started with {getattr(config, name)}; this "
                "setting cannot be changed on resume"
            )
    return changed


def is_spent(summary: dict[str, Any], budget_then: int | None, budget_now: int | None) -> bool:
    """Return whether a run has used up its token budget."""
    if budget_now is None or not summary["rounds"]:
        return False
    last = summary["rounds"][-1]
    ran_out = _ended(last, last["failures"]) is Ended.OUT_OF_TOKENS and budget_now == budget_then
    return ran_out or tokens_spent(summary) >= budget_now


def played_whole(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rounds of a summary that were not interrupted."""
    return [entry for entry in summary["rounds"] if _ended(entry, entry["failures"]) is not Ended.INTERRUPTED]


def tokens_spent(summary: dict[str, Any]) -> int:
    """Return the number of prompt and completion tokens that a run has used."""
    return sum(summary["llm"][name] for name in ("prompt_tokens", "completion_tokens")) if summary["llm"] else 0


def _ended(entry: dict[str, Any], causes: Container[str]) -> Ended:
    """Return how a round ended; for a run of an earlier version without that entry, infer it from failure causes."""
    if entry.get("ended") is not None:
        return Ended[entry["ended"].upper()]
    if INTERRUPTED in causes:
        return Ended.INTERRUPTED
    return Ended.OUT_OF_TOKENS if OUT_OF_TOKENS in causes else Ended.COMPLETE


def read_agents(path: Path, participant: int) -> tuple[Endpoint, str]:
    """Return the server and the remote id of a kept participant. Raises ClusterError if it was not kept."""
    if not is_there(path / AGENTS):
        raise ClusterError(f"the run in {path} has kept no agents: play one with --keep-agents")
    lines = read_written(
        path, AGENTS, lambda text: [_Agents.model_validate_json(line) for line in text.split("\n") if line.strip()]
    )
    for agents in lines:
        if agents.first <= participant < agents.first + agents.count:
            return Endpoint(agents.host, agents.port), f"{agents.oid}/{participant}"
    raise ClusterError(f"participant {participant} of the run in {path} was not kept")


def first_winner(path: Path, summary: dict[str, Any]) -> int:
    """Return the lowest winner of a run's last round. Raises SettingsError if there is none."""
    winners = summary["rounds"][-1]["winners"]["participants"] if summary["rounds"] else []
    if not winners:
        raise SettingsError(f"--winner: nobody has won the last round of the run in {path}")
    return int(winners[0][1:])


def read_summary(path: Path, flag: str = "") -> tuple[SimulationConfig, dict[str, Any]]:
    """Return the settings and the summary of the run in a folder. Raises SettingsError if there is none."""

    def made(text: str) -> tuple[SimulationConfig, dict[str, Any]]:
        summary = json.loads(text)
        _Summary.model_validate(summary, strict=True)
        return SimulationConfig.from_json(summary["config"]), summary

    if not is_there(path / "summary.json"):
        _refuse_experiment(path, flag)
    return read_written(path, "summary.json", made, flag)


def _refuse_experiment(path: Path, flag: str) -> None:
    """Raise SettingsError if the folder is an experiment's, where a run's is needed."""
    if not is_there(path / SWEEP):
        return
    runs = runs_in(path)
    keeping = [run for run in runs if is_there(run / AGENTS)]  # suggest a run with kept agents, if there is one
    name = f"name one of them, such as {shlex.quote(str((keeping or runs)[-1]))}" if runs else "none was played yet"
    raise SettingsError(f"{flag}{path}: is the folder of an experiment, which holds a folder for each run: {name}")


def runs_in(path: Path) -> list[Path]:
    """Return the folders of an experiment's runs that have a summary.json, in order. Raises SettingsError."""
    return [folder for folder in files_in(path) if is_there(folder / "summary.json")]


def part_in(path: Path, summary: dict[str, Any]) -> PartOf | None:
    """Return the experiment and number of a run, even if its folder was moved out of the experiment's folder."""
    found = part_of(path)
    return PartOf(**summary["part_of"]) if found is None and summary.get("part_of") else found


def read_tallies(path: Path, config: SimulationConfig) -> dict[int, Tally]:
    """Return the tally of each round from answers.parquet. Raises SettingsError if it is missing or unreadable."""
    tallies: dict[int, Tally] = {}
    for number, rows in _rows_of(path, config.participant_num, config.max_value):
        tallies[number] = tallies.get(number, Tally(0)) + tally_in(rows, 10**config.decimals)
    return tallies


def _rows_of(path: Path, participants: int, max_value: int) -> Iterator[tuple[int, pa.Table]]:
    """Yield all answers of a run in tables of one round's consecutive participants. Raises SettingsError."""
    whole = path / WHOLE
    parts = [file for file in files_in(path, ".parquet") if file.match(PARTS)]  # left by a run that was killed
    try:
        for file in [whole] if is_there(whole) or not parts else parts:
            for number, rows in rows_by_round(file):
                _check_rows(rows, participants, max_value)
                yield number, rows
    except FileNotFoundError:
        raise SettingsError(f"{path}: its answers.parquet is missing") from None
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise SettingsError(f"{path}: cannot read its answers.parquet: {one_line(error)}") from None


def _check_rows(rows: pa.Table, participants: int, max_value: int) -> None:
    """Raise ArrowInvalid if a participant or a value is out of range."""
    for column, low, high in (("participant", 0, participants - 1), ("value", 0, max_value)):
        found = pc.min_max(rows[column]).as_py()
        if found["min"] is not None and not low <= found["min"] <= found["max"] <= high:
            raise pa.ArrowInvalid(f"a {column} is not from {low} to {high}")


def read_game(path: Path, config: SimulationConfig) -> Game:
    """Return the game of a run, with the prompts and the population as saved in game.json. Raises SettingsError."""

    def made(text: str) -> Game:
        said = json.loads(text)
        _Game.model_validate(said, strict=True)
        wording = PromptTemplate(**said["wording"]) if said["wording"] is not None else None
        cast = Population.from_json(said["cast"], config.seed or 0, config.participant_num)
        game = game_of(config, wording, cast)
        shares = [[one.share for one in each.personas] for each in cast.persona_sets]
        shares += [[each.share for each in cast.models]] if cast.models else []
        names = [name for parts in game.cast.groupings for name in (parts.topic, *parts.names)] if game.cast else []
        if any(name != printable(name) for name in names) or any(sum(each) != 1 for each in shares):  # they are printed
            raise ValueError
        return game

    return read_written(path, GAME, made)


@dataclass(frozen=True)
class SavedRun:
    """A run as read from its folder.

    Attributes:
        path: Its folder.
        config: Its settings.
        summary: The content of its summary.json.
        game: Its game.
        results: Its rounds.
        groups: For each topic that groups participants (a set of personas, or "model"), a list parallel to `results`
            of tallies by name. Topics and names are in the order of `game.cast.groupings`.
    """

    path: Path
    config: SimulationConfig
    summary: dict[str, Any]
    game: Game
    results: list[RoundResult]
    groups: dict[str, list[dict[str, Tally]]]

    @property
    def name(self) -> str:
        """Return the run id."""
        return str(self.summary["run_id"])


def read_run(path: Path) -> SavedRun:
    """Read a run. Raises SettingsError if there is none, or one of its files is missing or damaged."""
    config, summary = read_summary(path)
    game = read_game(path, config)
    results = read_rounds(path, config, summary)
    groups = read_groups(path, game, results)
    return SavedRun(path, config, summary, game, _with_teams(results, game, groups), groups)


def read_results(path: Path, config: SimulationConfig, summary: dict[str, Any]) -> list[RoundResult]:
    """Return the rounds of a run as played and announced, with the averages of its teams, if any."""
    results = read_rounds(path, config, summary)
    if config.teams is None:
        return results
    game = read_game(path, config)
    return _with_teams(results, game, read_groups(path, game, results))


def _with_teams(results: list[RoundResult], game: Game, groups: dict[str, list[dict[str, Tally]]]) -> list[RoundResult]:
    if game.teams not in groups:
        return results
    averages = (tuple((name, each.average()) for name, each in tallies.items()) for tallies in groups[game.teams])
    return [replace(result, teams=teams) for result, teams in zip(results, averages, strict=True)]


def read_groups(path: Path, game: Game, results: list[RoundResult]) -> dict[str, list[dict[str, Tally]]]:
    """Return the tallies of a run's rounds for each part of the participants; see SavedRun.groups."""
    groupings = game.cast.groupings if game.cast is not None else ()
    groups: dict[str, list[dict[str, Tally]]] = {
        parts.topic: [{name: Tally(0) for name in parts.names} for _ in results] for parts in groupings
    }
    round_places = {result.round: place for place, result in enumerate(results)}
    if game.cast is None or not groupings or not results:
        return groups
    for number, rows in _rows_of(path, game.cast.total, game.max_value):
        for parts in groupings if number in round_places else ():
            tallies = groups[parts.topic][round_places[number]]
            for part, tally in tallies_of_parts(rows, game, parts):
                tallies[part] += tally
    return groups


def tallies_of_parts(rows: pa.Table, game: Game, parts: Grouping) -> Iterator[tuple[str, Tally]]:
    """Yield the tally of each part of the participants in these rows, which are of consecutive participants."""
    assert game.cast is not None
    places = game.cast.part_indices(parts, rows["participant"][0].as_py(), len(rows))
    ordered = rows.take(pa.array(np.argsort(places, kind="stable")))  # sort once for all parts
    stops = np.cumsum(np.bincount(places, minlength=len(parts.names))).tolist()
    for name, start, stop in zip(parts.names, [0, *stops], stops, strict=False):
        yield name, tally_in(ordered.slice(start, stop - start), game.scale)


def read_rounds(path: Path, config: SimulationConfig, summary: dict[str, Any]) -> list[RoundResult]:
    """Return the rounds of a run as played; the winners come from the summary.

    Raises SettingsError if answers are missing or contradict the summary.
    """
    tallies = read_tallies(path, config) if summary["rounds"] else {}
    rule = game_of(config, None, None)
    results = []
    for entry in summary["rounds"]:
        if entry["round"] not in tallies:
            raise SettingsError(f"{path}: the answers of round {entry['round']} are missing")
        tally = tallies[entry["round"]]
        tally = replace(tally, ended=_ended(entry, tally.failures))
        average = tally.average()
        said = (tally.asked, tally.answered, tally.failed, None if average is None else float(average / rule.scale))
        summed_up = tuple(entry[key] for key in ("asked", "answered", "failed", "average"))
        if said != summed_up or tally.asked != config.participant_num:
            raise SettingsError(
                f"{path}: answers.parquet and summary.json say different things of round {entry['round']}"
            )
        winning_number = rule.winning_number(average) if average is not None else None
        closest = tally.closest(winning_number) if winning_number is not None else ()
        lowest = tuple(int(name[1:]) for name in entry["winners"]["participants"])
        winners = Winners(entry["winners"]["count"], lowest)
        seconds, reassigned = entry["seconds"], entry["reassigned"]
        results.append(
            RoundResult(entry["round"], tally, average, winning_number, closest, winners, seconds, reassigned)
        )
    return results
