"""Failure detector: which agent servers of a run are alive, and how far their objects are. Callers decide how to react.

A background thread polls all servers concurrently. A busy server delays its reply until its part of the round is done,
so main learns of the end of a round at once. Each heartbeat also renews the lease of the run. A server is marked down
when nothing listens on its port, when its process was replaced, or when it sends no reply for the timeout. Polling goes
on, and the server can be marked up again.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simulation.errors import ServerUnreachable, SimulationError
from simulation.rpc.channels import NOBODY_LISTENS, allow_calls, cancel_calls, heartbeat
from simulation.rpc.endpoints import Endpoint
from simulation.rpc.messages import HeartbeatReply

WAIT_S = 1.0  # longest delay of a busy server's reply
AGAIN_S = 0.1  # retry interval for an unreachable server
SERVERS_A_SECOND = 1000  # heartbeats per second that main can process
BEATS_IN_LEASE = 4
OBSERVED_S = 5.0  # how long heartbeats carry histograms after `observe`; a dashboard is refreshed more often
ASLEEP_S = 1.0  # a deadline error that is this late means that this process was suspended


@dataclass(frozen=True)
class ServerStatus:
    """The status of a server in a run.

    Attributes:
        plays: Whether the server is up (never marked down, or marked up again).
        answers: Whether it answers, whether or not it is marked down.
        losses: Number of losses so far.
        why: Cause of the latest loss.
        seconds_since_reply: Time since its latest reply (seconds).
        beat: Its latest heartbeat reply.
    """

    plays: bool
    answers: bool
    losses: int
    why: str
    seconds_since_reply: float
    beat: HeartbeatReply


@dataclass
class _ServerState:
    """Internal state of one server."""

    incarnation: str
    heard: float  # time of the latest reply
    beat: HeartbeatReply
    requested_at: float = 0.0  # when that reply was requested
    lost: bool = False
    losses: int = 0  # number of losses
    why: str = ""  # cause of the latest loss
    back: bool = False  # whether it has answered since the loss
    asked: float = 0.0  # time of the newest request; only its reply schedules the next one


class FailureDetector:
    """The failure detector of one run, a context manager that polls the servers while it is open.

    Args:
        run: The run's remote id.
        incarnations: The servers, each with the id of its process.
        timeout_s: Seconds without a reply after which a server is marked down.
        lease_s: The lease to renew (seconds).
    """

    def __init__(self, run: str, incarnations: Mapping[Endpoint, str], timeout_s: float, lease_s: float) -> None:
        self._run = run
        self._timeout_s = timeout_s
        at_most = min(timeout_s, lease_s) / BEATS_IN_LEASE
        self._wait_s = min(max(WAIT_S, len(incarnations) / SERVERS_A_SECOND), at_most)
        now = time.monotonic()
        self._states = {each: _ServerState(name, now, HeartbeatReply(name)) for each, name in incarnations.items()}
        self._due = [(now, endpoint) for endpoint in self._states]  # a heap of request times
        self._changed = threading.Condition()  # guards all mutable state
        self._number = 0  # the current round
        self._observed = (0, 0.0)  # number of possible answers, and until when heartbeats carry histograms
        self._news = False
        self._ended = False
        self._thread = threading.Thread(target=self._ask_around, name="heartbeats", daemon=True)

    def __enter__(self) -> FailureDetector:
        for endpoint in self._states:
            allow_calls(endpoint)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    # --- What is known -----------------------------------------------------------------------------------------------

    def alive(self, endpoint: Endpoint) -> bool:
        """Return whether the server is up (never marked down, or marked up again)."""
        return not self._states[endpoint].lost

    def has_recovered(self, endpoint: Endpoint) -> bool:
        """Return whether a server that is marked down answers again."""
        return self._states[endpoint].back

    def seconds_since_reply(self, endpoint: Endpoint) -> float:
        """Return the seconds since the latest reply."""
        return time.monotonic() - self._states[endpoint].heard

    def answers(self, endpoint: Endpoint) -> bool:
        """Return whether the server answers, whether or not it is marked down."""
        state = self._states[endpoint]
        return state.back or not state.lost

    def losses(self, endpoint: Endpoint) -> tuple[int, str]:
        """Return the number of losses and the cause of the latest one."""
        state = self._states[endpoint]
        return state.losses, state.why

    def last(self, endpoint: Endpoint) -> HeartbeatReply:
        """Return the latest heartbeat reply."""
        return self._states[endpoint].beat

    def status_of(self, endpoint: Endpoint) -> ServerStatus:
        """Return the whole status of a server, for display; takes no lock."""
        losses, why = self.losses(endpoint)
        seconds_since_reply, beat = self.seconds_since_reply(endpoint), self.last(endpoint)
        return ServerStatus(self.alive(endpoint), self.answers(endpoint), losses, why, seconds_since_reply, beat)

    def latest(self, endpoint: Endpoint) -> tuple[HeartbeatReply, float]:
        """Return the latest reply and its request time (time.monotonic). Raises ServerUnreachable if marked down."""
        with self._changed:
            state = self._states[endpoint]
            if state.lost:
                raise ServerUnreachable(f"{endpoint}: {state.why}")
            return state.beat, state.requested_at

    def wait(self, timeout_s: float) -> None:
        """Wait until there is an unseen reply or a new loss, for at most `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._news, timeout_s)
            self._news = False

    def observe(self, numbers: int) -> None:
        """Request partial histograms with all heartbeats of the next OBSERVED_S; `numbers` is the possible answers."""
        self._observed = (numbers, time.monotonic() + OBSERVED_S)

    # --- What is decided elsewhere -----------------------------------------------------------------------------------

    def poll_now(self, number: int) -> None:
        """Poll all servers now, as new work has started; servers working on this round delay their replies."""
        with self._changed:
            self._number = number
            now = time.monotonic()
            self._due = [(now, endpoint) for endpoint in self._states]
            self._changed.notify_all()

    def mark_down(self, endpoint: Endpoint, why: str) -> None:
        """Mark a server down until `mark_up`, and cancel pending calls to it."""
        with self._changed:
            state = self._states[endpoint]
            if state.lost:
                return
            state.lost, state.losses, state.why, state.back = True, state.losses + 1, why, False
            self._news = True
            self._changed.notify_all()
        cancel_calls(endpoint)

    def mark_up(self, endpoint: Endpoint) -> None:
        """Mark a recovered server up and allow calls to it."""
        with self._changed:
            state = self._states[endpoint]
            state.lost = state.back = False
        allow_calls(endpoint)

    # --- Inside ------------------------------------------------------------------------------------------------------

    def _ask_around(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                while not self._ended and (not self._due or self._due[0][0] > now):
                    self._changed.wait(self._due[0][0] - now if self._due else None)
                    now = time.monotonic()
                if self._ended:
                    return
                _, endpoint = heapq.heappop(self._due)
                state = self._states[endpoint]
                state.asked, number = now, self._number
                left_s = self._timeout_s if state.lost else state.heard + self._timeout_s - now
            self._ask(endpoint, number, now, max(left_s, self._wait_s + AGAIN_S))

    def _ask(self, endpoint: Endpoint, number: int, requested_at: float, timeout_s: float) -> None:
        def hear(said: str | SimulationError) -> None:
            self._hear(endpoint, requested_at, timeout_s, said)

        numbers, until = self._observed
        numbers = numbers if requested_at < until else 0
        heartbeat(endpoint, self._run, number, self._wait_s, timeout_s, numbers, hear)

    def _hear(self, endpoint: Endpoint, requested_at: float, timeout_s: float, said: str | SimulationError) -> None:
        why = ""
        with self._changed:
            state, now = self._states[endpoint], time.monotonic()
            if requested_at != state.asked:
                state.heard = max(state.heard, now if isinstance(said, str) else 0.0)
                return
            beat = HeartbeatReply.from_json(said) if isinstance(said, str) else None
            if isinstance(said, str) and beat is None:
                again_s, why = self._wait_s, "says something that this program does not understand"
            elif beat is not None:
                again_s = self._take_in(state, beat, requested_at, now)
                if beat.incarnation != state.incarnation:
                    state.incarnation = beat.incarnation
                    why = "was restarted without its agents"
            elif now > requested_at + timeout_s + ASLEEP_S:  # this process was suspended, not the server
                state.heard, again_s = now, 0.0
            else:
                state.back = False
                again_s = self._wait_s if state.lost else AGAIN_S
                if str(said).endswith(NOBODY_LISTENS) or not isinstance(said, ServerUnreachable):
                    why = str(said).partition(": ")[2]
                elif now - state.heard >= self._timeout_s:
                    why = f"sent no heartbeat for {now - state.heard:.1f} s"
            heapq.heappush(self._due, (now + again_s, endpoint))
            self._changed.notify_all()
        if why:
            self.mark_down(endpoint, why)

    def _take_in(self, state: _ServerState, beat: HeartbeatReply, requested_at: float, now: float) -> float:
        """Store a reply; return the delay before the next request (seconds; 0 while the server works on the round)."""
        state.beat, state.requested_at, state.heard = beat, requested_at, now
        state.back = state.lost
        self._news = True
        at_work = (each for each in beat.objects.values() if each.round == self._number and not each.finished)
        return 0.0 if any(not each.error for each in at_work) else self._wait_s
