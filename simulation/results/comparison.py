"""Comparison of several runs: a table for the terminal, a PNG picture and an HTML page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulation.errors import ResultsError, SettingsError, printable
from simulation.files import is_there, real
from simulation.results.charts import (
    SMALL_MULTIPLES,
    averages_of,
    draw_equilibria,
    draw_line,
    draw_small_multiples,
    grid_of,
    scale_rounds,
    selection,
)
from simulation.results.figures import page_chart, series_style, two_parts, write_png
from simulation.results.reader import SavedRun, rounds_finished, runs_in
from simulation.results.report_page import answers_chart, fixed, fold, whole, write_page
from simulation.results.run_directory import COMPARISON, REPORT, SWEEP, resume_command, sweep_position
from simulation.results.tables import table_lines
from simulation.settings import SETTINGS

PAGE, PICTURE = COMPARISON
# Compared in addition to the settings of the game: cluster settings that affect speed, not those of paths or output
COMPARED = ("dispatch", "hosts", "server_per_host", "moderator_per_host", "model_per_host", "max_in_flight")
LINES = 24  # most runs drawn, evenly spread over all; more line styles are indistinguishable


def run_folders(named: Sequence[Path]) -> list[Path]:
    """Return the run folders, with each sweep expanded to its runs, without duplicates. Raises SettingsError."""
    found: dict[Path, Path] = {}
    for path in named:
        runs = runs_in(path) if is_there(path / SWEEP) else [path]
        if not runs:
            raise SettingsError(f"{path}: no run was played in this sweep; give the folder of another")
        for run in runs:
            found.setdefault(real(run), run)
    return list(found.values())


def unfinished_lines(named: Sequence[Path], runs: Sequence[SavedRun]) -> list[str]:
    """Return a line for each experiment with missing or unfinished runs."""
    lines = []
    for path in [real(path) for path in named if is_there(path / SWEEP)]:
        within = [run for run in runs if real(run.path).parent == path]
        position = sweep_position(within[0].path)
        finished = sum(rounds_finished(run.summary) >= run.config.rounds for run in within)
        if position is not None and finished < position["runs"]:
            left = f"{position['runs'] - finished} of {position['runs']} runs of {printable(position['experiment'])}"
            lines.append(f"{left} have rounds left; to go on with them: {resume_command(path)}")
    return lines


def common_folder(paths: Sequence[Path]) -> Path:
    """Return the innermost folder that contains all runs. Raises SettingsError if that is the root folder."""
    folder = Path(os.path.commonpath([real(path).parent for path in paths]))
    if folder == folder.parent:
        raise SettingsError("these runs have no folder in common: give --run-dir, where the comparison is written")
    return folder


def differing_settings(runs: Sequence[SavedRun]) -> list[str]:
    """Return the names of the settings in which these runs differ."""
    names = [name for name, each in SETTINGS.items() if each.game or name in COMPARED]
    return [name for name in names if len({getattr(run.config, name) for run in runs}) > 1]


def _setting(run: SavedRun, name: str) -> str:
    value = getattr(run.config, name)
    if name == "agent_class" and value is not None:
        value = Path(value).name
    return "-" if value is None else " ".join(value) if isinstance(value, tuple) else f"{value}"


def folder_names(runs: Sequence[SavedRun]) -> list[str]:
    """Return the folder of each run, relative to the common folder."""
    paths = [real(run.path) for run in runs]
    return [os.path.relpath(path, os.path.commonpath([path.parent for path in paths])) for path in paths]


def labels(runs: Sequence[SavedRun]) -> list[str]:
    """Return the label of each run's line: the settings it differs in, with its folder where these are not unique."""
    names = differing_settings(runs)
    names = [name for name in names if name != "seed"] or names  # random by default, so different in every run
    words = [", ".join(f"{name.replace('_', ' ')} {_setting(run, name)}" for name in names) for run in runs]
    return [
        word if word and words.count(word) == 1 else f"{word} ({folder})".strip()
        for word, folder in zip(words, folder_names(runs), strict=True)
    ]


def comparison_rows(runs: Sequence[SavedRun]) -> list[dict[str, str]]:
    """Return a row for each run, by column heading."""
    names = differing_settings(runs)
    return [{"run": folder} | _row(run, names) for run, folder in zip(runs, folder_names(runs), strict=True)]


def _row(run: SavedRun, names: Sequence[str]) -> dict[str, str]:
    entries, digits = run.summary["rounds"], run.game.decimals + 3
    first, last = (entries[0], entries[-1]) if entries else ({}, {})
    numbers = {
        "first average": first.get("average"),
        "last average": last.get("average"),
        "winning number": last.get("winning_number"),
    }
    return {
        **{name.replace("_", " "): _setting(run, name) for name in names},
        "played": f"{len(entries)}",
        "answered": whole(sum(entry["answered"] for entry in entries)),
        "asked": whole(sum(entry["asked"] for entry in entries)),
        **{name: "-" if number is None else fixed(number, digits) for name, number in numbers.items()},
        "equilibrium": " and ".join(f"{number:.6g}" for number in run.game.equilibria) or "any",
        "status": run.summary["status"],
        "seconds": f"{run.summary['seconds']['total']:.2f}",
    }


def comparison_lines(runs: list[SavedRun]) -> list[str]:
    """Return the comparison as a table for a terminal."""
    rows = comparison_rows(runs)
    settings = [name.replace("_", " ") for name in differing_settings(runs)]  # the folder names contain them, too
    dropped = ["seconds", "equilibrium", "asked", "first average", *settings, "played", "answered", "winning number"]
    return table_lines([*rows[0]], [[*row.values()] for row in rows], [*dropped, "status", "last average"])


def write_comparison(folder: Path, runs: list[SavedRun]) -> None:
    """Write comparison.png and comparison.html to a folder. Raises ResultsError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"cannot write to {folder}: {error.strerror}") from None
    write_png(folder / PICTURE, _picture(_drawn(runs)))
    write_page(folder / PAGE, page_content(folder, runs))


def page_content(folder: Path, runs: Sequence[SavedRun]) -> dict[str, Any]:
    """Return the template variables of the page, with links relative to its folder."""
    rows, drawn = comparison_rows(runs), _drawn(runs)
    ends = "; ".join(
        f"{label}: {fixed(run.summary['rounds'][-1]['average'], run.game.decimals + 3)} in the end"
        for label, run in drawn.items()
    )
    charts = [
        {"label": label, "entry": run.summary["rounds"][-1], "svg": answers_chart(run, -1, f"{label}: ")}
        for label, run in drawn.items()
    ]
    return {
        "title": f"{len(runs)} runs compared",
        "targets": list(dict.fromkeys(run.game.target for run in runs)),
        "head": [*rows[0]],
        "rows": [([*row.values()], run, _link(folder, run)) for row, run in zip(rows, runs, strict=True)],
        "keys": [(label, *series_style(index)) for index, label in enumerate(drawn)],
        "averages": page_chart(f"Average by round of each run. {ends}", 3.1, _draw_averages, drawn) if drawn else None,
        **fold(charts),
    }


def _drawn(runs: Sequence[SavedRun]) -> dict[str, SavedRun]:
    """Return the runs to draw, by label."""
    played = [(label, run) for label, run in zip(labels(runs), runs, strict=True) if run.results]
    return dict(played[index] for index in selection(len(played), LINES))


def _link(folder: Path, run: SavedRun) -> str | None:
    """Return the link to a run's report, relative to the folder of the page; None if there is none."""
    report = real(run.path) / REPORT
    return quote(os.path.relpath(report, real(folder))) if is_there(report) else None


def _draw_averages(axes: Axes, drawn: Mapping[str, SavedRun]) -> None:
    """Draw the averages of each run by round as a line, and its equilibria in the same colour."""
    for index, (label, run) in enumerate(drawn.items()):
        colour, line_style = series_style(index)
        averages = averages_of(run.game, {each.round: each.tally for each in run.results})
        draw_equilibria(axes, run.game, color=colour, linewidth=1.6)
        draw_line(axes, averages, color=colour, linestyle=line_style, label=label)
    scale_rounds(axes, [1, *(each.round for run in drawn.values() for each in run.results)])


def _picture(drawn: Mapping[str, SavedRun]) -> Figure:
    """Draw the averages by round above the last rounds of the runs."""
    selected = [[*drawn.items()][index] for index in selection(len(drawn), SMALL_MULTIPLES)]
    figure, above, below = two_parts(3.6 + 0.3 * -(-len(drawn) // 3), 2.4 * grid_of(len(selected))[0] or 0.1)
    axes = above.subplots()
    _draw_averages(axes, drawn)
    axes.set_title("Average by round; dotted, each run's equilibrium", loc="left", weight="bold")
    axes.set_xlabel("round")
    above.legend(frameon=False, loc="outside lower center", ncols=3)
    grid = draw_small_multiples(below, [(run.game, run.results[-1]) for _, run in selected])
    for axes, (label, run) in zip(grid, selected, strict=True):
        axes.set_title(f"{label}, round {run.results[-1].round}", loc="left", fontsize=10)
    return figure
