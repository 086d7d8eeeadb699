"""The execution of one run on agent servers that are ready. Each round is printed and saved before the next starts."""

import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import datetime
from importlib import import_module
from typing import Any

from loguru import logger

from simulation import errors
from simulation.cluster.preflight import check_cluster, check_models
from simulation.cluster.rounds import Simulation
from simulation.files import is_there
from simulation.game.analysis import analyse
from simulation.game.population import NEIGHBOURS
from simulation.game.tally import RoundResult, announcement_of, has_converged
from simulation.llm.responses import Usage
from simulation.provenance import EXPERIMENT, entries_of, experiment_text, versions, with_copies
from simulation.results.console_report import (
    announcement_lines,
    failure_lines,
    histogram_lines,
    structured_output_lines,
    usage_line,
)
from simulation.results.reader import SavedRun
from simulation.results.run_directory import AGENTS, FAILED_ANSWERS, GAME, HUMAN, RunDirectory, results_errors
from simulation.results.run_files import game_to_json, people_to_json, summarise
from simulation.rpc.endpoints import remote_run
from simulation.rpc.messages import CODE_VERSION
from simulation.runs.console import ConsoleProgress
from simulation.runs.run_spec import RunSpec
from simulation.settings import flag_of, labels_of
from simulation.user_code import UserFile

REPORT_PAGE = "simulation.results.report_page"  # takes 1 s to import
STOP_POLL_S = 0.2  # interval of checks for a stop signal while the game is paused


class Run:
    """A run in progress, with its results so far."""

    def __init__(self, spec: RunSpec, directory: RunDirectory, console: ConsoleProgress) -> None:
        self.spec, self.config, self.game, self.run_id = spec, spec.config, spec.game, spec.run_id
        self.directory, self.console = directory, console
        directory.config = spec.config
        self.simulation: Simulation | None = None  # None until the servers are ready
        self.under_way = (0, 0.0)  # the number and the start time (time.monotonic) of the latest round
        self.status: str | None = None  # the status in summary.json; None before the first write
        self.summary: dict[str, Any] = {}  # the content of summary.json; empty before the first write
        self.on_summary: list[Callable[[dict[str, Any]], None]] = []  # called after each write of summary.json
        self.ended_early = False  # whether the run ended early for a reason other than a signal
        self._waited = 0.0  # seconds, before this command
        self.results: list[RoundResult] = []
        self.usage = Usage()
        self.seconds = dict.fromkeys(("connect", "create", "rounds", "total"), 0.0)
        self.cluster_summary: dict[str, Any] = {"servers": 0, "moderators": 0, "lost": [], "times": []}
        self._is_over = False  # whether the last round was played
        self._saved, self._recorded = spec.saved, spec.recorded
        if self._saved is not None:
            self.results, self.usage = [*self._saved.results], self._saved.usage
            self.seconds |= self._saved.summary["seconds"]
            self._waited = self._saved.summary.get("waited", self.seconds["total"])
            cluster = self._saved.summary["cluster"]
            times = [each for each in cluster["times"] if each["round"] <= len(self.results)]
            self.cluster_summary |= cluster | {"times": times}
        self.cluster_summary["hosts"] = list(self.config.hosts)
        self._provenance: dict[str, Any] = {}
        self._began = time.monotonic() - self.seconds["total"]

    @property
    def has_converged(self) -> bool:
        return has_converged(self.results, self.config.until_converged, self.game.scale)

    @property
    def rounds_left(self) -> range:
        return range(len(self.results) + 1, self.config.rounds + 1) if not self.has_converged else range(0)

    def play_rounds(self) -> int:
        """Execute the remaining rounds, write the results (even after an error), and return the exit status."""
        if self._saved is not None:
            logger.info(f"run {self.run_id} has played {len(self.results)} of {self.config.rounds} rounds")
        if not self.rounds_left:
            if self._saved is not None and len(self._saved.summary["rounds"]) > len(self.results):
                self._go_back()  # the last round was interrupted, and is no longer wanted
            return self._finish()
        began = time.monotonic()
        servers, repeatable = check_cluster(self.config, self.game)
        self.seconds["connect"] = time.monotonic() - began
        self.cluster_summary["servers"] = len(servers) - len(self.config.hosts) * self.config.moderator_per_host
        if self.config.uses_models:
            self._seed_models(repeatable)
        if self._saved is not None:  # only now: if the servers are not ready, the run folder stays unchanged
            self._go_back()
        if self._repeats or not self.config.uses_models:
            labels = labels_of(self.config.kinds)
            classes = [label for label, kind in zip(labels, self.config.kinds, strict=True) if kind.agent_class]
            drawing = " and ".join(classes)
            condition = (
                ", up to rounding, on model servers started with --repeatable" if self.config.uses_models else ""
            )
            condition += f" if all random numbers of {drawing} come from self.rng" if drawing else ""
            logger.info(f"seed {self.config.seed}; --seed {self.config.seed} plays this game again{condition}")
        announced = tuple(announcement_of(each, self.game) for each in self.results)
        prefix = remote_run(self.run_id, secrets.token_hex(2))
        past = (self.directory, announced, self.usage, self._recorded, self.spec.replay)
        simulation = Simulation(with_copies(self.config, self.spec.copies), self.game, prefix, self.console, *past)
        try:
            with simulation, ThreadPoolExecutor(1) as imports:
                self.simulation = simulation
                self._create_agents(simulation)
                imports.submit(import_module, REPORT_PAGE)  # while participants answer; an error occurs again below
                while self._may_continue() and self.rounds_left:  # fewer may be left after a pause
                    self._play_round(simulation, self.rounds_left.start)
                    is_over = not self.rounds_left and not self.results[-1].error
                    self.ended_early = not is_over and self._cannot_continue(simulation)
                    if self.console.stop_signal is not None or self.ended_early or not self.rounds_left:
                        break
                self._is_over = True
                if self.config.keep_agents:
                    agents = [
                        {"oid": each.oid, **asdict(each.server), "first": each.first, "count": each.count}
                        for each in simulation.cluster.active_assignments
                        if each.server is not None
                    ]
                    self.directory.write_lines(AGENTS, agents)
        except errors.SimulationError as error:
            self.usage = simulation.usage
            self._write_after_error(error)
            raise
        return self._finish()

    def _go_back(self) -> None:
        """Delete the files of rounds after the last finished one."""
        self._write("interrupted")  # before the next line deletes answers that the old summary refers to
        self.directory.go_back_to(len(self.results))

    @property
    def _repeats(self) -> bool:
        """Return whether servers repeat the answers of models, and whether recorded answers have the same seed."""
        replay = self.spec.replay
        return self.game.seeds_models and (replay is None or replay.seed == self.config.seed)

    def _seed_models(self, repeatable: bool) -> None:
        """Send seeds to models if their servers repeat seeded answers, and have done so before if the run is resumed.

        Blocks of neighbouring participants then ask the same model, so that they can share requests.
        """
        if self._saved is None and repeatable:
            population = replace(self.game.population, block=NEIGHBOURS)
            self.game = replace(self.game, seeds_models=True, population=population)
        elif self._saved is not None and self._saved.summary.get("repeatable"):
            self.game = replace(self.game, seeds_models=repeatable)
            if not repeatable:
                logger.warning("the model servers no longer repeat seeded answers: start them with --repeatable")

    def change(self, **changes: Any) -> None:
        """Change settings, and pause the run if the console is paused; for other threads. Raises SettingsError."""
        if changes and self._is_over:
            raise errors.SettingsError(f"{flag_of(next(iter(changes)))}: the last round of the run was played")
        played = max(self.under_way[0], len(self.results))
        if "rounds" in changes and changes["rounds"] < played:
            problem = f"round {played} is under way, or was played"
            raise errors.SettingsError(f"--rounds {changes['rounds']}: {problem}")
        self.config = replace(self.config, **changes)
        if self.simulation is not None:
            self.simulation.change(with_copies(self.config, self.spec.copies), self.console.paused)

    def _may_continue(self) -> bool:
        """Wait while the game is paused. Return whether it goes on. Raises Interrupted if it has no rounds."""
        while self.console.paused:
            self.console.resumed.wait(STOP_POLL_S)
            if self.console.stop_signal is not None and not self.results:
                raise errors.Interrupted(self.console.stop_signal)
            if self.console.stop_signal is not None:
                return False
        return True

    def _create_agents(self, simulation: Simulation) -> None:
        kind = self.game.population.players_in_words
        kind = f"({kind})" if kind else self.config.kinds[0].label
        self.cluster_summary["moderators"] = simulation.moderator_num
        logger.info(f"init {self.config.participant_num} {kind} participant agents...")
        logger.info(f"init {simulation.moderator_num} moderator agents...")
        self.seconds["create"] = simulation.create()
        logger.info(f"[init takes {self.seconds['create']:.2f} s]")
        self._write("interrupted")  # the status that remains if this process is killed

    def _play_round(self, simulation: Simulation, number: int) -> None:
        self.under_way = (number, time.monotonic())
        logger.info(f"round {number}: asking {self.config.participant_num} participants")
        try:
            result = simulation.play(number)
        except errors.RunAborted as error:
            raise errors.RunAborted(f"round {number} cannot be finished: {error}") from None
        before, self.usage = self.usage, simulation.usage
        self.console.say(announcement_lines(result, self.game))
        for line in failure_lines(result.tally, self.directory.failed_now):
            logger.warning(line)
        asking = self.game.population.asking(0, self.config.participant_num) if self.config.uses_models else 0
        for line in structured_output_lines(result.tally, asking, self.config.structured_output):
            logger.warning(line)
        if any("traceback" in each for each in self.directory.failed_now):
            logger.warning(f"the tracebacks of the first failures are in {self.directory.path / FAILED_ANSWERS}")
        if result.reassigned:
            logger.info(f"round {number}: {result.reassigned} participants went to other servers or moderators")
        self.results.append(self._analysed(result))
        if self.config.uses_models:
            logger.info(usage_line(before, self.usage, result.seconds))
        if result.times is not None:
            times = {name: round(value, 4) for name, value in asdict(result.times).items()}
            self.cluster_summary["times"].append({"round": number, **times})
        self._write("interrupted")

    def _analysed(self, result: RoundResult) -> RoundResult:
        """Return the result of the latest round, completed with the game's analysis."""
        results = [*self.results, result]
        pairs = self.directory.pairs(result.round, self.config.participant_num, self.game.scale)
        rounds = [each.tally for each in results], [each.outcome for each in results]
        analysis = analyse(self.game, *rounds, pairs)
        if "error" in analysis:
            logger.warning(f"round {result.round}: the game's analysis failed: {analysis['error']}")
        return replace(result, analysis=analysis)

    def _cannot_continue(self, simulation: Simulation) -> bool:
        """Return whether no tokens are left, the models do not answer, or every participant failed. Log the reason."""
        ended, max_tokens, reason = self.results[-1].tally.ended, self.config.max_tokens, ""
        if self.results[-1].error:
            reason = f"the game cannot compute a result: {self.results[-1].error}"
        elif ended is errors.Ended.OUT_OF_TOKENS or (max_tokens is not None and self.usage.tokens >= max_tokens):
            reason = f"the budget of {max_tokens} tokens is spent (--max-tokens)"
        elif ended is errors.Ended.MODEL_FAILED and self.console.stop_signal is None:
            try:
                check_models(self.config, self.game, simulation.cluster.up(simulation.cluster.participant_servers))
            except errors.ServerLost:
                pass  # the next round handles lost servers
            except errors.ClusterError as error:
                reason = str(error)
        failed = ended <= errors.Ended.MODEL_FAILED and not self.results[-1].tally.answered
        if not reason and failed and not self.config.keep_going:
            reason = f"every participant failed in round {len(self.results)} (--keep-going continues nevertheless)"
        if reason:
            logger.warning(f"{reason}: the game ends after round {len(self.results)} of {self.config.rounds}")
        return bool(reason)

    def _write_after_error(self, cause: errors.SimulationError) -> None:
        """Write the results after the error `cause`. If this fails, too, raise ResultsError or log the failure."""
        expected = isinstance(cause, errors.RunAborted | errors.Interrupted)
        if not self.results and not expected:
            return
        try:
            self._finish_files("interrupted" if isinstance(cause, errors.Interrupted) else "failed")
        except errors.ResultsError as error:
            if expected:
                raise errors.ResultsError(f"{error}; the game had ended: {cause}") from None
            if not isinstance(cause, errors.ResultsError):  # otherwise, this is probably the same disk error
                logger.warning(str(error))

    def _finish(self) -> int:
        """Print and write the final results. Return the exit status."""
        last = self.results[-1].tally
        if not (self.console.quiet or self.console.json):
            self.console.say(histogram_lines(self.results[-1], self.game))
        if self.has_converged and len(self.results) < self.config.rounds:
            moved = f"mean and median moved less than {self.config.until_converged:g} in the last two rounds"
            logger.info(f"{moved}: the game ends after round {len(self.results)} of {self.config.rounds}")
        unanswered = self.ended_early or any(result.tally.failed for result in self.results)
        interrupted = last.ended is errors.Ended.INTERRUPTED or (bool(self.rounds_left) and not self.ended_early)
        self._finish_files("interrupted" if interrupted else "partial" if unanswered else "complete")
        logger.info(f"results in {self.directory.path}")
        if self.console.stop_signal is not None:
            return 128 + self.console.stop_signal
        return errors.RunAborted.exit_status if unanswered else 0

    def _finish_files(self, status: str) -> None:
        self.directory.join_answers()
        summary = self._write(status)
        self.console.waiting_since = time.monotonic()
        saved = SavedRun(self.directory.path, self.config, summary, self.game, self.results, self.spec.people)
        with results_errors(f"draw the report of {self.directory.path}"), self.console.during("drawing pictures"):
            import_module(REPORT_PAGE).draw_all(saved)

    def _write(self, status: str) -> dict[str, Any]:
        """Write summary.json and, at the first call, game.json. Return the summary."""
        self.seconds["rounds"] = sum(result.seconds for result in self.results)
        self.seconds["total"] = time.monotonic() - self._began
        lost = map(str, self.simulation.cluster.losses if self.simulation is not None else ())
        self.cluster_summary["lost"] = [*dict.fromkeys([*self.cluster_summary["lost"], *lost])]
        if self.status is None:  # not earlier: a folder that contains only this file can be neither resumed nor reused
            self.directory.write_json(GAME, game_to_json(self.game))
            if self.spec.people or is_there(self.directory.path / HUMAN):  # a resumed run may be compared with others
                self.directory.write_json(HUMAN, people_to_json(self.spec.people))
            self._provenance = self._write_sources()
        position = self._saved.position if self._saved is not None else self.directory.position
        parts = (self.cluster_summary, self.seconds, self.results, self.usage, position)
        waited = round(self._waited + time.monotonic() - self.console.waiting_since, 4)
        summary = self._provenance | {"waited": waited} | summarise(self.config, self.run_id, status, *parts)
        if self.has_converged:
            summary["converged_after"] = len(self.results)
        self.directory.write_summary(summary)
        self.status, self.summary = status, summary
        for listener in self.on_summary:
            listener(summary)
        return summary

    def _write_sources(self) -> dict[str, Any]:
        """Write copies of users' files and an experiment file that repeats the run. Return keys of the summary."""
        self.directory.write_sources(self.spec.sources)
        names = {each.path: each.name for each in self.spec.sources}
        text = experiment_text(f"the game of run {self.run_id}", [self.config], names)
        self.directory.write_sources([UserFile(EXPERIMENT, "", text.encode())])
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        current = {"started": started, **versions(CODE_VERSION)}
        before = self._saved.summary if self._saved is not None else current
        resumed = before.get("resumed", [])
        latest = [before, *resumed][-1]
        if any(latest.get(name) != current[name] for name in ("program", "python")):
            changed = {name: current[name] for name in ("started", "program", "python")}
            resumed = [*resumed, {"round": len(self.results) + 1, **changed}]
        return {
            **{name: before[name] for name in current if name in before},
            **({"resumed": resumed} if resumed else {}),
            **({"about": about} if (about := self.spec.about or before.get("about")) else {}),
            **({"repeatable": self._repeats} if self.config.uses_models else {}),
            "sources": entries_of(self.spec.sources),
            "model_settings": self.spec.model_settings,
        }
