"""Reading YAML files that users write. An error message is one line and contains the line number.

All scalars stay text, so that numbers such as 2/3 and 0.51 are exact. The callers interpret the text.
"""

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import yaml

from simulation.errors import SettingsError, near_file, nearest, printable, reason
from simulation.files import read_text, shown

LONGEST_ERROR = 400  # characters
NULLS = ("null", "Null", "NULL", "~")
MERGE = "<<"  # merge key; its value is a mapping or a list of mappings, with defaults for the other keys
LATE = ("could not find expected ':'", "found unexpected end of stream")  # problems reported far after their cause
TAGS = [f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "seq", "map")]
A_MAPPING = "must be a mapping: lines such as name: value"


class YamlFile:
    """A YAML file that `flag` names. `nodes` maps each name to its value's node. Raises SettingsError."""

    def __init__(self, path: str, flag: str) -> None:
        self.name = printable(shown(path))  # for messages
        try:
            text = read_text(Path(path))
            yaml.load(text, yaml.BaseLoader)  # raises an error for a value that contains itself
            root = yaml.compose(text, yaml.BaseLoader)
            if root is None:
                raise SettingsError(f"{self.name}: is empty")
            self.root, self.nodes = root, self.nodes_in(root, A_MAPPING)
        except OSError as error:
            raise SettingsError(f"{flag} {self.name}: cannot be read: {reason(error)}{near_file(path)}") from None
        except UnicodeDecodeError as error:
            raise self.error(error.object[: error.start].count(b"\n"), "is not UTF-8 text") from None
        except yaml.MarkedYAMLError as error:
            mark = (error.context_mark if error.problem in LATE else None) or error.problem_mark or error.context_mark
            problem = f"is not YAML: {error.problem or error.context}"
            if "character '\\t'" in problem:
                problem = "has a tab outside quotes, where YAML allows only spaces"
            raise self.error(mark.line if mark is not None else 0, problem) from None
        except yaml.reader.ReaderError as error:
            raise self.error(text[: error.position].count("\n"), f"is not YAML: {error.reason}") from None
        except RecursionError:
            raise SettingsError(f"{self.name}: is nested too deeply") from None
        except (ValueError, OverflowError) as error:  # such as "\UFFFFFFFF", which is not a character
            raise SettingsError(f"{self.name}: is not YAML: {printable(str(error))}") from None

    def error(self, where: yaml.Node | int, text: str) -> SettingsError:
        """Return an error with the file name and the line number of a node, or with the line `where`, from 0."""
        line = where if isinstance(where, int) else where.start_mark.line
        return SettingsError(f"{self.name}, line {line + 1}: {printable(text, LONGEST_ERROR)}")

    def nodes_in(self, node: yaml.Node, requirement: str) -> dict[str, yaml.Node]:
        """Return the nodes of the values in a mapping, by name. Each node gets the line number of its name.

        Raises SettingsError if a name or value is invalid. If `node` is not a mapping, `requirement` is the error text.
        """
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, requirement)
        found, merged = dict[str, yaml.Node](), dict[str, yaml.Node]()
        for key, value in node.value:
            if not (name := text_of(key)):
                raise self.error(key, "a name must be text")
            if name == MERGE and not key.style:
                for each in items_in(value):  # earlier mappings take precedence
                    merged = self.nodes_in(each, f"{MERGE} must be a mapping or a list of mappings") | merged
                continue
            if name in found:
                raise self.error(key, f"{name} is already set in line {found[name].start_mark.line + 1}")
            for each in (key, value, *items_in(value)):
                if each.tag not in TAGS:
                    raise self.error(each, f"has the unknown tag {each.tag}")
                if each.value == "" and not each.style:
                    raise self.error(each, f"{name} has no value")
                if isinstance(each.value, str) and any("\ud800" <= sign <= "\udfff" for sign in each.value):
                    raise self.error(each, "contains half of a surrogate pair")
            found[name] = copy(value)
            found[name].start_mark = key.start_mark
        return merged | found

    def read_entry(self, name: str, node: yaml.Node, readers: Mapping[str, Any], optional: str) -> dict[str, Any]:
        """Return the fields of entry `name`, each parsed by its function in `readers`. Only `optional` may be missing.

        Raises SettingsError with the line number if a field is invalid, unknown or missing.
        """
        nodes, fields = self.nodes_in(node, f"{name} {A_MAPPING}"), {}
        for field in [*nodes, *readers]:
            if field not in readers:
                raise self.error(nodes[field], f"{field} is not known here; {nearest(field, readers)}")
            if field not in nodes and field != optional:
                raise self.error(node, f"{field} is missing")
        for field, value in nodes.items():
            try:
                if (text := text_of(value)) is None:
                    raise SettingsError("must be a single value, not a list, a mapping or null")
                fields[field] = readers[field](text)
            except SettingsError as error:
                about = f"{field} " if str(error).startswith("must ") else ""
                raise self.error(value, f"{about}{error}") from None
        return fields


def text_of(node: yaml.Node) -> str | None:
    """Return the text of a node, or None if the node is null, a list or a mapping."""
    is_text = isinstance(node, yaml.ScalarNode) and (node.style or node.value not in NULLS)
    return str(node.value) if is_text else None


def items_in(node: yaml.Node) -> list[yaml.Node]:
    """Return the nodes in a list. Any other node counts as a list of one node."""
    return node.value if isinstance(node, yaml.SequenceNode) else [node]
