"""Scenario of a game: the prompts and personas that the settings select from files, and the shares of models."""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Annotated

from simulation.errors import SettingsError, listed, meant_by, nearest, printable
from simulation.files import shown
from simulation.game.population import MODEL, ModelShare, Persona, PersonaSet, Population
from simulation.game.rules import Game, PromptTemplate, game_of
from simulation.llm.model_configs import ModelConfig, asked_models
from simulation.runs.yaml_file import Entry, YamlFile, read_by, read_yaml
from simulation.settings import FINEST, PATHS, SETTINGS, Setting, SimulationConfig, flag_of, fraction, number

PLACEHOLDERS = ("number", "max_value", "target", "persona", "team")
MOST_REASONING_TOKENS = 100_000
NAMES = list(SETTINGS)
OF_MODELS = (  # settings that only affect participants that use a model
    *("prompt", "prompts_file", "models"),
    *NAMES[NAMES.index("model_configs") + 1 : NAMES.index("vllm_base_port")],
)
SMALLEST_SHARE = Fraction(1, FINEST)


def read_wording(config: SimulationConfig) -> PromptTemplate | None:
    """Return the prompt that the settings name; None without models. Raises SettingsError with the place."""
    if config.agent_type != "llm":
        _refuse_without_model(config, "prompt")
        return None
    prompts = _prompts_in(config.prompts_file)
    _refuse_unknown("prompt", config.prompt, config.prompt, prompts, shown(config.prompts_file))
    return prompts[config.prompt]


def read_cast(config: SimulationConfig, models: Mapping[str, ModelConfig]) -> Population:
    """Return the personas and models that the settings name. Raises SettingsError with the place in the file.

    Args:
        config: The settings; the seed is set.
        models: The models of the model configuration file, by name.
    """
    sets = _persona_sets(config)
    if config.agent_type != "llm":
        _refuse_without_model(config, "models")
        return Population(config.seed or 0, config.participant_num, sets)
    if config.models is not None:
        return Population(config.seed or 0, config.participant_num, sets, _mixture(config, models))
    return Population(config.seed or 0, config.participant_num, sets, round_robin_models=turns_of(config, models))


def turns_of(config: SimulationConfig, models: Mapping[str, ModelConfig]) -> tuple[str, ...]:
    """Return the models, by their names on the model servers, that participants use in turn; empty for a mixture."""
    if config.agent_type != "llm" or config.models is not None:
        return ()
    return tuple(models[name].model for name in asked_models(config) if name in models)


def refuse_unknown_models(config: SimulationConfig, models: Mapping[str, ModelConfig]) -> None:
    """Raise SettingsError if a model that participants use in turn is missing; _mixture checks those of a mixture."""
    missing = [name for name in asked_models(config) if name not in models] if config.models is None else []
    if missing:
        raise SettingsError(
            f"--model-per-host {config.model_per_host}: participants would ask {asked_models(config)[0]} to "
            f"{asked_models(config)[-1]} in turn, and {shown(config.model_configs)} has no {missing[0]}: it has "
            f"{listed(models)}; name yours with --models"
        )


def build_game(config: SimulationConfig, models: Mapping[str, ModelConfig]) -> Game:
    """Build the game from the settings and the files they name. Raises SettingsError."""
    game = game_of(config, read_wording(config), read_cast(config, models))
    topics = [parts.topic for parts in game.cast.groupings] if game.cast is not None else []
    if config.teams is not None and config.teams not in topics:
        known = f"it has {listed(topics)}" if topics else "add --personas, or use several models"
        guess = meant_by(config.teams, topics)
        said = f"--teams {printable(config.teams)}: this game has no such grouping; {known}"
        raise SettingsError(f"{said}; {guess}" if guess else said)
    if game.wording is not None:
        said = game.wording.system + game.wording.instruction
        for name, there in (("personas", config.personas), ("teams", config.teams)):
            if f"{{{name[:-1]}}}" in said and there is None:
                raise SettingsError(
                    f"--prompt {game.wording.name}: tells participants of their {name[:-1]}; give --{name}, too"
                )
    return game


def refuse_without_model(config: SimulationConfig, given: Collection[str]) -> None:
    """Raise SettingsError if one of the given settings has no effect because no participant uses a model.

    The model configuration file is allowed, as it belongs to the cluster. `allow_remote_model` is allowed with a custom
    agent class, which may call the models itself.
    """
    for name in OF_MODELS if config.agent_type != "llm" else ():
        value = getattr(config, name)
        of_class = config.agent_class is not None and name == "allow_remote_model"
        if name in given and value is not None and not of_class:
            text = "" if value is True else f" {printable(shown(value) if name in PATHS else str(value))}"
            raise SettingsError(f"{flag_of(name)}{text}: does nothing with --agent-type {config.agent_type}")


def _refuse_without_model(config: SimulationConfig, name: str) -> None:
    """Raise SettingsError if a setting differs from its default and no participant uses a model."""
    if getattr(config, name) != SimulationConfig.__dataclass_fields__[name].default:
        refuse_without_model(config, (name,))


def _refuse_unknown(setting: str, value: str, name: str, known: Iterable[str], where: str) -> None:
    """Raise SettingsError if a setting names an entry that is not in its file."""
    names = list(known)
    if name not in names:
        said = printable(value) if name == value else f"{printable(value)}: {printable(name) or 'an empty name'}"
        what = {"prompt": "prompt", "personas": "set of personas", "models": "model"}[setting]
        guess = meant_by(name, names)
        guess = f"; {guess} It has {listed(names)}" if guess else f"; it has {listed(names)}"
        guess += "; with more --model-per-host one entry becomes model_1, model_2, ..." if setting == "models" else ""
        raise SettingsError(f"{flag_of(setting)} {said}: {where} has no such {what}{guess}")


# --- Prompts ---------------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    if not text.strip():
        raise SettingsError("must be a text, and is empty")
    return text


def _name(text: str) -> str:
    """Return the name if it is printable in one line on terminals and pages. Raises SettingsError."""
    if _text(text) != printable(text):
        raise SettingsError("must be a name in one line, of signs that can be shown")
    return text


def _with_placeholders(text: str) -> str:
    """Return the text if its placeholders are all known. Raises SettingsError."""
    try:
        fields = list(string.Formatter().parse(_text(text)))
    except ValueError:
        raise SettingsError("a brace stands alone; write {{ or }} for one that is meant as such") from None
    for _, name, form, conversion in fields:
        if name is not None and (name not in PLACEHOLDERS or form or conversion):
            known = [f"{{{each}}}" for each in PLACEHOLDERS]
            whole = f"{name}!{conversion}" if conversion else f"{name}:{form}" if form else name
            raise SettingsError(f"{{{whole}}} is not known here; {nearest(f'{{{name}}}', known)}")
    return text


def _reasoning_tokens(text: str) -> int:
    tokens = number(int, "reasoning_tokens", text)
    Setting(None, "", 1, MOST_REASONING_TOKENS).check("reasoning_tokens", tokens)
    return tokens


class PromptEntry(Entry):
    """A prompt of the prompts file; see PromptTemplate."""

    system: Annotated[str, read_by(_with_placeholders)]
    instruction: Annotated[str, read_by(_with_placeholders)]
    reasoning_tokens: Annotated[int | None, read_by(_reasoning_tokens)] = None


@lru_cache(maxsize=8)  # an experiment names the same file in every combination
def _prompts_in(path: str) -> dict[str, PromptTemplate]:
    """Return all prompts of a file, by name. Raises SettingsError with the place in the file."""
    prompts = read_yaml(path, "--prompts-file").read_as(dict[str, PromptEntry])
    return {
        name: PromptTemplate(name, entry.system, entry.instruction, entry.reasoning_tokens)
        for name, entry in prompts.items()
    }


# --- Personas --------------------------------------------------------------------------------------------------------


def _share(text: str) -> Fraction:
    return fraction("share", text, SMALLEST_SHARE, 1)


class PersonaEntry(Entry):
    """A persona of the personas file; see Persona."""

    name: Annotated[str, read_by(_name)]
    share: Annotated[Fraction, read_by(_share)]
    text: Annotated[str, read_by(_text)] = ""


def _persona_sets(config: SimulationConfig) -> tuple[PersonaSet, ...]:
    """Return the persona sets that the settings name. Raises SettingsError."""
    if config.personas is None:
        return ()
    sets = _personas_in(config.personas_file)
    names = [name.strip() for name in config.personas.split("+")]
    for name in names:
        _refuse_unknown("personas", config.personas, name, sets, shown(config.personas_file))
    if len(set(names)) < len(names):
        raise SettingsError(f"--personas {config.personas}: names a set twice")
    return tuple(sets[name] for name in names)


@lru_cache(maxsize=8)  # as for prompts
def _personas_in(path: str) -> dict[str, PersonaSet]:
    """Return all persona sets of a file, by name. Raises SettingsError with the place in the file."""
    file = read_yaml(path, "--personas-file")
    entries = file.read_as(dict[str, list[PersonaEntry]])
    for name, personas in entries.items():
        if name == MODEL or "+" in name or not name.strip() or name != printable(name):
            raise file.refused((name,), f"a set cannot be called {name!r}: that is how models, or several sets, are")
        _refuse_twice(file, name, personas)
        total = sum(each.share for each in personas)
        if total != 1:
            raise file.refused((name,), f"the shares of {name} add up to {total}; they must add up to exactly 1")
    return {
        name: PersonaSet(name, tuple(Persona(each.name, each.share, each.text) for each in personas))
        for name, personas in entries.items()
    }


def _refuse_twice(file: YamlFile, name: str, personas: list[PersonaEntry]) -> None:
    seen: set[str] = set()
    for position, persona in enumerate(personas):
        if persona.name in seen:
            raise file.refused((name, position, "name"), f"{name} has a persona {persona.name} already")
        seen.add(persona.name)


# --- Shares of models ------------------------------------------------------------------------------------------------


def _mixture(config: SimulationConfig, models: Mapping[str, ModelConfig]) -> tuple[ModelShare, ...]:
    """Parse shares of models such as `model_1=2/3,model_2=1/3`. Raises SettingsError."""
    said = f"--models {printable(config.models or '')}"
    shares: dict[str, Fraction] = {}
    for part in (config.models or "").split(","):
        name, equals, share = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise SettingsError(f"{said}: must be shares of models, as model_1=2/3,model_2=1/3")
        _refuse_unknown("models", config.models or "", name, models, shown(config.model_configs))
        if name in shares:
            raise SettingsError(f"{said}: names {name} twice")
        shares[name] = fraction(f"{said}: the share of {name},", share, SMALLEST_SHARE, 1)
    total = sum(shares.values())
    if total != 1:
        raise SettingsError(f"{said}: the shares add up to {total}; they must add up to exactly 1")
    return tuple(ModelShare(name, share, models[name].model) for name, share in shares.items())
