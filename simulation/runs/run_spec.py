"""The specification of a run: the validated settings, files and models, and the maximum cost. No requests are sent."""

import math
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simulation.errors import SettingsError, listed
from simulation.files import HOME, is_there, names_file, real, shown, warn_once
from simulation.game.game import Game, game_class
from simulation.game.human import HumanData
from simulation.game.parameters import all_assignments, declared
from simulation.game.population import Population, largest_remainder
from simulation.game.rules import question_for
from simulation.game.tally import Tally, Winners, announcement_of, has_converged, score
from simulation.llm.model_configs import ModelConfig, asked_models, is_within, read_models, settings_hash
from simulation.llm.prompts import Prompt, answer_tokens, instruction, prompt_for, rules
from simulation.provenance import kept_files, sources_of, with_copies, with_files
from simulation.results import reader
from simulation.results.run_directory import WHOLE, new_run_id
from simulation.results.tables import table_lines
from simulation.results.texts_parquet import RecordedTexts
from simulation.rpc.endpoints import ranges
from simulation.rpc.lean_import import add_extra_folders, import_agentscope
from simulation.runs.human_data import file_beside, people_beside
from simulation.runs.replay import with_replay
from simulation.runs.scenario import build_game, choose_players, read_recorded
from simulation.settings import FLAGS_OF_GAMES, SimulationConfig
from simulation.user_code import UserFile

COSTS = ("requests", "prompt tokens", "answer tokens")
MOST_SYSTEMS = 10_000  # maximum number of system prompts that are compared with recorded ones


class RoundEstimate(NamedTuple):
    """The approximate maximum cost of one round if every answer is usable (see `token_count`)."""

    round: int
    requests: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class RunSpec:
    """The specification of a run. All files that the run needs were read and checked."""

    config: SimulationConfig
    models: dict[str, ModelConfig]  # all models of the model configurations, by name
    game: Game
    folder: Path
    run_id: str = field(default_factory=new_run_id)
    label: str = ""  # the number of the run in an experiment, and what distinguishes it from the others
    about: str = ""  # what the experiment file states about its only run
    saved: reader.SavedRun | None = None  # the saved run, if this run resumes it
    status: str | None = None  # the saved status, if the run is finished
    recorded: Mapping[str, Any] = field(default_factory=dict)  # what surrogates draw from (see `read_recorded`)
    sources: tuple[UserFile, ...] = ()  # the users' files in use, as they were when the run was started
    copies: Mapping[str, str] = field(default_factory=dict)  # files to use in place of some of these, by path
    people: tuple[HumanData, ...] = ()  # figures of people to show beside the run
    replay: RecordedTexts | None = None  # texts of a recorded run to take answers from (see --replay)

    @property
    def model_settings(self) -> str | None:
        """Return a hash of the settings of the models in use, or None without models."""
        return settings_hash(self.asked_models, named=self.config.models is not None)

    @property
    def rounds_left(self) -> range:
        """Return the numbers of the remaining rounds. A finished run has none."""
        results = self.saved.results if self.saved is not None else []
        is_over = self.status is not None or has_converged(results, self.config.until_converged, self.game.scale)
        return range(0) if is_over else range(len(results) + 1, self.config.rounds + 1)

    @property
    def asked_models(self) -> list[ModelConfig]:
        """Return the models in `models` that the participants of this run use."""
        return [self.models[name] for name in asked_models(self.config) if name in self.models]

    def plan_lines(self) -> list[str]:
        """Return the lines of a text that describes the remaining rounds and their maximum cost."""
        config, game, left = self.config, self.game, len(self.rounds_left)
        fewest, rest = divmod(config.participant_num, len(config.hosts) * config.server_per_host)
        each = f"{fewest:,} to {fewest + 1:,}" if rest else f"{fewest:,}"
        ports = list(config.ports)
        kinds = game.population.players_in_words
        kind = f"({kinds})" if kinds else config.agent_type if config.agent_class is None else shown(config.agent_class)
        return [
            f"hosts: {len(config.hosts)} ({' '.join(config.hosts)})",
            f"servers on each host: {config.server_per_host} for participants, ports "
            f"{ranges(ports[: config.server_per_host])}; {config.moderator_per_host} for moderators, ports "
            f"{ranges(ports[config.server_per_host :])}",
            f"participants: {config.participant_num:,} {kind}, {each} on each server",
            *(f"{one.label}: {one.source}" for one in game.population.players if one.source is not None),
            f"rounds: {config.rounds}"
            + (f", of which {left} are left" if left < config.rounds else "")
            + (f"; fewer if they move less than {config.until_converged:g}" if config.until_converged else ""),
            f"game: numbers from {game.low:,} to {game.high:,}, {game.words.goal} wins"
            + (f"; prompt {game.prompt.name}" if game.prompt is not None else "")
            + "".join(f"; personas {name} ({len(each)})" for name, each in game.population.persona_sets.items())
            + (f"; teams by {game.teams}" if game.teams is not None else ""),
            *(self._cost_lines() if config.uses_models else ()),
        ]

    def _cost_lines(self) -> list[str]:
        rounds = self.estimate(self.rounds_left)
        in_all = ("in all", *(sum(each[column] for each in rounds) for column in (1, 2, 3)))
        rows = [[str(name), *(f"{cost:,}" for cost in costs)] for name, *costs in (*rounds, in_all)]
        return [
            *map(self._model_line, self.asked_models),
            *table_lines(("round", *COSTS), rows, dropped=COSTS[:2], left=()),
            *([self._recorded_line(self.replay)] if self.replay is not None else ()),
            f"at most about {self.tokens:,} tokens, if every answer is usable{price_text(self.tokens, self.config)}",
            *self._duration_lines(sum(each.requests for each in rounds)),
        ]

    def _model_line(self, model: ModelConfig) -> str:
        config, line = self.config, f"models: {model.name} is {model.model} at {model.base_url}"
        if is_within(model.base_url, ()):
            return f"{line}, on each host"
        outside = not is_within(model.base_url, config.hosts) and not config.allow_remote_model
        return f"{line}, outside the cluster; give --allow-remote-model if you mean it" if outside else line

    def _duration_lines(self, requests: int) -> list[str]:
        """Return a line with the time that all this takes if the only model has limits per minute; else []."""
        limits = self.asked_models[0].per_minute if len(self.asked_models) == 1 else ()
        counts = zip((requests, self.tokens), limits, ("requests", "tokens"), strict=False)
        needed = [(count / limit, f"{limit:,} {what}") for count, limit, what in counts if limit]
        if not needed:
            return []
        minutes, named = max(each for each, _ in needed), " and ".join(text for _, text in needed)
        return [f"{named} per minute allow all this in about {math.ceil(minutes):,} min"]

    def _recorded_line(self, replay: RecordedTexts) -> str:
        config, counts = self.config, self._recorded_counts
        known = [
            f"{'' if number in self._taken else 'up to '}{counts[number]:,} in round {number}"
            for number in self.rounds_left
            if number in counts
        ]
        rest = "all others fail (--offline)" if config.offline else "all others are requested"
        if not known:
            return f"recorded answers: none; {rest.replace('all others', 'all answers')}"
        condition = "they cost nothing where the prompt is the same" if replay.has_texts else "they cost nothing"
        return f"recorded answers: {listed(known)}; {condition}, and {rest}"

    @cached_property
    def _recorded_counts(self) -> dict[int, int]:
        """Return how many recorded answers can be taken at most, by round."""
        return self.replay.counts(self.config.participant_num, self._systems()) if self.replay is not None else {}

    @cached_property
    def _taken(self) -> dict[int, int]:
        """Return how many recorded answers are taken for certain, by round, because no prompt can differ."""
        taken, everyone = dict[int, int](), self.config.participant_num
        for number in range(1, self.replay.whole_rounds + 1 if self.replay is not None else 1):
            taken[number] = self._recorded_counts.get(number, 0)
            if taken[number] < everyone:  # the others' new answers change the next announcement
                break
        return taken

    @cached_property
    def tokens(self) -> int:
        """Return the maximum number of tokens for the remaining rounds."""
        return self.tokens_in(self.rounds_left)

    def tokens_in(self, numbers: range) -> int:
        """Return the maximum number of tokens for the rounds `numbers`."""
        return sum(each.prompt_tokens + each.answer_tokens for each in self.estimate(numbers))

    def estimate(self, numbers: range) -> list[RoundEstimate]:
        """Return the maximum cost of each of the rounds `numbers`, or [] for a run without models.

        Answers that are certainly taken from a recorded run cost nothing.

        Participants of one group share requests if their prompts are equal. A prompt depends on the participant's
        personas and previous answers: round r has up to (persona combinations) * (possible numbers)^(r - 1) prompts.
        """
        config, game, rounds = self.config, self.game, []
        if game.prompt is None:
            return []
        if config.offline:
            return [RoundEstimate(number, 0, 0, 0) for number in numbers]
        thoughts = game.prompt.reasoning_tokens or 0
        characters = math.prod(map(len, game.population.persona_sets.values()))
        groups = len(config.hosts) * (config.server_per_host + config.moderator_per_host) - 1  # at most
        for number in numbers:
            prompt = self._longest_prompt(number)
            second = prompt._replace(thoughts="x" * thoughts, thought_tokens=thoughts)
            costs = []
            new = Fraction(config.participant_num - self._taken.get(number, 0), config.participant_num)
            for name, all_asking in self._askers():
                count = math.ceil(all_asking * new)
                fields = self.models[name].generate_args if name in self.models else {}
                limit = fields.get("max_completion_tokens") or fields.get("max_tokens")
                answer = int(limit or answer_tokens(config.structured_output, game))
                samples = 1 if fields.get("temperature") == 0 else config.samples_per_request
                in_group = math.ceil(count / groups)
                different = min(in_group, characters * game.numbers ** (number - 1))
                shared = min(count, groups * (different + (in_group - different) // samples))
                alone = count if thoughts else 0  # second requests: none is shared because the reasoning texts differ
                tokens = shared * prompt.tokens + alone * second.tokens
                costs.append((shared + alone, tokens, count * (answer + thoughts)))
            rounds.append(RoundEstimate(number, *map(sum, zip(*costs, strict=True))))
        return rounds

    def _systems(self) -> set[str] | None:
        """Return all system prompts of the game. None: a user's class may define others, or there are too many."""
        sets = self.game.population.persona_sets.values()
        users = any(kind.agent_class is not None for kind in self.config.kinds)
        if users or self.game.teams is not None or math.prod(map(len, sets)) > MOST_SYSTEMS:
            return None
        return {rules(self.game, personas) for personas in product(*sets)}

    def _askers(self) -> list[tuple[str, int]]:
        """Return the names of the models in use, each with the number of participants that ask it."""
        population = self.game.population
        shares = [(model.name, kind.share * model.share) for kind in population.players for model in kind.models]
        shares += [(model.name, model.share) for model in population.models]
        in_turn = [] if shares else asked_models(self.config)
        shares += [(name, Fraction(1, len(in_turn))) for name in in_turn]
        others = 1 - sum((share for _, share in shares), Fraction())
        counts = largest_remainder(self.config.participant_num, [*(share for _, share in shares), others])
        return [(name, count) for (name, _), count in zip(shares, counts, strict=False)]

    def _longest_prompt(self, number: int) -> Prompt:
        """Build a prompt about as long as the longest in round `number`, with all announcements and long numbers."""
        game, population, top = self.game, self.game.population, self.game.lowest + self.game.numbers - 1
        personas = [max(each, key=lambda persona: len(persona.text)) for each in population.persona_sets.values()]
        teams = next((grouping.names for grouping in population.groupings if grouping.topic == game.teams), ())
        tally = Tally(3, np.array([game.lowest, top]), np.array([1, 2]))  # its average has many digits
        if game.numbers_announced:  # two participants per number make a longer text than one
            units = np.arange(top + 1 - game.most_distinct, top + 1)
            count = max(self.config.participant_num // game.most_distinct, 2)
            tally = Tally(count * len(units), units, np.full(len(units), count))
        winners, averages = Winners(self.config.participant_num, ()), tuple((name, tally.average()) for name in teams)
        result = replace(score(game, 1, tally), winning_units=(top - 1, top), winners=winners, teams=averages)
        announcements = tuple(announcement_of(replace(result, round=each), game) for each in range(1, number))
        numbers = ((top - 1) / game.scale,) * len(announcements)
        team = max(teams, key=len, default=None)
        system, last = rules(game, personas, team), instruction(game, personas, team)
        return prompt_for(system, question_for(game, number, announcements), numbers, last)


def price_text(tokens: int, config: SimulationConfig) -> str:
    """Return the price of `tokens` as text, or "" if the price per token is unknown."""
    price = config.price_per_million_tokens
    return f": {tokens / 1e6 * price:,.2f} at {price:g} per million" if price is not None else ""


def new_run(config: SimulationConfig, given: Collection[str] = (), copies: Mapping[str, str] | None = None) -> RunSpec:
    """Return the specification of a new run. If the seed is not set, choose a random seed.

    `copies` contains files to use in place of those that the settings name, by path.

    Raises SettingsError if a setting or a file is invalid, or if a setting in `given` has no effect.
    """
    config = config if config.seed is not None else replace(config, seed=secrets.randbits(32))
    copies = copies or {}
    used, run_id = with_copies(config, copies), new_run_id()
    models, assignments = _checked(used)
    game, folder = build_game(used, models, given), Path(config.run_dir or HOME / "runs" / run_id)
    texts = {"prompts_file": game.prompt, "personas_file": game.population.persona_sets}
    resolved: dict[str, Any] = {name: str(getattr(game, name)) for name in FLAGS_OF_GAMES if hasattr(game, name)}
    config = replace(config, **resolved, set=assignments)
    game, recorded = read_recorded(with_copies(config, copies), game)
    users = {copy: path for path, copy in copies.items()}
    people, texts_used = people_beside(used, game), [getattr(used, name) for name, each in texts.items() if each]
    sources = sources_of(used, [*texts_used, *file_beside(used)])
    sources = tuple(replace(each, path=users.get(each.path, each.path)) for each in sources)
    others: dict[str, Any] = {"recorded": recorded, "sources": sources, "copies": copies, "people": people}
    return with_replay(RunSpec(config, models, game, folder, run_id, **others))


def resumed_run(path: Path, given: dict[str, Any], in_sweep: bool = False, flag: str = "--resume ") -> RunSpec:
    """Return the specification that resumes the run in the folder `path`, with the settings `given` by flags.

    Error messages about its summary start with `flag`. If `in_sweep` is True, a run without rounds or tokens left stays
    unchanged, and its answers are not read. Raises SettingsError if the run cannot be resumed or its participants would
    use other models.
    """
    before, given = reader.read_summary(path, flag), {"replay": None, **given}  # the recorded run may be gone
    config, status = reader.config_to_resume(path, before.config, given), before.summary["status"]
    is_spent, has_rounds = before.is_spent(config.max_tokens), len(before.summary["rounds"]) < config.rounds
    has_rounds = has_rounds and not before.has_converged(config.until_converged)
    if in_sweep and status in ("complete", "partial") and (is_spent or not has_rounds):
        if not is_there(path / WHOLE):
            raise SettingsError(f"--resume {path}: its {WHOLE} is missing")
        return RunSpec(config, {}, reader.read_game(path, config), path, before.run_id, status=status)
    if not in_sweep and has_rounds and is_spent:
        budget = f"{config.max_tokens:,}"
        raise SettingsError(f"--resume {path}: its budget of {budget} tokens is spent; give a larger --max-tokens")
    _prepare_for_users_files(config)
    saved = reader.read_run_to_resume(path, given)
    config, game = saved.config, saved.game
    sources, copies = kept_files(path, before.summary.get("sources", []))
    models, _ = _checked(with_copies(config, copies))
    if "sources" not in before.summary:
        warn_of_missing_copy(config)
        sources = sources_of(config, [])
    people = people_beside(with_copies(config, copies), saved.game)
    sources = with_files(sources, file_beside(config))
    models_now = Population(**choose_players(config, models)).server_models
    models_before = game.population.server_models
    if models_before != models_now and len({*models_before, *models_now}) > 1:
        flags = f"--model-configs {shown(config.model_configs)}, --model-per-host {config.model_per_host}"
        asked = f"the run in {path} asked {listed(models_before)}"
        problem = f"{asked}; this cannot be changed on resume, and it would ask {listed(models_now)}"
        raise SettingsError(f"{flags}: {problem}")
    game, recorded = read_recorded(with_copies(config, copies), game)
    others: dict[str, Any] = {"recorded": recorded, "sources": sources, "copies": copies, "people": people}
    spec = RunSpec(config, models, game, real(path), saved.run_id, saved=saved, **others)
    if (was := before.summary.get("model_settings", spec.model_settings)) != spec.model_settings:
        raise SettingsError(
            f"--resume {path}: the models in {shown(config.model_configs)} have other settings than at its start: "
            f"their SHA-256 is {spec.model_settings}, not {was}"
        )
    return with_replay(spec)


def warn_of_missing_copy(*configs: SimulationConfig) -> None:
    """Log a warning for each class of which a run folder has no copy, because an older version made the folder."""
    for spec in {kind.agent_class for config in configs for kind in config.kinds} - {None}:
        warn_once(f"an older version, which kept no copies, has played {shown(str(spec))}: it is used as it is now")


def _prepare_for_users_files(config: SimulationConfig) -> None:
    """If a user's file is in use, import AgentScope and matplotlib before the folders of users' files can be searched.

    Both try to import modules that are missing on this system.
    """
    if names_file(config.game) or any(kind.agent_class is not None for kind in config.kinds):
        import_agentscope()
        import_module("simulation.results.comparison")  # imports all that draws
        add_extra_folders(config.extra_pythonpath)


def _checked(config: SimulationConfig) -> tuple[dict[str, ModelConfig], tuple[str, ...]]:
    """Check the user's classes and parameters. Return the models by name, and an assignment for each parameter."""
    own = [(kind.agent_class, kind.asks_models) for kind in config.kinds if kind.agent_class is not None]
    _prepare_for_users_files(config)
    owners = {(cls := game_class(config.game)).__name__: declared(cls, Game)}
    if own:  # detect errors in the user's files before servers start
        from simulation.agents.participant import Participant  # noqa: PLC0415 - imports AgentScope
        from simulation.cluster import agent_class  # noqa: PLC0415

        classes = [agent_class.load_agent_class(*each, config.who_flag, config.set) for each in own]
        owners |= {each.__name__: declared(each, Participant) for each in classes}
        agent_class.serialize_agent_class(*classes, flag=config.who_flag)
    assignments = all_assignments(config.set, owners)
    return read_models(config) if config.uses_models else {}, assignments
