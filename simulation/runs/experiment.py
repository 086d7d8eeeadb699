"""Experiment files: YAML files of game settings. A list of values for a setting describes a sweep over these values.

This module sends no requests to servers.
"""

import itertools
import math
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simulation.errors import SettingsError, nearest, printable
from simulation.files import full_path
from simulation.results.run_directory import new_run_id
from simulation.runs.yaml_file import YamlFile
from simulation.settings import KINDS, SETTINGS, SimulationConfig, flag_of, to_number

MOST_COMBINATIONS = 1000
LONGEST_NAME = 120  # maximum number of characters in the name of a run folder, after the number
OF_GAME = {name: each for name, each in SETTINGS.items() if each.game}
RUN_FOLDER = re.compile(r"[0-9]+-[A-Za-z0-9.,=_+-]*")


class Experiment:
    """An experiment file. The settings in `given`, which come from flags, override those in the file.

    The constructor raises SettingsError with the line number if the file is invalid.
    """

    def __init__(self, path: str, given: dict[str, Any]) -> None:
        self._file = file = YamlFile(path, "--experiment")
        self._folder = Path(full_path("--experiment", path)).parent
        self.about = file.data.get("about")
        if not isinstance(self.about, str | None):
            raise file.error(("about",), "about must be text")
        values = {name: self._read_values(name) for name in file.data if name != "about"}
        self.settings = {name: each for name, each in values.items() if name not in given}  # the values of each setting
        self.varies = tuple(name for name, each in self.settings.items() if len(each) > 1)
        if (count := math.prod(map(len, self.settings.values()))) > MOST_COMBINATIONS:
            raise file.error((), f"has {count:,} combinations; the maximum is {MOST_COMBINATIONS:,}")
        self.configs = [  # the settings of each run, in the order of execution
            SimulationConfig(**given, **dict(zip(self.settings, each, strict=True)))
            for each in itertools.product(*self.settings.values())
        ]

    def _read_values(self, name: str) -> list[Any]:
        if name not in OF_GAME:
            text = f"{name} is not known here; {nearest(name, ['about', *OF_GAME])}"
            if name.replace("-", "_") in KINDS.keys() - OF_GAME.keys():
                text = f"{name} is not a setting of the game; give it on the command line as {flag_of(name)}"
            raise self._file.error((name,), text)
        written = self._file.data[name]
        values: list[Any] = []
        for position, each in enumerate(written if isinstance(written, list) else [written]):
            try:
                values.append(self._read_value(name, each))
                if values[-1] in values[:-1]:
                    raise SettingsError(f"{name} {value_text(name, values[-1])} is in the list twice")
            except SettingsError as error:
                raise self._error_at(name, position, error) from None
        if not values:
            raise self._file.error((name,), f"{name} has an empty list; give at least one value")
        return values

    def _read_value(self, name: str, value: Any) -> Any:
        """Validate and convert a value like the value of the flag. A path is relative to the folder of the file."""
        if value is None and OF_GAME[name].default is None:
            return None
        if name == "models" and isinstance(value, dict):
            if not all(isinstance(share, str) for share in value.values()):
                raise SettingsError("models: a model's share must be a number such as 2/3")
            value = ",".join(f"{model}={share}" for model, share in value.items())
        if not isinstance(value, str):
            kind = "null" if value is None else "a mapping" if isinstance(value, dict) else "a list inside a list"
            raise SettingsError(f"{name} must be a value or a list of values, not {kind}")
        if KINDS[name][0] in (int, float):
            value = to_number(KINDS[name][0], name, value)
        elif OF_GAME[name].path:
            value = os.path.normpath(full_path(name, value, self._folder))
        return getattr(SimulationConfig(**{name: value}), name)

    def _error_at(self, name: str, position: int, error: SettingsError) -> SettingsError:
        """Return the error with the line number in the file, and with the name of the setting instead of the flag."""
        return self._file.error((name, position), str(error).replace(flag_of(name), name, 1))

    def with_line(self, error: SettingsError, config: SimulationConfig) -> SettingsError:
        """Add the line number in the file to the error of a run. Return other errors unchanged."""
        for name, values in self.settings.items():
            if str(error).startswith((f"{flag_of(name)} ", f"{flag_of(name)}:")):
                return self._error_at(name, values.index(getattr(config, name)), error)
        return error

    def sweep(self) -> "Sweep":
        """Return the sweep of all runs. If the seed is not set, all runs get the same random seed."""
        seed, digits = secrets.randbits(32), max(len(str(len(self.configs))), 2)
        configs = {}
        for position, config in enumerate(self.configs, start=1):
            seeded = config if config.seed is not None else replace(config, seed=seed)
            name = ",".join(f"{name}={value_text(name, getattr(seeded, name))}" for name in self.varies)
            name = re.sub(r"[^A-Za-z0-9.,=_+-]+", "-", name)[:LONGEST_NAME]  # safe in shells
            configs[f"{position:0{digits}}-{name}"] = seeded
        return Sweep(new_run_id(), Path(self._file.name).name, self.about, self.varies, configs)


def value_text(name: str, value: Any) -> str:
    """Format the value of a setting."""
    if value is None:
        return "none"
    return printable(Path(value).name if name == "agent_class" else str(value))


def run_label(config: SimulationConfig, varies: Iterable[str]) -> str:
    """Format the settings in `varies`, which distinguish a run from the others: `ratio 1/2, prompt basic`."""
    return ", ".join(f"{name} {value_text(name, getattr(config, name))}" for name in varies)


@dataclass(frozen=True)
class Sweep:
    """All runs of an experiment. sweep.json contains this information."""

    sweep_id: str
    experiment: str  # the name of the experiment file
    about: str | None
    varies: tuple[str, ...]  # the settings that differ between the runs
    configs: dict[str, SimulationConfig]  # by the name of the run folder, in the order of execution

    def to_json(self) -> dict[str, Any]:
        """Return the content of sweep.json: the settings that all runs share, and the other settings of each run."""
        settings = {folder: config.to_json() for folder, config in self.configs.items()}
        shared = next(iter(settings.values()))
        return {
            "sweep_id": self.sweep_id,
            "experiment": self.experiment,
            "about": self.about,
            "varies": list(self.varies),
            "config": {name: value for name, value in shared.items() if name not in self.varies},
            "runs": [
                {"folder": folder, "settings": {name: each[name] for name in self.varies}}
                for folder, each in settings.items()
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Sweep":
        """Return the sweep that the content of sweep.json describes.

        Raises KeyError, TypeError, ValueError or SettingsError if the content is invalid.
        """
        configs = {
            each["folder"]: SimulationConfig.from_json({**data["config"], **each["settings"]}) for each in data["runs"]
        }
        if not all(isinstance(data[name] or "", str) for name in ("sweep_id", "experiment", "about")):
            raise TypeError("a name is not a text")
        if not configs or not all(map(RUN_FOLDER.fullmatch, configs)) or len(configs) < len(data["runs"]):
            raise ValueError("it names no runs, or folders elsewhere")
        if not set(data["varies"]) <= OF_GAME.keys():
            raise ValueError("it varies something that is not a setting of the game")
        return cls(data["sweep_id"], data["experiment"], data["about"], tuple(data["varies"]), configs)
