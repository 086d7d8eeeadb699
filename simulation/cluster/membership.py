"""Membership: the servers of a run, which of them are up, and how far their objects have progressed.

It knows only the ids of the objects on a server. A callback reports each server whose objects are gone.
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
Awaited = dict[Endpoint, dict[str, bool]]  # by server: the required ids, and whether each counts participants

POLL_S = 1.0  # interval between checks for Ctrl-C
LOOK_S = 5e-5  # per server, pause between two scans of the heartbeats
LOOK_AGAIN_S = 0.1  # interval between checks for a recovered server
GATHER_S = 2.0  # with all servers down, the wait for others after the first one recovers
LOSSES_IN_ROUND = 3  # after these, a server is not readmitted in the round: the game may be what crashes it
HALT_PATIENCE_S = 3.0  # a participant that blocks its event loop cannot be stopped


class ProgressListener(Protocol):
    """The caller's interface for progress and interruption: a signal number in `stop_signal` requests an early end."""

    stop_signal: int | None

    def progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Receive progress at every heartbeat and at the end of a stage ("participants created" or "answers in")."""

    def tell(self, line: str) -> None:
        """Receive a message that a server was lost or has recovered."""


class Membership:
    """The servers of one run, from `open` to `close`.

    Args:
        config: The settings.
        run: The prefix of all remote ids of this run.
        servers: All servers of the run.
        watch: Receives progress and warnings.
        unassign_server: Called with each lost server, whose objects are gone.
    """

    def __init__(
        self,
        config: SimulationConfig,
        run: str,
        servers: list[Endpoint],
        watch: ProgressListener,
        unassign_server: Callable[[Endpoint], None],
    ) -> None:
        self.lost: list[Endpoint] = []  # every server that was ever lost, by first loss
        self.noted: Counter[Endpoint] = Counter()  # losses already handled by note_losses
        self.used: dict[str, Usage] = {}  # by group, including deleted groups
        self._config = config
        self._run = run
        self._servers = servers
        self._watch = watch
        self._evict = unassign_server
        self._losses: Counter[Endpoint] = Counter()  # losses in this round

    def open(self) -> None:
        """Announce the run to all servers and start the failure detector."""
        shake = partial(handshake, timeout_s=self._config.connect_timeout, directives={NEW_RUN: self._run})
        shakes = call_all_or_raise({each: partial(shake, each) for each in self._servers})
        incarnations = {endpoint: shake.incarnation for endpoint, shake in shakes.items()}
        self._detector = FailureDetector(self._run, incarnations, self._config.heartbeat_timeout, self._config.lease)
        self._detector.__enter__()

    def close(self, keep: bool) -> None:
        """Stop the failure detector and announce the end of the run; `keep` keeps the agents."""
        self._detector.__exit__()
        farewell = {KEEP_RUN if keep else END_RUN: self._run}
        close = partial(handshake, timeout_s=self._config.connect_timeout, directives=farewell)
        # a server that misses this call drops the agents when their lease expires
        call_all({each: partial(close, each) for each in self._servers if self._detector.answers(each)})

    # --- Servers that come and go ------------------------------------------------------------------------------------

    def living(self, pool: list[Endpoint]) -> list[Endpoint]:
        """Return the servers of the pool that are up."""
        return [each for each in pool if self._detector.alive(each)]

    def observe(self, numbers: int) -> dict[Endpoint, ServerStatus]:
        """Return the status of each server, for display; see FailureDetector.observe."""
        self._detector.observe(numbers)
        return {each: self._detector.status_of(each) for each in self._servers}

    def hosted(self) -> dict[str, Endpoint]:
        """Return the ids of this run's objects reported by servers that are up, each with its server."""
        return {oid: each for each in self.living(self._servers) for oid in self._detector.last(each).objects}

    def retry_on_server_loss(self, work: Callable[[], V]) -> V:
        """Do the work; when it loses a server, mark that server down and retry on the others."""
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
        """Handle all losses since the previous call: warn, and unassign the lost servers."""
        for endpoint in self._servers:
            losses, why = self._detector.losses(endpoint)
            if losses == self.noted[endpoint]:
                continue
            self._losses[endpoint] += losses - self.noted[endpoint]
            self.noted[endpoint] = losses
            if endpoint not in self.lost:
                self.lost.append(endpoint)
            self._watch.tell(f"{endpoint} is lost: {why}; continuing without it")
            self._evict(endpoint)

    def begin_round(self, number: int) -> None:
        """Reset the losses of the round and readmit recovered servers."""
        self._losses.clear()
        for endpoint in self._servers:
            if self._detector.has_recovered(endpoint):
                self._take_back(endpoint)
                self._watch.tell(f"{endpoint} answers again, and is used from round {number} on")

    def _take_back(self, endpoint: Endpoint) -> None:
        self.note_losses()
        self._detector.mark_up(endpoint)

    def players(self, pool: list[Endpoint], role: str) -> list[Endpoint]:
        """Return the pool's servers that are up; if none is, await a recovery. Raises RunAborted, Interrupted."""
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
        """Wait until `total` participants finish the round; an interruption ends a round early, creation immediately.

        Heartbeats report progress. There is no time limit: a slow server is not a failed one. Raises ServerLost,
        Interrupted, and the SimulationError that an object reports.

        Args:
            stage: The stage reported to the listener.
            number: The round; 0 while participants are built.
            awaited: The required objects.
            total: Number of participants.
            halt: Called to stop the round; True stops it without waiting for pending answers.
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
            time.sleep(len(awaited) * LOOK_S)  # the more servers, the fewer scans

    def _done(self, awaited: Awaited, number: int, since: float) -> int:
        """Return how many participants have finished, from replies requested after `since`; store the groups' usage."""
        done = 0
        gone: AgentNotFound | None = None
        for endpoint, objects in awaited.items():
            beat, sent = self._detector.latest(endpoint)
            if sent < since:  # may report groups that have been replaced
                continue
            for oid, counts in objects.items():
                progress = beat.objects.get(oid)
                if progress is None:  # e.g. all have expired, as this process was suspended beyond the lease
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
