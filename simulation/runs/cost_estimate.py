"""Plan and cost estimate of a run, from the settings alone: no server is contacted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from simulation.cluster.placement import even_split, place
from simulation.files import shown
from simulation.game.population import Population, largest_remainder
from simulation.game.rules import Announcement, Game, question_for
from simulation.llm.model_configs import ModelConfig, asked_models
from simulation.llm.prompts import Prompt, answer_tokens, instruction, prompt_for, rules
from simulation.results.tables import table_lines
from simulation.rpc.endpoints import endpoints, ranges
from simulation.settings import SimulationConfig


@dataclass(frozen=True)
class RoundEstimate:
    """Upper bound of the cost of one round if every answer is usable. Prompts count 4 characters per token."""

    round: int
    requests: int
    prompt_tokens: int
    answer_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens


def estimate(
    config: SimulationConfig, game: Game, models: Mapping[str, ModelConfig], numbers: range
) -> list[RoundEstimate]:
    """Estimate the cost of these rounds of an LLM run.

    Participants with the same personas and the same previous answers share requests. In round r there are at most
    (persona combinations) * (possible numbers)^(r-1) different prompts.
    """
    assert game.wording is not None and game.cast is not None
    asked = _sharing(config, game.cast)
    aloud = game.wording.reasoning_tokens
    characters = math.prod(len(one.personas) for one in game.cast.persona_sets)
    rounds = []
    for number in numbers:
        prompt = _longest_prompt(game, config.participant_num, number)
        different = characters * game.numbers ** (number - 1)
        requests = prompt_tokens = answers = 0
        for name, sharing in asked.items():
            fields = models[name].generate_args if name in models else {}
            limit = fields.get("max_completion_tokens") or fields.get("max_tokens")
            samples = 1 if fields.get("temperature") == 0 else config.samples_per_request
            everyone = sum(count * groups for count, groups in sharing.items())
            first = sum(groups * _requests(count, different, samples) for count, groups in sharing.items())
            requests += first
            prompt_tokens += first * prompt.tokens
            answers += everyone * int(limit or answer_tokens(config.structured_output, game))
            if aloud is not None:  # a second request for each participant, as the reasoning texts all differ
                requests += everyone
                prompt_tokens += everyone * prompt._replace(thoughts="x" * aloud, thought_tokens=aloud).tokens
                answers += everyone * aloud
        rounds.append(RoundEstimate(number, requests, prompt_tokens, answers))
    return rounds


def _longest_prompt(game: Game, participants: int, number: int) -> Prompt:
    """Build roughly the longest prompt of a round: all announcements so far, with the maximum number of digits."""
    assert game.cast is not None
    personas = [max(one.personas, key=lambda persona: len(persona.text)) for one in game.cast.persona_sets]
    teams = next((parts.names for parts in game.cast.groupings if parts.topic == game.teams), ())
    long = game.max_value * 2 / 3
    units = (game.numbers - 2, game.numbers - 1)
    winning = long if game.target == "the average" else long / 2
    told = tuple(
        Announcement(each, long, winning, units, participants, tuple((name, long) for name in teams), teams)
        for each in range(1, number)
    )
    numbers = tuple(units[0] / game.scale for _ in told)
    team = max(teams, key=len, default=None)
    system, last = rules(game, personas, team), instruction(game, personas, team)
    return prompt_for(system, question_for(game, number, told), numbers, last)


def _sharing(config: SimulationConfig, cast: Population) -> dict[str, Counter[int]]:
    """Return for each model: participants of one group that use it, and so share requests -> number of such groups."""
    servers = len(config.hosts) * config.server_per_host
    groups = place(config.participant_num, servers, len(config.hosts) * config.moderator_per_host)
    names = asked_models(config)
    found: dict[str, Counter[int]] = {name: Counter() for name in names}
    for group in groups:
        if cast.models:  # approximate: the shares are exact over all groups, not within each
            counts = largest_remainder(group.count, [each.share for each in cast.models])
        else:
            counts = tuple(map(len, even_split(group.count, len(names))))
        for name, count in zip(names, counts, strict=True):
            found[name][count] += 1
    return found


def _requests(count: int, prompts: int, samples: int) -> int:
    """Return the maximum number of requests of `count` participants with at most `prompts` different prompts."""
    different = min(count, prompts)
    return different + (count - different) // samples


def plan_lines(config: SimulationConfig, game: Game, models: Mapping[str, ModelConfig], numbers: range) -> list[str]:
    """Return the readable plan of the remaining rounds, with costs for an LLM run."""
    servers = endpoints(config.hosts, config.base_port, config.server_per_host)
    groups = place(config.participant_num, len(servers), len(config.hosts) * config.moderator_per_host)
    on_server = Counter[int]()
    for group in groups:
        on_server[group.server] += group.count
    fewest, most = (extreme(on_server[server] for server in range(len(servers))) for extreme in (min, max))
    ports = list(config.ports)
    kind = config.agent_type if config.agent_class is None else shown(config.agent_class)
    lines = [
        f"hosts: {len(config.hosts)} ({' '.join(config.hosts)})",
        f"servers on each host: {config.server_per_host} for participants, ports "
        f"{ranges(ports[: config.server_per_host])}; {config.moderator_per_host} for moderators, ports "
        f"{ranges(ports[config.server_per_host :])}",
        f"participants: {config.participant_num:,} {kind}, {_between(fewest, most)} on each server",
        f"rounds: {config.rounds}" + (f", of which {len(numbers)} are left" if len(numbers) < config.rounds else ""),
        f"game: {_game_in_words(game)}",
    ]
    return lines if config.agent_type != "llm" else [*lines, *cost_lines(config, game, models, numbers)]


def _game_in_words(game: Game) -> str:
    words = f"numbers from 0 to {game.max_value:,}, closest to {game.target} wins"
    words += f"; prompt {game.wording.name}" if game.wording is not None else ""
    sets = game.cast.persona_sets if game.cast is not None else ()
    words += "".join(f"; personas {each.name} ({len(each.personas)})" for each in sets)
    return words + (f"; teams by {game.teams}" if game.teams is not None else "")


def cost_lines(config: SimulationConfig, game: Game, models: Mapping[str, ModelConfig], numbers: range) -> list[str]:
    """Return the models and the maximum cost of these rounds as lines of text."""
    rounds = estimate(config, game, models, numbers)
    asked = [models[name] for name in asked_models(config) if name in models]
    where = [f"models: {model.name} is {model.model} at {model.base_url}, on each host" for model in asked[:8]]
    where += [f"models: ... {len(asked)} in all"] if len(asked) > 8 else []
    shown = rounds if len(rounds) <= 12 else [*rounds[:10], rounds[-1]]
    rows = [*(_row(str(each.round), [each]) for each in shown), _row("in all", rounds)]
    table = table_lines(
        ["round", "requests", "prompt tokens", "answer tokens"], rows, ["requests", "prompt tokens"], ()
    )
    tokens = sum(each.tokens for each in rounds)
    price = config.price_per_million_tokens
    total = f"at most about {tokens:,} tokens, if every answer is usable"
    total += f": {tokens / 1e6 * price:,.2f} at {price:g} per million" if price is not None else ""
    return [*where, *table, total]


def _row(name: str, rounds: list[RoundEstimate]) -> list[str]:
    sums = [sum(getattr(each, part) for each in rounds) for part in ("requests", "prompt_tokens", "answer_tokens")]
    return [name, *(f"{value:,}" for value in sums)]


def _between(fewest: int, most: int) -> str:
    return f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
