"""The vLLM servers of this host: start, show and stop them. It knows nothing of agents.

They run in an environment of their own, .venv-vllm, as vLLM and AgentScope need protobufs that exclude each other.
Files in run/vllm/: `<port>.pid` and `<port>.log` per server.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from simulation import processes
from simulation.config import ROOT, SimulationConfig
from simulation.errors import ClusterError, SettingsError
from simulation.model_configs import ModelConfig, read_models

FOLDER = ROOT / "run" / "vllm"
VENV = ROOT / ".venv-vllm"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "large-scale-simulation"
LINK = CACHE / f"vllm-{hashlib.sha256(str(VENV).encode()).hexdigest()[:16]}"  # see _home
HOST = "127.0.0.1"
LOOK_S = 0.5
TERM_TIMEOUT_S = 15.0  # vLLM finishes what it has begun
KV_CACHE_GB = ("VLLM_CPU_KVCACHE_SPACE", "1")  # vLLM's own default is nine tenths of the memory, and often fails


@dataclass(frozen=True)
class Plan:
    """One vLLM server: its port, its GPUs (none is the CPU), and the name of its model."""

    port: int
    gpus: tuple[str, ...]
    model: str

    @property
    def place(self) -> str:
        return "CPU" if not self.gpus else "GPU " + ",".join(self.gpus)


def gpus_here() -> tuple[str, ...]:
    """The GPUs of this machine that we may use, as CUDA_VISIBLE_DEVICES names them."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    found = [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(found)
    names = [name.strip() for name in visible.split(",")] if found else []
    return tuple(itertools.takewhile(lambda name: name and not name.startswith("-"), names))  # -1 hides the rest


def plan(config: SimulationConfig) -> list[Plan]:
    """The servers to start, one per GPU or per --tensor-parallel GPUs.

    Raises SettingsError if there are too few GPUs, or there is no such model.
    """
    _checked_path(config.model_path)
    here = gpus_here()
    wanted = len(here) if config.gpu_num is None else config.gpu_num
    each = config.tensor_parallel
    if wanted > len(here):
        raise SettingsError(
            f"--gpu-num {wanted}: this machine has {len(here)} GPUs; GPU_NUM=0 is one server on the CPU"
        )
    if wanted and wanted % each:
        raise SettingsError(f"--tensor-parallel {each}: {wanted} GPUs cannot be split into servers with {each} each")
    if not wanted and each > 1:
        raise SettingsError(f"--tensor-parallel {each}: there is no GPU here to split a model over; leave it at 1")
    shares = [here[first : first + each] for first in range(0, wanted, each)] or [()]
    models = list(read_models(config).values())
    if config.vllm_base_port + len(shares) - 1 > 65_535:
        raise SettingsError(
            f"--vllm-base-port {config.vllm_base_port}: {len(shares)} servers would end beyond port 65535"
        )
    return [
        Plan(config.vllm_base_port + number, gpus, _served(models, config.vllm_base_port + number, number))
        for number, gpus in enumerate(shares)
    ]


def _served(models: list[ModelConfig], port: int, number: int) -> str:
    """What the server on a port calls its model: as the entry with this port says, or else the one at its place."""
    of_port = (each.model for each in models if each.address.endswith(f":{port}"))
    return next(of_port, models[min(number, len(models) - 1)].model)


def start(config: SimulationConfig, more: list[str], progress: Callable[[int, int], None]) -> list[str]:
    """Start the servers and return when every one is healthy: a row for each.

    Args:
        config: The settings; `model_path` is what they serve.
        more: Further flags for vLLM.
        progress: Called with how many are ready, of how many.

    Raises:
        SettingsError: There is no such model, or too few GPUs.
        ClusterError: A port is taken, servers run already, or one did not start; nothing is left running.
    """
    plans = plan(config)
    model_path = _checked_path(config.model_path)
    home = _home()
    with processes.one_at_a_time():
        FOLDER.mkdir(parents=True, exist_ok=True)
        running = own_servers()  # those of another model, on other ports, may
        ports = sorted(running.keys() & {each.port for each in plans})
        if ports:
            raise ClusterError(
                f"vLLM servers of this checkout run already, on ports {', '.join(map(str, ports))}: ./stop_vllm.sh "
                "stops all of them; another VLLM_BASE_PORT serves another model beside them"
            )
        _end_all(but=running)  # what servers that were killed have left
        for each in plans:
            processes.check_free("localhost", each.port, "VLLM_BASE_PORT")
        started: dict[int, subprocess.Popen[bytes]] = {}
        began = time.monotonic()
        try:
            for each in plans:
                started[each.port] = _spawn(home, each, model_path, more)
            took = {}
            for number, each in enumerate(plans):
                progress(number, len(plans))
                _wait_healthy(each.port, started, lambda number=number: progress(number, len(plans)))  # type: ignore[misc]
                took[each.port] = time.monotonic() - began
        except BaseException:
            _end([process.pid for process in started.values()])
            for process in started.values():
                process.wait()
            for port in started:
                _pid_file(port).unlink(missing_ok=True)
            raise
    progress(len(plans), len(plans))
    row = "{:>6}  {:<10}  {:>8}  {:<30}  {}".format
    return [row("port", "on", "pid", "model", "ready after")] + [
        row(each.port, each.place, started[each.port].pid, each.model, f"{took[each.port]:.0f} s") for each in plans
    ]


def stop() -> int:
    """Stop all vLLM servers of this checkout, firmly after TERM_TIMEOUT_S; returns how many ran."""
    with processes.one_at_a_time():
        running = own_servers()
        _end_all()
        LINK.unlink(missing_ok=True)
    return len(running)


def status() -> tuple[list[str], bool]:
    """A row per vLLM server of this host, and whether all are healthy."""
    row = "{:>6}  {:>8}  {}".format
    running = own_servers()
    ports = sorted(int(path.stem) for path in FOLDER.glob("*.pid") if path.stem.isdigit())
    states = {port: "healthy" if port in running and _is_healthy(port) else _ailing(port, running) for port in ports}
    rows = [row(port, running[port].pid if port in running else "-", state) for port, state in states.items()]
    return ([row("port", "pid", "state"), *rows] if rows else []), all(state == "healthy" for state in states.values())


def own_servers() -> dict[int, psutil.Process]:
    """The live processes of our pid files, by port."""
    found = {}
    for path in FOLDER.glob("*.pid"):
        process = _own_process(path)
        if process is not None and path.stem.isdigit():
            found[int(path.stem)] = process
    return found


def _own_process(path: Path) -> psutil.Process | None:
    """The live process that a pid file names; None if it has ended, even if its pid is another program's now."""
    try:
        written = path.stat().st_mtime
        process = psutil.Process(int(path.read_text()))
        ours = _session_of(process) == process.pid
        return process if ours and process.create_time() <= written + 1 else None
    except (FileNotFoundError, ValueError, psutil.Error):
        return None


def _checked_path(model_path: str | None) -> str:
    """The model as vLLM takes it. Raises SettingsError if it is a path to nothing."""
    if not model_path:
        raise SettingsError("--model-path: set MODEL_PATH to the folder of the model")
    path = Path(model_path).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise SettingsError(f"--model-path {model_path}: holds no config.json, so it is no model's folder")
        return str(path.absolute())
    parts = model_path.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):  # else it may be the name of one on a hub
        raise SettingsError(f"--model-path {model_path}: there is no such folder")
    return model_path


def _home() -> Path:
    """Where vLLM is run from: it hands its own path to compilers and to LD_PRELOAD, which break at a space.

    Raises SettingsError if there is no place for a link without one.
    """
    if not re.search(r"\s", str(VENV)):
        return VENV
    if re.search(r"\s", str(LINK)):
        raise SettingsError(
            f"vLLM does not run from a path with a space: move {ROOT}, or set XDG_CACHE_HOME to one without"
        )
    try:
        LINK.parent.mkdir(parents=True, exist_ok=True)
        if not (LINK.is_symlink() and LINK.readlink() == VENV):
            LINK.unlink(missing_ok=True)
            LINK.symlink_to(VENV)
    except OSError as error:
        raise SettingsError(f"cannot make the link {LINK} to {VENV}: {error.strerror}") from None
    return LINK


def _spawn(home: Path, each: Plan, model_path: str, more: list[str]) -> subprocess.Popen[bytes]:
    if each.gpus:
        command = [str(home / "bin/python"), str(home / "bin/vllm"), "serve", model_path]
        command += ["--tensor-parallel-size", str(len(each.gpus))] if len(each.gpus) > 1 else []
    else:  # the command looks for a package vllm, which the wheel for CPUs does not call itself
        command = [str(home / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", model_path]
    command += ["--host", HOST, "--port", str(each.port), "--served-model-name", each.model, *more]
    # VLLM_PORT would be a port between vLLM's own processes, the same for all servers
    env = {name: value for name, value in os.environ.items() if name != "VLLM_PORT"}
    env["PYTHONSAFEPATH"] = "1"  # else vLLM and its workers would import what lies in the current folder
    if each.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(each.gpus)
    else:
        env.setdefault(*KV_CACHE_GB)
    with (FOLDER / f"{each.port}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
        )
    _pid_file(each.port).write_text(f"{process.pid}\n")
    return process


def _wait_healthy(port: int, started: dict[int, subprocess.Popen[bytes]], waiting: Callable[[], None]) -> None:
    """Return when the server is healthy; raise ClusterError when one of them has died."""
    while not _is_healthy(port):
        for other, process in started.items():
            if process.poll() is not None:
                log = FOLDER / f"{other}.log"
                raise ClusterError(f"the vLLM server on port {other} did not start{_cause(log)}{processes.end_of(log)}")
        waiting()
        time.sleep(LOOK_S)


def _cause(log: Path) -> str:
    """The first error that vLLM wrote about, which the later ones come of; in one line."""
    lines = (line for line in log.read_text(errors="replace").splitlines() if not re.search(" WARNING | INFO ", line))
    found = (re.search(r"\b[\w.]*Error: .{1,300}", line) for line in lines)
    return next((f": {error.group()}" for error in found if error), "")


def _is_healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy between us and this host
    try:
        with opener.open(f"http://{HOST}:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (OSError, ValueError):
        return False


def _ailing(port: int, running: dict[int, psutil.Process]) -> str:
    return "runs, but is not healthy" if port in running else f"has ended; its log is {FOLDER / f'{port}.log'}"


def _pid_file(port: int) -> Path:
    return FOLDER / f"{port}.pid"


def _end_all(but: Mapping[int, psutil.Process] | None = None) -> None:
    """End all servers of our pid files, and what those that died have left, but for those on some ports."""
    paths = [path for path in FOLDER.glob("*.pid") if path.stem not in map(str, but or ())]
    _end([int(path.read_text()) for path in paths if path.read_text().strip().isdigit()])
    for path in paths:
        path.unlink(missing_ok=True)


def _end(leaders: list[int]) -> None:
    """TERM to each server, which ends its workers; KILL to what is left of its session, at once where it is dead."""
    everyone = [process for process in psutil.process_iter() if _session_of(process) in leaders]
    living = {_session_of(process) for process in everyone if process.pid in leaders}
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid in leaders:
                process.terminate()
            elif _session_of(process) not in living:
                process.kill()
    _, alive = psutil.wait_procs(everyone, timeout=TERM_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def _session_of(process: psutil.Process) -> int | None:
    """The server that a process of vLLM belongs to: each is the leader of a session; None for any other process."""
    try:
        vllm = process.name().startswith("VLLM") or any(
            part.startswith((str(VENV), str(LINK))) for part in process.cmdline()
        )
        return os.getsid(process.pid) if vllm and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, OSError):
        return None
