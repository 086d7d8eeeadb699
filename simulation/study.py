"""Results in Python: runs and studies as pandas tables, their reports, and questions to participants."""

import html
import json
import os
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.dataset as ds

from simulation.errors import SettingsError, SimulationError, printable
from simulation.files import full_path, is_there
from simulation.playing import ask
from simulation.results import reader
from simulation.results.run_directory import SWEEP
from simulation.results.run_files import read_run_file
from simulation.runs.experiment import Sweep
from simulation.settings import OF_SET, SETTINGS, flag_of, moved

REPORT_HEIGHT = 800  # of a page in a notebook (pixels)
FLAGS = {flag_of(name): name for name in SETTINGS}


@contextmanager
def readable_errors() -> Iterator[None]:
    """Name settings in the messages of errors as in Python."""
    try:
        yield
    except SimulationError as error:
        error.args = (in_python(str(error)), *error.args[1:])
        raise


def in_python(text: str) -> str:
    """Return a message with `participant_num` in place of `--participant-num`, and so on."""
    return re.sub(r"--[a-z][a-z-]*", lambda match: FLAGS.get(match[0], match[0]), text)


# Columns of tables; a parameter of one of these names has a column `set.NAME`
TAKEN = {"run", "seed", "status", "participant", "value", "failure", "payoff", "won", "kind", "model", "team"}


class _Kept:
    """Keeps the servers of a run or study: they stop at `close`, or when all objects that share this are gone."""

    def __init__(self, servers: ExitStack) -> None:
        owner = os.getpid()  # not in a forked process
        self.close = weakref.finalize(self, lambda: servers.close() if os.getpid() == owner else None)


class Report:
    """A page of results: `path` is an HTML file. In a notebook, the page displays itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Report({str(self.path)!r})"

    def _repr_html_(self) -> str:
        page = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: {REPORT_HEIGHT}px; border: 0"></iframe>'


class Run:
    """A saved run in the folder `path`. Tables and summary are read when they are first used.

    `warnings` are those about servers and hooks, if this process has played the run.
    If its agents were kept on servers of this process, the servers run until `close`, or as long as this object exists.
    """

    def __init__(self, path: Path, kept: _Kept | None = None) -> None:
        self._saved = reader.read_summary(path)
        self.path, self._kept = path, kept
        self.warnings: list[str] = []

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        return self._saved.summary

    @property
    def status(self) -> str:
        """How the run ended: complete, partial, interrupted or failed."""
        return str(self.summary["status"])

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """One row per round: the figures of summary.json, and the outcome of the game."""
        entries = self.summary["rounds"]
        names = dict.fromkeys(name for entry in entries for name in entry["outcome"])
        # A figure of the game may have the name of another column
        columns = {
            name: f"outcome.{name}"
            if any(entry.get(name, own) != own for entry, own in _figures(entries, name))
            else name
            for name in names
        }
        table = pd.DataFrame([_flat(entry, columns) for entry in entries])
        unknown = [name for name in table if table[name].isna().all()]  # None in every round
        return table.astype(dict.fromkeys(unknown, float))

    @cached_property
    def answers(self) -> pd.DataFrame:
        """One row per round and participant: the columns of answers.parquet."""
        return self._table("answers")

    @cached_property
    def texts(self) -> pd.DataFrame:
        """One row per kept text of a language model: the columns of texts.parquet. Empty without texts."""
        return self._table("texts")

    def _table(self, kind: str) -> pd.DataFrame:
        files = [file for file in reader.files_of(self.path, kind) if is_there(file)]
        return ds.dataset(files).to_table().to_pandas() if files else pd.DataFrame()

    @property
    def report(self) -> Report:
        """The page with figures and pictures of the run. Raises SettingsError if there is none yet."""
        return _report(self.path / "report.html")

    def ask(self, participant: int | None, text: str) -> str:
        """Send a message to a participant (None: the first winner) of a run with kept agents. Return the answer.

        Raises SettingsError for an unknown participant, and ClusterError if the agents are gone.
        """
        if participant is not None and type(participant) is not int:
            raise SettingsError(f"participant {participant!r}: must be a number, such as 17 for P17")
        if not isinstance(text, str) or not text.strip():
            raise SettingsError(f"text {text!r}: must be a question")
        with readable_errors():
            return ask(self.path, participant, text)

    def close(self) -> None:
        """Stop the servers that keep the agents of this run, or of its study."""
        if self._kept is not None:
            self._kept.close()

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        count, played = self._saved.config.participant_num, self._saved.rounds_finished
        failed = sum(entry["failed"] for entry in self.summary["rounds"])
        words = f"{self.status}, {count:,} participants, rounds played: {played}"
        return f"<Run {self.path.name}: {words}{f', failed answers: {failed:,}' if failed else ''}>"


class Study:
    """The runs of a sweep or of repeats in the folder `path`. Tables have a column for each setting that varies.

    Servers of this process that keep agents run until `close`, or as long as this object exists.
    """

    def __init__(self, path: Path, kept: _Kept | None = None) -> None:
        self.path, self._kept = path, kept
        self.warnings: list[str] = []
        self._sweep = read_run_file(path, SWEEP, lambda text: Sweep.from_json(json.loads(text)))
        self.runs = [Run(each, kept) for each in reader.runs_in(path)]

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per run: the settings that vary, the seed, the status, and the figures of the last round."""
        rows = []
        for run in self.runs:
            last: dict[Any, Any] = {} if run.rounds.empty else run.rounds.iloc[-1].to_dict()
            rows.append({**self._settings(run), "status": run.status, **last})
        return pd.DataFrame(rows)

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """The rounds of all runs."""
        return self._joined("rounds")

    @cached_property
    def answers(self) -> pd.DataFrame:
        """The answers of all runs."""
        return self._joined("answers")

    @cached_property
    def texts(self) -> pd.DataFrame:
        """The kept texts of all runs."""
        return self._joined("texts")

    @property
    def report(self) -> Report:
        """The page that compares the runs. Raises SettingsError if there is none yet."""
        return _report(self.path / "comparison.html")

    def close(self) -> None:
        """Stop the servers that keep agents of these runs."""
        if self._kept is not None:
            self._kept.close()

    def _settings(self, run: Run) -> dict[str, Any]:
        config = self._sweep.configs[run.path.name]
        parameters, taken, varied = config.to_json()["set"], TAKEN | {*run.rounds}, dict[str, Any]()
        for name in self._sweep.varies:
            plain = name.removeprefix(OF_SET)
            value = config.value_of(name) if plain == name else parameters.get(plain)
            is_path = isinstance(value, str) and name in ("agent_class", "game", "players")
            value = moved(name, value, lambda path: Path(path).name) if is_path else value
            varied[name if name != plain and plain in taken else plain] = value
        return {"run": run.path.name, **varied, "seed": config.seed}

    def _joined(self, kind: str) -> pd.DataFrame:
        tables = []
        for run in self.runs:
            table, settings = getattr(run, kind), self._settings(run)
            tables.append(table.assign(**settings)[[*settings, *table]])
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> Run:
        return self.runs[index]

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        varied = ", ".join(name.removeprefix(OF_SET) for name in self._sweep.varies) or "the seed"
        return (
            f"<Study {self.path.name}: {len(self.runs)} of {len(self._sweep.configs)} runs, which differ in {varied}>"
        )


def read(path: str | os.PathLike[str], servers: ExitStack | None = None) -> Run | Study:
    """Return the run or the study in a folder, such as `runs/latest`. Raises SettingsError if there is none.

    `servers` stops the servers that keep agents of these runs.
    """
    if not isinstance(path, str | os.PathLike):
        raise SettingsError(f"read {printable(repr(path), 60)}: must be a path")
    kept = _Kept(servers) if servers is not None else None
    folder = Path(full_path("read", os.fspath(path)))
    if not is_there(folder):
        raise SettingsError(f"read {printable(str(path))}: there is no such folder")
    return Study(folder, kept) if is_there(folder / SWEEP) else Run(folder, kept)


def _report(path: Path) -> Report:
    if not is_there(path):
        raise SettingsError(f"{path}: is not written yet, or was removed; main.py --role report writes it")
    return Report(path)


def _figures(entries: Iterable[Mapping[str, Any]], name: str) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Yield each round whose outcome has the figure `name`, and that figure."""
    return ((entry, entry["outcome"][name]) for entry in entries if name in entry["outcome"])


def _flat(entry: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the columns of a round: its numbers and texts, the number of winners, and the figures of its outcome."""
    plain = {name: value for name, value in entry.items() if not isinstance(value, dict | list)}
    return {
        **plain,
        "winners": entry["winners"]["count"],
        **{columns[name]: own for name, own in entry["outcome"].items()},
    }
