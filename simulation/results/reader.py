"""Reading saved runs. A run folder alone suffices to resume a run, to create its report or to question a participant.

Unless stated otherwise, functions raise SettingsError for a missing or damaged file and for contradictory files.
"""

import os
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from simulation.errors import ClusterError, Ended, SettingsError, one_line, printable
from simulation.files import files_in, is_there, real
from simulation.game.analysis import analyse, mean_payoffs
from simulation.game.game import Game, Pairs
from simulation.game.human import HumanData
from simulation.game.population import Combination, Grouping
from simulation.game.rules import game_fields
from simulation.game.tally import RoundResult, Tally, Winners, score
from simulation.llm.responses import Usage
from simulation.provenance import kept_files, with_copies
from simulation.results import run_directory, run_files
from simulation.results.answers_parquet import rows_by_round, tally_in
from simulation.results.run_directory import AGENTS, FAILED_ANSWERS, GAME, HUMAN, SWEEP, WHOLE, sweep_position
from simulation.rpc.endpoints import Endpoint
from simulation.settings import FLAGS_OF_GAMES, OF_SET, SETTINGS, SimulationConfig, flag_of

PARTS_ANALYSED = 100  # maximum number of parts of each topic in analysis.json: the largest
MOST_PAIRS = 10**7  # maximum number of participants whose single answers are analysed by part


@dataclass(frozen=True)
class SavedSummary:
    """The content of the summary.json in the run folder `path`. `config` holds the settings from that file."""

    path: Path
    config: SimulationConfig
    summary: dict[str, Any]

    @property
    def run_id(self) -> str:
        return str(self.summary["run_id"])

    @property
    def position(self) -> run_files.SweepPosition | None:
        """Return the position of the run in its experiment, if it has one, even if the run folder was moved."""
        return sweep_position(self.path) or self.summary.get("part_of")

    @property
    def rounds_finished(self) -> int:
        return sum(entry["ended"] != "interrupted" for entry in self.summary["rounds"])

    def has_converged(self, limit: float | None) -> bool:
        """Return whether the run has ended because its figures moved less than `limit` (see --until-converged)."""
        return "converged_after" in self.summary and limit == self.config.until_converged

    @property
    def is_finished(self) -> bool:
        return self.rounds_finished >= self.config.rounds or "converged_after" in self.summary

    def by_round(self, name: str) -> dict[int, float]:
        """Return the figure `name` (see `figure_of`) of each round that has it, by round number."""
        values = {entry["round"]: figure_of(entry, name) for entry in self.summary["rounds"]}
        return {number: value for number, value in values.items() if value is not None}

    @property
    def provenance(self) -> str:
        """Return when and with which program the run was started, in words. Old runs do not tell."""
        if (program := self.summary.get("program")) is None:
            return ""
        commit = f", commit {program['git'][:10]}" if program["git"] is not None else ""
        started, python = self.summary["started"].replace("T", " ", 1), self.summary["python"]
        return f"{started}, program {program['version']}, code {program['code']}{commit}, Python {python}"

    @property
    def status_in_words(self) -> str:
        converged = self.summary.get("converged_after")
        return f"{self.summary['status']}{f', converged after round {converged}' if converged else ''}"

    @property
    def usage(self) -> Usage:
        seconds = self.summary["cluster"].get("llm_seconds", {"model": 0.0, "client": 0.0})
        answering_s = seconds["model"] + seconds["client"]
        return Usage(**(self.summary["llm"] or {}), answering_s=answering_s, client_s=seconds["client"])

    def is_spent(self, budget: int | None) -> bool:
        """Return whether the run would have no tokens left if its token budget were `budget` (None: unlimited)."""
        if budget is None or not self.summary["rounds"]:
            return False
        ran_out = self.summary["rounds"][-1]["ended"] == "out_of_tokens" and budget == self.config.max_tokens
        return ran_out or self.usage.tokens >= budget


@dataclass(frozen=True)
class SavedRun(SavedSummary):
    """A saved run: its summary, its game and the results of its rounds."""

    game: Game
    results: list[RoundResult]
    people: tuple[HumanData, ...] = ()  # figures of people to show beside the run

    @property
    def figures(self) -> dict[str, str]:
        """Return the words for each figure of the game's outcome, by name."""
        names = dict.fromkeys(name for entry in self.summary["rounds"] for name in entry["outcome"])
        return {each: "winning number" if each == "winning_number" else self.game.words.label(each) for each in names}

    @cached_property
    def tallies_by_part(self) -> dict[str, list[dict[str, Tally]]]:
        """Return `tallies_of` all groupings. Their topics are "kind", persona sets and "model"."""
        return self.tallies_of(self.game.population.groupings if self.results else ())

    def moves(self, rounds: int) -> list[int]:
        """Read the answers of rounds 1 to `rounds`. Return how many went down, how many up, and how many there are.

        Each is compared with the same participant's in the round before. Twice the lowest number counts as a move down,
        and twice the highest as one up.
        """
        low, high, counts = self.game.lowest, self.game.lowest + self.game.numbers - 1, np.zeros(3, np.int64)
        for _, (was, now) in takewhile(lambda pair: pair[0] <= rounds, self._successive()):
            both, stays = (was >= 0) & (now >= 0), was == now
            down, up = (now < was) | stays & (now == low), (now > was) | stays & (now == high)
            counts += [int((each & both).sum()) for each in (down, up, both)]
        return counts.tolist()

    def _successive(self) -> Iterator[tuple[int, Pairs]]:
        """Yield the number of each round but the first, with the last and the present answers in units; -1 is none."""
        before = np.empty(0, np.int64)
        for number, tables in groupby(_rows_of(self, self.game), itemgetter(0)):
            values = np.concatenate([rows["value"].to_numpy() for _, rows in tables])
            before, units = np.rint(np.nan_to_num(values * self.game.scale, nan=-1)).astype(np.int64), before
            if len(units):
                yield number, (units, before)

    def sample_texts(self, parts: Grouping, names: Collection[str], number: int, limit: int) -> dict[str, list[Any]]:
        """Return up to `limit` rows of texts.parquet of round `number`, with the `value`, for `names` in `parts`."""
        of_round, participant = ds.field("round") == number, ds.field("participant")
        with _damage(self.path, "texts.parquet"):
            texts, answers = (ds.dataset(files_of(self.path, kind)) for kind in ("texts", "answers"))
            writers = texts.to_table(["participant"], filter=of_round)["participant"].to_numpy()
            places = parts.name_indices(0, self.config.participant_num)[writers]
            chosen = {name: writers[places == parts.names.index(name)][:limit].tolist() for name in names}
            every = [each for found in chosen.values() for each in found]
            wanted = of_round & (participant <= max(every, default=0)) & participant.isin(every)
            values = answers.to_table(["participant", "value"], filter=wanted).to_pydict()
            by_participant = dict(zip(values["participant"], values["value"], strict=True))
            rows = {row["participant"]: row for row in texts.to_table(filter=wanted).to_pylist()}
        return {name: [rows[at] | {"value": by_participant.get(at)} for at in found] for name, found in chosen.items()}

    def tallies_of(self, groupings: Sequence[Grouping | Combination]) -> dict[str, list[dict[Any, Tally]]]:
        """Read the answers. Return a tally for each part of each grouping: `[topic][index in self.results][name]`."""
        tallies = {parts.topic: [dict.fromkeys(parts.names, Tally(0)) for _ in self.results] for parts in groupings}
        for number, rows in _rows_of(self, self.game) if groupings else ():
            for parts in groupings if 0 < number <= len(self.results) else ():
                indices = parts.name_indices(rows["participant"][0].as_py(), len(rows))
                ordered = rows.take(pa.array(np.argsort(indices, kind="stable")))  # one sort for all names
                stops = np.cumsum(np.bincount(indices, minlength=len(parts.names))).tolist()
                for name, start, stop in zip(parts.names, [0, *stops], stops, strict=False):
                    tally = tally_in(ordered.slice(start, stop - start), self.game.scale)
                    tallies[parts.topic][number - 1][name] += tally
        return tallies

    def analysis(self) -> dict[str, Any]:
        """Return the content of analysis.json. Above MOST_PAIRS participants, parts have no analyses of pairs."""
        results, parts = self.results, self.tallies_by_part
        shown = {topic: largest(tallies[-1], PARTS_ANALYSED) for topic, tallies in parts.items()}
        pairs = self._pairs_by_part(shown) if any(result.analysis for result in results[1:]) else {}
        entries = []
        for index, result in enumerate(results):
            payoffs = partial(mean_payoffs, self.game, result.tally, result.outcome)
            outcomes, by = [each.outcome for each in results[: index + 1]], {topic: dict[str, Any]() for topic in parts}
            for topic, names in shown.items():
                paid = payoffs(parts[topic][index])
                for name in names:
                    tallies, known = [each[name] for each in parts[topic][: index + 1]], pairs.get((topic, name, index))
                    analysed = analyse(self.game, tallies, outcomes, known)
                    by[topic][name] = {"mean_payoff": paid[name], **analysed}
            entry = {"round": result.round, **payoffs({"mean_payoff": result.tally}), **result.analysis, "by": by}
            entries.append(entry)
        omitted = {topic: len(tallies[-1]) - len(shown[topic]) for topic, tallies in parts.items()}
        return {"run_id": self.run_id, "rounds": entries, "parts_omitted": omitted}

    def _pairs_by_part(self, shown: Mapping[str, Sequence[str]]) -> dict[tuple[str, str, int], list[Pairs]]:
        """Return the pairs of successive answers in units (see `Game.analyses`), by part and index in `results`."""
        count, pairs = self.config.participant_num, dict[tuple[str, str, int], list[Pairs]]()
        if count > MOST_PAIRS or not shown:
            return pairs
        members, by_topic = dict[tuple[str, str], Any](), self.game.population.by_topic
        for topic, names in shown.items():
            indices, every = by_topic[topic].name_indices(0, count), by_topic[topic].names
            members |= {(topic, name): np.flatnonzero(indices == every.index(name)) for name in names}
        for number, (before, after) in self._successive():
            for part, indices in members.items():
                was, now = before[indices], after[indices]
                both = (was >= 0) & (now >= 0)
                pairs[*part, number - 1] = [(was[both], now[both])]
        return pairs


def largest(tallies: Mapping[str, Tally], limit: int) -> list[str]:
    """Return the `limit` names in `tallies` with the most participants, in the order of `tallies`."""
    by_size = sorted(tallies, key=lambda name: -tallies[name].asked)[:limit]
    return [name for name in tallies if name in by_size]


def figure_of(entry: Mapping[str, Any], name: str) -> Any:
    """Return a figure from a round's entry, of the game's outcome or of all games. None if there is no such figure."""
    return entry["outcome"].get(name, entry.get(name))


def read_run(path: Path, flag: str = "", trusted: bool = False) -> SavedRun:
    """Read a run. Errors in the summary start with `flag`. Only if `trusted`, execute the file of a user's game."""
    saved = read_summary(path, flag)
    _, copies = kept_files(path, saved.summary.get("sources", []) if trusted else [], flag)
    game = read_game(path, with_copies(saved.config, copies), trusted)
    people = run_files.read_run_file(path, HUMAN, run_files.parse_people) if is_there(path / HUMAN) else ()
    run = SavedRun(**vars(saved), game=game, results=_read_rounds(saved, game), people=people)
    for index, tallies in enumerate(run.tallies_by_part.get(saved.config.teams or "", [])):
        teams = tuple((name, (units := each.average()) and units / game.scale) for name, each in tallies.items())
        run.results[index] = replace(run.results[index], teams=teams)
    return run


def read_run_to_resume(path: Path, given: dict[str, Any]) -> SavedRun:
    """Read a run, omit its last round if that was interrupted, and update its settings (see `config_to_resume`)."""
    run = read_run(path, "--resume ", trusted=True)
    config = replace(config_to_resume(path, run.config, given), run_dir=str(real(path)))
    run_files.read_json_lines(path, FAILED_ANSWERS, run_files.FailedAnswer)  # detect damage before servers start
    results = [*takewhile(lambda result: result.tally.ended is not Ended.INTERRUPTED, run.results)]
    if config.rounds < len(results):
        raise SettingsError(f"--rounds {config.rounds}: the run in {path} has played {len(results)} already")
    game = replace(run.game, **game_fields(config, run.game.prompt, run.game.population))
    return replace(run, config=config, game=game, results=results)


def config_to_resume(path: Path, config: SimulationConfig, given: dict[str, Any]) -> SimulationConfig:
    """Return the settings of a run, updated with `given`. Raises SettingsError if `given` changes a fixed setting."""
    given = {name: value for name, value in given.items() if value is not None or name not in FLAGS_OF_GAMES}
    for name, _, text in (each.partition("=") for each in given.pop("set", ())):
        known = (config.value_of(f"{OF_SET}{each}") for each in (name, name.rpartition(".")[2]))
        was = next((each for each in known if each is not None), None)
        differs = was is None or was.casefold() != text.casefold()
        with suppress(ValueError):  # not numbers
            differs = was is None or float(was) != float(text)
        if differs:
            start = f"--set {name}={text}: the run in {path} was started {f'with {was}' if was else 'without it'}"
            raise SettingsError(f"{start}; this setting cannot be changed on resume")
    changed = replace(config, **given)
    for name, value in given.items():
        before = getattr(config, name)
        if SETTINGS[name].fixed_on_resume and getattr(changed, name) != before:  # `value` may be 0.5 for 1/2
            start = f"{flag_of(name)} {value}: the run in {path} was started with {before}"
            raise SettingsError(f"{start}; this setting cannot be changed on resume")
    return changed


def read_summary(path: Path, flag: str = "") -> SavedSummary:
    """Read the summary.json in `path`. Also raises SettingsError if `path` is the folder of an experiment."""
    if is_there(path / SWEEP) and not is_there(path / "summary.json"):
        runs = runs_in(path)
        keeping = [run for run in runs if is_there(run / AGENTS)]  # prefer a run whose agents were kept
        name = f"name one of them, such as {shlex.quote(str((keeping or runs)[-1]))}" if runs else "none was played yet"
        raise SettingsError(f"{flag}{path}: is the folder of an experiment, which holds a folder for each run: {name}")
    return SavedSummary(path, *run_files.read_run_file(path, "summary.json", run_files.parse_summary, flag))


def runs_in(path: Path) -> list[Path]:
    """Return the run folders in an experiment's folder `path`, by number. Omit folders without a summary.json."""
    runs = [folder for folder in files_in(path) if is_there(folder / "summary.json")]
    return sorted(runs, key=lambda folder: (len(folder.name.partition("-")[0]), folder.name))  # 100-x after 99-x


def run_folders(named: Sequence[Path]) -> list[Path]:
    """Return `named` without duplicates, experiments replaced by their runs. Raises SettingsError if one has none."""
    found: dict[Path, Path] = {}
    for path in named:
        runs = runs_in(path) if is_there(path / SWEEP) else [path]
        if not runs:
            raise SettingsError(f"{path}: no run was played in this sweep; give the folder of another")
        for run in runs:
            found.setdefault(real(run), run)
    return list(found.values())


def unfinished_lines(named: Sequence[Path], runs: Sequence[SavedRun]) -> list[str]:
    """Return a message for each experiment in `named` that has missing or unfinished runs."""
    lines = []
    for path in [real(path) for path in named if is_there(path / SWEEP)]:
        existing = [run for run in runs if real(run.path).parent == path]
        position = sweep_position(existing[0].path)
        finished = sum(run.is_finished for run in existing)
        if position is not None and finished < position["runs"]:
            left = f"{position['runs'] - finished} of {position['runs']} runs of {printable(position['experiment'])}"
            lines.append(f"{left} have rounds left; to go on with them: {run_directory.resume_command(path)}")
    return lines


def common_folder(paths: Sequence[Path]) -> Path:
    """Return the innermost folder that contains all run folders `paths`. Raises SettingsError if this is /."""
    folder = Path(os.path.commonpath([real(path).parent for path in paths]))
    if folder == folder.parent:
        raise SettingsError("these runs have no folder in common: give --run-dir, where the comparison is written")
    return folder


def folder_names(runs: Sequence[SavedRun]) -> list[str]:
    """Return the path of each run folder, relative to the innermost folder that contains all of them."""
    paths = [real(run.path) for run in runs]
    return [os.path.relpath(path, os.path.commonpath([path.parent for path in paths])) for path in paths]


def first_winner(run: SavedRun) -> int:
    """Return the lowest index of a winner of the last round. Raises SettingsError if the round has no winner."""
    if not run.results or not run.results[-1].winners.lowest:
        raise SettingsError(f"--winner: nobody has won the last round of the run in {run.path}")
    return run.results[-1].winners.lowest[0]


def read_game(path: Path, config: SimulationConfig, trusted: bool = False) -> Game:
    """Return the game that `config` and the game.json in `path` describe; see `read_run` for `trusted`."""
    return run_files.read_run_file(path, GAME, partial(run_files.parse_game, config=config, trusted=trusted))


def _read_rounds(saved: SavedSummary, game: Game) -> list[RoundResult]:
    """Compute the results of all rounds from the saved answers. Raises SettingsError if they contradict the summary."""
    path, entries, results = saved.path, saved.summary["rounds"], list[RoundResult]()
    tallies = defaultdict[int, Tally](lambda: Tally(0))
    for number, rows in _rows_of(saved, game) if entries else ():
        tallies[number] += tally_in(rows, game.scale)
    for entry in entries:
        number = entry["round"]
        if number not in tallies:
            raise SettingsError(f"{path}: the answers of round {number} are missing")
        tally = replace(tallies[number], ended=Ended[entry["ended"].upper()])
        if isinstance(game, run_files.RecordedGame):  # its code is not run: these figures are not counted again
            wins = tuple(round(each * game.scale) for each in entry.get("winning_answers", ()))
            recorded = {"error": entry.get("error", ""), "analysis": entry.get("analysis", {})}
            result = RoundResult(number, tally, entry["outcome"], wins, **recorded)
        else:
            result = score(game, number, tally)
            rounds = [*(each.tally for each in results), tally], [*(each.outcome for each in results), result.outcome]
            result = replace(result, analysis=entry.get("analysis") or analyse(game, *rounds, None))
        counted = run_files.round_entry(result, game.scale)
        same = all(counted[key] == entry[key] for key in ("asked", "answered", "failed", "average"))
        if not same or entry["asked"] != saved.config.participant_num:
            raise SettingsError(f"{path}: answers.parquet and summary.json say different things of round {number}")
        winners = Winners(entry["winners"]["count"], tuple(int(name[1:]) for name in entry["winners"]["participants"]))
        texts = (each["kept"], each["replaced"]) if (each := entry.get("texts")) else None
        times = {"seconds": entry["seconds"], "reassigned": entry["reassigned"]}
        results.append(replace(result, winners=winners, texts=texts, **times))
    return results


def _rows_of(saved: SavedSummary, game: Game) -> Iterator[tuple[int, pa.Table]]:
    """Yield pairs of a round number and a table of checked rows. Each table covers consecutive participants."""
    path, limits = saved.path, {"participant": (0, saved.config.participant_num - 1), "value": (game.low, game.high)}
    with _damage(path, WHOLE):
        for file in files_of(path, "answers"):
            for number, rows in rows_by_round(file):
                for column, (low, high) in limits.items():
                    found = pc.min_max(rows[column]).as_py()
                    if found["min"] is not None and not low <= found["min"] <= found["max"] <= high:
                        raise pa.ArrowInvalid(f"a {column} is not from {low} to {high}")
                yield number, rows


def files_of(path: Path, kind: str) -> list[Path]:
    """Return the files of answers or texts in a run folder: one or, if the run was killed, one for each round."""
    parts = [file for file in files_in(path, ".parquet") if file.match(f"{kind}-*.parquet")]
    whole = path / f"{kind}.parquet"
    return [whole] if is_there(whole) or not parts else parts


@contextmanager
def _damage(path: Path, name: str) -> Iterator[None]:
    """Convert an error of the `with` block, which reads the file `name` in `path`, into a SettingsError."""
    try:
        yield
    except FileNotFoundError:
        raise SettingsError(f"{path}: its {name} is missing") from None
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        raise SettingsError(f"{path}: cannot read its {name}: {one_line(error)}") from None


def read_agents(path: Path, participant: int) -> tuple[Endpoint, str]:
    """Return the server and the remote id of a participant. Raises ClusterError if the participant was not kept."""
    groups = run_files.read_json_lines(path, AGENTS, run_files.KeptGroup)
    if not groups:
        raise ClusterError(f"the run in {path} has kept no agents: play one with --keep-agents")
    for group in groups:
        if group["first"] <= participant < group["first"] + group["count"]:
            return Endpoint(group["host"], group["port"]), f"{group['oid']}/{participant}"
    raise ClusterError(f"participant {participant} of the run in {path} was not kept")
