"""Experiments: a YAML file with settings of the game, of which those with a list of values make a run for each.

It reads and checks; nobody is asked, and nothing is written.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any

from pydantic import BeforeValidator, create_model

from simulation.config import SimulationConfig, flag_of, full_path, real_number, whole_number
from simulation.errors import SettingsError, printable
from simulation.yaml_file import Entry, Place, YamlFile, read_yaml

MOST_COMBINATIONS = 1000
OF_GAME = {item.name: item for item in fields(SimulationConfig) if item.metadata.get("game")}
KINDS = typing.get_type_hints(SimulationConfig)


@dataclass(frozen=True)
class Combination:
    """One run of an experiment.

    Attributes:
        config: Its settings.
        varied: Those that tell it from the other runs, in the order of the file.
        places: Where in the file the settings come from that do.
    """

    config: SimulationConfig
    varied: dict[str, Any]
    places: dict[str, Place] = field(repr=False)


@dataclass(frozen=True)
class Experiment:
    """A file as it was read.

    Attributes:
        file: The file.
        about: What it is for, as its author says.
        combinations: The runs, in the order they are played: the first setting of the file varies slowest.
    """

    file: YamlFile
    about: str | None
    combinations: tuple[Combination, ...]

    def placed(self, error: SettingsError, combination: Combination) -> SettingsError:
        """What is wrong with a setting, told of its place in the file, if that is where the setting comes from."""
        said = re.match(r"--([a-z-]+)(?=[ :])", str(error))
        name = said[1].replace("-", "_") if said else ""
        if name not in combination.places:
            return error
        return self.file.refused(combination.places[name], _without_flag(error, name))


def read_experiment(path: str, given: dict[str, Any]) -> Experiment:
    """Read an experiment.

    Args:
        path: The file.
        given: Settings given by hand, which win over those of the file.

    Raises:
        SettingsError: It cannot be read, or a setting is unknown, not of the game or out of range.
    """
    file = read_yaml(path, "--experiment")
    entry = file.read_as(ExperimentEntry)
    settings: dict[str, list[Any]] = {name: getattr(entry, name) for name in file.said if name != "about"}
    _refuse_twice(file, settings)
    number = math.prod(len(values) for name, values in settings.items() if name not in given)
    if number > MOST_COMBINATIONS:
        raise file.refused((), f"makes {number:,} combinations, and may make {MOST_COMBINATIONS:,}")
    if "agent_class" in settings:  # beside the experiment, wherever that is played from
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
    """What tells a run from the others: `ratio 1/2, prompt basic`."""
    return ", ".join(f"{name} {value_in_words(name, value)}" for name, value in varied.items())


def value_in_words(name: str, value: Any) -> str:
    """A setting's value as it is told."""
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
    """The message with the setting's name in place of its flag."""
    return str(error).replace(flag_of(name), name, 1) if str(error).startswith(flag_of(name)) else str(error)


def _read_list(name: str, said: Any) -> list[Any]:
    """The values of a setting, one or several of which each makes a run."""
    if said == []:
        raise ValueError(f"{name} has an empty list: it must hold a value at least")
    return list(said) if isinstance(said, list) else [said]


def _read_value(name: str, said: Any) -> Any:
    """One value, checked as its flag's is; raises ValueError."""
    if said is None and OF_GAME[name].default is None:
        return None
    if name == "models" and isinstance(said, dict):
        if not all(isinstance(share, str) for share in said.values()):
            raise ValueError("models: a model's share must be a number such as 2/3")
        said = ",".join(f"{model}={share}" for model, share in said.items())
    if not isinstance(said, str):
        what = "a list inside a list" if isinstance(said, list) else "a mapping" if said is not None else "null"
        raise ValueError(f"{name} must be a value, or a list of values, and is {what}")
    kinds = typing.get_args(KINDS[name]) if isinstance(KINDS[name], UnionType) else (KINDS[name],)
    try:
        value: Any = whole_number(name, said) if int in kinds else real_number(name, said) if float in kinds else said
        made = getattr(SimulationConfig(**{name: value}), name)
        return value if OF_GAME[name].metadata["path"] else made  # a path starts from the file, see read_experiment
    except SettingsError as error:
        raise ValueError(_without_flag(error, name)) from None


class _Game(Entry):
    about: str | None = None

    @classmethod
    def trouble_with(cls, name: str) -> str:
        """Settings of the cluster are known, but do not belong here."""
        setting = name.replace("-", "_")
        if setting in KINDS and setting not in OF_GAME:
            return f"{name} is no setting of the game: it belongs on the command line, as {flag_of(setting)}"
        return super().trouble_with(name)


def _field_of(name: str) -> Any:
    """A list of values, which may be written as one value; nothing is said of defaults, which SimulationConfig has."""
    value = Annotated[Any, BeforeValidator(partial(_read_value, name))]
    return Annotated[Sequence[value], BeforeValidator(partial(_read_list, name))], ()


ExperimentEntry = create_model("ExperimentEntry", __base__=_Game, **{name: _field_of(name) for name in OF_GAME})
