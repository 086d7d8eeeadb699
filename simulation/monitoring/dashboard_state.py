"""The JSON state that the dashboard shows for a run, computed from the run object and the latest heartbeats.

Nothing here blocks the run or acquires its locks, so the numbers in one state may differ slightly in age.
"""

import time
from collections import Counter
from dataclasses import asdict, replace
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from simulation.cluster.failure_detector import ServerStatus
from simulation.game.answer_sheet import BINS, bins_of
from simulation.results.console_report import histogram
from simulation.results.run_files import most_frequent, round_entry
from simulation.rpc.endpoints import Endpoint, GroupAssignment
from simulation.rpc.messages import Progress
from simulation.runs.console import Stage

if TYPE_CHECKING:
    from simulation.runs.run import Run

SILENT_S = 3.0  # a server whose last reply is older is shown as silent; servers normally reply every second
ANSWERS = "answers in"  # the stage in which main waits for answers
STATES = ("plays", "silent", "lost", "back")  # of servers during a run
FINE = ("plays", "ended")  # states of servers without trouble, before and after the end of the run
SERVERS_LISTED = 64  # if there are more servers, the page shows a grid, and rows for some failing servers only
TROUBLED_LISTED = 16  # maximum number of failing servers with a row, below the grid
GRID_CELLS = 4096  # maximum number of servers in the grid


class DashboardState:
    """The dashboard state of one run, during the run and after its end."""

    def __init__(self, run: "Run") -> None:
        self.run = run
        self.over = False  # True after the end of the run: the state no longer changes
        self._rounds: list[dict[str, Any]] = []  # the finished rounds, as in summary.json
        self._bars: list[int] = []  # histogram of the last finished round
        self._progress: dict[str, Progress] = {}  # by remote id; contains the latest histogram of each group

    def state(self, stage: Stage | None) -> dict[str, Any]:
        """Return the JSON state, which has a bounded size. `stage` is the progress of the latest stage, if any."""
        run, simulation, config, game = self.run, self.run.simulation, self.run.config, self.run.game
        # Read the results first: they then contain no round later than the current one
        results, (started, began) = list(run.results), run.under_way
        number = None if self.over or started <= len(results) or simulation is None else started
        for result in results[len(self._rounds) :]:
            _, bars = histogram(result.tally, game.lowest, game.lowest + game.numbers - 1, BINS)
            self._bars = bars.tolist()
            entry = round_entry(result, game.scale)
            del entry["failures"]  # the page shows those of all rounds together
            self._rounds = [*self._rounds, entry]
        statuses = simulation.cluster.observe() if simulation is not None else {}
        assignments = simulation.cluster.active_assignments if simulation is not None else []
        usage = simulation.usage if simulation is not None and not self.over else run.usage
        reassigned = simulation.reassigned if simulation is not None else 0
        self._update_progress(statuses)
        current = [each for each in self._progress.values() if each.round == number and each.counts]
        failures: Counter[str] = Counter()
        for causes in (*(result.tally.failures for result in results), *(each.failures for each in current)):
            failures.update(causes)
        done = stage.done if stage is not None and stage.name == ANSWERS and stage.began >= began else 0
        failed = min(sum(sum(each.failures.values()) for each in current), done)  # of the outcomes that are in
        progress = {"number": number, "done": done, "failed": failed, "seconds": time.monotonic() - began}
        return {
            "run_id": run.run_id,
            "label": run.spec.label,
            "config": {
                **{name: getattr(config, name) for name in ("participant_num", "rounds", "decimals")},
                **{"low": game.low, "high": game.high, "goal": game.words.goal, "labels": dict(game.words.labels)},
                "kind": ", ".join(kind.label for kind in config.kinds),
                "seed": str(config.seed) if not config.uses_models else None,  # too many digits for JavaScript
            },
            "round": number and progress | {"reassigned": reassigned},
            "rounds": self._rounds,
            "distribution": {**self._distribution(number, current), "groups": len(assignments)},
            "failures": list(most_frequent(dict(failures)).items()),
            "llm": asdict(usage) if config.uses_models else None,
            "servers": self._servers(statuses, assignments, started) if statuses else None,
        }

    def _update_progress(self, statuses: dict[Endpoint, ServerStatus]) -> None:
        known, self._progress = self._progress, {}
        for reply in (status.reply for status in statuses.values() if status.up):
            for oid, progress in reply.objects.items():
                before = known.get(oid, progress)
                if progress.counts or before.round != progress.round:
                    self._progress[oid] = progress
                else:  # the new reply contains no histogram yet
                    self._progress[oid] = replace(progress, counts=before.counts, failures=before.failures)

    def _distribution(self, number: int | None, current: list[Progress]) -> dict[str, Any]:
        """Return the histograms of the current and the previous round. Between rounds, return only the last round's."""
        game = self.run.game
        width, bins = bins_of(game.numbers)
        counts = [sum(each) for each in zip([0] * bins, *(each.counts for each in current), strict=True)]
        return {
            "width": width,
            "scale": game.scale,
            "low": game.lowest,
            "top": game.lowest + game.numbers - 1,
            "round": number or len(self._rounds),
            "counts": counts if number else self._bars or counts,
            "last": self._bars if number else [],
            "reported": len(current),
        }

    def _servers(
        self, statuses: dict[Endpoint, ServerStatus], assignments: list[GroupAssignment], started: int
    ) -> dict[str, Any]:
        """Return a grid of all servers, and a row for each. Over SERVERS_LISTED, only some failing ones get a row."""
        done = {oid: each.done for oid, each in self._progress.items() if each.round == started}
        hosted: Counter[Endpoint | None] = Counter()  # number of participants that a server hosts or moderates
        for assignment in assignments:
            for each in (assignment.server, assignment.moderator_server):
                hosted[each] += assignment.count
        outcomes = {each: sum(done.get(oid, 0) for oid in status.reply.objects) for each, status in statuses.items()}
        rows = [self._row(each, status, hosted[each], outcomes[each]) for each, status in statuses.items()]
        troubled = [row for row in rows if row["state"] not in FINE]
        listed = rows if len(rows) <= SERVERS_LISTED else troubled[:TROUBLED_LISTED]
        return {"states": Counter(row["state"] for row in rows), "rows": listed, "grid": _grid(rows)}

    def _row(self, endpoint: Endpoint, status: ServerStatus, hosts: int, done: int) -> dict[str, Any]:
        config, (state, why) = self.run.config, state_of(status, self.over)
        participants = endpoint.port < config.base_port + config.server_per_host
        return {
            "host": endpoint.host,
            "port": endpoint.port,
            "participants": participants,  # True: the server hosts participants; False: moderators
            "state": state,
            "why": why,
            "losses": status.losses,
            "hosts": hosts,
            "done": None if self.over else done,  # outcomes; at the end, the page shows the counts of all servers
            "cpu": status.reply.cpu if status.up and not self.over else None,
            "memory_mb": status.reply.memory_mb if status.up else None,
        }


def state_of(status: ServerStatus, over: bool = False) -> tuple[str, str]:
    """Return the state of a server, one of STATES or "ended", and its cause. `over`: the run has ended."""
    if not status.up:
        return "back" if status.answers else "lost", status.why
    if not over and status.seconds_since_reply > SILENT_S:
        return "silent", f"no reply for {status.seconds_since_reply:.0f} s"
    return "ended" if over else "plays", ""


def _grid(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return an entry for each host and kind of server, with the totals of its servers.

    `states` has a letter for each server, the first of its state. `done` has a digit for each server, from 0 if none of
    its participants has answered or failed to 9 if all have. Both omit servers after the first GRID_CELLS.
    """
    grid, left = [], GRID_CELLS
    for (host, participants), group in groupby(rows, itemgetter("host", "participants")):
        servers = list(group)
        drawn, left = servers[:left], max(left - len(servers), 0)
        shares = (9 * (row["done"] or 0) // max(row["hosts"], 1) for row in drawn)
        grid.append(
            {
                "host": host,
                "participants": participants,
                "port": servers[0]["port"],
                "servers": len(servers),
                "trouble": sum(row["state"] not in FINE for row in servers),
                **{name: sum(row[name] or 0 for row in servers) for name in ("hosts", "cpu", "memory_mb")},
                "states": "".join(row["state"][0] for row in drawn),
                "done": "".join(str(min(share, 9)) for share in shares),
            }
        )
    return grid
