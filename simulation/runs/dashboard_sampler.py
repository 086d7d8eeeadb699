"""Sampling of the groups and moderators of a run for the dashboard, by short calls with bounded concurrency.

This module limits the rate: no server spends more than `SHARE` of its time on snapshots. The caller decides when to
sample at all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from moderator import Moderator
from simulation.agents.group import ParticipantGroup
from simulation.agents.snapshot import RoundSnapshot
from simulation.cluster.failure_detector import ServerStatus
from simulation.errors import AgentNotFound, ServerLost, SimulationError
from simulation.rpc.channels import call_all
from simulation.rpc.client import RemoteObject
from simulation.rpc.endpoints import Endpoint

LOOK_S = 1.0  # minimum time between two snapshots of a group
GLANCES_AT_ONCE = 8
GLANCES_A_LOOK = 24  # snapshots per `look`, the least recent first; a call costs this process half a millisecond
DEADLINE_S = 1.0
SHARE = 0.005


@dataclass
class Load:
    """CPU and memory use of a server process; `cpu` is its share of a core, known from the second snapshot on."""

    cpu_s: float
    clock_s: float
    memory_mb: float
    cpu: float | None = None


class DashboardSampler:
    """Sampler that holds the latest snapshots and loads."""

    def __init__(self) -> None:
        self.glances: dict[str, RoundSnapshot] = {}  # by remote id of the group or moderator
        self.loads: dict[Endpoint, Load] = {}
        self.mute: dict[Endpoint, str] = {}  # servers whose last snapshot failed, with the error
        self.pause_s = LOOK_S  # minimum time until the next `look`
        self._looked: dict[str, float] = {}  # time of the last attempt (time.monotonic), by remote id
        self._proxies: dict[str, RemoteObject] = {}

    def look(self, statuses: dict[Endpoint, tuple[ServerStatus, bool]], numbers: int) -> None:
        """Take snapshots of the least recently sampled groups and moderators; blocks on unresponsive servers.

        Args:
            statuses: The status of each server, and whether it is a participant server.
            numbers: Number of different possible answers.
        """
        where = {
            oid: (endpoint, ParticipantGroup if participants else Moderator)
            for endpoint, (status_of, participants) in statuses.items()
            if status_of.plays
            for oid in status_of.beat.objects
        }
        chosen = sorted(where, key=lambda oid: self._looked.get(oid, 0.0))[:GLANCES_A_LOOK]
        now = time.monotonic()
        self._looked = {oid: at for oid, at in self._looked.items() if oid in where} | dict.fromkeys(chosen, now)
        self._proxies = {oid: proxy for oid, proxy in self._proxies.items() if oid in where}
        for oid in chosen:
            if oid not in self._proxies:
                endpoint, kind = where[oid]
                self._proxies[oid] = RemoteObject(kind, oid, endpoint, DEADLINE_S)
        calls = {oid: partial(self._proxies[oid].snapshot, numbers) for oid in chosen}
        glances, errors = call_all(calls, GLANCES_AT_ONCE)
        costs = dict.fromkeys(statuses, 0.0)
        for oid, snapshot in glances.items():
            endpoint = where[oid][0]
            self.mute.pop(endpoint, None)
            self._note_load(endpoint, snapshot)
            costs[endpoint] += snapshot.took_s
        for oid, error in errors.items():
            if not isinstance(error, AgentNotFound):  # then it was replaced in the meantime
                self.mute[where[oid][0]] = _without_address(error)
        self.glances = {oid: snapshot for oid, snapshot in self.glances.items() if oid in where} | glances
        self.pause_s = max(LOOK_S, max(costs.values(), default=0.0) / SHARE)

    def _note_load(self, endpoint: Endpoint, snapshot: RoundSnapshot) -> None:
        load = self.loads.get(endpoint)
        if load is None or snapshot.cpu_s < load.cpu_s:  # another process: the server was restarted
            self.loads[endpoint] = Load(snapshot.cpu_s, snapshot.clock_s, snapshot.memory_mb)
        elif snapshot.clock_s - load.clock_s >= LOOK_S / 2:  # skip other groups sampled in the same `look`
            cpu = (snapshot.cpu_s - load.cpu_s) / (snapshot.clock_s - load.clock_s)
            self.loads[endpoint] = Load(snapshot.cpu_s, snapshot.clock_s, snapshot.memory_mb, cpu)


def _without_address(error: SimulationError) -> str:
    text = str(error)
    return text.partition(": ")[2] if isinstance(error, ServerLost) else text
