"""The report of a run: one HTML file that contains all numbers and charts. The page loads no other files.

The templates escape all text, because failure causes and persona names are not trusted.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from simulation.errors import Ended, listed, printable
from simulation.files import HOME, SOURCE, from_root, is_there
from simulation.game.game import Game
from simulation.game.human import MOST_TESTED, HumanData, distance
from simulation.game.human import rows as compare
from simulation.game.population import KIND, Grouping
from simulation.game.tally import INTERRUPTED, RoundResult, Tally, merge
from simulation.provenance import EXPERIMENT
from simulation.results import charts
from simulation.results.charts import PAGES, PART_LINES, PARTS_DRAWN, page_chart, selection, series_style, write_png
from simulation.results.console_report import winning_answers
from simulation.results.reader import SavedRun, figure_of, files_of, largest
from simulation.results.run_directory import ANALYSIS, REPORT, sweep_position, write_whole
from simulation.results.run_files import ANALYSIS_FILE, RecordedGame, RoundEntry, position_in_words, read_run_file
from simulation.results.tables import as_csv, decimals_of, number_text
from simulation.rpc.endpoints import ranges

FILES = {
    "summary.json": "settings, versions, and all figures of all rounds",
    "answers.parquet": "every answer of every participant",
    "texts.parquet": "what language models wrote",
    "prompts.parquet": "the prompts of these texts, each once",
    "answers.csv": "the same answers as text",
    "failed_answers.jsonl": "examples of unusable answers, with tracebacks",
    ANALYSIS: "figures of the analyses by kind of participant, persona and model",
    "game.json": "prompt, personas and models",
    f"{SOURCE}/{EXPERIMENT}": "an experiment file that plays the same game again",
    "histogram.png": "the answers of the last round",
    "rounds.png": "averages and answers by round",
    "../comparison.html": "the comparison of all runs of this experiment",
}
MANY_FAILURES = 0.1  # the share of participants without a usable answer from which on this is the headline
CAUSE_LENGTH = 160  # maximum number of characters of a failure cause in the headline
NAMES_LISTED = 6  # maximum number of personas or models that the first screen names
NAMED = 3  # maximum number of winners that the first sentence names
ROUNDS_ANALYSED = 12  # maximum number of rounds in the table of analyses
STEP_NAMES = {"above": "above", **{f"{step}": f"step {step}" for step in range(4)}, "higher": "higher steps"}
STEP_NAMES["between_steps"] = "between steps"
TEXT_PARTS, TEXTS_EACH = 12, 2  # maximum number of personas or models, and of texts of each of them in a round
TEXT_SHOWN, TEXT_FOLDED = 1500, 300  # maximum number of characters of a text, and of one that is not folded
PART_ROWS = 1500  # maximum number of rows in all tables by persona or model; if exceeded, rounds and names are omitted


def seconds(duration: float) -> str:
    if duration < 59.995:
        return f"{duration:.2f} s"
    minutes, rest = divmod(round(duration), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def column(numbers: Sequence[Any], game: Game, digits: int | None = None) -> list[str]:
    """Format the figures of a game in one column of a table. All have `digits` decimals (default: `decimals_of`)."""
    digits = decimals_of(numbers, game.decimals + 3) if digits is None else digits
    return [number_text(None if each is None else float(each), digits, padded=True) for each in numbers]


def by_round(entries: Sequence[dict[str, Any]], names: Iterable[tuple[str, str]]) -> dict[str, dict[int, float]]:
    """Return the figures `names`, pairs of a key and words, of all entries: by words and round."""
    return {words: {each["round"]: each[key] for each in entries if key in each} for key, words in names}


def flat(analysis: Mapping[str, Any], start: str = "") -> dict[str, float | None]:
    """Return the numbers in an analysis by name, such as `learning: went down`."""
    found: dict[str, float | None] = {}
    for name, value in analysis.items():
        words = f"{start}{name}".replace("_", " ")
        found |= flat(value, f"{words}: ") if isinstance(value, dict) else {words: value}
    texts = [words for words, value in found.items() if isinstance(value, str)]  # reasons why a figure is missing
    return {name: found[name] for name in found if name not in texts and f"{name} reason" not in texts}


ENVIRONMENT = Environment(
    loader=FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
)
OF_TEMPLATES = (by_round, column, figure_of, page_chart, series_style, winning_answers)
ENVIRONMENT.globals |= {each.__name__: each for each in OF_TEMPLATES} | {"charts": charts}
ENVIRONMENT.globals |= {"text_shown": TEXT_SHOWN, "text_folded": TEXT_FOLDED}
ENVIRONMENT.globals["in_numbers"] = lambda units, game: [each and each / game.scale for each in units]
ENVIRONMENT.filters |= {"number": number_text, "seconds": seconds}
ENVIRONMENT.filters["csv_link"] = lambda rows: f"data:text/csv;charset=utf-8,{quote(as_csv(rows), safe=',')}"
ENVIRONMENT.filters["file_name"] = lambda text: re.sub(r"[^\w.=+-]+", "-", text).strip("-.").lower()[:80] or "chart"
ENVIRONMENT.filters["with_capital"] = lambda text: text[:1].upper() + text[1:]


def draw_all(run: SavedRun) -> None:
    """Write a run's report, pictures and analysis.json. Raises SettingsError if answers are damaged."""
    analysis: Any = None
    if not isinstance(run.game, RecordedGame):
        analysis = run.analysis()
    elif is_there(run.path / ANALYSIS):  # the game of the file is not known here, so its figures are kept
        analysis = read_run_file(run.path, ANALYSIS, ANALYSIS_FILE.validate_json)
    content = page_content(run, analysis)
    if analysis is not None:
        analysis["people"] = []
        for each in content["people"]:
            figures = [row._asdict() | {"difference": row.difference} for row in each["rows"]]
            named = {"name": each["data"].name, "source": each["data"].source}
            analysis["people"].append(named | {"figures": figures, "distance": each.get("distance")})
        write_whole(run.path / ANALYSIS, (json.dumps(analysis, indent=1) + "\n").encode())
    write_page(run.path / REPORT, content)
    if run.results:
        write_png(run.path / "histogram.png", charts.last_round(run))
    if len(run.results) > 1:
        write_png(run.path / "rounds.png", charts.all_rounds(run))


def write_page(path: Path, content: dict[str, Any]) -> None:
    """Write the file `path`, rendered from the template of the same name. Raises ResultsError if this fails."""
    write_whole(path, ENVIRONMENT.get_template(path.name).render(content).encode(errors="replace"))


def page_content(run: SavedRun, analysis: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the template variables of the report. `analysis` is the content of analysis.json, if it is there."""
    entries, people = run.summary["rounds"], [_beside(run, each) for each in run.people if run.results]
    return {
        "run": run,
        "answers": [(f"Round {result.round}", run.game, result) for result in run.results],
        "position": run.position and position_in_words(run.position),
        "columns": _columns(run),
        "tiles": [*(run.figures or {"average": "average"}).items()],
        "result": result_in_words(run),
        "problems": problems(run),
        "many_failed": max(_failures(run).values(), default=0) >= max(MANY_FAILURES * run.config.participant_num, 1),
        "files": _files(run),
        "repeat": _repeat_command(run),
        "replay": run.config.replay and from_root(run.config.replay),
        "settings": [f", {each.replace('=', ' ', 1)}" for each in run.config.set],
        "topics": [_topic(run, topic) for topic in run.tallies_by_part],
        "failures": failures_by_cause(entries),
        "analysis": _analysis(run, analysis["rounds"] if analysis is not None else ()),
        "people": people,
        "texts": _texts(run),
        "details": _details(run, people),
    }


def _analysis(run: SavedRun, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the template variables of the analyses. `entries` are the rounds in analysis.json, if it is there."""
    results = [result for result in run.results if result.analysis]
    with_steps = [each for each in results if _has_steps(each.analysis)]
    steps = [{"round": each.round, **each.analysis, **each.analysis["steps"]} for each in with_steps]
    names, notes = dict.fromkeys(name for each in results for name in each.analysis), run.game.words.notes
    ends = {each["round"]: each for each in (*entries[:1], *entries[-1:])}
    return {
        "rounds": [(results[at].round, flat(results[at].analysis)) for at in selection(len(results), ROUNDS_ANALYSED)],
        "omitted": max(len(results) - ROUNDS_ANALYSED, 0),
        "steps": by_round(steps, STEP_NAMES.items()) if steps else {},
        "texts": _reasons((f"Round {each.round}", each.analysis) for each in results),
        "notes": [(name.replace("_", " "), notes[name]) for name in names if name in notes],
        "parts": [
            (topic, number, {name: flat(figures) for name, figures in parts.items()}, _reasons(parts.items()))
            for topic in run.tallies_by_part
            for number, each in ends.items()
            if (parts := each["by"].get(topic))
        ],
    }


def _has_steps(analysis: Mapping[str, Any]) -> bool:
    """Return whether an analysis has shares of steps of reasoning; a user's game may have another figure `steps`."""
    shares = analysis.get("steps")
    return isinstance(shares, Mapping) and STEP_NAMES.keys() <= {*shares, "between_steps"}


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


def _reasons(analyses: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return the texts in analyses, such as why there is no tau."""
    every = [(f"{start}, {name.replace('_', ' ')}", text) for start, each in analyses for name, text in each.items()]
    return [f"{words}: {text}" for words, text in every if isinstance(text, str)]


def _details(run: SavedRun, people: Sequence[dict[str, Any]]) -> list[str]:
    """Return sentences for the first screen: who played, how they reasoned, and how far they are from people."""
    few = {topic: tallies[-1] for topic, tallies in run.tallies_by_part.items() if len(tallies[-1]) <= NAMES_LISTED}
    counts = {topic: ", ".join(f"{each.asked:,} {name}" for name, each in last.items()) for topic, last in few.items()}
    texts = [f"{topic}: {words}." for topic, words in counts.items() if topic != KIND]  # the title names kinds
    if (tau := run.results[0].analysis.get("tau") if run.results else None) is not None:
        ends = f"{tau['low']:.2f} to {'more' if tau['high'] is None else format(tau['high'], '.2f')}"
        texts.append(f"Tau is {tau['estimate']:.2f} ({ends}).")
    for each in people:
        if each["rows"] and (row := each["rows"][0]).figure == "mean":
            figure = f"{number_text(row.people[0])} in {each['data'].name}"
            texts.append(f"The mean of round {row.round} is {row.difference} ({figure}).")
    return texts


def _columns(run: SavedRun) -> list[tuple[str, str, list[str]]]:
    """Return the columns of the table of rounds, the important ones first: heading, key and texts."""
    plain = {name: name for name in ("average", "median")}
    deciding = {name: words for name, words in run.figures.items() if name in (*plain, "winning_number")}
    others = {name: words for name, words in run.figures.items() if name not in RoundEntry.__annotations__}
    names = {**deciding, **others, "answered": "answered", "failed": "failed"}
    names |= {name: words for name, words in plain.items() if name not in names}
    names |= {"std": "spread", "min": "lowest", "max": "highest", "asked": "asked", "reassigned": "moved"}
    digits = {"min": run.game.decimals, "max": run.game.decimals, "seconds": 2}
    values = {name: [figure_of(entry, name) for entry in run.summary["rounds"]] for name in (*names, "seconds")}
    return [(names.get(name, name), name, column(each, run.game, digits.get(name))) for name, each in values.items()]


def _failures(run: SavedRun) -> dict[int, int]:
    """Return how many participants failed in each round with failures. Interrupted participants do not count."""
    counts = {each["round"]: each["failed"] - each["failures"].get(INTERRUPTED, 0) for each in run.summary["rounds"]}
    return {number: count for number, count in counts.items() if count}


def result_in_words(run: SavedRun) -> str:
    """Return sentences about the main figure of the first and the last round with answers, and the last winners."""
    played = [result for result in run.results if result.outcome]
    played = [result for result in played if result.tally.ended is not Ended.INTERRUPTED] or played
    if not played:
        return "There is no result."
    name, words = next(iter(run.figures.items()))
    numbers, last, several = run.by_round(name), played[-1], len(run.results) > 1
    shown = {result.round: charts.rounded(run.game, numbers.get(result.round)) for result in (played[0], last)}
    text = " and ".join(f"{each} in round {number}" if several else each for number, each in shown.items())
    count, names = last.winners.count, listed(f"P{index}" for index in last.winners.lowest)
    names = names if count <= NAMED else f"{count:,} participants"
    won = f"Round {last.round} was won by {names} with" if several else f"{names} won with"
    ending = f"{won} {winning_answers(last, run.game)}"
    if not count:
        ending = f"No answer won round {last.round}" if several else "no answer won"
    return f"The {words} was {text}{'. ' if several else ', and '}{ending}."


def problems(run: SavedRun) -> list[str]:
    """Return sentences about what prevented complete results: an early end, and failures with their main cause."""
    entries, texts = run.summary["rounds"], []
    planned, finished = run.config.rounds, run.rounds_finished
    last: dict[str, Any] = entries[-1] if entries else {"ended": ""}
    if "error" in last:
        texts.append(f"The game has no result of round {last['round']}: {last['error']}.")
    elif last["ended"] == "interrupted":
        answers = f"{last['answered']:,} of {last['asked']:,} participants had answered"
        texts.append(f"The run was interrupted in round {last['round']} of {planned}: {answers}.")
    elif not run.is_finished:
        reasons = {"out_of_tokens": ": the token budget was spent", "model_failed": ": the language models failed"}
        verb = {"interrupted": "was interrupted", "failed": "failed"}.get(run.summary["status"], "ended")
        texts.append(f"The run {verb} after {finished} of {planned} rounds{reasons.get(last['ended'], '')}.")
    if counts := _failures(run):
        text = f"{max(counts.values()):,} of {run.config.participant_num:,} participants gave no usable answer"
        if len({*counts.values()}) > 1:
            text = f"Up to {text}, in {len(counts)} rounds"
        elif len(counts) > 1:
            text += f" in each of {len(counts)} rounds"
        elif len(entries) > 1:
            text += f" in round {next(iter(counts))}"
        causes = [each for each in failures_by_cause(entries) if each["cause"] != INTERRUPTED]
        cause = "".join(f"{printable(each['cause'], CAUSE_LENGTH)} ({each['count']:,})" for each in causes[:1])
        texts.append(f"{text}. {'Main cause' if len(causes) > 1 else 'Cause'}: {cause}.")
    return texts


def _files(run: SavedRun) -> list[tuple[str, str]]:
    """Return pairs of a path, relative to the page, and what the file holds."""
    known = {name: is_there(run.path / name) for name in FILES}
    known |= {"histogram.png": bool(run.results), "rounds.png": len(run.results) > 1}  # written after the page
    known |= {"../comparison.html": sweep_position(run.path) is not None}
    known[ANALYSIS] |= not isinstance(run.game, RecordedGame)
    return [(name, words) for name, words in FILES.items() if known[name]]


def _repeat_command(run: SavedRun) -> str:
    """Return the shell command that plays the game again, or "" for runs of old versions."""
    if "sources" not in run.summary:
        return ""
    folder = from_root(str(run.config.run_dir or HOME / "runs" / run.run_id))
    replay = ["--replay", from_root(run.config.replay)] if run.config.replay is not None else []
    replay += ["--offline"] if run.config.offline else []
    return shlex.join(["./run_simulation.sh", "--experiment", f"{folder}/{SOURCE}/{EXPERIMENT}", *replay])


def _topic(run: SavedRun, topic: str) -> dict[str, Any]:
    """Return the template variables of the tables and the line chart for `topic`, a persona set or "model"."""
    scale, tallies = run.game.scale, run.tallies_by_part[topic]
    rounds, last = [*enumerate(tallies, start=1)], tallies[-1]
    rows = PART_ROWS // len(run.tallies_by_part)
    listed = largest(last, max(rows // 3, 1))
    shown = [rounds[index] for index in selection(len(rounds), max(rows // len(listed), 1))]
    averages = [(name, [(at, each[name].average()) for at, each in rounds]) for name in largest(last, PART_LINES)]
    drawn = [(name, charts.histogram_rows(run.game, last[name])) for name in largest(last, PARTS_DRAWN)]
    return {
        "name": topic,
        "last": last,
        "listed": listed,
        "last_rows": [(name, rounds[-1][0], last[name]) for name in listed],
        "rounds": len(shown),
        "rows": [(name, number, each[name]) for number, each in shown for name in listed],
        "answers": [(topic, *drawn[0][1][0]), *((name, *row) for name, table in drawn for row in table[1:] if row[2])],
        "lines": {name: {at: float(each / scale) for at, each in by if each is not None} for name, by in averages},
    }


def _texts(run: SavedRun) -> list[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """Return texts of models in the first and the last round: by topic and by name (of a persona, kind or model)."""
    kept, population = run.summary.get("texts", {"kept": 0})["kept"], run.game.population
    if not kept or not run.results or not is_there(files_of(run.path, "texts")[0]):
        return []
    personas = [each for each in population.groupings if each.topic in population.persona_sets]
    everyone = Grouping("", ("all participants",), (), 0)
    topics: Sequence[Grouping] = personas or population.groupings or [everyone]
    rounds, found = dict.fromkeys((run.results[0].round, run.results[-1].round)), []
    for parts in topics:
        tallies = run.tallies_by_part[parts.topic][-1] if parts is not everyone else {"all participants": Tally(0)}
        names = largest(tallies, max(TEXT_PARTS // len(topics), 1))
        samples = [run.sample_texts(parts, names, number, TEXTS_EACH) for number in rounds]
        found.append((parts.topic, {name: [row for sample in samples for row in sample[name]] for name in names}))
    return found


def failures_by_cause(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a dictionary for each failure cause: its text, count and rounds. The most frequent comes first."""
    causes: dict[str, dict[int, int]] = {}
    for entry in entries:
        for cause, count in entry["failures"].items():
            causes.setdefault(cause, {})[entry["round"]] = count
    rows = [{"cause": each, "count": sum(by.values()), "rounds": ranges(by)} for each, by in causes.items()]
    return sorted(rows, key=lambda row: (-row["count"], row["cause"]))
