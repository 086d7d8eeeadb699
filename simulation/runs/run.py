"""One run on ready servers: play the rounds, and print and write each before the next begins."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Protocol

from loguru import logger

from simulation.cluster.agent_class import load_agent_class
from simulation.cluster.preflight import check_cluster, check_models
from simulation.cluster.rounds import Simulation
from simulation.errors import (
    ClusterError,
    Ended,
    Interrupted,
    ResultsError,
    RunAborted,
    ServerLost,
    SettingsError,
    SimulationError,
    say,
)
from simulation.game.rules import Game
from simulation.game.tally import announcement_of
from simulation.llm.usage import Usage
from simulation.results.console_report import announcement_lines, failure_line, histogram_lines, usage_line
from simulation.results.reader import SavedRun
from simulation.results.run_directory import RunDirectory
from simulation.results.run_files import summarise
from simulation.rpc.endpoints import GroupAssignment, remote_run
from simulation.runs.console import ConsoleProgress
from simulation.settings import SimulationConfig

LOST_SHOWN = 1000  # maximum number of lost servers listed in summary.json


class RunObserver(Protocol):
    """Observer of runs, one after another. It only reads from a run, and must not block it or make it fail."""

    def observe(self, run: Run) -> AbstractContextManager[None]:
        """Return a context manager that observes a run; exceptions of the run propagate through it."""


class Run:
    """A run, its results so far, and its run directory.

    Args:
        config: The settings.
        run_id: Id of the run.
        directory: The run directory.
        watch: Progress listener; also carries the stop signal.
        draw: Draws the pictures and the report of the run.
        game: The game.
        played: The run as saved, if it is resumed.
        observer: Additional observer, such as the dashboard.
        label: Distinguishes the run from others of the same experiment.
    """

    def __init__(
        self,
        config: SimulationConfig,
        run_id: str,
        directory: RunDirectory,
        watch: ConsoleProgress,
        draw: Callable[[SavedRun], None],
        game: Game,
        played: SavedRun | None = None,
        observer: RunObserver | None = None,
        label: str = "",
    ) -> None:
        self.config = config
        self.run_id = run_id
        self.directory = directory
        self.watch = watch
        self.game = game
        self.results = list(played.results) if played is not None else []
        self.usage = played.usage if played is not None else Usage()
        self.simulation: Simulation | None = None  # set once the servers are ready
        self.under_way = (0, 0.0)  # the last started round, and its start (time.monotonic)
        self.status: str | None = None  # as last written to summary.json
        self.ended_early: str | None = None  # the reason, if not a signal
        self.seconds = dict.fromkeys(("connect", "create", "rounds", "total"), 0.0)
        self.cluster: dict[str, Any] = {"hosts": list(config.hosts), "servers": 0, "moderators": 0, "lost": []}
        self.cluster["times"] = []  # by round, where known
        self.label = label
        self._position = played.position if played is not None else directory.position
        self._draw = draw
        self._onlooker = observer
        self._resumed = played is not None
        if played is not None:
            self.seconds |= played.summary["seconds"]
            self.cluster = played.summary["cluster"] | {"hosts": list(config.hosts)}
            self.cluster["times"] = [each for each in self.cluster["times"] if each["round"] <= len(self.results)]
        self._lost_before: list[str] = self.cluster["lost"]
        self._began = time.monotonic() - self.seconds["total"]

    @property
    def to_play(self) -> range:
        """Return the numbers of the rounds that remain."""
        return range(len(self.results) + 1, self.config.rounds + 1)

    def play(self) -> int:
        """Play the remaining rounds and write the results, also before an error propagates; returns the exit status."""
        with contextlib.nullcontext() if self._onlooker is None else self._onlooker.observe(self):
            return self._play()

    def _play(self) -> int:
        if self._resumed:
            logger.info(f"run {self.run_id} has played {len(self.results)} of {self.config.rounds} rounds")
        if not self.to_play:
            return self._finish()
        began = time.monotonic()
        servers = check_cluster(self.config)
        self.seconds["connect"] = time.monotonic() - began
        self.cluster["servers"] = len(servers) - len(self.config.hosts) * self.config.moderator_per_host
        if self._resumed:  # not earlier: if no round can be played, the folder stays unchanged
            self._write("interrupted")  # first, so that the summary never refers to deleted answers
            self.directory.go_back_to(len(self.results))
        if self.config.agent_type != "llm":  # the seed does not determine the answers of a model server
            logger.info(f"seed {self.config.seed}; --seed {self.config.seed} plays this game again")
        played = tuple(announcement_of(each, self.game.scale) for each in self.results)
        run = remote_run(self.run_id, secrets.token_hex(2))
        simulation = Simulation(self.config, self.game, run, self.watch, self.directory, played, self.usage)
        try:
            with simulation:
                self.simulation = simulation
                self._create(simulation)
                self._write("interrupted")  # the status if this process is killed from now on
                for number in self.to_play:
                    self._play_round(simulation, number)
                    self._look_after_models(simulation)
                    if self.watch.stop_signal is not None or self.ended_early is not None:
                        break
                if self.config.keep_agents:
                    self.directory.write_agents(
                        [_agents_in(assignment) for assignment in simulation.cluster.active_assignments]
                    )
        except SimulationError as error:
            self.usage = simulation.usage
            if self.results or isinstance(error, (RunAborted, Interrupted)):
                self._write_what_there_is(simulation, error)
            raise
        return self._finish()

    def _write_what_there_is(self, simulation: Simulation, cause: SimulationError) -> None:
        """Write the results after an early end. Raises ResultsError only if the cause is RunAborted or Interrupted."""
        try:
            self._note_losses(simulation)
            self.directory.join_answers()
            self._report(self._write("interrupted" if isinstance(cause, Interrupted) else "failed"))
        except ResultsError as error:
            if isinstance(cause, (RunAborted, Interrupted)):
                raise ResultsError(f"{error}; the game had ended: {cause}") from None
            if not isinstance(cause, ResultsError):  # otherwise it is the same disk error
                logger.warning(str(error))

    def _create(self, simulation: Simulation) -> None:
        config = self.config
        kind = (
            config.agent_type
            if config.agent_class is None
            else load_agent_class(config.agent_class, config.agent_type).__name__
        )
        self.cluster["moderators"] = simulation.moderator_num
        logger.info(f"init {config.participant_num} {kind} participant agents...")
        logger.info(f"init {simulation.moderator_num} moderator agents...")
        self.seconds["create"] = simulation.create()
        logger.info(f"[init takes {self.seconds['create']:.2f} s]")

    def _play_round(self, simulation: Simulation, number: int) -> None:
        """Play, print and write one round. Raises RunAborted if too few servers are left."""
        self.under_way = (number, time.monotonic())
        logger.info(f"round {number}: asking {self.config.participant_num} participants")
        try:
            result = simulation.play(number)
        except RunAborted as error:
            raise RunAborted(f"round {number} cannot be finished: {error}") from None
        before, self.usage = self.usage, simulation.usage
        for line in announcement_lines(result, self.game):
            say(line)
        if result.tally.failed:
            logger.warning(failure_line(result.tally))
        if result.reassigned:
            logger.info(f"round {number}: {result.reassigned} participants went to other servers or moderators")
        self.results.append(result)
        if self.config.agent_type == "llm":
            logger.info(usage_line(before, self.usage, result.seconds))
        if result.times is not None:
            times = {name: round(value, 4) for name, value in asdict(result.times).items()}
            self.cluster["times"].append({"round": number, **times})
        self._note_losses(simulation)
        self._write("interrupted")

    def _note_losses(self, simulation: Simulation) -> None:
        lost = [*self._lost_before, *(str(endpoint) for endpoint in simulation.cluster.losses)]
        self.cluster["lost"] = list(dict.fromkeys(lost))[:LOST_SHOWN]

    def _look_after_models(self, simulation: Simulation) -> None:
        """Set `ended_early` if the next round is pointless: no tokens are left, or the models do not answer."""
        if not self.to_play:
            return
        ended = self.results[-1].tally.ended
        spent = self.config.max_tokens is not None and self.usage.tokens >= self.config.max_tokens
        if ended is Ended.OUT_OF_TOKENS or spent:
            self.ended_early = f"the budget of {self.config.max_tokens} tokens is spent (--max-tokens)"
        elif self.watch.stop_signal is None and ended is Ended.MODEL_FAILED:
            try:
                check_models(self.config, simulation.cluster.up(simulation.cluster.participant_servers))
            except ServerLost:
                pass  # the next round handles that
            except ClusterError as error:
                self.ended_early = str(error)
        if self.ended_early is not None:
            logger.warning(f"{self.ended_early}: the game ends after round {len(self.results)} of {self.config.rounds}")

    def _finish(self) -> int:
        """Write the final results, the pictures and the report; returns the exit status."""
        last = self.results[-1]
        for line in histogram_lines(last.tally, self.config):
            say(line)
        self.directory.join_answers()
        unanswered = self.ended_early is not None or any(result.tally.failed for result in self.results)
        stopped = self.ended_early is None and len(self.results) < self.config.rounds
        cut_short = stopped or last.tally.ended is Ended.INTERRUPTED
        summary = self._write("interrupted" if cut_short else "partial" if unanswered else "complete")
        self._report(summary)
        logger.info(f"results in {self.directory.path}")
        if self.watch.stop_signal is not None:
            return 128 + self.watch.stop_signal
        return RunAborted.exit_status if unanswered else 0

    def _report(self, summary: dict[str, Any]) -> None:
        try:
            self._draw(SavedRun(self.directory.path, self.config, summary, self.game, self.results))
        except SettingsError as error:  # the results just written cannot be read
            raise ResultsError(str(error)) from None

    def _write(self, status: str) -> dict[str, Any]:
        self.seconds["rounds"] = sum(result.seconds for result in self.results)
        self.seconds["total"] = time.monotonic() - self._began
        if self.status is None:  # not earlier: a folder with only this file could be neither resumed nor reused
            self.directory.write_game(self.game)
        parts = (self.cluster, self.seconds, self.results, self.usage, self._position)
        summary = summarise(self.config, self.run_id, status, *parts)
        self.directory.write_summary(summary)
        self.status = status
        return summary


def _agents_in(assignment: GroupAssignment) -> dict[str, Any]:
    """Return the agents.jsonl entry of a group: the address and remote id of its participants."""
    assert assignment.server is not None
    return {
        "oid": assignment.oid,
        "host": assignment.server.host,
        "port": assignment.server.port,
        "first": assignment.first,
        "count": assignment.count,
    }
