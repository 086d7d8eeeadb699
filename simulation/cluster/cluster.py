"""The groups and moderators of a run. Main creates and calls them, and recreates them if their servers fail.

After a failure, work is retried on the remaining servers. Therefore every step is idempotent: the creation of an object
that already exists does nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from moderator import Moderator
from simulation.agents.group import group_proxy
from simulation.agents.participant import Participant
from simulation.cluster.agent_class import load_agent_classes, serialize_agent_class
from simulation.cluster.failure_detector import ServerStatus
from simulation.cluster.membership import Membership, ProgressListener
from simulation.cluster.placement import PlacementPlan
from simulation.errors import RunAborted
from simulation.game.answer_sheet import Answers
from simulation.game.game import Game
from simulation.game.tally import RoundResult
from simulation.llm.prompts import KeptText, RecordedText
from simulation.rpc.channels import call_all, call_all_or_raise
from simulation.rpc.client import LONG_CALL_TIMEOUT_S, RemoteObject, delete_remote
from simulation.rpc.endpoints import ANSWERS_PER_MESSAGE, Endpoint, GroupAssignment, endpoints
from simulation.settings import SimulationConfig

V = TypeVar("V")


class Record(Protocol):
    """Storage for the answers of finished rounds."""

    def write_answers(self, result: RoundResult, answers: Iterator[Answers], game: Game) -> None:
        """Store the answers of one round. Replace earlier answers of the same round."""

    def write_texts(self, round_number: int, texts: Iterator[list[KeptText]]) -> tuple[int, int]:
        """Store what models wrote in one round. Return the numbers of texts and of those with replaced characters."""

    def values(self, first: int, count: int, rounds: int) -> NDArray[np.float64]:
        """Return the answers of participants first .. first+count-1, NaN if none, one row per round 1 .. rounds."""


class Replay(Protocol):
    """The source of recorded texts."""

    def of(self, first: int, count: int) -> Iterator[list[RecordedText]]:
        """Yield the texts of participants first .. first+count-1, in pieces for one message each."""


class Cluster(Membership):
    """The servers and groups of one run. On exit, the agents are deleted unless they are kept (see --keep-agents)."""

    def __init__(
        self,
        config: SimulationConfig,
        run: str,
        game: Game,
        watch: ProgressListener,
        record: Record | None,
        recorded: Mapping[str, Any],
        replay: Replay | None = None,
    ) -> None:
        servers = endpoints(config.hosts, config.base_port, config.server_per_host)
        first_port = config.base_port + config.server_per_host
        moderator_servers = endpoints(config.hosts, first_port, config.moderator_per_host)
        super().__init__(config, run, servers + moderator_servers, watch)
        self.participant_servers = servers
        self.moderator_servers = moderator_servers
        self._game = game
        self._record = record
        self._replay = replay
        self._classes = load_agent_classes(config, recorded)
        self._packed = serialize_agent_class(*self._classes, flag=config.who_flag)
        self._plan = PlacementPlan(run, config.participant_num, servers, moderator_servers)
        self._ready: set[str] = set()  # ids of groups whose participants exist and have their earlier answers
        self.moderators: dict[Endpoint, RemoteObject] = {}  # the moderator on each server
        self._assigned: dict[Endpoint, list[GroupAssignment]] = {}  # the groups of the moderator on each server

    @property
    def assignments(self) -> list[GroupAssignment]:
        """Return all groups in participant order, including those without a server, which are no longer asked."""
        return self._plan.assignments

    @property
    def active_assignments(self) -> list[GroupAssignment]:
        """Return the groups that have a server."""
        return [assignment for assignment in self.assignments if assignment.server is not None]

    def observe(self) -> dict[Endpoint, ServerStatus]:
        """Return each server's status, moderators last. Heartbeats then request histograms for OBSERVED_S seconds."""
        self._detector.observe(self._game.numbers)
        return self.status

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        keep = self.config.keep_agents and kind is None
        if keep:
            self._delete_orphans()
        self.close(keep)

    def all(self, call: Callable[[RemoteObject], V]) -> dict[Endpoint, V]:
        """Pass each moderator that has groups to `call`. Return the results by server. Raises ServerLost."""
        return call_all_or_raise({server: partial(call, self.moderators[server]) for server in self._assigned})

    def halt(self) -> None:
        self.all(lambda moderator: moderator.halt())

    def unassign_server(self, endpoint: Endpoint) -> None:
        self._plan.unassign_server(endpoint)
        self.moderators.pop(endpoint, None)
        self._assigned.pop(endpoint, None)

    def begin_round(self, number: int) -> None:
        """Readmit recovered servers, move groups back to their preferred servers, and delete replaced objects."""
        super().begin_round(number)
        self._plan.restore_preferred(set(self.up(self.participant_servers)), set(self.up(self.moderator_servers)))
        self._delete_orphans()

    def _delete_orphans(self) -> None:
        """Delete groups and moderators that still exist on servers although others have replaced them."""
        wanted = {each.oid for each in self.assignments} | {each.oid for each in self.moderators.values()}
        hosted = [(server, oid) for server in self.up(self._servers) for oid in self.status[server].reply.objects]
        delete = partial(delete_remote, deadline_s=self.config.connect_timeout)
        call_all({oid: partial(delete, server, oid) for server, oid in hosted if oid not in wanted})

    def reconcile(self, rounds: int) -> None:
        """Create missing groups and moderators on servers that are up.

        New groups get back their answers of rounds 1 .. `rounds`. Raises ServerLost, RunAborted or Interrupted.
        """
        self.handle_losses()
        servers = self.wait_for_servers(self.participant_servers, "participant")
        minimum = self.config.min_servers
        if minimum is not None and len(servers) < minimum:
            left = f"{len(servers)} of {len(self.participant_servers)} participant servers are left"
            raise RunAborted(f"{left}; --min-servers asks for {minimum}")
        moderator_servers = self.wait_for_servers(self.moderator_servers, "moderator")
        stopping = self.watch.stop_signal is not None and bool(self._ready)
        self._plan.reassign(servers, moderator_servers, onto=[] if stopping else servers)
        self._create_groups([each for each in self.active_assignments if each.oid not in self._ready], rounds)
        self._assign_groups()

    def _create_groups(self, assignments: list[GroupAssignment], rounds: int) -> None:
        """Create groups, wait for their participants, and restore the participants' memory of rounds 1 .. `rounds`."""
        if not assignments:
            return
        kwargs = {
            "game": self._game,
            "participant_class": self._packed,
            "reply_threads": self.config.reply_threads,
            "lease_s": self.config.lease,
        }
        create = partial(group_proxy, timeout_s=LONG_CALL_TIMEOUT_S, kwargs=kwargs)
        groups = call_all_or_raise({each: partial(create, each) for each in assignments})
        self.wait("participants created", 0, assignments)
        self._restore_memory(groups, rounds)
        if self._replay is not None:
            send = partial(_send_recorded, self._replay)
            call_all_or_raise({each: partial(send, each, group) for each, group in groups.items()})
        self._ready |= {assignment.oid for assignment in assignments}

    def restore_memory(self, rounds: int) -> None:
        """Replace the memory of all participants by their recorded answers of rounds 1 .. `rounds`."""
        self._restore_memory({each: group_proxy(each, LONG_CALL_TIMEOUT_S) for each in self.active_assignments}, rounds)

    def _restore_memory(self, groups: Mapping[GroupAssignment, RemoteObject], rounds: int) -> None:
        remembers = any(cls.recall is not Participant.recall for cls in self._classes)
        if rounds > 0 and self._record is not None and remembers:
            restore = partial(_restore_memory, self._record, rounds)
            call_all_or_raise({each: partial(restore, each, group) for each, group in groups.items()})

    def _assign_groups(self) -> None:
        """Create missing moderators, and send each moderator its groups."""
        groups: dict[Endpoint, list[GroupAssignment]] = defaultdict(list)
        for assignment in self.active_assignments:
            groups[assignment.moderator_server].append(assignment)
        missing = [server for server in groups if server not in self.moderators]
        self.moderators |= call_all_or_raise({server: partial(self._moderator, server) for server in missing})
        changed = {
            server: partial(moderator.assign, groups.get(server, []))
            for server, moderator in self.moderators.items()
            if groups.get(server) != self._assigned.get(server)
        }
        call_all_or_raise(changed)
        self._assigned = dict(groups)

    def _moderator(self, server: Endpoint) -> RemoteObject:
        number = self.moderator_servers.index(server)
        oid = f"{self.run}/moderator-{number}.{self.losses[server]}"
        kwargs = {
            "name": f"Moderator {number}",
            "timeout_s": self.config.heartbeat_timeout,
            "lease_s": self.config.lease,
            "one_by_one": self.config.dispatch == "agent",
        }
        return RemoteObject(Moderator, oid, server, LONG_CALL_TIMEOUT_S, kwargs)

    def wait(self, stage: str, number: int, assignments: list[GroupAssignment]) -> None:
        """Wait until the groups in `assignments` finish round `number` (0: their creation); see `wait_until_done`."""
        awaited = [(each.server, each.oid) for each in assignments if each.server is not None]
        if number > 0:
            awaited += [(server, self.moderators[server].oid) for server in self._assigned]
        self.wait_until_done(stage, number, sum(each.count for each in assignments), awaited)


def _send_recorded(replay: Replay, assignment: GroupAssignment, group: RemoteObject) -> None:
    for texts in replay.of(assignment.first, assignment.count):
        group.record(texts)


def _restore_memory(record: Record, rounds: int, assignment: GroupAssignment, group: RemoteObject) -> None:
    for first, count in assignment.chunks(max(ANSWERS_PER_MESSAGE // rounds, 1)):
        group.remember(first, record.values(first, count, rounds))
