"""Participant classes on main's side: checked after they were loaded, and pickled for the agent servers."""

import functools
import inspect
import pickle
import sys
from pathlib import Path
from typing import Any

import cloudpickle

from participant import LLMParticipant, RandomParticipant
from simulation.agents.agent_class import unregistered
from simulation.agents.participant import Participant, answers_many
from simulation.errors import OWN, SettingsError, one_line
from simulation.files import shown
from simulation.user_code import find_class

PACKED_BYTES = 64 * 2**20


def load_agent_class(spec: str | None, agent_type: str) -> type[Participant]:
    """Return the class that `spec` names (see `find_class`) or, if None, the built-in class of `agent_type`.

    Raises SettingsError if the file or the class is unusable.
    """
    if spec is None:
        return LLMParticipant if agent_type == "llm" else RandomParticipant
    cls: type[Participant] = find_class("--agent-class", spec, Participant, unregistered())

    def refuse(problem: str) -> SettingsError:
        return SettingsError(f"--agent-class {shown(spec)}: {problem}")

    if issubclass(cls, LLMParticipant) and agent_type != "llm":
        raise refuse(f"{cls.__name__} asks a model: give --agent-type llm, too")
    if not answers_many(cls) and cls.reply is Participant.reply:
        raise refuse(f"{cls.__name__} defines neither answer nor reply")
    if not inspect.iscoroutinefunction(cls.answer):
        raise refuse("answer must be written as 'async def answer(self, question)'")
    if inspect.iscoroutinefunction(inspect.unwrap(cls.reply)):
        raise refuse("reply must be an ordinary method; its async kind is called answer")
    return cls


def serialize_agent_class(cls: type[Participant]) -> bytes:
    """Pickle a class (by value if user-defined). Raises SettingsError if pickling fails or the result is too large."""
    try:
        file, folder = getattr(sys.modules[cls.__module__], "__file__", None), None
        if file is not None and cls.__module__.startswith(OWN):
            folder = str(Path(file).parent)
        packed = pickle.dumps((folder, cloudpickle.dumps(cls)))
    except BaseException as error:  # noqa: BLE001 - a user-defined class may raise anything
        raise SettingsError(f"--agent-class: {cls.__name__} cannot travel to the servers: {one_line(error)}") from None
    if len(packed) > PACKED_BYTES:
        raise SettingsError(
            f"--agent-class: {cls.__name__} carries {len(packed) >> 20} MB of its file's data to every server, "
            f"more than {PACKED_BYTES >> 20} MB: read large data in __init__ instead"
        )
    return packed


def pickled_agent_class(spec: str | None, agent_type: str) -> bytes:
    """Load a class, and pickle it for the servers. Raises SettingsError if either step fails."""
    return _serialize_once(load_agent_class(spec, agent_type))  # type: ignore[arg-type]  # a class is hashable


@functools.lru_cache(maxsize=8)  # the runs of an experiment and every reassignment use the same class
def _serialize_once(cls: Any) -> bytes:
    return serialize_agent_class(cls)
