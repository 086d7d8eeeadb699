"""The servers of one run as they come and go: everyone seated, every group asked, whoever is lost replaced.

Work on a cluster is done again with what is left until nobody is lost over it, so each step does only what is missing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from moderator import Moderator
from participant import Participant
from simulation.config import SimulationConfig
from simulation.custom import pack_class
from simulation.errors import AgentGone, GameEnded, Interrupted, ServerLost, SimulationError
from simulation.game import Game
from simulation.group import ParticipantGroup
from simulation.heartbeat import Heartbeats
from simulation.model import Usage
from simulation.placement import Endpoint, endpoints
from simulation.remote import (
    END_RUN,
    KEEP_RUN,
    NEW_RUN,
    PATIENT_S,
    RemoteObject,
    all_of,
    fan_out,
    handshake,
    remove,
    told_error,
)
from simulation.seating import Seat, Seating
from simulation.sheet import Answers

V = TypeVar("V")

POLL_S = 1.0  # between two looks at a person's Ctrl-C
LOOK_S = 5e-5  # between two looks at the heartbeats, for each server
LOOK_AGAIN_S = 0.1  # between two looks for a server that comes back
GATHER_S = 2.0  # where all were lost, the first one that is back waits so long for others
LOSSES_IN_ROUND = 3  # a server that is lost more often is not used again, as something in the game may be what kills it
REMINDED_AT_ONCE = 250_000  # answers in one message
HALT_PATIENCE_S = 3.0  # a participant that blocks its event loop cannot be stopped


class Watch(Protocol):
    """How a caller looks on, and interrupts: a signal number in `stop_signal` asks for an early end."""

    stop_signal: int | None

    def progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Called with every heartbeat, and at the end of each stage: "participants created" or "answers in"."""

    def tell(self, line: str) -> None:
        """Called when a server is lost, or answers again."""


class Record(Protocol):
    """Where the answers of finished rounds are kept."""

    def write_answers(self, round_number: int, answers: Iterator[Answers], scale: int) -> None:
        """Keep one round's answers, in place of any that were kept of it before."""

    def values(self, first: int, count: int, rounds: int) -> NDArray[np.float64]:
        """What participants answered in rounds 1 .. rounds: shape (rounds, count), not a number where there is none."""


class Cluster:
    """The servers of one run, and who sits there; as a context it leaves no agents behind, kept ones excepted.

    Args:
        config: The settings.
        run: What all remote ids of this run begin with.
        game: What is the same for all participants.
        participant_class: Their class.
        watch: Who looks on.
        record: Where answers are kept; without one, participants who are made anew remember nothing.
    """

    def __init__(
        self,
        config: SimulationConfig,
        run: str,
        game: Game,
        participant_class: type[Participant],
        watch: Watch,
        record: Record | None,
    ) -> None:
        self.config = config
        self.run = run
        self.watch = watch
        self.lost: list[Endpoint] = []  # given up on at some time, in that order
        self.used: dict[str, Usage] = {}  # by group, those that are gone included
        self._game = game
        self._class = participant_class
        self._record = record
        self._servers = endpoints(config.hosts, config.base_port, config.server_per_host)
        self._chairs = endpoints(config.hosts, config.base_port + config.server_per_host, config.moderator_per_host)
        self._all_servers = self._servers + self._chairs
        self._seating = Seating(run, config.participant_num, self._servers, self._chairs)
        self._made: set[str] = set()  # the groups there are
        self._ready: set[str] = set()  # groups whose participants are built, and remember
        self._moderators: dict[Endpoint, RemoteObject] = {}
        self._asks: dict[Endpoint, list[Seat]] = {}  # whom each moderator was told to ask
        self._noted: Counter[Endpoint] = Counter()  # losses that were seen to
        self._losses: Counter[Endpoint] = Counter()  # those of this round

    @property
    def seats(self) -> list[Seat]:
        """All groups, in the order of their participants; without a server those whom nobody asks any more."""
        return self._seating.seats

    @property
    def seated(self) -> list[Seat]:
        """The groups that there are."""
        return [seat for seat in self._seating.seats if seat.server is not None]

    @property
    def living(self) -> list[Endpoint]:
        """The participant servers that play."""
        return [each for each in self._servers if self._heartbeats.alive(each)]

    def __enter__(self) -> Cluster:
        greet = partial(handshake, timeout_s=self.config.connect_timeout, told={NEW_RUN: self.run})
        shakes = all_of({each: partial(greet, each) for each in self._all_servers})
        incarnations = {endpoint: shake.incarnation for endpoint, shake in shakes.items()}
        self._heartbeats = Heartbeats(self.run, incarnations, self.config.heartbeat_timeout, self.config.lease)
        self._heartbeats.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        keep = self.config.keep_agents and kind is None
        if keep:
            self._drop_strays()
        self._heartbeats.__exit__()
        farewell = {KEEP_RUN if keep else END_RUN: self.run}
        part = partial(handshake, timeout_s=self.config.connect_timeout, told=farewell)
        # a server that does not hear it drops the agents when their lease is over
        fan_out({each: partial(part, each) for each in self._all_servers if self._heartbeats.answers(each)})

    def all(self, call: Callable[[RemoteObject], V]) -> dict[Endpoint, V]:
        """Call all moderators who have someone to ask; returns results by server. Raises ServerLost."""
        return all_of({chair: partial(call, self._moderators[chair]) for chair in self._asks})

    def moderator_of(self, seat: Seat) -> RemoteObject:
        """Who asks a group."""
        return self._moderators[seat.chair]

    # --- Servers that come and go ------------------------------------------------------------------------------------

    def despite_losses(self, work: Callable[[], V]) -> V:
        """Do the work; where a server is lost over it, do again with the others what is not done yet."""
        while True:
            try:
                return work()
            except ServerLost as error:
                endpoint = next((each for each in self._all_servers if str(each) == error.address), None)
                if endpoint is None:
                    raise SimulationError(f"an unknown server was lost: {error}") from error
                self._heartbeats.give_up(endpoint, str(error).partition(": ")[2])
                self._note_losses()

    def _note_losses(self) -> None:
        """See to the consequences of all losses since the last time: what was on those servers is gone."""
        for endpoint in self._all_servers:
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

    def begin_round(self, number: int) -> None:
        """Let servers play again that were lost and answer again, and drop what they, or others, hold in vain."""
        self._losses.clear()
        for endpoint in self._all_servers:
            if self._heartbeats.is_back(endpoint):
                self._take_back(endpoint)
                self.watch.tell(f"{endpoint} answers again, and plays from round {number} on")
        alive = {each for each in self._all_servers if self._heartbeats.alive(each)}
        self._seating.bring_home(alive, alive)
        self._drop_strays()

    def _drop_strays(self) -> None:
        """Have servers drop what was made anew elsewhere while they were lost, or has come home."""
        alive = {each for each in self._all_servers if self._heartbeats.alive(each)}
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

    def seat_everyone(self, rounds: int) -> None:
        """Bring the cluster to where everyone sits on a living server and is asked by a living moderator.

        Makes only what is missing. Whoever is made remembers so many rounds. Raises ServerLost, GameEnded, Interrupted.
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
        self._make_groups([seat for seat in self.seated if seat.oid not in self._ready], rounds)
        self._seat_moderators()

    def _make_groups(self, seats: list[Seat], rounds: int) -> None:
        """Create groups, wait until their participants are built, and tell these what they have answered so far."""
        packed = pack_class(self._class)

        def make(seat: Seat) -> RemoteObject:
            kwargs = {
                "oid": seat.oid,
                "first": seat.first,
                "count": seat.count,
                "game": self._game,
                "participant_class": packed,
                "reply_threads": self.config.reply_threads,
                "lease_s": self.config.lease,
            }
            return self._group(seat, kwargs)

        made, errors = fan_out({seat.oid: partial(make, seat) for seat in seats if seat.oid not in self._made})
        self._made |= made.keys()
        for error in errors.values():
            raise error
        if seats:
            self.wait("participants created", 0, seats)
        remember = self._class.recall is not Participant.recall
        if rounds > 0 and remember and self._record is not None:
            all_of({seat.oid: partial(self._remind, seat, self._record, rounds) for seat in seats})
        self._ready |= {seat.oid for seat in seats}

    def _group(self, seat: Seat, kwargs: dict[str, Any] | None = None) -> RemoteObject:
        assert seat.server is not None
        return RemoteObject(ParticipantGroup, seat.oid, seat.server, PATIENT_S, kwargs)

    def _remind(self, seat: Seat, record: Record, rounds: int) -> None:
        group = self._group(seat)
        at_once = max(REMINDED_AT_ONCE // rounds, 1)
        for first in range(seat.first, seat.first + seat.count, at_once):
            count = min(at_once, seat.first + seat.count - first)
            group.remember(first, record.values(first, count, rounds))

    def _seat_moderators(self) -> None:
        """Create the moderators that are missing, and tell each whom to ask."""
        asks: dict[Endpoint, list[Seat]] = {}
        for seat in self.seated:
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
        for error in errors.values():
            raise error
        one_by_one = self.config.dispatch == "agent"
        changed = {chair: asks.get(chair, []) for chair in self._moderators if asks.get(chair) != self._asks.get(chair)}
        told, errors = fan_out(
            {chair: partial(self._moderators[chair].seat, seats, one_by_one) for chair, seats in changed.items()}
        )
        for chair in told:
            self._asks[chair] = changed[chair]
        for error in errors.values():
            raise error
        self._asks = asks

    # --- What they are at --------------------------------------------------------------------------------------------

    def wait(self, stage: str, number: int, seats: list[Seat]) -> None:
        """Wait until what these groups do in this round is done; an interruption ends a round early, creation at once.

        Heartbeats tell how far they are: however long it takes, slow is not dead. Raises ServerLost, Interrupted.
        """
        awaited = self._awaited(number, seats)
        total = sum(seat.count for seat in seats)
        give_up_at: float | None = None
        since = time.monotonic()
        self._heartbeats.hurry(number)
        while True:
            done = self._done(awaited, number, since)
            answering = sum(self._heartbeats.answers(each) for each in self._all_servers)
            self.watch.progress(stage, done, total, f"{answering} of {len(self._all_servers)} servers answer")
            if done == total:
                return
            if self.watch.stop_signal is not None:
                if number == 0:
                    raise Interrupted(self.watch.stop_signal)
                if give_up_at is None:
                    self.all(lambda moderator: moderator.halt(False))
                    give_up_at = time.monotonic() + HALT_PATIENCE_S
                elif time.monotonic() > give_up_at:
                    self.all(lambda moderator: moderator.halt(True))
            self._heartbeats.wait(POLL_S)
            time.sleep(len(awaited) * LOOK_S)  # many servers are looked at less often

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

    def _done(self, awaited: dict[Endpoint, dict[str, bool]], number: int, since: float) -> int:
        """How many participants have answered, or are built in round 0, as was heard since; notes what they cost."""
        done = 0
        gone: AgentGone | None = None
        for endpoint, objects in awaited.items():
            beat, sent = self._heartbeats.look(endpoint)
            if sent < since:  # it may tell of groups that have been replaced
                continue
            for oid, counts in objects.items():
                progress = beat.objects.get(oid)
                if progress is None:  # as after a pause of this process that was longer than the lease: then all are
                    gone = AgentGone(f"{endpoint}: the agent is gone")
                    self._heartbeats.give_up(endpoint, "the agent is gone")
                    continue
                if progress.error:
                    raise told_error(progress.error) or SimulationError(progress.error)
                if progress.usage:
                    self.used[oid] = Usage(*progress.usage)  # type: ignore[arg-type]
                done += progress.done if counts and progress.round == number else 0
        if gone is not None:
            raise gone
        return done
