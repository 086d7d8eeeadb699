"""Server processes of this host: start, readiness, pid files, logs, stop, ports in use. It knows nothing about agents.

A folder of one kind of server holds `<name>.pid`, with the pid in its first line, and `<name>.log`.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from simulation.errors import ClusterError, SettingsError, reason, say
from simulation.files import ROOT, SERVERS, files_in, is_there, lock
from simulation.rpc.endpoints import address_of

LAUNCHER = "launcher"  # the name of the process that starts the agent servers; all others are named by their port
TRIES_TO_END = 3
KILL_TIMEOUT_S = 5.0
LOG_LINES_SHOWN = 12
PROBE_BYTES = 64 * 1024
HARMLESS = " WARNING | INFO "  # lines of a log that are no errors
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
DISK_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the lock on starting and stopping servers. Raises SettingsError if a file of them cannot be written."""
    advice = "start and stop servers with one command at a time"
    try:
        SERVERS.mkdir(parents=True, exist_ok=True)
        with (SERVERS / "lock").open("wb") as file:
            try:
                lock(file.fileno(), SERVERS, advice, wait=False)
            except BlockingIOError:
                say("waiting for another command that starts or stops servers of this checkout", sys.stderr)
                lock(file.fileno(), SERVERS, advice)
            yield
    except OSError as error:
        path = Path(str(error.filename or "/"))
        if not path.is_relative_to(SERVERS.parent) and error.errno not in DISK_FAILS:
            raise
        raise SettingsError(f"cannot write in {SERVERS}: {reason(error)}") from None


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
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
    """A pid, and what distinguishes its process from others with that pid: no clock time, as clocks are set."""

    pid: int
    host: str = field(default="", compare=False)
    boot: str = ""  # boot id of the host; empty if only the pid is known: without /proc, or from earlier versions
    namespace: str = ""  # the pid namespace in which the process has this pid
    start: str = ""  # clock ticks from the boot to the start of the process
    restarts: int = field(default=0, compare=False)  # how often its server was restarted

    @classmethod
    def of(cls, pid: int, restarts: int = 0) -> ProcessId:
        """Identify a process of this host; one that has ended, as long as it is visible."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            namespace = Path("/proc/self/ns/pid").readlink().name.strip("pid:[]")
            start = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()[19].decode()
        except (OSError, IndexError):
            return cls(pid, restarts=restarts)
        return cls(pid, socket.gethostname(), boot, namespace, start, restarts)

    @classmethod
    def read(cls, path: Path) -> ProcessId:
        """Read a pid file; return pid -1 if it is missing or holds none. Raises SettingsError if it is unreadable."""
        try:
            words = path.read_text(encoding="utf-8").split()
            pid, identity, restarts = words + ["", ":::", "restarts=0"][len(words) :]
            host, boot, namespace, start = identity.rsplit(":", 3)
            return cls(int(pid), host, boot, namespace, start, int(restarts.partition("=")[2]))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return cls(-1)
        except OSError as error:
            raise SettingsError(f"cannot read {path}: {reason(error)}") from None

    def write(self, path: Path) -> None:
        """Write a pid file atomically: readers see the old content or the new."""
        # lines 2 and 3 are no numbers: a script that passes the whole file to kill signals no other process
        identity = ":".join((self.host, self.boot, self.namespace, self.start))
        draft = path.with_name(f"{path.name}.new")
        try:
            draft.write_text(f"{self.pid}\n{identity}\nrestarts={self.restarts}\n", encoding="utf-8")
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


@dataclass
class ServerProcesses:
    """The processes of one kind of server, by name: a port, or LAUNCHER."""

    kind: str  # in messages
    folder: Path  # of their pid files and logs
    stop_command: str
    term_timeout_s: float  # how long they may take to end after TERM (s)
    is_ours: Callable[[psutil.Process], bool]  # judges by the command, if only the pid or the session is known
    _spawned: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def pid_file(self, name: str) -> Path:
        return self.folder / f"{name}.pid"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def noted(self, name: str) -> ProcessId:
        return ProcessId.read(self.pid_file(name))

    def remove(self, name: str, pid: int) -> None:
        """Remove a pid file, unless it now names another process."""
        if self.noted(name).pid == pid:
            self.pid_file(name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Return the names of all pid files, the launcher first, then the servers by port."""
        stems = [path.stem for path in files_in(self.folder, ".pid")]
        ports = sorted(int(stem) for stem in stems if stem.isdigit())
        return [*([LAUNCHER] if LAUNCHER in stems else []), *map(str, ports)]

    def process(self, name: str) -> psutil.Process | None:
        """Return the running process of a pid file; None if it has ended, even if another program has its pid now."""
        noted = self.noted(name)
        try:
            process = psutil.Process(noted.pid)
            same = noted == ProcessId.of(noted.pid) if noted.boot else self.is_ours(process)
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.Error, ValueError):
            return None

    def running(self) -> dict[str, psutil.Process]:
        """Return the running processes of all pid files, in the order of `names`."""
        return {name: process for name in self.names() if (process := self.process(name)) is not None}

    def check_same_host(self) -> None:
        """Raise ClusterError if a pid file names a process that this host cannot see."""
        for name in self.names():
            if where := self.noted(name).elsewhere:
                raise ClusterError(
                    f"{self.pid_file(name)} is of {where}, whose processes cannot be stopped from here: run "
                    f"{self.stop_command} there, or if that is gone remove the pid files in {self.folder}; each host "
                    "needs a checkout to itself"
                )

    def spawn(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process in its own session, with its log and its pid file. Raises OSError without room for them."""
        with tempfile.TemporaryFile(dir=self.folder) as probe:  # a server without room fails, and cannot log why
            probe.write(os.urandom(PROBE_BYTES))
        with deferred_signals(), self.log(name).open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **options)
            self._spawned.append(process)
            try:
                ProcessId.of(process.pid).write(self.pid_file(name))
            except OSError:  # without a pid file no command could find it
                process.kill()
                process.wait()
                raise
        return process

    def wait_until_ready(
        self,
        ports: Sequence[int],
        is_ready: Callable[[int], bool],
        progress: Callable[[int, int, str], None],
        timeout_s: float = math.inf,
    ) -> list[float]:
        """Wait until all servers are ready; return the seconds that it took for each.

        `is_ready` waits a little if the server is not ready. `progress` is called with the number of ready servers,
        their total, and a text about the one that is awaited. Raises ClusterError if a server or the launcher exits.
        """
        names = [*map(str, ports), *({LAUNCHER} & {*self.names()})]
        began, took = time.monotonic(), []
        for done, port in enumerate(ports):
            while True:
                waited_s = time.monotonic() - began
                progress(done, len(ports), f"port {port} for {waited_s:.0f} s, its log is {self.log(str(port))}")
                if is_ready(port):
                    break
                for name in names[done:]:
                    is_started = name == LAUNCHER or is_there(self.pid_file(name))
                    if is_started and self.process(name) is None:
                        which = f"{self.kind}s" if name == LAUNCHER else f"{self.kind} on port {name}"
                        raise ClusterError(f"the {which} did not start{self._log_tail(name)}")
                if waited_s > timeout_s:
                    which = f"{self.kind} on port {port}"
                    raise ClusterError(f"the {which} does not answer after {timeout_s:g} s{self._log_tail(str(port))}")
            took.append(time.monotonic() - began)
        progress(len(ports), len(ports), "")
        return took

    def _log_tail(self, name: str) -> str:
        """Return the first error in a log, which causes the later ones, and the last lines; empty without a log."""
        try:
            lines = self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        found = (re.search(r"\b[\w.]*Error: .{1,300}", line) for line in lines if not re.search(HARMLESS, line))
        cause = next((f": {error.group()}" for error in found if error), "")
        tail = "".join(f"\n  {line}" for line in lines[-LOG_LINES_SHOWN:])
        return f"{cause}; the end of its log {self.log(name)}:{tail}" if lines else ""

    def stop(self) -> int:
        """Stop all servers and return how many were running; ClusterError if this host may not see all of them."""
        with one_at_a_time():
            running = self.running().keys() - {LAUNCHER}
            self.terminate(self.names())
            self.check_same_host()
        return len(running)

    def terminate(self, names: Iterable[str]) -> None:
        """End processes and the sessions they lead or led, by TERM, then KILL, and remove all outdated pid files.

        Call it with the lock held.
        """
        pids = {
            noted.pid
            for name, noted in ((name, self.noted(name)) for name in names)  # without those of other programs now
            if not noted.elsewhere and (self.process(name) is not None or _session_of(noted.pid) is None)
        }
        with deferred_signals():  # a second signal would leave servers running
            any(self._end(pids) for _ in range(TRIES_TO_END))  # a hanging launcher may have started more servers
            for process in self._spawned:
                process.poll()  # so that Popen knows, too
            for name in self.names():
                if self.process(name) is None and not self.noted(name).elsewhere:
                    self.pid_file(name).unlink(missing_ok=True)
            if self.process(LAUNCHER) is None:  # otherwise it may be writing one
                for draft in self.folder.glob("*.pid.new"):
                    draft.unlink(missing_ok=True)

    def _end(self, pids: set[int]) -> bool:
        """Send TERM, then KILL after `term_timeout_s`; return whether TERM was enough."""
        sessions = {process: _session_of(process.pid) for process in psutil.process_iter()}
        living = {process.pid for process, session in sessions.items() if session is not None} & pids
        doomed = [
            process
            for process, session in sessions.items()
            if process.pid in living or session in living or (session in pids and self.is_ours(process))
        ]
        for process in doomed:  # a server ends the other processes of its session, unless it has exited
            if process.pid in living or sessions[process] not in living:
                end(process, firmly=process.pid not in living)
        _, alive = psutil.wait_procs(doomed, timeout=self.term_timeout_s)
        for process in alive:
            end(process, firmly=True)
        psutil.wait_procs(alive, timeout=KILL_TIMEOUT_S)
        return not alive


def _session_of(pid: int) -> int | None:
    """Return the session id of a process; None if it has ended."""
    try:
        return os.getsid(pid) if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, OSError, ValueError):
        return None


def end(process: psutil.Process, firmly: bool = False) -> None:
    """Send TERM to a process, or KILL if `firmly`. Raises ClusterError if it belongs to another user."""
    try:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill() if firmly else process.terminate()
    except psutil.AccessDenied:
        raise ClusterError(f"process {process.pid} runs as {process.username()}: stop it as that user") from None


def _is_agent_server(process: psutil.Process) -> bool:
    """Return whether a process is a launcher of this checkout, or one of its servers."""
    with contextlib.suppress(psutil.NoSuchProcess):
        seen = process.as_dict(["cmdline", "cwd"])
        command = seen["cmdline"] or []
        launched = "--launch" in command and str(ROOT / "main.py") in command
        return launched or ("--multiprocessing-fork" in command and seen["cwd"] == str(ROOT))  # spawned, not forked
    return False


AGENT_SERVERS = ServerProcesses("agent server", SERVERS, "./stop_all_server.sh", 5.0, _is_agent_server)


def check_not_owned() -> None:
    """Raise ClusterError if this checkout's agent servers belong to one run and end with it."""
    launcher = AGENT_SERVERS.process(LAUNCHER)
    if launcher is not None and "--owned" in launcher.cmdline():
        raise ClusterError(
            "another run of this checkout has agent servers of its own, and stops them at its end: wait for it, "
            "or start servers that runs share with ./start_all_server.sh first"
        )


def check_free(host_name: str, port: int, setting: str) -> None:
    """Raise ClusterError if another program has the port, SettingsError if this program can never bind it."""
    try:
        socket.create_server((address_of(host_name), port)).close()
    except SettingsError as error:
        raise SettingsError(f"--host-name {host_name}: {error}") from None
    except OSError as error:
        if error.errno == errno.EACCES:
            raise SettingsError(f"port {port} needs root: choose a {setting} from 1024") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise SettingsError(f"--host-name {host_name}: is not an address of this host") from None
        raise ClusterError(
            f"port {port} of {host_name} is taken by another program: stop it, or choose another {setting}"
        ) from None


def any_port_in_use(ports: range) -> bool:
    """Return whether any process listens on one of the ports, on the loopback address."""
    for port in ports:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    return False
