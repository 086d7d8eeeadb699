"""Building a game from the settings, and from the files that define prompts, personas and models."""

import string
from array import array
from collections.abc import Collection, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from simulation.errors import SettingsError, listed, meant_by, nearest, printable
from simulation.files import content_of, shown, warn_once
from simulation.game.game import Game, PromptTemplate
from simulation.game.parameters import Parameter, declared
from simulation.game.population import KIND, RESERVED, Combination, ModelShare, Persona, PlayerShare, Population
from simulation.game.rules import game_of
from simulation.game.tally import Tally, try_game
from simulation.llm.model_configs import ModelConfig, unnamed_models
from simulation.results.reader import SavedRun, read_run, read_summary
from simulation.settings import SETTINGS, Setting, SimulationConfig, flag_of, labels_of, parse_shares, share_in
from simulation.user_code import file_of, files_of
from simulation.yaml_file import YamlFile

PLACEHOLDERS = ("{number}", "{max_value}", "{rules}", "{target}", "{persona}", "{team}")
REASONING_TOKENS = Parameter(int, Setting(None, "", 1, 100_000))
_names = list(SETTINGS)
OF_MODELS = _names[_names.index("model_configs") + 1 : _names.index("vllm_base_port")]  # settings that need a model
OF_MODELS += ["prompt", "prompts_file", "models"]
MOST_RECORDED, MOST_COMBINATIONS = 10**6, 10**4  # distinct answers that surrogates draw from; combinations of personas
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
    game, text = game_of(config, prompt, population), "" if prompt is None else prompt.system + prompt.instruction
    for name, value in (("persona", config.personas), ("team", config.teams)):
        if value is None and f"{{{name}}}" in text:
            raise SettingsError(f"--prompt {config.prompt}: tells participants of their {name}; give --{name}s, too")
    try_game(game, shown(config.game))
    if "{target}" in text and not hasattr(game, "target"):
        problem = "names a {target}, which the game has not; use one with {rules}"
        raise SettingsError(f"--prompt {config.prompt}: {problem}")
    if config.max_value != SimulationConfig.max_value and type(game).high is not Game.high:
        allowed = f"the numbers of this game are from {game.low} to {game.high}"
        raise SettingsError(f"--max-value {config.max_value}: {allowed}")
    return game


def _check_model_settings(config: SimulationConfig, given: Collection[str]) -> None:
    """Raise SettingsError if a setting in `given` has no effect because no participant uses a model."""
    who = f"--agent-type {config.agent_type}" if config.players is None else f"--players {printable(config.players)}"
    for name in OF_MODELS:
        value, used = getattr(config, name), bool(unnamed_models(config) if name == "models" else config.uses_models)
        of_class = name == "allow_remote_model" and any(kind.agent_class for kind in config.kinds)  # may call models
        if name in given and value is not None and not used and not of_class:
            text = "" if value is True else f" {printable(shown(value) if SETTINGS[name].path else str(value))}"
            raise SettingsError(f"{flag_of(name)}{text}: does nothing with {who}")


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
    if not config.uses_models:
        return None
    prompts = _prompts_in(config.prompts_file, content_of(config.prompts_file))
    _check_known(config, "prompt", config.prompt, prompts, f"{shown(config.prompts_file)} has no such prompt")
    return prompts[config.prompt]


@lru_cache(maxsize=8)  # all runs of an experiment read the same file, unless it has changed
def _prompts_in(path: str, _content: bytes | None) -> dict[str, PromptTemplate]:
    file = YamlFile(path, "--prompts-file")
    readers: dict[str, Any] = {"system": _template, "instruction": _template}
    readers["reasoning_tokens"] = partial(REASONING_TOKENS.parse, "reasoning_tokens")
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


def read_population(config: SimulationConfig, models: Models) -> Population:
    """Return the personas and models that the settings select. Raises SettingsError if one of them does not exist."""
    names = [name.strip() for name in config.personas.split("+")] if config.personas is not None else []
    sets = _personas_in(config.personas_file, content_of(config.personas_file)) if names else {}
    for name in names:
        _check_known(config, "personas", name, sets, f"{shown(config.personas_file)} has no such set of personas")
    if len(set(names)) < len(names):
        raise SettingsError(f"--personas {config.personas}: names a set twice")
    chosen = {name: sets[name] for name in names}
    return Population(config.seed or 0, config.participant_num, chosen, **choose_players(config, models))


@lru_cache(maxsize=8)  # as for the prompts file
def _personas_in(path: str, _content: bytes | None) -> dict[str, tuple[Persona, ...]]:
    file = YamlFile(path, "--personas-file")
    readers: dict[str, Any] = {"name": _name, "share": partial(share_in, "share"), "text": _text}
    sets = {}
    for topic, node in file.nodes.items():
        if topic in RESERVED or "+" in topic or not topic.strip() or topic != printable(topic):
            why = f"+ separates sets, and {', '.join(RESERVED[:-1])} and {RESERVED[-1]} are columns of answers.parquet"
            raise file.error(node, f"a set cannot be called {topic!r}: {why}")
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


def choose_players(config: SimulationConfig, models: Models) -> dict[str, Any]:
    """Return the one field of Population that says who plays: kinds of players, a mixture of models, models in turn.

    Raises SettingsError if a model does not exist or the shares of models are invalid.
    """
    chosen = _choose_models(config, models)
    if config.players is None:
        return chosen
    mixture, in_turn = chosen.get("models", ()), chosen.get("round_robin_models", ())
    names = [each.model for each in mixture]  # names on the servers
    distinct = (replace(each, model=each.name) if names.count(each.model) > 1 else each for each in mixture)
    in_shares = (ModelShare(name, Fraction(1, len(in_turn)), models[name].model) for name in unnamed_models(config))
    unnamed = tuple(distinct if mixture else in_shares)
    players = []
    for kind, label in zip(config.kinds, labels_of(config.kinds), strict=True):
        asked = unnamed if kind.asks_models else ()
        if kind.model is not None:
            _check_known(config, "players", kind.model, models, f"{shown(config.model_configs)} has no such model")
            asked = (ModelShare(kind.model, Fraction(1), models[kind.model].model),)
        players.append(PlayerShare(printable(label), kind.share, asked))
    return {"players": tuple(players)}


def _choose_models(config: SimulationConfig, models: Models) -> dict[str, Any]:
    """Return the field of Population that says which models those players ask whose kind names none."""
    names = unnamed_models(config)
    if not names:
        return {}
    if config.models is None:
        if missing := [name for name in names if name not in models]:
            asked = f"participants would ask {names[0]} to {names[-1]} in turn"
            problem = f"{shown(config.model_configs)} has no {missing[0]}: it has {listed(models)}"
            advice = "name yours with --models"
            raise SettingsError(f"--model-per-host {config.model_per_host}: {asked}, and {problem}; {advice}")
        return {"round_robin_models": tuple(models[name].model for name in names)}
    flag, problem = f"--models {printable(config.models)}", f"{shown(config.model_configs)} has no such model"
    advice = "; with more --model-per-host one entry becomes model_1, model_2, ..."
    parts = list[tuple[str, str]]()
    for part in config.models.split(","):
        name, equals, share = map(str.strip, part.partition("="))
        if not (name and equals):
            raise SettingsError(f"{flag}: must be shares of models, as model_1=2/3,model_2=1/3")
        _check_known(config, "models", name, models, problem, advice)
        parts.append((name, share))
    shares = parse_shares(flag, parts)
    return {"models": tuple(ModelShare(name, share, models[name].model) for name, share in shares.items())}


# --- Recorded runs ---------------------------------------------------------------------------------------------------


def read_recorded(config: SimulationConfig, game: Game) -> tuple[Game, dict[str, Any]]:
    """Read the runs that surrogates draw from. Return the game, which now names them, and their answers by kind.

    The answers are the arguments of `surrogate_of`. Raises SettingsError if a run does not fit this game.
    """
    recorded, players = dict[str, Any](), list(game.population.players)
    for index, kind in enumerate(config.kinds):
        if kind.run is not None:
            try:
                saved = read_summary(Path(kind.run))
                run = _read_once(saved.path, saved.run_id, saved.rounds_finished)
                topics, answers = _recorded_in(run, config, game)
            except SettingsError as error:
                raise SettingsError(f"--players surrogate:{printable(shown(kind.run))}: {error}") from None
            by = f" by {' and '.join(topics)}" if topics else ""
            players[index] = replace(players[index], source=f"draws from the answers{by} of run {run.run_id}")
            recorded[kind.text] = (topics, answers)
    return replace(game, population=replace(game.population, players=tuple(players))), recorded


@lru_cache(maxsize=4)  # the runs of a sweep draw from few recorded runs
def _read_once(path: Path, _run_id: str, _rounds: int) -> SavedRun:
    return read_run(path)


def _recorded_in(run: SavedRun, config: SimulationConfig, game: Game) -> tuple[tuple[str, ...], dict[int, Any]]:
    """Return the persona sets that tell answers of a run apart, and its answers (see `Recorded` in surrogate.py).

    If language models and others played in that run, the answers are those of the models.
    """
    if Path(run.config.game).name != Path(config.game).name:
        raise SettingsError(f"that run played the game {shown(run.config.game)}, not {shown(config.game)}")
    their_game = game_of(replace(run.config, game=config.game), None, run.game.population)  # no code of that run
    for name in ("low", "high", "decimals", *declared(type(game), Game)):
        theirs, ours = getattr(their_game, name), getattr(game, name)
        if theirs != ours:
            raise SettingsError(f"that run has {name} {theirs}, and this game {ours}; they must be equal")
    file, sources = file_of(config.game), run.summary.get("sources", [])
    hashes = {each["sha256"] for each in sources if Path(each["name"]).name == Path(file).name}
    if file and hashes and files_of(file)[0].sha256 not in hashes:
        warn_once(f"{shown(file)} has changed since run {run.run_id}, from which surrogates draw")
    if run.rounds_finished < config.rounds:
        raise SettingsError(f"that run has {run.rounds_finished} finished rounds, and this game has {config.rounds}")
    population = run.game.population
    topics, same = tuple(population.persona_sets), _texts(population) == _texts(game.population)
    topics = topics if same else ()
    asking = {each.label for each in population.players if each.models}
    by_kind = [population.by_topic[KIND]] if asking else []
    parts = Combination((*by_kind, *(population.by_topic[topic] for topic in topics)))
    if np.prod([len(each.names) for each in parts.groupings], dtype=float) > MOST_COMBINATIONS:
        raise SettingsError(f"that run has more than {MOST_COMBINATIONS:,} combinations of personas")
    recorded, size = dict[int, Any](), 0
    for number, tallies in enumerate(run.tallies_of([parts])[parts.topic][: config.rounds], start=1):
        by_personas: dict[tuple[str, ...], Tally] = {}
        for names, tally in tallies.items():
            if not asking or names[0] in asking:
                key = names[len(by_kind) :]
                by_personas[key] = by_personas.get(key, Tally(0)) + tally
        for key, tally in by_personas.items():
            if not tally.answered:
                who = f"participants with the persona {', '.join(key)}" if key else "participants"
                raise SettingsError(f"round {number} of that run has no answers of {who}")
        if (size := size + sum(len(tally.units) for tally in by_personas.values())) > MOST_RECORDED:
            raise SettingsError(f"that run has more than {MOST_RECORDED:,} different answers, by round and persona")
        recorded[number] = {
            key: (array("q", tally.units.tobytes()), array("q", np.cumsum(tally.counts).tobytes()))
            for key, tally in by_personas.items()
        }
    return topics, recorded


def _texts(population: Population) -> dict[str, list[tuple[str, str]]]:
    """Return the names and texts of all personas by set. Their shares may differ between two runs."""
    return {topic: [(each.name, each.text) for each in personas] for topic, personas in population.persona_sets.items()}
