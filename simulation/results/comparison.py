"""The comparison of several runs as a text table, a CSV file, a PNG picture and an HTML page.

Runs with equal settings are one treatment: they are compared by means and confidence intervals over its runs.
"""

import csv
import io
import itertools
import math
import os
import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulation.errors import SettingsError, printable
from simulation.files import is_there, real
from simulation.game.game import Game
from simulation.game.tally import merge
from simulation.results import charts
from simulation.results.console_report import brief
from simulation.results.figures import limit_ticks, series_style, write_png
from simulation.results.reader import SavedRun, runs_in
from simulation.results.report_page import fixed, whole, write_page
from simulation.results.run_directory import REPORT, SWEEP, results_errors, resume_command, sweep_position, write_whole
from simulation.results.run_files import round_entry
from simulation.results.tables import table_lines
from simulation.settings import SETTINGS, parse_players

PAGE, PICTURE, DATA = "comparison.html", "comparison.png", "comparison.csv"
# Cluster settings that affect the speed. The comparison shows them in addition to the settings of the game.
COMPARED = ("dispatch", "hosts", "server_per_host", "moderator_per_host", "model_per_host", "max_in_flight")
NOT_COMPARED = ("repeats", "payoffs")  # settings of the game that change no figure of a run
WORDS = {"participant_num": "participants", "max_value": "upper bound", "agent_class": "class"}
LABEL_SETTINGS = 2  # maximum number of settings that a label mentions; the tables have all
TITLE_WIDTH = 38  # maximum number of characters in a line of a label in the picture
LINES = 24  # maximum number of treatments in the line chart: as many lines as `series_style` distinguishes


class Estimate(NamedTuple):
    """The mean of one figure over repeats. All but `runs` and `mean` are NaN if there is only one run."""

    runs: int
    mean: float
    std: float  # of a sample: the divisor is runs - 1
    low: float  # the 95 % confidence interval of the mean, by Student's t
    high: float


def estimate(numbers: Sequence[float]) -> Estimate:
    """Return the estimate from one or more numbers."""
    runs, mean, std, half = len(numbers), statistics.fmean(numbers), math.nan, math.nan
    if runs > 1:
        from scipy.special import stdtrit  # noqa: PLC0415 - takes 0.5 s, and only repeats need it

        std = statistics.stdev(numbers)
        half = float(stdtrit(runs - 1, 0.975)) * std / math.sqrt(runs)
    return Estimate(runs, mean, std, mean - half, mean + half)


@dataclass(frozen=True)
class Treatment:
    """Runs whose compared settings are equal, except for the seed: the repeats of one combination of settings."""

    label: str
    settings: dict[str, str]  # those that differ between treatments and that the label does not mention
    runs: list[SavedRun]

    def estimates(self, key: str) -> dict[int, Estimate]:
        """Estimate the figure `key` of each round from the runs that have it; of several runs, omit cut rounds."""
        numbers: dict[int, list[float]] = {}
        for entry in [entry for run in self.runs for entry in run.summary["rounds"]]:
            if entry[key] is not None and (entry["ended"] != "interrupted" or len(self.runs) == 1):
                numbers.setdefault(entry["round"], []).append(entry[key])
        return {number: estimate(each) for number, each in sorted(numbers.items())}

    def last_round(self) -> SavedRun:
        """Return a run with one round: the answers of all repeats in their last round, and the mean of each figure."""
        first = self.runs[0]
        if len(self.runs) == 1:
            return first
        number = max(run.rounds_finished for run in self.runs)
        results = [run.results[number - 1] for run in self.runs if run.rounds_finished >= number > 0]
        results = results or [run.results[0] for run in self.runs if run.results]  # all were cut in round 1
        figures: dict[str, list[float]] = {}
        for name, value in itertools.chain(*(each.outcome.items() for each in results)):
            figures.setdefault(name, []).extend([] if value is None else [value])
        outcome = {name: statistics.fmean(values) if values else None for name, values in figures.items()}
        pooled = replace(results[0], tally=merge(each.tally for each in results), outcome=outcome)
        entry = round_entry(pooled, first.game.scale)
        return replace(first, summary=first.summary | {"rounds": [entry]}, results=[pooled])


def treatments_of(runs: Sequence[SavedRun]) -> list[Treatment]:
    """Group the runs by their compared settings, in the order in which the treatments first occur."""
    differing = _differing(runs)
    distinct = {name: len({each[name] for each in differing}) for name in differing[0] if name != "seed"}
    names = sorted(distinct, key=lambda name: -distinct[name])  # labels mention those with the most values
    groups: dict[tuple[Any, ...], list[SavedRun]] = {}
    for run, values in zip(runs, differing, strict=True):
        groups.setdefault(tuple(values[name] for name in names), []).append(run)
    texts = [[_text(name, value) for name, value in zip(names, values, strict=True)] for values in groups]
    words = [WORDS.get(name, name.replace("_", " ")) for name in names][:LABEL_SETTINGS]
    labels = [
        ", ".join(f"no {word}" if text == "-" else f"{word} {text}" for word, text in zip(words, each, strict=False))
        for each in texts
    ]
    labels = [f"{each} ({n})" if labels.count(each) > 1 else each for n, each in enumerate(labels, start=1)]
    rest = [name.replace("_", " ") for name in names[LABEL_SETTINGS:]]
    return [
        Treatment(label or f"{len(group)} runs", dict(zip(rest, each[LABEL_SETTINGS:], strict=True)), group)
        for label, each, group in zip(labels, texts, groups.values(), strict=True)
    ]


def run_folders(named: Sequence[Path]) -> list[Path]:
    """Return `named` without duplicates, experiments replaced by their runs. Raises SettingsError if one has none."""
    found: dict[Path, Path] = {}
    for path in named:
        runs = runs_in(path) if is_there(path / SWEEP) else [path]
        if not runs:
            raise SettingsError(f"{path}: no run was played in this sweep; give the folder of another")
        for run in runs:
            found.setdefault(real(run), run)
    return list(found.values())


def unfinished_lines(named: Sequence[Path], runs: Sequence[SavedRun]) -> list[str]:
    """Return a message for each experiment in `named` that has missing or unfinished runs."""
    lines = []
    for path in [real(path) for path in named if is_there(path / SWEEP)]:
        existing = [run for run in runs if real(run.path).parent == path]
        position = sweep_position(existing[0].path)
        finished = sum(run.rounds_finished >= run.config.rounds for run in existing)
        if position is not None and finished < position["runs"]:
            left = f"{position['runs'] - finished} of {position['runs']} runs of {printable(position['experiment'])}"
            lines.append(f"{left} have rounds left; to go on with them: {resume_command(path)}")
    return lines


def common_folder(paths: Sequence[Path]) -> Path:
    """Return the innermost folder that contains all run folders `paths`. Raises SettingsError if this is /."""
    folder = Path(os.path.commonpath([real(path).parent for path in paths]))
    if folder == folder.parent:
        raise SettingsError("these runs have no folder in common: give --run-dir, where the comparison is written")
    return folder


def _differing(runs: Sequence[SavedRun]) -> list[dict[str, Any]]:
    """Return a dictionary for each run. It maps the names of the settings in which the runs differ to their values."""
    values: list[dict[str, Any]] = []
    for run in runs:
        names = [
            name for name, each in SETTINGS.items() if (each.game and name not in NOT_COMPARED) or name in COMPARED
        ]
        values.append({name: getattr(run.config, name) for name in names})
        for each in values[-1].pop("set", ()):  # parameters, such as noise=5
            name, _, value = each.partition("=")
            values[-1][f"set {name}" if name in SETTINGS else name] = value
    every = dict.fromkeys(itertools.chain(*values))
    names = [name for name in every if len({each.get(name) for each in values}) > 1]
    return [{name: each.get(name) for name in names} for each in values]


def _text(name: str, value: Any) -> str:
    if name == "players" and value is not None:
        return ",".join(f"{kind.label}={kind.share}" for kind in parse_players(value))
    if name in ("agent_class", "game") and value is not None:
        return Path(value).name
    return "-" if value is None else " ".join(value) if isinstance(value, tuple) else f"{value}"


def folder_names(runs: Sequence[SavedRun]) -> list[str]:
    """Return the path of each run folder, relative to the innermost folder that contains all of them."""
    paths = [real(run.path) for run in runs]
    return [os.path.relpath(path, os.path.commonpath([path.parent for path in paths])) for path in paths]


def _equilibrium(game: Game) -> str:
    known = game.equilibrium()
    return "-" if known is None else " and ".join(f"{each:.6g}" for each in known) or "any"


def _run_rows(runs: Sequence[SavedRun]) -> list[dict[str, str]]:
    """Return a table row for each run. A row maps column headings to texts."""
    rows = []
    for run, folder, values in zip(runs, folder_names(runs), _differing(runs), strict=True):
        entries, game = run.summary["rounds"], run.game
        first, last = (entries[0], entries[-1]) if entries else ({}, {})
        numbers = {"first average": first.get("average"), "last average": last.get("average")}
        numbers["winning number"] = last.get("winning_number")
        row = {"run": folder} | {name.replace("_", " "): _text(name, value) for name, value in values.items()}
        row["played"] = f"{len(entries)}"
        row |= {key: whole(sum(entry[key] for entry in entries)) for key in ("answered", "asked")}
        row |= {name: "-" if number is None else fixed(number, game.decimals + 3) for name, number in numbers.items()}
        row |= {"equilibrium": _equilibrium(game), "status": run.summary["status"]}
        rows.append(row | {"seconds": f"{run.summary['seconds']['total']:.2f}"})
    return rows


def _treatment_rows(treatments: Sequence[Treatment]) -> list[dict[str, str]]:
    """Return a table row for each treatment, with estimates of the last round that its runs have played."""
    rows = []
    for treatment in treatments:
        averages, winning = (treatment.estimates(key) for key in ("average", "winning_number"))
        last = max(averages, default=0)
        row = {"treatment": treatment.label, **treatment.settings}
        for its, name, found in (("", "average", averages.get(last)), ("its ", "winning number", winning.get(last))):
            several = found is not None and found.runs > 1
            row[name] = brief(found.mean) if found else "-"
            row[f"{its}95 % interval"] = f"{brief(found.low)} to {brief(found.high)}" if found and several else "-"
            row[f"{its}std"] = brief(found.std) if found and several else "-"
        known, count = averages[last].runs if averages else 0, len(treatment.runs)
        row |= {"runs": f"{known} of {count}" if known < count else f"{count}", "round": f"{last or '-'}"}
        row["equilibrium"] = _equilibrium(treatment.runs[0].game)
        row["failed"] = whole(sum(entry["failed"] for run in treatment.runs for entry in run.summary["rounds"]))
        states = Counter(run.summary["status"] for run in treatment.runs)
        row["status"] = ", ".join(f"{states[each]} {each}" if len(states) > 1 else each for each in states)
        rows.append(row)
    used = [name for name in rows[0] if name == "average" or any(row[name] != "-" for row in rows)]
    return [{name: row[name] for name in used} for row in rows]


def comparison_lines(runs: Sequence[SavedRun], all_runs: bool = False) -> list[str]:
    """Return the lines of text tables: the treatments if a treatment has several runs; otherwise, or also, the runs."""
    lines, treatments = [], treatments_of(runs)
    if len(treatments) < len(runs):
        rows = _treatment_rows(treatments)
        dropped = ["equilibrium", "failed", "its std", "its 95 % interval", "round", *treatments[0].settings]
        lines = table_lines(
            [*rows[0]], [[*row.values()] for row in rows], [*dropped, "status", "winning number", "std"]
        )
    if all_runs or not lines:
        rows = _run_rows(runs)
        settings = [name.replace("_", " ") for name in _differing(runs)[0]]  # may be dropped: folder names mention them
        order = ["seconds", "equilibrium", "asked", "first average", *settings, "played", "answered", "winning number"]
        lines += table_lines([*rows[0]], [[*row.values()] for row in rows], [*order, "status", "last average"])
    return lines


def write_comparison(folder: Path, runs: Sequence[SavedRun], all_runs: bool = False) -> None:
    """Write comparison.csv, .png and .html to a folder. Raises ResultsError if this fails."""
    with results_errors(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / DATA, csv_text(runs).encode(errors="backslashreplace"))
    write_png(folder / PICTURE, _picture(treatments_of(runs), all_runs))
    write_page(folder / PAGE, page_content(folder, runs, all_runs))


def csv_text(runs: Sequence[SavedRun]) -> str:
    """Return the content of comparison.csv: a row per run and round, with all settings in which the runs differ."""
    rows: list[dict[str, Any]] = []
    repeats = {run.path: repeat for each in treatments_of(runs) for repeat, run in enumerate(each.runs, start=1)}
    for run, folder, settings in zip(runs, folder_names(runs), _differing(runs), strict=True):
        start = {"run": folder, "run_id": run.run_id, "repeat": repeats[run.path], "status": run.summary["status"]}
        for entry in run.summary["rounds"]:
            figures = {key: each for key, each in entry.items() if each is None or isinstance(each, int | float)}
            figures |= {f"outcome_{name}": each for name, each in entry.get("outcome", {}).items()}
            figures |= {"winners": entry["winners"]["count"], "seconds": figures.pop("seconds")}
            taken = start.keys() | figures.keys()
            named = {f"set {name}" if name in taken else name: value for name, value in settings.items()}
            rows.append(start | named | figures)
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, [*dict.fromkeys(itertools.chain(*rows))] or ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def page_content(folder: Path, runs: Sequence[SavedRun], all_runs: bool = False) -> dict[str, Any]:
    """Return the template variables of the comparison page. Its links to reports are relative to `folder`."""
    treatments, reports = treatments_of(runs), [real(run.path) / REPORT for run in runs]
    drawn = _to_draw(treatments)
    styles = {treatment.label: " ".join(series_style(index)) for index, treatment in enumerate(drawn)}
    return {
        "runs": runs,
        "all_runs": all_runs,
        "treatments": treatments,
        "treatment_rows": _treatment_rows(treatments),
        "rows": _run_rows(runs),
        "styles": styles,  # CSS classes by the label of a treatment that is drawn
        "labels": {run.path: treatment.label for treatment in treatments for run in treatment.runs},
        "links": [quote(os.path.relpath(each, real(folder))) if is_there(each) else None for each in reports],
        "drawn": drawn,
        "draw_averages": _draw_averages,
        "draw_intervals": _draw_intervals,
        "last_rounds": [(treatment.last_round(), -1, treatment.label) for treatment in drawn],
    }


def _to_draw(treatments: Sequence[Treatment]) -> list[Treatment]:
    """Return at most LINES treatments. Omit those without results."""
    played = [each for each in treatments if any(run.results for run in each.runs)]
    return [played[index] for index in charts.selection(len(played), LINES)]


def _draw_averages(axes: Axes, drawn: Sequence[Treatment], all_runs: bool) -> None:
    """Draw each treatment's mean of the averages by round as a line, its interval, and its equilibria."""
    lines = {}
    for index, treatment in enumerate(drawn):
        colour, estimates = series_style(index)[0], treatment.estimates("average")
        charts.draw_equilibria(axes, treatment.runs[0].game, color=colour, linewidth=1.6)
        intervals = {number: (each.low, each.high) for number, each in estimates.items() if each.runs > 1}
        charts.draw_band(axes, intervals, colour)
        for run in treatment.runs if all_runs and len(treatment.runs) > 1 else ():
            axes.plot(*zip(*charts.by_round(run, "average").items(), strict=True), color=colour, linewidth=0.6)
        lines[textwrap.fill(treatment.label, TITLE_WIDTH)] = {number: each.mean for number, each in estimates.items()}
    rounds = [1, *(result.round for each in drawn for run in each.runs for result in run.results)]
    charts.draw_lines(axes, rounds, lines)


def _draw_intervals(axes: Axes, drawn: Sequence[Treatment]) -> None:
    """Draw a row for each treatment: the averages of its runs in their last round, the mean, and the interval."""
    for row, treatment in enumerate(drawn):
        colour, estimates = series_style(row)[0], treatment.estimates("average")
        axes.text(0, row - 0.3, treatment.label, transform=axes.get_yaxis_transform(), fontsize=9.5, color="ink")
        for last, each in [*estimates.items()][-1:]:
            numbers = [found[last] for run in treatment.runs if last in (found := charts.by_round(run, "average"))]
            axes.plot(numbers, [row] * len(numbers), marker="|", markersize=9, linestyle="none", color=colour)
            axes.errorbar(each.mean, row, xerr=each.high - each.mean, marker="o", markersize=7, color=colour)
    limit_ticks(axes, across=5, up=1, whole="")
    axes.set_yticks([])
    axes.set_ylim(len(drawn) - 0.6, -0.8)
    axes.grid(visible=True, axis="x")


def _picture(treatments: Sequence[Treatment], all_runs: bool) -> Figure:
    """Return a figure with the averages by round at the top, and histograms of some last rounds below."""
    drawn = _to_draw(treatments)
    lines = -(-len(drawn) // 3) * max((len(textwrap.wrap(each.label, TITLE_WIDTH)) for each in drawn), default=1)
    selected = [drawn[index] for index in charts.selection(len(drawn), charts.SMALL_MULTIPLES)]
    last_rounds = [(each.last_round(), -1) for each in selected]
    figure, above, below, grid = charts.two_parts(last_rounds, 3.6 + 0.3 * lines, lines_first=True)
    axes = above.subplots()
    _draw_averages(axes, drawn, all_runs)
    bands = "; bands: 95 % interval over repeats" if any(len(each.runs) > 1 for each in treatments) else ""
    axes.set_title(
        f"Average by round; dotted: equilibrium{bands}" + _shown(drawn, treatments),
        loc="left",
        weight="bold",
        fontsize=12,
    )
    axes.set(xlabel="round", ylabel="average")
    above.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=10)
    below.suptitle(f"Answers of the last round{_shown(selected, treatments)}", fontsize=12, weight="bold")
    for axes, treatment, (run, _) in zip(grid, selected, last_rounds, strict=True):
        title = f"{treatment.label}, round\N{NO-BREAK SPACE}{run.results[-1].round}"
        axes.set_title(textwrap.fill(title, TITLE_WIDTH), loc="left", fontsize=10)
    return figure


def _shown(selected: Sequence[Treatment], treatments: Sequence[Treatment]) -> str:
    """Return a note such as ` (6 of 9 shown)`, or "" if no treatment is omitted."""
    return f" ({len(selected)} of {len(treatments)} shown)" if len(selected) < len(treatments) else ""
