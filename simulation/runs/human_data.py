"""Reading figures of people, from configs/human/ or a user's file, and choosing those that a run is compared with."""

from collections.abc import Hashable
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from simulation.errors import SettingsError, listed, nearest, printable
from simulation.files import CONFIGS, files_in
from simulation.game.game import Game
from simulation.game.human import HumanData, HumanRound
from simulation.settings import DATA_FILES, SimulationConfig, fraction
from simulation.yaml_file import YamlFile, text_of

FLAG, FOLDER = "--compare-with", CONFIGS / "human"
HUMAN_DATA = TypeAdapter(HumanData)
HIGHEST_RATIO = 10
FIELDS = [[each.name for each in fields(cls)] + ["games"] * (cls is HumanData) for cls in (HumanData, HumanRound)]
Place = tuple[Hashable, ...]  # the names and indices that lead to a node


def people_beside(config: SimulationConfig, game: Game) -> tuple[HumanData, ...]:
    """Return the figures of people to show beside a run: those that --compare-with names, or all that fit the game.

    Raises SettingsError if a file is invalid, or has no figures for this game.
    """
    name, files = config.compare_with, files_in(FOLDER, ".yaml")
    if name == "none":
        return ()
    if name is None:
        return tuple(each for file in files for each in read_people(file) if _fits(each, config, game))
    known = {file.stem: file for file in files}
    if name not in known and not name.endswith(DATA_FILES):
        advice = "(a file of your own ends in .yaml)"
        raise SettingsError(
            f"{FLAG} {printable(name)}: there is no such file in configs/human; {nearest(name, known)} {advice}"
        )
    every = read_people(known.get(name, Path(name)))
    if fitting := tuple(each for each in every if _fits(each, config, game)):
        return fitting
    has = listed(_words(each.ratio, each.max_value) for each in every)
    played = _words(game.ratio if _is_average(config, game) else None, int(game.high))  # type: ignore[attr-defined]
    raise SettingsError(f"{FLAG} {printable(name)}: has figures for {has}, not for this game, {played}")


def file_beside(config: SimulationConfig) -> list[str]:
    """Return the user's file with figures of people, if the settings name one."""
    return [config.compare_with] if config.compare_with is not None and config.compare_with.endswith(DATA_FILES) else []


def _words(ratio: Fraction | None, highest: int) -> str:
    game = "any game" if ratio is None else f"the averaging game with ratio {ratio} and offset 0"
    return f"{game} with numbers to {highest:,}"


def _is_average(config: SimulationConfig, game: Any) -> bool:
    return config.game == "average" and game.statistic == "mean" and game.offset == 0


def _fits(people: HumanData, config: SimulationConfig, game: Any) -> bool:
    same = people.ratio is None or (_is_average(config, game) and game.ratio == people.ratio)
    return same and people.max_value == game.high


def read_people(path: Path) -> list[HumanData]:
    """Return the figures in a file, of each of its `games` if there are several. Raises SettingsError."""
    file, nodes = YamlFile(str(path), FLAG), dict[Place, yaml.Node]()
    content = _plain(file, file.root, nodes)
    games = content.pop("games", None)
    if games is not None and not (isinstance(games, list) and games and all(isinstance(each, dict) for each in games)):
        raise file.error(nodes["games",], "games must be a list of mappings")
    found = []
    for index, each in enumerate(games or [{}]):
        place, text = list[Hashable](["ratio"]), ""
        values = {"name": path.stem, **content, **each}
        try:
            if "ratio" in values:
                values["ratio"] = fraction("ratio", values["ratio"], Fraction(1, 10**6), HIGHEST_RATIO)
            found.append(HUMAN_DATA.validate_python(values))
            if len(found[-1].histogram) < len(values.get("histogram", ())):
                place, text = ["histogram"], "histogram has a number twice"
        except SettingsError as error:
            text = str(error)
        except ValidationError as error:
            place, text = _problem(error)
        if text:
            known = [nodes.get((*start, *place[:end])) for start in (("games", index), ()) for end in (3, 2, 1)]
            raise file.error(next((node for node in known if node is not None), file.root), text)
    return found


def _problem(error: ValidationError) -> tuple[list[Hashable], str]:
    """Return the place of the first problem, and what it is."""
    first = error.errors(include_url=False)[0]
    kind, place, cause = first["type"], list[Hashable](first["loc"]), first["msg"]
    if kind == "value_error":  # from `HumanData.__post_init__`, whose message begins with the name of a field
        cause = cause.removeprefix("Value error, ")
        return [cause.partition(" ")[0]], cause
    name = str(place[-1])
    if kind == "missing":
        return place, f"{name} is missing"
    if kind == "unexpected_keyword_argument":
        return place, f"{name} is not known here; {nearest(name, FIELDS[len(place) > 1])}"
    names = ": ".join(each for each in place if isinstance(each, str) and each != "[key]")
    return place, f"{names} {cause.replace('Input should', 'must')}"


def _plain(file: YamlFile, node: yaml.Node, nodes: dict[Place, yaml.Node], place: Place = ()) -> Any:
    """Return the content of a node, with texts as scalars. Store it and all nodes in it in `nodes`, by place."""
    nodes[place] = node
    if isinstance(node, yaml.MappingNode):
        return {name: _plain(file, each, nodes, (*place, name)) for name, each in file.nodes_in(node, "").items()}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(file, each, nodes, (*place, index)) for index, each in enumerate(node.value)]
    return text_of(node)
