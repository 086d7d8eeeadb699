"""The runs of one command: a single run, or all runs of an experiment. They are new or resumed."""

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from simulation.errors import RunAborted, SettingsError, printable, say
from simulation.files import HOME, SOURCE, is_there, shown, to_root
from simulation.llm.model_configs import check_model_is_local, is_within
from simulation.provenance import EXPERIMENT, arranged, entries_of, experiment_text, kept_files
from simulation.results import reader
from simulation.results.console_report import summaries_text
from simulation.results.run_directory import SWEEP, RunDirectory, results_errors, resume_command, write_whole
from simulation.results.run_files import position_in_words, read_run_file
from simulation.rpc.lean_import import import_agentscope
from simulation.runs.console import ConsoleProgress
from simulation.runs.experiment import MOST_RUNS, Experiment, Sweep, new_sweep
from simulation.runs.run_spec import RunSpec, new_run, price_text, resumed_run, warn_of_missing_copy
from simulation.settings import SimulationConfig, flag_of
from simulation.user_code import loaded_files

if TYPE_CHECKING:
    from simulation.runs.run import Run

    Observe = Callable[[Run], contextlib.AbstractContextManager[object]]

PLANS_SHOWN = 10  # maximum number of runs whose plans a dry run shows


class Session:
    """A single run, or the runs of a sweep, executed one after another. `folder` is the folder of the run or sweep."""

    def __init__(self, specs: list[RunSpec], sweep: Sweep | None = None, directory: RunDirectory | None = None) -> None:
        self.specs = specs if sweep is None else [*_labelled(specs, sweep)]
        self.sweep = sweep
        self.config = specs[0].config  # all runs share the settings of the cluster
        self.folder = specs[0].folder if sweep is None else specs[0].folder.parent
        self.unfinished = [spec for spec in self.specs if spec.rounds_left]
        self.models = [model for spec in self.unfinished for model in spec.asked_models]
        self._directory = directory  # None until `folder` is created and locked
        self._is_new = directory is None

    def plan_lines(self) -> list[str]:
        """Return the lines of a text that describes the runs."""
        if self.sweep is None:
            return self.specs[0].plan_lines()
        about = f": {printable(self.sweep.about)}" if self.sweep.about else ""
        lines, shown_plans = [f"experiment {self.sweep.experiment}{about}"], set[int]()
        for number, spec in enumerate(self.specs):
            lines.append(spec.label)
            combination = number % self.sweep.combinations  # repeats have the same plan
            if spec.rounds_left and combination not in shown_plans and len(shown_plans) < PLANS_SHOWN:
                shown_plans.add(combination)
                lines += [f"  {line}" for line in spec.plan_lines()]
        rounds = sum(len(spec.rounds_left) for spec in self.unfinished)
        tokens = sum(spec.tokens for spec in self.unfinished)
        cost = f", at most about {tokens:,} tokens{price_text(tokens, self.config)}" if tokens else ""
        return [*lines, f"in all: {len(self.unfinished)} runs, {rounds:,} rounds{cost}"]

    def use_port(self, base_port: int) -> None:
        """Play on agent servers whose first port is `base_port`."""
        self.specs = [replace(each, config=replace(each.config, base_port=base_port)) for each in self.specs]
        self.config = self.specs[0].config
        self.unfinished = [spec for spec in self.specs if spec.rounds_left]
        if self.sweep is not None:
            configs = {name: replace(each, base_port=base_port) for name, each in self.sweep.configs.items()}
            self.sweep = replace(self.sweep, configs=configs)

    def open(self) -> None:
        """Create and lock the folder, unless this was already done. Raises SettingsError or ResultsError."""
        self._directory = self._directory or RunDirectory(self.folder)

    def close(self) -> None:
        """Release the lock of the folder. Remove a new folder if no results were written."""
        if self._directory is None:
            return
        if self._is_new and self.sweep is not None and not self._has_results():
            with contextlib.suppress(OSError):  # if this fails, the folder remains, too
                for name in (SWEEP, EXPERIMENT):
                    (self.folder / name).unlink(missing_ok=True)
                shutil.rmtree(self.folder / SOURCE, ignore_errors=True)
        self._directory.close()

    def _has_results(self) -> bool:
        return any(is_there(spec.folder / "summary.json") for spec in self.specs)

    @loaded_files()  # runs that start later, and participants that are created again, use no later version
    def play_runs(self, console: ConsoleProgress, observe: "Observe") -> int:
        """Execute the remaining rounds of all runs, and return the exit status.

        `observe(run)` returns a context manager that observes the run. If rounds are left at the end, even after an
        error, log the command that resumes the run or sweep.
        """

        def play(spec: RunSpec, directory: RunDirectory) -> int:
            import_agentscope()  # slow: earlier errors need not wait for this
            from simulation.runs.run import Run  # noqa: PLC0415

            run = Run(spec, directory, console)
            with observe(run):
                return run.play_rounds()

        assert self._directory is not None
        console.how_to_resume = self.how_to_resume
        try:
            if self.sweep is None:
                return play(self.specs[0], self._directory)
            from simulation.cluster.preflight import check_cluster  # noqa: PLC0415 - as above

            configs = {tuple(spec.asked_models): (spec.config, spec.game) for spec in self.unfinished}
            for each in [*configs.values()][1:]:  # the first run checks its models itself
                check_cluster(*each)
            if not self.sweep.sources:
                sources = arranged(spec.sources for spec in self.specs)
                self._directory.write_sources(sources)
                self.sweep = replace(self.sweep, sources=tuple(entries_of(sources)))
            names = {str(to_root(each["file"])): f"{SOURCE}/{each['name']}" for each in self.sweep.sources}
            combinations = [spec.config for spec in self.specs[: self.sweep.combinations]]
            title = f"all runs of experiment {self.sweep.sweep_id}"
            text = experiment_text(title, combinations, names, self.sweep.varies, self.sweep.repeats)
            write_whole(self._directory.path / EXPERIMENT, text.encode())
            self._directory.write_json(SWEEP, self.sweep.to_json())
            status = 0
            for spec in self.specs:
                logger.info(spec.label)
                status = max(status, self._play_one(spec, play))
                if console.stop_signal is not None:
                    return 128 + console.stop_signal
            self._compare(console)
            return status
        finally:
            if console.json:
                say(summaries_text([spec.folder for spec in self.specs], self.sweep is not None))
            if (hint := self.how_to_resume()) is not None:
                logger.warning(hint)

    def _play_one(self, spec: RunSpec, play: Callable[[RunSpec, RunDirectory], int]) -> int:
        """Execute one run of a sweep, unless it is finished. Return its exit status, even if it is aborted."""
        with results_errors(f"write to {spec.folder}"):
            directory = RunDirectory(spec.folder, resumed=is_there(spec.folder), within=self._directory)
        try:
            if spec.status is not None:
                return 0 if spec.status == "complete" else RunAborted.exit_status
            return play(spec, directory)
        except RunAborted as error:
            logger.error(str(error))
            return error.exit_status
        finally:
            directory.close()

    def _compare(self, console: ConsoleProgress) -> None:
        from simulation.results.comparison import comparison_lines, write_comparison  # noqa: PLC0415 - matplotlib: 0.5 s

        with results_errors(f"compare the runs in {self.folder}"):
            runs = [reader.read_run(spec.folder) for spec in self.specs if is_there(spec.folder / "summary.json")]
        console.say(comparison_lines(runs, self.config.all_runs))
        with console.during("drawing pictures"):
            write_comparison(self.folder, runs, self.config.all_runs)
        logger.info(f"results of all {len(self.specs)} runs in {self.folder}")

    def how_to_resume(self) -> str | None:
        """Return a line with the resume command. Return None if no rounds are left or no results were written."""
        if not self._has_results():
            return None
        left = [(number, *rest) for number, spec in enumerate(self.specs, start=1) if (rest := _progress_of(spec))]
        ready = sum(not flags for _, _, flags in left)
        if self.sweep is not None and ready:
            command = resume_command(self.folder)
            return f"{ready} of {len(self.specs)} runs have rounds left; to go on with them: {command}"
        for number, progress, flags in left:  # a single run, or all runs need more tokens: name the first
            name = "the run" if self.sweep is None else f"run {number} of {len(self.specs)}"
            command = resume_command(self.specs[number - 1].folder, *flags)
            return f"{name} ends with {progress} rounds played; to go on with it: {command}"
        return None


def _labelled(specs: list[RunSpec], sweep: Sweep) -> Iterator[RunSpec]:
    for number, spec in enumerate(specs, start=1):
        status = f", which was played before and is {spec.status}" if spec.status is not None else ""
        repeat = f"repeat {(number - 1) // sweep.combinations + 1}" if sweep.repeats > 1 else ""
        label = ", ".join(filter(None, [sweep.label_of(spec.config), repeat]))
        yield replace(spec, label=f"run {number} of {len(specs)}: {label}{status}")


def _progress_of(spec: RunSpec) -> tuple[str, list[str]] | None:
    """Return the progress of a run, such as `2 of 3`, and the flags needed to resume it. A finished run gives None."""
    try:
        saved = reader.read_summary(spec.folder)
    except SettingsError:
        return f"0 of {spec.config.rounds}", []
    config, played = saved.config, saved.rounds_finished
    if saved.is_finished:
        return None
    flags = []
    if saved.is_spent(config.max_tokens):
        needed = saved.usage.tokens + spec.tokens_in(range(played + 1, config.rounds + 1))
        flags = ["--max-tokens", str(max(needed, (config.max_tokens or 0) + 1))]
    return f"{played} of {config.rounds}", flags


# --- Building sessions -----------------------------------------------------------------------------------------------


def session_of(
    config: SimulationConfig,
    given: dict[str, Any],
    cleanup: contextlib.ExitStack,
    tell: Callable[[str], None] = say,
) -> Session:
    """Build the session that the settings describe. Settings in `given` come from flags and override those in files.

    The folder of a resumed run or sweep is locked until the exit of `cleanup`. If models outside the cluster are used,
    `tell` receives the plan. Raises SettingsError if a setting or file is invalid, or if the runs of an experiment may
    cost more than the token budget.
    """
    if config.resume is not None:
        if config.run_dir is not None:
            raise SettingsError("--run-dir: does not go with --resume, which writes where the run is")
        path = Path(shown(config.resume))
        changed = {name: value for name, value in given.items() if name != "resume"}
        is_sweep = is_there(path / SWEEP)
        if not is_sweep:
            reader.read_summary(path, "--resume ")  # fails before the next line would create a missing folder
        directory = cleanup.enter_context(contextlib.closing(RunDirectory(path, resumed=True)))
        session = (_resumed_sweep if is_sweep else _resumed_run)(path, changed, directory)
    elif config.experiment is not None:
        experiment = Experiment(config.experiment, given)
        settings = given if {"agent_type", "players"} & given.keys() else given | experiment.settings
        session = _new_session(experiment.sweep, config.run_dir, settings, experiment)
    elif config.repeats > 1:
        one = replace(config, repeats=1, seed=secrets.randbits(32) if config.seed is None else config.seed)
        session = _new_session(new_sweep("one repeated game", None, (), [one], config.repeats), config.run_dir, given)
    else:
        session = Session([new_run(config, given)])
    tokens, allowed = sum(spec.tokens for spec in session.specs), given.get("max_tokens")
    if session.sweep is not None and allowed is not None and tokens > allowed:
        advice = "max_tokens in the experiment's file would bound each of them"
        cost = f"these {len(session.specs)} runs may together cost {tokens:,} tokens, not {allowed:,}"
        raise SettingsError(f"--max-tokens {allowed}: {cost}; {advice}")
    remote = [model for model in session.models if not is_within(model.base_url, session.config.hosts)]
    if remote and not config.dry_run:
        tell("\n".join(session.plan_lines()))
        check_model_is_local(session.config, remote[0].name, remote[0].base_url)
    return session


def _new_session(
    sweep: Sweep, run_dir: str | None, settings: Collection[str], experiment: Experiment | None = None
) -> Session:
    """Return a session with all runs of a sweep, whose `settings` a flag or file sets. One run alone is no sweep."""
    several, specs = len(sweep.configs) > 1, []
    if sweep.repeats > 1 and (replay := next(iter(sweep.configs.values())).replay) is not None:
        raise SettingsError(f"--replay {shown(replay)}: does not go with repeats, which would take the same answers")
    chosen = () if {"agent_type", "players"} & {*sweep.varies} else settings
    folder = Path(run_dir or HOME / "runs" / sweep.sweep_id)
    for name, config in sweep.configs.items():
        try:
            spec = new_run(replace(config, run_dir=str(folder / name)) if several else config, chosen)
            if config.max_tokens is not None and spec.tokens > config.max_tokens:
                label = f" ({sweep.label_of(config)})" if sweep.varies else ""
                cost = f"a run{label} may cost {spec.tokens:,} tokens, more than these {config.max_tokens:,}"
                raise SettingsError(f"--max-tokens {config.max_tokens}: {cost}")
        except SettingsError as error:
            raise (experiment.with_line(error, config) if experiment is not None else error) from None
        specs.append(spec if several else replace(spec, about=printable(sweep.about or "")))
    return Session(specs, sweep if several else None)


def _resumed_run(path: Path, given: dict[str, Any], directory: RunDirectory) -> Session:
    if "repeats" in given:
        problem = f"{path} is the folder of a single run; give that of an experiment, which holds several"
        raise SettingsError(f"--repeats {given['repeats']}: {problem}")
    if directory.position is not None:
        position, command = position_in_words(directory.position), resume_command(directory.path.parent)
        logger.warning(f"this run is one of an experiment's, {position}; to go on with all of them: {command}")
    return Session([resumed_run(path, given)], directory=directory)


def _resumed_sweep(path: Path, given: dict[str, Any], directory: RunDirectory) -> Session:
    sweep = read_run_file(path, SWEEP, lambda text: Sweep.from_json(json.loads(text)), "--resume ")
    for name in given.keys() & {each.partition(".")[0] for each in sweep.varies}:
        flag = f"{flag_of(name)} {given[name]}"
        raise SettingsError(f"{flag}: the runs of {path} differ in it; --resume one of them by its folder")
    repeats = given.pop("repeats", sweep.repeats)
    if repeats < sweep.repeats:
        raise SettingsError(f"--repeats {repeats}: the experiment in {path} has {sweep.repeats}; give at least as many")
    if (count := sweep.combinations * repeats) > MOST_RUNS:
        raise SettingsError(f"--repeats {repeats}: would make {count:,} runs in {path}; the maximum is {MOST_RUNS:,}")
    sweep, configs, specs = sweep.with_repeats(repeats), {}, list[RunSpec]()
    for name, config in sweep.configs.items():
        configs[name] = reader.config_to_resume(path / name, config, given)
        given.pop("seed", None)  # only the first repeats have the seed that the user gave
    _, copies = kept_files(directory.path, sweep.sources)
    if not sweep.sources:
        warn_of_missing_copy(*configs.values())
    for name, config in configs.items():
        folder = directory.path / name
        if is_there(folder / "summary.json"):  # pass all settings: the runs may have started on another cluster
            specs.append(resumed_run(folder, asdict(config), in_sweep=True))
        else:
            specs.append(new_run(replace(config, run_dir=str(folder)), copies=copies))
    return Session(specs, replace(sweep, configs=configs), directory)
