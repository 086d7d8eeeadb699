"""What a run would do and cost, from the settings alone; nobody is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from simulation.config import SimulationConfig
from simulation.game import Announcement, Game, question_for
from simulation.model_configs import ModelConfig, model_name
from simulation.placement import endpoints, even_split, place
from simulation.processes import ranges
from simulation.prompts import answer_tokens, prompt_for, rules


@dataclass(frozen=True)
class RoundEstimate:
    """The most that one round may cost, if every answer is usable: prompts at 4 characters a token."""

    round: int
    requests: int
    prompt_tokens: int
    answer_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens


def estimate(config: SimulationConfig, models: Mapping[str, ModelConfig]) -> list[RoundEstimate]:
    """The rounds of an LLM run.

    In round r a participant may remember any of (values)^(r-1) games, and those who remember the same share requests.
    """
    game = Game(config.seed or 0, config.max_value, config.decimals, 0.0)
    sharing = _sharing(config)
    fields = models[model_name(1)].generate_args if model_name(1) in models else {}
    limit = fields.get("max_completion_tokens") or fields.get("max_tokens")
    samples = 1 if fields.get("temperature") == 0 else config.samples_per_request
    each = int(limit or answer_tokens(config.structured_output, game))
    rounds = []
    told: tuple[Announcement, ...] = ()
    for number in range(1, config.rounds + 1):
        numbers = tuple(float(config.max_value) for _ in told)
        prompt = prompt_for(rules(game), question_for(game, number, told), numbers)
        memories = (config.max_value * game.scale + 1) ** (number - 1)
        requests = sum(groups * _requests(count, memories, samples) for count, groups in sharing.items())
        rounds.append(RoundEstimate(number, requests, requests * prompt.tokens, config.participant_num * each))
        told += (Announcement(number, config.max_value / 2, config.max_value / 2, ()),)
    return rounds


def _sharing(config: SimulationConfig) -> Counter[int]:
    """How many participants may share requests, as they are of one group and ask one model: how often which count."""
    servers = len(config.hosts) * config.server_per_host
    groups = place(config.participant_num, servers, len(config.hosts) * config.moderator_per_host)
    counts = (len(part) for group in groups for part in even_split(group.count, config.model_per_host))
    return Counter(count for count in counts if count)


def _requests(count: int, memories: int, samples: int) -> int:
    """The most requests for `count` participants with so many different memories."""
    different = min(count, memories)
    return different + (count - different) // samples


def plan_lines(config: SimulationConfig, models: Mapping[str, ModelConfig]) -> list[str]:
    """The whole plan, for people."""
    servers = endpoints(config.hosts, config.base_port, config.server_per_host)
    groups = place(config.participant_num, len(servers), len(config.hosts) * config.moderator_per_host)
    on_server = Counter[int]()
    for group in groups:
        on_server[group.server] += group.count
    fewest, most = (extreme(on_server[server] for server in range(len(servers))) for extreme in (min, max))
    ports = list(config.ports)
    kind = config.agent_class or config.agent_type
    lines = [
        f"hosts: {len(config.hosts)} ({' '.join(config.hosts)})",
        f"servers on each host: {config.server_per_host} for participants, ports "
        f"{ranges(ports[: config.server_per_host])}; {config.moderator_per_host} for moderators, ports "
        f"{ranges(ports[config.server_per_host :])}",
        f"participants: {config.participant_num:,} {kind}, {_between(fewest, most)} on each server",
        f"rounds: {config.rounds}",
    ]
    return lines if config.agent_type != "llm" else [*lines, *cost_lines(config, models)]


def cost_lines(config: SimulationConfig, models: Mapping[str, ModelConfig]) -> list[str]:
    """What the rounds would cost at most."""
    rounds = estimate(config, models)
    asked = [models[name] for name in map(model_name, range(1, config.model_per_host + 1)) if name in models]
    where = [f"models: {model.name} is {model.model} at {model.base_url}, on each host" for model in asked[:8]]
    where += [f"models: ... {len(asked)} in all"] if len(asked) > 8 else []
    row = "{:>8}  {:>12}  {:>15}  {:>15}".format
    table = [row("round", "requests", "prompt tokens", "answer tokens")]
    shown = rounds if len(rounds) <= 12 else [*rounds[:10], rounds[-1]]
    table += [_row(row, str(each.round), [each]) for each in shown]
    table.append(_row(row, "in all", rounds))
    tokens = sum(each.tokens for each in rounds)
    price = config.price_per_million_tokens
    total = f"at most about {tokens:,} tokens, if every answer is usable"
    total += f": {tokens / 1e6 * price:,.2f} at {price:g} per million" if price is not None else ""
    return [*where, *table, total]


def _row(row: object, name: str, rounds: list[RoundEstimate]) -> str:
    sums = [sum(getattr(each, part) for each in rounds) for part in ("requests", "prompt_tokens", "answer_tokens")]
    return row(name, *(f"{value:,}" for value in sums))  # type: ignore[operator]


def _between(fewest: int, most: int) -> str:
    return f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
