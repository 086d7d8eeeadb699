"""Everyone seated on servers that come and go: groups and moderators made where they are missing, and called.

Work on a cluster is done again with what is left until nobody is lost over it, so each step does only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from moderator import Moderator
from simulation.agents.agent_class import pack_class
from simulation.agents.group import ParticipantGroup
from simulation.agents.participant import Participant
from simulation.cluster.failure_detector import Standing
from simulation.cluster.membership import Attendance, Awaited, Watch
from simulation.cluster.placement import Seating
from simulation.errors import GameEnded
from simulation.game.answer_sheet import Answers
from simulation.game.rules import Game
from simulation.llm.usage import Usage
from simulation.rpc.channels import all_of, fan_out
from simulation.rpc.client import PATIENT_S, RemoteObject, remove
from simulation.rpc.endpoints import Endpoint, Seat, endpoints
from simulation.settings import SimulationConfig

V = TypeVar("V")

REMINDED_AT_ONCE = 250_000  # answers in one message


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
        self._game = game
        self._class = participant_class
        self._record = record
        self._servers = endpoints(config.hosts, config.base_port, config.server_per_host)
        self._chairs = endpoints(config.hosts, config.base_port + config.server_per_host, config.moderator_per_host)
        self._attendance = Attendance(config, run, self._servers + self._chairs, watch, self._evict)
        self._seating = Seating(run, config.participant_num, self._servers, self._chairs)
        self._made: set[str] = set()  # the groups there are
        self._ready: set[str] = set()  # groups whose participants are built, and remember
        self._moderators: dict[Endpoint, RemoteObject] = {}
        self._asks: dict[Endpoint, list[Seat]] = {}  # whom each moderator was told to ask

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
        return self._attendance.living(self._servers)

    @property
    def lost(self) -> list[Endpoint]:
        """The servers that were given up on at some time, in that order."""
        return self._attendance.lost

    @property
    def used(self) -> dict[str, Usage]:
        """What each group has cost, those that are gone included."""
        return self._attendance.used

    def standings(self) -> dict[Endpoint, tuple[Standing, bool]]:
        """How all servers stand, for those who look on, and which are of participants, not of moderators."""
        pools = ((self._servers, True), (self._chairs, False))
        return {each: (self._attendance.standing(each), answers) for pool, answers in pools for each in pool}

    def __enter__(self) -> Cluster:
        self._attendance.greet()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        keep = self.config.keep_agents and kind is None
        if keep:
            self._drop_strays()
        self._attendance.part(keep)

    def all(self, call: Callable[[RemoteObject], V]) -> dict[Endpoint, V]:
        """Call all moderators who have someone to ask; returns results by server. Raises ServerLost."""
        return all_of({chair: partial(call, self._moderators[chair]) for chair in self._asks})

    def moderator_of(self, seat: Seat) -> RemoteObject:
        """Who asks a group."""
        return self._moderators[seat.chair]

    # --- Servers that come and go ------------------------------------------------------------------------------------

    def despite_losses(self, work: Callable[[], V]) -> V:
        """Do the work; where a server is lost over it, do again with the others what is not done yet."""
        return self._attendance.despite_losses(work)

    def _evict(self, endpoint: Endpoint) -> None:
        self._seating.evict(endpoint)
        self._moderators.pop(endpoint, None)
        self._asks.pop(endpoint, None)

    def begin_round(self, number: int) -> None:
        """Let servers play again that were lost and answer again, and drop what they, or others, hold in vain."""
        self._attendance.begin_round(number)
        self._seating.bring_home(set(self.living), set(self._attendance.living(self._chairs)))
        self._drop_strays()

    def _drop_strays(self) -> None:
        """Have servers drop what was made anew elsewhere while they were lost, or has come home."""
        wanted = {seat.oid for seat in self._seating.seats} | {each._oid for each in self._moderators.values()}
        strays = {
            oid: RemoteObject(ParticipantGroup, oid, endpoint, self.config.connect_timeout)
            for oid, endpoint in self._attendance.hosted().items()
            if oid not in wanted
        }
        fan_out({oid: partial(remove, stray) for oid, stray in strays.items()})

    def seat_everyone(self, rounds: int) -> None:
        """Bring the cluster to where everyone sits on a living server and is asked by a living moderator.

        Makes only what is missing. Whoever is made remembers so many rounds. Raises ServerLost, GameEnded, Interrupted.
        """
        self._attendance.note_losses()
        servers = self._attendance.players(self._servers, "participant")
        minimum = self.config.min_servers
        if minimum is not None and len(servers) < minimum:
            raise GameEnded(
                f"{len(servers)} of {len(self._servers)} participant servers are left; --min-servers asks for {minimum}"
            )
        chairs = self._attendance.players(self._chairs, "moderator")
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
            oid = f"{self.run}/moderator-{number}.{self._attendance.noted[chair]}"
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

        Raises ServerLost, Interrupted.
        """

        def halt(at_once: bool) -> None:
            self.all(lambda moderator: moderator.halt(at_once))

        total = sum(seat.count for seat in seats)
        self._attendance.wait(stage, number, self._awaited(number, seats), total, halt)

    def _awaited(self, number: int, seats: list[Seat]) -> Awaited:
        """The objects that must be there, by server, and whether it is they who count the participants."""
        one_by_one = number > 0 and self.config.dispatch == "agent"
        awaited: Awaited = {}
        for seat in seats:
            assert seat.server is not None
            awaited.setdefault(seat.server, {})[seat.oid] = not one_by_one
        if number > 0:
            for chair in self._asks:
                awaited.setdefault(chair, {})[self._moderators[chair]._oid] = one_by_one
        return awaited
