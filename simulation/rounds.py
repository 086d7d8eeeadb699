"""The game over the cluster: connect, place, create, ask, announce. It returns results and prints nothing.

with Simulation(config, run, key, watch) as simulation:
    simulation.create()
    result = simulation.play(1)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from agentscope.message import Msg
from numpy.typing import NDArray

from moderator import Moderator, whole_tally
from participant import Participant
from simulation.config import SimulationConfig
from simulation.custom import load_class, pack_class
from simulation.errors import (
    AgentGone,
    ClusterError,
    GameEnded,
    Interrupted,
    ServerLost,
    SimulationError,
    UnusableAnswer,
)
from simulation.game import (
    INTERRUPTED,
    Announcement,
    Answers,
    Game,
    RoundResult,
    Sampling,
    Tally,
    Winners,
    announcement_of,
    merge,
    question_for,
)
from simulation.group import ParticipantGroup
from simulation.heartbeat import Heartbeats
from simulation.model import Usage
from simulation.model_configs import model_name, refuse_elsewhere
from simulation.placement import Endpoint, endpoints
from simulation.processes import address_of
from simulation.remote import (
    CHECK_MODELS,
    END_RUN,
    GROUP_DEADLINE_S,
    KEEP_RUN,
    NEW_RUN,
    NOBODY_LISTENS,
    OWN_VERSIONS,
    PATIENT_S,
    Handshake,
    RemoteObject,
    all_of,
    fan_out,
    handshake,
    remove,
    reply_of,
    told_error,
    use_key,
)
from simulation.seating import Seat, Seating
from simulation.security import ClusterKey

V = TypeVar("V")

POLL_S = 1.0  # between two looks at a person's Ctrl-C
LOOK_AGAIN_S = 0.1  # between two looks for a server that comes back
GATHER_S = 2.0  # where all were lost, the first one that is back waits so long for others
LOSSES_IN_ROUND = 3  # a server that is lost more often is not used again, as something in the game may be what kills it
FETCHED_AT_ONCE = 250_000  # answers in one message
HALT_PATIENCE_S = 3.0  # a participant that blocks its event loop cannot be stopped
NOTHING_USED = Usage()


class Watch(Protocol):
    """How a caller looks on, and interrupts: a signal number in `stop_signal` asks for an early end."""

    stop_signal: int | None

    def progress(self, stage: str, done: int, total: int) -> None:
        """Called with every heartbeat, and at the end of each stage: "participants created" or "answers in"."""

    def tell(self, line: str) -> None:
        """Called when a server is lost, or answers again."""


class Record(Protocol):
    """Where the answers of finished rounds are kept."""

    def write_answers(self, round_number: int, answers: Iterator[Answers], scale: int) -> None:
        """Keep one round's answers, in place of any that were kept of it before."""

    def values(self, first: int, count: int, rounds: int) -> NDArray[np.float64]:
        """What participants answered in rounds 1 .. rounds: shape (rounds, count), not a number where there is none."""


def shake_hands(
    config: SimulationConfig, key: ClusterKey
) -> tuple[dict[Endpoint, Handshake], dict[Endpoint, SimulationError]]:
    """Ask every agent server that the run uses who it is, all at once, with the connect time-out as one deadline.

    Returns who answers, and errors, by address; a SettingsError where a host's name stands for no address.
    """
    use_key(key)
    deadline = time.monotonic() + config.connect_timeout
    addresses = {host: _look_up(host) for host in config.hosts}

    def left_s() -> float:
        return max(deadline - time.monotonic(), 0.0)

    def shake(server: Endpoint) -> Handshake:
        try:
            addresses[server.host].result(left_s())
        except TimeoutError:
            raise SettingsError(
                f"no address is known for this name after {config.connect_timeout:g} s; check /etc/hosts or DNS"
            ) from None
        return handshake(server, left_s())

    servers = endpoints(config.hosts, config.base_port, config.server_per_host + config.moderator_per_host)
    return fan_out({each: partial(shake, each) for each in servers}, CHECKS_AT_ONCE)


def _look_up(host: str) -> Future[str]:
    """Look up a host's address in a thread that nobody has to wait for: a name server may take its time."""
    found: Future[str] = Future()

    def look_up() -> None:
        try:
            found.set_result(address_of(host))
        except SettingsError as error:
            found.set_exception(error)

    threading.Thread(target=look_up, daemon=True).start()
    return found


def check_cluster(config: SimulationConfig, key: ClusterKey) -> dict[Endpoint, Handshake]:
    """Shake hands with every agent server that the run uses.

    Raises ClusterError with a line for each host that is not ready: how many of its servers are, and the first trouble.
    """
    shakes, errors = shake_hands(config, key)
    troubles = {host: _trouble_at(host, config, shakes, errors) for host in config.hosts}
    lines = [f"{host}: {trouble}" for host, trouble in troubles.items() if trouble is not None]
    if lines:
        raise ClusterError("\nerror: ".join(lines))
    if config.agent_type == "llm":
        _check_models_known(config, shakes)
        check_models(config, endpoints(config.hosts, config.base_port, config.server_per_host))
    return shakes


def _trouble_at(
    host: str,
    config: SimulationConfig,
    shakes: dict[Endpoint, Handshake],
    errors: dict[Endpoint, SimulationError],
) -> str | None:
    """What keeps a host from playing, and what to do about it; None if it is ready."""
    ready = {endpoint: shake for endpoint, shake in shakes.items() if endpoint.host == host}
    failed = [error for endpoint, error in errors.items() if endpoint.host == host]
    restart = f"restart them: ./stop_all_server.sh, then ./start_all_server.sh {config.server_per_host}"
    layout = (config.base_port, config.server_per_host, config.moderator_per_host)
    for endpoint, shake in ready.items():
        versions = zip(("the program", "Python", "AgentScope"), shake.versions, OWN_VERSIONS, strict=True)
        others = [f"{name} ({there} there, {here} here)" for name, there, here in versions if there != here]
        if others:
            return f"{endpoint} runs another version of {', '.join(others)}; make the host like this one, and {restart}"
        if (shake.base_port, shake.server_per_host, shake.moderator_per_host) != layout:
            return (
                f"it has {shake.server_per_host} participant and {shake.moderator_per_host} moderator servers from "
                f"port {shake.base_port}; this run asks for {layout[1]} and {layout[2]} from {layout[0]}; {restart}"
            )
    if not failed:
        return None
    if isinstance(failed[0], SettingsError):
        return str(failed[0])
    first, advice = str(failed[0]), restart
    if STRANGER in first:
        advice = f"copy the folder of the cluster key there, and {restart}"
    elif not ready and NOBODY_LISTENS not in first:
        advice = f"see whether the host is up and in reach, or {restart}"
    return f"{len(ready)} of {len(ready) + len(failed)} agent servers are ready; {first}; {advice}"


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


def check_models(config: SimulationConfig, servers: list[Endpoint]) -> None:
    """Let one of these servers on every host ask the host's models whether they answer; raises ClusterError."""
    firsts = {each.host: each for each in reversed(servers)}.values()
    timeout_s = 2 * config.connect_timeout
    told = {CHECK_MODELS: f"{config.model_per_host} {timeout_s / 2}"}
    ask = partial(handshake, timeout_s=timeout_s, told=told)
    for endpoint, shake in all_of({each: partial(ask, each) for each in firsts}).items():
        for name, trouble in shake.model_troubles.items():
            raise ClusterError(
                f"{endpoint.host}: {name} at {shake.models[name]} {trouble}; start it there with ./start_vllm.sh, or "
                "correct configs/model_configs.json"
            )


class Simulation:
    """A run on servers that are ready; as a context it leaves none of its agents behind, kept ones excepted.

    Servers may die meanwhile: whoever sat there is made anew on others and asked again before the round ends.

    Args:
        config: The settings; its seed is set.
        run: What all remote ids of this run begin with (see `remote_run`).
        key: The cluster key.
        watch: Who looks on.
        record: Where answers are kept; without one, participants who are made anew remember nothing.
        played: What was announced in rounds that were played before.
        usage: What those have cost.
    """

    def __init__(
        self,
        config: SimulationConfig,
        run: str,
        key: ClusterKey,
        watch: Watch,
        record: Record | None = None,
        played: tuple[Announcement, ...] = (),
        usage: Usage = NOTHING_USED,
    ) -> None:
        assert config.seed is not None  # main draws one where none is given
        use_key(key)
        self.config = config
        self.run = run
        self.watch = watch
        self.record = record
        self.game = Game(config.seed, config.max_value, config.decimals, config.sleep_time, _sampling(config))
        self.participant_class = load_class(config.agent_class, config.agent_type)
        self.lost: list[Endpoint] = []  # given up on at some time, in that order
        self._announcements = played
        self._used_before = usage
        self._used: dict[str, Usage] = {}  # by group, those that are gone included
        self._servers = endpoints(config.hosts, config.base_port, config.server_per_host)
        self._chairs = endpoints(config.hosts, config.base_port + config.server_per_host, config.moderator_per_host)
        self._seating = Seating(run, config.participant_num, self._servers, self._chairs)
        self._made: dict[str, float] = {}  # the groups and moderators there are, and since when
        self._ready: set[str] = set()  # groups whose participants are built, and remember
        self._moderators: dict[Endpoint, RemoteObject] = {}
        self._asks: dict[Endpoint, list[Seat]] = {}  # whom each moderator was told to ask
        self._noted: Counter[Endpoint] = Counter()  # losses that were seen to
        self._losses: Counter[Endpoint] = Counter()  # those of this round

    @property
    def moderator_num(self) -> int:
        """Moderators that have someone to ask."""
        return len({seat.chair for seat in self._seating.seats})

    @property
    def usage(self) -> Usage:
        """What all rounds so far have cost."""
        now, before = sum(self._used.values(), start=NOTHING_USED), self._used_before
        answering_s, client_s = now.answering_s + before.answering_s, now.client_s + before.client_s
        return replace(now + before, answering_s=answering_s, client_s=client_s)

    @property
    def seats(self) -> list[Seat]:
        """The groups that there are, in the order of their participants."""
        return [seat for seat in self._seating.seats if seat.server is not None]

    @property
    def living(self) -> list[Endpoint]:
        """The participant servers that play."""
        return [each for each in self._servers if self._heartbeats.alive(each)]

    def __enter__(self) -> Simulation:
        greet = partial(handshake, timeout_s=self.config.connect_timeout, told={NEW_RUN: self.run})
        shakes = all_of({each: partial(greet, each) for each in self._all_servers()})
        incarnations = {endpoint: shake.incarnation for endpoint, shake in shakes.items()}
        self._heartbeats = Heartbeats(self.run, incarnations, self.config.heartbeat_timeout, self.config.lease)
        self._heartbeats.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._heartbeats.__exit__()
        farewell = {KEEP_RUN if self.config.keep_agents and kind is None else END_RUN: self.run}
        part = partial(handshake, timeout_s=self.config.connect_timeout, told=farewell)
        # a server that does not hear it drops the agents when their lease is over
        fan_out({each: partial(part, each) for each in self._all_servers() if self._heartbeats.answers(each)})

    def create(self) -> float:
        """Create moderators, groups and participants; returns the seconds it took. Raises GameEnded, Interrupted."""
        started = time.monotonic()
        self._despite_losses(self._seat_everyone)
        return time.monotonic() - started

    def play(self, number: int) -> RoundResult:
        """Play one round to its end, or to an interruption, whose missing answers count as failed; and record it.

        Raises GameEnded if too few servers are left, and whatever the record raises.
        """
        started = time.monotonic()
        self._losses.clear()
        self._welcome_back(number)
        seats_before = set(self._seating.seats)
        question = question_for(self.game, number, self._announcements)

        def play() -> tuple[RoundResult, Announcement]:
            self._seat_everyone()
            self._all(lambda moderator: moderator.begin(question, self._tokens_each()))
            self._wait("answers in", number, self.seats)
            result, announcement = self._result(number, started, seats_before)
            if self.record is not None:
                self.record.write_answers(number, self.answers(), self.game.scale)
            return result, announcement

        result, announcement = self._despite_losses(play)
        self._announcements += (announcement,)
        return result

    def answers(self) -> Iterator[Answers]:
        """The answers of the round just played, in the order of the participants, a bounded number at a time."""
        for seat in self._seating.seats:
            for first in range(seat.first, seat.first + seat.count, FETCHED_AT_ONCE):
                count = min(FETCHED_AT_ONCE, seat.first + seat.count - first)
                if seat.server is None:
                    yield Answers(first, np.full(count, -1), dict.fromkeys(range(first, first + count), INTERRUPTED))
                else:
                    yield self._moderators[seat.chair].answers(first, count)

    # --- Servers that come and go ------------------------------------------------------------------------------------

    def _all_servers(self) -> list[Endpoint]:
        return self._servers + self._chairs

    def _despite_losses(self, work: Callable[[], V]) -> V:
        """Do the work; where a server is lost over it, do again with the others what is not done yet."""
        while True:
            try:
                return work()
            except ServerLost as error:
                endpoint = next((each for each in self._all_servers() if str(each) == error.address), None)
                if endpoint is None:
                    raise SimulationError(f"an unknown server was lost: {error}") from error
                self._heartbeats.give_up(endpoint, str(error).partition(": ")[2])
                self._note_losses()

    def _note_losses(self) -> None:
        """See to the consequences of all losses since the last time: what was on those servers is gone."""
        for endpoint in self._all_servers():
            losses, why = self._heartbeats.losses(endpoint)
            if losses == self._noted[endpoint]:
                continue
            self._losses[endpoint] += losses - self._noted[endpoint]
            self._noted[endpoint] = losses
            if endpoint not in self.lost:
                self.lost.append(endpoint)
            self.watch.tell(f"{endpoint} is lost: {why}; going on without it")
            self._seating.evict(endpoint)
            self._moderators.pop(endpoint, None)
            self._asks.pop(endpoint, None)

    def _take_back(self, endpoint: Endpoint) -> None:
        self._note_losses()
        self._heartbeats.take_back(endpoint)

    def _welcome_back(self, number: int) -> None:
        """Let servers play again that were lost and answer again, and drop what they, or others, hold in vain."""
        for endpoint in self._all_servers():
            if self._heartbeats.is_back(endpoint):
                self._take_back(endpoint)
                self.watch.tell(f"{endpoint} answers again, and plays from round {number} on")
        alive = {each for each in self._all_servers() if self._heartbeats.alive(each)}
        self._seating.bring_home(alive, alive)
        wanted = {seat.oid for seat in self._seating.seats} | {each._oid for each in self._moderators.values()}
        strays = {
            oid: RemoteObject(ParticipantGroup, oid, endpoint, self.config.connect_timeout)
            for endpoint in alive
            for oid in self._heartbeats.last(endpoint).objects.keys() - wanted
        }
        fan_out({oid: partial(remove, stray) for oid, stray in strays.items()})

    def _players(self, pool: list[Endpoint], role: str) -> list[Endpoint]:
        """Those of the pool who live; if none does, those that come back. Raises GameEnded if none comes in time."""
        gathered_from: float | None = None
        while True:
            alive = [each for each in pool if self._heartbeats.alive(each)]
            if alive:
                return alive
            if self.watch.stop_signal is not None:
                raise Interrupted(self.watch.stop_signal)
            hopeful = [each for each in pool if self._losses[each] < LOSSES_IN_ROUND]
            if not hopeful:
                raise GameEnded(f"every {role} server was lost {LOSSES_IN_ROUND} times in this round")
            silent_s = min(self._heartbeats.silent_s(each) for each in hopeful)
            if silent_s > self.config.heartbeat_timeout:
                raise GameEnded(f"no {role} server has answered for {silent_s:.0f} s: {self._why_lost(hopeful[0])}")
            back = [each for each in hopeful if self._heartbeats.is_back(each)]
            if back and gathered_from is None:
                gathered_from = time.monotonic()
            if gathered_from is not None and (back == hopeful or time.monotonic() > gathered_from + GATHER_S):
                for endpoint in back:
                    self._take_back(endpoint)
            self._heartbeats.wait(LOOK_AGAIN_S)

    def _why_lost(self, endpoint: Endpoint) -> str:
        return f"{endpoint} {self._heartbeats.losses(endpoint)[1]}; --resume plays on when servers are up again"

    def _seat_everyone(self) -> None:
        """Bring the cluster to where everyone sits on a living server and is asked by a living moderator.

        Makes only what is missing, so it may be repeated. Raises ServerLost, GameEnded, Interrupted.
        """
        self._note_losses()
        servers = self._players(self._servers, "participant")
        minimum = self.config.min_servers
        if minimum is not None and len(servers) < minimum:
            raise GameEnded(
                f"{len(servers)} of {len(self._servers)} participant servers are left; --min-servers asks for {minimum}"
            )
        chairs = self._players(self._chairs, "moderator")
        stopping = self.watch.stop_signal is not None and bool(self._ready)
        self._seating.reseat(servers, chairs, onto=[] if stopping else servers)
        self._make_groups([seat for seat in self.seats if seat.oid not in self._ready])
        self._seat_moderators()

    def _make_groups(self, seats: list[Seat]) -> None:
        """Create groups, wait until their participants are built, and tell these what they have answered so far."""
        packed = pack_class(self.participant_class)

        def make(seat: Seat) -> RemoteObject:
            kwargs = {
                "oid": seat.oid,
                "first": seat.first,
                "count": seat.count,
                "game": self.game,
                "participant_class": packed,
                "reply_threads": self.config.reply_threads,
                "lease_s": self.config.lease,
            }
            return self._group(seat, kwargs)

        made, errors = fan_out({seat.oid: partial(make, seat) for seat in seats if seat.oid not in self._made})
        self._made |= dict.fromkeys(made, time.monotonic())
        for error in errors.values():
            raise error
        if seats:
            self._wait("participants created", 0, seats)
        remembers = self.participant_class.recall is not Participant.recall
        if self._announcements and remembers and self.record is not None:
            all_of({seat.oid: partial(self._remind, seat, self.record) for seat in seats})
        self._ready |= {seat.oid for seat in seats}

    def _group(self, seat: Seat, kwargs: dict[str, Any] | None = None) -> RemoteObject:
        assert seat.server is not None
        return RemoteObject(ParticipantGroup, seat.oid, seat.server, PATIENT_S, kwargs)

    def _remind(self, seat: Seat, record: Record) -> None:
        group = self._group(seat)
        rounds = len(self._announcements)
        at_once = max(FETCHED_AT_ONCE // rounds, 1)
        for first in range(seat.first, seat.first + seat.count, at_once):
            count = min(at_once, seat.first + seat.count - first)
            group.remember(first, record.values(first, count, rounds))

    def _seat_moderators(self) -> None:
        """Create the moderators that are missing, and tell each whom to ask."""
        asks: dict[Endpoint, list[Seat]] = {}
        for seat in self.seats:
            asks.setdefault(seat.chair, []).append(seat)

        def make(chair: Endpoint) -> RemoteObject:
            number = self._chairs.index(chair)
            oid = f"{self.run}/moderator-{number}.{self._noted[chair]}"
            kwargs = {
                "name": f"Moderator {number}",
                "timeout_s": self.config.heartbeat_timeout,
                "lease_s": self.config.lease,
            }
            return RemoteObject(Moderator, oid, chair, PATIENT_S, kwargs)

        made, errors = fan_out({chair: partial(make, chair) for chair in asks if chair not in self._moderators})
        self._moderators |= made
        self._made |= {moderator._oid: time.monotonic() for moderator in made.values()}
        for error in errors.values():
            raise error
        one_by_one = self.config.dispatch == "agent"
        changed = {chair: asks.get(chair, []) for chair in self._moderators if asks.get(chair) != self._asks.get(chair)}
        all_of({chair: partial(self._moderators[chair].seat, seats, one_by_one) for chair, seats in changed.items()})
        self._asks = asks

    # --- A round -----------------------------------------------------------------------------------------------------

    def _result(self, number: int, started: float, seats_before: set[Seat]) -> tuple[RoundResult, Announcement]:
        """Collect what was answered, announce the average, and hear who won."""
        missing = self.config.participant_num - sum(seat.count for seat in self.seats)
        tally = merge(self._all(whole_tally).values()) + Tally(
            missing, failures={INTERRUPTED: missing} if missing else {}
        )
        if tally.asked != self.config.participant_num:
            raise SimulationError(f"{tally.asked} of {self.config.participant_num} participants were counted")
        average = tally.average()
        closest = tally.closest(average) if average is not None else ()
        announcement = announcement_of(number, average, closest, self.game.scale)
        winners = sum(self._all(lambda moderator: moderator.announce(announcement)).values(), start=Winners(0, ()))
        seconds = time.monotonic() - started
        reassigned = sum(seat.count for seat in self._seating.seats if seat not in seats_before)
        return RoundResult(number, tally, average, average, closest, winners, seconds, reassigned), announcement

    def _tokens_each(self) -> float | None:
        """What each participant may cost in the next round; None is no limit."""
        if self.config.max_tokens is None:
            return None
        return max(self.config.max_tokens - self.usage.tokens, 0) / self.config.participant_num

    def _wait(self, stage: str, number: int, seats: list[Seat]) -> None:
        """Wait until what these groups do in this round is done; an interruption ends a round early, creation at once.

        Heartbeats tell how far they are: however long it takes, slow is not dead. Raises ServerLost, Interrupted.
        """
        awaited = self._awaited(number, seats)
        total = sum(seat.count for seat in seats)
        give_up_at: float | None = None
        self._heartbeats.hurry()
        while True:
            done = self._done(awaited, number)
            self.watch.progress(stage, done, total)
            if done == total:
                return
            if self.watch.stop_signal is not None:
                if number == 0:
                    raise Interrupted(self.watch.stop_signal)
                if give_up_at is None:
                    self._all(lambda moderator: moderator.halt(False))
                    give_up_at = time.monotonic() + HALT_PATIENCE_S
                elif time.monotonic() > give_up_at:
                    self._all(lambda moderator: moderator.halt(True))
            self._heartbeats.wait(POLL_S)

    def _awaited(self, number: int, seats: list[Seat]) -> dict[Endpoint, dict[str, bool]]:
        """The objects that must be there, by server, and whether it is they who count the participants."""
        one_by_one = number > 0 and self.config.dispatch == "agent"
        awaited: dict[Endpoint, dict[str, bool]] = {}
        for seat in seats:
            assert seat.server is not None
            awaited.setdefault(seat.server, {})[seat.oid] = not one_by_one
        if number > 0:
            for chair in self._asks:
                awaited.setdefault(chair, {})[self._moderators[chair]._oid] = one_by_one
        return awaited

    def _done(self, awaited: dict[Endpoint, dict[str, bool]], number: int) -> int:
        """How many participants have answered, or are built in round 0, as far as was heard; notes what they cost."""
        done = 0
        for endpoint, objects in awaited.items():
            beat, sent = self._heartbeats.look(endpoint)
            for oid, counts in objects.items():
                progress = beat.objects.get(oid)
                if progress is None:
                    if sent > self._made[oid]:
                        raise AgentGone(f"{endpoint}: the agent is gone")
                    continue
                if progress.error:
                    raise told_error(progress.error) or SimulationError(progress.error)
                if progress.usage:
                    self._used[oid] = Usage(*progress.usage)  # type: ignore[arg-type]
                done += progress.done if counts and progress.round == number else 0
        return done

    def _all(self, call: Callable[[RemoteObject], V]) -> dict[Endpoint, V]:
        return all_of({chair: partial(call, self._moderators[chair]) for chair in self._asks})


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


def ask(server: Endpoint, oid: str, key: ClusterKey, text: str) -> str:
    """Send one message to one participant of a run that kept its agents, and return its reply.

    Args:
        server: Where the participant is.
        oid: Its remote id, `<group id>/<index>`.
        key: The cluster key.
        text: The message.

    Raises:
        ClusterError: The participant's server does not answer, or holds it no longer.
        GameEnded: The participant failed to reply.
    """
    use_key(key)
    try:
        reply = reply_of(RemoteObject(Participant, oid, server, GROUP_DEADLINE_S), Msg("user", text, "user"))
        return (reply.get_text_content() or "") if isinstance(reply, Msg) else str(reply)
    except AgentGone:
        raise AgentGone(
            f"{oid} is no longer on {server}: agents stay only after a run with --keep-agents, until the next run or "
            "the end of the servers"
        ) from None
    except UnusableAnswer as error:
        raise GameEnded(f"participant {oid.rpartition('/')[2]} did not reply: {error}") from None
