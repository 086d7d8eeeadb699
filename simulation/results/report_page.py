"""The report of a run: one HTML file that contains all numbers and charts. The page loads no other files.

The templates escape all text, because failure causes and persona names are not trusted.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from simulation.game.human import MOST_TESTED, HumanData, distance
from simulation.game.human import rows as compare
from simulation.game.tally import RoundResult, Tally, merge
from simulation.results import charts
from simulation.results.charts import PAGES, PART_LINES, page_chart, selection, series_style, write_png
from simulation.results.console_report import winning_answers
from simulation.results.reader import SavedRun, figure_of, largest
from simulation.results.run_directory import ANALYSIS, REPORT, write_whole
from simulation.results.run_files import RecordedGame, RoundEntry, position_in_words
from simulation.results.tables import number_text
from simulation.rpc.endpoints import ranges

PART_ROWS = 1500  # maximum number of rows in all tables by persona or model; if exceeded, rounds and names are omitted


def seconds(duration: float) -> str:
    """Format a duration that is given in seconds."""
    if duration < 59.995:
        return f"{duration:.2f} s"
    minutes, rest = divmod(round(duration), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


ENVIRONMENT = Environment(
    loader=FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
)
ENVIRONMENT.globals |= {each.__name__: each for each in (figure_of, page_chart, series_style, winning_answers)}
ENVIRONMENT.globals["charts"] = charts
ENVIRONMENT.filters |= {"number": number_text, "seconds": seconds}
ENVIRONMENT.filters["with_capital"] = lambda text: text[:1].upper() + text[1:]


def draw_all(run: SavedRun) -> None:
    """Write a run's report, pictures and analysis.json.

    Raises SettingsError if answers are damaged, ResultsError if a write fails.
    """
    if run.results and not isinstance(run.game, RecordedGame):  # which cannot compute payoffs
        write_whole(run.path / ANALYSIS, (json.dumps(run.analysis(), indent=1) + "\n").encode())
    write_page(run.path / REPORT, page_content(run))
    if run.results:
        write_png(run.path / "histogram.png", charts.last_round(run))
    if len(run.results) > 1:
        write_png(run.path / "rounds.png", charts.all_rounds(run))


def write_page(path: Path, content: dict[str, Any]) -> None:
    """Write the file `path`, rendered from the template of the same name. Raises ResultsError if this fails."""
    write_whole(path, ENVIRONMENT.get_template(path.name).render(content).encode(errors="replace"))


def page_content(run: SavedRun) -> dict[str, Any]:
    """Return the template variables of the report."""
    entries, figures = run.summary["rounds"], {"average": "average", **run.figures}
    others = RoundEntry.__annotations__.keys() - {"average", "winning_number"}  # these have columns in all games
    return {
        "run": run,
        "answers": [(f"Round {result.round}", run.game, result) for result in run.results],
        "position": run.position and position_in_words(run.position),
        "figures": [(name, words) for name, words in figures.items() if name not in others],
        "tiles": [*(run.figures or figures).items()],
        "settings": [f", {each.replace('=', ' ', 1)}" for each in run.config.set],
        "topics": [_topic(run, topic) for topic in run.tallies_by_part],
        "failures": failures_by_cause(entries),
        "people": [_beside(run, each) for each in run.people if run.results],
    }


def _beside(run: SavedRun, people: HumanData) -> dict[str, Any]:
    """Return the template variables of the figures of people beside those of the run."""
    results, scale, (numbers, counts) = run.results, run.game.scale, people.counts
    last, moves = max(people.known_rounds()), None
    if people.moves is not None and last <= len(results) and last * run.config.participant_num <= MOST_TESTED:
        moves = run.moves(last)
    rows = compare(people, scale, [each.tally for each in results], [each.analysis for each in results], moves)
    content: dict[str, Any] = {"data": people, "rows": rows}
    if not len(numbers) or people.round > len(results) or not results[people.round - 1].tally.answered:
        return content
    units, result = np.rint(numbers * scale).astype(np.int64), results[people.round - 1]
    tally = merge(Tally(int(count), units[[at]], counts[[at]]) for at, count in enumerate(counts))
    drawn = [("The run", run.game, result), ("People", run.game, RoundResult(people.round, tally))]
    return content | {"drawn": drawn, "distance": distance(people, scale, result.tally)}


def _topic(run: SavedRun, topic: str) -> dict[str, Any]:
    """Return the template variables of the tables and the line chart for `topic`, a persona set or "model"."""
    game, tallies = run.game, run.tallies_by_part[topic]
    rounds = [(result.round, each) for result, each in zip(run.results, tallies, strict=True)]
    rows = PART_ROWS // len(run.tallies_by_part)
    listed = largest(tallies[-1], max(rows // 3, 1))
    shown = [rounds[index] for index in selection(len(rounds), max(rows // len(listed), 1))]
    lines = {}
    for name in largest(tallies[-1], PART_LINES):
        averages = {number: each[name].average() for number, each in rounds}
        lines[name] = {number: float(units / game.scale) for number, units in averages.items() if units is not None}
    return {"name": topic, "last": tallies[-1], "listed": listed, "rounds": shown, "lines": lines}


def failures_by_cause(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a dictionary for each failure cause: its text, count and rounds. The most frequent comes first."""
    causes: dict[str, dict[int, int]] = {}
    for entry in entries:
        for cause, count in entry["failures"].items():
            causes.setdefault(cause, {})[entry["round"]] = count
    rows = [{"cause": each, "count": sum(by.values()), "rounds": ranges(by)} for each, by in causes.items()]
    return sorted(rows, key=lambda row: (-row["count"], row["cause"]))
