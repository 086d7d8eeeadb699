"""Experiments: a YAML file of game settings, in which a list of values runs a sweep.

This module validates experiments and sweeps, and compares finished runs. It contacts no server.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, create_model

from simulation.errors import SettingsError, printable, say
from simulation.files import full_path, is_there
from simulation.results.reader import read_run
from simulation.results.run_directory import SWEEP
from simulation.results.run_files import read_run_file
from simulation.runs.yaml_file import Entry, Place, YamlFile, read_yaml
from simulation.settings import KINDS, SETTINGS, SimulationConfig, flag_of, number

MOST_COMBINATIONS = 1000
OF_GAME = {name: each for name, each in SETTINGS.items() if each.game}


@dataclass(frozen=True)
class Combination:
    """One run of an experiment.

    Attributes:
        config: Its settings.
        varied: The settings that differ between the runs, in the order of the file.
        places: The place in the file of each setting that comes from there.
    """

    config: SimulationConfig
    varied: dict[str, Any]
    places: dict[str, Place] = field(repr=False)


@dataclass(frozen=True)
class Experiment:
    """A parsed experiment file.

    Attributes:
        file: The YAML file.
        about: The author's description.
        combinations: The runs in the order they are played: the first setting of the file varies slowest.
    """

    file: YamlFile
    about: str | None
    combinations: tuple[Combination, ...]

    def placed(self, error: SettingsError, combination: Combination) -> SettingsError:
        """Return the error with the setting's place in the file, or unchanged if the setting is not from the file."""
        said = re.match(r"--([a-z-]+)(?=[ :])", str(error))
        name = said[1].replace("-", "_") if said else ""
        if name not in combination.places:
            return error
        return self.file.refused(combination.places[name], _without_flag(error, name))


def read_experiment(path: str, given: dict[str, Any]) -> Experiment:
    """Read an experiment file and build its combinations.

    Args:
        path: The file.
        given: Settings from the command line, which override those of the file.

    Raises:
        SettingsError: The file cannot be read, or a setting is unknown, not a game setting or out of range.
    """
    file = read_yaml(path, "--experiment")
    entry = file.read_as(ExperimentEntry)
    settings: dict[str, list[Any]] = {name: getattr(entry, name) for name in file.said if name != "about"}
    _refuse_twice(file, settings)
    number = math.prod(len(values) for name, values in settings.items() if name not in given)
    if number > MOST_COMBINATIONS:
        raise file.refused((), f"makes {number:,} combinations, and may make {MOST_COMBINATIONS:,}")
    if "agent_class" in settings:  # relative to the experiment file, whatever the working directory
        folder = Path(full_path("--experiment", path)).parent
        settings["agent_class"] = [
            each and os.path.normpath(full_path("agent_class", each, folder)) for each in settings["agent_class"]
        ]
    from_file = {name: values for name, values in settings.items() if name not in given}
    several = [name for name, values in from_file.items() if len(values) > 1]
    combinations = []
    for positions in itertools.product(*(range(len(values)) for values in from_file.values())):
        chosen = dict(zip(from_file, positions, strict=True))
        values = {name: from_file[name][position] for name, position in chosen.items()}
        config = SimulationConfig(**{**given, **values, "experiment": path})
        places: dict[str, Place] = {name: (name, position) for name, position in chosen.items()}
        combinations.append(Combination(config, {name: values[name] for name in several}, places))
    return Experiment(file, entry.about, tuple(combinations))


def in_words(varied: dict[str, Any]) -> str:
    """Return the settings that distinguish a run from the others, as text: `ratio 1/2, prompt basic`."""
    return ", ".join(f"{name} {value_in_words(name, value)}" for name, value in varied.items())


def value_in_words(name: str, value: Any) -> str:
    """Return the text of a setting's value."""
    if value is None:
        return "none"
    return printable(Path(value).name if name == "agent_class" else str(value))


def _refuse_twice(file: YamlFile, settings: dict[str, list[Any]]) -> None:
    for name, values in settings.items():
        for position, value in enumerate(values):
            if value in values[:position]:
                raise file.refused((name, position), f"{name} {value_in_words(name, value)} is in its list already")


# --- What may be in the file -----------------------------------------------------------------------------------------


def _without_flag(error: SettingsError, name: str) -> str:
    """Return the message with the setting's name in place of its flag."""
    return str(error).replace(flag_of(name), name, 1) if str(error).startswith(flag_of(name)) else str(error)


def _read_list(name: str, said: Any) -> list[Any]:
    """Return the values of a setting as a list; raises ValueError if the list is empty."""
    if said == []:
        raise ValueError(f"{name} has an empty list: it must hold a value at least")
    return list(said) if isinstance(said, list) else [said]


def _read_value(name: str, said: Any) -> Any:
    """Return one value, validated like its command-line flag; raises ValueError."""
    if said is None and OF_GAME[name].default is None:
        return None
    if name == "models" and isinstance(said, dict):
        if not all(isinstance(share, str) for share in said.values()):
            raise ValueError("models: a model's share must be a number such as 2/3")
        said = ",".join(f"{model}={share}" for model, share in said.items())
    if not isinstance(said, str):
        what = "a list inside a list" if isinstance(said, list) else "a mapping" if said is not None else "null"
        raise ValueError(f"{name} must be a value, or a list of values, and is {what}")
    kind = KINDS[name][0]
    try:
        value: Any = number(kind, name, said) if kind in (int, float) else said
        made = getattr(SimulationConfig(**{name: value}), name)
        return value if OF_GAME[name].path else made  # a path is relative to the file, see read_experiment
    except SettingsError as error:
        raise ValueError(_without_flag(error, name)) from None


class _Game(Entry):
    about: str | None = None

    @classmethod
    def trouble_with(cls, name: str) -> str:
        """Return the error text for an unknown key; cluster settings are known but do not belong here."""
        setting = name.replace("-", "_")
        if setting in KINDS and setting not in OF_GAME:
            return f"{name} is no setting of the game: it belongs on the command line, as {flag_of(setting)}"
        return super().trouble_with(name)


def _field_of(name: str) -> Any:
    """Return the pydantic field of a list of values or a single value. Defaults come from SimulationConfig."""
    value = Annotated[Any, BeforeValidator(partial(_read_value, name))]
    return Annotated[Sequence[value], BeforeValidator(partial(_read_list, name))], ()


ExperimentEntry = create_model("ExperimentEntry", __base__=_Game, **{name: _field_of(name) for name in OF_GAME})


LONGEST_NAME = 120  # characters


FOLDER = re.compile(r"[0-9]+-[A-Za-z0-9.,=_+-]*")


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: the name of its folder, and its settings."""

    folder: str
    config: SimulationConfig


@dataclass(frozen=True)
class Sweep:
    """All runs of an experiment.

    Attributes:
        sweep_id: The id of the sweep.
        experiment: The name of the experiment file.
        about: The author's description.
        varies: The settings that differ between the runs, in the order of the file.
        runs: The runs in the order they are played.
    """

    sweep_id: str
    experiment: str
    about: str | None
    varies: tuple[str, ...]
    runs: tuple[SweepRun, ...]

    def varied(self, run: SweepRun) -> dict[str, Any]:
        """Return the settings that distinguish a run from the others."""
        return {name: getattr(run.config, name) for name in self.varies}

    def to_json(self) -> dict[str, Any]:
        """Return the content of sweep.json: the shared settings, and the folder and varied settings of each run."""
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
        """Build a sweep from sweep.json. Invalid content raises KeyError, TypeError, ValueError or SettingsError."""
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
    """Build the sweep that plays an experiment.

    Args:
        experiment: The experiment.
        configs: The settings of its runs, in order, with the seed set.
        sweep_id: The id of the sweep.
    """
    varies = tuple(experiment.combinations[0].varied)
    digits = max(len(str(len(configs))), 2)
    runs = tuple(
        SweepRun(f"{number:0{digits}}-{_folder_name({name: getattr(config, name) for name in varies})}", config)
        for number, config in enumerate(configs, start=1)
    )
    return Sweep(sweep_id, Path(experiment.file.name).name, experiment.about, varies, runs)


def _folder_name(varied: dict[str, Any]) -> str:
    """Return the varied settings as text without characters special to shells or file systems."""
    name = ",".join(f"{name}={value_in_words(name, value)}" for name, value in varied.items())
    return re.sub(r"[^A-Za-z0-9.,=_+-]+", "-", name)[:LONGEST_NAME]


def read_sweep(path: Path) -> Sweep:
    """Read the sweep in a folder that --resume names. Raises SettingsError."""
    return read_run_file(path, SWEEP, lambda text: Sweep.from_json(json.loads(text)), "--resume ")


def tell_comparison(folder: Path, sweep: Sweep) -> None:
    """Print the comparison of all runs and write it to the sweep's folder.

    Raises SettingsError if a file of a run is missing or damaged.
    """
    # imported late, as plotting takes half a second to import
    from simulation.results.comparison import comparison_lines, write_comparison  # noqa: PLC0415

    paths = [folder / run.folder for run in sweep.runs]
    runs = [read_run(path) for path in paths if is_there(path / "summary.json")]
    say("\n".join(comparison_lines(runs)))
    write_comparison(folder, runs)
