"""The server processes of this host: how they are started and stopped, their pid files and logs, and port checks."""

import contextlib
import errno
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from simulation.errors import ClusterError, SettingsError, reason, say
from simulation.files import HOME, MAIN, SERVERS, content_of, files_in, is_there, lock
from simulation.hosts.process_id import ProcessId
from simulation.rpc.endpoints import address_of

LAUNCHER = "launcher"  # name of the process that starts the agent servers
PRIVATE_PORTS = range(13_000, 15_000)  # for servers that belong to a Python process
KILL_TIMEOUT_S = 5.0
LOG_LINES_SHOWN = 12
PROBE_BYTES = 64 * 1024
HARMLESS = " WARNING | INFO "  # log lines with these levels are not errors
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
DISK_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def one_at_a_time(quiet: bool = False) -> Iterator[None]:
    """Hold the lock for starting and stopping servers. Unless `quiet`, print that it waits for another command.

    Raises SettingsError if a file of servers cannot be written.
    """
    advice = "start and stop servers with one command at a time"
    try:
        SERVERS.mkdir(parents=True, exist_ok=True)
        with (SERVERS / "lock").open("wb") as file:
            try:
                lock(file.fileno(), SERVERS, advice, wait=False)
            except BlockingIOError:
                if not quiet:
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
    """Defer TERM, HUP and INT signals that arrive during the block until it ends. Only the main thread gets any."""
    received, is_main = list[int](), threading.current_thread() is threading.main_thread()
    numbers = [each for each in ENDING if is_main and signal.getsignal(each) not in (signal.SIG_IGN, None)]
    handlers = {number: signal.signal(number, lambda which, _: received.append(which)) for number in numbers}
    try:
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
        for number in received:
            signal.raise_signal(number)


@dataclass
class ServerProcesses:
    """The processes of one kind of server, each with a pid file and a log. Its name is its port, or LAUNCHER."""

    kind: str  # the name of this kind in messages
    folder: Path  # contains the pid files and the logs
    stop_command: str
    term_timeout_s: float  # time after TERM until the processes are killed (s)
    is_ours: Callable[[psutil.Process], bool]  # whether a process is of this kind
    is_private: bool = False  # whether the processes belong to a Python process, which alone stops them
    _spawned: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def pid_file(self, name: str | int) -> Path:
        return self.folder / f"{name}.pid"

    def log(self, name: str | int) -> Path:
        return self.folder / f"{name}.log"

    def noted(self, name: str | int) -> ProcessId:
        return ProcessId.read(self.pid_file(name))

    def remove(self, name: str | int, pid: int) -> None:
        """Remove a pid file if it still contains `pid`."""
        if self.noted(name).pid == pid:
            self.pid_file(name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Return the names of all processes with a pid file: the launcher first, then the servers by port."""
        stems = {path.stem for path in files_in(self.folder, ".pid")}
        return [*({LAUNCHER} & stems), *sorted(filter(str.isdigit, stems), key=int)]

    def process(self, name: str) -> psutil.Process | None:
        """Return the running process with this name, or None if it has ended, even if another process has its pid."""
        noted = self.noted(name)
        with contextlib.suppress(psutil.Error, ValueError):
            process = psutil.Process(noted.pid)
            same = noted == ProcessId.of(noted.pid) if noted.boot else self.is_ours(process)
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        return None

    def running(self) -> dict[str, psutil.Process]:
        """Return all running processes by name, in the order of `names`."""
        return {name: process for name in self.names() if (process := self.process(name)) is not None}

    def check_same_host(self) -> None:
        """Raise ClusterError if a pid file belongs to a process on another host or in another pid namespace."""
        for name in self.names():
            if where := self.noted(name).elsewhere:
                raise ClusterError(
                    f"{self.pid_file(name)} is of {where}, whose processes cannot be stopped from here: run "
                    f"{self.stop_command} there, or if that is gone remove the pid files in {self.folder}; each host "
                    "needs a checkout to itself"
                )

    def spawn(self, name: str | int, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process in its own session, and create its log and pid file. Raises OSError if the disk is full."""
        with tempfile.TemporaryFile(dir=self.folder) as probe:  # detect a full disk: a server could not log it
            probe.write(os.urandom(PROBE_BYTES))
        with deferred_signals(), self.log(name).open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **options)
            self._spawned.append(process)
            try:
                ProcessId.of(process.pid).write(self.pid_file(name))
            except OSError:  # without a pid file, no command can stop the process
                process.kill()
                process.wait()
                raise
        return process

    @contextlib.contextmanager
    def starting(self, host_name: str, ports: Sequence[int], setting: str) -> Iterator[None]:
        """Check that the ports are free before the block starts servers. If the block fails, stop all new servers.

        Raises ClusterError, which names the variable `setting`, if a port is in use. Callers must hold `one_at_a_time`.
        """
        self.check_same_host()
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = self.running().keys()
        self.terminate({*self.names()} - earlier)  # clean up after servers that were killed
        for port in ports:
            check_free(host_name, port, setting)
            self.log(port).unlink(missing_ok=True)
        try:
            yield
        except BaseException:
            self.terminate({*self.names()} - earlier)
            raise

    def wait_until_ready(
        self,
        ports: Sequence[int],
        is_ready: Callable[[int], bool],
        progress: Callable[[int, int, str], None],
        timeout_s: float = math.inf,
    ) -> list[float]:
        """Wait until all servers are ready. Return the waiting times (s). Raises ClusterError if a server fails.

        `is_ready` checks the server on a port, and waits briefly if the server is not ready. `progress` receives the
        number of ready servers, the number of all servers, and a text about the server that is checked.
        """
        needed = [*map(str, ports), *({LAUNCHER} & {*self.names()})]
        began, waited = time.monotonic(), list[float]()
        while len(waited) < len(ports):
            port, waited_s = ports[len(waited)], time.monotonic() - began
            progress(len(waited), len(ports), f"port {port} for {waited_s:.0f} s, its log is {self.log(port)}")
            if is_ready(port):
                waited.append(waited_s)
                continue
            for name in needed[len(waited) :]:
                if (name == LAUNCHER or is_there(self.pid_file(name))) and self.process(name) is None:
                    raise self._failed_start(name, "did not start")
            if waited_s > timeout_s:
                raise self._failed_start(str(port), f"does not answer after {timeout_s:g} s")
        progress(len(ports), len(ports), "")
        return waited

    def _failed_start(self, name: str, how: str) -> ClusterError:
        """Return an error with the end of the log and its first error, because this error usually causes the others."""
        which = f"{self.kind}s" if name == LAUNCHER else f"{self.kind} on port {name}"
        lines = (content_of(self.log(name)) or b"").decode(errors="replace").splitlines()
        found = (re.search(r"\b[\w.]*Error: .{1,300}", line) for line in lines if not re.search(HARMLESS, line))
        cause = next((f": {error.group()}" for error in found if error), "")
        end = f"; the end of its log {self.log(name)}:" if lines else ""
        return ClusterError("\n  ".join([f"the {which} {how}{cause}{end}", *lines[-LOG_LINES_SHOWN:]]))

    def stop(self) -> int:
        """Stop all servers. Return how many were running. Raises ClusterError if some cannot be stopped from here."""
        with one_at_a_time(quiet=self.is_private):
            running = self.running().keys() - {LAUNCHER}
            self.terminate(self.names())
            self.check_same_host()
        return len(running)

    def terminate(self, names: Iterable[str]) -> None:
        """Stop the processes with these names and all processes in their sessions. Remove all outdated pid files.

        Send TERM first, and KILL to those that still run after `term_timeout_s`. The caller must hold `one_at_a_time`.
        """
        pids = {
            noted.pid
            for noted, process in [(self.noted(name), self.process(name)) for name in names]
            if not noted.elsewhere and (process or _session_of(noted.pid) is None)  # not another program's pid now
        }
        with deferred_signals():  # a signal must not interrupt this
            if not self._end(pids):
                self._end(pids)  # a launcher that had to be killed may have started more servers meanwhile
            for process in self._spawned:
                process.poll()  # Popen must notice the end, too
            for name in self.names():
                if self.process(name) is None and not self.noted(name).elsewhere:
                    self.pid_file(name).unlink(missing_ok=True)
            for draft in self.folder.glob("*.pid.new"):  # left by a process that was killed while writing
                draft.unlink(missing_ok=True)

    def _end(self, pids: set[int]) -> bool:
        """End the processes `pids` and all processes in their sessions. Return whether all ended within the timeout."""
        sessions = {process: _session_of(process.pid) for process in psutil.process_iter()}
        named = [process for process, session in sessions.items() if process.pid in pids and session is not None]
        running = {process.pid for process in named}
        others = {process: session for process, session in sessions.items() if process.pid not in running}
        orphans = [each for each, session in others.items() if session in pids - running and self.is_ours(each)]
        children = [each for each, session in others.items() if session in running]
        for process in (*named, *orphans):  # a running server ends the other processes of its session itself
            end(process, kill=process.pid not in running)
        timeout_s = self.term_timeout_s if named else KILL_TIMEOUT_S
        _, alive = psutil.wait_procs([*named, *orphans, *children], timeout=timeout_s)
        for process in alive:
            end(process, kill=True)
        psutil.wait_procs(alive, timeout=KILL_TIMEOUT_S)
        return not alive


def _session_of(pid: int) -> int | None:
    """Return the session id of a process, or None if the process has ended."""
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        return os.getsid(pid) if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else None
    return None


def end(process: psutil.Process, kill: bool = False) -> None:
    """Send TERM to a process, or KILL if `kill`. Raises ClusterError if the process belongs to another user."""
    try:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill() if kill else process.terminate()
    except psutil.AccessDenied:
        raise ClusterError(f"process {process.pid} runs as {process.username()}: stop it as that user") from None


def _is_agent_server(process: psutil.Process) -> bool:
    """Return whether a process is a launcher or an agent server of this checkout."""
    with contextlib.suppress(psutil.NoSuchProcess):
        seen = process.as_dict(["cmdline", "cwd"])
        command = {*(seen["cmdline"] or [])}
        launched = str(MAIN) in command and bool(command & {"--launch", "--owned"})
        return launched or ("--multiprocessing-fork" in command and seen["cwd"] == str(HOME))  # a spawned server
    return False


AGENT_SERVERS = ServerProcesses("agent server", SERVERS, "./stop_all_server.sh", 5.0, _is_agent_server)


def check_not_owned() -> None:
    """Raise ClusterError if the agent servers of this checkout belong to a run that stops them at its end."""
    if (launcher := AGENT_SERVERS.process(LAUNCHER)) is not None and "--owned" in launcher.cmdline():
        raise ClusterError(
            "another run of this checkout has agent servers of its own, and stops them at its end: wait for it, "
            "or start servers that runs share with ./start_all_server.sh first"
        )


def free_ports(count: int) -> int:
    """Return the first of `count` successive ports in PRIVATE_PORTS that are free. Raises ClusterError if none are."""
    starts = [*PRIVATE_PORTS[: max(len(PRIVATE_PORTS) - count + 1, 0)]]
    for first in random.SystemRandom().sample(starts, len(starts)):
        with contextlib.suppress(ClusterError):
            for port in range(first, first + count):
                check_free("localhost", port, "base_port")
            return first
    raise ClusterError(f"no {count} successive ports from {PRIVATE_PORTS[0]} to {PRIVATE_PORTS[-1]} are free")


def private_servers(folder: Path) -> ServerProcesses:
    """Return the processes of servers that belong to a Python process. No command stops them."""
    return ServerProcesses("agent server", folder, "the stop method of these servers", 5.0, _is_agent_server, True)


def check_free(host_name: str, port: int, setting: str) -> None:
    """Raise ClusterError if another program uses the port. Raise SettingsError if `port` or `host_name` is invalid."""
    try:
        socket.create_server((address_of(host_name), port)).close()
    except SettingsError as error:
        raise SettingsError(f"--host-name {host_name}: {error}") from None
    except OSError as error:
        if error.errno == errno.EACCES:
            raise SettingsError(f"port {port} needs root: choose a {setting} from 1024") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise SettingsError(f"--host-name {host_name}: is not an address of this host") from None
        others = ", or by agent servers with another cluster key" if setting == "BASE_PORT" else ""
        taken = f"port {port} of {host_name} is taken by another program{others}"
        raise ClusterError(f"{taken}: stop it, or choose another {setting}") from None


def any_port_in_use(ports: range) -> bool:
    """Return whether a process listens on one of these ports on the loopback address."""
    for port in ports:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    return False
