"""The unpickling of participant classes on agent servers, without entries in AgentScope's registry of classes."""

import contextlib
import hashlib
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakValueDictionary

import cloudpickle
from agentscope.rpc import RpcMeta
from loguru import logger

from simulation.agents.participant import Participant
from simulation.files import append_to_path


@dataclass(eq=False)
class Shared:
    """What all groups of a run share on this server. The pool's threads end when the groups are closed and idle."""

    classes: tuple[type[Participant], ...]  # one per kind of player
    pool: ThreadPoolExecutor  # for blocking `reply` methods


_shared: WeakValueDictionary[tuple[str, bytes], Shared] = WeakValueDictionary()
_locks: dict[tuple[str, bytes], threading.Lock] = {}  # one per run and content, because unpickling may take long


def unpack(packed: bytes, run: str, reply_threads: int) -> Shared:
    """Unpickle what `serialize_agent_class` has packed, once per `run`: runs share no class attributes."""
    key = (run, hashlib.sha256(packed).digest())
    with _locks.setdefault(key, threading.Lock()):
        if (shared := _shared.get(key)) is None:
            folders, pickled = pickle.loads(packed)
            for folder in folders:
                append_to_path(folder)  # the folder of a user's file; Python ignores a missing folder
            with unregistered():
                (classes,) = cloudpickle.loads(pickled)
            shared = _shared[key] = Shared(classes, ThreadPoolExecutor(reply_threads, thread_name_prefix="reply"))
        return shared


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
        for name in set(RpcMeta._REGISTRY) - before:
            RpcMeta._REGISTRY.pop(name, None)
