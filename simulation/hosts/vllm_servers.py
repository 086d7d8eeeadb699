"""Commands that start, show and stop the vLLM servers of this host. They know nothing about agents.

The servers run in a separate environment, .venv-vllm, as vLLM and AgentScope need conflicting versions of protobuf.
Files in run/vllm/: `<port>.pid` and `<port>.log` per server.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from simulation.errors import ClusterError, SettingsError
from simulation.files import ROOT, files_in, full_path, is_there, shown
from simulation.hosts import pid_files as processes
from simulation.llm.model_configs import ModelConfig, read_models
from simulation.settings import SimulationConfig

FOLDER = ROOT / "run" / "vllm"
VENV = ROOT / ".venv-vllm"
CACHE = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "large-scale-simulation")  # noqa: PTH111
LINK = CACHE / f"vllm-{hashlib.sha256(os.fsencode(VENV)).hexdigest()[:16]}"  # see _home
HOST = "127.0.0.1"
STARTED, STATUS = ("port", "on", "pid", "model", "ready after"), ("port", "pid", "state")
LOOK_S = 0.5
STOP = "./stop_vllm.sh"
BY_HTTP = "agent servers reach vLLM by HTTP, at its port"
NOT_BY_HAND = {  # flags of vLLM that users must not pass, and the reason
    "--model": "MODEL_PATH sets it",
    "--port": "VLLM_BASE_PORT sets it",
    "--host": "servers listen on the loopback address",
    "--served-model-name": "model_name in configs/model_configs.json sets it",
    "--tensor-parallel-size": "TENSOR_PARALLEL sets it",
    "-tp": "TENSOR_PARALLEL sets it",
    "--config": "flags in a file would not be seen here",
    **dict.fromkeys(("--uds", "--grpc", "--headless", "--ssl-keyfile", "--ssl-certfile"), BY_HTTP),
}
TERM_TIMEOUT_S = 15.0  # vLLM finishes running requests
KV_CACHE_GB = ("VLLM_CPU_KVCACHE_SPACE", "1")  # vLLM's default is nine tenths of the memory, and often fails


@dataclass(frozen=True)
class Plan:
    """One planned vLLM server: its port, its GPUs (empty: the CPU), and the name of its model."""

    port: int
    gpus: tuple[str, ...]
    model: str

    @property
    def place(self) -> str:
        return "CPU" if not self.gpus else "GPU " + ",".join(self.gpus)


def gpus_here() -> tuple[str, ...]:
    """Return the usable GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return visible_gpus(listed.decode(errors="replace"), os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible_gpus(listed: str, visible: str | None) -> tuple[str, ...]:
    """Return the names of the GPUs that CUDA shows to a program.

    CUDA takes numbers or unique prefixes of ids, and no mixture of both. The first name that is no GPU, such as -1 or
    Slurm's NoDevFiles, hides the rest. A GPU that is named twice hides all.

    Args:
        listed: Output of `nvidia-smi -L`: GPUs, and MIG partitions of them on separate lines.
        visible: Value of CUDA_VISIBLE_DEVICES, if it is set.
    """
    count = len(re.findall(r"^GPU \d+:", listed, re.MULTILINE))
    if visible is None:
        return tuple(map(str, range(count)))
    names = [name.strip() for name in visible.split(",")]
    known = re.findall(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)", listed)
    kind = names[0][:4]  # prefix of all ids: GPU- or MIG-
    found: dict[str, str] = {}  # names by the GPU that they denote
    for name in names:
        if kind in ("GPU-", "MIG-"):
            matches = [each for each in known if name.startswith(kind) and each.startswith(name)]
        else:
            matches = [str(int(name))] if re.fullmatch("[0-9]{1,6}", name) and int(name) < count else []
        if len(matches) != 1:
            break
        if matches[0] in found:
            return ()
        found[matches[0]] = name
    return tuple(found.values())


def servers_per_host(config: SimulationConfig) -> int:
    """Return the number of servers per host: one per --tensor-parallel GPUs, or one on the CPU without GPUs."""
    gpus = len(gpus_here()) if config.gpu_num is None else config.gpu_num
    return max(gpus // config.tensor_parallel, 1)


def check_vllm_flags(flags: Iterable[str]) -> None:
    """Raise SettingsError if flags for vLLM include one of NOT_BY_HAND, in any spelling that vLLM accepts."""
    for each in flags:
        said = each.partition("=")[0]
        if said.startswith("--"):
            said = said.partition(".")[0].replace("_", "-")
        for flag, why in NOT_BY_HAND.items():
            if len(said) > said.count("-") and flag.startswith(said):  # vLLM accepts abbreviations, too
                raise SettingsError(f"-- {each}: {flag} cannot be given to vLLM here: {why}")


def plan(config: SimulationConfig, more: Iterable[str] = ()) -> list[Plan]:
    """Return the servers to start, one per --tensor-parallel GPUs; `more` are further flags for vLLM.

    Raises SettingsError if there are too few GPUs, the model does not exist, or users must not pass one of the flags.
    """
    check_vllm_flags(more)
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
    """Return the model name of the server on a port: of the entry with this port, or else of the entry at its index."""
    of_port = (each.model for each in models if each.address.endswith(f":{port}"))
    return next(of_port, models[min(number, len(models) - 1)].model)


def start(config: SimulationConfig, more: list[str], progress: Callable[[int, int, str], None]) -> list[list[str]]:
    """Start the servers and wait until all are healthy; return the cells of STARTED for each.

    Args:
        config: The settings; `model_path` is the model to serve.
        more: Further flags for vLLM.
        progress: Called with the number of ready servers, their total, and a text about the one that is awaited.

    Raises:
        SettingsError: The model does not exist, there are too few GPUs, or users must not pass one of the flags.
        ClusterError: A port is taken, servers run already, or one did not start; no new server is left running.
    """
    plans = plan(config, more)
    model_path = _checked_path(config.model_path)
    home = _home()
    with processes.one_at_a_time():
        FOLDER.mkdir(parents=True, exist_ok=True)
        processes.check_same_host(FOLDER, STOP)
        running = own_servers()  # servers of another model may run on other ports
        ports = sorted(running.keys() & {each.port for each in plans})
        if ports:
            raise ClusterError(
                f"vLLM servers of this checkout are already running on ports {', '.join(map(str, ports))}: {STOP} "
                "stops all of them; another VLLM_BASE_PORT serves another model beside them"
            )
        _end_all(but=running)  # leftovers of killed servers
        for each in plans:
            processes.check_free("localhost", each.port, "VLLM_BASE_PORT")
        started: dict[int, subprocess.Popen[bytes]] = {}
        began = time.monotonic()
        try:
            for each in plans:
                with processes.signals_later():  # a signal before the assignment would leave it running
                    started[each.port] = _spawn(home, each, model_path, more)
            took = {}
            for number, each in enumerate(plans):
                while not _is_healthy(each.port):
                    _refuse_dead(started)
                    waited = f"port {each.port} for {time.monotonic() - began:.0f} s, its log is {_log(each.port)}"
                    progress(number, len(plans), waited)
                    time.sleep(LOOK_S)
                took[each.port] = time.monotonic() - began
        except BaseException:
            with processes.signals_later():  # a second signal would leave servers running
                _end({process.pid for process in started.values()})
                for process in started.values():
                    process.wait()
                for port in started:
                    _pid_file(port).unlink(missing_ok=True)
            raise
    progress(len(plans), len(plans), "")
    return [
        [str(each.port), each.place, str(started[each.port].pid), each.model, f"{took[each.port]:.0f} s"]
        for each in plans
    ]


def stop() -> int:
    """Stop all vLLM servers of this checkout (KILL after TERM_TIMEOUT_S), and return how many were running.

    Raises ClusterError if there may be others that this host cannot see.
    """
    with processes.one_at_a_time():
        running = own_servers()
        _end_all()
        processes.check_same_host(FOLDER, STOP)
        LINK.unlink(missing_ok=True)
    return len(running)


def status() -> tuple[list[list[str]], bool]:
    """Return the cells of STATUS for each vLLM server of this host, and whether all are healthy."""
    running = own_servers()
    ports = sorted(int(path.stem) for path in files_in(FOLDER, ".pid") if path.stem.isdigit())
    states = {port: "healthy" if port in running and _is_healthy(port) else _ailing(port, running) for port in ports}
    rows = [[str(port), str(running[port].pid) if port in running else "-", state] for port, state in states.items()]
    return rows, all(state == "healthy" for state in states.values())


def own_servers() -> dict[int, psutil.Process]:
    """Return the running processes of the pid files, by port."""
    found = {path: processes.live_process(path, _is_server) for path in files_in(FOLDER, ".pid") if path.stem.isdigit()}
    return {int(path.stem): process for path, process in found.items() if process is not None}


def _checked_path(model_path: str | None) -> str:
    """Return the model as vLLM takes it. Raises SettingsError if it is a path but not the folder of a model."""
    if not model_path:
        raise SettingsError("--model-path: set MODEL_PATH to the folder of the model")
    path = Path(full_path("--model-path", model_path))
    if is_there(path, "--model-path"):
        if not is_there(path / "config.json"):
            raise SettingsError(f"--model-path {model_path}: holds no config.json, so it is no model's folder")
        return str(path)
    parts = model_path.split("/")
    if len(parts) != 2 or not all(parts) or parts[0].startswith((".", "~", "$")):  # otherwise it may be a name on a hub
        raise SettingsError(f"--model-path {shown(path)}: there is no such folder")
    return model_path


def _home() -> Path:
    """Return a path of VENV without spaces: vLLM passes it to compilers and to LD_PRELOAD, which break at a space.

    Raises SettingsError if no link without a space can be made.
    """
    if not re.search(r"\s", str(VENV)):
        return VENV
    if re.search(r"\s", str(LINK)) or not LINK.is_absolute():
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
    else:  # the vllm command looks for a package named vllm, but the wheel for CPUs has another name
        command = [str(home / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", model_path]
    command += ["--host", HOST, "--port", str(each.port), "--served-model-name", each.model, *more]
    # VLLM_PORT would be the port between the processes of a server, the same for all servers
    env = {name: value for name, value in os.environ.items() if name != "VLLM_PORT"}
    env["PYTHONSAFEPATH"] = "1"  # otherwise vLLM and its workers would import modules from the current folder
    if each.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(each.gpus)
    else:
        env.setdefault(*KV_CACHE_GB)
    with _log(each.port).open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
        )
    try:
        processes.ProcessId.of(process.pid).write(_pid_file(each.port))
    except OSError:  # without a pid file no command could find it
        process.kill()
        process.wait()
        raise
    return process


def _refuse_dead(started: dict[int, subprocess.Popen[bytes]]) -> None:
    """Raise ClusterError if one of the servers has exited."""
    for port, process in started.items():
        if process.poll() is not None:
            log = _log(port)
            raise ClusterError(f"the vLLM server on port {port} did not start{_cause(log)}{processes.end_of(log)}")


def _cause(log: Path) -> str:
    """Return the first error in the log, which causes the later ones, as one line; empty if there is none."""
    lines = (
        line
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if not re.search(" WARNING | INFO ", line)
    )
    found = (re.search(r"\b[\w.]*Error: .{1,300}", line) for line in lines)
    return next((f": {error.group()}" for error in found if error), "")


def _is_healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this host: use no proxy
    try:
        with opener.open(f"http://{HOST}:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (OSError, ValueError):
        return False


def _ailing(port: int, running: Mapping[int, psutil.Process]) -> str:
    noted = processes.ProcessId.read(_pid_file(port))
    if noted and noted.elsewhere:
        return f"is of {noted.elsewhere}"
    return "runs, but is not healthy" if port in running else f"has ended; its log is {_log(port)}"


def _pid_file(port: int) -> Path:
    return FOLDER / f"{port}.pid"


def _log(port: int) -> Path:
    return FOLDER / f"{port}.log"


def _end_all(but: Mapping[int, psutil.Process] | None = None) -> None:
    """End all servers of the pid files, and leftovers of those that exited, except on the ports in `but`."""
    paths = [path for path in files_in(FOLDER, ".pid") if path.stem not in map(str, but or ())]
    _end({pid for path in paths if (pid := _session_named_by(path)) is not None})
    processes.remove_ended(FOLDER, _is_server)
    for draft in FOLDER.glob("*.pid.new"):  # unused: writers of pid files here hold the lock, as this process does
        draft.unlink(missing_ok=True)


def _session_named_by(path: Path) -> int | None:
    """Return the session id of a pid file's server, running or not; None if another program has the pid."""
    noted = processes.ProcessId.read(path)
    if noted is None or noted.elsewhere:
        return None
    process = noted.process()
    if process is None:
        return None if psutil.pid_exists(noted.pid) else noted.pid
    zombie = _session_of(process) is None
    return noted.pid if zombie or processes.live_process(path, _is_server) is not None else None


def _end(leaders: Collection[int]) -> None:
    """Send TERM to each server, which ends its workers, then KILL to the rest. KILL leftovers of exited servers."""
    sessions = {process: _session_of(process) for process in psutil.process_iter()}
    living = {process.pid for process, session in sessions.items() if session is not None} & set(leaders)
    everyone = [
        process
        for process, session in sessions.items()
        if session in leaders and (session in living or _is_vllm(process))  # an ended one's id may be reused
    ]
    for process in everyone:
        if process.pid in leaders:
            processes.end(process)
        elif sessions[process] not in living:
            processes.end(process, firmly=True)
    _, alive = psutil.wait_procs(everyone, timeout=TERM_TIMEOUT_S)
    for process in alive:
        processes.end(process, firmly=True)
    psutil.wait_procs(alive, timeout=5)


def _session_of(process: psutil.Process) -> int | None:
    """Return the session id of a process; each server leads its session. None if the process has ended."""
    try:
        return os.getsid(process.pid) if process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, OSError):
        return None


def _is_vllm(process: psutil.Process) -> bool:
    """Return whether a process belongs to vLLM."""
    try:
        here = (str(VENV), str(LINK))
        return process.name().startswith("VLLM") or any(part.startswith(here) for part in process.cmdline())
    except psutil.Error:
        return False


def _is_server(process: psutil.Process) -> bool:
    return _is_vllm(process) and _session_of(process) == process.pid
