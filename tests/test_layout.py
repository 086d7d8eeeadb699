"""Where things are: which folder may import which, and what all files have in common."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import copy_checkout
from own_files import ROOT, checked, own_files

import main

MAY_IMPORT = {  # folders of simulation/, "agents of the top level" and main.py, each with what it may import
    "": {""},
    "game": {"", "game"},
    "llm": {"", "game", "llm"},
    "rpc": {"", "rpc"},
    "agents": {"", "game", "llm", "rpc", "agents"},
    "games": {"", "game", "games"},  # the engine loads them by name: it imports none
    "top": {"", "game", "llm", "rpc", "agents", "top"},
    "hosts": {"", "game", "llm", "rpc", "agents", "top", "hosts"},
    "cluster": {"", "game", "llm", "rpc", "agents", "top", "cluster"},
    "results": {"", "game", "llm", "rpc", "results"},
    "runs": {"", "game", "llm", "rpc", "agents", "top", "cluster", "results", "runs"},
    "monitoring": {"", "game", "llm", "rpc", "agents", "top", "cluster", "results", "runs", "monitoring"},
    "main": {"", "game", "llm", "rpc", "agents", "top", "hosts", "cluster", "results", "runs", "monitoring", "main"},
}
TOP = {
    **dict.fromkeys(("main.py", "simulation/cli.py", "simulation/playing.py"), "main"),
    **dict.fromkeys(("simulation/__init__.py", "simulation/api.py", "simulation/study.py"), "main"),
    **{"moderator.py": "top", "participant.py": "top"},
}
MOST_FILES = 11  # in a folder
# Files that touch AgentScope, in any way; all others would work with another engine
AGENTSCOPE = {
    *("moderator.py", "simulation/agents/participant.py", "simulation/agents/group.py"),
    *("simulation/agents/agent_class.py", "simulation/hosts/agent_server.py", "simulation/rpc/client.py"),
    *("simulation/rpc/lean_import.py", "simulation/llm/chat.py", "simulation/cluster/rounds.py"),
}
VERSION_ONLY = {"simulation/rpc/messages.py"}
# Attributes of AgentScope's classes that are not its interface
INSIDES = {"_oid", "_REGISTRY", "_init_settings", "_get_channel", "agent_pool", "agent_id_lock", "result_pool"}


def folder_of(name: str) -> str:
    """The row of MAY_IMPORT that a file of the program belongs to."""
    return TOP.get(name) or ("games" if name.startswith("games/") else "/".join(Path(name).parts[1:-1]))


def files() -> dict[str, Path]:
    """The program's own Python files, without scripts/, by their names from the checkout."""
    found = [name for name in own_files(uncommitted=True) if name.endswith(".py")]
    return {name: ROOT / name for name in found if name in TOP or name.startswith(("simulation/", "games/"))}


def imports_of(path: Path) -> set[str]:
    """All modules that a file imports anywhere, and all that it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_folder_has_a_row_and_at_most_eleven_files():
    assert {folder_of(name) for name in files()} == set(MAY_IMPORT)
    for folder in {path.parent for path in files().values()} - {ROOT}:
        assert len([path for path in folder.iterdir() if path.is_file()]) <= MOST_FILES, folder
    assert {name.removesuffix(".py") for name in TOP if "/" not in name} | {"simulation", "games"} == {
        "main",
        *main.MODULES,
    }


@pytest.mark.parametrize("name", files())
def test_imports_point_up(name):
    modules = {each.removesuffix(".py").replace("/", "."): folder_of(each) for each in files()}
    imported = {modules[module] for module in imports_of(files()[name]) if module in modules}
    assert imported <= MAY_IMPORT[folder_of(name)]


def touches_agentscope(tree: ast.AST) -> bool:
    """Whether a module imports AgentScope, names one of its modules in a text, or reads insides of its classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.startswith("agentscope") for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("agentscope"):
            return True
        if isinstance(node, ast.Constant) and re.fullmatch(r"agentscope(\.\w+)*", str(node.value)):
            return True
        if isinstance(node, ast.Attribute) and node.attr in INSIDES:
            return True
    return False


def test_only_listed_files_use_agentscope():
    entered = {name for name, path in files().items() if touches_agentscope(ast.parse(path.read_text()))}
    assert entered == AGENTSCOPE | VERSION_ONLY


@pytest.mark.parametrize(
    "text", ["import agentscope", "def f():\n  from agentscope.rpc import x", "m['agentscope.rpc']", "one._oid"]
)
def test_every_way_to_use_agentscope_is_detected(text):
    assert touches_agentscope(ast.parse(text))


def test_the_rules_are_pure():
    for name, path in files().items():
        if folder_of(name) == "game" or name == "simulation/cluster/placement.py":
            assert not {each.partition(".")[0] for each in imports_of(path)} & {"agentscope", "grpc", "time", "random"}


def calls_in(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("name", [*files(), "scripts/install.py"])
def test_text_files_are_opened_with_an_encoding(name):
    """Otherwise the locale does."""
    for call in calls_in(ROOT / name):
        function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        texts = [each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        is_text = {"read_text", "write_text"} if isinstance(call.func, ast.Attribute) else {"open"}
        is_open = function == "open" and any(set(mode) <= set("rwxa+t") for mode in texts)
        is_process = any(ast.unparse(named[each]) == "True" for each in ("text", "universal_newlines") if each in named)
        if function in is_text or is_open or is_process:
            assert "encoding" in named, f"{name}, line {call.lineno}"


@pytest.mark.parametrize("name", [name for name in files() if name != "simulation/files.py"])
def test_paths_are_checked_in_one_module(name):
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


def test_files_of_the_program_are_known_without_git(tmp_path, monkeypatch):
    named = own_files()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {*named} <= {*own_files()}


@pytest.mark.slow
@pytest.mark.parametrize("committed", [False, True], ids=["in an archive", "committed"])
def test_user_files_in_the_checkout_are_not_checked(tmp_path, committed):
    """As README and Python's habits have it; an archive is a copy without git."""
    path = copy_checkout(tmp_path / "a b")
    if (ROOT / ".mypy_cache").exists():  # with it, mypy checks only what is not the program's
        shutil.copytree(ROOT / ".mypy_cache", path / ".mypy_cache")
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
    chosen = ("(layout and not user_files)", "architecture", "faults", "become_flags", "every_experiment")
    command += ["-k", " or ".join((*chosen, "error_in_an_experiment"))]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout
