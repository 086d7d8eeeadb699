"""What a terminal shows, whatever its width: columns are left out, and never cut."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger
from rich.cells import cell_len

import main
from games.average import Average
from simulation import cli
from simulation.errors import Ended
from simulation.game.tally import INTERRUPTED, RoundResult, Tally, score
from simulation.results import console_report
from simulation.results.console_report import announcement_lines, failure_lines, histogram_lines
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
    count, percent = f"{done:,} of {total:,}", f"{100 * done // total}%"
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
    _, *lines = histogram_lines(RoundResult(1, tally), game)
    narrowest = max(len(line.replace("█", "")) for line in lines)
    assert max(map(len, lines)) <= max(width, narrowest)
    assert width < 80 or "█" * 30 in lines[0]


@pytest.mark.parametrize(
    ("top", "decimals", "counts", "rows"),
    [
        (100, 0, {0: 3, 99: 5, 100: 1}, ["    0-9  ### 3", "    ...", "  90-99  ##### 5", "    100  # 1"]),
        (100, 0, {33: 5, 45: 1}, ["  30-39  ##### 5", "  40-49  # 1"]),
        (20, 0, {0: 1, 2: 4}, ["  0-2  ##### 5"]),
        (9, 0, {7: 5}, ["  7  ##### 5"]),
        (100, 2, {1234: 5}, ["  10.00-19.99  ##### 5"]),
        (157, 0, {157: 5}, ["  140-157  ##### 5 (only 18 of 20 numbers)"]),
    ],
)
def test_a_histogram_has_a_title_equal_bins_and_no_empty_rows(monkeypatch, top, decimals, counts, rows):
    monkeypatch.setattr(console_report, "BAR_WIDTH", 5)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    tally = Tally(1000 + sum(counts.values()), np.array([*counts]), np.array([*counts.values()]), {"no number": 1000})
    title, *lines = histogram_lines(RoundResult(3, tally), Average(max_value=top, decimals=decimals))
    assert title == f"Answers of round 3: {tally.answered:,} of {tally.asked:,} participants, by number"
    assert lines == rows
    assert histogram_lines(RoundResult(1, Tally(5, failures={"x": 5})), Average()) == []


def test_an_interrupted_round_says_so_and_is_no_failure_of_participants():
    none = Tally(300, failures={INTERRUPTED: 300}, ended=Ended.INTERRUPTED)
    assert announcement_lines(RoundResult(1, none, seconds=2.5), Average()) == [
        "Moderator: The round was interrupted before any of 300 participants answered [takes 2.50 s]"
    ]
    assert failure_lines(none) == []
    some = Tally(300, np.array([40]), np.array([100]), {INTERRUPTED: 198, "no number": 2}, Ended.INTERRUPTED)
    average, *_, last = announcement_lines(replace(score(Average(), 1, some), seconds=2.5), Average())
    assert average == "Moderator: The average value is 40.000 [takes 2.50 s]"
    assert last == "Moderator: The round was interrupted before 198 of 300 participants answered."
    assert failure_lines(some) == ["2 of 300 participants gave no usable answer: no number: 2"]


@given(
    st.sampled_from(["answers in", "agent servers ready", "a long name of a stage, of more columns than 80" * 3]),
    st.integers(0, 10**12),
    st.integers(1, 10**12),
    st.floats(0, 10**6),
    st.sampled_from(["", "14 of 14 servers answer", HOSTS]),
    st.integers(9, 200),
)
def test_a_line_of_progress_has_whole_columns_that_fit(name, done, total, seconds, note, room):
    done = min(done, total)
    line = console.progress_line(console.Stage(name, done, total, 5.0), 5.0 + seconds, note, room)
    assert len(line) <= room
    count, percent = f"{done:,} of {total:,}", f"{100 * done // total}%"
    assert (count if len(count) <= room else percent) in line
    for text in (count, percent, name, note):
        line = line.replace(text, "", 1) if text else line
    columns = [each for each in line.split() if not set(each) <= {*"━╺"}]
    assert all(re.fullmatch(r"[0-9,]+/s|days?,|[0-9:]+", each) for each in columns), line


@pytest.mark.parametrize("quiet", [False, True])
def test_a_line_of_the_log_on_a_terminal_is_short(monkeypatch, capsys, quiet):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    console.log_to_stderr(quiet)
    logger.info("round 1: asking {} <red>")
    logger.warning("a server is lost")
    logger.error("the game cannot be finished")
    logger.remove()
    err = capsys.readouterr().err
    info, *others = ["round 1: asking {} <red>", "warning: a server is lost", "error: the game cannot be finished"]
    lines = re.findall(r"^[0-9]{2}:[0-9]{2}:[0-9]{2} (.*)\n", err, re.MULTILINE)
    assert lines == ([info] if not quiet else []) + others
    assert err.count("\n") == len(lines)


def test_work_without_a_count_is_shown_and_removed_again(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    watch = console.ConsoleProgress()
    with watch.during("drawing pictures"):
        assert capsys.readouterr() == ("", "drawing pictures")
        watch.say(["a result"])
        assert capsys.readouterr() == ("a result\n", "\r\x1b[K")
    with watch.during("drawing pictures"):
        pass
    assert capsys.readouterr() == ("", "drawing pictures\r\x1b[K")
    quiet = console.ConsoleProgress(quiet=True)
    with quiet.during("drawing pictures"):
        quiet.progress("answers in", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_work_without_a_count_is_not_logged_where_there_is_no_terminal(capsys):
    with console.ConsoleProgress().during("drawing pictures"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_report_in_json_is_the_only_output(monkeypatch, tmp_path, capsys):
    names = ("random", "sweep/01-ratio=1-2,seed=1")
    folders = [shutil.copytree(ROOT / "tests/data/old_runs" / name, tmp_path / Path(name).name) for name in names]
    texts = [(folder / "summary.json").read_text() for folder in folders]
    monkeypatch.setattr("simulation.results.report_page.draw_all", lambda _: None)
    monkeypatch.setattr("simulation.results.comparison.write_comparison", lambda *_: None)
    monkeypatch.setattr("simulation.runs.console.log_to_stderr", lambda quiet: quiet or pytest.fail())
    try:
        logger.remove()
        for runs in (folders[:1], folders):
            assert main.main(["--role", "report", "--json", *map(str, runs)]) == 0
            out, err = capsys.readouterr()
            assert err == "" and json.loads(out) == (
                [*map(json.loads, texts)] if len(runs) > 1 else json.loads(texts[0])
            )
    finally:
        logger.remove()


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
