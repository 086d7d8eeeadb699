"""The groups and moderators of a run. Main creates and calls them, and recreates them if their servers fail.

After a failure, work is retried on the remaining servers. Therefore every step is idempotent.
"""

import time
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
from simulation.errors import AgentNotFound, Interrupted, RunAborted, ServerUnreachable, SimulationError
from simulation.game.answer_sheet import Answers
from simulation.game.game import Game
from simulation.game.tally import RoundResult
from simulation.llm.prompts import KeptText, RecordedText
from simulation.llm.responses import Usage
from simulation.rpc.channels import AGENT_GONE, call_all, call_all_or_raise, parse_remote_error
from simulation.rpc.client import LONG_CALL_TIMEOUT_S, Client, RemoteObject
from simulation.rpc.endpoints import ANSWERS_PER_MESSAGE, Endpoint, GroupAssignment, endpoints
from simulation.settings import SimulationConfig

POLL_S = 1.0  # interval between checks for Ctrl-C
SCAN_PAUSE_S = 5e-5  # pause per object between two scans of the heartbeat replies
V = TypeVar("V")


class Record(Protocol):
    """Storage for the answers of finished rounds, and for what models wrote. See `RunDirectory`."""

    def write_answers(self, result: RoundResult, answers: Iterator[Answers], game: Game) -> None: ...

    def write_texts(self, round_number: int, texts: Iterator[list[KeptText]]) -> tuple[int, int]: ...

    def values(self, first: int, count: int, rounds: int) -> NDArray[np.float64]: ...


class Replay(Protocol):
    """The source of recorded texts. See `RecordedTexts`."""

    def of(self, first: int, count: int) -> Iterator[list[RecordedText]]: ...


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
        servers = self.participant_servers = endpoints(config.hosts, config.base_port, config.server_per_host)
        first_port = config.base_port + config.server_per_host
        self.moderator_servers = endpoints(config.hosts, first_port, config.moderator_per_host)
        super().__init__(config, run, servers + self.moderator_servers, watch)
        self._game, self._record, self._replay = game, record, replay
        self._classes = load_agent_classes(config, recorded)
        self._packed = serialize_agent_class(*self._classes, flag=config.who_flag)
        self._plan = PlacementPlan(run, config.participant_num, servers, self.moderator_servers)
        self.used: dict[str, Usage] = {}  # usage by group id, including deleted groups
        self._models_down: set[str] = set()  # models whose lasting errors were reported in this round
        self._ready: set[str] = set()  # ids of groups whose participants exist and have their earlier answers
        self.moderators: dict[Endpoint, RemoteObject] = {}  # the moderator on each server
        self._assigned: dict[Endpoint, list[GroupAssignment]] = {}  # the groups of the moderator on each server

    @property
    def assignments(self) -> list[GroupAssignment]:
        """Return all groups in participant order, including those without a server, which are not asked."""
        return self._plan.assignments

    @property
    def active_assignments(self) -> list[GroupAssignment]:
        """Return the groups that have a server."""
        return [assignment for assignment in self.assignments if assignment.server is not None]

    def observe(self) -> dict[Endpoint, ServerStatus]:
        """Return each server's status, moderators last. Heartbeats then request histograms for OBSERVED_S seconds."""
        self._detector.observe(self._game.numbers)
        return self.status

    def change(self, config: SimulationConfig, paused: bool) -> None:
        """Change settings of the run in progress: --heartbeat-timeout, --max-in-flight, and whether it is paused."""
        self.config = config
        self._detector.change(config.heartbeat_timeout, {"paused": paused, "max_in_flight": config.max_in_flight})

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if keep := self.config.keep_agents and kind is None:
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
        self._models_down.clear()
        self._plan.restore_preferred(set(self.up(self.participant_servers)), set(self.up(self.moderator_servers)))
        self._delete_orphans()

    def _delete_orphans(self) -> None:
        """Delete groups and moderators that still exist on servers although others have replaced them."""
        wanted = {each.oid for each in self.assignments} | {each.oid for each in self.moderators.values()}
        hosted = [(server, oid) for server in self.up(self._servers) for oid in self.status[server].reply.objects]
        clients = {oid: Client(server, self.config.connect_timeout) for server, oid in hosted if oid not in wanted}
        call_all({oid: partial(client.delete_agent, oid) for oid, client in clients.items()})

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
        if missing := [each for each in self.active_assignments if each.oid not in self._ready]:
            self._create_groups(missing, rounds)
        self._assign_groups()

    def _create_groups(self, assignments: list[GroupAssignment], rounds: int) -> None:
        """Create groups, wait for their participants, and restore the participants' memory of rounds 1 .. `rounds`."""
        kwargs = {
            "game": self._game,
            "participant_class": self._packed,
            "reply_threads": self.config.reply_threads,
            "lease_s": self.config.lease,
        }
        create = partial(group_proxy, timeout_s=LONG_CALL_TIMEOUT_S, kwargs=kwargs)
        groups = call_all_or_raise({each: partial(create, each) for each in assignments})
        self.wait("participants created", 0, assignments)
        self.restore_memory(rounds, groups)
        if (replay := self._replay) is not None:

            def send(assignment: GroupAssignment) -> None:
                for texts in replay.of(assignment.first, assignment.count):
                    groups[assignment].record(texts)

            call_all_or_raise({each: partial(send, each) for each in groups})
        self._ready |= {assignment.oid for assignment in assignments}

    def restore_memory(self, rounds: int, groups: Mapping[GroupAssignment, RemoteObject] | None = None) -> None:
        """Replace the memory of groups (None: all) by their participants' recorded answers of rounds 1 .. `rounds`."""
        if groups is None:
            groups = {each: group_proxy(each, LONG_CALL_TIMEOUT_S) for each in self.active_assignments}
        record = self._record
        if rounds == 0 or record is None or all(cls.recall is Participant.recall for cls in self._classes):
            return

        def restore(assignment: GroupAssignment, group: RemoteObject) -> None:
            for first, count in assignment.chunks(max(ANSWERS_PER_MESSAGE // rounds, 1)):
                group.remember(first, record.values(first, count, rounds))

        call_all_or_raise({each: partial(restore, each, group) for each, group in groups.items()})

    def _assign_groups(self) -> None:
        """Create missing moderators, and send each moderator its groups."""
        groups: dict[Endpoint, list[GroupAssignment]] = defaultdict(list)
        for assignment in self.active_assignments:
            groups[assignment.moderator_server].append(assignment)
        missing = {each: partial(self._create_moderator, each) for each in groups if each not in self.moderators}
        self.moderators |= call_all_or_raise(missing)
        changed = [each for each in self.moderators if groups.get(each) != self._assigned.get(each)]
        call_all_or_raise({each: partial(self.moderators[each].assign, groups.get(each, [])) for each in changed})
        self._assigned = dict(groups)

    def _create_moderator(self, server: Endpoint) -> RemoteObject:
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
        """Wait without time limit until groups finish round `number` (0: their creation). An interruption ends a round.

        Raises ServerLost, Interrupted (only during creation), or the SimulationError that a group or moderator reports.
        """
        awaited = [(each.server, each.oid) for each in assignments if each.server is not None]
        if number > 0:
            awaited += [(server, self.moderators[server].oid) for server in self._assigned]
        total, since = sum(each.count for each in assignments), time.monotonic()
        self._detector.poll_now(number)
        while True:
            done = self._done(number, awaited, since)
            answering = sum(status.answers for status in self.status.values())
            self.watch.progress(stage, done, total, f"{answering} of {len(self._servers)} servers answer")
            if done == total:
                return
            if self.watch.stop_signal is not None:
                if number == 0:
                    raise Interrupted(self.watch.stop_signal)
                self.halt()
            self._detector.wait(POLL_S)
            time.sleep(len(awaited) * SCAN_PAUSE_S)  # the more objects, the fewer scans

    def _done(self, number: int, awaited: list[tuple[Endpoint, str]], since: float) -> int:
        """Return the number of finished participants, and store the usage. Skip replies requested before `since`."""
        done = 0
        gone: AgentNotFound | None = None
        for endpoint, oid in awaited:
            status = self.status[endpoint]
            if not status.up and gone is None:
                raise ServerUnreachable(f"{endpoint}: {status.why}")
            if status.requested_at < since:  # an earlier reply may report groups that were replaced
                continue
            progress = status.reply.objects.get(oid)
            if progress is None:  # for example, the lease expired while this process was suspended
                gone = AgentNotFound(f"{endpoint}: {AGENT_GONE}")
                self._detector.mark_down(endpoint, AGENT_GONE)
                continue
            if progress.error:
                raise parse_remote_error(progress.error) or SimulationError(progress.error)
            if progress.usage:
                self.used[oid] = Usage(*progress.usage)  # type: ignore[arg-type]
            for name in progress.outages.keys() - self._models_down:
                self._models_down.add(name)
                self.watch.warn(f"{endpoint.host}: {progress.outages[name]}")
            done += progress.done if progress.round == number else 0
        if gone is not None:
            raise gone
        return done
