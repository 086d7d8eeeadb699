"""What a game is played with: the prompts and personas that a person keeps in files, by name."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from simulation.cast import Cast
from simulation.config import SimulationConfig
from simulation.game import Game, Sampling, Wording
from simulation.model_configs import ModelConfig


def read_wording(config: SimulationConfig) -> Wording | None:
    """The prompt that the settings name; None where nobody asks a model. Raises SettingsError, naming the place."""
    return None


def read_cast(config: SimulationConfig, models: Mapping[str, ModelConfig]) -> Cast:
    """The personas and models that the settings name. Raises SettingsError, naming the place.

    Args:
        config: The settings; the seed is set.
        models: The models of the models' file, by name.
    """
    return Cast(config.seed or 0, config.participant_num)


def game_to_play(config: SimulationConfig, models: Mapping[str, ModelConfig]) -> Game:
    """The game that the settings and the files they name describe. Raises SettingsError."""
    return game_of(config, read_wording(config), read_cast(config, models))


def game_of(config: SimulationConfig, wording: Wording | None, cast: Cast | None) -> Game:
    """The game that the settings describe."""
    return Game(
        config.seed or 0,
        config.max_value,
        config.decimals,
        config.sleep_time,
        _sampling(config),
        Fraction(config.ratio),
        Fraction(config.offset),
        wording,
        cast,
        config.teams,
    )


def _sampling(config: SimulationConfig) -> Sampling | None:
    if config.agent_type != "llm":
        return None
    return Sampling(
        config.model_per_host,
        config.structured_output,
        config.samples_per_request,
        config.max_attempts,
        config.max_in_flight,
        config.attempt_timeout,
        config.reply_timeout,
    )
