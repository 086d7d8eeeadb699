"""Several hosts for real: network namespaces, each with the agent servers that its own scripts started."""

from __future__ import annotations

from hosts import NODES

from simulation.config import SimulationConfig
from simulation.game import Game, draw


def test_64000_participants_on_four_hosts_answer_as_on_one(hosts):
    summary = hosts["node1"].play("4", "64000", "--seed", "7", "--sleep-time", "0")
    assert summary["status"] == "complete" and summary["rounds"][0]["answered"] == 64_000
    assert summary["cluster"]["hosts"] == list(NODES)
    assert (summary["cluster"]["servers"], summary["cluster"]["moderators"]) == (16, 4)
    game = Game(7, SimulationConfig().max_value, 0, 0.0)
    assert hosts["node1"].values() == [draw(game, 1, index) for index in range(64_000)]
