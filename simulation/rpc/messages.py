"""Messages between main and agent servers besides AgentScope's calls: handshake and heartbeat."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field

from simulation.files import ROOT

SERVICE, HANDSHAKE, HEARTBEAT = "simulation.AgentServer", "handshake", "heartbeat"  # gRPC service and method names
KEEP_RUN, END_RUN, MEMORY, CHECK_MODELS = "keep-run", "end-run", "memory", "check-models"  # directives


@dataclass(frozen=True)
class Progress:
    """The progress of one remote object of a run."""

    done: int  # number of its participants that are created, or have answered
    total: int  # number of its participants
    round: int = 0  # 0 while participants are created
    error: str = ""  # why it cannot continue; empty if it can
    usage: tuple[float, ...] = ()  # of its participants so far (the fields of `Usage`); empty for a moderator
    counts: tuple[int, ...] = ()  # partial histogram of the round, on request only
    failures: dict[str, int] = field(default_factory=dict)  # number by cause, with the histogram

    @property
    def finished(self) -> bool:
        return self.done == self.total


@dataclass(frozen=True)
class HeartbeatReply:
    """A heartbeat reply."""

    incarnation: str  # of the server: random per process
    objects: dict[str, Progress] = field(default_factory=dict)  # those of the run, by remote id
    cpu: float | None = None  # share of a core that the process uses, with histograms
    memory_mb: float | None = None

    def is_working_on(self, number: int) -> bool:
        """Return whether an object is in the middle of this round."""
        return any(each.round == number and not each.finished and not each.error for each in self.objects.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HeartbeatReply | None:
        """Parse a heartbeat reply; return None if it comes from another program."""
        try:
            data = json.loads(text)
            data["objects"] = {
                oid: Progress(**{**each, "usage": tuple(each["usage"]), "counts": tuple(each["counts"])})
                for oid, each in data["objects"].items()
            }
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


def _code_version() -> str:
    """Return a hash of the program's source files at import time, without user-defined ones."""
    digest = hashlib.sha256()
    top = (ROOT / name for name in ("main.py", "moderator.py", "participant.py"))
    for path in (*top, *sorted(ROOT.glob("simulation/**/[!.]*.py"))):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


CODE_VERSION = _code_version()
OWN_VERSIONS = {
    "the program": CODE_VERSION,
    "Python": platform.python_version(),
    "AgentScope": importlib.metadata.version("agentscope"),
}


@dataclass(frozen=True)
class Handshake:
    """The identity and state of an agent server. Both sides must have equal `versions`."""

    incarnation: str  # random per process; if it changes, all previous agents are lost
    pid: int
    role: str  # participant or moderator
    base_port: int
    server_per_host: int
    moderator_per_host: int
    started: float  # seconds since the epoch
    agents: int
    memory_mb: float | None  # only on request, as it takes 5 ms to measure
    models: dict[str, str]  # known models: base URL by name
    model_troubles: dict[str, str]  # by name, why a checked model does not answer
    versions: dict[str, str] = field(default_factory=OWN_VERSIONS.copy)

    def to_json(self) -> str:
        return json.dumps(asdict(self))
