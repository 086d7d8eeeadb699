"""The order of imports, held against the files: a file may import only from rows above it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import copy_checkout
from own_files import ROOT, checked, own_files

import main

ROWS = [
    "simulation.errors",
    "simulation.config",
    "simulation.console",
    "simulation.usage",
    "simulation.lean_import",
    "simulation.answer_words",
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
    found = [Path(name) for name in own_files(uncommitted=True) if name.endswith(".py")]
    found = [path for path in found if path.parent in (Path(), Path("simulation")) and path.stem != "__init__"]
    return {".".join(path.with_suffix("").parts): ROOT / path for path in found}


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
    assert {name.partition(".")[0] for name in ROWS} == {"main", *main.MODULES}


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


def calls_in(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("name", [*ROWS, "scripts.install"])
def test_every_text_names_its_encoding(name):
    """Otherwise the locale does."""
    for call in calls_in(ROOT / f"{name.replace('.', '/')}.py"):
        function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        texts = [each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        is_text = {"read_text", "write_text"} if isinstance(call.func, ast.Attribute) else {"open"}
        is_open = function == "open" and any(set(mode) <= set("rwxa+t") for mode in texts)
        is_process = any(ast.unparse(named[each]) == "True" for each in ("text", "universal_newlines") if each in named)
        if function in is_text or is_open or is_process:
            assert "encoding" in named, f"{name}, line {call.lineno}"


@pytest.mark.parametrize("name", [name for name in ROWS if name != "simulation.config"])
def test_paths_are_looked_at_in_one_place(name):
    """These functions of pathlib raise PermissionError, RuntimeError and more: see is_there, real and full_path."""
    raising = {"exists", "is_file", "is_dir", "resolve", "expanduser", "absolute", "home", "cwd"}
    for call in calls_in(files()[name]):
        if isinstance(call.func, ast.Attribute) and call.func.attr in raising:
            assert ast.unparse(call.func.value) in ("Path(__file__)", "os.path"), f"{name}, line {call.lineno}"


def test_linters_see_every_file_of_the_program():
    def inside(name: str, places: list[str]) -> bool:
        return any(name == place or name.startswith(f"{place}/") for place in places)

    for name in own_files(uncommitted=True):
        first = (ROOT / name).read_bytes().partition(b"\n")[0]
        assert not name.endswith(".py") or inside(name, checked("CODE")), name
        assert not (name.endswith(".sh") or (first.startswith(b"#!") and b"sh" in first)) or inside(
            name, checked("SCRIPTS")
        ), name


def test_the_program_s_own_files_are_known_without_the_command_git(tmp_path, monkeypatch):
    named = own_files()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {*named} <= {*own_files()}


@pytest.mark.parametrize("committed", [False, True], ids=["in an archive", "committed"])
def test_files_of_a_researcher_in_the_checkout_are_left_alone(tmp_path, committed):
    """As README and Python's habits have it; an archive is a copy without git."""
    path = copy_checkout(tmp_path / "a b")
    modules = ("random.py", "struct.py", "yaml.py")
    mine = ("my_file.py", "notes.py", "my_test.py", "test_mine.py", "experiments/run.py", "my/x.py", "examples/mine.py")
    for name in (*mine, *modules, "benchmarks/mine.py"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("import os,sys\nclass x( object ): undefined_name\n")
    for name in ("moderator/data.py", "simulation.py", "scripts.py"):  # beside modules and packages of these names
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("1/0\n")
    (path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-flag\n")
    (path / "ruff.toml").write_text("[lint]\nselect = ['NO-SUCH-RULE']\n")
    (path / ".shellcheckrc").write_text("no such line\n")
    (path / "conftest.py").write_text("1/0\n")
    (path / "analysis.sh").write_text("cd $1; for f in `ls *`; do echo $f; done\n")
    (path / "configs/experiments/mine.yaml").write_text("agent_type: llm\nmodels: {mine: 1}\n")
    with (path / "configs/cluster.env").open("a") as settings:
        settings.write("HOSTS=node1 node2\nMODERATOR_NUM=2\n")
    entry = {"model_type": "openai_chat", "model_name": "mine", "client_args": {"base_url": "http://localhost:8123/v1"}}
    entries = [entry | {"config_name": name} for name in ("mine", "yours")]
    (path / "configs/model_configs.json").write_text(json.dumps(entries))
    if committed:
        for arguments in (["init", "--quiet"], ["add", "--all"]):
            subprocess.run(["git", *arguments], cwd=path, check=True)
    command = [path / "run_tests.sh", *(f"tests/test_{name}.py" for name in ("layout", "readme", "experiments"))]
    command += ["tests/test_scripts.py", "-n", "1"]
    command += ["-k", "(layout and not researcher) or table or become_flags or every_experiment or bad_experiment"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout
