"""Participant classes on main's side: checked after they were loaded, and pickled for the agent servers."""

import functools
import inspect
import pickle
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cloudpickle

from participant import LLMParticipant, RandomParticipant
from simulation.agents.agent_class import unregistered
from simulation.agents.participant import Participant, answers_many
from simulation.agents.surrogate import surrogate_of
from simulation.errors import OWN, SettingsError, listed, one_line
from simulation.files import shown
from simulation.game.parameters import declared, values_of
from simulation.settings import Kind, SimulationConfig
from simulation.user_code import find_class

PACKED_BYTES = 64 * 2**20


def load_agent_class(
    spec: str, asks_models: bool, flag: str = "--agent-class", assignments: Iterable[str] = ()
) -> type[Participant]:
    """Return the class that `spec` names (see `find_class`), or a subclass with the parameters that `assignments` set.

    Raises SettingsError, which names `flag`, if the file or the class is unusable.
    """
    cls: type[Participant] = find_class(flag, spec, Participant, unregistered())
    advice = "give --agent-type llm, too" if flag == "--agent-class" else f"write it as llm:{shown(spec)}"
    problems = {
        f"{cls.__name__} asks a model: {advice}": issubclass(cls, LLMParticipant) and not asks_models,
        f"{cls.__name__} is a dataclass: write it without @dataclass": "__dataclass_fields__" in vars(cls),
        f"{cls.__name__} defines neither answer nor reply": not answers_many(cls) and cls.reply is Participant.reply,
        "answer must be written as 'async def answer(self, question)'": not inspect.iscoroutinefunction(cls.answer),
        "reply must be an ordinary method; its async kind is called answer": inspect.iscoroutinefunction(
            inspect.unwrap(cls.reply)
        ),
    }
    for problem in (text for text, is_found in problems.items() if is_found):
        raise SettingsError(f"{flag} {shown(spec)}: {problem}")
    parameters = declared(cls, Participant)
    values = {name: each.declaration.default for name, each in parameters.items()}
    values |= values_of(assignments, cls.__name__, parameters)
    return _with_values(cls, tuple(values.items())) if values else cls  # type: ignore[arg-type]  # it is hashable


@functools.lru_cache(maxsize=8)  # the runs of an experiment and the check before them use the same class
def _with_values(cls: type[Participant], values: tuple[tuple[str, Any], ...]) -> type[Participant]:
    """Return a subclass with these attributes: the user's class stays as it is."""
    with unregistered():  # the module of the user's file is pickled by value
        body = {"__module__": cls.__module__, **dict(values)}
        return types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(body))


def load_agent_classes(config: SimulationConfig, recorded: Mapping[str, Any]) -> tuple[type[Participant], ...]:
    """Return the class of each kind of player. `recorded` has the arguments of `surrogate_of` by kind."""

    def load(kind: Kind) -> type[Participant]:
        if kind.agent_class is not None:
            return load_agent_class(kind.agent_class, kind.asks_models, config.who_flag, config.set)
        if kind.run is not None:
            with unregistered():
                return surrogate_of(*recorded[kind.text])
        return LLMParticipant if kind.asks_models else RandomParticipant

    return tuple(map(load, config.kinds))


def serialize_agent_class(*classes: type[Participant], flag: str = "--agent-class") -> bytes:
    """Pickle classes (by value if user-defined). Raises SettingsError if this fails or the result is too large."""
    return _serialize_once(classes, flag)


@functools.lru_cache(maxsize=8)
def _serialize_once(classes: tuple[type[Participant], ...], flag: str) -> bytes:
    names = listed(cls.__name__ for cls in classes)
    try:
        modules = [sys.modules[cls.__module__] for cls in classes if cls.__module__.startswith(OWN)]
        folders = [str(Path(str(module.__file__)).parent) for module in modules]
        packed = pickle.dumps((folders, cloudpickle.dumps((classes,))))
    except BaseException as error:  # noqa: BLE001 - a user-defined class may raise anything
        raise SettingsError(f"{flag}: {names} cannot travel to the servers: {one_line(error)}") from None
    if len(packed) > PACKED_BYTES:
        raise SettingsError(
            f"{flag}: {names} carries {len(packed) >> 20} MB of its file's data to every server, "
            f"more than {PACKED_BYTES >> 20} MB: read large data in __init__ instead"
        )
    return packed
