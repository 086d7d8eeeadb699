"""One run that is to be played: found to be right before anything is started, whether it is new or gone on with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulation.config import ROOT, SimulationConfig, is_there, real, shown
from simulation.errors import SettingsError, say
from simulation.game import Game
from simulation.lean_import import add_extra_folders, import_agentscope
from simulation.library import game_to_play, refuse_unknown_models, turns_of
from simulation.model_configs import ModelConfig, asked_models, is_within, read_models, refuse_elsewhere
from simulation.past_runs import Played, config_to_resume, is_spent, read_game, read_played, read_summary
from simulation.plan import cost_lines, estimate, plan_lines
from simulation.results import WHOLE, new_run_id


@dataclass(frozen=True)
class Task:
    """A run to play, whose settings, files and models were found to be right.

    Attributes:
        config: Its settings.
        models: The models there are.
        game: What is played.
        folder: Where its results go.
        run_id: Its name.
        played: What there is of it, if it is resumed.
        name: What tells it from the others, in words.
        status: What it has come to before, if nothing of it is left to play.
    """

    config: SimulationConfig
    models: dict[str, ModelConfig]
    game: Game
    folder: Path
    run_id: str = field(default_factory=new_run_id)
    played: Played | None = None
    name: str = ""
    status: str | None = None

    @property
    def rounds_left(self) -> range:
        """The rounds that are to be played, for which servers are needed."""
        played = 0 if self.played is None else len(self.played.results)
        return range(0) if self.status is not None else range(played + 1, self.config.rounds + 1)

    @property
    def tokens(self) -> int:
        """What they may cost at most."""
        if self.config.agent_type != "llm" or not self.rounds_left:
            return 0
        return sum(each.tokens for each in estimate(self.config, self.game, self.models, self.rounds_left))

    @property
    def plan(self) -> list[str]:
        """What would be played, for people."""
        return plan_lines(self.config, self.game, self.models, self.rounds_left)

    @property
    def costs(self) -> list[str]:
        """What it would cost, for people."""
        return cost_lines(self.config, self.game, self.models, self.rounds_left)

    @property
    def asked_models(self) -> list[ModelConfig]:
        """Those of its mixture, or those that participants take in turn."""
        return [self.models[name] for name in asked_models(self.config) if name in self.models]


def new_task(config: SimulationConfig) -> Task:
    """A run of which there is nothing yet; the seed is set. Raises SettingsError."""
    models = _checked(config)
    run_id = new_run_id()
    folder = Path(config.run_dir or ROOT / "runs" / run_id)
    return Task(config, models, game_to_play(config, models), folder, run_id)


def resumed_task(path: Path, given: dict[str, Any]) -> Task:
    """The run in a folder, with other settings where they are given. Raises SettingsError."""
    config, played = read_played(path, given)
    models, game = _checked(config), read_game(path, config)
    _refuse_other_models(path, config, game, models)
    return Task(config, models, game, real(path), played.run_id, played)


def _refuse_other_models(path: Path, config: SimulationConfig, game: Game, models: Mapping[str, ModelConfig]) -> None:
    """Raise SettingsError if participants would ask others than before: who asked which is told from the cast alone."""
    assert game.cast is not None
    before, now = game.cast.turns, turns_of(config, models)
    if before != now and len({*before, *now}) > 1:
        raise SettingsError(
            f"--model-per-host {config.model_per_host}: participants of the run in {path} asked {', '.join(before)} in "
            f"turn, which stays, and would ask {', '.join(now)}"
        )
    for share in game.cast.models:
        if models[share.name].model != share.model:
            raise SettingsError(
                f"--model-configs {shown(config.model_configs)}: {share.name} was {share.model} when the run in {path} "
                f"was begun, which stays, and is {models[share.name].model}"
            )


def finished_task(path: Path, given: dict[str, Any]) -> Task | None:
    """The same, if no round of it is left, or no tokens: its answers need not be read again."""
    config, summary = read_summary(path, "--resume ")
    budget = config.max_tokens
    config = config_to_resume(path, config, given)
    if summary["status"] not in ("complete", "partial"):
        return None
    if len(summary["rounds"]) < config.rounds and not is_spent(summary, budget, config.max_tokens):
        return None
    if not is_there(path / WHOLE):
        raise SettingsError(f"--resume {path}: its {WHOLE} is missing")
    return Task(config, {}, read_game(path, config), path, summary["run_id"], status=summary["status"])


def _checked(config: SimulationConfig) -> dict[str, ModelConfig]:
    """The models of a run, if it asks any; raises SettingsError if its participants cannot be made."""
    if config.agent_class is not None:
        import_agentscope()
        from simulation.custom import load_class, pack_class  # noqa: PLC0415 - AgentScope, which few refusals need

        add_extra_folders(config.extra_pythonpath)
        # a mistake in a person's file is found before anything is started
        pack_class(load_class(config.agent_class, config.agent_type))
    if config.agent_type != "llm":
        return {}
    models = read_models(config)
    refuse_unknown_models(config, models)
    return models


def refuse_above_budget(task: Task, name: str) -> None:
    """Raise SettingsError if a run of an experiment, called so, may cost more than it is allowed to."""
    allowed = task.config.max_tokens
    if allowed is not None and task.tokens > allowed:
        name = f" ({name})" if name else ""
        raise SettingsError(
            f"--max-tokens {allowed}: a run{name} may cost {task.tokens:,} tokens, more than these {allowed:,}"
        )


def refuse_sum_above_budget(tasks: list[Task], allowed: int | None) -> None:
    """Raise SettingsError if all runs that are left may together cost more than was allowed by hand."""
    if allowed is None:
        return
    tokens = sum(task.tokens for task in tasks)
    if tokens > allowed:
        raise SettingsError(
            f"--max-tokens {allowed}: these {len(tasks)} runs may together cost {tokens:,} tokens, not {allowed:,}; "
            "max_tokens in the experiment's file would bound each of them"
        )


def refuse_costs(tasks: list[Task], plan: Callable[[], list[str]]) -> None:
    """Say what models cost that are outside the cluster, and raise SettingsError unless they are allowed.

    Args:
        tasks: All runs.
        plan: What is said where there are several.
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
        refuse_elsewhere(config, model.name, model.base_url)
