"""The groups and moderators of a run: created where missing, called, and recreated when their servers fail.

Work is retried on the remaining servers until it completes without a server loss, so every step is idempotent: it does
only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from moderator import Moderator
from simulation.agents.agent_class import serialize_agent_class
from simulation.agents.group import ParticipantGroup
from simulation.agents.participant import Participant
from simulation.cluster.failure_detector import ServerStatus
from simulation.cluster.membership import Awaited, Membership, ProgressListener
from simulation.cluster.placement import PlacementPlan
from simulation.errors import RunAborted
from simulation.game.answer_sheet import Answers
from simulation.game.rules import Game
from simulation.llm.usage import Usage
from simulation.rpc.channels import call_all, call_all_or_raise
from simulation.rpc.client import LONG_CALL_TIMEOUT_S, RemoteObject, remove
from simulation.rpc.endpoints import Endpoint, GroupAssignment, endpoints
from simulation.settings import SimulationConfig

V = TypeVar("V")

REMINDED_AT_ONCE = 250_000  # answers per message


class Record(Protocol):
    """Storage for the answers of finished rounds."""

    def write_answers(self, round_number: int, answers: Iterator[Answers], scale: int) -> None:
        """Store one round's answers, replacing any stored earlier for that round."""

    def values(self, first: int, count: int, rounds: int) -> NDArray[np.float64]:
        """Return the answers of rounds 1 .. rounds: shape (rounds, count), NaN where there is no answer."""


class Cluster:
    """The servers of one run and the groups on them; on exit, the context manager deletes agents that are not kept.

    Args:
        config: The settings.
        run: The prefix of all remote ids of this run.
        game: The part of the game that is the same for all participants.
        participant_class: The class of the participants.
        watch: Receives progress and warnings.
        record: Storage for answers; without it, recreated participants start without memory.
    """

    def __init__(
        self,
        config: SimulationConfig,
        run: str,
        game: Game,
        participant_class: type[Participant],
        watch: ProgressListener,
        record: Record | None,
    ) -> None:
        self.config = config
        self.run = run
        self.watch = watch
        self._game = game
        self._class = participant_class
        self._record = record
        self._servers = endpoints(config.hosts, config.base_port, config.server_per_host)
        self._moderator_servers = endpoints(
            config.hosts, config.base_port + config.server_per_host, config.moderator_per_host
        )
        self._membership = Membership(config, run, self._servers + self._moderator_servers, watch, self._evict)
        self._plan = PlacementPlan(run, config.participant_num, self._servers, self._moderator_servers)
        self._made: set[str] = set()  # ids of the groups that exist
        self._ready: set[str] = set()  # groups whose participants are built and have their memory restored
        self._moderators: dict[Endpoint, RemoteObject] = {}
        self._asks: dict[Endpoint, list[GroupAssignment]] = {}  # the groups assigned to each moderator

    @property
    def assignments(self) -> list[GroupAssignment]:
        """Return all groups in participant order; a group that is no longer asked has no server."""
        return self._plan.assignments

    @property
    def active_assignments(self) -> list[GroupAssignment]:
        """Return the groups that have a server."""
        return [assignment for assignment in self._plan.assignments if assignment.server is not None]

    @property
    def living(self) -> list[Endpoint]:
        """Return the participant servers that are up."""
        return self._membership.living(self._servers)

    @property
    def lost(self) -> list[Endpoint]:
        """Return the servers that were ever marked down, in order of their first loss."""
        return self._membership.lost

    @property
    def used(self) -> dict[str, Usage]:
        """Return the usage of each group, including deleted groups."""
        return self._membership.used

    def observe(self) -> dict[Endpoint, ServerStatus]:
        """Return the status of each server, participant servers first, and keep their heartbeats detailed for a while.

        Until OBSERVED_S after the last call, heartbeats carry partial histograms and the load of the server.
        """
        return self._membership.observe(self._game.numbers)

    def __enter__(self) -> Cluster:
        self._membership.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        keep = self.config.keep_agents and kind is None
        if keep:
            self._delete_orphans()
        self._membership.close(keep)

    def all(self, call: Callable[[RemoteObject], V]) -> dict[Endpoint, V]:
        """Call all moderators that have groups and return the results by server. Raises ServerLost."""
        return call_all_or_raise(
            {moderator_server: partial(call, self._moderators[moderator_server]) for moderator_server in self._asks}
        )

    def moderator_of(self, assignment: GroupAssignment) -> RemoteObject:
        """Return the moderator of a group."""
        return self._moderators[assignment.moderator_server]

    # --- Servers that come and go ------------------------------------------------------------------------------------

    def retry_on_server_loss(self, work: Callable[[], V]) -> V:
        """Do the work; when it loses a server, retry on the remaining servers."""
        return self._membership.retry_on_server_loss(work)

    def _evict(self, endpoint: Endpoint) -> None:
        self._plan.unassign_server(endpoint)
        self._moderators.pop(endpoint, None)
        self._asks.pop(endpoint, None)

    def begin_round(self, number: int) -> None:
        """Readmit recovered servers, restore preferred placements and delete orphaned objects."""
        self._membership.begin_round(number)
        self._plan.restore_preferred(set(self.living), set(self._membership.living(self._moderator_servers)))
        self._delete_orphans()

    def _delete_orphans(self) -> None:
        """Delete objects that no assignment refers to, as they were recreated on, or moved back to, another server."""
        wanted = {assignment.oid for assignment in self._plan.assignments} | {
            each._oid for each in self._moderators.values()
        }
        strays = {
            oid: RemoteObject(ParticipantGroup, oid, endpoint, self.config.connect_timeout)
            for oid, endpoint in self._membership.hosted().items()
            if oid not in wanted
        }
        call_all({oid: partial(remove, stray) for oid, stray in strays.items()})

    def reconcile(self, rounds: int) -> None:
        """Place every group on a server that is up, with a moderator that is up; create only what is missing.

        New participants get their answers of the first `rounds` rounds. Raises ServerLost, RunAborted, Interrupted.
        """
        self._membership.note_losses()
        servers = self._membership.players(self._servers, "participant")
        minimum = self.config.min_servers
        if minimum is not None and len(servers) < minimum:
            raise RunAborted(
                f"{len(servers)} of {len(self._servers)} participant servers are left; --min-servers asks for {minimum}"
            )
        moderator_servers = self._membership.players(self._moderator_servers, "moderator")
        stopping = self.watch.stop_signal is not None and bool(self._ready)
        self._plan.reassign(servers, moderator_servers, onto=[] if stopping else servers)
        self._make_groups(
            [assignment for assignment in self.active_assignments if assignment.oid not in self._ready], rounds
        )
        self._seat_moderators()

    def _make_groups(self, assignments: list[GroupAssignment], rounds: int) -> None:
        """Create groups, wait until their participants are built, and restore their memory of `rounds` rounds."""
        packed = serialize_agent_class(self._class)

        def make(assignment: GroupAssignment) -> RemoteObject:
            kwargs = {
                "oid": assignment.oid,
                "first": assignment.first,
                "count": assignment.count,
                "game": self._game,
                "participant_class": packed,
                "reply_threads": self.config.reply_threads,
                "lease_s": self.config.lease,
            }
            return self._group(assignment, kwargs)

        made, errors = call_all(
            {
                assignment.oid: partial(make, assignment)
                for assignment in assignments
                if assignment.oid not in self._made
            }
        )
        self._made |= made.keys()
        for error in errors.values():
            raise error
        if assignments:
            self.wait("participants created", 0, assignments)
        remember = self._class.recall is not Participant.recall
        if rounds > 0 and remember and self._record is not None:
            call_all_or_raise(
                {assignment.oid: partial(self._remind, assignment, self._record, rounds) for assignment in assignments}
            )
        self._ready |= {assignment.oid for assignment in assignments}

    def _group(self, assignment: GroupAssignment, kwargs: dict[str, Any] | None = None) -> RemoteObject:
        assert assignment.server is not None
        return RemoteObject(ParticipantGroup, assignment.oid, assignment.server, LONG_CALL_TIMEOUT_S, kwargs)

    def _remind(self, assignment: GroupAssignment, record: Record, rounds: int) -> None:
        group = self._group(assignment)
        at_once = max(REMINDED_AT_ONCE // rounds, 1)
        for first in range(assignment.first, assignment.first + assignment.count, at_once):
            count = min(at_once, assignment.first + assignment.count - first)
            group.remember(first, record.values(first, count, rounds))

    def _seat_moderators(self) -> None:
        """Create missing moderators, and assign each its groups."""
        asks: dict[Endpoint, list[GroupAssignment]] = {}
        for assignment in self.active_assignments:
            asks.setdefault(assignment.moderator_server, []).append(assignment)

        def make(moderator_server: Endpoint) -> RemoteObject:
            number = self._moderator_servers.index(moderator_server)
            oid = f"{self.run}/moderator-{number}.{self._membership.noted[moderator_server]}"
            kwargs = {
                "name": f"Moderator {number}",
                "timeout_s": self.config.heartbeat_timeout,
                "lease_s": self.config.lease,
            }
            return RemoteObject(Moderator, oid, moderator_server, LONG_CALL_TIMEOUT_S, kwargs)

        made, errors = call_all(
            {
                moderator_server: partial(make, moderator_server)
                for moderator_server in asks
                if moderator_server not in self._moderators
            }
        )
        self._moderators |= made
        for error in errors.values():
            raise error
        one_by_one = self.config.dispatch == "agent"
        changed = {
            moderator_server: asks.get(moderator_server, [])
            for moderator_server in self._moderators
            if asks.get(moderator_server) != self._asks.get(moderator_server)
        }
        assigned, errors = call_all(
            {
                moderator_server: partial(self._moderators[moderator_server].assign, assignments, one_by_one)
                for moderator_server, assignments in changed.items()
            }
        )
        for moderator_server in assigned:
            self._asks[moderator_server] = changed[moderator_server]
        for error in errors.values():
            raise error
        self._asks = asks

    # --- What they are at --------------------------------------------------------------------------------------------

    def wait(self, stage: str, number: int, assignments: list[GroupAssignment]) -> None:
        """Wait until these groups finish the round (0: creation). An interruption ends a round early, creation at once.

        Raises ServerLost, Interrupted.
        """

        def halt(at_once: bool) -> None:
            self.all(lambda moderator: moderator.halt(at_once))

        total = sum(assignment.count for assignment in assignments)
        self._membership.wait(stage, number, self._awaited(number, assignments), total, halt)

    def _awaited(self, number: int, assignments: list[GroupAssignment]) -> Awaited:
        """Return the objects that must exist, by server, and whether each one's progress counts participants."""
        one_by_one = number > 0 and self.config.dispatch == "agent"
        awaited: Awaited = {}
        for assignment in assignments:
            assert assignment.server is not None
            awaited.setdefault(assignment.server, {})[assignment.oid] = not one_by_one
        if number > 0:
            for moderator_server in self._asks:
                awaited.setdefault(moderator_server, {})[self._moderators[moderator_server]._oid] = one_by_one
        return awaited
