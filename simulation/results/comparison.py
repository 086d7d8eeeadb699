"""The comparison of several runs as a text table, a CSV file, a PNG picture and an HTML page.

Runs with equal settings are one treatment: they are compared by means and confidence intervals over its runs.
"""

import itertools
import math
import os
import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from simulation.errors import printable
from simulation.files import is_there, real
from simulation.game.game import Game
from simulation.game.tally import RoundResult, merge
from simulation.provenance import EXPERIMENT
from simulation.results import charts
from simulation.results.charts import series_style, write_png
from simulation.results.reader import SavedRun, figure_of, folder_names, unfinished_lines
from simulation.results.report_page import flat, write_page
from simulation.results.run_directory import REPORT, SWEEP, results_errors, script_command, sweep_position, write_whole
from simulation.results.tables import as_csv, column_lines, columns_of, value_text
from simulation.settings import SETTINGS

PAGE, PICTURE, DATA = "comparison.html", "comparison.png", "comparison.csv"
# Cluster settings that affect the speed. The comparison shows them in addition to the settings of the game.
COMPARED = ("dispatch", "hosts", "server_per_host", "moderator_per_host", "model_per_host", "max_in_flight")
# Settings of the game that change no figure of a run
NOT_COMPARED = ("repeats", "payoffs", "compare_with", "keep_going", "keep_texts")
WORDS = {"participant_num": "participants", "max_value": "upper bound"}
# Headings of columns
HEADINGS = ("run", "treatment", "runs", "round", "played", "answered", "failed", "status", "equilibrium", "std")
LABEL_SETTINGS = 2  # maximum number of settings that a label mentions
SETTINGS_SHOWN, FIGURES_SHOWN = 6, 3  # maximum numbers in a table; the CSV file has all
HAVE_EQUILIBRIA = ("average", "median", "maximum")  # figures with the unit of an answer
Row = dict[str, Any]  # a cell by column heading, as `columns_of` expects
LINES = 24  # maximum number of treatments in the line chart: as many lines as `series_style` distinguishes


class Estimate(NamedTuple):
    """The mean of one figure over repeats. All but `runs` and `mean` are NaN if there is only one run."""

    runs: int
    mean: float
    std: float = math.nan  # of a sample: the divisor is runs - 1
    low: float = math.nan  # the 95 % confidence interval of the mean, by Student's t
    high: float = math.nan


def estimate(numbers: Sequence[float]) -> Estimate:
    runs, mean = len(numbers), statistics.fmean(numbers)
    if runs == 1:
        return Estimate(runs, mean)
    from scipy.special import stdtrit  # noqa: PLC0415 - takes 0.5 s, and only repeats need it

    std = statistics.stdev(numbers)
    half = float(stdtrit(runs - 1, 0.975)) * std / math.sqrt(runs)
    return Estimate(runs, mean, std, mean - half, mean + half)


@dataclass(frozen=True)
class Treatment:
    """Runs whose compared settings are equal, except for seed and rounds: the repeats of one combination."""

    label: str
    settings: dict[str, Any]  # those that differ between treatments and that the label does not mention
    runs: list[SavedRun]

    def estimates(self, name: str) -> dict[int, Estimate]:
        """Estimate a figure of each round from the runs that have it. Of several runs, omit interrupted rounds.

        The last figures of a run that has converged count in all later rounds, too. A winning number that is one of two
        numbers has no mean.
        """
        numbers: dict[int, list[float]] = {}
        for run in self.runs if name != "winning_number" or self.runs[0].game.numbers > 2 else ():
            values = run.by_round(name)
            if "converged_after" in run.summary and (last := len(run.results)) in values:
                longest = max(len(each.results) for each in self.runs)
                values |= dict.fromkeys(range(last + 1, longest + 1), values[last])
            for number, value in values.items():
                if number <= run.rounds_finished or number > len(run.results) or len(self.runs) == 1:
                    numbers.setdefault(number, []).append(value)
        return {number: estimate(each) for number, each in sorted(numbers.items())}

    @cached_property
    def last(self) -> int:
        """Return the last round that most of the runs with answers have finished, or at least half; 0: none."""
        averages = self.estimates("average")
        most = max((each.runs for each in averages.values()), default=0)
        return max((number for number, each in averages.items() if 2 * each.runs >= most), default=0)

    def last_round(self) -> RoundResult:
        """Return the last round: the answers of all repeats together, and the mean of each figure."""
        if len(self.runs) == 1:
            return self.runs[0].results[-1]
        played = [run for run in self.runs if run.rounds_finished >= self.last > 0 or "converged_after" in run.summary]
        results = [run.results[: self.last][-1] for run in played]
        results = results or [run.results[0] for run in self.runs if run.results]  # all were cut in round 1
        number = max(each.round for each in results)
        estimates = {name: self.estimates(name).get(number) for name in results[0].outcome}
        outcome = {name: each and each.mean for name, each in estimates.items()}
        return replace(results[0], round=number, tally=merge(each.tally for each in results), outcome=outcome)


def treatments_of(runs: Sequence[SavedRun]) -> list[Treatment]:
    """Group runs by compared settings. Runs that differ in `rounds` only are repeats unless their seeds are equal."""
    differing = _differing(runs)
    names = _ranked(differing)
    seeds = {(run.config.seed, *(each[name] for name in names)) for run, each in zip(runs, differing, strict=True)}
    if "rounds" in differing[0] and len(seeds) < len(runs):
        names = _ranked(differing, by_rounds=True)
    groups, treatments = dict[tuple[Any, ...], list[SavedRun]](), list[Treatment]()
    for run, settings in zip(runs, differing, strict=True):
        groups.setdefault(tuple(settings[name] for name in names), []).append(run)
    for values, group in groups.items():
        shown = [*zip(names, values, strict=True)][:SETTINGS_SHOWN]
        words = ((_plain(name), _text(name, value)) for name, value in shown[:LABEL_SETTINGS])
        label = ", ".join(f"no {word}" if text == "-" else f"{word} {text}" for word, text in words)
        treatments.append(Treatment(label or f"{len(group)} runs", dict(shown[LABEL_SETTINGS:]), group))
    counts, numbered = Counter(each.label for each in treatments), enumerate(treatments, start=1)
    return [replace(each, label=f"{each.label} ({at})") if counts[each.label] > 1 else each for at, each in numbered]


def _differing(runs: Sequence[SavedRun]) -> list[dict[str, Any]]:
    """Return a dictionary for each run. It maps the names of the settings in which the runs differ to their values."""
    compared = [name for name, each in SETTINGS.items() if (each.game and name not in NOT_COMPARED) or name in COMPARED]
    values = list[dict[str, Any]]()
    mixed = len({(run.config.players, run.config.agent_class) for run in runs}) > 1
    for run in runs:
        values.append({name: getattr(run.config, name) for name in compared} | {"max_value": run.game.high})
        if mixed:  # then one setting says who plays
            del values[-1]["agent_type"], values[-1]["agent_class"]
            values[-1]["players"] = run.config.players or run.config.kinds[0].text
        for each in values[-1].pop("set", ()):  # parameters, such as noise=5
            name, _, value = each.partition("=")
            values[-1][f"set {name}" if name in SETTINGS or name in HEADINGS else name] = value
    every = dict.fromkeys(itertools.chain(*values))
    names = [name for name in every if len({each.get(name) for each in values}) > 1]
    return [{name: each.get(name) for name in names} for each in values]


def _ranked(differing: Sequence[dict[str, Any]], by_rounds: bool = False) -> list[str]:
    """Return the settings that define treatments. Each distinguishes, with those before it, as many runs as it can."""

    def distinct(*names: str) -> int:
        return len({tuple(each[name] for name in names) for each in differing})

    left, first = [name for name in differing[0] if name != "seed" and (by_rounds or name != "rounds")], list[str]()
    while left and len(first) < SETTINGS_SHOWN:
        first.append(max(left, key=lambda name: (distinct(*first, name), distinct(name))))
        left.remove(first[-1])
    return [*first, *left]


def _plain(name: str) -> str:
    return WORDS.get(name, name.replace("_", " "))


def _text(name: str, value: Any) -> str:
    return "-" if value is None else value_text(name, value)


def _figures(runs: Sequence[SavedRun]) -> dict[str, str]:
    """Return the words for each figure of the outcomes, by name. If games differ in them, the average comes first."""
    usual = {"average": "average", "winning_number": "winning number"}
    outcomes = [run.figures for run in runs if run.figures] or [usual]
    alike = all(each == outcomes[0] for each in outcomes)
    figures = {} if alike else {"average": "average"}  # of the answers, which each game has
    for name, words in itertools.chain(*(each.items() for each in outcomes)):
        figures[name] = words if figures.get(name, words) == words else _plain(name)
    return figures


def _equilibrium(game: Game) -> str:
    known = game.equilibrium()
    return "-" if known is None else " and ".join(f"{each:.6g}" for each in known) or "any"


def _run_rows(runs: Sequence[SavedRun]) -> list[Row]:
    differing, ((main, words), *others) = _differing(runs), [*_figures(runs).items()][:FIGURES_SHOWN]
    figures = [(f"first {words}", main, 0), (f"last {words}", main, -1), *((text, name, -1) for name, text in others)]
    shown = [*_ranked(differing)[:SETTINGS_SHOWN], "seed"]
    rows: list[Row] = []
    for run, folder, values in zip(runs, folder_names(runs), differing, strict=True):
        entries = run.summary["rounds"]
        row: Row = {"run": folder} | {_plain(name): _text(name, values[name]) for name in values if name in shown}
        row |= {heading: figure_of(entries[at], name) if entries else None for heading, name, at in figures}
        row |= {"played": len(entries)} | {key: sum(each[key] for each in entries) for key in ("answered", "failed")}
        row |= {"status": run.status_in_words, "equilibrium": _equilibrium(run.game)}
        rows.append(row | {"seconds": run.summary["seconds"]["total"]})
    return rows


def _treatment_rows(treatments: Sequence[Treatment]) -> list[Row]:
    rows: list[Row] = []
    figures = [*_figures([run for each in treatments for run in each.runs]).items()][:FIGURES_SHOWN]
    for treatment in treatments:
        last, count = treatment.last, len(treatment.runs)
        known = treatment.estimates("average")[last].runs if last else 0
        row: Row = {"treatment": treatment.label}
        for name, words in figures:
            mean: Any = None
            interval, std, its = mean, mean, "" if (name, words) == figures[0] else f"{words}: "
            if (found := treatment.estimates(name).get(last)) is not None:
                mean = ("{} ({} of {})", found.mean, found.runs, known) if found.runs < known else found.mean
                interval, std = (("{} to {}", found.low, found.high), found.std) if found.runs > 1 else (None, None)
            row |= {words: mean, f"{its}95 % interval": interval}
            if not its:
                row |= {"std": std} | {_plain(name): _text(name, value) for name, value in treatment.settings.items()}
        row["runs"] = ("{} of {}", known, count) if known < count else count
        row["failed"] = sum(entry["failed"] for run in treatment.runs for entry in run.summary["rounds"])
        states = Counter(run.status_in_words for run in treatment.runs)
        row["status"] = ", ".join(f"{states[each]} {each}" if len(states) > 1 else each for each in states)
        rows.append(row | {"round": last or None, "equilibrium": _equilibrium(treatment.runs[0].game)})
    empty = [name for name in rows[0] if name != figures[0][1] and all(row[name] in (None, "-") for row in rows)]
    return [{name: value for name, value in row.items() if name not in empty} for row in rows]


def _omitted(runs: Sequence[SavedRun]) -> str:
    """Name the settings and figures that only the CSV file has. Return "" if there are none."""
    settings, figures = _ranked(_differing(runs))[SETTINGS_SHOWN:], [*_figures(runs).values()][FIGURES_SHOWN:]
    names = [*map(_plain, settings), *figures]
    return f"only in {DATA}: {', '.join(names)}" if names else ""


def comparison_lines(runs: Sequence[SavedRun], all_runs: bool = False) -> list[str]:
    """Return the lines of text tables: the treatments if a treatment has several runs; otherwise, or also, the runs."""
    lines, treatments = [], treatments_of(runs)
    (main, *others), settings = [*_figures(runs).values()], [_plain(name) for name in _differing(runs)[0]]
    others.reverse()
    if len(treatments) < len(runs):
        intervals = [f"{name}: 95 % interval" for name in others]
        dropped = ["equilibrium", *intervals, "round", *settings, "status", *others, "std", "failed"]
        lines += column_lines(columns_of(_treatment_rows(treatments)), dropped, PAGE)
    if all_runs or not lines:  # settings may be dropped: folder names mention them
        dropped = ["seconds", "equilibrium", f"first {main}", *settings, "played", "answered", *others, "failed"]
        lines += column_lines(columns_of(_run_rows(runs)), [*dropped, "status", f"last {main}"], PAGE)
    return [*lines, *filter(None, [_omitted(runs)])]


def write_comparison(folder: Path, runs: Sequence[SavedRun], all_runs: bool = False) -> None:
    """Write comparison.csv, .png and .html to a folder. Raises ResultsError if this fails."""
    with results_errors(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / DATA, csv_text(runs).encode(errors="backslashreplace"))
    write_png(folder / PICTURE, _picture(treatments_of(runs), all_runs))
    write_page(folder / PAGE, page_content(folder, runs, all_runs))


def csv_text(runs: Sequence[SavedRun]) -> str:
    """Return the content of comparison.csv: a row per run and round, with all settings in which the runs differ."""
    rows = list[dict[str, Any]]()
    repeats = {run.path: repeat for each in treatments_of(runs) for repeat, run in enumerate(each.runs, start=1)}
    for run, folder, settings in zip(runs, folder_names(runs), _differing(runs), strict=True):
        start = {"run": folder, "run_id": run.run_id, "repeat": repeats[run.path], "status": run.summary["status"]}
        for entry, result in zip(run.summary["rounds"], run.results, strict=True):
            figures = {key: each for key, each in entry.items() if each is None or isinstance(each, int | float)}
            figures |= {f"outcome_{name}": each for name, each in entry["outcome"].items()}
            analysis = flat(result.analysis).items()
            figures |= {f"analysis_{name.replace(': ', '_').replace(' ', '_')}": each for name, each in analysis}
            figures |= {"winners": entry["winners"]["count"], "seconds": figures.pop("seconds")}
            taken = start.keys() | figures.keys()
            named = {f"set {name}" if name in taken else name: value for name, value in settings.items()}
            rows.append(start | named | figures)
    head = [*dict.fromkeys(itertools.chain(*rows))] or ["run"]
    return as_csv([head, *([row.get(name) for name in head] for row in rows)])


def page_content(folder: Path, runs: Sequence[SavedRun], all_runs: bool = False) -> dict[str, Any]:
    """Return the template variables of the comparison page. Its links to reports are relative to `folder`."""
    treatments, reports = treatments_of(runs), [real(run.path) / REPORT for run in runs]
    drawn, script = _to_draw(treatments), folder / EXPERIMENT
    position: Any = sweep_position(runs[0].path) if real(runs[0].path).parent == real(folder) else None
    return {
        "runs": runs,
        "all_runs": all_runs,
        "about": printable((position or {}).get("about", "")),
        "entries": [entry for run in runs for entry in run.summary["rounds"]],
        "files": [DATA, PICTURE, *(name for name in (EXPERIMENT, SWEEP) if is_there(folder / name))],
        "repeat": script_command("--experiment", script) if is_there(script) else "",
        "unfinished": unfinished_lines([folder], runs),
        "treatments": treatments,
        "treatment_columns": columns_of(_treatment_rows(treatments)),
        "columns": columns_of(_run_rows(runs)),
        "omitted": _omitted(runs),
        "styles": {treatment.label: " ".join(series_style(index)) for index, treatment in enumerate(drawn)},
        "labels": {run.path: treatment.label for treatment in treatments for run in treatment.runs},
        "links": [quote(os.path.relpath(each, real(folder))) if is_there(each) else None for each in reports],
        "drawn": drawn,
        "has_equilibria": _has_equilibria,
        "main": next(iter(_figures(runs).items())),
        "draw_figure": _draw_figure,
        "lines_of": lambda name: charts.line_rows(*_lines(drawn, name)),
        "last_rounds": [(each.label, each.runs[0].game, each.last_round()) for each in drawn],
    }


def _to_draw(treatments: Sequence[Treatment]) -> list[Treatment]:
    played = [each for each in treatments if any(run.results for run in each.runs)]
    return [played[index] for index in charts.selection(len(played), LINES)]


def _has_equilibria(drawn: Sequence[Treatment], name: str) -> bool:
    return name in HAVE_EQUILIBRIA and any(each.runs[0].game.equilibrium() for each in drawn)


def _draw_figure(axes: Axes, drawn: Sequence[Treatment], all_runs: bool, name: str, unit: str) -> None:
    """Draw each treatment's mean of a figure by round as a line, its interval, and its equilibria."""
    games = [each.runs[0].game for each in drawn]
    equilibria = [game.equilibrium() for game in games]
    for index, treatment in enumerate(drawn):
        colour = series_style(index)[0]
        own = colour if equilibria.count(equilibria[index]) == 1 else "muted"
        if _has_equilibria([treatment], name):
            charts.draw_equilibria(axes, games[index], color=own, linewidth=1.6)
        for run in treatment.runs if all_runs and len(treatment.runs) > 1 else ():
            axes.plot(*zip(*run.by_round(name).items(), strict=True), color=colour, linewidth=0.6)
    estimates = [each.estimates(name) for each in drawn]
    bands = [{number: each[-2:] for number, each in found.items() if each.runs > 1} for found in estimates]
    charts.draw_lines(axes, *_lines(drawn, name), bands=bands, unit=unit)


def _lines(drawn: Sequence[Treatment], name: str) -> tuple[int, dict[str, dict[int, float]]]:
    """Return the most rounds of a run, and each treatment's mean of a figure by round, by label."""
    rounds = max((len(run.results) for each in drawn for run in each.runs), default=1)
    return rounds, {each.label: {at: its.mean for at, its in each.estimates(name).items()} for each in drawn}


def _picture(treatments: Sequence[Treatment], all_runs: bool) -> Figure:
    """Return a figure with the averages by round at the top, and histograms of some last rounds below."""

    def shown(selected: Sequence[Treatment]) -> str:
        return f" ({len(selected)} of {len(treatments)} shown)" if len(selected) < len(treatments) else ""

    drawn = _to_draw(treatments)
    selected = [drawn[index] for index in charts.selection(len(drawn), charts.SMALL_MULTIPLES)]
    rounds = [(each, each.last_round()) for each in selected]
    histograms = [(f"{each.label}, round {result.round}", each.runs[0].game, result) for each, result in rounds]
    main, words = next(iter(_figures([run for each in treatments for run in each.runs]).items()))
    dotted = "; dotted: equilibrium" if _has_equilibria(drawn, main) else ""
    bands = "; bands: 95 % interval over repeats" if any(len(each.runs) > 1 for each in drawn) else ""
    handles = [Line2D([], [], **charts.line_style(index)) for index in range(len(drawn))]
    labels = [textwrap.fill(each.label, charts.TITLE_WIDTH) for each in drawn]
    for columns in (3, 2, 1):
        legend: dict[str, Any] = {"handles": handles, "labels": labels, "ncols": columns}
        page = Figure(figsize=(charts.PICTURE_INCHES, 1))
        box = page.legend(**legend).get_window_extent()
        if box.width < page.bbox.width:
            break
    return charts.picture(
        partial(_draw_figure, drawn=drawn, all_runs=all_runs, name=main, unit=words),
        f"{words[:1].upper()}{words[1:]} by round{dotted}{bands}{shown(drawn)}",
        histograms,
        f"Answers of the last round{shown(selected)}",
        legend,
        box.height / page.dpi,
    )
