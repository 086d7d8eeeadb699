"""Processes and ports of this host: pid files, logs, what is ours, what is taken. It knows nothing of agents.

Files in run/servers/: `<port>.pid`, `<port>.log` and, if it was started again, `<port>.restarts` per agent server;
`launcher.pid` and `launcher.log`; `lock`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from simulation.config import ROOT, read_text
from simulation.errors import UNSUPPORTED, ClusterError, SettingsError, reason

SERVERS = ROOT / "run" / "servers"
LAUNCHER = "launcher"
TRIES_TO_END = 3
TERM_TIMEOUT_S = 5.0
LOG_LINES_SHOWN = 12
DISK_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the lock of this checkout: servers are started or stopped by one process at a time.

    Raises SettingsError if the files of servers cannot be written meanwhile, either.
    """
    with contextlib.ExitStack() as held:
        try:
            SERVERS.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((SERVERS / "lock").open("wb"))
            lock(file.fileno(), SERVERS, "start and stop servers with one command at a time")
        except OSError as error:
            raise SettingsError(f"cannot write in {SERVERS}: {reason(error)}") from None
        try:
            yield
        except OSError as error:
            inside = error.filename is not None and Path(str(error.filename)).is_relative_to(SERVERS.parent)
            if not inside and error.errno not in DISK_FAILS:
                raise
            raise SettingsError(f"cannot write in {SERVERS.parent}: {reason(error)}") from None


def lock(descriptor: int, folder: Path, advice: str, wait: bool = True) -> bool:
    """Lock an open file, or folder, for this process alone, until it is closed.

    Args:
        descriptor: Of the file.
        folder: Where it is.
        advice: What people have to see to where nothing can be locked.
        wait: Whether to wait for a process that has it locked.

    Returns:
        Whether it is locked; if not, its file system has no locks, which is told once.

    Raises:
        BlockingIOError: Another process has it locked, and is not waited for.
        OSError: It cannot be locked for another reason.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        tell_once(f"the file system of {folder} has no locks ({reason(error)}): {advice}")
        return False
    return True


@functools.cache
def tell_once(warning: str) -> None:
    """Log a warning the first time."""
    from loguru import logger  # noqa: PLC0415 - what stops servers has nothing else to log

    logger.warning(warning)


def pid_file(name: str) -> Path:
    """The pid file of a server, by its port, or of the launcher."""
    return SERVERS / f"{name}.pid"


def write_pid(name: str, pid: int) -> None:
    """Write a pid file at one stroke."""
    draft = SERVERS / f"{name}.pid.new"
    try:
        draft.write_text(f"{pid}\n", encoding="utf-8")
        draft.replace(pid_file(name))
    finally:
        draft.unlink(missing_ok=True)


def remove_drafts() -> None:
    """Remove the drafts of pid files that a killed launcher left; to be called with the lock held.

    Only the launcher writes pid files, and it is started with the lock held: while none lives, nobody writes a draft.
    """
    if own_process(LAUNCHER) is None:
        for draft in SERVERS.glob("*.pid.new"):
            draft.unlink(missing_ok=True)


def note_restarts(port: int, count: int) -> None:
    """Write down how often a server was started again."""
    if count == 0:
        (SERVERS / f"{port}.restarts").unlink(missing_ok=True)
    else:
        (SERVERS / f"{port}.restarts").write_text(f"{count}\n", encoding="utf-8")


def restarts(port: int) -> int:
    """How often a server was started again."""
    try:
        return int(read_text(SERVERS / f"{port}.restarts"))
    except (OSError, ValueError):  # never, or this moment
        return 0


def remove_pid(name: str, pid: int) -> None:
    """Remove a pid file, unless it names another process by now."""
    with contextlib.suppress(OSError, ValueError):  # one that stays names no live process
        if read_text(pid_file(name)).strip() == str(pid):
            pid_file(name).unlink()


def own_process(name: str) -> psutil.Process | None:
    """The live process of a pid file; None if it has ended, even if its pid is another program's now."""
    try:
        written = pid_file(name).stat().st_mtime
        process = psutil.Process(int(read_text(pid_file(name))))
        command = process.cmdline()
        launched = "--launch" in command and str(ROOT / "main.py") in command
        ours = launched or "--multiprocessing-fork" in command  # the latter where servers are spawned
        alive = process.status() != psutil.STATUS_ZOMBIE
        return process if ours and alive and process.create_time() <= written + 1 else None
    except (FileNotFoundError, ValueError, psutil.Error):
        return None


def own_processes() -> dict[str, psutil.Process]:
    """All live processes of this checkout's pid files, the launcher first, then the servers by port."""
    ports = sorted(int(path.stem) for path in SERVERS.glob("*.pid") if path.stem.isdigit())
    names = [LAUNCHER, *map(str, ports)]
    found = {name: own_process(name) for name in names}
    return {name: process for name, process in found.items() if process is not None}


def refuse_borrowed() -> None:
    """Raise ClusterError while this checkout's servers are those of one run, with which they end."""
    launcher = own_process(LAUNCHER)
    if launcher is not None and "--owned" in launcher.cmdline():
        raise ClusterError(
            "another run of this checkout has agent servers of its own, and stops them at its end: wait for it, "
            "or start servers that runs share with ./start_all_server.sh first"
        )


def end_processes() -> int:
    """End all of them, TERM first, KILL after TERM_TIMEOUT_S; returns how many servers."""
    servers: set[str] = set()
    for _ in range(TRIES_TO_END):  # a launcher that hangs may have started others meanwhile
        running = own_processes()
        servers |= running.keys() - {LAUNCHER}
        for process in running.values():  # the launcher first: it passes the signal on, and starts nothing any more
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(running.values(), timeout=TERM_TIMEOUT_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=TERM_TIMEOUT_S)
        if not alive:
            break
    for path in SERVERS.glob("*.pid"):
        if own_process(path.stem) is None:
            path.unlink(missing_ok=True)
    remove_drafts()
    return len(servers)


def end_of_log(name: str) -> str:
    """Where the log of a server is, and how it ends: the rest of an error message."""
    return end_of(SERVERS / f"{name}.log")


def end_of(log: Path) -> str:
    """Likewise, of any log."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    except OSError:
        return ""
    return "".join([f"; the end of its log {log}:", *(f"\n  {line}" for line in lines)]) if lines else ""


def address_of(host_name: str) -> str:
    """The IPv4 address that a host name stands for, which may be a loopback address for `localhost` alone.

    Raises SettingsError if there is none that other hosts could use; its message leaves it to the caller to say who.
    """
    try:
        address = socket.gethostbyname(host_name)
    except (OSError, UnicodeError):  # the latter for what cannot be a name
        raise SettingsError("no address is known for this name; check /etc/hosts or DNS") from None
    parsed = ipaddress.ip_address(address)
    if host_name != "localhost" and (parsed.is_loopback or parsed.is_unspecified):
        raise SettingsError(
            f"the name stands for {address} here, where no other host can reach it; give it the host's address in the "
            "network, in /etc/hosts or DNS"
        )
    return address


def check_free(host_name: str, port: int, setting: str = "BASE_PORT") -> None:
    """Raise ClusterError if another program has the port, SettingsError if it can never be ours."""
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


def anything_listens(ports: range) -> bool:
    """Whether anything on this host listens on one of the ports, on the loopback address."""
    for port in ports:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
    return False


def ranges(ports: list[int]) -> str:
    """Sorted ports in few words: `12330-12335, 12338`."""
    starts = [port for port in ports if port - 1 not in ports]
    ends = [port for port in ports if port + 1 not in ports]
    return ", ".join(
        str(first) if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True)
    )
