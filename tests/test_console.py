"""What a terminal shows, whatever its width: columns are left out, and never cut."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from loguru import logger
from rich.cells import cell_len

from games.average import Average
from simulation import cli
from simulation.game.tally import Tally
from simulation.results.console_report import histogram_lines
from simulation.results.tables import fitting, table_lines
from simulation.runs import console

WIDTHS = (20, 24, 31, 40, 53, 60, 72, 80, 100, 600)
HOSTS = "silent: " + ", ".join(f"a-rather-long-name-of-a-host-{number}.example:12345" for number in range(9))


def test_the_least_important_columns_are_left_out_first():
    assert fitting([5, 5, 5], [2, 0], 17, gap=1) == [0, 1, 2]
    assert fitting([5, 5, 5], [2, 0], 16, gap=1) == [0, 1]
    assert fitting([5, 5, 5], [2, 0], 10, gap=1) == [1]
    assert fitting([5, 5, 5], [2, 0], 3, gap=1) == [1]
    assert fitting([5, 0, 5], [2], 11, gap=1) == [0, 2]


@pytest.mark.parametrize(
    ("stage", "done", "total", "note"),
    [
        ("answers in", 12_345, 64_000, "14 of 14 servers answer"),
        ("answers in", 9_999_999, 10_000_000, "5 of 14 servers answer"),
        ("agent servers ready", 3, 14, ""),
        ("answers in", 7, 100, HOSTS),
    ],
)
def test_progress_is_one_line_without_truncation(stage, done, total, note):
    count, percent = f"{done:,} of {total:,}", f"{100 * done / total:.0f}%"
    rate = done / 10
    time_left = math.ceil((total - done) / rate)
    wholes = {stage, count, percent, note, f"{rate:,.0f}/s", f"0:{time_left // 60:02}:{time_left % 60:02}"} - {""}
    seen = set()
    for width in WIDTHS:
        line = console.progress_line(console.Stage(stage, done, total, 5.0), 15.0, note, width)
        assert "\n" not in line and len(line) <= width, width
        shown = {text for text in wholes if text in line}
        for text in sorted(shown, key=len, reverse=True):
            line = line.replace(text, "", 1)
        assert set(line) <= {*" ━╸╺"}, line
        assert (count in shown) is (len(count) <= width)
        assert seen - {percent} <= shown, f"{seen - shown} are shown where there is less room"
        seen = shown
    assert seen == wholes - {percent}


HEAD = ["run", "ratio", "asked", "average"]
ROWS = [["01-ratio=1-2", "1/2", "1,000", "24.825"], ["02-ratio=2-3", "2/3", "64,000", "33.1"]]


def test_a_table_has_all_columns_unless_a_terminal_is_too_narrow(monkeypatch):
    whole = ["run           ratio   asked  average", *("01-ratio=1-2    1/2   1,000   24.825",)]
    monkeypatch.setenv("COLUMNS", "20")
    assert table_lines(HEAD, ROWS, ["asked", "ratio"])[:2] == whole
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert table_lines(HEAD, ROWS, ["asked", "ratio"]) == [
        "run           average",
        "01-ratio=1-2   24.825",
        "02-ratio=2-3     33.1",
    ]
    for width in range(20, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = table_lines(HEAD, ROWS, ["asked", "ratio", "average"])
        assert max(map(len, lines)) <= width
        words = {word for line in lines[1:] for word in line.split()}
        assert words <= {cell for row in ROWS for cell in row}
        assert ("asked" in lines[0]) is (width >= 38) and ("ratio" in lines[0]) is (width >= 30)


def test_letters_of_two_columns_are_counted_as_two(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    rows = [["提示=一", "1/2", "教師", "7"], ["b", "51/100", "か", "24.825"]]
    for width in range(16, 60):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = table_lines(["run", "ratio", "persona", "average"], rows, ["persona", "ratio"], left=["run", "persona"])
        assert max(map(cell_len, lines)) <= max(width - 2, 16) and len(set(map(cell_len, lines))) == 1
    whole = ["run       ratio  persona  average", "提示=一     1/2  教師           7"]
    assert lines == [*whole, "b        51/100  か        24.825"]


def test_the_last_cell_of_a_row_is_not_padded(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "24")
    rows = [["12330", "participant", "17"], ["9", "does not answer, however long the reason is"], ["all is lost"]]
    assert table_lines(["port", "role", "pid"], rows, ["pid"], left=["role"]) == [
        *(" port  role", "12330  participant", "    9  does not answer, however long the reason is", "all is lost"),
    ]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("top", "decimals", "most"), [(100, 0, 3), (10**9, 0, 7), (100, 2, 10**7), (9, 0, 10**9)])
def test_a_histogram_has_shorter_bars_or_none(monkeypatch, width, top, decimals, most):
    monkeypatch.setenv("COLUMNS", str(width))
    game = Average(max_value=top, decimals=decimals)
    tally = Tally(most + 1, np.array([0, top * 10**decimals]), np.array([most, 1]))
    lines = histogram_lines(tally, game)
    narrowest = max(len(line.replace("█", "")) for line in lines)
    assert max(map(len, lines)) <= max(width, narrowest)
    assert width < 80 or "█" * 30 in lines[0]


def test_progress_of_servers_is_logged_like_that_of_a_run(monkeypatch, capsys):
    monkeypatch.setattr(console, "on_stop_signals", lambda _: None)
    monkeypatch.setattr(console, "LINE_EVERY_S", 1e-9)
    try:
        with cli.interruptible_progress() as progress:
            progress("agent servers ready", 0, 3)
            progress("agent servers ready", 1, 3)
    finally:
        logger.remove()
    line = capsys.readouterr().err
    assert re.fullmatch(r"[0-9-]{10} [0-9:.]{12} \| INFO     \| agent servers ready: 1 of 3 \(.+\)\n", line), line
