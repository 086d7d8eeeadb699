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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from simulation.errors import SettingsError, printable
from simulation.files import is_there, real
from simulation.game.game import Game
from simulation.game.tally import RoundResult, merge
from simulation.results import charts
from simulation.results.charts import series_style, write_png
from simulation.results.reader import SavedRun, figure_of, runs_in
from simulation.results.report_page import write_page
from simulation.results.run_directory import REPORT, SWEEP, results_errors, resume_command, sweep_position, write_whole
from simulation.results.tables import number_text, table_lines
from simulation.settings import SETTINGS, players_text

PAGE, PICTURE, DATA = "comparison.html", "comparison.png", "comparison.csv"
# Cluster settings that affect the speed. The comparison shows them in addition to the settings of the game.
COMPARED = ("dispatch", "hosts", "server_per_host", "moderator_per_host", "model_per_host", "max_in_flight")
NOT_COMPARED = ("repeats", "payoffs")  # settings of the game that change no figure of a run
WORDS = {"participant_num": "participants", "max_value": "upper bound", "agent_class": "class"}
LABEL_SETTINGS = 2  # maximum number of settings that a label mentions
SETTINGS_SHOWN, FIGURES_SHOWN = 6, 3  # maximum numbers in a table; the CSV file has all
LINES = 24  # maximum number of treatments in the line chart: as many lines as `series_style` distinguishes

Row = list[tuple[str, str]]  # pairs of a column heading and the text of a cell


class Estimate(NamedTuple):
    """The mean of one figure over repeats. All but `runs` and `mean` are NaN if there is only one run."""

    runs: int
    mean: float
    std: float = math.nan  # of a sample: the divisor is runs - 1
    low: float = math.nan  # the 95 % confidence interval of the mean, by Student's t
    high: float = math.nan


def estimate(numbers: Sequence[float]) -> Estimate:
    """Return the estimate from one or more numbers."""
    runs, mean = len(numbers), statistics.fmean(numbers)
    if runs == 1:
        return Estimate(runs, mean)
    from scipy.special import stdtrit  # noqa: PLC0415 - takes 0.5 s, and only repeats need it

    std = statistics.stdev(numbers)
    half = float(stdtrit(runs - 1, 0.975)) * std / math.sqrt(runs)
    return Estimate(runs, mean, std, mean - half, mean + half)


@dataclass(frozen=True)
class Treatment:
    """Runs whose compared settings are equal, except for the seed: the repeats of one combination of settings."""

    label: str
    settings: Row  # those that differ between treatments and that the label does not mention
    runs: list[SavedRun]

    def estimates(self, name: str) -> dict[int, Estimate]:
        """Estimate a figure of each round from the runs that have it. Of several runs, omit interrupted rounds."""
        numbers: dict[int, list[float]] = {}
        for run in self.runs:
            for number, value in run.by_round(name).items():
                if number <= run.rounds_finished or len(self.runs) == 1:
                    numbers.setdefault(number, []).append(value)
        return {number: estimate(each) for number, each in sorted(numbers.items())}

    def last_round(self) -> RoundResult:
        """Return the last round: the answers of all repeats together, and the mean of each figure."""
        if len(self.runs) == 1:
            return self.runs[0].results[-1]
        number = max(run.rounds_finished for run in self.runs)
        results = [run.results[number - 1] for run in self.runs if run.rounds_finished >= number > 0]
        results = results or [run.results[0] for run in self.runs if run.results]  # all were cut in round 1
        estimates = {name: self.estimates(name).get(results[0].round) for name in results[0].outcome}
        outcome = {name: each and each.mean for name, each in estimates.items()}
        return replace(results[0], tally=merge(each.tally for each in results), outcome=outcome)


def treatments_of(runs: Sequence[SavedRun]) -> list[Treatment]:
    """Group the runs by their compared settings, in the order in which the treatments first occur."""
    differing = _differing(runs)
    names = [name for name in _by_variety(differing) if name != "seed"]
    groups: dict[tuple[Any, ...], list[SavedRun]] = {}
    for run, settings in zip(runs, differing, strict=True):
        groups.setdefault(tuple(settings[name] for name in names), []).append(run)
    treatments: list[Treatment] = []
    for values, group in groups.items():
        texts = [(name, _text(name, each)) for name, each in zip(names, values, strict=True)][:SETTINGS_SHOWN]
        words = [(WORDS.get(name, _plain(name)), text) for name, text in texts[:LABEL_SETTINGS]]
        label = ", ".join(f"no {word}" if text == "-" else f"{word} {text}" for word, text in words)
        rest = [(_plain(name), text) for name, text in texts[LABEL_SETTINGS:]]
        treatments.append(Treatment(label or f"{len(group)} runs", rest, group))
    labels = [each.label for each in treatments]
    return [
        replace(each, label=f"{each.label} ({number})") if labels.count(each.label) > 1 else each
        for number, each in enumerate(treatments, start=1)
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
        finished = sum(run.is_finished for run in existing)
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
    compared = [name for name, each in SETTINGS.items() if (each.game and name not in NOT_COMPARED) or name in COMPARED]
    values: list[dict[str, Any]] = []
    mixed = any(run.config.players is not None for run in runs)
    for run in runs:
        values.append({name: getattr(run.config, name) for name in compared} | {"max_value": run.game.high})
        if mixed:  # then one setting says who plays
            del values[-1]["agent_type"], values[-1]["agent_class"]
            values[-1]["players"] = run.config.players or run.config.kinds[0].text
        for each in values[-1].pop("set", ()):  # parameters, such as noise=5
            name, _, value = each.partition("=")
            values[-1][f"set {name}" if name in SETTINGS else name] = value
    every = dict.fromkeys(itertools.chain(*values))
    names = [name for name in every if len({each.get(name) for each in values}) > 1]
    return [{name: each.get(name) for name in names} for each in values]


def _by_variety(differing: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the settings. Those with the most distinct values come first."""
    return sorted(differing[0], key=lambda name: -len({each[name] for each in differing}))


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _text(name: str, value: Any) -> str:
    if name == "players" and value is not None:
        return players_text(value)
    if name in ("agent_class", "game") and value is not None:
        return Path(value).name
    return "-" if value is None else " ".join(value) if isinstance(value, tuple) else f"{value}"


def folder_names(runs: Sequence[SavedRun]) -> list[str]:
    """Return the path of each run folder, relative to the innermost folder that contains all of them."""
    paths = [real(run.path) for run in runs]
    return [os.path.relpath(path, os.path.commonpath([path.parent for path in paths])) for path in paths]


def _figures(runs: Sequence[SavedRun]) -> dict[str, str]:
    """Return the words for each figure of the outcomes, by name. If games differ in them, the average comes first."""
    outcomes = [run.figures for run in runs if run.figures]
    figures = outcomes[0] if outcomes else {"average": "average", "winning_number": "winning number"}
    if any(each != figures for each in outcomes):
        figures = {"average": "average"}  # of the answers, which each game has
        for name, words in itertools.chain(*(each.items() for each in outcomes)):
            figures[name] = words if figures.get(name, words) == words else _plain(name)
    return figures


def _equilibrium(game: Game) -> str:
    known = game.equilibrium()
    return "-" if known is None else " and ".join(f"{each:.6g}" for each in known) or "any"


def _run_rows(runs: Sequence[SavedRun], padded: bool) -> list[Row]:
    """Return a table row for each run. If `padded`, all averages have the same number of decimals."""
    differing, figures = _differing(runs), [*_figures(runs).items()][:FIGURES_SHOWN]
    shown, (main, words) = _by_variety(differing)[:SETTINGS_SHOWN], figures[0]
    columns = [(f"first {words}", main, 0), (f"last {words}", main, -1)]
    columns += [(text, name, -1) for name, text in figures[1:]]
    rows = []
    for run, folder, values in zip(runs, folder_names(runs), differing, strict=True):
        entries = run.summary["rounds"]
        row = [("run", folder), *((_plain(name), _text(name, values[name])) for name in values if name in shown)]
        row.append(("played", f"{len(entries)}"))
        row += [(key, number_text(sum(entry[key] for entry in entries))) for key in ("answered", "asked")]
        for heading, name, index in columns:
            number = figure_of(entries[index], name) if entries else None
            row.append((heading, "-" if number is None else number_text(number, run.game.decimals + 3, padded)))
        row += [("equilibrium", _equilibrium(run.game)), ("status", run.summary["status"])]
        rows.append([*row, ("seconds", f"{run.summary['seconds']['total']:.2f}")])
    return rows


def _treatment_rows(treatments: Sequence[Treatment], padded: bool) -> list[Row]:
    """Return a table row for each treatment, with estimates of the last round that its runs have played."""

    def text(number: float) -> str:
        return number_text(number, padded=padded and not 0 < abs(number) < 0.1)

    rows: list[Row] = []
    figures = [*_figures([run for each in treatments for run in each.runs]).items()][:FIGURES_SHOWN]
    for treatment in treatments:
        averages = treatment.estimates("average")
        last = max(averages, default=0)
        known, count = averages[last].runs if averages else 0, len(treatment.runs)
        row = [("treatment", treatment.label), *treatment.settings]
        for name, words in figures:
            its, mean, interval, std = "" if (name, words) == figures[0] else "its ", "-", "-", "-"
            if (found := treatment.estimates(name).get(last)) is not None:
                mean = text(found.mean) + (f" ({found.runs} of {known})" if found.runs < known else "")
                if found.runs > 1:
                    interval, std = f"{text(found.low)} to {text(found.high)}", text(found.std)
            row += [(words, mean), (f"{its}95 % interval", interval), (f"{its}std", std)]
        row += [("runs", f"{known} of {count}" if known < count else f"{count}"), ("round", f"{last or '-'}")]
        row.append(("equilibrium", _equilibrium(treatment.runs[0].game)))
        failed = sum(entry["failed"] for run in treatment.runs for entry in run.summary["rounds"])
        states = Counter(run.summary["status"] for run in treatment.runs)
        status = ", ".join(f"{states[each]} {each}" if len(states) > 1 else each for each in states)
        rows.append([*row, ("failed", number_text(failed)), ("status", status)])
    columns = [*zip(*rows, strict=True)]
    used = [cells for cells in columns if any(text != "-" for _, text in cells) or cells[0][0] == figures[0][1]]
    return [[*row] for row in zip(*used, strict=True)]


def _omitted(runs: Sequence[SavedRun]) -> str:
    """State how many settings and figures only the CSV file has. Return "" if there are none."""
    counts = {"setting": len(_differing(runs)[0]) - SETTINGS_SHOWN, "figure": len(_figures(runs)) - FIGURES_SHOWN}
    texts = [f"{count} more {name}{'s' if count > 1 else ''}" for name, count in counts.items() if count > 0]
    return f"only in {DATA}: {' and '.join(texts)}" if texts else ""


def comparison_lines(runs: Sequence[SavedRun], all_runs: bool = False) -> list[str]:
    """Return the lines of text tables: the treatments if a treatment has several runs; otherwise, or also, the runs."""
    lines, treatments = [], treatments_of(runs)
    figures, settings = [*_figures(runs).values()], [_plain(name) for name in _differing(runs)[0]]
    if len(treatments) < len(runs):
        dropped = ["equilibrium", "failed", "its std", "its 95 % interval", "round", *settings]
        lines += _lines(_treatment_rows(treatments, padded=True), [*dropped, "status", *figures[:0:-1], "std"])
    if all_runs or not lines:  # settings may be dropped: folder names mention them
        dropped = ["seconds", "equilibrium", "asked", f"first {figures[0]}", *settings, "played", "answered"]
        lines += _lines(_run_rows(runs, padded=True), [*dropped, *figures[:0:-1], "status", f"last {figures[0]}"])
    return [*lines, *filter(None, [_omitted(runs)])]


def _lines(rows: Sequence[Row], dropped: Sequence[str]) -> list[str]:
    return table_lines([heading for heading, _ in rows[0]], [[text for _, text in row] for row in rows], dropped)


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
            figures |= {f"outcome_{name}": each for name, each in entry["outcome"].items()}
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
    return {
        "runs": runs,
        "all_runs": all_runs,
        "treatments": treatments,
        "treatment_rows": _treatment_rows(treatments, padded=False),
        "rows": _run_rows(runs, padded=False),
        "omitted": _omitted(runs),
        "styles": {treatment.label: " ".join(series_style(index)) for index, treatment in enumerate(drawn)},
        "labels": {run.path: treatment.label for treatment in treatments for run in treatment.runs},
        "links": [quote(os.path.relpath(each, real(folder))) if is_there(each) else None for each in reports],
        "drawn": drawn,
        "has_equilibrium": any(run.game.equilibrium() for run in runs),
        "draw_averages": _draw_averages,
        "last_rounds": _last_rounds(drawn),
    }


def _to_draw(treatments: Sequence[Treatment]) -> list[Treatment]:
    """Return at most LINES treatments. Omit those without results."""
    played = [each for each in treatments if any(run.results for run in each.runs)]
    return [played[index] for index in charts.selection(len(played), LINES)]


def _last_rounds(drawn: Sequence[Treatment]) -> list[tuple[str, Game, RoundResult]]:
    return [(each.label, each.runs[0].game, each.last_round()) for each in drawn]


def _draw_averages(axes: Axes, drawn: Sequence[Treatment], all_runs: bool) -> None:
    """Draw each treatment's mean of the averages by round as a line, its interval, and its equilibria."""
    games = [each.runs[0].game for each in drawn]
    equilibria = [game.equilibrium() for game in games]
    for index, treatment in enumerate(drawn):
        colour = series_style(index)[0]
        own = colour if equilibria.count(equilibria[index]) == 1 else "muted"
        charts.draw_equilibria(axes, games[index], color=own, linewidth=1.6)
        for run in treatment.runs if all_runs and len(treatment.runs) > 1 else ():
            axes.plot(*zip(*run.by_round("average").items(), strict=True), color=colour, linewidth=0.6)
    rounds = max((len(run.results) for each in drawn for run in each.runs), default=1)
    estimates = {each.label: each.estimates("average") for each in drawn}
    lines = {label: {number: each.mean for number, each in found.items()} for label, found in estimates.items()}
    repeated = [{number: each for number, each in found.items() if each.runs > 1} for found in estimates.values()]
    bands = [{number: (each.low, each.high) for number, each in found.items()} for found in repeated]
    charts.draw_lines(axes, rounds, lines, bands=bands)


def _picture(treatments: Sequence[Treatment], all_runs: bool) -> Figure:
    """Return a figure with the averages by round at the top, and histograms of some last rounds below."""
    drawn = _to_draw(treatments)
    selected = [drawn[index] for index in charts.selection(len(drawn), charts.SMALL_MULTIPLES)]
    histograms = [(f"{label}, round {each.round}", game, each) for label, game, each in _last_rounds(selected)]
    dotted = "; dotted: equilibrium" if any(each.runs[0].game.equilibrium() for each in drawn) else ""
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
        partial(_draw_averages, drawn=drawn, all_runs=all_runs),
        f"Average by round{dotted}{bands}{_shown(drawn, treatments)}",
        histograms,
        f"Answers of the last round{_shown(selected, treatments)}",
        legend,
        box.height / page.dpi,
    )


def _shown(selected: Sequence[Treatment], treatments: Sequence[Treatment]) -> str:
    """Return a note such as ` (6 of 9 shown)`, or "" if no treatment is omitted."""
    return f" ({len(selected)} of {len(treatments)} shown)" if len(selected) < len(treatments) else ""
