"""The order of imports, held against the files: a file may import only from rows above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    "simulation.errors",
    "simulation.config",
    "simulation.usage",
    "simulation.lean_import",
    "simulation.reading",
    "simulation.shares",
    "simulation.cast",
    "simulation.game",
    "simulation.yaml_file",
    "simulation.sheet",
    "simulation.glance",
    "simulation.answer_rows",
    "simulation.placement",
    "simulation.seating",
    "simulation.security",
    "simulation.processes",
    "simulation.scheduler",
    "simulation.in_flight",
    "simulation.channels",
    "simulation.remote",
    "simulation.heartbeat",
    "simulation.prompts",
    "simulation.replies",
    "simulation.model_configs",
    "simulation.library",
    "simulation.model_http",
    "simulation.asks",
    "simulation.model_client",
    "simulation.model",
    "participant",
    "simulation.custom",
    "simulation.group",
    "moderator",
    "simulation.server",
    "simulation.launcher",
    "simulation.local_servers",
    "simulation.readiness",
    "simulation.attendance",
    "simulation.cluster",
    "simulation.rounds",
    "simulation.results",
    "simulation.past_runs",
    "simulation.report",
    "simulation.pictures",
    "simulation.plots",
    "simulation.report_page",
    "simulation.report_process",
    "simulation.comparison",
    "simulation.console",
    "simulation.run",
    "simulation.lookout",
    "simulation.view",
    "simulation.dashboard",
    "simulation.plan",
    "simulation.experiment",
    "simulation.sweep",
    "simulation.tasks",
    "simulation.session",
    "simulation.inference",
    "main",
]
AGENTSCOPE_INSIDES = {"simulation.remote", "simulation.server", "simulation.group"}


def files() -> dict[str, Path]:
    found = [*ROOT.glob("*.py"), *ROOT.glob("simulation/*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in found}
    return {name: path for name, path in names.items() if not name.endswith("__init__")}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_file_has_its_row():
    assert set(files()) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_imports_point_up(name):
    below = set(ROWS[ROWS.index(name) :])
    assert not imports_of(files()[name]) & below


def test_agentscope_is_entered_where_it_should_be():
    doors = {"agentscope.rpc.rpc_agent_pb2", "agentscope.rpc.rpc_agent_pb2_grpc", "agentscope.server.servicer"}
    inside = {name for name, path in files().items() if imports_of(path) & doors}
    assert inside and inside <= AGENTSCOPE_INSIDES


def test_the_pure_rules_know_no_agents():
    for name in (
        "simulation.reading",
        "simulation.shares",
        "simulation.cast",
        "simulation.game",
        "simulation.sheet",
        "simulation.placement",
        "simulation.seating",
    ):
        assert not any(
            module.startswith(("agentscope", "grpc", "time", "random")) for module in imports_of(files()[name])
        )
