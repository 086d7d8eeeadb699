"""The game over the cluster: connect, place, create, ask, announce. It returns results and prints nothing.

with Simulation(config, run_id, key, watch) as simulation:
    simulation.create()
    result = simulation.play(1)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any, Protocol, TypeVar

from agentscope.message import Msg

from moderator import Moderator, Seating, whole_tally
from participant import Participant
from simulation.config import SimulationConfig
from simulation.custom import load_class, pack_class
from simulation.errors import (
    AgentGone,
    ClusterError,
    GameEnded,
    Interrupted,
    SettingsError,
    SimulationError,
    UnusableAnswer,
)
from simulation.game import Announcement, Answers, Game, RoundResult, Sampling, Winners, merge, question_for
from simulation.group import Progress
from simulation.model import Usage
from simulation.model_configs import model_name, refuse_elsewhere
from simulation.placement import Endpoint, endpoints, group_id, group_of, moderator_id, place
from simulation.remote import (
    GROUP_DEADLINE_S,
    MODERATOR_DEADLINE_S,
    OWN_VERSIONS,
    Handshake,
    RemoteObject,
    all_of,
    fan_out,
    handshake,
    remove,
    reply_of,
    use_key,
)
from simulation.security import ClusterKey

V = TypeVar("V")

POLL_S = 1.0  # how long one look at the progress may wait for the end
FETCHED_AT_ONCE = 250_000  # answers in one message
HALT_PATIENCE_S = 3.0  # a participant that blocks its event loop cannot be stopped
LEASE_PARTS = 6  # heartbeats in one lease


class Watch(Protocol):
    """How a caller looks on, and interrupts: a signal number in `stop_signal` asks for an early end."""

    stop_signal: int | None

    def progress(self, stage: str, done: int, total: int) -> None:
        """Called about once a second, and at the end of each stage: "participants created" or "answers in"."""


def shake_hands(
    config: SimulationConfig, key: ClusterKey
) -> tuple[dict[Endpoint, Handshake], dict[Endpoint, SimulationError]]:
    """Ask every agent server that the run uses who it is, all at once; returns who answers, and errors, by address."""
    use_key(key)
    servers = endpoints(config.hosts, config.base_port, config.server_per_host + config.moderator_per_host)
    return fan_out({each: partial(handshake, each, config.connect_timeout) for each in servers})


def check_cluster(config: SimulationConfig, key: ClusterKey) -> dict[Endpoint, Handshake]:
    """Shake hands with every agent server that the run uses.

    Raises ClusterError that says how many are ready, and what the trouble is with the first that is not.
    """
    shakes, errors = shake_hands(config, key)
    restart = f"restart them: ./stop_all_server.sh, then ./start_all_server.sh {config.server_per_host}"
    for error in errors.values():
        raise ClusterError(f"{len(shakes)} of {len(shakes) + len(errors)} agent servers are ready; {error}; {restart}")
    layout = (config.base_port, config.server_per_host, config.moderator_per_host)
    for endpoint, shake in shakes.items():
        if shake.versions != OWN_VERSIONS:
            raise ClusterError(f"{endpoint} runs another version of the program, Python or AgentScope; {restart}")
        if (shake.base_port, shake.server_per_host, shake.moderator_per_host) != layout:
            raise ClusterError(
                f"{endpoint}: its host has {shake.server_per_host} participant and {shake.moderator_per_host} "
                f"moderator servers from port {shake.base_port}; "
                f"this run asks for {layout[1]} and {layout[2]} from {layout[0]}"
            )
    if config.agent_type == "llm":
        _check_models_known(config, shakes)
        check_models(config)
    return shakes


def _check_models_known(config: SimulationConfig, shakes: dict[Endpoint, Handshake]) -> None:
    """Raise ClusterError if a server does not know a model asked for, SettingsError if one is outside."""
    names = [model_name(number + 1) for number in range(config.model_per_host)]
    for endpoint, shake in shakes.items():
        missing = [name for name in names if name not in shake.models]
        if missing:
            known = f"{len(shake.models)} models" if shake.models else "no model"
            raise ClusterError(
                f"{endpoint} knows {known}, and {missing[0]} is not among them; --model-per-host "
                f"{config.model_per_host} asks for {names[0]} to {names[-1]}: see configs/model_configs.json, and "
                "start the agent servers again with the same MODEL_PER_HOST"
            )
        for name in names:
            refuse_elsewhere(config, name, shake.models[name])


def check_models(config: SimulationConfig) -> None:
    """Let one agent server of every host ask the host's models whether they answer; raises ClusterError."""
    firsts = endpoints(config.hosts, config.base_port, 1)
    timeout_s = 2 * config.connect_timeout
    ask = partial(handshake, timeout_s=timeout_s, check_models=config.model_per_host)
    for endpoint, shake in all_of({each: partial(ask, each) for each in firsts}).items():
        for name, trouble in shake.model_troubles.items():
            raise ClusterError(
                f"{endpoint.host}: {name} at {shake.models[name]} {trouble}; start it there with ./start_vllm.sh, or "
                "correct configs/model_configs.json"
            )


class Simulation:
    """One run on a cluster whose servers are ready. As a context it removes its agents at the end, kept ones excepted.

    Args:
        config: The settings; its seed is set.
        run_id: What all remote ids of this run begin with.
        key: The cluster key.
        watch: Who looks on.
    """

    def __init__(self, config: SimulationConfig, run_id: str, key: ClusterKey, watch: Watch) -> None:
        assert config.seed is not None  # main draws one where none is given
        use_key(key)
        self.config = config
        self.run_id = run_id
        self.watch = watch
        self.game = Game(config.seed, config.max_value, config.decimals, config.sleep_time, _sampling(config))
        self.usage = Usage()  # of the rounds so far
        self.participant_class = load_class(config.agent_class, config.agent_type)
        self._announcements: tuple[Announcement, ...] = ()
        self._moderators: dict[int, RemoteObject] = {}
        self._seatings: dict[int, list[Seating]] = {}
        servers = endpoints(config.hosts, config.base_port, config.server_per_host)
        chairs = endpoints(config.hosts, config.base_port + config.server_per_host, config.moderator_per_host)
        self._servers = servers + chairs
        self._chairs = dict(enumerate(chairs))
        for group in place(config.participant_num, len(servers), len(chairs)):
            seating = Seating(group_id(run_id, group.first), servers[group.server], group.first, group.count)
            self._seatings.setdefault(group.moderator, []).append(seating)

    @property
    def moderator_num(self) -> int:
        """Moderators that have someone to ask."""
        return len(self._seatings)

    def __enter__(self) -> Simulation:
        self._ended = threading.Event()
        self._heartbeat = threading.Thread(target=self._renew_leases, daemon=True)
        self._heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._ended.set()
        self._heartbeat.join()
        if self.config.keep_agents and kind is None:
            self._all(lambda moderator: moderator.keep())
        else:
            fan_out({number: partial(remove, each) for number, each in self._moderators.items()})

    def create(self) -> float:
        """Create moderators, groups and participants; returns the seconds it took. Raises ClusterError."""
        started = time.monotonic()
        all_of(
            {each: partial(handshake, each, self.config.connect_timeout, False, self.run_id) for each in self._servers}
        )
        packed = pack_class(self.participant_class)
        seats = {number: self._chairs[number] for number in self._seatings}

        def moderator(number: int) -> RemoteObject:
            kwargs = {"name": f"Moderator {number}", "lease_s": self.config.lease}
            oid = moderator_id(self.run_id, number)
            return RemoteObject(Moderator, oid, seats[number], MODERATOR_DEADLINE_S, kwargs)

        self._moderators, errors = fan_out({number: partial(moderator, number) for number in seats})
        for error in errors.values():
            raise error
        one_by_one = self.config.dispatch == "agent"

        def open_groups(number: int) -> None:
            seatings = self._seatings[number]
            self._moderators[number].open(seatings, self.game, packed, self.config.reply_threads, one_by_one)

        all_of({number: partial(open_groups, number) for number in seats})
        self._wait("participants created", interruptible=True)
        return time.monotonic() - started

    def play(self, number: int) -> RoundResult:
        """Play one round to its end, or to an interruption, whose missing answers count as failed.

        Raises ClusterError if a server of the run does not answer any more.
        """
        started = time.monotonic()
        question = question_for(self.game, number, self._announcements)
        self._all(lambda moderator: moderator.begin(question, self._tokens_each()))
        self._wait("answers in", interruptible=False)
        self.usage = sum(self._all(lambda moderator: moderator.usage()).values(), start=Usage())
        tally = merge(self._all(whole_tally).values())
        average = tally.average()
        closest = tally.closest(average) if average is not None else ()
        announcement = Announcement(number, self._value(average), self._value(average), closest)
        winners = sum(self._all(lambda moderator: moderator.announce(announcement)).values(), start=Winners(0, ()))
        self._announcements += (announcement,)
        return RoundResult(number, tally, average, average, closest, winners, time.monotonic() - started)

    def answers(self) -> Iterator[Answers]:
        """The answers of the round just played, in the order of the participants, a bounded number at a time."""
        for number, seatings in sorted(self._seatings.items()):
            first, stop = seatings[0].first, seatings[-1].first + seatings[-1].count
            for start in range(first, stop, FETCHED_AT_ONCE):
                yield self._moderators[number].answers(start, min(FETCHED_AT_ONCE, stop - start))

    def _tokens_each(self) -> float | None:
        """What each participant may cost in the next round; None is no limit."""
        if self.config.max_tokens is None:
            return None
        return max(self.config.max_tokens - self.usage.tokens, 0) / self.config.participant_num

    def _value(self, units: Fraction | None) -> float | None:
        return None if units is None else float(units / self.game.scale)

    def _wait(self, stage: str, interruptible: bool) -> None:
        """Wait for the end of what the moderators do; an interruption ends a round early, and creation at once."""
        give_up_at: float | None = None
        while True:
            each = self._all(lambda moderator: moderator.progress(POLL_S))
            progress = sum(each.values(), start=Progress(0, 0))
            self.watch.progress(stage, progress.done, progress.total)
            if progress.finished:
                return
            if self.watch.stop_signal is not None:
                if interruptible:
                    raise Interrupted(self.watch.stop_signal)
                if give_up_at is None:
                    self._all(lambda moderator: moderator.halt(False))
                    give_up_at = time.monotonic() + HALT_PATIENCE_S
                elif time.monotonic() > give_up_at:
                    self._all(lambda moderator: moderator.halt(True))

    def _all(self, call: Callable[[RemoteObject], V]) -> dict[int, V]:
        return all_of({number: partial(call, each) for number, each in self._moderators.items()})

    def _renew_leases(self) -> None:
        """Let the servers hear of this run even while main is busy with something else."""
        while not self._ended.wait(self.config.lease / LEASE_PARTS):
            fan_out({number: partial(each.progress, 0.0) for number, each in self._moderators.items()})


def _sampling(config: SimulationConfig) -> Sampling | None:
    if config.agent_type != "llm":
        return None
    return Sampling(
        config.model_per_host,
        config.structured_output,
        config.samples_per_request,
        config.max_attempts,
        config.max_in_flight,
        config.attempt_timeout,
        config.reply_timeout,
    )


def ask(config: SimulationConfig, run_id: str, key: ClusterKey, participant: int, text: str) -> str:
    """Send one message to one participant of a run that kept its agents, and return its reply.

    Args:
        config: The settings that the run was played with.

    Raises:
        SettingsError: The run has no such participant.
        ClusterError: The participant's server does not answer, or holds it no longer.
        GameEnded: The participant failed to reply.
    """
    use_key(key)
    servers = endpoints(config.hosts, config.base_port, config.server_per_host)
    moderators = len(config.hosts) * config.moderator_per_host
    try:
        group = group_of(place(config.participant_num, len(servers), moderators), participant)
    except IndexError:
        raise SettingsError(
            f"--participant {participant}: the run has participants 0 to {config.participant_num - 1}"
        ) from None
    server = servers[group.server]
    proxy = RemoteObject(Participant, f"{group_id(run_id, group.first)}/{participant}", server, GROUP_DEADLINE_S)
    try:
        reply = reply_of(proxy, Msg("user", text, "user"))
        return (reply.get_text_content() or "") if isinstance(reply, Msg) else str(reply)
    except AgentGone:
        raise AgentGone(
            f"participant {participant} of run {run_id} is no longer on {server}: agents stay only after a run with "
            "--keep-agents, until the next run or the end of the servers"
        ) from None
    except UnusableAnswer as error:
        raise GameEnded(f"participant {participant} did not reply: {error}") from None
