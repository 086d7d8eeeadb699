"""The run directory: writing and reading of summary.json, answers.parquet and its other files.

Every file is complete: it is written to a draft next to its path, flushed to the disk and renamed. The next process
that opens the folder for writing removes drafts of killed processes. The module knows results, not how they arise.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from fractions import Fraction
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from simulation.errors import UNSUPPORTED, ResultsError, SettingsError, SimulationError, one_line, reason
from simulation.files import ROOT, is_there, lock, read_text, real, shown, warn_once
from simulation.game.answer_sheet import TEXTS_KEPT, Answers
from simulation.game.population import Population
from simulation.game.rules import Game
from simulation.game.tally import OTHER_CAUSES, RoundResult
from simulation.llm.usage import Usage
from simulation.results.answers_parquet import rows_by_round, rows_in, rows_of, values_in, write_rows
from simulation.settings import SimulationConfig

NO_OTHER = "see to it that no other run writes there"
LATEST = ROOT / "runs" / "latest"
SUMMARY_BYTES = 100_000
WHOLE, PARTS = "answers.parquet", "answers-*.parquet"
FAILED_ANSWERS, AGENTS, GAME = "failed_answers.jsonl", "agents.jsonl", "game.json"
REPORT = "report.html"
MADE_OF_IT = (REPORT, "histogram.png", "rounds.png")
SWEEP = "sweep.json"  # in the folder of an experiment
COMPARISON = ("comparison.html", "comparison.png")
PROBE = ".probe.new"  # if left by a killed process, it is a draft like others
WRITTEN = ("probe", PROBE, "summary.json", WHOLE, PARTS, FAILED_ANSWERS, AGENTS, GAME, *MADE_OF_IT, SWEEP, *COMPARISON)
DRAFT_OF_LATEST = re.compile(r"latest\.[0-9a-f]{8}")
PROBE_BYTES = 256 * 1024  # detects a full disk before anything is started
CAUSES_SHOWN = 20
# Errors from a damaged file: not text, not JSON, nested too deeply, or with wrong types, keys or numbers
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
T = TypeVar("T")


def new_run_id() -> str:
    """Return a run id that sorts by time and is unique across hosts."""
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)


class PartOf(NamedTuple):
    """The position of a run in an experiment.

    Attributes:
        sweep_id: The name of the experiment's folder at the time of the run.
        experiment: The name of the experiment's file.
        run: The number of the run, from 1.
        runs: How many runs the experiment has.
    """

    sweep_id: str
    experiment: str
    run: int
    runs: int


def part_of(path: Path) -> PartOf | None:
    """Return the position of the run in the experiment of the parent folder; None if there is none."""
    path = real(path)
    try:
        said = json.loads(read_text(path.parent / SWEEP))
        folders = [run["folder"] for run in said["runs"]]
        found = PartOf(said["sweep_id"], said["experiment"], folders.index(path.name) + 1, len(folders))
    except (OSError, *DAMAGED):  # a damaged file is reported when the experiment is resumed
        return None
    return found if isinstance(found.sweep_id, str) and isinstance(found.experiment, str) else None


def resume_command(path: Path, *flags: str) -> str:
    """Return the shell-quoted command that resumes the run or experiment in a folder with these flags."""
    script = "./run_simulation.sh" if real(Path()) == ROOT else str(ROOT / "run_simulation.sh")
    folder = shown(path)
    return shlex.join([script, "--resume", f"./{folder}" if folder.startswith("-") else folder, *flags])


class RunDirectory:
    """The folder of one run or of an experiment's runs; the constructor creates, tests and locks it.

    Args:
        path: The path of the folder.
        resumed: Whether it holds the beginning of this run; otherwise it must be empty.
        within: The folder of the experiment that plays this run, if any.

    Raises:
        SettingsError: It is not empty, is being written by another run, or cannot be written.
        ResultsError: The disk is full.
    """

    def __init__(self, path: Path, resumed: bool = False, within: RunDirectory | None = None) -> None:
        self.path = real(path)  # runs/latest may be redirected during the run
        self.part_of = part_of(self.path)
        self._failed: list[dict[str, Any]] = []
        self._locks: list[int] = []
        self._is_latest = within is not None  # the experiment's folder is the latest
        self._latest_before: str | None = None
        try:
            _check_latest()
            if resumed:
                _check_writable(self.path)
            else:
                self._made = _make_folder(self.path)
            if self.part_of is not None and within is None:
                self._locks.append(_lock(self.path.parent, shared=True))  # runs/latest points there
            self._locks.append(_lock(self.path))
            probe = self.path / PROBE
            with _on_disk(probe) as file:
                file.write(os.urandom(PROBE_BYTES))
            probe.unlink()
        except OSError as error:
            self.discard_if_empty()
            self.close()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResultsError(f"results cannot be written to {self.path}: {reason(error)}") from None
            advice = "; give another --run-dir" if within is None and not resumed else ""
            raise SettingsError(f"cannot write results to {self.path}: {reason(error)}{advice}") from None
        except SimulationError:
            self.discard_if_empty()
            self.close()
            raise

    def discard_if_empty(self) -> None:
        """Remove the folders created for a run that failed to start, and restore runs/latest."""
        for folder in getattr(self, "_made", []):
            try:
                folder.rmdir()
            except OSError:
                break  # not empty: keep it
        if not is_there(self.path) and LATEST.is_symlink() and real(LATEST) == self.path:
            with suppress(OSError):  # a dangling link is no worse than the original failure
                LATEST.unlink() if self._latest_before is None else _point_latest(self._latest_before)

    def close(self) -> None:
        """Release the locks."""
        while self._locks:
            os.close(self._locks.pop())

    def point_latest(self) -> None:
        """Point runs/latest to the run, or to the folder of its experiment. Raises ResultsError."""
        target = self.path if self.part_of is None else self.path.parent
        try:
            if LATEST.is_symlink() and real(LATEST) != target:
                self._latest_before = str(LATEST.readlink())
            root = real(LATEST.parent.parent)  # may be moved as a whole, so links inside it are relative
            inside = target.is_relative_to(root)
            _point_latest(os.path.relpath(target, real(LATEST.parent)) if inside else str(target))
        except OSError as error:
            trouble = f"cannot point {LATEST} to {target}: {reason(error)}"
            if error.errno not in (*UNSUPPORTED, errno.EPERM, errno.EPROTO):
                raise ResultsError(trouble) from None
            warn_once(f"{trouble}; that file system has no links: name the run by its folder")
        self._is_latest = True

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json; the first call points runs/latest to the run. Raises ResultsError."""
        text = json.dumps(summary, indent=2)
        for kept in (5, 1, 0):
            if len(text) < SUMMARY_BYTES:
                break
            for entry in summary["rounds"]:  # causes can be long; answers.parquet has all of them
                entry["failures"] = most_frequent(entry["failures"], kept)
            text = json.dumps(summary, indent=2)
        for kept in (500, 100, 0):
            if len(text) < SUMMARY_BYTES:
                break
            summary["cluster"]["lost"] = summary["cluster"]["lost"][:kept]
            text = json.dumps(summary, indent=2)
        with _on_disk(self.path / "summary.json") as file:
            file.write((text + "\n").encode())
        if not self._is_latest:  # once: a run started later remains the latest
            self.point_latest()

    def write_answers(self, round_number: int, answers: Iterator[Answers], scale: int) -> None:
        """Write one round's answers as they arrive to a separate file. Raises ResultsError."""
        path = self._part(round_number)
        self._failed = [entry for entry in self._failed if entry["round"] != round_number]  # from a failed attempt

        def rows() -> Iterator[pa.Table]:
            for part in answers:
                self._keep_failed(round_number, part)
                yield rows_of(round_number, part, scale)

        with _on_disk(path) as file:
            write_rows(file, rows())
        self._write_failed()

    def _write_failed(self) -> None:
        if self._failed:
            with _on_disk(self.path / FAILED_ANSWERS) as file:
                file.writelines((json.dumps(entry) + "\n").encode() for entry in self._failed)
        else:
            with _written(self.path / FAILED_ANSWERS):
                (self.path / FAILED_ANSWERS).unlink(missing_ok=True)

    def _keep_failed(self, round_number: int, part: Answers) -> None:
        """Keep the texts of failed answers, at most TEXTS_KEPT per run."""
        for participant, text in sorted(part.texts.items())[: TEXTS_KEPT - len(self._failed)]:
            cause = part.cause_of(participant)
            self._failed.append({"round": round_number, "participant": participant, "failure": cause, "text": text})

    def values(self, first: int, count: int, rounds: int) -> NDArray[np.float64]:
        """Return the answers of participants first .. first+count-1 in rounds 1 .. rounds.

        The shape is (rounds, count), with NaN where there is no answer. Raises ResultsError.
        """
        return np.stack([self._values(self._part(number + 1), first, count) for number in range(rounds)])

    def _values(self, part: Path, first: int, count: int) -> NDArray[np.float64]:
        try:
            return values_in(part, first, count)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise ResultsError(f"cannot read {part}: {one_line(error)}") from None

    def _part(self, round_number: int) -> Path:
        return self.path / f"answers-{round_number:05d}.parquet"

    def go_back_to(self, rounds: int) -> None:
        """Split the answers into one file per round, and delete those after `rounds`. Raises ResultsError."""
        whole = self.path / WHOLE
        with _written(self.path):
            if is_there(whole):
                for number, tables in groupby(rows_by_round(whole), key=itemgetter(0)):
                    if number <= rounds:
                        with _on_disk(self._part(number)) as file:
                            write_rows(file, map(itemgetter(1), tables))
                whole.unlink()
            for part in self.path.glob(PARTS):
                if part not in [self._part(number + 1) for number in range(rounds)]:
                    part.unlink()
            for name in MADE_OF_IT:  # outdated by the resume
                (self.path / name).unlink(missing_ok=True)
        self._failed = [entry for entry in read_failed_answers(self.path) if entry["round"] <= rounds]
        self._write_failed()

    def join_answers(self) -> None:
        """Merge the files of the rounds into answers.parquet. Raises ResultsError."""
        with _written(self.path / WHOLE):
            parts = sorted(self.path.glob(PARTS))
            if len(parts) == 1:
                parts[0].replace(self.path / WHOLE)
            elif parts:
                with _on_disk(self.path / WHOLE) as file:
                    write_rows(file, chain.from_iterable(map(rows_in, parts)))
                for part in parts:
                    part.unlink()

    def write_game(self, game: Game) -> None:
        """Write prompts and population to game.json, as their source files may change. Raises ResultsError."""
        cast = game.cast if game.cast is not None else Population(game.seed, 0)
        said = {"wording": asdict(game.wording) if game.wording is not None else None, "cast": cast.to_json()}
        self.write_json(GAME, said)

    def write_json(self, name: str, said: dict[str, Any]) -> None:
        """Write a JSON file of the folder. Raises ResultsError."""
        with _on_disk(self.path / name) as file:
            file.write((json.dumps(said, indent=2) + "\n").encode())

    def write_agents(self, agents: list[dict[str, Any]]) -> None:
        """Write the locations of kept agents to agents.jsonl. Raises ResultsError."""
        with _on_disk(self.path / AGENTS) as file:
            file.writelines((json.dumps(agent) + "\n").encode() for agent in agents)


def _point_latest(target: str) -> None:
    """Point runs/latest to `target` atomically. Raises OSError."""
    draft = LATEST.with_name(f"latest.{secrets.token_hex(4)}")  # matches DRAFT_OF_LATEST
    try:
        draft.symlink_to(target)
        draft.replace(LATEST)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def _check_latest() -> None:
    """Raise an error unless runs/latest can be updated (ResultsError: disk full; otherwise SettingsError)."""
    try:
        LATEST.parent.mkdir(exist_ok=True)
        _check_writable(LATEST.parent)
    except OSError as error:
        trouble = f"cannot write {LATEST}, which names the last run, wherever it is: {reason(error)}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResultsError(trouble) from None
        raise SettingsError(f"{trouble}; play in a checkout of your own") from None
    if not LATEST.is_symlink() and is_there(LATEST):
        raise SettingsError(f"{LATEST} is meant to be a link to the last run, and is not: move it away")
    for draft in LATEST.parent.glob("latest.*"):
        if DRAFT_OF_LATEST.fullmatch(draft.name) and draft.is_symlink() and not _is_locked(draft):
            draft.unlink(missing_ok=True)


def _is_locked(folder: Path) -> bool:
    """Return whether an active run may be writing in this folder.

    A draft of runs/latest points to the folder of the run that makes it, or of its experiment. That run holds the lock
    of the folder until it exits, so a draft being made by another run is kept, and one of a killed run is removed.
    """
    try:
        opened = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return not lock(opened, folder, NO_OTHER, wait=False)
    except OSError:
        return True
    finally:
        os.close(opened)


def _check_writable(folder: Path) -> None:
    if not folder.stat().st_mode & 0o222 or not os.access(folder, os.W_OK):  # root could write, but respects the mode
        raise PermissionError(errno.EACCES, f"{folder} is read-only")


def _lock(path: Path, shared: bool = False) -> int:
    """Lock a folder against other runs until the returned descriptor is closed; raises SettingsError if one holds it.

    With an exclusive lock, existing drafts are leftovers of killed processes and are removed. A `shared` lock of an
    experiment's folder excludes processes that play the whole experiment, not those that play one of its runs.
    """
    folder = os.open(path, os.O_RDONLY)
    try:
        alone = lock(folder, path, NO_OTHER, wait=False, shared=shared)
    except BlockingIOError:
        os.close(folder)
        raise SettingsError(f"{path} is being written by another run: wait for its end") from None
    except OSError:
        os.close(folder)
        raise
    for draft in _drafts(path) if alone and not shared else ():  # otherwise they may be another run's
        draft.unlink(missing_ok=True)
    return folder


def _drafts(path: Path) -> set[Path]:
    """Return the drafts in a run directory; those of earlier versions have no random part."""
    patterns = [f".{name}{part}.new" for name in WRITTEN for part in ("", ".*")]
    return {draft for pattern in patterns for draft in path.glob(pattern)}


def _make_folder(path: Path) -> list[Path]:
    """Create a folder with its parents, and return the new ones, the innermost first. Raises SettingsError."""
    if is_there(path) and {*path.iterdir()} - _drafts(path):
        if not is_there(path / "summary.json") and not is_there(path / SWEEP):
            raise SettingsError(f"--run-dir {path}: is not empty; name a new folder")
        raise SettingsError(
            f"--run-dir {path}: holds results already; name a new folder, or go on with that run: "
            f"--resume {shlex.quote(str(path))}"
        )
    new = [folder for folder in (path, *path.parents) if not is_there(folder)]
    for folder in (path, *path.parents):
        if is_there(folder):
            _check_writable(folder)
            break
    path.mkdir(parents=True, exist_ok=True)
    return new


@contextmanager
def _on_disk(path: Path) -> Iterator[IO[bytes]]:
    """Open a draft that, flushed to the disk, replaces `path` on success only. Raises ResultsError."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")  # several processes may draw the same report
    try:
        with _written(path):
            with draft.open("wb") as file:
                yield file
                file.flush()
                _flush(file.fileno())
            draft.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                _flush(folder)  # persists the rename
            finally:
                os.close(folder)
    finally:
        with suppress(OSError):  # on a failing disk the draft stays until the folder is next opened
            draft.unlink(missing_ok=True)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Convert errors of writing into a ResultsError that names the path."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:  # the latter: the source files cannot be read
        raise ResultsError(f"cannot write {path}: {reason(error)}") from None


def _flush(descriptor: int) -> None:
    """Flush a file or folder to the disk, if the file system supports it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically and durably. Raises ResultsError."""
    with _on_disk(path) as file:
        file.write(content)


# --- Read again -------------------------------------------------------------------------------------------------------


def read_written(path: Path, name: str, made: Callable[[str], T], flag: str = "") -> T:
    """Return the parsed content of a file in a run's folder.

    Args:
        path: The folder.
        name: The name of the file.
        made: Parses the text; may raise the errors in DAMAGED.
        flag: The flag that names the folder, as prefix of error messages.

    Raises:
        SettingsError: The file cannot be read, or is damaged.
    """
    try:
        return made(read_text(path / name))
    except OSError as error:
        raise SettingsError(f"{flag}{path}: cannot read its {name}: {reason(error)}") from None
    except SettingsError as error:
        raise SettingsError(f"{flag}{path}: its {name} is damaged, or of another version: {error}") from None
    except DAMAGED:
        raise SettingsError(f"{flag}{path}: its {name} is damaged, or of another version") from None


def read_failed_answers(path: Path) -> list[dict[str, Any]]:
    """Return the saved failed answers of a run. Raises SettingsError."""

    def entry_of(line: str) -> dict[str, Any]:
        entry: dict[str, Any] = json.loads(line)
        if type(entry["round"]) is not int:
            raise TypeError
        return entry

    if not is_there(path / FAILED_ANSWERS):
        return []
    return read_written(
        path, FAILED_ANSWERS, lambda text: [entry_of(line) for line in text.split("\n") if line.strip()]
    )


# --- summary.json ----------------------------------------------------------------------------------------------------


def summarise(
    config: SimulationConfig,
    run_id: str,
    status: str,
    cluster: dict[str, Any],
    seconds: dict[str, float],
    rounds: list[RoundResult],
    usage: Usage,
    part_of: PartOf | None = None,
) -> dict[str, Any]:
    """Return the content of summary.json; `status` is complete, partial, interrupted or failed."""
    llm = config.agent_type == "llm"
    return {
        "run_id": run_id,
        **({"part_of": part_of._asdict()} if part_of is not None else {}),
        "status": status,
        "config": config.to_json(),
        "cluster": cluster | ({"llm_seconds": _time_told_apart(usage, seconds["rounds"])} if llm else {}),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "rounds": [_round_summary(result, 10**config.decimals) for result in rounds],
        "llm": _llm_summary(usage) if llm else None,
    }


def _llm_summary(usage: Usage) -> dict[str, int]:
    return {name: getattr(usage, name) for name in ("requests", "prompt_tokens", "completion_tokens", "retries")}


def _time_told_apart(usage: Usage, rounds_s: float) -> dict[str, float]:
    """Return the seconds of the rounds spent waiting for the model, on work of the slowest agent server, and on RPC."""
    parts = (usage.answering_s - usage.client_s, usage.client_s, rounds_s - usage.answering_s)
    return {name: round(max(part, 0.0), 4) for name, part in zip(("model", "client", "rpc"), parts, strict=True)}


def _round_summary(result: RoundResult, scale: int) -> dict[str, Any]:
    tally = result.tally
    std = tally.std()
    return {
        "round": result.round,
        "asked": tally.asked,
        "answered": tally.answered,
        "failed": tally.failed,
        "failures": most_frequent(tally.failures),
        "ended": tally.ended.name.lower(),
        "reassigned": result.reassigned,
        "average": _value(result.average, scale),
        "median": _value(tally.median(), scale),
        "std": None if std is None else std / scale,
        "min": int(tally.units[0]) / scale if tally.answered else None,
        "max": int(tally.units[-1]) / scale if tally.answered else None,
        "winning_number": _value(result.winning_number, scale),
        "winners": {"count": result.winners.count, "participants": [f"P{index}" for index in result.winners.lowest]},
        "seconds": round(result.seconds, 4),
    }


def most_frequent(failures: dict[str, int], kept: int = CAUSES_SHOWN) -> dict[str, int]:
    """Return the `kept` most frequent causes, with all others counted together."""
    others = failures.get(OTHER_CAUSES, 0)
    ordered = sorted((item for item in failures.items() if item[0] != OTHER_CAUSES), key=lambda i: (-i[1], i[0]))
    others += sum(count for _, count in ordered[kept:])
    return dict(ordered[:kept]) | ({OTHER_CAUSES: others} if others else {})


def _value(units: Fraction | None, scale: int) -> float | None:
    return None if units is None else float(units / scale)
