"""One run on servers that are ready: play round after round, tell it, and write each before the next begins."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from loguru import logger

from simulation.config import SimulationConfig
from simulation.console import ProgressWatch, say
from simulation.errors import ClusterError, GameEnded, Interrupted, ResultsError, ServerUnreachable, SimulationError
from simulation.game import RoundResult
from simulation.group import INTERRUPTED
from simulation.model import Usage
from simulation.model_client import OUT_OF_TOKENS
from simulation.replies import MODEL_SERVER
from simulation.report import announcement_lines, failure_line, histogram_lines, usage_line
from simulation.results import RunDirectory, summarise
from simulation.rounds import Simulation, check_cluster, check_models
from simulation.security import ClusterKey


class Run:
    """A run, its results so far, and where they are written."""

    def __init__(
        self, config: SimulationConfig, run_id: str, key: ClusterKey, directory: RunDirectory, watch: ProgressWatch
    ) -> None:
        self.config = config
        self.run_id = run_id
        self.key = key
        self.directory = directory
        self.watch = watch
        self.results: list[RoundResult] = []
        self.usage = Usage()
        self.ended_early: str | None = None  # why, other than by a signal
        self.seconds = dict.fromkeys(("connect", "create", "rounds", "total"), 0.0)
        self.cluster: dict[str, Any] = {"hosts": list(config.hosts), "servers": 0, "moderators": 0, "lost": []}
        self._began = time.monotonic()

    def play(self) -> int:
        """Play all rounds and write the results; returns the exit status. Raises what ended the run early, written."""
        servers = check_cluster(self.config, self.key)
        self.seconds["connect"] = time.monotonic() - self._began
        self.cluster["servers"] = len(servers) - len(self.config.hosts) * self.config.moderator_per_host
        if self.config.agent_type != "llm":  # a model's answers are drawn by its server
            logger.info(f"seed {self.config.seed}; --seed {self.config.seed} plays this game again")
        try:
            with Simulation(self.config, self.run_id, self.key, self.watch) as simulation:
                self._create(simulation)
                for number in range(1, self.config.rounds + 1):
                    self._play_round(simulation, number)
                    self._look_after_models()
                    if self.watch.stop_signal is not None or self.ended_early is not None:
                        break
        except SimulationError as error:
            if self.results or isinstance(error, (GameEnded, Interrupted)):
                with contextlib.suppress(ResultsError):  # the first error is the one to tell
                    self.directory.join_answers()
                    self._write("interrupted" if isinstance(error, Interrupted) else "failed")
            raise
        return self._finish()

    def _create(self, simulation: Simulation) -> None:
        config = self.config
        kind = config.agent_type if config.agent_class is None else simulation.participant_class.__name__
        self.cluster["moderators"] = simulation.moderator_num
        logger.info(f"init {config.participant_num} {kind} participant agents...")
        logger.info(f"init {simulation.moderator_num} moderator agents...")
        self.seconds["create"] = simulation.create()
        logger.info(f"[init takes {self.seconds['create']:.2f} s]")

    def _play_round(self, simulation: Simulation, number: int) -> None:
        """Play, tell and write one round. Raises GameEnded if a server does not answer any more."""
        logger.info(f"round {number}: asking {self.config.participant_num} participants")
        try:
            result = simulation.play(number)
            before, self.usage = self.usage, simulation.usage
            for line in announcement_lines(result, self.config.decimals):
                say(line)
            if result.tally.failed:
                logger.warning(failure_line(result.tally))
            self.directory.write_answers(number, simulation.answers(), simulation.game.scale)
        except ClusterError as error:
            if isinstance(error, ServerUnreachable):
                self.cluster["lost"] = [str(error).partition(": ")[0]]
            raise GameEnded(f"round {number} cannot be finished: {error}") from None
        self.results.append(result)
        if self.config.agent_type == "llm":
            logger.info(usage_line(before, self.usage, result.seconds))
        self._write("interrupted")  # what it is, should this process be killed now

    def _look_after_models(self) -> None:
        """Find out whether another round makes sense: there are tokens left, and models that answer."""
        failures = self.results[-1].tally.failures
        spent = self.config.max_tokens is not None and self.usage.tokens >= self.config.max_tokens
        if OUT_OF_TOKENS in failures or (spent and len(self.results) < self.config.rounds):
            self.ended_early = f"the budget of {self.config.max_tokens} tokens is spent (--max-tokens)"
        elif self.watch.stop_signal is None and any(cause.startswith(MODEL_SERVER) for cause in failures):
            try:
                check_models(self.config)
            except ClusterError as error:
                self.ended_early = str(error)
        if self.ended_early is not None:
            logger.warning(f"{self.ended_early}: the game ends after round {len(self.results)} of {self.config.rounds}")

    def _finish(self) -> int:
        """Write the whole run, and a picture of its last round; returns the exit status."""
        last = self.results[-1]
        for line in histogram_lines(last.tally, self.config):
            say(line)
        self.directory.join_answers()
        unanswered = self.ended_early is not None or any(result.tally.failed for result in self.results)
        stopped = self.ended_early is None and len(self.results) < self.config.rounds
        cut_short = stopped or INTERRUPTED in last.tally.failures
        self._write("interrupted" if cut_short else "partial" if unanswered else "complete")
        from simulation.plots import draw_histogram  # noqa: PLC0415 - half a second, which nobody waits for earlier

        draw_histogram(self.directory.path / "histogram.png", last, self.config)
        logger.info(f"results in {self.directory.path}")
        if self.watch.stop_signal is not None:
            return 128 + self.watch.stop_signal
        return GameEnded.exit_status if unanswered else 0

    def _write(self, status: str) -> None:
        self.seconds["rounds"] = sum(result.seconds for result in self.results)
        self.seconds["total"] = time.monotonic() - self._began
        summary = summarise(self.config, self.run_id, status, self.cluster, self.seconds, self.results, self.usage)
        self.directory.write_summary(summary)
