"""A million participants: the same promises as for a thousand."""

from __future__ import annotations

import os
import signal
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Checkout, until
from fake_model import FakeModel

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


def test_language_models_play_among_a_million_others(cluster):
    """And then a million play with what 2,000 of them answered."""
    fake = FakeModel(port=cluster.model_port)
    flags = ("--seed", "7", "--sleep-time", "0", "--personas", "education", "--rounds", "2")
    try:
        players = ("--players", "llm=0.002,random=0.998")
        summary = cluster.play("3", str(PARTICIPANTS), *players, *flags, timeout=600)
    finally:
        fake.close()
    assert summary["status"] == "complete" and len(fake.texts) == 4000
    recorded = (cluster.path / "runs/latest").resolve()
    answers = pq.read_table(recorded / "answers.parquet")
    kinds = np.array(answers["kind"].to_pylist())
    assert Counter(kinds.tolist()) == {"llm": 4000, "random": 2 * PARTICIPANTS - 4000}
    assert Counter(answers["value"].to_numpy()[kinds == "llm"].tolist()) == Counter(map(float, fake.texts))
    game = Average(7, 100, 0, 0.0)
    first = kinds[:PARTICIPANTS] == "random"
    drawn = np.array([draw(game, 1, index) for index in np.flatnonzero(first).tolist()])
    assert np.array_equal(answers["value"].to_numpy()[:PARTICIPANTS][first], drawn)

    summary = cluster.play("3", str(PARTICIPANTS), "--players", f"surrogate:{recorded}", *flags, timeout=600)
    assert summary["status"] == "complete" and summary["llm"] is None
    asked = [float(text) for text in fake.texts[:2000]]
    assert summary["rounds"][0]["average"] == pytest.approx(np.mean(asked), abs=0.5)
