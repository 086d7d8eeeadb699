"""Starting, stopping and checking the vLLM servers of this host."""

import contextlib
import hashlib
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

from simulation.errors import ClusterError, SettingsError, listed, one_line
from simulation.files import CODE, HOME, full_path, is_there, shown
from simulation.hosts.pid_files import ServerProcesses, one_at_a_time
from simulation.llm.model_configs import REPEATABLE, read_models
from simulation.settings import SimulationConfig

VENV = CODE / ".venv-vllm"  # separate, because vLLM and AgentScope need different versions of protobuf
CACHE = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "large-scale-simulation")  # noqa: PTH111
LINK = CACHE / f"vllm-{hashlib.sha256(os.fsencode(VENV)).hexdigest()[:16]}"  # used by _venv_without_spaces
HOST = "127.0.0.1"
STARTED, STATUS = ("port", "on", "pid", "model", "ready after"), ("port", "pid", "state")
LOOK_S = 0.5
BY_HTTP = "agent servers reach vLLM by HTTP, at its port"
RESERVED_FLAGS = {  # flags of vLLM that users must not give, and the reasons
    "--model": "MODEL_PATH sets it",
    "--port": "VLLM_BASE_PORT sets it",
    "--host": "servers listen on the loopback address",
    "--served-model-name": "model_name in configs/model_configs.json sets it",
    "--tensor-parallel-size": "TENSOR_PARALLEL sets it",
    "-tp": "TENSOR_PARALLEL sets it",
    "--config": "flags in a file would not be seen here",
    **dict.fromkeys(("--uds", "--grpc", "--headless", "--ssl-keyfile", "--ssl-certfile"), BY_HTTP),
}
REPEATABLE_ON_CPUS = ["--dtype", "float32", "--no-enable-chunked-prefill"]  # a split prompt with a seed ends the server
FIXED_BY_REPEATABLE = dict.fromkeys((*REPEATABLE_ON_CPUS[::2], "--enable-chunked-prefill"), "--repeatable sets it")
BLOCK_SIZE = "--block-size"
CPU_BLOCK = [BLOCK_SIZE, "32"]  # vLLM's default on CPUs is 128 tokens, and shorter prompts are never cached
LEAST_CAPABILITY = 8.0  # of GPUs, for answers that do not depend on the other requests of a batch
TERM_TIMEOUT_S = 15.0  # within this time, vLLM finishes running requests
KV_CACHE_GB = ("VLLM_CPU_KVCACHE_SPACE", "1")  # vLLM's default, nine tenths of the memory, often fails


def _is_vllm(process: psutil.Process) -> bool:
    """Return whether a process belongs to a vLLM server."""
    with contextlib.suppress(psutil.Error):
        here = (str(VENV), str(LINK))
        return process.name().startswith("VLLM") or any(part.startswith(here) for part in process.cmdline())
    return False


SERVERS = ServerProcesses("vLLM server", HOME / "run" / "vllm", "./stop_vllm.sh", TERM_TIMEOUT_S, _is_vllm)


class Plan(NamedTuple):
    """A vLLM server to be started. Without `gpus`, it uses the CPU. `model` is the name of its model for clients."""

    port: int
    gpus: tuple[str, ...]
    model: str

    @property
    def place(self) -> str:
        return "CPU" if not self.gpus else "GPU " + ",".join(self.gpus)


def _nvidia_smi(*arguments: str) -> str:
    command = ["nvidia-smi", *arguments]
    return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode(errors="replace")


def gpus_here() -> tuple[str, ...]:
    """Return the usable GPUs of this host, in the notation of CUDA_VISIBLE_DEVICES."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return visible_gpus(_nvidia_smi("-L"), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return ()


def visible_gpus(nvidia_smi: str, visible: str | None) -> tuple[str, ...]:
    """Return the GPUs that CUDA makes available: from the output of `nvidia-smi -L`, and CUDA_VISIBLE_DEVICES, if set.

    CUDA accepts either numbers or unique prefixes of ids. It ignores the first name that is not a GPU, such as -1 or
    Slurm's NoDevFiles, and all names after it. If a GPU is named twice, no GPU is available.
    """
    numbers = [str(number) for number in range(len(re.findall(r"^GPU \d+:", nvidia_smi, re.MULTILINE)))]
    if visible is None:
        return tuple(numbers)
    kind = visible.strip()[:4]  # all ids start with GPU- or MIG-
    ids = re.findall(rf"\(UUID: ({kind}[^)]+)\)", nvidia_smi) if kind in ("GPU-", "MIG-") else []
    found: dict[str, str] = {}  # by GPU: the name given for it
    for name in map(str.strip, visible.split(",")):
        matches = [each for each in ids if name and each.startswith(name)] if ids else [*({name} & {*numbers})]
        if len(matches) != 1:
            break
        if matches[0] in found:
            return ()
        found[matches[0]] = name
    return tuple(found.values())


def least_capability() -> float:
    """Return the lowest compute capability of this host's GPUs. Raises SettingsError if it is unknown."""
    try:
        return min(map(float, _nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader").split()))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        cause = f"nvidia-smi does not state the compute capability of the GPUs: {one_line(error)}"
        raise SettingsError(f"--repeatable: {cause}; leave it out, or set GPU_NUM=0") from None


def servers_per_host(config: SimulationConfig) -> int:
    """Return the number of vLLM servers on this host: GPUs to use / --tensor-parallel, rounded down, but at least 1."""
    gpus = len(gpus_here()) if config.gpu_num is None else config.gpu_num
    return max(gpus // config.tensor_parallel, 1)


def _name_of(flag: str) -> str:
    name = flag.partition("=")[0]
    return name.partition(".")[0].replace("_", "-") if name.startswith("--") else name


def check_vllm_flags(flags: Iterable[str], repeatable: bool = False) -> None:
    """Raise SettingsError if one of the flags for vLLM is set by this program, in any spelling that vLLM accepts."""
    reserved = RESERVED_FLAGS | (FIXED_BY_REPEATABLE if repeatable else {})
    for each in flags:
        name = _name_of(each)
        for flag in (flag for flag in reserved if name.strip("-") and flag.startswith(name)):  # or an abbreviation
            raise SettingsError(f"-- {each}: {flag} cannot be given to vLLM here: {reserved[flag]}")


def plan(config: SimulationConfig, more: Iterable[str] = ()) -> list[Plan]:
    """Return the servers to start. `more` contains flags for vLLM. Raises SettingsError if that is impossible here."""
    check_vllm_flags(more, config.repeatable)
    _checked_path(config.model_path)
    here, each = gpus_here(), config.tensor_parallel
    wanted = len(here) if config.gpu_num is None else config.gpu_num
    ports = range(config.vllm_base_port, config.vllm_base_port + max(wanted // each, 1))
    if wanted > len(here):
        available = f"this machine has {len(here)} GPUs; GPU_NUM=0 is one server on the CPU"
        raise SettingsError(f"--gpu-num {wanted}: {available}")
    if wanted % each:
        raise SettingsError(f"--tensor-parallel {each}: {wanted} GPUs cannot be split into servers with {each} each")
    if not wanted and each > 1:
        raise SettingsError(f"--tensor-parallel {each}: there is no GPU here to split a model over; leave it at 1")
    if config.repeatable and wanted and (capability := least_capability()) < LEAST_CAPABILITY:
        needed = f"needs GPUs of compute capability {LEAST_CAPABILITY} or more, and this machine's have {capability}"
        raise SettingsError(f"--repeatable: {needed}; leave it out, or set GPU_NUM=0")
    if ports[-1] > 65_535:
        raise SettingsError(f"--vllm-base-port {ports[0]}: {len(ports)} servers would end beyond port 65535")
    models, plans = list(read_models(config).values()), []
    for index, port in enumerate(ports):
        of_port = (model.model for model in models if urlsplit(model.base_url).port == port)
        gpus = here[:wanted][index * each : (index + 1) * each]
        plans.append(Plan(port, gpus, next(of_port, models[min(index, len(models) - 1)].model)))
    return plans


def start(config: SimulationConfig, more: list[str], progress: Callable[[int, int, str], None]) -> list[list[str]]:
    """Start all servers, or none. Return table rows (STARTED names the columns). `more` contains flags for vLLM."""
    plans, venv = plan(config, more), _venv_without_spaces()
    ports = [each.port for each in plans]
    with one_at_a_time():
        # servers with another model may run on other ports
        if taken := [name for name in SERVERS.running() if int(name) in ports]:
            raise ClusterError(
                f"vLLM servers of this checkout are already running on ports {listed(taken)}: {SERVERS.stop_command} "
                "stops all of them; another VLLM_BASE_PORT serves another model beside them"
            )
        with SERVERS.starting("localhost", ports, "VLLM_BASE_PORT"):
            for each in plans:
                _spawn(venv, each, config, more)
            waited = SERVERS.wait_until_ready(ports, _is_healthy, progress)
    return [
        [str(each.port), each.place, str(SERVERS.noted(each.port).pid), each.model, f"{ready_s:.0f} s"]
        for each, ready_s in zip(plans, waited, strict=True)
    ]


def stop() -> int:
    """Stop all vLLM servers of this checkout. Return how many servers were running (see ServerProcesses.stop)."""
    stopped = SERVERS.stop()
    LINK.unlink(missing_ok=True)
    return stopped


def status(_config: SimulationConfig) -> tuple[list[list[str]], bool]:
    """Return table rows (STATUS names the columns), and whether all vLLM servers of this host are healthy."""
    rows = []
    for name in SERVERS.names():
        process, state = SERVERS.process(name), f"has ended; its log is {SERVERS.log(name)}"
        if where := SERVERS.noted(name).elsewhere:
            state = f"is of {where}"
        elif process is not None:
            state = "healthy" if _is_healthy(int(name)) else "runs, but is not healthy"
        rows.append([name, "-" if process is None else str(process.pid), state])
    return rows, all(state == "healthy" for *_, state in rows)


def _checked_path(model_path: str | None) -> str:
    """Return vLLM's argument for the model: a folder, or a name on a hub. Raises SettingsError if it is neither."""
    if not model_path:
        raise SettingsError("--model-path: set MODEL_PATH to the folder of the model")
    path = Path(full_path("--model-path", model_path))
    if is_there(path / "config.json", "--model-path"):
        return str(path)
    if is_there(path):
        raise SettingsError(f"--model-path {model_path}: holds no config.json, so it is no model's folder")
    if not re.fullmatch("[^/.~$][^/]*/[^/]+", model_path):  # not the name of a model on a hub
        raise SettingsError(f"--model-path {shown(path)}: there is no such folder")
    return model_path


def _venv_without_spaces() -> Path:
    """Return VENV or, as compilers split a path at a space, a link to it. Raises SettingsError if both have one."""
    if not re.search(r"\s", str(VENV)):
        return VENV
    if re.search(r"\s", str(LINK)) or not LINK.is_absolute():
        advice = f"move {CODE}, or set XDG_CACHE_HOME to one without"
        raise SettingsError(f"vLLM does not run from a path with a space: {advice}")
    try:
        LINK.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # the name of the link depends on VENV, so the link is correct
            LINK.symlink_to(VENV)
    except OSError as error:
        raise SettingsError(f"cannot make the link {LINK} to {VENV}: {error.strerror}") from None
    return LINK


def _spawn(venv: Path, each: Plan, config: SimulationConfig, more: list[str]) -> None:
    # Remove VLLM_PORT, the port for connections between a server's processes: several servers cannot share one port
    env = {name: value for name, value in os.environ.items() if name != "VLLM_PORT"}
    env["PYTHONSAFEPATH"] = "1"  # do not import modules from the current folder
    model_path = _checked_path(config.model_path)
    names = [each.model, *([each.model + REPEATABLE] if config.repeatable else [])]
    if each.gpus:
        command = [str(venv / "bin/python"), str(venv / "bin/vllm"), "serve", model_path]
        command += ["--tensor-parallel-size", str(len(each.gpus))] if len(each.gpus) > 1 else []
        env["CUDA_VISIBLE_DEVICES"] = ",".join(each.gpus)
        env |= {"VLLM_BATCH_INVARIANT": "1"} if config.repeatable else {}
    else:  # the vllm command requires the package vllm, but the CPU wheel has another name
        command = [str(venv / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", model_path]
        command += CPU_BLOCK if BLOCK_SIZE not in map(_name_of, more) else []
        command += REPEATABLE_ON_CPUS if config.repeatable else []
        env.setdefault(*KV_CACHE_GB)
    command += ["--host", HOST, "--port", str(each.port), "--served-model-name", *names, *more]
    SERVERS.spawn(each.port, command, stdin=subprocess.DEVNULL, env=env)


def _is_healthy(port: int) -> bool:
    """Return whether the server on `port` is ready. If it is not ready, wait LOOK_S seconds before returning."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: the server is on this host
    with contextlib.suppress(OSError, ValueError), opener.open(f"http://{HOST}:{port}/health", timeout=5) as reply:
        if reply.status == 200:
            return True
    time.sleep(LOOK_S)
    return False
