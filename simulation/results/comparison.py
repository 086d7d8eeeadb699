"""The comparison of several runs as a text table, a PNG picture and an HTML page."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulation.errors import SettingsError, printable
from simulation.files import is_there, real
from simulation.results import charts
from simulation.results.figures import series_style, write_png
from simulation.results.reader import SavedRun, runs_in
from simulation.results.report_page import fixed, whole, write_page
from simulation.results.run_directory import REPORT, SWEEP, results_errors, resume_command, sweep_position
from simulation.results.tables import table_lines
from simulation.settings import SETTINGS

PAGE, PICTURE = "comparison.html", "comparison.png"
# Cluster settings that affect the speed. The comparison shows them in addition to the settings of the game.
COMPARED = ("dispatch", "hosts", "server_per_host", "moderator_per_host", "model_per_host", "max_in_flight")
LABEL_WIDTH = 32  # maximum number of characters in a line of a label in the picture
LINES = 24  # maximum number of runs in the line chart: as many lines as `series_style` distinguishes


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


def _settings(runs: Sequence[SavedRun]) -> list[dict[str, str]]:
    """Return a dictionary for each run. It maps each setting in which the runs differ to its value as text."""

    def text(name: str, value: Any) -> str:
        if name == "agent_class" and value is not None:
            return Path(value).name
        return "-" if value is None else " ".join(value) if isinstance(value, tuple) else f"{value}"

    names = [name for name, each in SETTINGS.items() if each.game or name in COMPARED]
    names = [name for name in names if len({getattr(run.config, name) for run in runs}) > 1]
    return [{name.replace("_", " "): text(name, getattr(run.config, name)) for name in names} for run in runs]


def folder_names(runs: Sequence[SavedRun]) -> list[str]:
    """Return the path of each run folder, relative to the innermost folder that contains all of them."""
    paths = [real(run.path) for run in runs]
    return [os.path.relpath(path, os.path.commonpath([path.parent for path in paths])) for path in paths]


def _rows(runs: Sequence[SavedRun]) -> list[dict[str, str]]:
    """Return a table row for each run. A row maps column headings to texts."""
    rows = []
    for run, folder, settings in zip(runs, folder_names(runs), _settings(runs), strict=True):
        entries, game = run.summary["rounds"], run.game
        first, last = (entries[0], entries[-1]) if entries else ({}, {})
        numbers = {"first average": first.get("average"), "last average": last.get("average")}
        numbers["winning number"] = last.get("winning_number")
        row = {"run": folder, **settings, "played": f"{len(entries)}"}
        row |= {key: whole(sum(entry[key] for entry in entries)) for key in ("answered", "asked")}
        row |= {name: "-" if number is None else fixed(number, game.decimals + 3) for name, number in numbers.items()}
        equilibria = game.equilibrium()
        row["equilibrium"] = "-" if equilibria is None else " and ".join(f"{each:.6g}" for each in equilibria) or "any"
        row |= {"status": run.summary["status"], "seconds": f"{run.summary['seconds']['total']:.2f}"}
        rows.append(row)
    return rows


def comparison_lines(runs: list[SavedRun]) -> list[str]:
    """Return the lines of a text table that compares the runs."""
    rows, settings = _rows(runs), _settings(runs)[0]  # columns of settings may be dropped: folder names mention them
    dropped = ["seconds", "equilibrium", "asked", "first average", *settings, "played", "answered", "winning number"]
    return table_lines([*rows[0]], [[*row.values()] for row in rows], [*dropped, "status", "last average"])


def write_comparison(folder: Path, runs: list[SavedRun]) -> None:
    """Write comparison.png and comparison.html to a folder. Raises ResultsError if this fails."""
    with results_errors(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    write_png(folder / PICTURE, _picture(runs_to_draw(runs)))
    write_page(folder / PAGE, page_content(folder, runs))


def page_content(folder: Path, runs: Sequence[SavedRun]) -> dict[str, Any]:
    """Return the template variables of the comparison page. Its links to reports are relative to `folder`."""
    drawn, reports = runs_to_draw(runs), [real(run.path) / REPORT for run in runs]
    return {
        "runs": runs,
        "rows": _rows(runs),
        "links": [quote(os.path.relpath(each, real(folder))) if is_there(each) else None for each in reports],
        "drawn": drawn,
        "draw_averages": _draw_averages,
        "last_rounds": [(run, -1, label) for label, run in drawn],
    }


def runs_to_draw(runs: Sequence[SavedRun]) -> list[tuple[str, SavedRun]]:
    """Return at most LINES pairs of a label and a run. Omit runs without results.

    A label lists the settings in which the runs differ. It omits the seed, which is random by default, unless no other
    setting differs. Labels that would be empty or equal also name the run folder.
    """
    texts = []
    for settings in _settings(runs):
        named = {name: text for name, text in settings.items() if name != "seed"} or settings
        texts.append(", ".join(f"{name} {text}" for name, text in named.items()))
    labelled = [
        (text if text and texts.count(text) == 1 else f"{text} ({folder})".strip(), run)
        for text, folder, run in zip(texts, folder_names(runs), runs, strict=True)
        if run.results
    ]
    return [labelled[index] for index in charts.selection(len(labelled), LINES)]


def _draw_averages(axes: Axes, drawn: Sequence[tuple[str, SavedRun]]) -> None:
    """Draw each run's averages by round as a line, and the equilibria of the run in the same colour."""
    for index, (_, run) in enumerate(drawn):
        charts.draw_equilibria(axes, run.game, color=series_style(index)[0], linewidth=1.6)
    rounds = [1, *(result.round for _, run in drawn for result in run.results)]
    charts.draw_lines(axes, rounds, {label: charts.by_round(run, "average") for label, run in drawn})


def _picture(drawn: Sequence[tuple[str, SavedRun]]) -> Figure:
    """Return a figure with the averages by round at the top, and histograms of some runs' last rounds below."""
    drawn = [(textwrap.fill(label, LABEL_WIDTH), run) for label, run in drawn]
    lines = -(-len(drawn) // 3) * max((label.count("\n") + 1 for label, _ in drawn), default=1)  # in the legend
    selected = [drawn[index] for index in charts.selection(len(drawn), charts.SMALL_MULTIPLES)]
    figure, above, _, grid = charts.two_parts([(run, -1) for _, run in selected], 3.6 + 0.3 * lines, lines_first=True)
    axes = above.subplots()
    _draw_averages(axes, drawn)
    axes.set_title("Average by round; dotted, each run's equilibrium", loc="left", weight="bold")
    axes.set_xlabel("round")
    above.legend(frameon=False, loc="outside lower center", ncols=3)
    for axes, (label, run) in zip(grid, selected, strict=True):
        axes.set_title(f"{label}, round {run.results[-1].round}", loc="left", fontsize=10)
    return figure
