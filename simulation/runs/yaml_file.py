"""Reader of user-written YAML files that reports each error in one line, with its line number.

Every scalar stays text, so that 2/3 and 0.51 are exact; pydantic models interpret it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from simulation.errors import SettingsError, near_file, nearest, printable, reason
from simulation.files import shown

Place = tuple[str | int, ...]  # path to a value: keys, and positions in lists
T = TypeVar("T")

LARGEST_BYTES = 2**20
MOST_VALUES = 50_000  # a few nested aliases could expand beyond any memory
DEEPEST = 20
TROUBLE_SHOWN = 400  # characters
NULLS = ("null", "Null", "NULL", "~")
MERGE = "<<"  # merge key: a mapping, or a list of mappings, with values for keys that are not set explicitly
NULL = "tag:yaml.org,2002:null"
TAGS: dict[type[yaml.Node], list[str]] = {
    yaml.ScalarNode: [f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")],
    yaml.SequenceNode: ["tag:yaml.org,2002:seq"],
    yaml.MappingNode: ["tag:yaml.org,2002:map"],
}


@dataclass(frozen=True)
class YamlFile:
    """A parsed file: text, None for null, lists and mappings, with the line of each value.

    Attributes:
        name: The name of the file in messages.
        said: The content.
        lines: Line numbers, from 1, by place.
    """

    name: str
    said: dict[str, Any]
    lines: dict[Place, int] = field(repr=False)

    def line(self, place: Place) -> int:
        """Return the line of a value, or of the innermost enclosing value that has one."""
        while place not in self.lines:
            place = place[:-1]
        return self.lines[place]

    def refused(self, place: Place, trouble: str) -> SettingsError:
        """Return an error with the file name and the line of the place."""
        text = printable(trouble)
        text = text if len(text) <= TROUBLE_SHOWN else text[: TROUBLE_SHOWN - 3] + "..."
        return SettingsError(f"{self.name}, line {self.line(place)}: {text}")

    def read_as(self, kind: type[T]) -> T:
        """Return the content as a pydantic model or a type composed of models. Raises SettingsError."""
        try:
            return TypeAdapter(kind).validate_python(self.said)
        except ValidationError as error:
            troubles = [_place_and_trouble(each) for each in error.errors()]
        raise self.refused(*min(troubles, key=lambda each: self.line(each[0])))


class Entry(BaseModel):
    """A mapping whose keys are the fields of the subclass; other keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, said: Any) -> Any:
        for name in said if isinstance(said, dict) else ():
            if name not in cls.model_fields:
                raise PydanticCustomError("unknown", "{trouble}", {"trouble": cls.trouble_with(name), "key": name})
        return said

    @classmethod
    def trouble_with(cls, name: str) -> str:
        """Return the error text for an unknown key."""
        return f"{name} is not known here; {nearest(name, cls.model_fields)}"


def read_by(read: Callable[[str], Any]) -> BeforeValidator:
    """Return a pydantic validator that parses the text of a field by a function that may raise SettingsError."""

    def value(said: Any) -> Any:
        if not isinstance(said, str):
            raise ValueError("must be one value, no list, mapping or null")
        try:
            return read(said)
        except SettingsError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(value)


def read_yaml(path: str | Path, flag: str) -> YamlFile:
    """Read the file that a flag names. Raises SettingsError, with the line if known."""
    name = printable(shown(path))
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: an invalid path
        raise SettingsError(f"{flag} {name}: cannot be read: {reason(error)}{near_file(path)}") from None
    if len(content) > LARGEST_BYTES:
        raise SettingsError(f"{flag} {name}: is larger than {LARGEST_BYTES >> 10} kB, too large for settings")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise SettingsError(f"{name}, line {line}: is no text in UTF-8") from None
    return _Reading(name).read(text)


class _Reading:
    """Parser state for one file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Place, int] = {}
        self.left = MOST_VALUES

    def read(self, text: str) -> YamlFile:
        try:
            node = yaml.compose(text, yaml.BaseLoader)
        except yaml.MarkedYAMLError as error:
            # an unterminated construct is detected only after it, possibly at the end of the file
            after = error.problem in ("could not find expected ':'", "found unexpected end of stream")
            mark = (error.context_mark if after else None) or error.problem_mark or error.context_mark
            if "character '\\t'" in str(error.problem):
                raise self._refused(mark, "holds a tab where YAML takes blanks alone: outside quotes") from None
            raise self._refused(mark, f"is not YAML: {error.problem or error.context}") from None
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1
            raise SettingsError(f"{self.name}, line {line}: is not YAML: {error.reason}") from None
        except RecursionError:
            raise SettingsError(f"{self.name}: is nested too deeply") from None
        except (ValueError, OverflowError) as error:  # "\UFFFFFFFF" is not a valid character
            raise SettingsError(f"{self.name}: is not YAML: {printable(str(error))}") from None
        if node is None:
            raise SettingsError(f"{self.name}: is empty")
        if not isinstance(node, yaml.MappingNode):
            raise self._refused(node.start_mark, "must be a mapping: lines such as name: value")
        return YamlFile(self.name, self._value(node, ()), self.lines)

    def _value(self, node: yaml.Node, place: Place) -> Any:
        """Return the value of a node, and record the lines of all values in it."""
        self.lines.setdefault(place, node.start_mark.line + 1)
        self.left -= 1
        if self.left < 0 or len(place) > DEEPEST:
            too = "nested too deeply" if self.left >= 0 else f"too much: more than {MOST_VALUES} values"
            raise self._refused(node.start_mark, f"is {too}, aliases included")
        if node.tag not in TAGS[type(node)]:
            raise self._refused(node.start_mark, f"holds the tag {node.tag}, which is not known here")
        if isinstance(node, yaml.SequenceNode):
            return [self._value(each, (*place, position)) for position, each in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        assert isinstance(node, yaml.ScalarNode)  # there is no fourth kind
        if node.tag == NULL:
            return None
        if not node.value and not node.style:
            name = next((each for each in reversed(place) if isinstance(each, str)), "it")
            raise self._refused(node.start_mark, f"{name} has no value")
        if node.style is None and node.value in NULLS:
            return None
        return self._text(node)

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == MERGE and key.style is None:
                for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(each, yaml.MappingNode):
                        raise self._refused(each.start_mark, f"{MERGE} must be a mapping, or a list of some")
                    merged = {**self._value(each, (*place, MERGE)), **merged}  # the first one wins
                continue
            if not isinstance(key, yaml.ScalarNode) or not key.value:
                raise self._refused(key.start_mark, "a name must be a text")
            name = self._text(key)
            if name in found:
                first = self.lines[(*place, name)]
                raise self._refused(key.start_mark, f"{name} is there already, in line {first}")
            self.lines[(*place, name)] = key.start_mark.line + 1
            found[name] = self._value(value, (*place, name))
        for name in merged.keys() - found.keys():
            self.lines[(*place, name)] = self.lines[(*place, MERGE, name)]
        return {**merged, **found}

    def _text(self, node: yaml.ScalarNode) -> str:
        try:
            node.value.encode()
        except UnicodeEncodeError:
            raise self._refused(node.start_mark, "holds half a character") from None
        return str(node.value)

    def _refused(self, mark: yaml.Mark | None, trouble: str) -> SettingsError:
        line = mark.line + 1 if mark is not None else 1
        return SettingsError(f"{self.name}, line {line}: {printable(trouble)[:TROUBLE_SHOWN]}")


def _place_and_trouble(error: Any) -> tuple[Place, str]:
    """Return the place of a pydantic error, and our own text for it."""
    place = tuple(part for part in error["loc"] if part != "[key]")
    name = next((part for part in reversed(place) if isinstance(part, str)), "it")
    if error["type"] == "unknown":
        return (*place, error["ctx"]["key"]), error["ctx"]["trouble"]
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        return place, f"{name} {text}" if text.startswith("must be") else text
    if error["type"] == "missing":
        return place[:-1], f"{name} is missing"
    kinds = {"string_type": "a text", "list_type": "a list", "tuple_type": "a list", "dict_type": "a mapping"}
    kinds |= {"model_type": "a mapping: lines such as name: value", "model_attributes_type": "a mapping"}
    trouble = f"must be {kinds[error['type']]}" if error["type"] in kinds else error["msg"]
    return place, f"{name} {trouble}"
