"""The process that draws reports beside a run: what may happen to it costs no report, and it outlives no run."""

from __future__ import annotations

import os
import shutil
import signal

import psutil
import pytest
from conftest import ROOT, until
from waiting import Gates

from simulation.errors import ResultsError, SettingsError
from simulation.results import report_process
from simulation.results.reader import read_run
from simulation.results.report_process import ReportProcess


def drawer_of(checkout) -> psutil.Process | None:
    return next((each for each in checkout.processes() if "--draw-for-main" in each.info["cmdline"]), None)


def game_under_way(checkout, gates):
    """A game in its round, and the process that will draw its report."""
    with (checkout.path / "stderr").open("w") as log:
        game = checkout.start("run_simulation.sh", "3", "30", *gates.flags, stderr=log)
    until(lambda: "round 1: asking" in (checkout.path / "stderr").read_text(), 60, "the round has begun")
    return game, until(lambda: drawer_of(checkout), 60, "a process draws reports")


def test_a_killed_report_process_costs_no_report(cluster, tmp_path):
    gates = Gates(tmp_path)
    game, drawer = game_under_way(cluster, gates)
    drawer.kill()
    gates.open()
    game.communicate(timeout=120)
    log = (cluster.path / "stderr").read_text()
    assert game.returncode == 0, log
    assert "the process that draws reports ended with status -9: drawing here" in log
    assert (cluster.path / "runs/latest/report.html").stat().st_mtime >= (tmp_path / "gate-0").stat().st_mtime
    assert drawer_of(cluster) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_every_process_of_a_run_costs_no_report(cluster, tmp_path, number):
    """As Slurm and systemd send it."""
    gates = Gates(tmp_path)
    cluster.cold = True
    try:
        game, drawer = game_under_way(cluster, gates)
    finally:
        cluster.cold = False
    drawer.send_signal(number)
    game.send_signal(number)
    game.communicate(timeout=120)
    log = (cluster.path / "stderr").read_text()
    assert game.returncode == 128 + number and "drawing here" not in log, log
    run = (cluster.path / "runs/latest").resolve()
    assert cluster.summary(run)["status"] == "interrupted"
    assert {"report.html", "histogram.png"} <= {path.name for path in run.iterdir()}
    assert drawer_of(cluster) is None


def test_a_hanging_report_process_is_replaced(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(ROOT / "tests/data/old_runs/random", folder)
    reports = ReportProcess()
    try:
        reports.draw(read_run(folder))
        (folder / "report.html").unlink()
        monkeypatch.setattr(report_process, "LONGEST_S", 0.5)
        os.kill(reports._process.pid, signal.SIGSTOP)
        reports.draw(read_run(folder))
        assert (folder / "report.html").exists() and reports._process.returncode == -signal.SIGKILL
    finally:
        reports.close()


def test_errors_of_the_report_process_are_reported_by_main(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(ROOT / "tests/data/old_runs/level_k", folder)
    reports = ReportProcess()
    try:
        run = read_run(folder)
        (folder / "histogram.png").mkdir()
        with pytest.raises(ResultsError, match=r"cannot write .*histogram\.png"):
            reports.draw(run)
        (folder / "answers.parquet").unlink()
        with pytest.raises(SettingsError, match=r"answers\.parquet is missing"):
            reports.draw(run)
    finally:
        reports.close()
