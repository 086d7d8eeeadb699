"""Participant classes on main's side: loaded from a user's file, and pickled for the agent servers."""

import functools
import inspect
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from participant import LLMParticipant, RandomParticipant
from simulation.agents.agent_class import unregistered
from simulation.agents.participant import Participant, answers_many
from simulation.errors import SettingsError, meant_by, near_file, one_line
from simulation.files import full_path, is_there, shown
from simulation.rpc.lean_import import append_to_path

PACKED_BYTES = 64 * 2**20
OWN = "own_"  # prefix of the module names of users' files, so that a user's random.py hides no library


@functools.cache
def load_agent_class(spec: str | None, agent_type: str) -> type[Participant]:
    """Return the class that `spec` names (`my_file.py:MyParticipant`) or, if None, the built-in class of `agent_type`.

    Raises SettingsError if the file or the class is unusable.
    """
    if spec is None:
        return LLMParticipant if agent_type == "llm" else RandomParticipant
    spec = shown(spec)
    file_name, colon, class_name = spec.rpartition(":")
    path = Path(file_name)

    def refuse(problem: str) -> SettingsError:
        return SettingsError(f"--agent-class {spec}: {problem}")

    if not colon or path.suffix != ".py":
        raise refuse("write it as my_file.py:MyParticipant")
    if not is_there(path, "--agent-class"):
        raise refuse(f"there is no file {path}{near_file(path)}")
    module = sys.modules[OWN + path.stem] = ModuleType(OWN + path.stem)
    module.__file__ = full_path("--agent-class", file_name)  # absolute: servers run in another folder
    append_to_path(str(Path(module.__file__).parent))
    try:
        with unregistered():
            # not `exec_module`: it may run old bytecode if two versions of equal size are saved in one second
            exec(compile(path.read_bytes(), path, "exec", dont_inherit=True), vars(module))
    except BaseException as error:  # noqa: BLE001 - user code may raise anything
        raise refuse(f"{path} cannot be imported: {one_line(error)}") from None
    cls: Any = getattr(module, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, Participant)):
        own = {name for name, each in vars(module).items() if getattr(each, "__module__", "") == module.__name__}
        guess = f"; {meant}" if (meant := meant_by(class_name, own - {class_name})) else ""
        raise refuse(f"{path} has no class {class_name} derived from Participant{guess}")
    if issubclass(cls, LLMParticipant) and agent_type != "llm":
        raise refuse(f"{class_name} asks a model: give --agent-type llm, too")
    if not answers_many(cls) and cls.reply is Participant.reply:
        raise refuse(f"{class_name} defines neither answer nor reply")
    if not inspect.iscoroutinefunction(cls.answer):
        raise refuse("answer must be written as 'async def answer(self, question)'")
    if inspect.iscoroutinefunction(inspect.unwrap(cls.reply)):
        raise refuse("reply must be an ordinary method; its async kind is called answer")
    cloudpickle.register_pickle_by_value(module)
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


@functools.cache
def pickled_agent_class(spec: str | None, agent_type: str) -> bytes:
    """Load a class, and pickle it for the servers. Raises SettingsError if either step fails."""
    return serialize_agent_class(load_agent_class(spec, agent_type))
