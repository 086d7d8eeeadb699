"""Reading YAML files that users write. An error message is one line and contains the line number.

All scalars stay text, so that numbers such as 2/3 and 0.51 are exact. The callers interpret the text.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from simulation.errors import SettingsError, near_file, nearest, printable, reason
from simulation.files import shown

Place = tuple[str | int, ...]  # the path to a value in the file: keys, and positions in lists

LARGEST_BYTES = 2**20
MOST_VALUES = 50_000  # limits the expansion of nested aliases
DEEPEST = 20
LONGEST_ERROR = 400  # characters
NULLS = ("null", "Null", "NULL", "~")
MERGE = "<<"  # merge key; its value is a mapping or a list of mappings, with defaults for the other keys
LATE = ("could not find expected ':'", "found unexpected end of stream")  # reported far after their cause
TAGS = {yaml.ScalarNode: {"str", "int", "float", "bool", "null"}, yaml.SequenceNode: {"seq"}, yaml.MappingNode: {"map"}}


class YamlFile:
    """A YAML file whose path a flag gives. `data` consists of texts, None (for null), lists and mappings.

    The constructor raises SettingsError if the file cannot be read or parsed.
    """

    def __init__(self, path: str, flag: str) -> None:
        self.name = printable(shown(path))  # for messages
        self._lines: dict[Place, int] = {}
        self._values_left = MOST_VALUES
        try:
            with Path(path).open("rb") as file:
                content = file.read(LARGEST_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: an invalid path
            raise SettingsError(f"{flag} {self.name}: cannot be read: {reason(error)}{near_file(path)}") from None
        if len(content) > LARGEST_BYTES:
            raise SettingsError(f"{flag} {self.name}: is larger than {LARGEST_BYTES >> 10} kB, too large for settings")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self._error_in(content[: error.start].count(b"\n"), "is not UTF-8 text") from None
        self.data: dict[str, Any] = self._value(self._parse(text), ())

    def error(self, place: Place, text: str) -> SettingsError:
        """Return an error with the file name and the line number of the value at `place`.

        If no value has this place, use the line of the innermost list or mapping that contains the place.
        """
        while place not in self._lines:
            place = place[:-1]
        return self._error_in(self._lines[place], text)

    def _error_in(self, line: int, text: str) -> SettingsError:
        return SettingsError(f"{self.name}, line {line + 1}: {printable(text, LONGEST_ERROR)}")

    def _parse(self, text: str) -> yaml.MappingNode:
        try:
            node = yaml.compose(text, yaml.BaseLoader)
        except yaml.MarkedYAMLError as error:
            mark = (error.context_mark if error.problem in LATE else None) or error.problem_mark or error.context_mark
            problem = f"is not YAML: {error.problem or error.context}"
            if "character '\\t'" in problem:
                problem = "has a tab outside quotes, where YAML allows only spaces"
            raise self._error_in(mark.line if mark is not None else 0, problem) from None
        except yaml.reader.ReaderError as error:
            raise self._error_in(text[: error.position].count("\n"), f"is not YAML: {error.reason}") from None
        except RecursionError:
            raise SettingsError(f"{self.name}: is nested too deeply") from None
        except (ValueError, OverflowError) as error:  # "\UFFFFFFFF" is not a valid character
            raise SettingsError(f"{self.name}: is not YAML: {printable(str(error))}") from None
        if node is None:
            raise SettingsError(f"{self.name}: is empty")
        if not isinstance(node, yaml.MappingNode):
            raise self._error_in(node.start_mark.line, "must be a mapping: lines such as name: value")
        return node

    def _value(self, node: yaml.Node, place: Place) -> Any:
        """Return the value of a node. Record the line numbers of this value and of all values inside."""
        line = node.start_mark.line
        self._lines.setdefault(place, line)
        self._values_left -= 1
        if self._values_left < 0:
            raise self._error_in(line, f"has more than {MOST_VALUES} values, including aliases")
        if len(place) > DEEPEST:
            raise self._error_in(line, "is nested too deeply, including aliases")
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if tag not in TAGS[type(node)]:
            raise self._error_in(line, f"has the unknown tag {node.tag}")
        if isinstance(node, yaml.SequenceNode):
            return [self._value(each, (*place, position)) for position, each in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        assert isinstance(node, yaml.ScalarNode)  # there is no fourth kind
        if tag == "null" or (node.value in NULLS and not node.style):
            return None
        if not node.value and not node.style:
            raise self._error_in(line, f"{_last_name(place)} has no value")
        if any("\ud800" <= sign <= "\udfff" for sign in node.value):
            raise self._error_in(line, "contains half of a surrogate pair")
        return str(node.value)

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line
            if isinstance(key, yaml.ScalarNode) and key.value == MERGE and not key.style:
                for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(each, yaml.MappingNode):
                        raise self._error_in(each.start_mark.line, f"{MERGE} must be a mapping or a list of mappings")
                    merged = self._value(each, (*place, MERGE)) | merged  # earlier mappings take precedence
                continue
            name = self._value(key, (*place, key.value)) if isinstance(key, yaml.ScalarNode) and key.value else None
            if name is None:
                raise self._error_in(line, "a name must be text")
            if name in found:
                raise self._error_in(line, f"{name} is already set in line {self._lines[(*place, name)] + 1}")
            found[name] = self._value(value, (*place, name))
        for name in merged.keys() - found.keys():
            self._lines[(*place, name)] = self._lines[(*place, MERGE, name)]
        return merged | found

    def read_entry(
        self, place: Place, data: Any, readers: Mapping[str, Callable[[str], Any]], defaults: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the fields of the mapping `data` at `place`. Parse each field with the function in `readers`.

        `defaults` are the values of missing fields. Raises SettingsError with the line number if a field is invalid.
        """
        if not isinstance(data, dict):
            raise self.error(place, f"{_last_name(place)} must be a mapping: lines such as name: value")
        for name in [*data, *readers]:
            if name not in readers:
                raise self.error((*place, name), f"{name} is not known here; {nearest(name, readers)}")
            if name not in data and name not in defaults:
                raise self.error(place, f"{name} is missing")
        fields = dict(defaults)
        for name, text in data.items():
            try:
                if not isinstance(text, str):
                    raise SettingsError("must be a single value, not a list, a mapping or null")
                fields[name] = readers[name](text)
            except SettingsError as error:
                about = f"{name} " if str(error).startswith("must ") else ""
                raise self.error((*place, name), f"{about}{error}") from None
        return fields


def _last_name(place: Place) -> str:
    return next((part for part in reversed(place) if isinstance(part, str)), "it")
