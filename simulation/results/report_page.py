"""The report of a run as an HTML page: one file with all numbers and pictures, which needs no network.

Untrusted text, such as failure causes and persona names, is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from simulation.game.rules import Game
from simulation.game.tally import RoundResult, Tally
from simulation.results.charts import (
    PART_LINES,
    PARTS_DRAWN,
    answers_picture,
    averages_picture,
    draw_pictures,
    largest,
    part_lines_picture,
    parts_picture,
    selection,
    spread_picture,
    times_picture,
)
from simulation.results.console_report import brief, number_of
from simulation.results.figures import DASHES, SERIES
from simulation.results.reader import SavedRun, rounds_finished
from simulation.results.run_directory import REPORT, write_whole
from simulation.results.run_files import position_in_words
from simulation.settings import SimulationConfig

PAGES = Path(__file__).resolve().parent / "pages"
OPEN_ROUNDS = 12  # histograms shown unfolded; the others are folded
# Row limit of all tables of rounds and parts together; beyond it, they show selected rounds and the largest parts
PART_ROWS = 1500
NAMED = 8  # hosts listed by name
STATUSES = {
    "complete": "complete: everyone answered",
    "partial": "partial: some gave no usable answer",
    "interrupted": "interrupted",
    "failed": "failed",
}


def draw_all(run: SavedRun) -> None:
    """Draw the pictures and the report of a run into its folder. Raises ResultsError."""
    write_report(run)
    draw_pictures(run)


def write_report(run: SavedRun) -> None:
    """Write the report of a run into its folder. Raises ResultsError."""
    write_whole(run.path / REPORT, render(REPORT, page_content(run)).encode(errors="replace"))


def render(template: str, content: dict[str, Any]) -> str:
    """Render a template of the `pages` folder."""
    return _environment().get_template(template).render(content)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    made.filters |= {"shown": shown, "brief": brief, "whole": whole, "seconds": seconds}
    return made


def shown(number: float | None, digits: int = 3) -> str:
    """Format a number with `digits` decimals; None is a dash."""
    return "–" if number is None else f"{number:,.{digits}f}"


def whole(number: float | None) -> str:
    """Format a number without decimals; None is a dash."""
    return "–" if number is None else f"{number:,.0f}"


def seconds(number: float) -> str:
    """Format a duration given in seconds."""
    if number < 59.995:
        return f"{number:.2f} s"
    minutes, rest = divmod(round(number), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def page_content(run: SavedRun) -> dict[str, Any]:
    """Return the template variables of the report."""
    summary, game = run.summary, run.game
    digits = game.decimals + 3
    entries = summary["rounds"]
    pictures = [
        {"result": result, "entry": entry, "svg": answers_picture(game, result, f"round-{result.round}", label)}
        for result, entry in zip(run.results, entries, strict=True)
        for label in [answers_in_words(result, game)]
    ]
    at_once = selection(len(pictures), OPEN_ROUNDS)
    return {
        "title": title(run.config, game),
        "run": run,
        "config": run.config,
        "summary": summary,
        "digits": digits,
        "status": _status(run),
        "played": rounds_finished(run.summary),
        "last": next(
            (each for each in reversed(entries) if each["average"] is not None), entries[-1] if entries else None
        ),
        "facts": facts(run),
        "equilibrium": equilibrium_in_words(game),
        "open": [pictures[place] for place in at_once],
        "folded": [each for place, each in enumerate(pictures) if place not in at_once],
        "by_round": _by_round(run),
        "topics": [_topic(run, topic) for topic in run.tallies_by_part] if entries else [],
        "winners": [_winners(result, entry, game) for result, entry in zip(run.results, entries, strict=True)],
        "failures": failures_by_cause(entries),
        "times": _times(summary),
    }


def _status(run: SavedRun) -> str:
    """Describe how the run ended."""
    entries, status = run.summary["rounds"], run.summary["status"]
    if status == "partial" and not any(entry["answered"] for entry in entries):
        return "partial: nobody gave a usable answer"
    if status == "interrupted" and rounds_finished(run.summary) < len(entries):
        return f"interrupted in round {entries[-1]['round']}"
    return STATUSES[status]


def _by_round(run: SavedRun) -> dict[str, Markup] | None:
    """Return the charts of average and spread by round; None if there is nothing to draw or only one round."""
    entries, digits = run.summary["rounds"], run.game.decimals + 3
    if len(entries) < 2 or all(entry["average"] is None for entry in entries):
        return None
    averages, spreads = (
        "; ".join(f"{entry['round']}: {shown(entry[key], digits)}" for entry in entries) for key in ("average", "std")
    )
    return {
        "average": averages_picture(run, f"Average by round: {averages}; {equilibrium_in_words(run.game)}"),
        "spread": spread_picture(run, f"Spread by round: {spreads}"),
    }


def title(config: SimulationConfig, game: Game) -> str:
    """Describe the game in one line."""
    return f"{config.participant_num:,} {kind_in_words(config)}: closest to {game.target} wins"


def kind_in_words(config: SimulationConfig) -> str:
    """Describe the kind of participants."""
    kind = {"random": "random participants", "llm": "LLM participants"}[config.agent_type]
    return kind if config.agent_class is None else f"participants of {config.agent_class.rpartition(':')[2]}"


def equilibrium_in_words(game: Game) -> str:
    """Describe the equilibria of the game."""
    numbers = " and ".join(f"{number:,.6g}" for number in game.equilibria)
    return f"equilibrium {numbers}" if numbers else "equilibrium: any number, if all give it"


def answers_in_words(result: RoundResult, game: Game) -> str:
    """Describe the histogram of a round for screen readers."""
    tally, digits = result.tally, game.decimals + 3
    if result.average is None or result.winning_number is None:
        return f"Round {result.round}: nobody of {tally.asked:,} answered"
    return (
        f"Round {result.round}: {tally.answered:,} answers from {number_of(tally.units[0], game):g} to "
        f"{number_of(tally.units[-1], game):g}, average {number_of(result.average, game):,.{digits}f}, "
        f"winning number {number_of(result.winning_number, game):,.{digits}f}"
    )


def facts(run: SavedRun) -> list[tuple[str, str]]:
    """Return the facts of the run as pairs of name and text."""
    config, game, cluster = run.config, run.game, run.summary["cluster"]
    kind = "whole numbers" if not game.decimals else f"numbers with up to {game.decimals} digits after the point"
    told = [
        ("Asked for", f"{kind} from 0 to {game.max_value:,}"),
        ("Closest to", game.target),
        ("Equilibrium", equilibrium_in_words(game).removeprefix("equilibrium").lstrip(": ")),
        ("Seed", str(config.seed)),
    ]
    if config.agent_type == "llm":
        told.append(("Prompt", game.wording.name if game.wording is not None else config.prompt))
    cast = game.cast
    if cast is not None and cast.persona_sets:
        told.append(("Personas", ", ".join(f"{each.name} ({len(each.personas)})" for each in cast.persona_sets)))
    if cast is not None and (cast.models or cast.round_robin_models):
        mixed = [f"{name} ({each.share})" for name, each in zip(cast.model_labels, cast.models, strict=False)]
        called = mixed or dict.fromkeys(cast.round_robin_models)
        told.append(("Models", ", ".join(called)))
    if config.agent_class is not None:
        told.append(("Participants' class", Path(config.agent_class).name))
    hosts = list(cluster["hosts"])
    others = f" and {len(hosts) - NAMED} more" if len(hosts) > NAMED else ""
    told.append(("Hosts", ", ".join(hosts[:NAMED]) + others))
    told.append(("Agent servers", f"{cluster['servers']:,} for participants, {cluster['moderators']:,} moderators"))
    told.append(("Run", run.run_id))
    if run.position is not None:
        told.append(("Experiment", position_in_words(run.position)))
    return told


def _winners(result: RoundResult, entry: dict[str, Any], game: Game) -> dict[str, Any]:
    count, named = entry["winners"]["count"], entry["winners"]["participants"]
    more = count - len(named)
    return {
        "entry": entry,
        "numbers": " and ".join(f"{unit / game.scale:,.{game.decimals}f}" for unit in result.closest) or "–",
        "named": (", ".join(named) + (f" and {more:,} more" if more else "")) or "–",
    }


def failures_by_cause(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each failure cause with its count and rounds, the most frequent first."""
    causes: dict[str, dict[int, int]] = {}
    for entry in entries:
        for cause, count in entry["failures"].items():
            causes.setdefault(cause, {})[entry["round"]] = count
    rows = [{"cause": cause, "count": sum(by.values()), "rounds": ranges(by)} for cause, by in causes.items()]
    return sorted(rows, key=lambda row: (-row["count"], row["cause"]))


def ranges(numbers: Iterable[int]) -> str:
    """Format ascending numbers as ranges: 1–3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)


# --- By persona and by model -----------------------------------------------------------------------------------------


def _topic(run: SavedRun, topic: str) -> dict[str, Any]:
    """Return the pictures and tables of one grouping of the participants."""
    rounds, game = run.tallies_by_part[topic], run.game
    last = rounds[-1]
    listed = largest(last, max(PART_ROWS // 3 // len(run.tallies_by_part), 1))
    told = selection(len(rounds), max(PART_ROWS // len(run.tallies_by_part) // len(listed), 1))
    lined = largest(last, PART_LINES)
    digits = game.decimals + 3
    label = "; ".join(f"{name}: {shown(_part('', last[name], game)['average'], digits)}" for name in lined)
    last_label = f"Answers of round {run.results[-1].round} by {topic}, averages: {label}"
    return {
        "name": topic,
        "last": [_part(name, last[name], game) for name in listed],
        "parts_in_all": len(last),
        "last_round": run.results[-1].round,
        "parts": parts_picture(game, last, f"{topic}-parts", last_label),
        "parts_drawn": min(len(last), PARTS_DRAWN),
        "lines": part_lines_picture(run, topic, f"Average by round and {topic}; at last {label}")
        if len(rounds) > 1
        else None,
        "lined": [(name, *swatch(place)) for place, name in enumerate(lined)],
        "rounds": [
            (run.results[place].round, [_part(name, rounds[place][name], game) for name in listed]) for place in told
        ]
        if len(rounds) > 1
        else [],
        "all_rounds": len(told) == len(rounds),
    }


def swatch(place: int) -> tuple[str, str]:
    """Return the CSS class and the line style of a legend sample."""
    return f"series-{place % len(SERIES) + 1}", ("solid", "dashed", "dotted")[place // len(SERIES) % len(DASHES)]


def _part(name: str, tally: Tally, game: Game) -> dict[str, Any]:
    average, median, std = tally.average(), tally.median(), tally.std()
    return {
        "name": name,
        "asked": tally.asked,
        "answered": tally.answered,
        "failed": tally.failed,
        "average": None if average is None else number_of(average, game),
        "median": None if median is None else number_of(median, game),
        "std": None if std is None else std / game.scale,
    }


# --- Where the time went ---------------------------------------------------------------------------------------------


def _times(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Return the table and chart of the time breakdown by round; None if the run has none."""
    times = summary["cluster"].get("times") or []
    if not times:
        return None
    waiting = "waiting for the model" if summary["config"]["agent_type"] == "llm" else "thinking"
    words = {
        "model_s": waiting,
        "client_s": "work of the agent servers",
        "rpc_s": "remote calls and lost servers",
        "slowest_s": "waiting for the slowest server",
    }
    kinds = [kind for kind in words if any(kind in each for each in times)]
    sums = "; ".join(f"{words[kind]} {seconds(sum(each.get(kind, 0.0) for each in times))}" for kind in kinds)
    return {
        "kinds": [(kind, words[kind], f"series-{place + 1}") for place, kind in enumerate(kinds)],
        "rows": times,
        "svg": times_picture(times, kinds, f"Seconds by round: {sums}"),
    }
