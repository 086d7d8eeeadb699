"""The identity of a process, as it is written to a pid file and read from it."""

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from simulation.errors import SettingsError, reason


@dataclass(frozen=True)
class ProcessId:
    """The identity of a process: its pid, and what distinguishes it from others, whatever the clock of the host."""

    pid: int
    host: str = field(default="", compare=False)
    boot: str = ""  # boot id of the host; empty if only the pid is known, for example without /proc
    namespace: str = ""  # the namespace of the pid
    start: str = ""  # start of the process in clock ticks after the boot
    restarts: int = field(default=0, compare=False)  # how often the server was restarted

    @classmethod
    def of(cls, pid: int, restarts: int = 0) -> "ProcessId":
        """Return the identity of a process of this host: only its pid if /proc cannot be read."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            namespace = Path("/proc/self/ns/pid").readlink().name.strip("pid:[]")
            start = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()[19].decode()
        except (OSError, IndexError):
            return cls(pid, restarts=restarts)
        return cls(pid, socket.gethostname(), boot, namespace, start, restarts)

    @classmethod
    def read(cls, path: Path) -> "ProcessId":
        """Read a pid file. If the file or the pid is missing, the pid is -1. Raises SettingsError if reading fails."""
        try:
            pid, identity, restarts = [*path.read_text(encoding="utf-8").split(), ":::", ""][:3]
            host, boot, namespace, start = identity.rsplit(":", 3)
            return cls(int(pid), host, boot, namespace, start, int(restarts.partition("=")[2] or 0))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return cls(-1)
        except OSError as error:
            raise SettingsError(f"cannot read {path}: {reason(error)}") from None

    def write(self, path: Path) -> None:
        """Write a pid file atomically. Its first line is the pid alone, so that a script can pass this line to kill."""
        identity = ":".join((self.host, self.boot, self.namespace, self.start))
        draft = path.with_name(f"{path.name}.new")
        draft.write_text(f"{self.pid}\n{identity}\nrestarts={self.restarts}\n", encoding="utf-8")
        draft.replace(path)

    @property
    def elsewhere(self) -> str:
        """Return the host or pid namespace of a process that runs elsewhere. Return "" if it runs here or has ended."""
        here = ProcessId.of(os.getpid())
        if self.boot == here.boot:
            return "" if self.namespace == here.namespace else "a container or other pid namespace of this host"
        return f"host {self.host}" if self.boot and self.host != here.host else ""  # else a reboot has ended it
