"""Taking answers from a recorded run (--replay): which of them may be the same is decided before the run."""

from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from loguru import logger

from simulation.errors import SettingsError, reason
from simulation.files import names_file, shown
from simulation.game.game import Game
from simulation.results import reader
from simulation.results.texts_parquet import RecordedTexts
from simulation.settings import SimulationConfig

if TYPE_CHECKING:
    from simulation.runs.run_spec import RunSpec


def with_replay(spec: "RunSpec") -> "RunSpec":
    """Return the specification, completed with the texts that --replay names, if any can be the same.

    Raises SettingsError if the recorded run cannot be read, or if nothing can be the same and no requests may be sent.
    """
    config, path = spec.config, Path(shown(spec.config.replay or ""))
    if config.replay is None:
        return spec
    try:
        before = reader.read_run(path, "--replay ")
        problem = _differs(spec, before)
        if not problem:
            seed = before.config.seed if before.summary.get("repeatable") else None
            rounds = _rounds_alike(spec, before)
            whole = sum(1 for result in before.results[:rounds] if not result.tally.failed)
            return replace(spec, replay=RecordedTexts(path, rounds, seed, whole))
    except (OSError, pa.ArrowException) as error:
        raise SettingsError(f"--replay {path}: {reason(error)}") from None
    except SettingsError as error:
        raise (error if str(error).startswith("--replay") else SettingsError(f"--replay: {error}")) from None
    if config.offline:
        raise SettingsError(f"--replay {path}: {problem}, so no answer can be taken from it")
    logger.warning(f"--replay {path}: {problem}, so no answer is taken from it")
    return spec


def _rounds_alike(spec: "RunSpec", before: reader.SavedRun) -> int:
    """Return up to which round prompts cannot differ from those of a recorded run, whose texts need not be known.

    This is the case in round 1 if the words of the game and the participants are the same, and in a later round if all
    participants answered in the rounds before. Code of the user's may have changed, so that nothing is certain with it.
    """

    def of(config: SimulationConfig, game: Game) -> tuple[object, ...]:
        cast = game.population if game.population.groupings else replace(game.population, seed=0, total=0, block=1)
        return config.game, {*config.set}, config.ratio, config.offset, config.teams, game.prompt, game.words, cast

    users = names_file(spec.config.game) or any(kind.agent_class is not None for kind in spec.config.kinds)
    if users or of(spec.config, spec.game) != of(before.config, before.game):
        return 0
    whole = sum(1 for _ in takewhile(lambda result: not result.tally.failed, before.results))
    return whole + 1 if before.config.participant_num == spec.config.participant_num else 1


def _differs(spec: "RunSpec", before: reader.SavedRun) -> str:
    """Return why no answer of a recorded run can be the same, or an empty text."""
    config, was = spec.config, before.config
    if not was.uses_models:
        return "no participant of that run asked a language model"
    if before.summary.get("model_settings") != spec.model_settings:
        return "its models had other settings"
    numbers = [(each.structured_output, each.max_value, each.decimals) for each in (config, was)]
    tokens = [each.prompt and each.prompt.reasoning_tokens for each in (spec.game, before.game)]
    return "its answers had another form or length" if len({*numbers}) > 1 or len({*tokens}) > 1 else ""
