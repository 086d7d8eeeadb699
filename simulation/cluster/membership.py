"""Which servers of a run are there, and how far what they host is: lost ones are given up on, and may be taken back.

It knows nothing of what is on a server but its ids: whoever put something there is told when it is gone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from simulation.cluster.failure_detector import FailureDetector, ServerStatus
from simulation.errors import AgentNotFound, Interrupted, RunAborted, ServerLost, SimulationError
from simulation.llm.usage import Usage
from simulation.rpc.channels import call_all, call_all_or_raise, handshake, parse_remote_error
from simulation.rpc.endpoints import Endpoint
from simulation.rpc.messages import END_RUN, KEEP_RUN, NEW_RUN
from simulation.settings import SimulationConfig

V = TypeVar("V")
Awaited = dict[Endpoint, dict[str, bool]]  # by server, the ids that must be there, and which of them count participants

POLL_S = 1.0  # between two looks at a person's Ctrl-C
LOOK_S = 5e-5  # between two looks at the heartbeats, for each server
LOOK_AGAIN_S = 0.1  # between two looks for a server that comes back
GATHER_S = 2.0  # where all were lost, the first one that is back waits so long for others
LOSSES_IN_ROUND = 3  # a server that is lost more often is not used again, as something in the game may be what kills it
HALT_PATIENCE_S = 3.0  # a participant that blocks its event loop cannot be stopped


class ProgressListener(Protocol):
    """How a caller looks on, and interrupts: a signal number in `stop_signal` asks for an early end."""

    stop_signal: int | None

    def progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Called with every heartbeat, and at the end of each stage: "participants created" or "answers in"."""

    def tell(self, line: str) -> None:
        """Called when a server is lost, or answers again."""


class Membership:
    """The servers of one run, from `greet` to `part`.

    Args:
        config: The settings.
        run: What all remote ids of this run begin with.
        servers: All of them.
        watch: Who looks on.
        evict: Called with a server that was lost: what was on it is gone.
    """

    def __init__(
        self,
        config: SimulationConfig,
        run: str,
        servers: list[Endpoint],
        watch: ProgressListener,
        unassign_server: Callable[[Endpoint], None],
    ) -> None:
        self.lost: list[Endpoint] = []  # given up on at some time, in that order
        self.noted: Counter[Endpoint] = Counter()  # losses that were seen to
        self.used: dict[str, Usage] = {}  # by group, those that are gone included
        self._config = config
        self._run = run
        self._servers = servers
        self._watch = watch
        self._evict = unassign_server
        self._losses: Counter[Endpoint] = Counter()  # those of this round

    def open(self) -> None:
        """Tell all servers that the run begins, and listen to their heartbeats from now on."""
        shake = partial(handshake, timeout_s=self._config.connect_timeout, told={NEW_RUN: self._run})
        shakes = call_all_or_raise({each: partial(shake, each) for each in self._servers})
        incarnations = {endpoint: shake.incarnation for endpoint, shake in shakes.items()}
        self._detector = FailureDetector(self._run, incarnations, self._config.heartbeat_timeout, self._config.lease)
        self._detector.__enter__()

    def close(self, keep: bool) -> None:
        """Tell all servers that the run is over, and whether its agents stay."""
        self._detector.__exit__()
        farewell = {KEEP_RUN if keep else END_RUN: self._run}
        close = partial(handshake, timeout_s=self._config.connect_timeout, told=farewell)
        # a server that does not hear it drops the agents when their lease is over
        call_all({each: partial(close, each) for each in self._servers if self._detector.answers(each)})

    # --- Servers that come and go ------------------------------------------------------------------------------------

    def living(self, pool: list[Endpoint]) -> list[Endpoint]:
        """Those of the pool that play."""
        return [each for each in pool if self._detector.alive(each)]

    def status_of(self, endpoint: Endpoint) -> ServerStatus:
        """How a server stands, for those who look on."""
        return self._detector.status_of(endpoint)

    def hosted(self) -> dict[str, Endpoint]:
        """The ids of all that those who play say they hold of this run, and where."""
        return {oid: each for each in self.living(self._servers) for oid in self._detector.last(each).objects}

    def retry_on_server_loss(self, work: Callable[[], V]) -> V:
        """Do the work; where a server is lost over it, do again with the others what is not done yet."""
        while True:
            try:
                return work()
            except ServerLost as error:
                endpoint = next((each for each in self._servers if str(each) == error.address), None)
                if endpoint is None:
                    raise SimulationError(f"an unknown server was lost: {error}") from error
                self._detector.mark_down(endpoint, str(error).partition(": ")[2])
                self.note_losses()

    def note_losses(self) -> None:
        """See to the consequences of all losses since the last time: what was on those servers is gone."""
        for endpoint in self._servers:
            losses, why = self._detector.losses(endpoint)
            if losses == self.noted[endpoint]:
                continue
            self._losses[endpoint] += losses - self.noted[endpoint]
            self.noted[endpoint] = losses
            if endpoint not in self.lost:
                self.lost.append(endpoint)
            self._watch.tell(f"{endpoint} is lost: {why}; going on without it")
            self._evict(endpoint)

    def begin_round(self, number: int) -> None:
        """Let servers play again that were lost and answer again."""
        self._losses.clear()
        for endpoint in self._servers:
            if self._detector.has_recovered(endpoint):
                self._take_back(endpoint)
                self._watch.tell(f"{endpoint} answers again, and plays from round {number} on")

    def _take_back(self, endpoint: Endpoint) -> None:
        self.note_losses()
        self._detector.mark_up(endpoint)

    def players(self, pool: list[Endpoint], role: str) -> list[Endpoint]:
        """Those of the pool who live; if none does, those that come back. Raises GameEnded if none comes in time."""
        gathered_from: float | None = None
        while True:
            alive = self.living(pool)
            if alive:
                return alive
            if self._watch.stop_signal is not None:
                raise Interrupted(self._watch.stop_signal)
            hopeful = [each for each in pool if self._losses[each] < LOSSES_IN_ROUND]
            if not hopeful:
                raise RunAborted(f"every {role} server was lost {LOSSES_IN_ROUND} times in this round")
            seconds_since_reply = min(self._detector.seconds_since_reply(each) for each in hopeful)
            if seconds_since_reply > self._config.heartbeat_timeout:
                raise RunAborted(
                    f"no {role} server has answered for {seconds_since_reply:.0f} s: {self._why_lost(hopeful[0])}"
                )
            back = [each for each in hopeful if self._detector.has_recovered(each)]
            if back and gathered_from is None:
                gathered_from = time.monotonic()
            if gathered_from is not None and (back == hopeful or time.monotonic() > gathered_from + GATHER_S):
                for endpoint in back:
                    self._take_back(endpoint)
            self._detector.wait(LOOK_AGAIN_S)

    def _why_lost(self, endpoint: Endpoint) -> str:
        return f"{endpoint} {self._detector.losses(endpoint)[1]}; --resume plays on when servers are up again"

    # --- What they are at --------------------------------------------------------------------------------------------

    def wait(self, stage: str, number: int, awaited: Awaited, total: int, halt: Callable[[bool], None]) -> None:
        """Wait until so many participants are done with this round; an interruption ends it early, creation at once.

        Heartbeats tell how far they are: however long it takes, slow is not dead. Raises ServerLost, Interrupted.

        Args:
            stage: What is told to who looks on.
            number: The round; 0 while participants are built.
            awaited: Where they are.
            total: How many there are.
            halt: Called to stop the round, with whether to wait for nobody.
        """
        give_up_at: float | None = None
        since = time.monotonic()
        self._detector.poll_now(number)
        while True:
            done = self._done(awaited, number, since)
            answering = sum(self._detector.answers(each) for each in self._servers)
            self._watch.progress(stage, done, total, f"{answering} of {len(self._servers)} servers answer")
            if done == total:
                return
            if self._watch.stop_signal is not None:
                if number == 0:
                    raise Interrupted(self._watch.stop_signal)
                if give_up_at is None:
                    halt(False)
                    give_up_at = time.monotonic() + HALT_PATIENCE_S
                elif time.monotonic() > give_up_at:
                    halt(True)
            self._detector.wait(POLL_S)
            time.sleep(len(awaited) * LOOK_S)  # many servers are looked at less often

    def _done(self, awaited: Awaited, number: int, since: float) -> int:
        """How many participants have answered, or are built in round 0, as was heard since; notes what they cost."""
        done = 0
        gone: AgentNotFound | None = None
        for endpoint, objects in awaited.items():
            beat, sent = self._detector.latest(endpoint)
            if sent < since:  # it may tell of groups that have been replaced
                continue
            for oid, counts in objects.items():
                progress = beat.objects.get(oid)
                if progress is None:  # as after a pause of this process that was longer than the lease: then all are
                    gone = AgentNotFound(f"{endpoint}: the agent is gone")
                    self._detector.mark_down(endpoint, "the agent is gone")
                    continue
                if progress.error:
                    raise parse_remote_error(progress.error) or SimulationError(progress.error)
                if progress.usage:
                    self.used[oid] = Usage(*progress.usage)  # type: ignore[arg-type]
                done += progress.done if counts and progress.round == number else 0
        if gone is not None:
            raise gone
        return done
