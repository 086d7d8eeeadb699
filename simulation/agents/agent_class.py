"""The unpickling of participant classes on agent servers, without entries in AgentScope's registry of classes."""

import contextlib
import hashlib
import pickle
import threading
from collections.abc import Iterator
from weakref import WeakValueDictionary

import cloudpickle
from agentscope.rpc import RpcMeta
from loguru import logger

from simulation.agents.participant import Participant
from simulation.files import append_to_path

_loaded: WeakValueDictionary[tuple[str, bytes], type[Participant]] = WeakValueDictionary()
_locks: dict[tuple[str, bytes], threading.Lock] = {}  # one per run and class, because unpickling may take long


def deserialize_agent_class(packed: bytes, run: str) -> type[Participant]:
    """Return the class pickled in `packed`. Unpickle it once for each `run`, so that runs share no class attributes."""
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
    """On exit, remove from AgentScope's registry all classes that were created in this context.

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
