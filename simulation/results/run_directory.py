"""Creating and locking run folders, writing their files durably, and updating the link runs/latest.

Each file is written as a draft in the same folder, flushed to the disk and renamed, and is therefore always complete.
The drafts of a killed process are deleted by the next process that locks the folder.
"""

import errno
import json
import os
import secrets
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from simulation.errors import UNSUPPORTED, ResultsError, SettingsError, SimulationError, reason
from simulation.files import CODE, HOME, SOURCE, is_there, lock, read_text, real, shown, warn_once
from simulation.game.answer_sheet import KEPT, Answers
from simulation.game.game import Game, Pairs
from simulation.game.tally import RoundResult
from simulation.llm.prompts import KeptText
from simulation.results import answers_parquet, run_files
from simulation.results.answers_parquet import SCHEMA, joined_rows, rows_by_round, tables_of, values_in, write_rows
from simulation.results.run_files import FailedAnswer, SweepPosition
from simulation.results.texts_parquet import PROMPTS, TEXTS, Distinct, write_texts
from simulation.settings import SimulationConfig

if TYPE_CHECKING:
    from simulation.user_code import UserFile

LATEST = HOME / "runs" / "latest"
SUMMARY_BYTES = 250_000
WHOLE = "answers.parquet"
SCHEMAS = {"answers": SCHEMA, "texts": TEXTS, "prompts": PROMPTS}  # of files that are written round by round
FAILED_ANSWERS, AGENTS, GAME = "failed_answers.jsonl", "agents.jsonl", "game.json"
HUMAN = "human.json"  # figures of people to show beside the run
REPORT, ANALYSIS = "report.html", "analysis.json"
PICTURES = (REPORT, ANALYSIS, "histogram.png", "rounds.png")
SWEEP = "sweep.json"  # only the folder of an experiment contains this file
PROBE, PROBE_BYTES = ".probe.new", 256 * 1024  # a test file: detects a full disk before servers start
CONTROL = "control.json"  # contains, while the run is played, where commands for it are received
DRAFTS, DRAFTS_OF_LATEST = ".*.new", "latest." + 8 * "[0-9a-f]"


def new_run_id() -> str:
    """Return a new run id, unique across hosts. Alphabetical order is the order of creation, to the second."""
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)


def sweep_position(path: Path) -> SweepPosition | None:
    """Return the position of the run folder `path` in its experiment, or None if the run is not part of one."""
    folder = real(path)
    try:
        sweep = json.loads(read_text(folder.parent / SWEEP))
        number = [run["folder"] for run in sweep["runs"]].index(folder.name) + 1
        position = {"sweep_id": sweep["sweep_id"], "experiment": sweep["experiment"], "run": number}
        position |= {"about": sweep["about"]} if sweep.get("about") else {}
        return run_files.POSITION.validate_python(position | {"runs": len(sweep["runs"])})
    except (OSError, *run_files.DAMAGED):  # a damaged file is reported when the experiment is resumed
        return None


def script_command(flag: str, path: Path, *flags: str) -> str:
    """Return a shell command with the flag `flag`, whose value is `path`, and with `flags`."""
    script = "./run_simulation.sh" if real(Path()) == CODE else str(CODE / "run_simulation.sh")
    folder = shown(path)
    return shlex.join([script, flag, f"./{folder}" if folder.startswith("-") else folder, *flags])


resume_command = partial(script_command, "--resume")  # of a run or an experiment


class RunDirectory:
    """The folder of a run or of an experiment, created and locked by the constructor. It is new unless `resumed`.

    `within` is the folder of the experiment, if all its runs are played. Raises SettingsError if the folder cannot be
    used. The constructor (for a full disk) and all methods raise ResultsError for files.
    """

    def __init__(self, path: Path, resumed: bool = False, within: "RunDirectory | None" = None) -> None:
        self.path = real(path)  # resolve links now: runs/latest may change during the run
        self.position = sweep_position(self.path)
        self.failed_now: list[FailedAnswer] = []  # some failures of the latest round
        self.config = SimulationConfig()  # the settings of the run, set before its first round
        self._failed: list[FailedAnswer] = []
        self._made, self._locks = list[Path](), list[int]()
        self._whole = within or self  # all runs of an experiment together update runs/latest once
        self._was_latest = False
        try:
            self._open(resumed, within is None)
        except (OSError, SimulationError) as error:
            self.close()
            if isinstance(error, SimulationError):
                raise
            failure = f"cannot write results to {error.filename or self.path}: {reason(error)}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT) or within is not None:  # the settings are not at fault
                raise ResultsError(failure) from None
            raise SettingsError(failure + ("" if resumed else "; give another --run-dir")) from None

    def _open(self, resumed: bool, alone: bool) -> None:
        LATEST.parent.mkdir(exist_ok=True)
        if not LATEST.is_symlink() and is_there(LATEST):
            raise SettingsError(f"{LATEST} is meant to be a link to the last run, and is not: move it away")
        if not resumed and is_there(self.path) and {*self.path.iterdir()} - _drafts(self.path):
            has_results = is_there(self.path / "summary.json") or is_there(self.path / SWEEP)
            problem = "holds results already" if has_results else "is not empty"
            advice = f", or go on with that run: --resume {shlex.quote(str(self.path))}" if has_results else ""
            raise SettingsError(f"--run-dir {self.path}: {problem}; name a new folder{advice}")
        folders = [self.path, *self.path.parents]
        self._made = [folder for folder in folders if not is_there(folder)]
        for folder in (LATEST.parent, folders[len(self._made)]):  # os.access alone is always True for root
            if not folder.stat().st_mode & 0o222 or not os.access(folder, os.W_OK):
                raise SettingsError(f"cannot write in {folder}: it is read-only")
        self.path.mkdir(parents=True, exist_ok=True)
        if self.position is not None and alone:  # other processes may play single runs, but not the whole experiment
            self._lock(self.path.parent, shared=True)
        if self._lock(self.path):  # without a lock, the drafts may be those of a running process
            for draft in _drafts(self.path):
                draft.unlink(missing_ok=True)
        write_whole(self.path / PROBE, os.urandom(PROBE_BYTES))
        (self.path / PROBE).unlink()

    def _lock(self, path: Path, shared: bool = False) -> bool:
        """Lock a folder until `close`. Return False if locks are unsupported. Raises SettingsError if it is in use."""
        self._locks.append(os.open(path, os.O_RDONLY))
        try:
            return lock(self._locks[-1], path, "see to it that no other run writes there", wait=False, shared=shared)
        except BlockingIOError:
            raise SettingsError(f"{path} is being written by another run: wait for its end") from None

    def close(self) -> None:
        """Release the locks, and remove the created folders that are still empty."""
        with suppress(OSError):  # the folder is not empty
            for folder in self._made:
                folder.rmdir()
        while self._locks:
            os.close(self._locks.pop())

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json; if it is too long, omit rare failure causes and some lost servers. Update runs/latest."""
        for causes, lost in ((5, None), (1, None), (0, None), (0, 500), (0, 100), (0, 0)):
            if len(json.dumps(summary, indent=2)) < SUMMARY_BYTES:
                break
            for entry in summary["rounds"]:  # answers.parquet still contains all causes, and analysis.json all analyses
                entry["failures"] = run_files.most_frequent(entry["failures"], causes)
                entry.pop("analysis" if lost == 0 else "", None)
            summary["cluster"]["lost"] = summary["cluster"]["lost"][:lost]
        self.write_json("summary.json", summary)
        if not self._whole._was_latest:  # only once: a run that was started later remains the latest
            self._point_latest()
            self._whole._was_latest = True

    def _point_latest(self) -> None:
        """Link runs/latest to this run or to its experiment. If links are unsupported, log a warning instead."""
        target = self.path if self.position is None else self.path.parent
        inside = target.is_relative_to(real(LATEST.parent.parent))  # a relative link: users may move the checkout
        draft = LATEST.with_name(f"latest.{secrets.token_hex(4)}")  # matches DRAFTS_OF_LATEST
        try:
            draft.symlink_to(os.path.relpath(target, real(LATEST.parent)) if inside else target)
            draft.replace(LATEST)
        except OSError as error:
            failure = f"cannot point {LATEST} to {target}: {reason(error)}"
            if error.errno not in (*UNSUPPORTED, errno.EPERM, errno.EPROTO):
                raise ResultsError(failure) from None
            warn_once(f"{failure}; that file system has no links: name the run by its folder")
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)

    def write_answers(self, result: RoundResult, answers: Iterator[Answers], game: Game) -> None:
        """Write the answers of one round to a separate file, piece by piece. Update the file of failed answers."""
        self.failed_now, config = [], self.config
        payoffs = config.payoffs or config.game != SimulationConfig.game

        def keep_examples() -> Iterator[Answers]:
            for part in answers:
                for participant, details in sorted(part.examples.items()):
                    entry: Any = {"round": result.round, "participant": participant}
                    _keep(self.failed_now, entry | {"failure": part.cause_of(participant), **details})
                yield part

        with _on_disk(self._part(result.round)) as file:
            write_rows(file, tables_of(result, keep_examples(), game, payoffs, config.to_json()))
        self._failed = [entry for entry in self._failed if entry["round"] != result.round]  # omit an earlier attempt's
        for entry in self.failed_now:
            _keep(self._failed, entry)
        self.write_lines(FAILED_ANSWERS, self._failed)

    def pairs(self, round_number: int, count: int, scale: int) -> Iterator[Pairs]:
        """Yield, in pieces, the answers of participants 0 .. count-1 who answered in this round and the last."""
        size = answers_parquet.ROWS_AT_ONCE
        for first in range(0, count, size) if round_number > 1 else ():
            values = self.values(first, min(size, count - first), round_number, round_number - 2)
            before, after = np.rint(values[:, ~np.isnan(values).any(axis=0)] * scale).astype(np.int64)
            yield before, after

    def values(self, first: int, count: int, rounds: int, skipped: int = 0) -> NDArray[np.float64]:
        """Return a (rounds - skipped, count) array: answers of participants first .. first+count-1. NaN: no answer."""
        with results_errors(f"read the answers in {self.path}"):
            return np.stack([values_in(self._part(number + 1), first, count) for number in range(skipped, rounds)])

    def write_texts(self, round_number: int, texts: Iterator[list[KeptText]]) -> tuple[int, int]:
        """Write what models wrote in one round. Return the numbers of texts and of those with replaced characters."""
        parts = (self._part(round_number, kind) for kind in ("texts", "prompts"))
        with _on_disk(next(parts)) as file, _on_disk(next(parts)) as other:
            return write_texts(file, other, round_number, texts)

    def _part(self, round_number: int, kind: str = "answers") -> Path:
        return self.path / f"{kind}-{round_number:05d}.parquet"

    def write_sources(self, sources: "Iterable[UserFile]") -> None:
        """Write copies of `sources` to the folder source/, in place of earlier copies."""
        for each in sources:
            copy = self.path / SOURCE / each.name
            with results_errors(f"write {copy}"):
                copy.parent.mkdir(parents=True, exist_ok=True)
            write_whole(copy, each.content)

    def go_back_to(self, rounds: int) -> None:
        """Delete pictures, report and what is after round `rounds`. Split answers and texts into files by round."""
        outdated = {self.path / name for name in PICTURES}
        with results_errors(f"write {self.path}"):
            for kind, schema in SCHEMAS.items():
                whole = self.path / f"{kind}.parquet"
                for number, tables in groupby(rows_by_round(whole, schema), itemgetter(0)) if is_there(whole) else ():
                    if number <= rounds:
                        with _on_disk(self._part(number, kind)) as file:
                            write_rows(file, map(itemgetter(1), tables))
                outdated |= {whole, *self.path.glob(f"{kind}-*.parquet")}
                outdated -= {self._part(number + 1, kind) for number in range(rounds)}
            for path in outdated:
                path.unlink(missing_ok=True)
            failed = run_files.read_json_lines(self.path, FAILED_ANSWERS, FailedAnswer)
        self._failed = [entry for entry in failed if entry["round"] <= rounds]
        self.write_lines(FAILED_ANSWERS, self._failed)

    def join_answers(self) -> None:
        """Merge the files of answers and of texts of all rounds into one each, then delete the files of the rounds."""
        for kind, schema in SCHEMAS.items():
            whole = self.path / f"{kind}.parquet"
            with results_errors(f"write {whole}"):
                parts = sorted(self.path.glob(f"{kind}-*.parquet"))
                if len(parts) == 1:
                    parts[0].replace(whole)
                elif parts:
                    rows = joined_rows(parts, schema)
                    with _on_disk(whole) as file:
                        write_rows(file, map(Distinct(), rows) if kind == "prompts" else rows)
                    for part in parts:
                        part.unlink()

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_whole(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def write_lines(self, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write `entries` to the JSON lines file `name`. If there are no entries, delete the file."""
        with results_errors(f"write {self.path / name}"):
            if entries:
                write_whole(self.path / name, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
            else:
                (self.path / name).unlink(missing_ok=True)


def _keep(kept: list[FailedAnswer], entry: FailedAnswer) -> None:
    """Append a failure unless enough are kept (see KEPT)."""
    if len(kept) < (KEPT if any(each["failure"] == entry["failure"] for each in kept) else 2 * KEPT):
        kept.append(entry)


def _drafts(path: Path) -> set[Path]:
    """Return the leftover drafts in `path`, and drafts of the link runs/latest whose target is `path` or missing."""
    links = (link for link in LATEST.parent.glob(DRAFTS_OF_LATEST) if link.is_symlink())
    drafts = {link for link in links if real(link) == path or not is_there(link)}
    return drafts | {*path.glob(DRAFTS), *path.glob(CONTROL)}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically and flush it to the disk. Raises ResultsError if this fails."""
    with _on_disk(path) as file:
        file.write(content)


@contextmanager
def _on_disk(path: Path) -> Iterator[IO[bytes]]:
    """Open a draft. If the block succeeds, flush the draft to the disk and rename it to `path`. Raises ResultsError."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")  # unique: others may write `path`, too
    try:
        with results_errors(f"write {path}"):
            with draft.open("wb") as file:
                yield file
            _flush(draft)
            draft.replace(path)
            _flush(path.parent)  # persists the rename
    finally:
        with suppress(OSError):  # if this fails, the next process that locks the folder deletes the draft
            draft.unlink(missing_ok=True)


@contextmanager
def results_errors(action: str) -> Iterator[None]:
    """Convert file errors in the `with` block into a ResultsError whose message states that `action` failed."""
    try:
        yield
    except (OSError, pa.ArrowException, SettingsError) as error:
        raise ResultsError(f"cannot {action}: {reason(error)}") from None


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk, if the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
