"""Processes and ports of this host: pid files, logs, own processes, ports in use. It knows nothing about agents.

Files in run/servers/: `<port>.pid`, `<port>.log` and, after a restart, `<port>.restarts` per agent server;
`launcher.pid` and `launcher.log`; `lock`. The first line of a pid file is the pid.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from simulation.errors import ClusterError, SettingsError, reason, say
from simulation.files import ROOT, SERVERS, files_in, lock, read_text
from simulation.rpc.endpoints import address_of

LAUNCHER = "launcher"
TRIES_TO_END = 3
TERM_TIMEOUT_S = 5.0
LOG_LINES_SHOWN = 12
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
PROBE_BYTES = 64 * 1024
DISK_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the lock of this checkout, so that only one process at a time starts or stops servers.

    Raises SettingsError if the lock, or in this context a file of the servers, cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            SERVERS.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((SERVERS / "lock").open("wb"))
            advice = "start and stop servers with one command at a time"
            try:
                lock(file.fileno(), SERVERS, advice, wait=False)
            except BlockingIOError:
                say("waiting for another command that starts or stops servers of this checkout", sys.stderr)
                lock(file.fileno(), SERVERS, advice)
        except OSError as error:
            raise SettingsError(f"cannot write in {SERVERS}: {reason(error)}") from None
        try:
            yield
        except OSError as error:
            inside = error.filename is not None and Path(str(error.filename)).is_relative_to(SERVERS.parent)
            if not inside and error.errno not in DISK_FAILS:
                raise
            raise SettingsError(f"cannot write in {SERVERS.parent}: {reason(error)}") from None


@contextlib.contextmanager
def signals_later() -> Iterator[None]:
    """Defer TERM, HUP and INT signals that arrive in this context until its end."""
    came: list[int] = []
    numbers = [number for number in ENDING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    handlers = {number: signal.signal(number, lambda which, _: came.append(which)) for number in numbers}
    try:
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
        for late in came:
            signal.raise_signal(late)


@dataclass(frozen=True)
class ProcessId:
    """A pid, and the data that distinguishes its process from all others that have or had the same pid.

    It contains no clock time: clocks are set while processes run, and those of two machines differ. Without /proc, and
    in pid files of earlier versions, only the pid is known.

    Attributes:
        pid: The pid.
        host: Name of the host.
        boot: Boot id of the host, in which `namespace` and `start` are valid; empty if only the pid is known.
        namespace: The pid namespace in which the process has this pid.
        start: Clock ticks from the boot to the start of the process.
    """

    pid: int
    host: str = ""
    boot: str = ""
    namespace: str = ""
    start: str = ""

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Identify a process of this host; one that has ended, as long as it is visible."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            namespace = Path("/proc/self/ns/pid").readlink().name.strip("pid:[]")
            start = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()[19].decode()
        except (OSError, IndexError):
            return cls(pid)
        return cls(pid, socket.gethostname(), boot, namespace, start)

    @classmethod
    def read(cls, path: Path) -> ProcessId | None:
        """Read a pid file; return None if it is missing or holds no pid. Raises SettingsError if it is unreadable."""
        try:
            pid, *rest = path.read_text(encoding="utf-8").split()
            parts = rest[0].rsplit(":", 3) if rest else []
            return cls(int(pid), *parts) if len(parts) == 4 else cls(int(pid))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        except OSError as error:
            raise SettingsError(f"cannot read {path}: {reason(error)}") from None

    def write(self, path: Path) -> None:
        """Write a pid file atomically: readers see the old content or the new."""
        draft = path.with_name(f"{path.name}.new")
        # line 2 is one word, and no number: a script that passes the whole file to kill signals no other process
        lines = [str(self.pid), ":".join((self.host, self.boot, self.namespace, self.start))]
        try:
            draft.write_text("".join(f"{line}\n" for line in (lines if self.boot else lines[:1])), encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    @property
    def elsewhere(self) -> str:
        """Return where the process runs, if this host and pid namespace cannot see it; otherwise an empty text."""
        here = ProcessId.of(os.getpid())
        if not self.boot or (self.boot, self.namespace) == (here.boot, here.namespace):
            return ""
        if self.boot == here.boot:
            return "a container or other pid namespace of this host"
        return "" if self.host == socket.gethostname() else f"host {self.host}"  # this host was rebooted

    def process(self) -> psutil.Process | None:
        """Return the process, which may be a zombie; None if it has ended or is not visible from here."""
        try:
            process = psutil.Process(self.pid)
        except (psutil.NoSuchProcess, ValueError):
            return None
        now = ProcessId.of(self.pid)
        same = (self.boot, self.namespace, self.start) == (now.boot, now.namespace, now.start)
        return process if same or not self.boot else None


def live_process(path: Path, is_ours: Callable[[psutil.Process], bool]) -> psutil.Process | None:
    """Return the running process of a pid file; None if it has ended, even if another program has its pid now.

    Args:
        path: The pid file.
        is_ours: Returns whether this checkout starts such a process, judged by its command; called if only the pid is
            known.
    """
    noted = ProcessId.read(path)
    process = noted.process() if noted is not None else None
    try:
        if noted is None or process is None or process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process if noted.boot or is_ours(process) else None
    except psutil.Error:
        return None


def remove_ended(folder: Path, is_ours: Callable[[psutil.Process], bool]) -> None:
    """Remove the pid files of processes that have ended, and no others."""
    for path in files_in(folder, ".pid"):
        noted = ProcessId.read(path)
        if live_process(path, is_ours) is None and not (noted and noted.elsewhere):
            path.unlink(missing_ok=True)


def check_same_host(folder: Path, stop: str) -> None:
    """Raise ClusterError if a pid file names a process that this host cannot see.

    Args:
        folder: Folder of the pid files.
        stop: Command that stops these processes.
    """
    for path in sorted(files_in(folder, ".pid")):
        noted = ProcessId.read(path)
        if noted and noted.elsewhere:
            raise ClusterError(
                f"{path} is of {noted.elsewhere}, whose processes cannot be stopped from here: run {stop} there, or if "
                f"that is gone remove the pid files in {folder}; each host needs a checkout to itself"
            )


def pid_file(name: str) -> Path:
    """Return the pid file of a server, by its port, or of the launcher."""
    return SERVERS / f"{name}.pid"


def remove_drafts() -> None:
    """Remove the drafts of pid files that a killed launcher left; call it with the lock held.

    Only the launcher writes pid files, and it is started with the lock held. If none runs, no draft is in use.
    """
    if own_process(LAUNCHER) is None:
        for draft in SERVERS.glob("*.pid.new"):
            draft.unlink(missing_ok=True)


def check_room() -> None:
    """Raise OSError unless pid files and logs can be written; without them, servers fail and no log has the cause."""
    probe = SERVERS / "probe"
    try:
        probe.write_bytes(os.urandom(PROBE_BYTES))
    finally:
        probe.unlink(missing_ok=True)


def write_restart_count(port: int, count: int) -> None:
    """Record how often a server was restarted."""
    if count == 0:
        (SERVERS / f"{port}.restarts").unlink(missing_ok=True)
    else:
        (SERVERS / f"{port}.restarts").write_text(f"{count}\n", encoding="utf-8")


def restarts(port: int) -> int:
    """Return how often a server was restarted."""
    try:
        return int(read_text(SERVERS / f"{port}.restarts"))
    except (OSError, ValueError):  # never, or the file is being written
        return 0


def remove_pid(name: str, pid: int) -> None:
    """Remove a pid file, unless it now names another process."""
    noted = ProcessId.read(pid_file(name))
    if noted is not None and noted.pid == pid:
        pid_file(name).unlink(missing_ok=True)


def own_process(name: str) -> psutil.Process | None:
    """Return the running process of a server or the launcher; see `live_process`."""
    return live_process(pid_file(name), _is_ours)


def _is_ours(process: psutil.Process) -> bool:
    """Return whether a process is a launcher of this checkout, or one of its servers."""
    seen = process.as_dict(["cmdline", "cwd"])
    command = seen["cmdline"] or []
    launched = "--launch" in command and str(ROOT / "main.py") in command
    spawned = "--multiprocessing-fork" in command and seen["cwd"] == str(ROOT)  # where forking is unsafe
    return launched or spawned


def own_processes() -> dict[str, psutil.Process]:
    """Return all running processes of this checkout's pid files, the launcher first, then the servers by port."""
    ports = sorted(int(path.stem) for path in files_in(SERVERS, ".pid") if path.stem.isdigit())
    names = [LAUNCHER, *map(str, ports)]
    found = {name: own_process(name) for name in names}
    return {name: process for name, process in found.items() if process is not None}


def check_not_owned() -> None:
    """Raise ClusterError if this checkout's servers belong to one run and end with it."""
    launcher = own_process(LAUNCHER)
    if launcher is not None and "--owned" in launcher.cmdline():
        raise ClusterError(
            "another run of this checkout has agent servers of its own, and stops them at its end: wait for it, "
            "or start servers that runs share with ./start_all_server.sh first"
        )


def end(process: psutil.Process, firmly: bool = False) -> None:
    """Send TERM to a process, or KILL if `firmly`. Raises ClusterError if it belongs to another user."""
    try:
        process.kill() if firmly else process.terminate()
    except psutil.NoSuchProcess:
        pass
    except psutil.AccessDenied:
        raise ClusterError(f"process {process.pid} runs as {process.username()}: stop it as that user") from None


def terminate_all() -> int:
    """End the launcher and all servers, by TERM, then KILL after TERM_TIMEOUT_S; return the number of servers."""
    servers: set[str] = set()
    for _ in range(TRIES_TO_END):  # a hanging launcher may have started more servers
        running = own_processes()
        servers |= running.keys() - {LAUNCHER}
        for process in running.values():  # the launcher first: it passes the signal on, and starts no more servers
            end(process)
        _, alive = psutil.wait_procs(running.values(), timeout=TERM_TIMEOUT_S)
        for process in alive:
            end(process, firmly=True)
        psutil.wait_procs(alive, timeout=TERM_TIMEOUT_S)
        if not alive:
            break
    remove_ended(SERVERS, _is_ours)
    remove_drafts()
    return len(servers)


def log_tail(name: str) -> str:
    """Return the log path of a server and the last lines, to complete an error message."""
    return end_of(SERVERS / f"{name}.log")


def end_of(log: Path) -> str:
    """Return the path of a log and its last lines, to complete an error message; empty if there is no log."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    except OSError:
        return ""
    return "".join([f"; the end of its log {log}:", *(f"\n  {line}" for line in lines)]) if lines else ""


def check_free(host_name: str, port: int, setting: str = "BASE_PORT") -> None:
    """Raise ClusterError if another program has the port, SettingsError if this program can never bind it."""
    try:
        address = address_of(host_name)
    except SettingsError as error:
        raise SettingsError(f"--host-name {host_name}: {error}") from None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen()
        except PermissionError:
            raise SettingsError(f"port {port} needs root: choose a {setting} from 1024") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise SettingsError(f"--host-name {host_name}: is not an address of this host") from None
            raise ClusterError(
                f"port {port} of {host_name} is taken by another program: stop it, or choose another {setting}"
            ) from None


def any_port_in_use(ports: range) -> bool:
    """Return whether any process listens on one of the ports, on the loopback address."""
    for port in ports:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
    return False
