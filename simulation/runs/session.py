"""The runs of one command: one run, new or resumed, or all runs of an experiment on the same servers."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loguru import logger

from simulation.errors import ResultsError, RunAborted, SettingsError, printable, say
from simulation.files import ROOT, is_there, real, shown
from simulation.game.rules import Game
from simulation.llm.model_configs import ModelConfig, asked_models, check_model_is_local, is_within, read_models
from simulation.results.reader import (
    SavedRun,
    config_to_resume,
    is_spent,
    read_game,
    read_run_to_resume,
    read_summary,
    rounds_finished,
    tokens_spent,
)
from simulation.results.run_directory import SWEEP, WHOLE, RunDirectory, new_run_id, resume_command
from simulation.results.run_files import position_in_words
from simulation.rpc.lean_import import add_extra_folders, import_agentscope
from simulation.runs.console import ConsoleProgress
from simulation.runs.cost_estimate import cost_lines, estimate, plan_lines
from simulation.runs.experiment import (
    Experiment,
    Sweep,
    in_words,
    read_experiment,
    read_sweep,
    sweep_of,
    tell_comparison,
)
from simulation.runs.scenario import build_game, refuse_unknown_models, refuse_without_model, turns_of
from simulation.settings import SimulationConfig, flag_of

if TYPE_CHECKING:
    from simulation.runs.run import RunObserver

    Draw = Callable[[SavedRun], None]

PLANS_SHOWN = 10  # plans shown in a dry run of an experiment


class Session:
    """Runs that are played one after another.

    Args:
        tasks: The runs.
        folder: The folder to write: of the single run, or of the experiment with a folder for each run.
        sweep: The sweep, if there are several runs.
        directory: The folder, if it exists already and is locked.
    """

    def __init__(
        self, tasks: list[RunSpec], folder: Path, sweep: Sweep | None = None, directory: RunDirectory | None = None
    ) -> None:
        self.tasks = tasks
        self.folder = folder
        self.sweep = sweep
        self._directory = directory
        self._number: int | None = None  # number of the current run of an experiment
        self._is_new = directory is None

    @property
    def config(self) -> SimulationConfig:
        """Return the settings of the first run; all runs share the cluster settings."""
        return self.tasks[0].config

    @property
    def needs_servers(self) -> bool:
        """Return whether any round remains to be played."""
        return any(task.rounds_left for task in self.tasks)

    def plan(self) -> list[str]:
        """Return a readable plan of the runs."""
        if self.sweep is None:
            return self.tasks[0].plan
        about = printable(self.sweep.about or "")
        lines = [f"experiment {self.sweep.experiment}" + (f": {about}" if about else "")]
        left = [task for task in self.tasks if task.rounds_left]
        for number, task in enumerate(self.tasks, start=1):
            lines.append(f"run {number} of {len(self.tasks)}: {task.name}{_played_before(task)}")
            lines += [f"  {line}" for line in task.plan] if task in left[:PLANS_SHOWN] else []
        tokens, price = sum(task.tokens for task in left), self.config.price_per_million_tokens
        total = f"in all: {len(left)} runs, {sum(len(task.rounds_left) for task in left):,} rounds"
        total += f", at most about {tokens:,} tokens" if tokens else ""
        total += f": {tokens / 1e6 * price:,.2f} at {price:g} per million" if tokens and price is not None else ""
        return [*lines, total]

    def open(self) -> None:
        """Create the folder, unless it exists. Raises SettingsError or ResultsError."""
        if self._directory is None:
            self._directory = RunDirectory(self.folder)

    def close(self) -> None:
        """Release the lock, and remove the folder if no results were written."""
        if self._directory is None:
            return
        if self._is_new and self.sweep is not None and not self._has_begun():
            with contextlib.suppress(OSError):  # if it stays, the folder stays too
                (self.folder / SWEEP).unlink(missing_ok=True)
        self._directory.discard_if_empty()
        self._directory.close()

    def play(self, watch: ConsoleProgress, draw: Draw, observer: RunObserver | None = None) -> int:
        """Play the remaining rounds; returns the exit status. Logs how to resume if rounds are left, even on errors."""
        assert self._directory is not None
        play = partial(_play, watch=watch, draw=draw, observer=observer)
        watch.how_to_resume = self.how_to_resume
        try:
            if self.sweep is None:
                return play(self.tasks[0], self._directory)
            self._check_later_models()
            return self._play_all(self.sweep, play, watch)
        finally:
            hint = self.how_to_resume()
            if hint is not None:
                logger.warning(hint)

    def _play_all(self, sweep: Sweep, play: Callable[..., int], watch: ConsoleProgress) -> int:
        """Play and compare the runs of an experiment; returns the exit status."""
        assert self._directory is not None
        self._directory.write_json(SWEEP, sweep.to_json())
        self._directory.point_latest()
        status = 0
        for number, task in enumerate(self.tasks, start=1):
            self._number = number
            label = f"run {number} of {len(self.tasks)}: {task.name}"
            logger.info(f"{label}{_played_before(task)}")
            status = max(status, self._play_one(task, partial(play, label=label)))
            if watch.stop_signal is not None:
                return 128 + watch.stop_signal
        self._number = None
        try:
            tell_comparison(self.folder, sweep)
        except SettingsError as error:  # a finished run cannot be read
            raise ResultsError(f"cannot compare the runs in {self.folder}: {error}") from None
        logger.info(f"results of all {len(self.tasks)} runs in {self.folder}")
        return status

    def _play_one(self, task: RunSpec, play: Callable[[RunSpec, RunDirectory], int]) -> int:
        """Play one of several runs; returns its exit status. RunAborted is logged and does not stop the other runs."""
        try:
            directory = RunDirectory(task.folder, resumed=is_there(task.folder), within=self._directory)
        except SettingsError as error:  # not a wrong setting: the experiment's folder was writable at the start
            raise ResultsError(str(error)) from None
        if task.status is not None:
            directory.close()
            return 0 if task.status == "complete" else RunAborted.exit_status
        try:
            return play(task, directory)
        except RunAborted as error:
            logger.error(str(error))
            return error.exit_status
        finally:
            directory.discard_if_empty()
            directory.close()

    def check_models(self) -> None:
        """Check all models of all runs from this process, before it starts agent servers; raises ClusterError."""
        models = [model for task in self.tasks if task.rounds_left for model in task.asked_models]
        if models:
            from simulation.cluster.preflight import check_models_here  # noqa: PLC0415 - see _play

            check_models_here(models, self.config.connect_timeout)

    def _check_later_models(self) -> None:
        """Raise ClusterError if the cluster cannot reach a model of a later run; the first run checks its own."""
        left = [task for task in self.tasks if task.rounds_left]
        others = {tuple(task.asked_models): task.config for task in left if task.asked_models}
        if left:
            others.pop(tuple(left[0].asked_models), None)
        if others:
            from simulation.cluster.preflight import check_cluster  # noqa: PLC0415 - see _play

            for config in others.values():
                check_cluster(config)

    def _has_begun(self) -> bool:
        return any(is_there(task.folder) for task in self.tasks)  # folders without results are discarded

    def how_to_resume(self) -> str | None:
        """Return a line with the command to resume; None if no rounds are left or nothing was written."""
        if self._number is not None:
            ends = f"the experiment ends in run {self._number} of {len(self.tasks)}"
            return f"{ends}; to go on with it: {resume_command(self.folder)}" if self._has_begun() else None
        left = {number: rest for number, task in enumerate(self.tasks, start=1) if (rest := _rest_of(task)) is not None}
        if self.sweep is not None and any(not rest.flags for rest in left.values()):
            number = sum(not rest.flags for rest in left.values())
            return f"{number} of {len(self.tasks)} runs have rounds left; to go on: {resume_command(self.folder)}"
        for number, (progress, flags) in left.items():  # of several that need more tokens, the first
            name = "the run" if self.sweep is None else f"run {number} of {len(self.tasks)}"
            command = resume_command(self.tasks[number - 1].folder, *flags)
            return f"{name} ends with {progress}; to go on with it: {command}"
        return None


class _Rest(NamedTuple):
    """Progress of an unfinished run, and the flags needed to play its remaining rounds."""

    progress: str
    flags: tuple[str, ...]


def _rest_of(task: RunSpec) -> _Rest | None:
    """Return what is left of a run according to its folder; None if it is finished or nothing was written."""
    try:
        config, summary = read_summary(task.folder)
    except SettingsError:
        return None
    played = rounds_finished(summary)
    if played >= config.rounds:
        return None
    flags: tuple[str, ...] = ()
    if is_spent(summary, config.max_tokens, config.max_tokens):
        rest = estimate(config, task.game, task.models, range(played + 1, config.rounds + 1))
        needed = tokens_spent(summary) + sum(each.tokens for each in rest)
        flags = ("--max-tokens", str(max(needed, (config.max_tokens or 0) + 1)))
    return _Rest(f"{played} of {config.rounds} rounds played", flags)


def _played_before(task: RunSpec) -> str:
    return "" if task.status is None else f", which was played before and is {task.status}"


def _play(
    task: RunSpec,
    directory: RunDirectory,
    watch: ConsoleProgress,
    draw: Draw,
    observer: RunObserver | None,
    label: str = "",
) -> int:
    import_agentscope()
    from simulation.runs.run import Run  # noqa: PLC0415 - AgentScope takes its time, which refusals need not wait for

    return Run(task.config, task.run_id, directory, watch, draw, task.game, task.played, observer, label).play()


def session_of(config: SimulationConfig, given: dict[str, Any]) -> Session:
    """Build the session that the settings describe. Raises SettingsError if anything in it is invalid.

    Args:
        config: The settings.
        given: Those from the command line, which override settings read from a file.
    """
    if config.resume is not None:
        if config.run_dir is not None:
            raise SettingsError("--run-dir: does not go with --resume, which writes where the run is")
        path = Path(shown(config.resume))
        changed = {name: given[name] for name in given.keys() - {"resume"}}
        session = _resumed_sweep(path, changed) if is_there(path / SWEEP) else _resumed_run(path, changed)
    elif config.experiment is not None:
        session = _experiment(read_experiment(config.experiment, given), given)
    else:
        refuse_without_model(config, given)
        task = new_task(_seeded(config, secrets.randbits(32)))
        session = Session([task], task.folder)
    if session.sweep is not None:
        refuse_sum_above_budget(session.tasks, given.get("max_tokens"))
    if not config.dry_run:
        refuse_costs(session.tasks, session.plan)
    return session


def _seeded(config: SimulationConfig, drawn: int) -> SimulationConfig:
    return config if config.seed is not None else replace(config, seed=drawn)


def _resumed_run(path: Path, given: dict[str, Any]) -> Session:
    config, summary = read_summary(path, "--resume ")
    budget, rounds = (given.get(name, getattr(config, name)) for name in ("max_tokens", "rounds"))
    if len(summary["rounds"]) < rounds and is_spent(summary, config.max_tokens, budget):
        raise SettingsError(f"--resume {path}: its budget of {budget:,} tokens is spent; give a larger --max-tokens")
    directory = RunDirectory(path, resumed=True)  # locks the folder against other writers
    if directory.position is not None:
        logger.warning(
            f"this run is one of an experiment's, {position_in_words(directory.position)}; to go on with all of them: "
            f"{resume_command(directory.path.parent)}"
        )
    return Session([resumed_task(path, given)], directory.path, directory=directory)


def _experiment(experiment: Experiment, given: dict[str, Any]) -> Session:
    """Return a session of all runs of an experiment; a single combination becomes an ordinary run."""
    drawn = secrets.randbits(32)  # shared, so that the runs differ only in the varied settings
    tasks = []
    for combination in experiment.combinations:
        try:
            if "agent_type" not in combination.varied:
                refuse_without_model(combination.config, given if "agent_type" in given else given | combination.places)
            task = new_task(_seeded(combination.config, drawn))
            refuse_above_budget(task, in_words(combination.varied))
        except SettingsError as error:
            raise experiment.placed(error, combination) from None
        tasks.append(task)
    folder = tasks[0].folder
    if len(tasks) == 1:
        return Session(tasks, folder)
    sweep = sweep_of(experiment, [task.config for task in tasks], tasks[0].run_id)
    for number, run in enumerate(sweep.runs):
        config = replace(run.config, run_dir=str(folder / run.folder))
        name = in_words(sweep.varied(run))
        tasks[number] = replace(
            tasks[number], config=config, folder=folder / run.folder, run_id=new_run_id(), name=name
        )
    return Session(tasks, folder, sweep)


def _resumed_sweep(path: Path, given: dict[str, Any]) -> Session:
    """Return a session that resumes a sweep; finished runs are left unchanged."""
    directory = RunDirectory(path, resumed=True)
    sweep = read_sweep(path)
    for name in sweep.varies:
        if name in given:
            raise SettingsError(
                f"{flag_of(name)} {given[name]}: the runs of {path} differ in it; --resume one of them by its folder"
            )
    runs = tuple(replace(run, config=config_to_resume(path / run.folder, run.config, given)) for run in sweep.runs)
    sweep = replace(sweep, runs=runs)
    tasks = []
    for run in runs:
        folder = directory.path / run.folder
        if is_there(folder / "summary.json"):
            settings = asdict(run.config)  # all settings: a run begun on another cluster continues on this one
            task = finished_task(folder, settings) or resumed_task(folder, settings)
        else:
            task = new_task(replace(run.config, run_dir=str(folder)))
        tasks.append(replace(task, name=in_words(sweep.varied(run))))
    return Session(tasks, directory.path, sweep, directory)


@dataclass(frozen=True)
class RunSpec:
    """A run to play, with validated settings, files and models.

    Attributes:
        config: Its settings.
        models: The available models, by name.
        game: The game.
        folder: The folder of its results.
        run_id: Its id.
        played: The run as saved, if it is resumed.
        name: Text of the settings that distinguish it from the other runs.
        status: Its final status, if it is finished; None otherwise.
    """

    config: SimulationConfig
    models: dict[str, ModelConfig]
    game: Game
    folder: Path
    run_id: str = field(default_factory=new_run_id)
    played: SavedRun | None = None
    name: str = ""
    status: str | None = None

    @property
    def rounds_left(self) -> range:
        """Return the numbers of the rounds to play; empty if the run is finished."""
        played = 0 if self.played is None else len(self.played.results)
        return range(0) if self.status is not None else range(played + 1, self.config.rounds + 1)

    @property
    def tokens(self) -> int:
        """Return the maximum number of tokens that the remaining rounds may cost."""
        if self.config.agent_type != "llm" or not self.rounds_left:
            return 0
        return sum(each.tokens for each in estimate(self.config, self.game, self.models, self.rounds_left))

    @property
    def plan(self) -> list[str]:
        """Return a readable plan of the remaining rounds."""
        return plan_lines(self.config, self.game, self.models, self.rounds_left)

    @property
    def costs(self) -> list[str]:
        """Return a readable cost estimate of the remaining rounds."""
        return cost_lines(self.config, self.game, self.models, self.rounds_left)

    @property
    def asked_models(self) -> list[ModelConfig]:
        """Return the models of the mixture, or those that participants use in turn."""
        return [self.models[name] for name in asked_models(self.config) if name in self.models]


def new_task(config: SimulationConfig) -> RunSpec:
    """Return the spec of a new run; `config` has a seed. Raises SettingsError."""
    models = _checked(config)
    run_id = new_run_id()
    folder = Path(config.run_dir or ROOT / "runs" / run_id)
    return RunSpec(config, models, build_game(config, models), folder, run_id)


def resumed_task(path: Path, given: dict[str, Any]) -> RunSpec:
    """Return the spec that resumes the run in a folder, with the given settings changed. Raises SettingsError."""
    played = read_run_to_resume(path, given)
    models = _checked(played.config)
    _refuse_other_models(path, played.config, played.game, models)
    return RunSpec(played.config, models, played.game, real(path), played.run_id, played)


def _refuse_other_models(path: Path, config: SimulationConfig, game: Game, models: Mapping[str, ModelConfig]) -> None:
    """Raise SettingsError if participants would use models other than the saved ones: reports rely on those."""
    assert game.cast is not None
    before, now = game.cast.round_robin_models, turns_of(config, models)
    if before != now and len({*before, *now}) > 1:
        raise SettingsError(
            f"--model-per-host {config.model_per_host}: participants of the run in {path} asked {', '.join(before)} in "
            f"turn; this cannot be changed on resume, and they would ask {', '.join(now)}"
        )
    for share in game.cast.models:
        if models[share.name].model != share.model:
            raise SettingsError(
                f"--model-configs {shown(config.model_configs)}: {share.name} was {share.model} when the run in {path} "
                f"was started; this cannot be changed on resume, and it is now {models[share.name].model}"
            )


def finished_task(path: Path, given: dict[str, Any]) -> RunSpec | None:
    """Return the spec of a run with no rounds or tokens left, else None. Reads no answers; raises SettingsError."""
    config, summary = read_summary(path, "--resume ")
    budget = config.max_tokens
    config = config_to_resume(path, config, given)
    if summary["status"] not in ("complete", "partial"):
        return None
    if len(summary["rounds"]) < config.rounds and not is_spent(summary, budget, config.max_tokens):
        return None
    if not is_there(path / WHOLE):
        raise SettingsError(f"--resume {path}: its {WHOLE} is missing")
    return RunSpec(config, {}, read_game(path, config), path, summary["run_id"], status=summary["status"])


def _checked(config: SimulationConfig) -> dict[str, ModelConfig]:
    """Return the models of a run, if it uses any. Raises SettingsError if its participants cannot be created."""
    if config.agent_class is not None:
        import_agentscope()
        from simulation.cluster.agent_class import pickled_agent_class  # noqa: PLC0415 - AgentScope, which few refusals need

        add_extra_folders(config.extra_pythonpath)
        # find errors in the user's file before anything starts
        pickled_agent_class(config.agent_class, config.agent_type)
    if config.agent_type != "llm":
        return {}
    models = read_models(config)
    refuse_unknown_models(config, models)
    return models


def refuse_above_budget(task: RunSpec, name: str) -> None:
    """Raise SettingsError if a run of an experiment, described by `name`, may exceed its token budget."""
    allowed = task.config.max_tokens
    if allowed is not None and task.tokens > allowed:
        name = f" ({name})" if name else ""
        raise SettingsError(
            f"--max-tokens {allowed}: a run{name} may cost {task.tokens:,} tokens, more than these {allowed:,}"
        )


def refuse_sum_above_budget(tasks: list[RunSpec], allowed: int | None) -> None:
    """Raise SettingsError if all remaining runs together may exceed the budget given on the command line."""
    if allowed is None:
        return
    tokens = sum(task.tokens for task in tasks)
    if tokens > allowed:
        raise SettingsError(
            f"--max-tokens {allowed}: these {len(tasks)} runs may together cost {tokens:,} tokens, not {allowed:,}; "
            "max_tokens in the experiment's file would bound each of them"
        )


def refuse_costs(tasks: list[RunSpec], plan: Callable[[], list[str]]) -> None:
    """Print the cost if models outside the cluster are used, and raise SettingsError unless they are allowed.

    Args:
        tasks: All runs.
        plan: Returns the lines to print if there are several runs.
    """
    elsewhere = [
        (task.config, model)
        for task in tasks
        if task.rounds_left
        for model in task.asked_models
        if not is_within(model.base_url, task.config.hosts)
    ]
    if elsewhere:
        lines = tasks[0].costs if len(tasks) == 1 else plan()
        say("\n".join(lines), sys.stderr)
    for config, model in elsewhere:
        check_model_is_local(config, model.name, model.base_url)
