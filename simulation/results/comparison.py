"""Comparison of several runs: a table for the terminal, a PNG picture and an HTML page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulation.errors import ResultsError, SettingsError, printable
from simulation.files import is_there, real
from simulation.results.charts import answers_picture, draw_answers, scale_rounds, selection
from simulation.results.console_report import number_of
from simulation.results.figures import grid_of, page_axes, series_style, svg, tall_figure, two_parts, write_png
from simulation.results.reader import SavedRun, rounds_finished, runs_in
from simulation.results.report_page import answers_in_words, render, shown, swatch, whole
from simulation.results.run_directory import COMPARISON, REPORT, SWEEP, resume_command, sweep_position, write_whole
from simulation.results.tables import table_lines
from simulation.settings import SETTINGS

PAGE, PICTURE = COMPARISON
# Compared in addition to the settings of the game: cluster settings that affect speed, not those of paths or output
COMPARED = ("dispatch", "hosts", "server_per_host", "moderator_per_host", "model_per_host", "max_in_flight")
LINES = 24  # most runs drawn, evenly spread over all; more line styles are indistinguishable
SMALL_MULTIPLES = 6  # last rounds in comparison.png
OPEN_RUNS = 12  # last rounds that the page shows unfolded
NO_VALUE = "-"


def run_folders(named: Sequence[Path]) -> list[Path]:
    """Return the run folders, with each sweep expanded to its runs, without duplicates. Raises SettingsError."""
    found: list[Path] = []
    for path in named:
        runs = [path]
        if is_there(path / SWEEP):
            runs = runs_in(path)
            if not runs:
                raise SettingsError(f"{path}: a sweep of which no run was played")
        found += [run for run in runs if real(run) not in map(real, found)]
    return found


def unfinished_lines(named: Sequence[Path], runs: Sequence[SavedRun]) -> list[str]:
    """Return a line for each experiment with missing or unfinished runs."""
    lines = []
    for path in [real(path) for path in named if is_there(path / SWEEP)]:
        of_it = [run for run in runs if real(run.path).parent == path]
        position = sweep_position(of_it[0].path)
        finished = sum(rounds_finished(run.summary) >= run.config.rounds for run in of_it)
        if position is not None and finished < position["runs"]:
            runs_left = f"{position['runs'] - finished} of {position['runs']} runs"
            left = f"{runs_left} of {printable(position['experiment'])} have rounds left"
            lines.append(f"{left}; to go on with them: {resume_command(path)}")
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
    return NO_VALUE if value is None else " ".join(value) if isinstance(value, tuple) else f"{value}"


def folder_names(runs: Sequence[SavedRun]) -> list[str]:
    """Return the name of each run in the table: its folder, relative to the common folder."""
    paths = [real(run.path) for run in runs]
    return [os.path.relpath(path, os.path.commonpath([path.parent for path in paths])) for path in paths]


def labels(runs: Sequence[SavedRun]) -> list[str]:
    """Return the label of each run's line: the settings it differs in, with its folder where these are not unique."""
    names = differing_settings(runs)
    names = [name for name in names if name != "seed"] or names  # random by default, so different in every run
    words = [", ".join(f"{name.replace('_', ' ')} {_setting(run, name)}" for name in names) for run in runs]
    return [
        word if word and words.count(word) == 1 else f"{word} ({name})".strip()
        for word, name in zip(words, folder_names(runs), strict=True)
    ]


def comparison_rows(runs: Sequence[SavedRun]) -> tuple[list[str], list[list[str]]]:
    """Return the column headings and a row for each run."""
    names = differing_settings(runs)
    head = ["run", *(name.replace("_", " ") for name in names), "played", "answered", "asked"]
    head += ["first average", "last average", "winning number", "equilibrium", "status", "seconds"]
    return head, [[name, *_row(run, names)] for run, name in zip(runs, folder_names(runs), strict=True)]


def _row(run: SavedRun, names: Sequence[str]) -> list[str]:
    entries, digits = run.summary["rounds"], run.game.decimals + 3
    first, last = (entries[0], entries[-1]) if entries else ({}, {})
    numbers = (first.get("average"), last.get("average"), last.get("winning_number"))
    return [
        *(_setting(run, name) for name in names),
        f"{len(entries)}",
        whole(sum(entry["answered"] for entry in entries)),
        whole(sum(entry["asked"] for entry in entries)),
        *(NO_VALUE if number is None else shown(number, digits) for number in numbers),
        " and ".join(f"{number:.6g}" for number in run.game.equilibria) or "any",
        run.summary["status"],
        f"{run.summary['seconds']['total']:.2f}",
    ]


def comparison_lines(runs: list[SavedRun]) -> list[str]:
    """Return the comparison as a table for a terminal."""
    head, rows = comparison_rows(runs)
    settings = [name.replace("_", " ") for name in differing_settings(runs)]  # the folder names contain them, too
    dropped = ["seconds", "equilibrium", "asked", "first average", *settings, "played", "answered", "winning number"]
    return table_lines(head, rows, [*dropped, "status", "last average"])


def write_comparison(folder: Path, runs: list[SavedRun]) -> None:
    """Write comparison.png and comparison.html to a folder. Raises ResultsError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"cannot write to {folder}: {error.strerror}") from None
    write_png(folder / PICTURE, _picture(runs))
    write_whole(folder / PAGE, render(PAGE, page_content(folder, runs)).encode(errors="replace"))


def page_content(folder: Path, runs: Sequence[SavedRun]) -> dict[str, Any]:
    """Return the template variables of the page, with links relative to its folder."""
    head, rows = comparison_rows(runs)
    drawn, called = _drawn(runs)
    pictures = [
        {"label": label, "entry": run.summary["rounds"][-1], "svg": _last_answers(run, label, place)}
        for place, (run, label) in enumerate(zip(drawn, called, strict=True))
    ]
    at_once = selection(len(pictures), OPEN_RUNS)
    return {
        "title": f"{len(runs)} runs compared",
        "targets": list(dict.fromkeys(run.game.target for run in runs)),
        "head": head,
        "rows": [(row, run, _link(folder, run)) for row, run in zip(rows, runs, strict=True)],
        "keys": [(label, *swatch(place)) for place, label in enumerate(called)],
        "averages": _averages_for_page(drawn, called) if drawn else None,
        "open": [pictures[place] for place in at_once],
        "folded": [each for place, each in enumerate(pictures) if place not in at_once],
    }


def _drawn(runs: Sequence[SavedRun]) -> tuple[list[SavedRun], list[str]]:
    """Return the runs to draw, and their labels."""
    called = labels(runs)
    played = [place for place, run in enumerate(runs) if run.results]
    places = [played[place] for place in selection(len(played), LINES)]
    return [runs[place] for place in places], [called[place] for place in places]


def _link(folder: Path, run: SavedRun) -> str | None:
    """Return the link to a run's report, relative to the folder of the page; None if there is none."""
    report = real(run.path) / REPORT
    return quote(os.path.relpath(report, real(folder))) if is_there(report) else None


def _last_answers(run: SavedRun, label: str, place: int) -> Markup:
    result = run.results[-1]
    return answers_picture(run.game, result, f"run-{place}", f"{label}: {answers_in_words(result, run.game)}")


def _averages_for_page(runs: Sequence[SavedRun], called: Sequence[str]) -> Markup:
    figure, axes = page_axes(3.1)
    _draw_averages(axes, runs, called)
    ends = "; ".join(
        f"{label}: {shown(run.summary['rounds'][-1]['average'], run.game.decimals + 3)} in the end"
        for label, run in zip(called, runs, strict=True)
    )
    return svg(figure, "comparison", f"Average by round of each run. {ends}")


def _draw_averages(axes: Axes, runs: Sequence[SavedRun], called: Sequence[str]) -> None:
    """Draw the averages of each run by round as a line, and its equilibria in the same colour."""
    highest, rounds = 0.0, [1]
    for place, (run, label) in enumerate(zip(runs, called, strict=True)):
        colour, dashes = series_style(place)
        played = [each for each in run.results if each.average is not None]
        averages = [number_of(each.average, run.game) for each in played if each.average is not None]
        for number in run.game.equilibria:
            axes.axhline(number, color=colour, linestyle=(0, (1, 2.5)), linewidth=1.6, alpha=0.75, clip_on=False)
        numbers = [each.round for each in played]
        axes.plot(
            numbers, averages, color=colour, linestyle=dashes, marker="o", markersize=4.5, linewidth=2, label=label
        )
        highest = max([highest, *averages, *run.game.equilibria])
        rounds += numbers
    scale_rounds(axes, sorted(set(rounds)), highest)


def _picture(runs: Sequence[SavedRun]) -> Figure:
    """Draw the averages by round above the last rounds of the runs."""
    drawn, called = _drawn(runs)
    shown_places = selection(len(drawn), SMALL_MULTIPLES)
    across, down = grid_of(len(shown_places))
    legend = 0.3 * -(-len(drawn) // 3)
    figure = tall_figure(3.6 + legend + 2.4 * down)
    above, below = two_parts(figure, 3.6 + legend, 2.4 * down or 0.1)
    axes = above.subplots()
    _draw_averages(axes, drawn, called)
    axes.set_title("Average by round; dotted, each run's equilibrium", loc="left", weight="bold")
    axes.set_xlabel("round")
    above.legend(frameon=False, loc="outside lower center", ncols=3)
    for place, axes in enumerate(below.subplots(down, across, squeeze=False).flat if down else ()):
        if place >= len(shown_places):
            axes.set_visible(False)
            continue
        run = drawn[shown_places[place]]
        draw_answers(axes, run.game, run.results[-1], lines=1.8)
        axes.set_title(f"{called[shown_places[place]]}, round {run.results[-1].round}", loc="left", fontsize=10)
    return figure
