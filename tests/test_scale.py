"""A million participants: the same promises as for a thousand."""

from __future__ import annotations

import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Checkout, until

from games.average import Average
from simulation.game.rules import draw

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PARTICIPANTS = 1_000_000
PLAY = ("--seed", "7", "--sleep-time", "1", "--max-value", "1000000", "--decimals", "1")


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """What an undisturbed game is answered, of shape (2 rounds, participants)."""
    game = Average(7, 1_000_000, 1, 0.0)
    return np.array([[draw(game, number, index) for index in range(PARTICIPANTS)] for number in (1, 2)]) / game.scale


def check_whole(checkout: Checkout, summary: dict, drawn: np.ndarray) -> None:
    """Check that each participant was counted once in each round, with the answer that it alone stands for."""
    answers = pq.read_table(checkout.path / "runs/latest/answers.parquet")
    assert answers.num_rows == drawn.size and answers["failure"].null_count == drawn.size
    assert np.array_equal(answers["participant"].to_numpy(), np.tile(np.arange(PARTICIPANTS), len(drawn)))
    assert np.array_equal(answers["round"].to_numpy(), np.repeat(np.arange(len(drawn)) + 1, PARTICIPANTS))
    assert np.array_equal(answers["value"].to_numpy(), drawn.ravel())
    assert summary["status"] == "complete"
    for played, values in zip(summary["rounds"], drawn, strict=True):
        assert (played["asked"], played["answered"], played["failed"]) == (PARTICIPANTS, PARTICIPANTS, 0)
        assert played["average"] == pytest.approx(values.mean(), abs=1e-6)
        assert played["median"] == pytest.approx(np.median(values))
        away = np.abs(values - played["average"])
        closest = np.flatnonzero(away == away.min())
        assert played["winners"]["count"] == len(closest)
        assert played["winners"]["participants"] == [f"P{index}" for index in closest[:10]]


def test_a_seed_repeats_the_game_on_any_layout(cluster, checkout, drawn):
    done = cluster.run("run_simulation.sh", "3", str(PARTICIPANTS), *PLAY, timeout=400)
    assert done.returncode == 0, done.stderr
    check_whole(cluster, cluster.summary(), drawn[:1])
    assert len((cluster.path / "runs/latest/summary.json").read_bytes()) < 100_000
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) < 60 and max(map(len, lines)) < 160

    other = checkout.play("2", str(PARTICIPANTS), *PLAY, env={"MODERATOR_PER_HOST": "1"}, timeout=400)
    check_whole(checkout, other, drawn[:1])


def test_a_server_killed_during_a_round_costs_no_answer(cluster, drawn, tmp_path):
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        game = cluster.start("run_simulation.sh", "3", str(PARTICIPANTS), *PLAY, "--rounds", "2", stderr=stderr)
    until(lambda: "round 1: asking" in log.read_text(), 60, "the first round")
    os.kill(cluster.pid(1), signal.SIGKILL)
    game.communicate(timeout=400)
    assert game.returncode == 0, log.read_text()
    summary = cluster.summary()
    assert summary["cluster"]["lost"] == [f"localhost:{cluster.base_port + 1}"]
    assert summary["rounds"][0]["reassigned"] == pytest.approx(PARTICIPANTS / 3, abs=1)
    check_whole(cluster, summary, drawn)
