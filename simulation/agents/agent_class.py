"""Serialization of a participant class for transfer to the agent servers."""

import contextlib
import hashlib
import pickle
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakValueDictionary

import cloudpickle
from agentscope.rpc import RpcMeta
from loguru import logger

from simulation.agents.participant import Participant
from simulation.errors import SettingsError, one_line
from simulation.files import full_path
from simulation.rpc.lean_import import append_to_path

PACKED_BYTES = 64 * 2**20
OWN = "own_"  # prefix of the module names of user-defined classes


def serialize_agent_class(cls: type[Participant]) -> bytes:
    """Pickle a class (by value if user-defined). Raises SettingsError if pickling fails or the result is too large."""
    try:
        file, folder = getattr(sys.modules[cls.__module__], "__file__", None), None
        if file is not None and cls.__module__.startswith(OWN):
            folder = full_path("--agent-class", str(Path(file).parent))
        packed = pickle.dumps((folder, cloudpickle.dumps(cls)))
    except BaseException as error:  # noqa: BLE001 - a user-defined class may raise anything
        raise SettingsError(f"--agent-class: {cls.__name__} cannot travel to the servers: {one_line(error)}") from None
    if len(packed) > PACKED_BYTES:
        raise SettingsError(
            f"--agent-class: {cls.__name__} carries {len(packed) >> 20} MB of its file's data to every server, "
            f"more than {PACKED_BYTES >> 20} MB: read large data in __init__ instead"
        )
    return packed


_loaded: WeakValueDictionary[tuple[str, bytes], type[Participant]] = WeakValueDictionary()
_locks: dict[tuple[str, bytes], threading.Lock] = {}  # one per class, as the imports of a class may take long


def deserialize_agent_class(packed: bytes, run: str) -> type[Participant]:
    """Unpickle a class, once per run in this process. Runs do not share the attributes of a user-defined class."""
    key = (run, hashlib.sha256(packed).digest())
    with _locks.setdefault(key, threading.Lock()):
        cls = _loaded.get(key)
        if cls is None:
            folder, pickled = pickle.loads(packed)
            if folder is not None:
                append_to_path(folder)  # the folder of the user's file; Python ignores a missing folder
            with unregistered():
                cls = _loaded[key] = cloudpickle.loads(pickled)
        return cls


@contextlib.contextmanager
def unregistered() -> Iterator[None]:
    """Remove the classes that are created in this context from AgentScope's registry.

    The registry keeps one class per name forever, but two user files may define classes with the same name.
    Participants do not need the registry, because their group creates them from the class object.
    """
    before = set(RpcMeta._REGISTRY)
    logger.disable(RpcMeta.__module__)  # AgentScope warns about a second class with the same name
    try:
        yield
    finally:
        logger.enable(RpcMeta.__module__)
        for name in set(RpcMeta._REGISTRY) - before:
            RpcMeta._REGISTRY.pop(name, None)
