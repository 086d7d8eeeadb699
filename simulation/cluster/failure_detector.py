"""Failure detector: detects which agent servers of a run are alive, and collects the progress of their objects.

A server delays its reply until its participants finish the round, at most about WAIT_S seconds, so main learns of that
at once. A server is marked down if its port is closed or another program's, if its process was replaced, or if no reply
arrives within the heartbeat timeout.
"""

import heapq
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from simulation.errors import ServerUnreachable, SimulationError
from simulation.rpc.channels import NOBODY_LISTENS, given_up, heartbeat
from simulation.rpc.endpoints import Endpoint
from simulation.rpc.messages import HeartbeatReply

WAIT_S = 1.0  # longest delay of a busy server's reply, with up to SERVERS_A_SECOND servers
AGAIN_S = 0.1  # retry interval for an unreachable server
SERVERS_A_SECOND = 1000  # heartbeats per second that main can process
POLLS_IN_LEASE = 4  # minimum number of polls per lease or heartbeat timeout
OBSERVED_S = 5.0  # seconds after `observe` in which heartbeats request histograms; a dashboard calls it more often
ASLEEP_S = 1.0  # if a timeout error arrives this long after its deadline, this process was suspended


@dataclass(frozen=True)
class ServerStatus:
    """The status of a server in a run. A change replaces the whole object, so readers need no lock."""

    reply: HeartbeatReply  # the latest heartbeat reply
    replied_at: float  # time of the latest reply to any request (time.monotonic)
    requested_at: float = 0.0  # when `reply` was requested (time.monotonic)
    up: bool = True  # False from `mark_down` until `mark_up`
    answers: bool = True  # whether the server answers heartbeats, even if it is marked down
    losses: int = 0  # how often the server was marked down
    why: str = ""  # cause of the latest loss

    @property
    def has_recovered(self) -> bool:
        return self.answers and not self.up

    @property
    def seconds_since_reply(self) -> float:
        return time.monotonic() - self.replied_at


class FailureDetector:
    """The failure detector of one run. While this context manager is open, a thread polls the servers."""

    def __init__(self, run: str, incarnations: Mapping[Endpoint, str], timeout_s: float, lease_s: float) -> None:
        self._run, self._lease_s, self._count = run, lease_s, len(incarnations)
        self._use_timeout(timeout_s)
        self._changes: dict[str, Any] = {}  # see `change`
        now = time.monotonic()
        self.statuses = {each: ServerStatus(HeartbeatReply(name), now) for each, name in incarnations.items()}
        self._due = [(now, endpoint) for endpoint in incarnations]  # a heap of (time of the next request, server)
        self._newest = dict.fromkeys(incarnations, 0.0)  # time of the latest request, to detect old replies
        self._changed = threading.Condition()  # guards all mutable state
        self._round = 0
        self._observed = (0, 0.0)  # number of possible answers, and until when to request histograms (time.monotonic)
        self._news = self._ended = False
        self._thread = threading.Thread(target=self._poll, name="heartbeats", daemon=True)

    def __enter__(self) -> "FailureDetector":
        given_up.difference_update(self.statuses)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    def wait(self, timeout_s: float) -> None:
        """Wait until a reply or a loss has been recorded since the previous call, but at most `timeout_s` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._news, timeout_s)
            self._news = False

    def observe(self, numbers: int) -> None:
        """Request a partial histogram with each heartbeat for OBSERVED_S seconds. `numbers` answers are possible."""
        self._observed = (numbers, time.monotonic() + OBSERVED_S)

    def change(self, timeout_s: float, changes: dict[str, Any]) -> None:
        """Use another timeout, and send `changes`, the arguments of `ParticipantGroup.change`, with all heartbeats."""
        self._changes = changes
        self._use_timeout(timeout_s)
        self.poll_now(self._round)

    def _use_timeout(self, timeout_s: float) -> None:
        self._timeout_s, in_lease_s = timeout_s, min(timeout_s, self._lease_s) / POLLS_IN_LEASE
        self._wait_s = min(max(WAIT_S, self._count / SERVERS_A_SECOND), in_lease_s)

    def poll_now(self, number: int) -> None:
        """Poll all servers now, at the start of round `number`. Servers that work on this round delay their replies."""
        with self._changed:
            self._round = number
            self._due = [(time.monotonic(), endpoint) for endpoint in self.statuses]
            self._changed.notify_all()

    def mark_down(self, endpoint: Endpoint, why: str) -> None:
        """Mark a server down until `mark_up` is called, and cancel all calls to it. `why` is the cause of the loss."""
        with self._changed:
            status = self.statuses[endpoint]
            if not status.up:
                return
            self.statuses[endpoint] = replace(status, up=False, answers=False, losses=status.losses + 1, why=why)
            self._news = True
            self._changed.notify_all()
        given_up.add(endpoint)

    def mark_up(self, endpoint: Endpoint) -> None:
        """Mark a recovered server up and allow calls to it."""
        with self._changed:
            self.statuses[endpoint] = replace(self.statuses[endpoint], up=True, answers=True)
        given_up.discard(endpoint)

    def _poll(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                while not self._ended and (not self._due or self._due[0][0] > now):
                    self._changed.wait(self._due[0][0] - now if self._due else None)
                    now = time.monotonic()
                if self._ended:
                    return
                _, endpoint = heapq.heappop(self._due)
                status, number = self.statuses[endpoint], self._round
                self._newest[endpoint] = now
                left_s = status.replied_at + self._timeout_s - now if status.up else self._timeout_s
            timeout_s = max(left_s, self._wait_s + AGAIN_S)
            numbers, until = self._observed
            request = [self._run, number, self._wait_s, numbers if now < until else 0, self._changes]
            heartbeat(endpoint, request, timeout_s, partial(self._receive, endpoint, now, timeout_s))

    def _receive(
        self, endpoint: Endpoint, requested_at: float, timeout_s: float, reply: HeartbeatReply | SimulationError
    ) -> None:
        why, again_s = "", self._wait_s
        with self._changed:
            status, now = self.statuses[endpoint], time.monotonic()
            is_newest = requested_at == self._newest[endpoint]
            if isinstance(reply, HeartbeatReply):
                if is_newest:
                    if reply.incarnation != status.reply.incarnation:
                        why = "was restarted without its agents"
                    if reply.is_working_on(self._round):
                        again_s = 0.0
                    status = replace(status, reply=reply, requested_at=requested_at, answers=True)
                    self._news = True
                status = replace(status, replied_at=now)
            elif is_newest and now > requested_at + timeout_s + ASLEEP_S:  # this process was suspended, not the server
                status, again_s = replace(status, replied_at=now), 0.0
            elif is_newest:
                status, again_s = replace(status, answers=status.up), AGAIN_S if status.up else self._wait_s
                if str(reply).endswith(NOBODY_LISTENS) or not isinstance(reply, ServerUnreachable):
                    why = str(reply).removeprefix(f"{endpoint}").lstrip(": ")
                elif status.seconds_since_reply >= self._timeout_s:
                    why = f"sent no heartbeat for {status.seconds_since_reply:.1f} s"
            self.statuses[endpoint] = status
            if is_newest:
                heapq.heappush(self._due, (now + again_s, endpoint))
                self._changed.notify_all()
        if why:
            self.mark_down(endpoint, why)
