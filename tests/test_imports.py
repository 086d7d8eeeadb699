"""Each command imports what it uses, and no more: that is most of the time that a short one takes."""

from __future__ import annotations

import json
import subprocess

import pytest
from conftest import Checkout

from simulation.rpc.messages import CODE_VERSION, _code_version

# Run a command in a Python of its own, and print the modules that it has imported at its end
RUN = """
import json, sys
import main
try:
    status = main.main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print(json.dumps([status, sorted(sys.modules)]))
"""
AGENTSCOPE, MODEL_CLIENT = ("agentscope", "participant"), ("openai", "simulation.llm.http_client")
DASHBOARD = ("simulation.monitoring.dashboard", "aiohttp.web")
PICTURES, NEVER = ("matplotlib", "jinja2"), ("dashscope", "pandas", "prometheus_client", "scipy", "socketio")


def modules_after(checkout: Checkout, *arguments: str, status: int = 0) -> set[str]:
    """What `main.py` with these arguments has imported when it ends with this status."""
    (checkout.path / "run_and_tell.py").write_text(RUN)
    done = checkout.run("run_and_tell.py", *arguments)
    ended, modules = json.loads(done.stdout.splitlines()[-1])
    assert ended == status, done.stderr
    return set(modules)


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--dry-run",
        "--dry-run --experiment configs/experiments/two_thirds.yaml --agent-class examples/no_such_file.py:Nobody",
        "--role participant --status",
        "--role participant --stop",
        "--role vllm --status",
        "--colour red",
    ],
)
def test_commands_without_agents_do_not_import_agentscope(checkout, arguments):
    refused = "no_such_file" in arguments or "--colour" in arguments
    modules = modules_after(checkout, *arguments.split(), status=2 if refused else 0)
    needed = (
        (*AGENTSCOPE, *PICTURES) if "no_such_file" in arguments else ()
    )  # its class is looked for first, as a game would need it
    assert not modules & {*AGENTSCOPE, *MODEL_CLIENT, *PICTURES, *NEVER} - {*needed}


@pytest.mark.parametrize(
    "name",
    [
        *("moderator/__init__.py", "simulation.py", "loguru.py"),
        pytest.param("participant/__init__.py", marks=pytest.mark.slow),
    ],
)
def test_user_files_do_not_replace_modules_of_the_program(checkout, name):
    (checkout.path / name).parent.mkdir(exist_ok=True)
    (checkout.path / name).write_text("raise RuntimeError('a file of a researcher')\n")
    for arguments in (["--dry-run"], ["--role", "participant", "--stop"]):
        command = [checkout.path / ".venv/bin/python", checkout.path / "main.py", *arguments]
        done = subprocess.run(command, cwd=checkout.path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def use_files_of(checkout, monkeypatch):
    monkeypatch.setattr("simulation.rpc.messages.CODE", checkout.path)
    monkeypatch.setattr("simulation.rpc.messages.MAIN", checkout.path / "main.py")


def test_hidden_files_of_editors_do_not_change_the_version(checkout, monkeypatch):
    (checkout.path / "simulation/.#run.py").symlink_to("somebody@some-host.1234:1600000000")  # Emacs' lock
    (checkout.path / "simulation/.run.py").write_text("a draft")
    use_files_of(checkout, monkeypatch)
    assert _code_version() == CODE_VERSION


def test_a_changed_file_in_any_folder_changes_the_version(checkout, monkeypatch):
    use_files_of(checkout, monkeypatch)
    folders = {path.parent for path in checkout.path.glob("simulation/**/*.py")} | {checkout.path}
    assert len(folders) >= 9  # the top level, simulation/ and its folders
    for folder in folders:
        path = next(folder.glob("[a-z]*.py"))
        text = path.read_text()
        path.write_text(text + "\n")
        assert _code_version() != CODE_VERSION, path
        path.write_text(text)
    assert _code_version() == CODE_VERSION


def test_a_user_without_a_home_folder_plays(checkout):
    no_home = "import os, pwd\npwd.getpwuid = {}.__getitem__\nos.environ.pop('HOME', None)\n"  # no entry for the user
    (checkout.path / "homeless.py").write_text(no_home + RUN)
    flags = ("--server-per-host", "1", "--participant-num", "5", "--moderator-per-host", "1", "--sleep-time", "0")
    done = checkout.run("homeless.py", *flags, "--base-port", str(checkout.base_port))
    assert json.loads(done.stdout.splitlines()[-1])[0] == 0, done.stderr


def test_a_random_game_imports_no_model_client_and_nothing_of_the_live_page(checkout):
    flags = ("--server-per-host", "1", "--participant-num", "10", "--moderator-per-host", "1", "--sleep-time", "0")
    base_port = ("--base-port", str(checkout.base_port))
    modules = modules_after(checkout, *flags, *base_port)
    assert {"agentscope", *PICTURES} <= modules
    assert not modules & {*MODEL_CLIENT, *DASHBOARD, *NEVER}
    run = ("--run-dir", str(checkout.path / "runs/latest"))
    modules = modules_after(checkout, "--role", "report", *run)
    assert "matplotlib" in modules
    assert not modules & {*AGENTSCOPE, *MODEL_CLIENT, *NEVER}


@pytest.mark.parametrize(("kind", "needed"), [("random", False), ("llm", True)])
def test_servers_for_language_models_import_the_client_at_start(checkout, kind, needed):
    """The launcher imports for all its servers, and tells so in its log."""
    checkout.cold = True
    flags = ("--server-per-host", "1", "--moderator-per-host", "1", "--agent-type", kind)
    started = checkout.run(  # the scripts would ignore the variable
        *("main.py", "--role", "participant", "--base-port", str(checkout.base_port), *flags),
        env={"PYTHONPROFILEIMPORTTIME": "1"},
    )
    assert started.returncode == 0
    assert checkout.run("stop_all_server.sh").stdout == "stopped 2 agent servers\n"
    log = (checkout.path / "run/servers/launcher.log").read_text()
    imported = {line.rpartition("|")[2].strip() for line in log.splitlines() if line.startswith("import time:")}
    assert "simulation.hosts.agent_server" in imported
    assert ({"openai", "simulation.llm.http_client"} <= imported) is needed
    packages = {name.partition(".")[0] for name in imported if "." in name}  # without it, it was but looked for
    assert not packages & {*NEVER, *PICTURES}


def test_the_model_client_is_imported_before_the_first_request(checkout):
    """Not when the first request is made, whose time-out would run meanwhile: importing takes each server a while."""
    (checkout.path / "make_chat.py").write_text(
        "import sys\n"
        "from simulation.settings import SimulationConfig\n"
        "from simulation.runs.scenario import build_game\n"
        "from simulation.llm.chat import Chat\n"
        "from simulation.llm.model_configs import read_models\n"
        "config = SimulationConfig(agent_type='llm', participant_num=1, seed=1)\n"
        "game = build_game(config, read_models(config))\n"
        "print('openai' in sys.modules)\n"
        "Chat(game)\n"
        "print('openai' in sys.modules)\n"
    )
    assert checkout.run("make_chat.py").stdout.split() == ["False", "True"]
