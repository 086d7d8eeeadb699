"""A fair semaphore for one model server, shared by all processes of this host: limits the requests in flight.

All processes map one file with a row per process. A lock on the file guards it; the kernel releases the lock when its
holder exits. The process with the fewest permits goes first, and among equals the one that has waited longest. The row
of a process without recent heartbeats is ignored, so a crashed process blocks no other. The file grows if it runs out
of rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulation.errors import reason
from simulation.files import SERVERS, lock, warn_once

Row = NDArray[np.int64]

FOLDER = SERVERS / "in-flight"
ROWS = 4096  # initial number
OWNER, HOLDING, WAITING_SINCE, HEARD = range(4)  # columns, int64: a random number, permits, and two times in ns
ROW_BYTES = 4 * 8
NO_LOCK = "--max-in-flight may be exceeded for moments"
BEAT_S = 1.0  # heartbeat interval of a process that holds or waits for permits
WAITING_LOST_NS = 2 * 10**9  # without a heartbeat for this long, a process no longer counts as waiting,
HOLDING_LOST_NS = 20 * 10**9  # and for this long, its permits are free


class SharedSemaphore:
    """This process's handle on the semaphore of one model server.

    Args:
        address: Address of the model server; names the file.
        folder: Folder of the file.
    """

    def __init__(self, address: str, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._file: int | None = None
        path = folder / hashlib.sha256(address.encode()).hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            locked = lock(self._file, folder, NO_LOCK)
            self._table = self._with(ROWS)
            if locked:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        except OSError as error:
            warn_once(f"agent servers cannot share a limit through {path}: {reason(error)}; each keeps to its own")
            self._forget_file()
            self._table = np.zeros((ROWS, 4), np.int64)
        self._owner = secrets.randbits(62) + 1
        self._row = -1
        self.held = 0

    def acquire(self, limit: int, slots: int = 1) -> bool:
        """Acquire `slots` permits if at least one is free and it is our turn; if not, count as waiting from now on."""
        with self._locked() as (own, now):
            since = int(own[WAITING_SINCE]) or now
            own[WAITING_SINCE] = since
            held, first = self.held, True
            for owner, holding, waiting_since, heard in self._table[1 : self._used() + 1].tolist():
                if owner in (0, self._owner):
                    continue
                if 0 <= now - heard < HOLDING_LOST_NS:  # below 0: written before the last reboot
                    held += holding
                if waiting_since and 0 <= now - heard < WAITING_LOST_NS:
                    first = first and (self.held, since) <= (holding, waiting_since)
            granted = first and held < limit
            if granted:
                self.held += slots
                own[HOLDING], own[WAITING_SINCE] = self.held, 0
        return granted

    def release(self, slots: int = 1) -> None:
        """Release permits."""
        with self._locked() as (own, _):
            self.held -= slots
            own[HOLDING] = self.held

    def beat(self, waiting: bool) -> None:
        """Record a heartbeat; call every BEAT_S seconds while this process holds permits or waits."""
        with self._locked() as (own, _):
            if not waiting:
                own[WAITING_SINCE] = 0

    def close(self) -> None:
        """Release all permits and close the file."""
        with self._locked() as (own, _):
            own[:] = 0
        self._row = -1
        self._forget_file()

    def _forget_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _with(self, rows: int) -> NDArray[np.int64]:
        """Return the table, grown to at least `rows` rows; call only while the file is locked."""
        if self._file is None:  # no file: the limit is this process's alone
            return np.concatenate([self._table, np.zeros((max(rows - len(self._table), 0), 4), np.int64)])
        size = max(os.fstat(self._file).st_size, rows * ROW_BYTES)  # never shrinks: other processes have it mapped
        os.ftruncate(self._file, size)
        return np.frombuffer(mmap.mmap(self._file, size), np.int64).reshape(-1, 4)

    def _used(self) -> int:
        """Return the number of rows in use, which is all that row 0 holds."""
        return int(self._table[0, 0])

    @contextlib.contextmanager
    def _locked(self) -> Iterator[tuple[Row, int]]:
        """Lock the file; yield this process's row and the monotonic time (ns)."""
        locked = self._file is not None and lock(self._file, self._folder, NO_LOCK)
        try:
            now = time.monotonic_ns()
            if self._used() >= len(self._table):  # another process has grown the file
                self._table = self._with(self._used() + 1)
            if self._row < 0 or self._table[self._row, OWNER] != self._owner:  # no row yet, or it expired
                used = self._table[1 : self._used() + 1]
                lost = (used[:, OWNER] == 0) | (now - used[:, HEARD] > HOLDING_LOST_NS) | (used[:, HEARD] > now)
                self._row = int(lost.argmax()) + 1 if lost.any() else len(used) + 1
                if self._row == len(self._table):
                    self._table = self._with(2 * len(self._table))
                self._table[0, 0] = max(len(used), self._row)
                self._table[self._row] = (self._owner, self.held, 0, now)
            own = self._table[self._row]
            own[HEARD] = now
            yield own, now
        finally:
            if locked and self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)
