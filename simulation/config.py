"""Every setting once, with its default, its range and its help; checked before anything is started.

The command line is made from these fields (`main.py`), so a setting added here is a flag at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from simulation.errors import SettingsError

ROOT = Path(__file__).resolve().parent.parent


def setting(
    default: Any, help_text: str, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """A field with what its flag needs: help, and the allowed range or choices."""
    return field(default=default, metadata={"help": help_text, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class SimulationConfig:
    """What a person can choose. Raises SettingsError, naming flag, value and range, if a value is off."""

    role: str = setting(
        "main",
        "main plays the game; participant starts, stops or shows the agent servers of this host; "
        "ask talks to one participant of a run that kept its agents; report shows a finished run again",
        choices=("main", "participant", "ask", "report"),
    )
    # The game
    agent_type: str = setting("random", "what answers: a random source, or an LLM", choices=("random", "llm"))
    agent_class: str | None = setting(None, "your own participant, as my_file.py:MyParticipant")
    participant_num: int = setting(1000, "participants in all", 1, 10**9)
    max_value: int = setting(100, "the upper bound of the numbers; the lower one is 0", 1, 10**9)
    decimals: int = setting(0, "digits after the point that answers are counted in", 0, 6)
    rounds: int = setting(1, "rounds to play", 1, 100)
    sleep_time: float = setting(1.0, "think time of a random participant, in seconds", 0, 86_400)
    seed: int | None = setting(None, "repeats a game exactly; drawn and printed when not given", 0, 2**64 - 1)
    dispatch: str = setting(
        "group",
        "group asks the participants of a server together; agent asks each through its own AgentScope proxy",
        choices=("group", "agent"),
    )
    # The cluster
    hosts: tuple[str, ...] = setting(("localhost",), "the hosts whose agent servers play")
    host_name: str = setting("localhost", "the name of this host, as the others reach it (role participant)")
    base_port: int = setting(12330, "first port of the agent servers on every host", 1, 65_535)
    server_per_host: int = setting(10, "participant servers on every host", 1, 4096)
    moderator_per_host: int = setting(4, "moderator servers on every host, on the ports after those", 1, 4096)
    model_per_host: int = setting(1, "model servers on every host (LLM participants)", 1, 1024)
    cluster_key_dir: str = setting(str(ROOT / ".cluster"), "folder of the cluster key")
    connect_timeout: float = setting(5.0, "how long all agent servers have to answer, in seconds", 0.1, 3600)
    lease: float = setting(60.0, "seconds after which a server drops the agents of a silent run", 2, 86_400)
    reply_threads: int = setting(32, "threads per agent server for participants with a blocking reply", 1, 1024)
    # The results
    run_dir: str | None = setting(None, "folder of the results (default runs/<run id>)")
    keep_agents: bool = setting(False, "leave the agents on their servers, for --role ask")
    participant: int = setting(0, "which participant to talk to (role ask)", 0, 10**9)
    text: str | None = setting(None, "what to say to it (role ask)")

    def __post_init__(self) -> None:
        object.__setattr__(self, "cluster_key_dir", str(Path(self.cluster_key_dir).absolute()))
        for item in fields(self):
            check(flag_of(item.name), getattr(self, item.name), item.metadata)
        last_port = self.base_port + self.server_per_host + self.moderator_per_host - 1
        if last_port > 65_535:
            raise SettingsError(
                f"--base-port {self.base_port}: {self.server_per_host} participant and {self.moderator_per_host} "
                f"moderator servers would end at port {last_port}; the last one there is, is 65535"
            )
        if not self.hosts or len(set(self.hosts)) < len(self.hosts):
            raise SettingsError(f"--hosts {' '.join(self.hosts)}: must name at least one host, and none twice")
        if self.role == "ask" and (self.run_dir is None or self.text is None):
            raise SettingsError("--role ask: give --run-dir, --participant and --text")
        if self.role == "report" and self.run_dir is None:
            raise SettingsError("--role report: give --run-dir, the folder of a finished run")
        if self.role == "main" and self.agent_type == "llm":
            raise SettingsError("--agent-type llm: this version has random participants and your own (--agent-class)")

    @property
    def ports(self) -> range:
        """The ports of one host: participant servers first, then moderator servers."""
        return range(self.base_port, self.base_port + self.server_per_host + self.moderator_per_host)


def check(flag: str, value: Any, allowed: Any) -> None:
    """Raise SettingsError unless the value lies in the allowed range or choices."""
    if value is None:
        return
    if allowed["choices"] and value not in allowed["choices"]:
        raise SettingsError(f"{flag} {value}: must be one of {', '.join(allowed['choices'])}")
    if allowed["low"] is not None and not (math.isfinite(value) and allowed["low"] <= value <= allowed["high"]):
        raise SettingsError(f"{flag} {value}: must be from {allowed['low']} to {allowed['high']}")


def flag_of(name: str) -> str:
    """The flag of a setting: `max_value` is `--max-value`."""
    return "--" + name.replace("_", "-")


def whole_number(flag: str, text: str) -> int:
    """Read a whole number as a person writes it on a command line; raises SettingsError."""
    try:
        return int(text)
    except ValueError:
        raise SettingsError(f"{flag} {text!r}: must be a whole number, in digits such as 1000") from None


def real_number(flag: str, text: str) -> float:
    """Read a number such as 0.5; raises SettingsError."""
    try:
        return float(text)
    except ValueError:
        raise SettingsError(f"{flag} {text!r}: must be a number, such as 0.5") from None
