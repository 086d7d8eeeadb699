"""Serialization of a participant class for transfer to the agent servers."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import cloudpickle
from agentscope.rpc import RpcMeta
from loguru import logger

from simulation.agents.participant import Participant
from simulation.errors import SettingsError, one_line
from simulation.files import full_path
from simulation.rpc.lean_import import append_to_path

PACKED_BYTES = 64 * 2**20


OWN = "own_"


class _Packed:
    """A pickled class. Unpickling it first appends the folder of its file to `sys.path` (ignored if missing)."""

    def __init__(self, folder: str, packed: bytes) -> None:
        self._content = (folder, packed)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, self._content


def _unpacked(folder: str, packed: bytes) -> Any:
    append_to_path(folder)
    return cloudpickle.loads(packed)


def serialize_agent_class(cls: type[Participant]) -> bytes:
    """Pickle a class, with its file's code if it is user-defined. Raises SettingsError if it cannot or is too large."""
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


_loading: WeakValueDictionary[tuple[str, bytes], Any] = WeakValueDictionary()  # one lock per class


_lock = threading.Lock()


def deserialize_agent_class(packed: bytes, run: str) -> type[Participant]:
    """Unpickle a class, once per run in this process, for all groups of the run.

    Loading it for each group would reset its class attributes to their values in main. Sharing it with the next run
    would carry them over.
    """
    key = (run, hashlib.sha256(packed).digest())
    with _lock:
        own_lock = _loading.setdefault(key, threading.Lock())
    with own_lock:  # per class: the imports of another class may take long
        cls = _loaded.get(key)
        if cls is None:
            with _unregistered():
                cls = _loaded[key] = cloudpickle.loads(packed)
        return cls


@contextlib.contextmanager
def _unregistered() -> Iterator[None]:
    """Remove classes that are created in this context from AgentScope's registry.

    The registry keeps all classes by name only, permanently, and warns about duplicates. Participants do not need it,
    as their group creates them from its class, and two files may define classes of the same name.
    """
    before = set(RpcMeta._REGISTRY)
    logger.disable(RpcMeta.__module__)  # it warns about a class with the name of one of the program's
    try:
        yield
    finally:
        logger.enable(RpcMeta.__module__)
        for name in set(RpcMeta._REGISTRY) - before:
            RpcMeta._REGISTRY.pop(name, None)
