"""Every setting once, with its default, its range and its help; checked before anything is started.

The command line is made from these fields (`main.py`), so a setting added here is a flag at once.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from simulation.errors import SettingsError

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD_PORT = 8050
FRACTION = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20}|/[0-9]{1,20})?")
FINEST = 10**9  # the largest denominator


def setting(
    default: Any,
    help_text: str,
    low: float | None = None,
    high: float | None = None,
    *,
    choices: tuple[str, ...] = (),
    stays: bool = False,
    game: bool = False,
) -> Any:
    """A field with what its flag needs: help, and the allowed range or choices; one that `stays` cannot be resumed with
    another value.
    """
    allowed = {"low": low, "high": high, "choices": choices}
    return field(default=default, metadata={"help": help_text, **allowed, "stays": stays, "game": game})


def of_game(default: Any, help_text: str, *allowed: Any, stays: bool = True, **choices: Any) -> Any:
    """A setting of the game, which an experiment file may hold."""
    return setting(default, help_text, *allowed, stays=stays, game=True, **choices)


@dataclass(frozen=True)
class SimulationConfig:
    """What a person can choose. Raises SettingsError, naming flag, value and range, if a value is off."""

    role: str = setting(
        "main",
        "main plays the game; participant starts, stops or shows the agent servers of this host; "
        "ask talks to one participant of a run that kept its agents; report shows a finished run again; "
        "vllm starts, stops or shows the vLLM servers of this host",
        choices=("main", "participant", "ask", "report", "vllm"),
    )
    # The game
    experiment: str | None = setting(
        None, "a YAML file with settings of the game; a list of values for one of them plays a run with each"
    )
    agent_type: str = of_game("random", "what answers: a random source, or an LLM", choices=("random", "llm"))
    agent_class: str | None = of_game(None, "your own participant, as my_file.py:MyParticipant")
    extra_pythonpath: str | None = setting(
        None, "folders, separated by colons, of what your own participants import beside what lies in their folder"
    )
    dry_run: bool = setting(False, "print what a run would do, ask and cost, and start nothing")
    participant_num: int = of_game(1000, "participants in all", 1, 10**9)
    max_value: int = of_game(100, "the upper bound of the numbers; the lower one is 0", 1, 10**9)
    decimals: int = of_game(0, "digits after the point that answers are counted in", 0, 6)
    rounds: int = of_game(1, "rounds to play", 1, 100, stays=False)
    ratio: str = of_game("1", "whoever is closest to so much of the average wins: a fraction such as 2/3, or 0.51")
    offset: str = of_game("0", "what is added to that: 5 and a ratio of 1/2 is 5 plus half the average")
    sleep_time: float = of_game(1.0, "think time of a random participant, in seconds", 0, 86_400, stays=False)
    seed: int | None = of_game(None, "repeats a game exactly; drawn and printed when not given", 0, 2**64 - 1)
    prompt: str = of_game("basic", "what LLM participants are told: a name in the prompts file")
    personas: str | None = of_game(
        None, "who the participants are: a name in the personas file, or several, as education+occupation"
    )
    models: str | None = of_game(
        None, "shares of models, as model_1=2/3,model_2=1/3 (default: participants use all of a host in turn)"
    )
    teams: str | None = of_game(
        None, "what makes teams, whose averages are announced, too: a name of --personas, or model"
    )
    prompts_file: str = setting(str(ROOT / "configs/prompts.yaml"), "the prompts, by name", stays=True)
    personas_file: str = setting(str(ROOT / "configs/personas.yaml"), "the personas, by name", stays=True)
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
    cluster_key_dir: str = setting(str(ROOT / ".cluster"), "folder of the cluster key")
    connect_timeout: float = setting(5.0, "how long all agent servers have to answer, in seconds", 0.1, 3600)
    heartbeat_timeout: float = setting(
        10.0,
        "seconds without a heartbeat after which a server is given up on, and its participants go to others",
        0.5,
        3600,
    )
    min_servers: int | None = setting(
        None, "end the game when fewer participant servers are left in a round (default: when none is)", 1, 10**6
    )
    lease: float = setting(60.0, "seconds after which a server drops the agents of a silent run", 2, 86_400)
    reply_threads: int = setting(32, "threads per agent server for participants with a blocking reply", 1, 1024)
    # LLM participants
    model_per_host: int = setting(1, "model servers on every host; participants use them in turn", 1, 1024)
    model_configs: str = setting(str(ROOT / "configs/model_configs.json"), "the models, in AgentScope's format")
    allow_remote_model: bool = setting(False, "let models be outside the cluster's hosts, where they may cost money")
    structured_output: str = of_game(
        "structured_outputs",
        "how the model is held to a number in range: by vLLM's field, by the field of the OpenAI API, or not at all",
        stays=False,
        choices=("structured_outputs", "response_format", "none"),
    )
    samples_per_request: int = of_game(
        100, "participants with the same prompt that share a request, by n", 1, 10_000, stays=False
    )
    max_attempts: int = of_game(3, "answers of one participant until one is a number in range", 1, 100, stays=False)
    max_in_flight: int | None = setting(
        None,
        "requests in flight per model and host, of all its agent servers (default: enough for 512 answers)",
        1,
        1e6,
    )
    attempt_timeout: float = setting(300.0, "seconds that one request may take", 0.1, 86_400)
    reply_timeout: float = setting(
        600.0, "seconds that a participant is asked again for while its model does not answer", 0.1, 864_000
    )
    max_tokens: int | None = of_game(
        None, "tokens, of prompts and answers, that the game may cost", 1, 10**15, stays=False
    )
    price_per_million_tokens: float | None = setting(None, "price of 10^6 tokens, for the estimate", 0, 1e9)
    # vLLM servers (role vllm)
    vllm_base_port: int = setting(8010, "first port of the vLLM servers on every host", 1, 65_535)
    gpu_num: int | None = setting(
        None, "GPUs of this host (default: all there are); 0 is one server on the CPU", 0, 1024
    )
    tensor_parallel: int = setting(1, "GPUs of each vLLM server", 1, 1024)
    model_path: str | None = setting(None, "the model's folder, or its name on a hub")
    # The results
    resume: str | None = setting(None, "folder of a run to go on with, after its last finished round")
    run_dir: str | None = setting(None, "folder of the results (default runs/<run id>)")
    keep_agents: bool = setting(False, "leave the agents on their servers, for --role ask")
    dashboard: int | None = setting(
        None, "serve a page on this host that shows what the run is at; the port is 8050 unless given", 0, 65_535
    )
    participant: int = setting(0, "which participant to talk to (role ask)", 0, 10**9)
    winner: bool = setting(False, "talk to the first winner of the last round (role ask)")
    text: str | None = setting(None, "what to say to it (role ask)")

    def __post_init__(self) -> None:
        # read by servers whose working directory is another
        for name in ("cluster_key_dir", "model_configs", "prompts_file", "personas_file"):
            object.__setattr__(self, name, str(Path(getattr(self, name)).absolute()))
        if self.extra_pythonpath is not None:
            folders = [os.path.expanduser(each) for each in self.extra_pythonpath.split(":") if each]  # noqa: PTH111
            object.__setattr__(self, "extra_pythonpath", ":".join(map(os.path.abspath, folders)) or None)
        for item in fields(self):
            check(flag_of(item.name), getattr(self, item.name), item.metadata)
        for name, low, high in (("ratio", Fraction(1, 10**6), 10), ("offset", Fraction(0), 10**9)):
            object.__setattr__(self, name, str(fraction(flag_of(name), getattr(self, name), low, high)))
        last_port = self.base_port + self.server_per_host + self.moderator_per_host - 1
        if last_port > 65_535:
            raise SettingsError(
                f"--base-port {self.base_port}: {self.server_per_host} participant and {self.moderator_per_host} "
                f"moderator servers would end at port {last_port}; the last one there is, is 65535"
            )
        if not self.hosts or len(set(self.hosts)) < len(self.hosts):
            raise SettingsError(f"--hosts {' '.join(self.hosts)}: must name at least one host, and none twice")
        if "localhost" in self.hosts and len(self.hosts) > 1:
            raise SettingsError(
                f"--hosts {' '.join(self.hosts)}: localhost is another machine on each of them; name all hosts as they "
                "reach each other"
            )
        if self.vllm_base_port + self.model_per_host - 1 > 65_535:
            raise SettingsError(
                f"--vllm-base-port {self.vllm_base_port}: {self.model_per_host} models would end beyond port 65535"
            )
        self._refuse_what_does_not_go_together()

    def _refuse_what_does_not_go_together(self) -> None:
        if self.winner and self.participant:
            raise SettingsError(f"--winner: does not go with --participant {self.participant}")
        if self.role == "ask" and (self.run_dir is None or not (self.text or "").strip()):
            raise SettingsError("--role ask: give --run-dir, --text, and --participant or --winner")
        servers = len(self.hosts) * self.server_per_host
        if self.min_servers is not None and self.min_servers > servers and self.resume is None:
            raise SettingsError(f"--min-servers {self.min_servers}: there are {servers} participant servers")
        if self.resume is not None and self.role != "main":
            raise SettingsError("--resume: goes with --role main")
        if self.experiment is not None and (self.role != "main" or self.resume is not None):
            raise SettingsError("--experiment: goes with --role main, and not with --resume")

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
    if allowed["low"] is not None and not allowed["low"] <= value <= allowed["high"]:
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


def fraction(flag: str, text: str, low: Fraction, high: float) -> Fraction:
    """Read an exact number such as 2/3 or 0.51, to 10^-9 at most; raises SettingsError."""
    text = str(text)
    try:
        if not FRACTION.fullmatch(text):  # an exponent may stand for more digits than there is memory for
            raise ValueError
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise SettingsError(f"{flag} {text}: must be a number such as 2/3 or 0.51") from None
    if value.denominator > FINEST:
        raise SettingsError(f"{flag} {text}: is finer than can be counted with; write a fraction such as 2/3")
    if not low <= value <= high:
        raise SettingsError(f"{flag} {text}: must be from {low} to {high:g}, as a fraction such as 2/3 or as 0.51")
    return value
