"""Saved runs, read from their folders alone, to resume them, report them or question a participant."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simulation.errors import ClusterError, Ended, SettingsError, one_line
from simulation.files import files_in, is_there, real
from simulation.game.rules import Game, game_of
from simulation.game.tally import RoundResult, Tally, Winners, score
from simulation.llm.usage import Usage
from simulation.results import run_files
from simulation.results.answers_parquet import rows_by_round, tally_in
from simulation.results.run_directory import AGENTS, GAME, PARTS, SWEEP, WHOLE, read_failed_answers, sweep_position
from simulation.rpc.endpoints import Endpoint
from simulation.settings import SETTINGS, SimulationConfig, flag_of


@dataclass(frozen=True)
class SavedRun:
    """A run as read from its folder: its settings, the content of its summary.json, its game and its rounds."""

    path: Path
    config: SimulationConfig
    summary: dict[str, Any]
    game: Game
    results: list[RoundResult]

    @property
    def run_id(self) -> str:
        return str(self.summary["run_id"])

    @property
    def position(self) -> run_files.SweepPosition | None:
        """Return the run's position in its experiment, even if its folder was moved out of the experiment's folder."""
        return sweep_position(self.path) or self.summary.get("part_of")

    @property
    def usage(self) -> Usage:
        seconds = self.summary["cluster"].get("llm_seconds", {"model": 0.0, "client": 0.0})
        answering_s = seconds["model"] + seconds["client"]
        return Usage(**(self.summary["llm"] or {}), answering_s=answering_s, client_s=seconds["client"])

    @cached_property
    def tallies_by_part(self) -> dict[str, list[dict[str, Tally]]]:
        """Return the tally of each part in each of the `results`, by topic (a persona set, or "model").

        Raises SettingsError.
        """
        cast = self.game.cast
        if cast is None or not cast.groupings or not self.results:
            return {}
        rounds = range(len(self.results))
        tallies = {parts.topic: [dict.fromkeys(parts.names, Tally(0)) for _ in rounds] for parts in cast.groupings}
        for number, rows in _rows_of(self.path, self.config):
            for parts in cast.groupings if 0 < number <= len(self.results) else ():
                part_indices = cast.part_indices(parts, rows["participant"][0].as_py(), len(rows))
                ordered = rows.take(pa.array(np.argsort(part_indices, kind="stable")))  # sort once for all parts
                stops = np.cumsum(np.bincount(part_indices, minlength=len(parts.names))).tolist()
                for name, start, stop in zip(parts.names, [0, *stops], stops, strict=False):
                    tally = tally_in(ordered.slice(start, stop - start), self.game.scale)
                    tallies[parts.topic][number - 1][name] += tally
        return tallies


def read_run(path: Path, flag: str = "") -> SavedRun:
    """Read a run. Raises SettingsError if there is none, or one of its files is missing, damaged or contradictory."""
    config, summary = read_summary(path, flag)
    game = read_game(path, config)
    run = SavedRun(path, config, summary, game, read_rounds(path, config, summary, game))
    by_team = run.tallies_by_part.get(config.teams, []) if config.teams is not None else []
    for index, tallies in enumerate(by_team):
        averages = tuple((name, tally.average()) for name, tally in tallies.items())
        run.results[index] = replace(run.results[index], teams=averages)
    return run


def read_run_to_resume(path: Path, given: dict[str, Any]) -> SavedRun:
    """Return a run with its finished rounds and its settings updated with `given`. Raises SettingsError."""
    run = read_run(path, "--resume ")
    config = replace(config_to_resume(path, run.config, given), run_dir=str(real(path)))
    read_failed_answers(path)  # raises if damaged, before anything is started
    results = [*takewhile(lambda result: result.tally.ended is not Ended.INTERRUPTED, run.results)]
    if config.rounds < len(results):
        raise SettingsError(f"--rounds {config.rounds}: the run in {path} has played {len(results)} already")
    return replace(run, config=config, game=game_of(config, run.game.wording, run.game.cast), results=results)


def config_to_resume(path: Path, config: SimulationConfig, given: dict[str, Any]) -> SimulationConfig:
    """Return the settings of a run, updated with `given`. Raises SettingsError if one cannot change on resume."""
    fixed = {name for name, each in SETTINGS.items() if each.fixed_on_resume}
    changed = replace(config, **given)
    for name in fixed & given.keys():
        if getattr(changed, name) != getattr(config, name):  # equal values may be written differently, as 0.5 and 1/2
            raise SettingsError(
                f"{flag_of(name)} {given[name]}: the run in {path} was started with {getattr(config, name)}; this "
                "setting cannot be changed on resume"
            )
    return changed


def read_summary(path: Path, flag: str = "") -> tuple[SimulationConfig, dict[str, Any]]:
    """Return the settings and the summary of the run in a folder. Raises SettingsError if there is none."""
    if is_there(path / SWEEP) and not is_there(path / "summary.json"):
        runs = runs_in(path)
        keeping = [run for run in runs if is_there(run / AGENTS)]  # suggest a run with kept agents, if there is one
        name = f"name one of them, such as {shlex.quote(str((keeping or runs)[-1]))}" if runs else "none was played yet"
        raise SettingsError(f"{flag}{path}: is the folder of an experiment, which holds a folder for each run: {name}")
    return run_files.read_run_file(path, "summary.json", run_files.parse_summary, flag)


def runs_in(path: Path) -> list[Path]:
    """Return the folders of an experiment's runs that have a summary.json, in order. Raises SettingsError."""
    return [folder for folder in files_in(path) if is_there(folder / "summary.json")]


def rounds_finished(summary: dict[str, Any]) -> int:
    """Return the number of rounds of a summary that were not interrupted."""
    return sum(entry["ended"] != "interrupted" for entry in summary["rounds"])


def tokens_spent(summary: dict[str, Any]) -> int:
    """Return the number of prompt and completion tokens that a run has used."""
    return Usage(**(summary["llm"] or {})).tokens


def is_spent(summary: dict[str, Any], budget_then: int | None, budget_now: int | None) -> bool:
    """Return whether a run has used up its token budget."""
    if budget_now is None or not summary["rounds"]:
        return False
    ran_out = summary["rounds"][-1]["ended"] == "out_of_tokens" and budget_now == budget_then
    return ran_out or tokens_spent(summary) >= budget_now


def first_winner(run: SavedRun) -> int:
    """Return the lowest winner of a run's last round. Raises SettingsError if there is none."""
    if not run.results or not run.results[-1].winners.lowest:
        raise SettingsError(f"--winner: nobody has won the last round of the run in {run.path}")
    return run.results[-1].winners.lowest[0]


def read_game(path: Path, config: SimulationConfig) -> Game:
    """Return the game of a run, with the prompts and the population as saved in game.json. Raises SettingsError."""
    return run_files.read_run_file(path, GAME, partial(run_files.parse_game, config=config))


def read_rounds(path: Path, config: SimulationConfig, summary: dict[str, Any], game: Game) -> list[RoundResult]:
    """Return the rounds of a run. Raises SettingsError if answers are missing or contradict the summary."""
    tallies: dict[int, Tally] = {}
    for number, rows in _rows_of(path, config) if summary["rounds"] else ():
        tallies[number] = tallies.get(number, Tally(0)) + tally_in(rows, game.scale)
    results: list[RoundResult] = []
    for entry in summary["rounds"]:
        number = entry["round"]
        if number not in tallies:
            raise SettingsError(f"{path}: the answers of round {number} are missing")
        result = score(game, number, replace(tallies[number], ended=Ended[entry["ended"].upper()]))
        counted = run_files.round_entry(result, game.scale)
        same = all(counted[key] == entry[key] for key in ("asked", "answered", "failed", "average"))
        if not same or entry["asked"] != config.participant_num:
            raise SettingsError(f"{path}: answers.parquet and summary.json say different things of round {number}")
        winners = Winners(entry["winners"]["count"], tuple(int(name[1:]) for name in entry["winners"]["participants"]))
        results.append(replace(result, winners=winners, seconds=entry["seconds"], reassigned=entry["reassigned"]))
    return results


def _rows_of(path: Path, config: SimulationConfig) -> Iterator[tuple[int, pa.Table]]:
    """Yield all answers of a run in tables of one round's consecutive participants. Raises SettingsError."""
    limits = {"participant": config.participant_num - 1, "value": config.max_value}
    parts = [file for file in files_in(path, ".parquet") if file.match(PARTS)]  # left by a run that was killed
    try:
        for file in [path / WHOLE] if is_there(path / WHOLE) or not parts else parts:
            for number, rows in rows_by_round(file):
                for column, high in limits.items():
                    found = pc.min_max(rows[column]).as_py()
                    if found["min"] is not None and not 0 <= found["min"] <= found["max"] <= high:
                        raise pa.ArrowInvalid(f"a {column} is not from 0 to {high}")
                yield number, rows
    except FileNotFoundError:
        raise SettingsError(f"{path}: its answers.parquet is missing") from None
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise SettingsError(f"{path}: cannot read its answers.parquet: {one_line(error)}") from None


def read_agents(path: Path, participant: int) -> tuple[Endpoint, str]:
    """Return the server and the remote id of a kept participant. Raises ClusterError if it was not kept."""
    groups = run_files.read_json_lines(path, AGENTS, run_files.KEPT_GROUP_LINES)
    if not groups:
        raise ClusterError(f"the run in {path} has kept no agents: play one with --keep-agents")
    for group in groups:
        if group["first"] <= participant < group["first"] + group["count"]:
            return Endpoint(group["host"], group["port"]), f"{group['oid']}/{participant}"
    raise ClusterError(f"participant {participant} of the run in {path} was not kept")
