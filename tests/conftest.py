"""Real agent servers on loopback, started by the real scripts from a copy of the checkout in a path with a space."""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ.pop("PYTHONSAFEPATH", None)  # which workers are started with, but no command that a test starts

import hypothesis
import psutil
import pyarrow.parquet as pq
import pytest
from own_files import own_files
from xdist.scheduler import LoadScopeScheduling

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: a file random.py there is none of Python's

from simulation.rpc.lean_import import import_agentscope

with warnings.catch_warnings():  # of AgentScope's and its libraries' own, while they are imported
    warnings.simplefilter("ignore")
    import_agentscope()
    import simulation.rpc.client  # noqa: F401

from fake_model import FakeModel
from warm import WarmPopen, WarmPython

from simulation.llm.model_configs import read_models
from simulation.runs.run_spec import RoundEstimate, RunSpec
from simulation.runs.scenario import build_game
from simulation.settings import SimulationConfig

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "tests/data/model_configs.json"  # as shipped: people edit the one in configs

# Property tests draw the same examples every time, however busy the machine is. To look further:
# pytest --hypothesis-profile explore
SLOW = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=SLOW)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=SLOW)
hypothesis.settings.load_profile("same")

# What was started in the background of a shell ignores Ctrl-C, and so would all that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files whose tests share what takes long to make: hosts, a real vLLM server, Chromium and the runs that it shows, the
# agent servers of `cluster`. One worker runs all tests of such a file.
TOGETHER = (
    *("test_vllm.py", "test_experiments.py", "test_recovery.py", "test_cluster.py", "test_participants.py"),
    *("test_hosts.py", "test_report_page.py", "test_mixtures.py", "test_llm.py", "test_dashboard.py"),
    *("test_provenance.py", "test_variants.py", "test_old_runs.py", "test_games.py", "test_answers.py"),
    *("test_failure_detector.py", "test_level_k.py", "test_parameters.py"),
    *("test_security.py", "test_scale.py", "test_texts.py"),
)
# What is started first, as it takes longest: tests, and those files
FIRST = ("test_every_command_runs", "test_user_files_in_the_checkout_are_not_checked", *TOGETHER)
NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # a locale in which Python knows ASCII alone
WARM_SCRIPTS = ("run_simulation.sh", "start_all_server.sh", "stop_all_server.sh")
VLLM_PYTHON = ROOT / ".venv-vllm/bin/python"
VLLM_MEMORY_GB = 5
PATIENCE_S = 90.0
PORTS_IN_BLOCK = 32
_guards: dict[int, socket.socket] = {}  # by the first port of the block that they keep
# The luminance of what is behind an element, and of its text, by WCAG 2
CONTRAST = """element => {
  const parts = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => parts(color).slice(0, 3).map(part => part / 255)
    .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  let behind = element;
  while (behind && parts(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const style = getComputedStyle(element);
  const own = light(element instanceof SVGElement ? style.fill : style.color);
  const other = light(getComputedStyle(behind || document.body).backgroundColor);
  return (Math.max(own, other) + 0.05) / (Math.min(own, other) + 0.05);
}"""


def estimate_of(config: SimulationConfig) -> list[RoundEstimate]:
    """What all rounds of a game with language models would cost."""
    models = read_models(config)
    return RunSpec(config, models, build_game(config, models), Path()).estimate(range(1, config.rounds + 1))


@dataclass
class Checkout:
    """A copy of the project, its scripts, and what they leave."""

    path: Path
    base_port: int
    in_front: tuple[str, ...] = ()  # a command that runs the rest of its line elsewhere
    cold: bool = False  # whether each command is a Python of its own, as for people

    @property
    def model_port(self) -> int:
        """The port of the model server that this checkout's agent servers know."""
        return self.base_port + 20

    @property
    def model_env(self) -> dict[str, str]:
        return {"VLLM_BASE_PORT": str(self.model_port)}

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Start one of the scripts, or main.py, in the background, with this checkout's ports."""
        env = {**os.environ, "BASE_PORT": str(self.base_port), **self.model_env, "COLUMNS": "120"}
        env |= options.pop("env", {})
        program = [str(self.path / command[0]), *command[1:]]
        if command[0].endswith(".py"):
            program = [str(self.path / ".venv/bin/python"), *program]
        elif command[0] in WARM_SCRIPTS and not self.cold and not self.in_front:
            program = self._program_of(program, env)
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": self.path, **options}
        popen = subprocess.Popen if self.cold else WarmPopen
        return popen([*self.in_front, *program], env=env, text=True, start_new_session=True, **options)

    def _program_of(self, script: list[str], env: dict[str, str]) -> list[str]:
        """What a script ends in, once it has run so far; the script itself if it ends before, or says something."""
        with tempfile.NamedTemporaryFile() as recorded:
            recording = env | {"BASH_ENV": str(ROOT / "tests/record_exec.sh"), "RECORDED_EXEC": recorded.name}
            done = subprocess.run(script, env=recording, cwd=self.path, capture_output=True, check=False, timeout=600)
            words = recorded.read().decode().split("\0")[:-1]
        return script if done.stdout or done.stderr else words or script

    def run(self, *command: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run one of them to its end."""
        process = self.start(*command, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"{command} took longer than {timeout} s:\n{process.communicate()}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def play(self, *arguments: str, status: int = 0, **options: Any) -> dict[str, Any]:
        """Play a game, check the exit status, and return summary.json."""
        done = self.run("run_simulation.sh", *arguments, **options)
        assert done.returncode == status, done.stderr
        return self.summary()

    def summary(self, run: Path | None = None) -> dict[str, Any]:
        return json.loads(((run or self.path / "runs/latest") / "summary.json").read_text())

    def answers(self, run: Path | None = None) -> list[dict[str, Any]]:
        return pq.read_table((run or self.path / "runs/latest") / "answers.parquet").to_pylist()

    def values(self) -> list[float | None]:
        return [row["value"] for row in self.answers()]

    def runs(self) -> set[str]:
        return {path.name for path in (self.path / "runs").glob("*")} if (self.path / "runs").exists() else set()

    def processes(self) -> list[psutil.Process]:
        """Everything alive that was started from this checkout."""
        found = []
        for process in psutil.process_iter(["cmdline", "cwd", "status"]):
            places = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
            if any(str(self.path) in part for part in places) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def pid(self, port_offset: int) -> int:
        """The process of an agent server."""
        return self.pid_in(f"servers/{self.base_port + port_offset}")

    def pid_in(self, name: str) -> int:
        """The process of a pid file, such as servers/launcher, as scripts read it: its first line."""
        return int((self.path / f"run/{name}.pid").read_text().splitlines()[0])

    def age_pid_files(self) -> None:
        """Have the pid files look older than their processes, as after a step of the clock."""
        for path in self.path.glob("run/*/*.pid"):
            os.utime(path, (0, 0))


def require_vllm() -> None:
    """Skip where this machine cannot hold vLLM."""
    if not VLLM_PYTHON.exists():
        pytest.skip("no vLLM environment here: ./start_vllm.sh --install could not make one")
    if psutil.virtual_memory().available < VLLM_MEMORY_GB * 2**30:
        pytest.skip(f"vLLM needs {VLLM_MEMORY_GB} GB of memory")


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that are free, below the range that the system hands out.

    They are a test's own until `release_ports`, or until this process ends: the port before them is bound meanwhile,
    so that no other test draws the same ones before its servers start, be it of another run on this machine.
    """
    assert count < PORTS_IN_BLOCK
    for block in random.sample(range(15_000, 32_000, PORTS_IN_BLOCK), 17_000 // PORTS_IN_BLOCK):
        guard = socket.socket()
        try:
            guard.bind(("127.0.0.1", block))
        except OSError:
            guard.close()
            continue
        if all(is_free(port) for port in range(block + 1, block + 1 + count)):
            _guards[block + 1] = guard
            return block + 1
        guard.close()
    raise RuntimeError("no free ports")


def release_ports(first: int) -> None:
    """Let others draw the ports that `free_ports` returned."""
    if first in _guards:
        _guards.pop(first).close()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Wait until a condition holds, and return what it returned.

    The limit only ends a wait that is for ever: a busy machine may take many times as long as an idle one, so it is
    PATIENCE_S at least.
    """
    timeout_s = max(timeout_s, PATIENCE_S)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    pytest.fail(f"not within {timeout_s} s: {what}")


def one_line(stderr: str) -> str:
    """The single line of an error; fails if there is more, or a traceback."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), stderr
    return lines[0]


def copy_checkout(target: Path) -> Path:
    """Copy the program's own files, uncommitted changes included, and lend it this project's environment.

    Settings of the cluster and models that people edit are as they are shipped.
    """
    for name in own_files(uncommitted=True):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    (target / "configs/cluster.env").write_text("")
    shutil.copy2(MODELS, target / "configs")
    for cache in (
        ROOT / "__pycache__",
        *(ROOT / "simulation").rglob("__pycache__"),
        *(ROOT / "games").rglob("__pycache__"),
    ):  # modification times are kept, so it is valid
        if cache.exists():
            shutil.copytree(cache, target / cache.relative_to(ROOT))
    for name in (".venv", ".venv-vllm"):
        (target / name).symlink_to(ROOT / name)
    return target


def drafts_in(folder: Path) -> list[Path]:
    """The half-written files in a checkout: in folders of runs, of runs/latest, and of pid files."""
    return [path for path in folder.rglob("*") if path.name.endswith(".new") or path.match("runs/latest.*")]


def open_again(checkout: Checkout, run: str = "runs/latest") -> None:
    """Open the folder of a run, without playing: to be called where a test has killed the process that wrote there."""
    done = checkout.run("run_simulation.sh", "--resume", run, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert drafts_in(checkout.path) == []


def clean_up(checkout: Checkout) -> None:
    """Fail if the test left a process, a port or a half-written file behind; remove them all the same.

    A killed process may leave drafts; whoever kills one calls `open_again`, or resumes the run.
    """
    _, left = psutil.wait_procs(checkout.processes(), timeout=10)  # some may be about to end
    names = [" ".join(process.info["cmdline"] or [])[-150:] for process in left]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(left, timeout=PATIENCE_S)
    assert not names, f"left running: {names}"
    taken = [port for port in range(checkout.base_port, checkout.base_port + 24) if not is_free(port)]
    assert not taken, f"ports still taken: {taken}"
    release_ports(checkout.base_port)
    assert not drafts_in(checkout.path), f"half-written files: {drafts_in(checkout.path)}"


def pytest_configure(config: pytest.Config) -> None:
    """Compile the program once, for all copies of the checkout: where Python writes no bytecode, too."""
    if not hasattr(config, "workerinput"):
        for path in (ROOT / "simulation", ROOT / "games", ROOT / "moderator.py", ROOT / "participant.py"):
            compileall.compile_dir(path, quiet=2) if path.is_dir() else compileall.compile_file(path, quiet=2)


def pytest_unconfigure() -> None:
    for first in list(_guards):
        release_ports(first)


class _ByTest(LoadScopeScheduling):
    """Gives each worker the next test, or all tests of a file in TOGETHER."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if Path(file).name in TOGETHER else nodeid


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is left with it at the end."""
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: min(place.get(name, len(FIRST)) for name in (item.path.name, item.name.split("[")[0])))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Start workers that import nothing from the current folder."""
    os.environ["PYTHONSAFEPATH"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByTest:
    config.option.loadscopereorder = False  # the order of FIRST, not that of the number of tests
    return _ByTest(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Where changes are checked, a test that is skipped has failed."""
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session", autouse=True)
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """What forks the commands of this worker's tests, so that they need not import libraries (tests/warm.py)."""
    with WarmPython(tmp_path_factory.mktemp("warm")) as made:
        yield made


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    """A checkout of one test's own, with nothing running."""
    own = Checkout(copy_checkout(tmp_path / "a b"), free_ports(24))
    yield own
    clean_up(own)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A checkout whose 3 + 4 agent servers run for all tests of a module."""
    own = Checkout(copy_checkout(tmp_path_factory.mktemp("cluster") / "a b"), free_ports(24))
    started = own.run("start_all_server.sh", "3")
    assert started.returncode == 0, started.stderr
    yield own
    stopped = own.run("stop_all_server.sh")
    assert stopped.returncode == 0, stopped.stderr
    clean_up(own)


@pytest.fixture
def fake(cluster: Checkout) -> Iterator[FakeModel]:
    """A model server at the address that the cluster's agent servers know."""
    with contextlib.closing(FakeModel(port=cluster.model_port)) as server:
        yield server


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Call the command line in this process, with a key of its own; returns the status and what it wrote on stderr."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    from loguru import logger

    import main

    monkeypatch.setattr("simulation.results.run_directory.LATEST", tmp_path / "runs/latest")

    def call(*arguments: object) -> tuple[int, str]:
        key = [] if {"report", "vllm"} & set(arguments) else ["--cluster-key-dir", str(tmp_path / "key")]
        status = main.main([*key, *map(str, arguments)])
        return status, capsys.readouterr().err

    yield call
    logger.remove()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, for all tests of a module (Playwright's synchronous Browser)."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # as root
        yield made
        made.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page of its own; fails if its scripts did, or if it wrote an error to the console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    made = context.new_page()
    errors: list[str] = []
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield made
    context.close()
    assert not errors, errors


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Four hosts, and an untrusted one on their switch, with nothing running, for the tests of a module (hosts.py)."""
    from hosts import network_of

    with network_of(tmp_path_factory.mktemp("network")) as made:
        yield made


@pytest.fixture(scope="module")
def hosts(network: Any) -> Any:
    """The same with 4 + 1 agent servers on each of the four hosts; whoever stops or kills some starts them again."""
    network.start_servers()
    return network
