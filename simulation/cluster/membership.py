"""Membership: handles the losses and recoveries of a run's servers."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol, Self, TypeVar

from simulation.cluster.failure_detector import FailureDetector, ServerStatus
from simulation.errors import Interrupted, RunAborted, ServerLost
from simulation.rpc import channels
from simulation.rpc.endpoints import Endpoint
from simulation.rpc.messages import END_RUN, KEEP_RUN
from simulation.settings import SimulationConfig

V = TypeVar("V")

RECOVERY_POLL_S = 0.1  # interval between checks for a recovered server
GATHER_S = 2.0  # if all servers were down: time to wait for further recoveries after the first recovery
LOSSES_IN_ROUND = 3  # a server lost this often in one round is not readmitted: the game may crash it


class ProgressListener(Protocol):
    """The receiver of progress and warnings. `stop_signal` is the number of a signal that ends the run, or None."""

    stop_signal: int | None

    def progress(self, stage: str, done: int, total: int, note: str = "") -> None: ...

    def warn(self, line: str) -> None: ...


class Membership:
    """The servers that take part in one run. The ids of the run's remote objects start with `run`."""

    def __init__(self, config: SimulationConfig, run: str, servers: list[Endpoint], watch: ProgressListener) -> None:
        self.config, self.run, self.watch = config, run, watch
        self.losses: Counter[Endpoint] = Counter()  # number of handled losses by server, in order of the first losses
        self._servers = servers
        self._losses_before: Counter[Endpoint] = Counter()  # `losses` at the start of the round

    def unassign_server(self, endpoint: Endpoint) -> None:
        """Handle the loss of a server and of all objects on this server."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Connect to all servers and start the failure detector. Its first heartbeats announce the run."""
        timeout_s = self.config.connect_timeout
        calls = {each: partial(channels.identify, each, timeout_s) for each in self._servers}
        incarnations = {each: shake.incarnation for each, shake in channels.call_all_or_raise(calls).items()}
        channels.identities.clear()
        self._detector = FailureDetector(self.run, incarnations, self.config.heartbeat_timeout, self.config.lease)
        self._detector.__enter__()
        return self

    def close(self, keep: bool) -> None:
        """Stop the failure detector and end the run. The servers delete the run's agents unless `keep` is True."""
        self._detector.__exit__()
        directives = {KEEP_RUN if keep else END_RUN: self.run}
        call = partial(channels.handshake, timeout_s=self.config.connect_timeout, directives=directives)
        # a server that does not receive this call deletes the agents when their lease expires
        channels.call_all({each: partial(call, each) for each, status in self.status.items() if status.answers})

    @property
    def status(self) -> dict[Endpoint, ServerStatus]:
        """Return the current status of each server."""
        return self._detector.statuses

    def up(self, servers: Iterable[Endpoint]) -> list[Endpoint]:
        """Return the given servers that are up."""
        return [each for each in servers if self.status[each].up]

    def retry_on_server_loss(self, work: Callable[[], V]) -> V:
        """Call `work` and return its result. If a server is lost, mark this server down and call `work` again."""
        while True:
            try:
                return work()
            except ServerLost as error:
                address, _, why = str(error).partition(": ")
                self._detector.mark_down({str(each): each for each in self._servers}[address], why)
                self.handle_losses()

    def handle_losses(self) -> None:
        """Warn of all losses since the previous call, and unassign the lost servers."""
        for endpoint, status in self.status.items():
            if status.losses != self.losses[endpoint]:
                self.losses[endpoint] = status.losses
                self.watch.warn(f"{endpoint} is lost: {status.why}; continuing without it")
                self.unassign_server(endpoint)

    def begin_round(self, number: int) -> None:
        """Start to count the losses of round `number`, and readmit recovered servers."""
        self._losses_before = self.losses.copy()
        recovered = [endpoint for endpoint, status in self.status.items() if status.has_recovered]
        self.handle_losses()
        for endpoint in recovered:
            self._detector.mark_up(endpoint)
            self.watch.warn(f"{endpoint} answers again, and is used from round {number} on")

    def wait_for_servers(self, pool: list[Endpoint], role: str) -> list[Endpoint]:
        """Wait until one or more servers in `pool` are up, and return those. Raises RunAborted or Interrupted."""
        gathered_at: float | None = None
        while not (up := self.up(pool)):
            if self.watch.stop_signal is not None:
                raise Interrupted(self.watch.stop_signal)
            hopeful = [each for each in pool if self.losses[each] - self._losses_before[each] < LOSSES_IN_ROUND]
            if not hopeful:
                raise RunAborted(f"every {role} server was lost {LOSSES_IN_ROUND} times in this round")
            silent_s = min(self.status[each].seconds_since_reply for each in hopeful)
            if silent_s > self.config.heartbeat_timeout:
                why = f"{hopeful[0]} {self.status[hopeful[0]].why}; --resume plays on when servers are up again"
                raise RunAborted(f"no {role} server has answered for {silent_s:.0f} s: {why}")
            recovered = [each for each in hopeful if self.status[each].has_recovered]
            if recovered:
                gathered_at = gathered_at or time.monotonic() + GATHER_S
                if recovered == hopeful or time.monotonic() > gathered_at:
                    self.handle_losses()
                    for endpoint in recovered:
                        self._detector.mark_up(endpoint)
            self._detector.wait(RECOVERY_POLL_S)
        return up
