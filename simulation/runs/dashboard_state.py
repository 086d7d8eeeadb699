"""The state of a run that the dashboard shows, from this process's objects and from snapshots of the groups.

Nothing here blocks the run or takes its locks, so figures in one state may differ slightly in age.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any

from simulation.agents.snapshot import BINS, RoundSnapshot, bins_of
from simulation.cluster.failure_detector import ServerStatus
from simulation.cluster.rounds import Simulation
from simulation.errors import Ended
from simulation.game.tally import RoundResult
from simulation.results.console_report import histogram
from simulation.results.run_directory import most_frequent
from simulation.rpc.endpoints import Endpoint, GroupAssignment
from simulation.runs.console import Stage
from simulation.runs.dashboard_sampler import DashboardSampler
from simulation.runs.run import Run

SILENT_S = 3.0  # a server without a reply for this long is shown as silent; normally it replies every second
RATE_S = 3.0  # averaging window of the answer rate
SERVERS_TOLD = 64  # up to this many servers get a row each; more get a grid, and rows for some of those in trouble
TROUBLED_TOLD = 16
GRID_CELLS = 4096


class DashboardState:
    """Dashboard state of one run, live and after its end."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sampler = DashboardSampler()
        self._over = False
        self._rounds: list[dict[str, Any]] = []  # finished rounds, as the page gets them
        self._bars: list[int] = []  # histogram of the last finished round
        self._done: deque[tuple[float, int]] = deque()  # (time, answers so far), current round
        self._number = 0

    def end(self) -> None:
        """Mark the run as ended: its state no longer changes."""
        self._over = True

    def look(self) -> None:
        """Sample the groups; see DashboardSampler."""
        simulation = self.run.simulation
        if simulation is not None and not self._over:
            self.sampler.look(simulation.cluster.statuses(), self.run.game.numbers)

    # --- The state ---------------------------------------------------------------------------------------------------

    def state(self, stage: Stage | None) -> dict[str, Any]:
        """Return everything the page shows of the run, of bounded size; `stage` is the latest progress."""
        run, simulation = self.run, self.run.simulation
        results, begun = list(run.results), run.under_way[0]  # in this order: a finished round is not current
        number = None if self._over or begun <= len(results) else begun
        self._tell_rounds(results)
        if number != self._number:
            self._number = number or 0
            self._done.clear()
        assignments = (
            [assignment for assignment in simulation.cluster.assignments if assignment.server is not None]
            if simulation
            else []
        )
        glances = [*self.sampler.glances.items()]  # copied, as `look` runs in another thread
        playing = {assignment.oid for assignment in assignments}
        current = {oid: each for oid, each in glances if number is not None and each.round == number}
        in_play = {oid: each for oid, each in current.items() if oid in playing or each.counts}
        usage = simulation.usage if simulation is not None and not self._over else run.usage
        return {
            "run_id": run.run_id,
            "label": run.label,
            "config": self._settings(),
            "round": self._round(number, stage, in_play, simulation),
            "rounds": self._rounds,
            "distribution": self._distribution(number, in_play, self._counting(assignments)),
            "failures": _failures(results, in_play),
            "llm": _told_usage(usage) if run.config.agent_type == "llm" else None,
            "servers": self._servers(simulation, assignments, current, begun) if simulation is not None else None,
        }

    def _settings(self) -> dict[str, Any]:
        config, game = self.run.config, self.run.game
        kind = config.agent_type if config.agent_class is None else config.agent_class.rpartition(":")[2]
        return {
            "participants": config.participant_num,
            "rounds": config.rounds,
            "max_value": config.max_value,
            "decimals": config.decimals,
            "kind": kind,
            "target": game.target,
            "seed": str(config.seed) if config.agent_type != "llm" else None,  # too many digits for JavaScript
        }

    def _tell_rounds(self, results: list[RoundResult]) -> None:
        """Append the rounds finished since the last call; a finished round does not change."""
        scale = self.run.game.scale
        for result in results[len(self._rounds) :]:
            _, bars = histogram(result.tally.units, result.tally.counts, self.run.game.numbers - 1, BINS)
            self._bars = bars.tolist()
            told = {
                "round": result.round,
                "answered": result.tally.answered,
                "failed": result.tally.failed,
                "interrupted": result.tally.ended is Ended.INTERRUPTED,
                "reassigned": result.reassigned,
                "average": None if result.average is None else float(result.average / scale),
                "winning_number": None if result.winning_number is None else float(result.winning_number / scale),
                "winners": result.winners.count,
                "first_winners": [f"P{index}" for index in result.winners.lowest[:3]],
                "seconds": result.seconds,
            }
            self._rounds = [*self._rounds, told]

    def _round(
        self, number: int | None, stage: Stage | None, glances: dict[str, RoundSnapshot], simulation: Simulation | None
    ) -> dict[str, Any] | None:
        if number is None or simulation is None:
            return None
        now, began = time.monotonic(), self.run.under_way[1]
        heard = stage.done if stage is not None and stage.name == "answers in" and stage.began >= began else 0
        done = max(heard, sum(each.done for each in glances.values()))
        if self._done and done < self._done[-1][1]:  # a server was lost together with its answers
            self._done.clear()
        self._done.append((now, done))
        while len(self._done) > 2 and now - self._done[0][0] > RATE_S:
            self._done.popleft()
        (since, before), span = self._done[0], now - self._done[0][0]
        return {
            "number": number,
            "done": done,
            "total": self.run.config.participant_num,
            "rate": (done - before) / span if span > 0 and since > 0 else None,
            "seconds": now - began,
            "reassigned": simulation.reassigned,
        }

    def _distribution(self, number: int | None, glances: dict[str, RoundSnapshot], groups: int) -> dict[str, Any]:
        """Return the histogram of the current round, or of the last finished round if none is in progress."""
        width, bins = bins_of(self.run.game.numbers)
        told = {"width": width, "scale": self.run.game.scale, "top": self.run.game.numbers - 1}
        if number is None:
            return told | {"round": len(self._rounds), "counts": self._bars, "last": [], "glanced": 0, "groups": 0}
        value_counts = [each.counts for each in glances.values() if len(each.counts) == bins]
        counts = [sum(bin_) for bin_ in zip(*value_counts, strict=True)] if value_counts else [0] * bins
        return told | {
            "round": number,
            "counts": counts,
            "last": self._bars,
            "glanced": len(value_counts),
            "groups": groups,
        }

    def _counting(self, assignments: list[GroupAssignment]) -> int:
        """Return how many objects count answers in a round: groups, or moderators with per-agent dispatch."""
        return (
            len({assignment.moderator_server for assignment in assignments})
            if self.run.config.dispatch == "agent"
            else len(assignments)
        )

    # --- Servers -----------------------------------------------------------------------------------------------------

    def _servers(
        self, simulation: Simulation, assignments: list[GroupAssignment], glances: dict[str, RoundSnapshot], number: int
    ) -> dict[str, Any]:
        """Return a row for each server; above SERVERS_TOLD a grid, and rows for some servers in trouble."""
        hosted: Counter[Endpoint] = Counter()  # participants by participant server and by moderator server
        for assignment in assignments:
            assert assignment.server is not None
            hosted[assignment.server] += assignment.count
            hosted[assignment.moderator_server] += assignment.count
        statuses = simulation.cluster.statuses()
        counting = {
            oid: max(progress.done if progress.round == number else 0, glances[oid].done if oid in glances else 0)
            for status_of, _ in statuses.values()
            for oid, progress in status_of.beat.objects.items()
        }
        answered: Counter[Endpoint] = Counter()
        one_by_one = self.run.config.dispatch == "agent"
        for assignment in assignments:
            assert assignment.server is not None
            answered[assignment.server] += counting.get(assignment.oid, 0)
            answered[assignment.moderator_server] += counting.get(assignment.oid, 0)
        rows = []
        for endpoint, (status_of, answers) in statuses.items():
            if one_by_one:
                done = None if answers else sum(counting[oid] for oid in status_of.beat.objects)
            else:
                done = answered[endpoint]
            rows.append(self._row(endpoint, status_of, answers, hosted[endpoint], done))
        states = Counter(row["state"] for row in rows)
        told: dict[str, Any] = {"number": len(rows), "states": states, "rows": rows, "grid": None}
        if len(rows) > SERVERS_TOLD:
            troubled = [row for row in rows if row["state"] != "plays"]
            told |= {"rows": troubled[:TROUBLED_TOLD], "grid": _grid(rows)}
        return told

    def _row(
        self, endpoint: Endpoint, status_of: ServerStatus, participants: bool, hosts: int, answered: int | None
    ) -> dict[str, Any]:
        mute = self.sampler.mute.get(endpoint, "")
        state, why = "plays", ""
        if not status_of.plays:
            state, why = ("back" if status_of.answers else "lost"), status_of.why
        elif not self._over and status_of.seconds_since_reply > SILENT_S:
            state, why = "silent", f"not heard of for {status_of.seconds_since_reply:.0f} s"
        elif not self._over and mute:
            state, why = "silent", f"its figures are old: {mute}"
        load = self.sampler.loads.get(endpoint) if status_of.plays else None
        return {
            "host": endpoint.host,
            "port": endpoint.port,
            "participants": participants,
            "state": state,
            "why": why,
            "losses": status_of.losses,
            "hosts": hosts,
            "answered": answered,
            "cpu": None if load is None or self._over else load.cpu,
            "memory_mb": None if load is None else load.memory_mb,
        }


def _failures(results: list[RoundResult], glances: dict[str, RoundSnapshot]) -> list[tuple[str, int]]:
    """Return the failures of all rounds so far, most frequent causes first."""
    failures: Counter[str] = Counter()
    for result in results:
        failures.update(result.tally.failures)
    for snapshot in glances.values():
        failures.update(snapshot.failures)
    return list(most_frequent(dict(failures)).items())


def _grid(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the totals by host and kind of server, and for each of the first GRID_CELLS servers two characters:
    the first letter of its state, and a digit from 0 to 9 for the share of its participants that are done.
    """
    grid: dict[tuple[str, bool], dict[str, Any]] = {}
    for place, row in enumerate(rows):
        key = (row["host"], row["participants"])
        first = {name: row[name] for name in ("host", "participants", "port")}
        sums = {"servers": 0, "trouble": 0, "hosts": 0, "cpu": 0.0, "memory_mb": 0.0}
        told = grid.setdefault(key, {**first, **sums, "states": "", "done": ""})
        told["servers"] += 1
        told["trouble"] += row["state"] != "plays"
        for name in ("hosts", "cpu", "memory_mb"):
            told[name] += row[name] or 0
        if place < GRID_CELLS:
            told["states"] += row["state"][0]
            told["done"] += str(min(9 * (row["answered"] or 0) // max(row["hosts"], 1), 9))
    return list(grid.values())


def _told_usage(usage: Any) -> dict[str, int]:
    return {name: getattr(usage, name) for name in ("requests", "retries", "prompt_tokens", "completion_tokens")}
