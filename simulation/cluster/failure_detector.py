"""Heartbeats: which agent servers of a run live, and what its objects there are at. What follows, others decide.

Every server is asked again and again, all at the same time, whatever else main is busy with. A server that works holds
its answer back until its part of the round is done, so the end of a round is heard at once; a beat also renews the
lease of the run. A server counts as lost when nothing listens at its port, when it is another process than before, or
when it was not heard of for the time-out. It is asked on, and may be taken back.
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

WAIT_S = 1.0  # how long a server that works holds its answer back
AGAIN_S = 0.1  # between two tries to reach a server
SERVERS_A_SECOND = 1000  # beats that main can take
BEATS_IN_LEASE = 4
ASLEEP_S = 1.0  # a deadline that is told so late is no sign of anything but that this process was stopped


@dataclass(frozen=True)
class ServerStatus:
    """How a server stands with a run.

    Attributes:
        plays: Whether it has not been lost, or was taken back.
        answers: Whether it answers, lost or not.
        losses: How often it was lost so far.
        why: The last time.
        silent_s: For how long it was not heard of.
        beat: What it said last.
    """

    plays: bool
    answers: bool
    losses: int
    why: str
    seconds_since_reply: float
    beat: HeartbeatReply


@dataclass
class _ServerState:
    """What is known of one server."""

    incarnation: str
    heard: float  # when it last answered
    beat: HeartbeatReply
    requested_at: float = 0.0  # when that beat was asked for
    lost: bool = False
    losses: int = 0  # how often it was lost
    why: str = ""  # the last time
    back: bool = False  # whether it has answered since
    asked: float = 0.0  # when the newest beat was asked for, which alone is followed by another one


class FailureDetector:
    """The heartbeats of the servers of one run, from `with` to its end.

    Args:
        run: The run's remote id.
        incarnations: The servers, and which process each of them is.
        timeout_s: Silence after which a server is lost.
        lease_s: The lease to renew.
    """

    def __init__(self, run: str, incarnations: Mapping[Endpoint, str], timeout_s: float, lease_s: float) -> None:
        self._run = run
        self._timeout_s = timeout_s
        at_most = min(timeout_s, lease_s) / BEATS_IN_LEASE
        self._wait_s = min(max(WAIT_S, len(incarnations) / SERVERS_A_SECOND), at_most)
        now = time.monotonic()
        self._states = {each: _ServerState(name, now, HeartbeatReply(name)) for each, name in incarnations.items()}
        self._due = [(now, endpoint) for endpoint in self._states]  # a heap: when to ask whom
        self._changed = threading.Condition()  # guards all of this
        self._number = 0  # the round that is waited for
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
        """Whether it has not been lost, or was taken back."""
        return not self._states[endpoint].lost

    def has_recovered(self, endpoint: Endpoint) -> bool:
        """Whether it was lost, and answers again."""
        return self._states[endpoint].back

    def seconds_since_reply(self, endpoint: Endpoint) -> float:
        """For how long it was not heard of."""
        return time.monotonic() - self._states[endpoint].heard

    def answers(self, endpoint: Endpoint) -> bool:
        """Whether it answers, lost or not."""
        state = self._states[endpoint]
        return state.back or not state.lost

    def losses(self, endpoint: Endpoint) -> tuple[int, str]:
        """How often it was lost so far, and why the last time."""
        state = self._states[endpoint]
        return state.losses, state.why

    def last(self, endpoint: Endpoint) -> HeartbeatReply:
        """What it said last."""
        return self._states[endpoint].beat

    def status_of(self, endpoint: Endpoint) -> ServerStatus:
        """All of this at once, for those who only look on: nobody waits for them."""
        losses, why = self.losses(endpoint)
        seconds_since_reply, beat = self.seconds_since_reply(endpoint), self.last(endpoint)
        return ServerStatus(self.alive(endpoint), self.answers(endpoint), losses, why, seconds_since_reply, beat)

    def latest(self, endpoint: Endpoint) -> tuple[HeartbeatReply, float]:
        """What it said last, and when that was asked for (time.monotonic). Raises ServerUnreachable if it is lost."""
        with self._changed:
            state = self._states[endpoint]
            if state.lost:
                raise ServerUnreachable(f"{endpoint}: {state.why}")
            return state.beat, state.requested_at

    def wait(self, timeout_s: float) -> None:
        """Wait until a server has said something that has not been looked at, or was lost."""
        with self._changed:
            self._changed.wait_for(lambda: self._news, timeout_s)
            self._news = False

    # --- What is decided elsewhere -----------------------------------------------------------------------------------

    def poll_now(self, number: int) -> None:
        """Ask everyone at once, as they have something new to do: what belongs to this round is waited for."""
        with self._changed:
            self._number = number
            now = time.monotonic()
            self._due = [(now, endpoint) for endpoint in self._states]
            self._changed.notify_all()

    def mark_down(self, endpoint: Endpoint, why: str) -> None:
        """Count a server as lost, until it is taken back; calls to it that are under way end."""
        with self._changed:
            state = self._states[endpoint]
            if state.lost:
                return
            state.lost, state.losses, state.why, state.back = True, state.losses + 1, why, False
            self._news = True
            self._changed.notify_all()
        cancel_calls(endpoint)

    def mark_up(self, endpoint: Endpoint) -> None:
        """Count on a server again that answers again."""
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

        heartbeat(endpoint, self._run, number, self._wait_s, timeout_s, hear)

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
                    why = "has been started anew, without its agents"
            elif now > requested_at + timeout_s + ASLEEP_S:  # it was this process that was not heard of
                state.heard, again_s = now, 0.0
            else:
                state.back = False
                again_s = self._wait_s if state.lost else AGAIN_S
                if str(said).endswith(NOBODY_LISTENS) or not isinstance(said, ServerUnreachable):
                    why = str(said).partition(": ")[2]
                elif now - state.heard >= self._timeout_s:
                    why = f"was not heard of for {now - state.heard:.1f} s"
            heapq.heappush(self._due, (now + again_s, endpoint))
            self._changed.notify_all()
        if why:
            self.mark_down(endpoint, why)

    def _take_in(self, state: _ServerState, beat: HeartbeatReply, requested_at: float, now: float) -> float:
        """Note what a server says; returns when to ask again: at once where it works."""
        state.beat, state.requested_at, state.heard = beat, requested_at, now
        state.back = state.lost
        self._news = True
        at_work = (each for each in beat.objects.values() if each.round == self._number and not each.finished)
        return 0.0 if any(not each.error for each in at_work) else self._wait_s
