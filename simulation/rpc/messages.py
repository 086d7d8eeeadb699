"""What agent servers and main tell each other beside the calls of AgentScope: handshake and heartbeat."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field

from simulation.files import ROOT


@dataclass(frozen=True)
class Progress:
    """What an object of a run is at.

    Attributes:
        done: How many of its participants are built, or have answered.
        total: Of how many.
        round: The round that they answer; 0 while they are built.
        error: Why it cannot go on; empty if it can.
        usage: What its participants have cost so far (the fields of `Usage`); empty for a moderator.
    """

    done: int
    total: int
    round: int = 0
    error: str = ""
    usage: tuple[float, ...] = ()

    @property
    def finished(self) -> bool:
        return self.done == self.total


@dataclass(frozen=True)
class HeartbeatReply:
    """What a server says: which process it is, and what the objects of the run there are at, by remote id."""

    incarnation: str
    objects: dict[str, Progress] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HeartbeatReply | None:
        """The beat that a text holds; None if it is of another program."""
        try:
            said = json.loads(text)
            objects = {
                oid: Progress(**{**each, "usage": tuple(each["usage"])}) for oid, each in said["objects"].items()
            }
            return cls(said["incarnation"], objects)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


SERVICE, HANDSHAKE, HEARTBEAT = "simulation.AgentServer", "handshake", "heartbeat"  # as gRPC calls them


# What a handshake may tell, of a run or about the server
NEW_RUN, KEEP_RUN, END_RUN = "new-run", "keep-run", "end-run"


MEMORY, SERVED, CHECK_MODELS = "memory", "served", "check-models"


def _code_version() -> str:
    """A fingerprint of the program as this process imported it; a person's own files are not part of it."""
    digest = hashlib.sha256()
    top = (ROOT / name for name in ("main.py", "moderator.py", "participant.py"))
    for path in (*top, *sorted(ROOT.glob("simulation/**/[!.]*.py"))):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


CODE_VERSION = _code_version()


AGENTSCOPE_VERSION = importlib.metadata.version("agentscope")


@dataclass(frozen=True)
class Handshake:
    """Who an agent server is. Two sides work together if `versions` are equal."""

    incarnation: str  # random, per process: another one means that all agents of the former are gone
    pid: int
    role: str  # participant or moderator
    base_port: int
    server_per_host: int
    moderator_per_host: int
    started: float  # seconds since the epoch
    agents: int
    memory_mb: float | None  # told only to those who ask for it, as it takes 5 ms to find out
    models: dict[str, str]  # the models it knows: name, and address
    model_troubles: dict[str, str]  # by name, why a model that it was asked to check does not answer
    # By what was called, if asked for: how often so far, and the bytes of what was said and answered
    served: dict[str, tuple[int, int, int]]
    code: str = CODE_VERSION
    python: str = platform.python_version()
    agentscope: str = AGENTSCOPE_VERSION

    @property
    def versions(self) -> tuple[str, str, str]:
        return (self.code, self.python, self.agentscope)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


OWN_VERSIONS = (CODE_VERSION, platform.python_version(), AGENTSCOPE_VERSION)
