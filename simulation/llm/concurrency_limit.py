"""A fair semaphore for one model server, shared by all processes of this host. It limits the requests in flight.

All processes share one file, which contains one row per process. A file lock protects the file; the kernel releases the
lock when the process that holds it exits. Among the waiting processes, the one with the fewest permits is served first,
and among processes with equally many permits, the one that has waited longest. Rows without recent heartbeats are
ignored, so that a crashed process does not block others.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from simulation.errors import reason
from simulation.files import SERVERS, lock, warn_once

FOLDER = SERVERS / "in-flight"
NO_LOCK = "--max-in-flight may be exceeded for moments"
WAITING_LOST_NS = 2 * 10**9  # after this time without a heartbeat, a process no longer counts as waiting
HOLDING_LOST_NS = 20 * 10**9  # after this time without a heartbeat, the permits of a process are free
ROW = struct.Struct("=4q")  # owner (a random number), permits, start of waiting (0: not waiting), last heartbeat


class SharedSemaphore:
    """This process's handle on the semaphore of one model server. The file name in `folder` is a hash of the address.

    If the file cannot be used, the limit applies to this process alone.
    """

    def __init__(self, address: str, folder: Path = FOLDER) -> None:
        self.held = 0
        self._waiting_since = 0
        self._owner = secrets.randbits(62) + 1
        self._index = -1  # index of this process's row; -1 without a row
        self._folder = folder
        self._file: int | None = None
        path = folder / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}.rows"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self.beat(waiting=False)
        except OSError as error:
            warn_once(f"agent servers cannot share a limit through {path}: {reason(error)}; each keeps to its own")
            if self._file is not None:
                os.close(self._file)
            self._file = None

    def acquire(self, limit: int, slots: int = 1) -> bool:
        """Acquire `slots` permits and return True if a permit is free and no other process is served first.

        Otherwise, mark this process as waiting and return False. All `slots` permits are granted even if fewer are
        free, so up to `limit + slots - 1` permits may be in use.
        """
        with self._locked() as now:
            self._waiting_since = self._waiting_since or now
            held, first = self.held, True
            for owner, permits, waiting_since, beat_at in self.rows():
                age_ns = now - beat_at
                if owner == self._owner or not 0 <= age_ns < HOLDING_LOST_NS:  # negative: written before a reboot
                    continue
                held += permits
                if waiting_since and age_ns < WAITING_LOST_NS:
                    first = first and (self.held, self._waiting_since) <= (permits, waiting_since)
            granted = first and held < limit
            if granted:
                self.held, self._waiting_since = self.held + slots, 0
        return granted

    def release(self, slots: int = 1) -> None:
        """Release permits."""
        with self._locked():
            self.held -= slots

    def beat(self, waiting: bool) -> None:
        """Record a heartbeat and whether this process still waits.

        Call this every second while this process waits or holds permits.
        """
        with self._locked():
            self._waiting_since = self._waiting_since if waiting else 0

    def rows(self) -> list[tuple[int, ...]]:
        """Return the rows of all processes. Their fields are those of `ROW`; times are monotonic, in ns."""
        if self._file is None:
            return []
        return list(ROW.iter_unpack(os.pread(self._file, os.lseek(self._file, 0, os.SEEK_END), 0)))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Lock the file and yield the current time. At the end, write this process's row and unlock the file."""
        locked = self._file is not None and lock(self._file, self._folder, NO_LOCK)
        try:
            now = time.monotonic_ns()
            yield now
            if self._file is not None:
                self._write_row(self._file, now)
        finally:
            if locked and self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _write_row(self, file: int, now: int) -> None:
        own = os.pread(file, ROW.size, self._index * ROW.size) if self._index >= 0 else b""
        if not own or ROW.unpack(own)[0] != self._owner:  # no row yet, or another process has reused the expired row
            rows = self.rows()
            lost = (index for index, row in enumerate(rows) if not 0 <= now - row[-1] < HOLDING_LOST_NS)
            self._index = next(lost, len(rows))
        row = ROW.pack(self._owner, self.held, self._waiting_since, now)
        os.pwrite(file, row, self._index * ROW.size)
