"""Building a game from the settings, and from the files that define prompts, personas and models."""

import string
from collections.abc import Collection, Mapping
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import yaml

from simulation.errors import SettingsError, listed, meant_by, nearest, printable
from simulation.files import shown
from simulation.game.game import Game, PromptTemplate
from simulation.game.population import MODEL, ModelShare, Persona, Population
from simulation.game.rules import game_of
from simulation.game.tally import try_game
from simulation.llm.model_configs import ModelConfig, asked_models
from simulation.runs.yaml_file import YamlFile
from simulation.settings import FINEST, PATHS, SETTINGS, Setting, SimulationConfig, flag_of, fraction, to_number

PLACEHOLDERS = ("{number}", "{max_value}", "{rules}", "{target}", "{persona}", "{team}")
MOST_REASONING_TOKENS = 100_000
_names = list(SETTINGS)
OF_MODELS = _names[_names.index("model_configs") + 1 : _names.index("vllm_base_port")]  # settings that need a model
OF_MODELS += ["prompt", "prompts_file", "models"]
Models = Mapping[str, ModelConfig]


def build_game(config: SimulationConfig, models: Models, given: Collection[str] = ()) -> Game:
    """Build the game that the settings describe.

    Raises SettingsError if a setting or one of the files is invalid, or if a setting in `given` has no effect.
    """
    changed = [name for name in ("prompt", "models") if getattr(config, name) != getattr(SimulationConfig, name)]
    _check_model_settings(config, [*given, *changed])
    prompt, population = read_prompt(config), read_population(config, models)
    if config.teams is not None:
        topics = [grouping.topic for grouping in population.groupings]
        advice = "" if topics else "; add --personas, or use several models"
        _check_known(config, "teams", config.teams, topics, "this game has no such grouping", advice)
    for name, value in (("persona", config.personas), ("team", config.teams)):
        if prompt is not None and value is None and f"{{{name}}}" in prompt.system + prompt.instruction:
            raise SettingsError(f"--prompt {prompt.name}: tells participants of their {name}; give --{name}s, too")
    game = game_of(config, prompt, population)
    try_game(game, shown(config.game))
    if prompt is not None and "{target}" in prompt.system + prompt.instruction and not hasattr(game, "target"):
        raise SettingsError(
            f"--prompt {prompt.name}: names a {{target}}, which the game has not; use one with {{rules}}"
        )
    if config.max_value != SimulationConfig.max_value and type(game).high is not Game.high:
        raise SettingsError(
            f"--max-value {config.max_value}: the numbers of this game are from {game.low} to {game.high}"
        )
    return game


def _check_model_settings(config: SimulationConfig, given: Collection[str]) -> None:
    """Raise SettingsError if a setting in `given` has no effect because no participant uses a model."""
    for name in OF_MODELS if config.agent_type != "llm" else ():
        value = getattr(config, name)
        of_class = config.agent_class is not None and name == "allow_remote_model"  # the class may call models
        if name in given and value is not None and not of_class:
            text = "" if value is True else f" {printable(shown(value) if name in PATHS else str(value))}"
            raise SettingsError(f"{flag_of(name)}{text}: does nothing with --agent-type {config.agent_type}")


def _check_known(
    config: SimulationConfig, setting: str, name: str, known: Collection[str], problem: str, advice: str = ""
) -> None:
    """Raise SettingsError if `name`, which is the value of `setting` or a part of it, is not in `known`."""
    if name not in known:
        guess, value = meant_by(name, known), getattr(config, setting)
        hint = f"{guess} It has {listed(known)}" if guess else f"it has {listed(known)}"
        value = printable(value) + (f": {printable(name) or 'an empty name'}" if name != value else "")
        raise SettingsError(f"{flag_of(setting)} {value}: {problem}; {hint}{advice}")


def read_prompt(config: SimulationConfig) -> PromptTemplate | None:
    """Return the prompt that the settings select, or None if no participant uses a model. Raises SettingsError."""
    if config.agent_type != "llm":
        return None
    prompts = _prompts_in(config.prompts_file)
    _check_known(config, "prompt", config.prompt, prompts, f"{shown(config.prompts_file)} has no such prompt")
    return prompts[config.prompt]


@lru_cache(maxsize=8)  # all runs of an experiment read the same file
def _prompts_in(path: str) -> dict[str, PromptTemplate]:
    file = YamlFile(path, "--prompts-file")
    readers = {"system": _template, "instruction": _template, "reasoning_tokens": _reasoning_tokens}
    return {
        name: PromptTemplate(name, **file.read_entry(name, node, readers, optional="reasoning_tokens"))
        for name, node in file.nodes.items()
    }


def _template(text: str) -> str:
    """Return the text unchanged. Raises SettingsError if the text is empty or contains an unknown placeholder."""
    try:
        parts = list(string.Formatter().parse(_text(text)))
    except ValueError:
        raise SettingsError("a single brace; write {{ or }} for a brace in the text") from None
    for _, name, form, conversion in parts:
        whole = f"{{{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}}}"
        if name is not None and whole not in PLACEHOLDERS:
            raise SettingsError(f"{whole} is not known here; {nearest(f'{{{name}}}', PLACEHOLDERS)}")
    return text


def _text(text: str) -> str:
    if not text.strip():
        raise SettingsError("must not be empty")
    return text


def _reasoning_tokens(text: str) -> int:
    tokens = to_number(int, "reasoning_tokens", text)
    Setting(None, "", 1, MOST_REASONING_TOKENS).check("reasoning_tokens", tokens)
    return tokens


_share = partial(fraction, low=Fraction(1, FINEST), high=1)


def read_population(config: SimulationConfig, models: Models) -> Population:
    """Return the personas and models that the settings select. Raises SettingsError if one of them does not exist."""
    names = [name.strip() for name in config.personas.split("+")] if config.personas is not None else []
    sets = _personas_in(config.personas_file) if names else {}
    for name in names:
        _check_known(config, "personas", name, sets, f"{shown(config.personas_file)} has no such set of personas")
    if len(set(names)) < len(names):
        raise SettingsError(f"--personas {config.personas}: names a set twice")
    chosen = {name: sets[name] for name in names}
    return Population(config.seed or 0, config.participant_num, chosen, *choose_models(config, models))


@lru_cache(maxsize=8)  # as for the prompts file
def _personas_in(path: str) -> dict[str, tuple[Persona, ...]]:
    file = YamlFile(path, "--personas-file")
    readers: dict[str, Any] = {"name": _name, "share": partial(_share, "share"), "text": _text}
    sets = {}
    for topic, node in file.nodes.items():
        if topic == MODEL or "+" in topic or not topic.strip() or topic != printable(topic):
            raise file.error(node, f"a set cannot be called {topic!r}: + separates sets, {MODEL} means the models")
        if not isinstance(node, yaml.SequenceNode):
            raise file.error(node, f"{topic} must be a list")
        personas: dict[str, Persona] = {}
        for each in node.value:
            persona = Persona(**file.read_entry(topic, each, readers, optional="text"))
            if persona.name in personas:
                raise file.error(file.nodes_in(each, "")["name"], f"{topic} has a persona {persona.name} already")
            personas[persona.name] = persona
        if (total := sum(each.share for each in personas.values())) != 1:
            raise file.error(node, f"the shares of {topic} add up to {total}; they must add up to exactly 1")
        sets[topic] = tuple(personas.values())
    return sets


def _name(text: str) -> str:
    if _text(text) != printable(text):  # terminals and pages show the name
        raise SettingsError("must be one line of printable characters")
    return text


def choose_models(config: SimulationConfig, models: Models) -> tuple[tuple[ModelShare, ...], tuple[str, ...]]:
    """Return the mixture of models, and the models assigned round-robin. At least one of these two tuples is empty.

    Raises SettingsError if a model does not exist or the shares are invalid.
    """
    if config.agent_type != "llm":
        return (), ()
    if config.models is None:
        names = asked_models(config)
        if missing := [name for name in names if name not in models]:
            raise SettingsError(
                f"--model-per-host {config.model_per_host}: participants would ask {names[0]} to {names[-1]} in turn, "
                f"and {shown(config.model_configs)} has no {missing[0]}: it has {listed(models)}; name yours with "
                "--models"
            )
        return (), tuple(models[name].model for name in names)
    flag, problem = f"--models {printable(config.models)}", f"{shown(config.model_configs)} has no such model"
    advice = "; with more --model-per-host one entry becomes model_1, model_2, ..."
    shares: dict[str, Fraction] = {}
    for part in config.models.split(","):
        name, _, share = map(str.strip, part.partition("="))
        if not name or "=" not in part:
            raise SettingsError(f"{flag}: must be shares of models, as model_1=2/3,model_2=1/3")
        _check_known(config, "models", name, models, problem, advice)
        if name in shares:
            raise SettingsError(f"{flag}: names {name} twice")
        shares[name] = _share(f"{flag}: the share of {name},", share)
    if (total := sum(shares.values())) != 1:
        raise SettingsError(f"{flag}: the shares add up to {total}; they must add up to exactly 1")
    return tuple(ModelShare(name, share, models[name].model) for name, share in shares.items()), ()
