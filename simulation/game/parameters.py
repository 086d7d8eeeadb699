"""Parameters of games and participant classes: annotated class attributes with defaults, set by `--set name=value`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field
from fractions import Fraction
from typing import Any, NamedTuple

from simulation.errors import SettingsError, listed, nearest, printable
from simulation.settings import FLAGS_OF_GAMES, Setting, fraction, to_number

KINDS = {kind.__name__: kind for kind in (int, float, str, bool, Fraction)}
LARGEST = (-(10**9), 10**9)  # bounds of a Fraction that is declared without bounds
TRUTHS = {"true": True, "yes": True, "false": False, "no": False}


class Parameter(NamedTuple):
    """A declared parameter: its type, one of KINDS, and its default, range and help text."""

    kind: Any
    declaration: Setting

    def parse(self, flag: str, text: str) -> Any:
        """Convert `text` to a value. Raises SettingsError if it has the wrong type or is not in the range."""
        value: Any = text
        if self.kind is Fraction:
            low, high = (self.declaration.low, self.declaration.high) if self.declaration.low is not None else LARGEST
            value = fraction(flag, text, Fraction(low), high)
        elif self.kind is bool and (value := TRUTHS.get(text.casefold())) is None:
            raise SettingsError(f"{flag} {text}: must be true or false")
        elif self.kind in (int, float):
            value = to_number(self.kind, flag, text)
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingsError(f"{flag} {text}: must be a finite number")
        self.declaration.check(flag, value)
        return value


def declared(cls: type, base: type) -> dict[str, Parameter]:
    """Return the parameters that `cls` and its bases below `base` declare, by name: annotated attributes with defaults.

    The type is one of KINDS, the default a value or a `setting`, and the name does not start with an underscore.
    """
    found: dict[str, Parameter] = {}
    for each in (each for each in reversed(cls.__mro__) if issubclass(each, base) and each is not base):
        for name, annotation in vars(each).get("__annotations__", {}).items():
            default: Any = vars(each).get("__dataclass_fields__", {}).get(name, vars(each).get(name, MISSING))
            kind = KINDS.get(getattr(annotation, "__name__", annotation))  # a text if annotations are postponed
            metadata = default.metadata if isinstance(default, Field) else {}
            value = default.default if isinstance(default, Field) else default
            if kind is not None and value is not MISSING and not name.startswith("_"):
                found[name] = Parameter(kind, metadata.get("setting") or Setting(value, ""))
    return found


def parse_assignments(texts: Iterable[str]) -> dict[str, str]:
    """Return names and values of texts such as `noise=5`. Raises SettingsError if one is malformed or given twice."""
    values: dict[str, str] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        if not name or not value:
            raise SettingsError(f"--set {printable(text)}: must be name=value, such as noise=5")
        if name in values:
            raise SettingsError(f"--set {printable(text)}: {name} is set twice")
        values[name] = value
    return values


def values_of(assignments: Iterable[str], owner: str, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """Return the values that texts such as `noise=5` or `LevelK.noise=5` set for `parameters` of the class `owner`."""
    values: dict[str, Any] = {}
    for full_name, text in parse_assignments(assignments).items():
        prefix, _, name = full_name.rpartition(".")
        if name in parameters and prefix in ("", owner):
            if name in values:
                raise SettingsError(f"--set {full_name}={printable(text)}: {name} is set twice")
            values[name] = parameters[name].parse(f"--set {full_name}", text)
    return values


def all_assignments(assignments: Sequence[str], owners: Mapping[str, Mapping[str, Parameter]]) -> tuple[str, ...]:
    """Return an assignment for each parameter without a flag, with its default if it is not set.

    `owners` maps the name of the game's class, and then of each of the users' participant classes, to its parameters.
    Raises SettingsError if an assignment sets no parameter, or could set several.
    """
    game, *classes = owners
    for each in classes:
        if both := sorted(owners[each].keys() & owners[game].keys()):
            raise SettingsError(f"{both[0]} is a parameter of the game {game} and of the class {each}: rename one")
    names = [name for parameters in owners.values() for name in parameters]
    known = [f"{owner}.{name}" for owner, parameters in owners.items() for name in parameters]
    for name, text in parse_assignments(assignments).items():
        matching = [each for each in known if name in (each, each.partition(".")[2])]
        if len(matching) > 1:
            raise SettingsError(f"--set {name}={printable(text)}: which one? write {' or '.join(matching)}")
        if not matching:
            guess = nearest(name.rpartition(".")[2], dict.fromkeys(names))
            which = guess if names else f"there are none in {listed(owners)}"
            raise SettingsError(f"--set {name}={printable(text)}: there is no such parameter; {which}")
    every = []
    for owner, parameters in owners.items():
        values = {name: each.declaration.default for name, each in parameters.items() if name not in FLAGS_OF_GAMES}
        for name, value in (values | values_of(assignments, owner, parameters)).items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            every.append(f"{owner}.{name}={text}" if names.count(name) > 1 else f"{name}={text}")
    return tuple(every)
