"""Experiment files: YAML files of game settings. A list of values for a setting describes a sweep over these values."""

import itertools
import math
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from simulation.errors import SettingsError, nearest
from simulation.files import full_path
from simulation.game.population import GAMMA, MASK, mix
from simulation.results.run_directory import new_run_id
from simulation.results.run_files import SOURCES, SourceEntry
from simulation.results.tables import value_text
from simulation.settings import (
    FLAGS_OF_GAMES,
    KINDS,
    OF_SET,
    SETTINGS,
    SimulationConfig,
    flag_of,
    moved,
    to_number,
)
from simulation.yaml_file import YamlFile, items_in, text_of

MOST_RUNS = 1000  # of a sweep, repeats included
SEED_BITS = 32  # of the seeds of repeats, as of a seed that is drawn
LONGEST_NAME = 120  # maximum number of characters in the name of a run folder, after its leading number
OF_GAME = {name: each for name, each in SETTINGS.items() if each.game}
RUN_FOLDER = re.compile(r"[0-9]+-[A-Za-z0-9.,=_+-]*")


class Experiment(YamlFile):
    """An experiment file. The settings in `given`, which come from flags, override those in the file."""

    def __init__(self, path: str, given: dict[str, Any]) -> None:
        super().__init__(path, "--experiment")
        self._folder = Path(path).parent
        about = self.nodes.pop("about", yaml.ScalarNode("", "null"))
        if not isinstance(about, yaml.ScalarNode):
            raise self.error(about, "about must be text")
        assigned = self.nodes.pop("set", yaml.MappingNode("", []))
        for name, node in self.nodes_in(assigned, "set must be a mapping of parameters, as in set: {noise: 5}").items():
            key = name if name in FLAGS_OF_GAMES else f"{OF_SET}{name}"
            if key in self.nodes:
                raise self.error(node, f"{name} is already set in line {self.nodes[key].start_mark.line + 1}")
            self.nodes[key] = node
        values = {name: self._read_values(name, node) for name, node in self.nodes.items()}
        try:
            SimulationConfig.check_who_plays([*values, *given])
        except SettingsError as error:
            raise self._error_in_setting("players", self.nodes.get("players", self.root), error) from None
        set_by_flags = {*given, *(f"{OF_SET}{each.partition('=')[0]}" for each in given.get("set", ()))}
        self.settings = {name: each for name, each in values.items() if name not in set_by_flags}
        repeats = given.get("repeats") or self.settings.pop("repeats", [1])[0]
        if (count := math.prod(map(len, self.settings.values()))) * repeats > MOST_RUNS:
            times = f", each played {repeats:,} times" if repeats > 1 else ""
            raise self.error(self.root, f"has {count:,} combinations{times}; the maximum is {MOST_RUNS:,}")
        varies = tuple(name for name, each in self.settings.items() if len(each) > 1)
        seed, configs = secrets.randbits(32), []
        for combination in itertools.product(*self.settings.values()):
            chosen = dict(zip(self.settings, combination, strict=True))
            parameters = [name for name in chosen if name.startswith(OF_SET)]
            assignments = tuple(f"{name.removeprefix(OF_SET)}={chosen.pop(name)}" for name in parameters)
            assignments += given.get("set", ())
            config = SimulationConfig(**given | chosen | {"repeats": 1, "set": assignments})
            # Without a seed in the file, all combinations get the same one
            configs.append(config if config.seed is not None else replace(config, seed=seed))
        self.sweep = new_sweep(Path(self.name).name, text_of(about), varies, configs, repeats)

    def _read_values(self, name: str, node: yaml.Node) -> list[Any]:
        if name not in OF_GAME and not name.startswith(OF_SET):
            guess = nearest(name, ["about", *OF_GAME])
            hint = "" if guess.endswith("?") else "; a parameter of a game or a class belongs under set"
            text = f"{name} is not known here; {guess}{hint}"
            if name.replace("-", "_") in KINDS.keys() - OF_GAME.keys():
                text = f"{name} is not a setting of the game; give it on the command line as {flag_of(name)}"
            raise self.error(node, text)
        if name == "repeats" and not isinstance(node, yaml.ScalarNode):
            raise self.error(node, "repeats must be one number, not a list")
        values: list[Any] = []
        for each in items_in(node):
            try:
                values.append(self._read_value(name, each))
                if values[-1] in values[:-1]:
                    raise SettingsError(f"{name} {value_text(name, values[-1])} is in the list twice")
            except SettingsError as error:
                raise self._error_in_setting(name, each, error) from None
        if not values:
            raise self.error(node, f"{name} has an empty list; give at least one value")
        return values

    def _read_value(self, name: str, node: yaml.Node) -> Any:
        """Convert a value as if it came from a flag. A relative path is relative to the experiment file's folder."""
        value: Any = text_of(node)
        if name in ("models", "players") and isinstance(node, yaml.MappingNode):
            shares = {key: text_of(share) for key, share in self.nodes_in(node, "").items()}
            if None in shares.values():
                raise SettingsError(f"{name}: a share must be a number such as 2/3")
            value = ",".join(f"{key}={share}" for key, share in shares.items())
        elif value is None:
            if isinstance(node, yaml.ScalarNode) and name in OF_GAME and OF_GAME[name].default is None:
                return None
            kind = {yaml.ScalarNode: "null", yaml.MappingNode: "a mapping"}.get(type(node), "a list inside a list")
            raise SettingsError(f"{name} must be a value or a list of values, not {kind}")
        if name.startswith(OF_SET):
            return value
        if KINDS[name][0] in (int, float):
            value = to_number(KINDS[name][0], name, value)
        elif OF_GAME[name].path:
            value = moved(name, value, lambda path: os.path.normpath(full_path(name, path, self._folder)))
        return getattr(SimulationConfig(**{name: value}), name)

    def _error_in_setting(self, name: str, node: yaml.Node, error: SettingsError) -> SettingsError:
        """Return `error` with the line number of `node`, and with the name of the setting instead of its flag."""
        if str(error).startswith(f"{self.name}, line "):
            return error
        return self.error(node, str(error).removeprefix("--set ").replace(flag_of(name), name, 1))

    def with_line(self, error: SettingsError, config: SimulationConfig) -> SettingsError:
        """Return `error`. If it is about a setting in this file, add the line number of the value that `config` has."""
        flag, name, *_ = [*str(error).replace("=", " ").split(" "), ""]
        name = f"{OF_SET}{name.strip(':')}" if flag == "--set" else flag.strip("-:").replace("-", "_")
        if name not in self.settings:
            return error
        index = self.settings[name].index(config.value_of(name))
        return self._error_in_setting(name, items_in(self.nodes[name])[index], error)


def repeat_seeds(seed: int, repeats: int) -> list[int]:
    """Return the seeds of `repeats` runs, all different: first `seed`, then numbers derived with SplitMix64.

    More repeats add seeds and change none. All combinations of settings get the same seeds, which pairs their runs.
    """
    key, seeds = mix(seed), {seed: None}
    while len(seeds) < repeats:
        key = (key + GAMMA) & MASK
        seeds.setdefault(mix(key) >> (64 - SEED_BITS))
    return [*seeds]


@dataclass(frozen=True)
class Sweep:
    """All runs of an experiment, as saved in sweep.json. The first repeats of all combinations come first."""

    sweep_id: str
    experiment: str  # the name of the experiment file
    about: str | None
    varies: tuple[str, ...]  # the settings that differ between the runs
    configs: dict[str, SimulationConfig]  # by the name of the run folder, in the order of execution
    repeats: int = 1  # number of runs of each combination of settings, which differ in the seed
    sources: tuple[SourceEntry, ...] = ()  # the users' files in use, which the folder of the sweep keeps

    @property
    def combinations(self) -> int:
        return len(self.configs) // self.repeats

    def with_repeats(self, repeats: int) -> "Sweep":
        """Return the sweep with further runs, so that each combination has `repeats`. Folders keep their names."""
        configs, first = dict(self.configs), [*self.configs.values()][: self.combinations]
        seeds = [repeat_seeds(config.seed or 0, repeats) for config in first]
        digits = len(next(iter(configs)).partition("-")[0])
        for repeat in range(self.repeats + 1, repeats + 1):
            for config, each in zip(first, seeds, strict=True):
                repeated = replace(config, seed=each[repeat - 1])
                configs[_folder_name(len(configs) + 1, digits, self.varies, repeated, repeat)] = repeated
        return replace(self, configs=configs, repeats=repeats)

    def label_of(self, config: SimulationConfig) -> str:
        """Return what distinguishes the run with `config` from the others, such as `ratio 1/2, prompt basic`."""
        texts = ((name, value_text(name, config.value_of(name))) for name in self.varies)
        return ", ".join(f"{name.removeprefix(OF_SET)} {text}" for name, text in texts)

    def to_json(self) -> dict[str, Any]:
        """Return the content of sweep.json: the settings that all runs share, and the other settings of each run."""
        settings = {folder: config.to_json() for folder, config in self.configs.items()}
        shared = next(iter(settings.values()))
        varies = [name for name in shared if any(each[name] != shared[name] for each in settings.values())]
        folders = {folder: {name: each[name] for name in varies} for folder, each in settings.items()}
        return {name: value for name, value in vars(self).items() if name != "configs"} | {
            "config": {name: value for name, value in shared.items() if name not in varies},
            "runs": [{"folder": folder, "settings": each} for folder, each in folders.items()],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Sweep":
        """Return the sweep in a sweep.json. Raises KeyError, TypeError, ValueError or SettingsError if invalid."""
        shared, runs = data["config"], data["runs"]
        configs = {each["folder"]: SimulationConfig.from_json({**shared, **each["settings"]}) for each in runs}
        if not configs or not all(map(RUN_FOLDER.fullmatch, configs)) or len(configs) < len(runs):
            raise ValueError("it names no runs, or folders elsewhere")
        if not {name.partition(".")[0] for name in data["varies"]} <= OF_GAME.keys():
            raise ValueError("it varies something that is not a setting of the game")
        repeats = data.get("repeats", 1)  # absent in old files
        if type(repeats) is not int or repeats < 1 or len(configs) % repeats:
            raise ValueError("its runs are not as many repeats of some combinations")
        names = (data["sweep_id"], data["experiment"], data["about"], tuple(data["varies"]))
        return cls(*names, configs, repeats, tuple(SOURCES.validate_python(data.get("sources", []))))


def new_sweep(
    experiment: str, about: str | None, varies: tuple[str, ...], configs: Sequence[SimulationConfig], repeats: int
) -> Sweep:
    """Return the sweep that plays each of `configs`, which differ in the settings `varies`, `repeats` times."""
    digits, first = max(len(str(len(configs) * repeats)), 2), 1 if repeats > 1 else None
    folders = {_folder_name(n, digits, varies, config, first): config for n, config in enumerate(configs, start=1)}
    return Sweep(new_run_id(), experiment, about, varies, folders).with_repeats(repeats)


def _folder_name(number: int, digits: int, varies: Sequence[str], config: SimulationConfig, repeat: int | None) -> str:
    """Return the name of a run folder, safe in shells. `repeat` is None if no combination is repeated."""
    texts = ((name.removeprefix(OF_SET), value_text(name, config.value_of(name))) for name in varies)
    name = ",".join(f"{name}={text}" for name, text in texts)
    name = re.sub(r"[^A-Za-z0-9.,=_+-]+", "-", name)[:LONGEST_NAME]
    return f"{number:0{digits}}-" + ",".join(filter(None, [name, f"repeat={repeat}" if repeat is not None else ""]))
