"""The messages of handshakes and heartbeats, the two calls that this program adds to AgentScope's calls."""

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field

from simulation.files import CODE, MAIN
from simulation.settings import SimulationConfig

SERVICE, HANDSHAKE, HEARTBEAT = "simulation.AgentServer", "handshake", "heartbeat"  # gRPC service and method names
# Directives of a handshake. END_RUN or KEEP_RUN with a run's name: the run ends; delete its agents or keep them.
# MEMORY: report the memory use. CHECK_MODELS with "[names, T, probe]" (JSON): send a small request (see Probe) to these
# models, and report those that are not usable, or do not answer within T seconds.
KEEP_RUN, END_RUN, MEMORY, CHECK_MODELS = "keep-run", "end-run", "memory", "check-models"


@dataclass(frozen=True)
class Progress:
    """The progress of one remote object of a run: a group or a moderator."""

    done: int  # number of participants that are created or, in a round, have answered or failed
    total: int  # number of all participants of a group; 0 for a moderator
    round: int = 0  # 0 while participants are created
    error: str = ""  # why the object cannot continue; empty without an error
    usage: list[float] = field(default_factory=list)  # the fields of `Usage` so far; empty for a moderator
    outages: dict[str, str] = field(default_factory=dict)  # messages about models with lasting errors, by model
    counts: list[int] = field(default_factory=list)  # partial histogram of the round, if requested
    failures: dict[str, int] = field(default_factory=dict)  # number of failures by cause, if the histogram is requested

    @property
    def finished(self) -> bool:
        return self.done == self.total


@dataclass(frozen=True)
class HeartbeatReply:
    """The reply to a heartbeat: the state of the server process and of a run's objects on that server."""

    incarnation: str  # random id of the server process
    objects: dict[str, Progress] = field(default_factory=dict)  # progress of the run's objects, by remote id
    cpu: float | None = None  # share of a CPU core that the process uses, if histograms are requested
    memory_mb: float | None = None

    def is_working_on(self, number: int) -> bool:
        """Return whether any object is in round `number`, has not finished this round, and reports no error."""
        return any(each.round == number and not each.finished and not each.error for each in self.objects.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "HeartbeatReply | None":
        """Return the reply that a text contains, or None if the text is invalid, for example from another program."""
        try:
            data = json.loads(text)
            objects = {oid: Progress(**each) for oid, each in data["objects"].items()}
            return cls(**{**data, "objects": objects})
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


def _code_version() -> str:
    """Return a hash of the program's Python files at import time. Users' files are not included.

    The hash of an installed package is that of the checkout from which it was built.
    """
    digest = hashlib.sha256(MAIN.read_bytes())
    top = (CODE / name for name in ("moderator.py", "participant.py"))
    for path in (*top, *sorted(CODE.glob("simulation/**/[!.]*.py")), *sorted(CODE.glob("games/[!.]*.py"))):
        if path != MAIN:
            digest.update(str(path.relative_to(CODE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


CODE_VERSION = _code_version()
OWN_VERSIONS = {
    "the program": CODE_VERSION,
    "Python": platform.python_version(),
    "AgentScope": importlib.metadata.version("agentscope"),
}


def layout_of(config: SimulationConfig) -> list[int]:
    """Return the first port, and the numbers of participant servers and of moderator servers of each host."""
    return [config.base_port, config.server_per_host, config.moderator_per_host]


@dataclass(frozen=True)
class Handshake:
    """The identity and state of an agent server. Server and client must have equal `versions`."""

    incarnation: str  # random id of the process; if the id changes, all previous agents are lost
    pid: int
    layout: list[int]  # see `layout_of`
    started: float  # seconds since the epoch
    agents: int
    memory_mb: float | None  # only if requested, because the measurement takes 5 ms
    models: dict[str, str]  # base URL of each known model, by name
    model_troubles: dict[str, str]  # why a checked model is not usable, and what helps, by name
    repeatable_models: list[str]  # the checked models whose servers repeat seeded answers
    versions: dict[str, str] = field(default_factory=OWN_VERSIONS.copy)

    def to_json(self) -> str:
        return json.dumps(asdict(self))
