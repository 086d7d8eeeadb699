"""A person's own participant: its class, loaded from a file of theirs and packed to travel with the groups."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import cloudpickle
from agentscope.rpc import RpcMeta
from loguru import logger

from participant import LLMParticipant, Participant, RandomParticipant, answers_many
from simulation.config import full_path, is_there, shown
from simulation.errors import SettingsError, meant_by, near_file, one_line
from simulation.lean_import import append_to_path

PACKED_BYTES = 64 * 2**20
OWN = "own_"


@functools.cache
def load_class(spec: str | None, agent_type: str) -> type[Participant]:
    """The class that `my_file.py:MyParticipant` names; for None the one of the agent type, random or llm.

    Raises SettingsError that says what is wrong with the file or the class.
    """
    if spec is None:
        return LLMParticipant if agent_type == "llm" else RandomParticipant
    spec = shown(spec)
    file_name, colon, class_name = spec.rpartition(":")
    path = Path(file_name)
    if not colon or path.suffix != ".py":
        raise SettingsError(f"--agent-class {spec}: write it as my_file.py:MyParticipant")
    if not is_there(path, "--agent-class"):
        raise SettingsError(f"--agent-class {spec}: there is no file {path}{near_file(path)}")
    name = OWN + path.stem  # a name of its own: a file random.py must not hide a library
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # as for every .py file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    append_to_path(full_path("--agent-class", str(path.parent)))
    try:
        with _unregistered():
            module_spec.loader.exec_module(module)
    except BaseException as error:  # noqa: BLE001 - a person's own file may raise anything
        raise SettingsError(f"--agent-class {spec}: {path} cannot be imported: {one_line(error)}") from None
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Participant)):
        own = [name for name, each in vars(module).items() if getattr(each, "__module__", "") == module.__name__]
        guess = f"; {meant}" if (meant := meant_by(class_name, own)) else ""
        raise SettingsError(f"--agent-class {spec}: {path} has no class {class_name} derived from Participant{guess}")
    cls: Any = found
    if issubclass(cls, LLMParticipant) and agent_type != "llm":
        raise SettingsError(f"--agent-class {spec}: {class_name} asks a model: give --agent-type llm, too")
    if not answers_many(cls) and cls.reply is Participant.reply:
        raise SettingsError(f"--agent-class {spec}: {class_name} defines neither answer nor reply")
    if not inspect.iscoroutinefunction(cls.answer):
        raise SettingsError(f"--agent-class {spec}: answer must be written as 'async def answer(self, question)'")
    if inspect.iscoroutinefunction(inspect.unwrap(cls.reply)):
        raise SettingsError(f"--agent-class {spec}: reply must be an ordinary method; its async kind is called answer")
    cloudpickle.register_pickle_by_value(module)
    return cls


class _Packed:
    """A class as it travels. Before it is unpickled, the folder of its file joins the path, if the host has it."""

    def __init__(self, folder: str, packed: bytes) -> None:
        self._content = (folder, packed)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, self._content


def _unpacked(folder: str, packed: bytes) -> Any:
    append_to_path(folder)
    return cloudpickle.loads(packed)


def pack_class(cls: type[Participant]) -> bytes:
    """The class as it travels: with its file's code if it is a person's own. Raises SettingsError if it cannot."""
    try:
        packed = cloudpickle.dumps(cls)
        file = getattr(sys.modules[cls.__module__], "__file__", None)
        if file is not None and cls.__module__.startswith(OWN):
            packed = cloudpickle.dumps(_Packed(full_path("--agent-class", str(Path(file).parent)), packed))
    except BaseException as error:  # noqa: BLE001 - a person's own class may raise anything
        raise SettingsError(f"--agent-class: {cls.__name__} cannot travel to the servers: {one_line(error)}") from None
    if len(packed) > PACKED_BYTES:
        raise SettingsError(
            f"--agent-class: {cls.__name__} carries {len(packed) >> 20} MB of its file's data to every server, "
            f"more than {PACKED_BYTES >> 20} MB: read large data in __init__ instead"
        )
    return packed


_loaded: WeakValueDictionary[tuple[str, bytes], type[Participant]] = WeakValueDictionary()
_loading: WeakValueDictionary[tuple[str, bytes], Any] = WeakValueDictionary()  # a lock for each
_lock = threading.Lock()


def unpack_class(packed: bytes, run: str) -> type[Participant]:
    """The class that `pack_class` packed, loaded once for all groups of a run in this process.

    To load it for each group would set what the class itself keeps back to what it was in main; to keep it for the next
    run would not.
    """
    key = (run, hashlib.sha256(packed).digest())
    with _lock:
        own_lock = _loading.setdefault(key, threading.Lock())
    with own_lock:  # of this class alone: what another one imports may take long
        cls = _loaded.get(key)
        if cls is None:
            with _unregistered():
                cls = _loaded[key] = cloudpickle.loads(packed)
        return cls


@contextlib.contextmanager
def _unregistered() -> Iterator[None]:
    """Have AgentScope forget the names of classes that are made meanwhile.

    It keeps all classes by their names alone, for ever, and warns of a second one of a name: participants are made by
    their group, which has their class, and two files may each have a class of the same name.
    """
    before = set(RpcMeta._REGISTRY)
    logger.disable(RpcMeta.__module__)  # which warns of a class that is called like one of the program's
    try:
        yield
    finally:
        logger.enable(RpcMeta.__module__)
        for name in set(RpcMeta._REGISTRY) - before:
            RpcMeta._REGISTRY.pop(name, None)
