"""The runs of an experiment: what their folders are called, what sweep.json says of them, and what they came to."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulation.config import SimulationConfig, is_there
from simulation.errors import say
from simulation.experiment import OF_GAME, Experiment, value_in_words
from simulation.past_runs import read_run
from simulation.results import SWEEP, read_written

LONGEST_NAME = 120  # characters
FOLDER = re.compile(r"[0-9]+-[A-Za-z0-9.,=_+-]*")


@dataclass(frozen=True)
class SweepRun:
    """One run: the name of its folder, and its settings."""

    folder: str
    config: SimulationConfig


@dataclass(frozen=True)
class Sweep:
    """All runs of an experiment.

    Attributes:
        sweep_id: What they are called together.
        experiment: The name of the experiment's file.
        about: What it is for.
        varies: The settings that tell the runs apart, in the order of the file.
        runs: In the order they are played.
    """

    sweep_id: str
    experiment: str
    about: str | None
    varies: tuple[str, ...]
    runs: tuple[SweepRun, ...]

    def varied(self, run: SweepRun) -> dict[str, Any]:
        """The settings that tell a run from the others."""
        return {name: getattr(run.config, name) for name in self.varies}

    def to_json(self) -> dict[str, Any]:
        """The content of sweep.json: the settings that all runs share, and for each run its folder and its others."""
        shared = {name: value for name, value in self.runs[0].config.to_json().items() if name not in self.varies}
        return {
            "sweep_id": self.sweep_id,
            "experiment": self.experiment,
            "about": self.about,
            "varies": list(self.varies),
            "config": shared,
            "runs": [{"folder": run.folder, "settings": self._written(run)} for run in self.runs],
        }

    def _written(self, run: SweepRun) -> dict[str, Any]:
        said = run.config.to_json()
        return {name: said[name] for name in self.varies}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Sweep:
        """The sweep that was written so. Raises KeyError, TypeError, ValueError or SettingsError if it was not."""
        runs = tuple(
            SweepRun(each["folder"], SimulationConfig.from_json({**said["config"], **each["settings"]}))
            for each in said["runs"]
        )
        if not all(isinstance(said[name] or "", str) for name in ("sweep_id", "experiment", "about")):
            raise TypeError("it has other names than texts")
        folders = [run.folder for run in runs]
        if not runs or not all(map(FOLDER.fullmatch, folders)) or len(set(folders)) < len(folders):
            raise ValueError("it names no runs, or folders elsewhere")
        if not set(said["varies"]) <= OF_GAME.keys():
            raise ValueError("it varies what is no setting of the game")
        return cls(said["sweep_id"], said["experiment"], said["about"], tuple(said["varies"]), runs)


def sweep_of(experiment: Experiment, configs: Sequence[SimulationConfig], sweep_id: str) -> Sweep:
    """The sweep that plays an experiment.

    Args:
        experiment: What is played.
        configs: The settings of its runs, as they are played: with a seed.
        sweep_id: What they are called together.
    """
    varies = tuple(experiment.combinations[0].varied)
    digits = max(len(str(len(configs))), 2)
    runs = tuple(
        SweepRun(f"{number:0{digits}}-{_folder_name({name: getattr(config, name) for name in varies})}", config)
        for number, config in enumerate(configs, start=1)
    )
    return Sweep(sweep_id, Path(experiment.file.name).name, experiment.about, varies, runs)


def _folder_name(varied: dict[str, Any]) -> str:
    """What varies, in signs that mean nothing to shells and file systems."""
    name = ",".join(f"{name}={value_in_words(name, value)}" for name, value in varied.items())
    return re.sub(r"[^A-Za-z0-9.,=_+-]+", "-", name)[:LONGEST_NAME]


def read_sweep(path: Path) -> Sweep:
    """The sweep in a folder that --resume names. Raises SettingsError."""
    return read_written(path, SWEEP, lambda text: Sweep.from_json(json.loads(text)), "--resume ")


def tell_comparison(folder: Path, sweep: Sweep) -> None:
    """Say what all runs came to, and draw it in the sweep's folder.

    Raises SettingsError if what belongs to a run is missing.
    """
    # half a second for pictures, which nobody waits for earlier
    from simulation.comparison import comparison_lines, write_comparison  # noqa: PLC0415

    paths = [folder / run.folder for run in sweep.runs]
    runs = [read_run(path) for path in paths if is_there(path / "summary.json")]
    say("\n".join(comparison_lines(runs)))
    write_comparison(folder, runs)
