"""The shell scripts: usage, settings and their precedence, and how they make their environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, copy_checkout, one_line

SCRIPTS = ("run_simulation.sh", "start_all_server.sh", "stop_all_server.sh", "on_all_hosts.sh", "run_tests.sh")


@pytest.fixture
def shell(tmp_path):
    """Run a script of a copied checkout whose python only prints its arguments, or with no environment at all."""
    path = copy_checkout(tmp_path / "a b")
    (path / ".venv").unlink()

    def run(*command: str, echo: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        if echo:
            (path / ".venv/bin").mkdir(parents=True, exist_ok=True)
            fake = path / ".venv/bin/python"
            fake.write_text(
                '#!/bin/sh\n[ "$1" = -c ] && echo 3.11 && exit\nshift\nfor a in "$@"; do printf "[%s]" "$a"; done\n'
            )
            fake.chmod(0o755)
            wanted = (path / "pyproject.toml").read_bytes() + (path / "constraints.txt").read_bytes()
            (path / ".venv/installed-run").write_bytes(wanted)
        program = [str(path / command[0]), *command[1:]]
        clean = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
        return subprocess.run(
            program, env=clean | env, capture_output=True, text=True, timeout=60, cwd="/", check=False
        )

    run.path = path
    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_comment_at_the_top(shell, script):
    for flag in ("--help", "-h"):
        done = shell(script, flag, echo=False)
        assert done.returncode == 0 and f"./{script}" in done.stdout and "set -e" not in done.stdout
    assert not (shell.path / ".venv").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "run_simulation.sh",
        "run_simulation.sh 10",
        "run_simulation.sh abc 10",
        "run_simulation.sh 10 abc",
        "run_simulation.sh -5 10",
        "run_simulation.sh 10 1e6",
        "run_simulation.sh --seed 7",
        "run_simulation.sh 10 -5",
        "start_all_server.sh",
        "start_all_server.sh abc",
        "start_all_server.sh -5",
        "start_all_server.sh --stat",
        "stop_all_server.sh now",
        "start_vllm.sh now",
        "start_vllm.sh --gpu-num",
        "stop_vllm.sh now",
    ],
)
def test_bad_usage_is_one_line_before_anything_is_installed(shell, arguments):
    done = shell(*arguments.split(), echo=False)
    assert done.returncode == 2 and "usage: ./" in one_line(done.stderr)
    assert not (shell.path / ".venv").exists() and not (shell.path / "run").exists()


def test_zero_is_refused_by_name(checkout):
    for command in (("run_simulation.sh", "0", "10"), ("run_simulation.sh", "10", "0"), ("start_all_server.sh", "0")):
        done = checkout.run(*command)
        assert done.returncode == 2 and "must be from 1" in one_line(done.stderr)
    done = checkout.run("run_simulation.sh", "2", "10", "--colour", "red")
    assert done.returncode == 2 and "unrecognized arguments: --colour red" in one_line(done.stderr)


def test_settings_become_flags(shell):
    given = {"BASE_PORT": "15000", "HOSTS": "a  b", "MODERATOR_PER_HOST": "2", "MODEL_PER_HOST": "3"}
    given |= {"AGENT_TYPE": "llm", "MAX_VALUE": "50", "CLUSTER_KEY_DIR": "/my keys"}
    assert shell("run_simulation.sh", "10", "1000", "--run-dir", "my runs", **given).stdout == (
        "[--server-per-host][10][--participant-num][1000][--hosts][a][b][--base-port][15000][--moderator-per-host][2]"
        "[--model-per-host][3][--agent-type][llm][--max-value][50][--cluster-key-dir][/my keys][--run-dir][my runs]"
    )
    assert shell("start_all_server.sh", "10", BASE_PORT="15000", HOST_NAME="a", MODERATOR_NUM="2").stdout == (
        "[--role][participant][--server-per-host][10][--base-port][15000][--host-name][a][--moderator-per-host][2]"
    )
    assert (
        "[--model-per-host][2][--vllm-base-port][9]"
        in shell("start_all_server.sh", "10", GPU_NUM="4", TENSOR_PARALLEL="2", VLLM_BASE_PORT="9").stdout
    )
    assert shell("run_simulation.sh", "1", "2").stdout == "[--server-per-host][1][--participant-num][2]"


def test_precedence_is_file_environment_flag(shell):
    env = shell.path / "configs/cluster.env"
    env.write_text('# ours\nBASE_PORT=14000\n\nHOSTS="a b"\nMODERATOR_NUM=6')
    out = shell("run_simulation.sh", "1", "2", "--base-port", "16000", BASE_PORT="15000").stdout
    assert out.endswith("[--hosts][a][b][--base-port][15000][--moderator-per-host][6][--base-port][16000]")
    assert "[--moderator-per-host][3]" in shell("run_simulation.sh", "1", "2", MODERATOR_PER_HOST="3").stdout
    assert "[--base-port][14000]" in shell("start_all_server.sh", "1").stdout


@pytest.mark.parametrize("line", ["BASEPORT=1", "rm -rf /", "BASE_PORT 14000", "export BASE_PORT=1"])
def test_a_mistake_in_the_file_is_named_and_not_run(shell, line):
    (shell.path / "configs/cluster.env").write_text(f"# ours\n{line}\n")
    done = shell("run_simulation.sh", "1", "2")
    assert done.returncode == 2 and "configs/cluster.env, line 2" in one_line(done.stderr)


def fake_python(folder: Path, name: str, version: str, modules: bool) -> str:
    """A program that says it is this Python, with or without the venv module."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(
        f'#!/bin/sh\ncase "$2" in *version_info*) echo {version} ;; *) exit {0 if modules else 1} ;; esac\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_a_python_that_does_not_fit_is_named(shell, tmp_path, version):
    python = fake_python(tmp_path / "bin", "somepython", version, modules=True)
    done = shell("run_simulation.sh", "1", "2", echo=False, PYTHON=python)
    assert done.returncode == 2 and f"is Python {version}: install Python 3.11 or 3.12" in one_line(done.stderr)
    for name in ("python3.12", "python3.11", "python3", "python"):
        fake_python(tmp_path / "bin", name, version, modules=True)
    done = shell("run_simulation.sh", "1", "2", echo=False, PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert done.returncode == 2 and "no Python 3.11 or 3.12 found: install one" in one_line(done.stderr)
    done = shell("run_simulation.sh", "1", "2", echo=False, PYTHON="/no/python")
    assert done.returncode == 2 and "does not run" in one_line(done.stderr)


def test_a_missing_venv_module_is_named(shell, tmp_path):
    python = fake_python(tmp_path / "bin", "python3.11", "3.11", modules=False)
    done = shell("run_simulation.sh", "1", "2", echo=False, PYTHON=python)
    assert done.returncode == 2 and "has no venv module: install it" in one_line(done.stderr)


def test_a_link_to_a_script_is_as_good(shell, tmp_path):
    (tmp_path / "play").symlink_to(shell.path / "run_simulation.sh")
    shell("run_simulation.sh", "1", "2")  # for the environment
    done = subprocess.run([tmp_path / "play", "1", "2"], capture_output=True, text=True, check=True)
    assert done.stdout == "[--server-per-host][1][--participant-num][2]"


def test_constraints_are_exact_and_name_no_index():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 50 and all(line.count("==") == 1 and "/" not in line for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_fresh_clone_installs_itself_and_plays(tmp_path, checkout):
    """What a new user does: clone, one command; a second time nothing is installed; after a change, it is."""
    clone = tmp_path / "fresh clone"
    copy_checkout(clone)
    (clone / ".venv").unlink()
    checkout.path = clone
    first = checkout.run("run_simulation.sh", "2", "100", "--sleep-time", "0", timeout=400)
    assert first.returncode == 0, first.stderr
    assert "installing group run of pyproject.toml" in first.stderr
    assert checkout.summary()["rounds"][0]["answered"] == 100
    second = checkout.run("run_simulation.sh", "2", "100", "--sleep-time", "0")
    assert second.returncode == 0 and "installing" not in second.stderr
    with (clone / "constraints.txt").open("a") as file:
        file.write("\n")
    third = checkout.run("start_all_server.sh", "--status", timeout=400)
    assert third.returncode == 0 and "installing" in third.stderr
