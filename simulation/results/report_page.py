"""The report of a run as an HTML page: one file with all numbers and charts, which needs no network.

Untrusted text, such as failure causes and persona names, is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from simulation.game.rules import Game
from simulation.results.charts import (
    PART_LINES,
    PARTS_DRAWN,
    draw_answers,
    draw_averages,
    draw_part_lines,
    draw_pictures,
    draw_spread,
    draw_times,
    largest,
    parts_chart,
    selection,
)
from simulation.results.console_report import brief, number_of
from simulation.results.figures import PAGES, page_chart, series_style
from simulation.results.reader import SavedRun, rounds_finished
from simulation.results.run_directory import REPORT, write_whole
from simulation.results.run_files import position_in_words

OPEN_CHARTS = 12  # histograms shown unfolded; the others are folded
# Row limit of all tables of rounds and parts together; beyond it, they show selected rounds and the largest parts
PART_ROWS = 1500
STATUSES = {
    "complete": "complete: every participant answered",
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
    write_page(run.path / REPORT, page_content(run))


def write_page(path: Path, content: dict[str, Any]) -> None:
    """Write a page, from the template of its name. Raises ResultsError."""
    write_whole(path, _environment().get_template(path.name).render(content).encode(errors="replace"))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"fixed": fixed, "brief": brief, "whole": whole, "seconds": seconds, "number": _number}
    return environment


def fixed(number: float | None, digits: int = 3) -> str:
    """Format a number with `digits` decimals; None is a dash."""
    return "–" if number is None else f"{number:,.{digits}f}"


def whole(number: float | None) -> str:
    """Format a number without decimals; None is a dash."""
    return fixed(number, 0)


def seconds(number: float) -> str:
    """Format a duration given in seconds."""
    if number < 59.995:
        return f"{number:.2f} s"
    minutes, rest = divmod(round(number), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _number(units: Any, game: Game) -> float | None:
    return None if units is None else number_of(units, game)


def page_content(run: SavedRun) -> dict[str, Any]:
    """Return the template variables of the report."""
    game, summary, entries = run.game, run.summary, run.summary["rounds"]
    charts = [{"entry": entry, "svg": answers_chart(run, index)} for index, entry in enumerate(entries)]
    answered = [entry for entry in entries if entry["average"] is not None]
    return {
        "run": run,
        "game": game,
        "config": run.config,
        "summary": summary,
        "digits": game.decimals + 3,
        "equilibrium": equilibrium_in_words(game),
        "status": _status(run),
        "played": rounds_finished(summary),
        "position": run.position and position_in_words(run.position),
        "last": (answered or entries or [None])[-1],
        **fold(charts),
        "by_round": _by_round(run) if len(entries) > 1 and answered else None,
        "topics": [_topic(run, topic) for topic in run.tallies_by_part] if entries else [],
        "failures": failures_by_cause(entries),
        "times": _times(summary),
    }


def fold(charts: Sequence[Any]) -> dict[str, list[Any]]:
    """Divide charts into those shown unfolded, at most OPEN_CHARTS, and the others."""
    indices = selection(len(charts), OPEN_CHARTS)
    return {
        "open": [charts[index] for index in indices],
        "folded": [chart for index, chart in enumerate(charts) if index not in indices],
    }


def _status(run: SavedRun) -> str:
    """Describe how the run ended."""
    entries, status = run.summary["rounds"], run.summary["status"]
    if status == "partial" and not any(entry["answered"] for entry in entries):
        return "partial: no participant gave a usable answer"
    if status == "interrupted" and rounds_finished(run.summary) < len(entries):
        return f"interrupted in round {entries[-1]['round']}"
    return STATUSES[status]


def answers_chart(run: SavedRun, index: int, name: str = "") -> Markup:
    """Return the histogram of one round; `name` distinguishes its run from others in the page."""
    game, result = run.game, run.results[index]
    tally, digits = result.tally, game.decimals + 3
    label = f"{name}Round {result.round}: no answers from {tally.asked:,} participants"
    if result.average is not None:
        low, high = (f"{number_of(units, game):g}" for units in (tally.units[0], tally.units[-1]))
        average, winning = (fixed(_number(units, game), digits) for units in (result.average, result.winning_number))
        label = f"{name}Round {result.round}: {tally.answered:,} answers from {low} to {high}"
        label += f", average {average}, winning number {winning}"
    return page_chart(label, 2.3, draw_answers, game, result)


def equilibrium_in_words(game: Game) -> str:
    """Describe the equilibria of the game."""
    numbers = " and ".join(f"{number:,.6g}" for number in game.equilibria)
    return f"equilibrium {numbers}" if numbers else "equilibrium: any number, if all participants give it"


def _by_round(run: SavedRun) -> dict[str, Any]:
    """Return the charts of average and spread by round."""
    digits = run.game.decimals + 3
    averages, spreads = (
        "; ".join(f"{entry['round']}: {fixed(entry[key], digits)}" for entry in run.summary["rounds"])
        for key in ("average", "std")
    )
    label = f"Average by round: {averages}; {equilibrium_in_words(run.game)}"
    return {
        "average": page_chart(label, 2.9, draw_averages, run.game, run.results),
        "spread": page_chart(f"Spread by round: {spreads}", 2.9, draw_spread, run.game, run.results),
    }


def _topic(run: SavedRun, topic: str) -> dict[str, Any]:
    """Return the charts and tables of one grouping of the participants."""
    game, tallies = run.game, run.tallies_by_part[topic]
    rounds = {result.round: each for result, each in zip(run.results, tallies, strict=True)}
    number, last = run.results[-1].round, tallies[-1]
    listed = largest(last, max(PART_ROWS // 3 // len(run.tallies_by_part), 1))
    lined = largest(last, PART_LINES)
    selected = selection(len(rounds), max(PART_ROWS // len(run.tallies_by_part) // len(listed), 1))
    ends = "; ".join(f"{name}: {fixed(_number(last[name].average(), game), game.decimals + 3)}" for name in lined)
    label = f"Average by round and {topic}; in the last round {ends}"
    return {
        "name": topic,
        "last_round": number,
        "last": [(name, last[name]) for name in listed],
        "parts_in_all": len(last),
        "parts": parts_chart(game, last, f"Answers of round {number} by {topic}, averages: {ends}"),
        "parts_drawn": min(len(last), PARTS_DRAWN),
        "lines": page_chart(label, 2.6, draw_part_lines, game, rounds, lined) if len(rounds) > 1 else None,
        "lined": [(name, *series_style(index)) for index, name in enumerate(lined)],
        "rounds": [list(rounds.items())[index] for index in selected],
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
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0][1]}–{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs)


def _times(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Return the table and chart of the time breakdown by round; None if the run has none."""
    times = summary["cluster"].get("times")
    if not times:
        return None
    words = {
        "model_s": "waiting for the model" if summary["config"]["agent_type"] == "llm" else "thinking",
        "client_s": "work of the agent servers",
        "rpc_s": "remote calls and lost servers",
        "slowest_s": "waiting for the slowest server",
    }
    kinds = [kind for kind in words if any(kind in each for each in times)]
    sums = "; ".join(f"{words[kind]} {seconds(sum(each.get(kind, 0.0) for each in times))}" for kind in kinds)
    return {
        "kinds": [(kind, words[kind], series_style(index)[0]) for index, kind in enumerate(kinds)],
        "rows": times,
        "svg": page_chart(f"Seconds by round: {sums}", 2.3, draw_times, times, kinds),
    }
