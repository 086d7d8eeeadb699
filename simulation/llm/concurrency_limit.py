"""How many requests may be in flight to one model server: one limit for all processes of this host, shared fairly.

A file that all of them map into memory has a row per process; a lock on the file guards it, and the system lets go of
that lock when its holder dies. Whoever has least in flight goes first, and among equals whoever has waited longest.
A process that was not heard of for a while counts for nothing, so a dead one holds up nobody. The file grows when more
processes come than it has rows for.
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
from simulation.files import SERVERS, lock, tell_once

Row = NDArray[np.int64]

FOLDER = SERVERS / "in-flight"
ROWS = 4096  # to begin with
OWNER, HOLDING, WAITING_SINCE, HEARD = range(4)  # columns, int64: a random number, places, and two times in ns
ROW_BYTES = 4 * 8
NO_LOCK = "--max-in-flight may be exceeded for moments"
BEAT_S = 1.0  # a process that holds or waits is heard of so often
WAITING_LOST_NS = 2 * 10**9  # after so long without a word a process does not wait any more,
HOLDING_LOST_NS = 20 * 10**9  # and after so long it holds nothing any more


class SharedSemaphore:
    """This process's part in the limit of one model server.

    Args:
        address: Of the model server.
        folder: Where the file is.
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
            tell_once(f"agent servers cannot share a limit through {path}: {reason(error)}; each keeps to its own")
            self._forget_file()
            self._table = np.zeros((ROWS, 4), np.int64)
        self._owner = secrets.randbits(62) + 1
        self._row = -1
        self.holding = 0

    def take(self, limit: int, places: int = 1) -> bool:
        """Take places if there is one left and nobody is before us; if not, we wait from now on."""
        with self._locked() as (own, now):
            since = int(own[WAITING_SINCE]) or now
            own[WAITING_SINCE] = since
            held, first = self.holding, True
            for owner, holding, waiting_since, heard in self._table[1 : self._used() + 1].tolist():
                if owner in (0, self._owner):
                    continue
                if 0 <= now - heard < HOLDING_LOST_NS:  # less than 0 is from before the machine was started
                    held += holding
                if waiting_since and 0 <= now - heard < WAITING_LOST_NS:
                    first = first and (self.holding, since) <= (holding, waiting_since)
            granted = first and held < limit
            if granted:
                self.holding += places
                own[HOLDING], own[WAITING_SINCE] = self.holding, 0
        return granted

    def give_back(self, places: int = 1) -> None:
        """Give places back."""
        with self._locked() as (own, _):
            self.holding -= places
            own[HOLDING] = self.holding

    def beat(self, waiting: bool) -> None:
        """Say that this process lives; to be called every BEAT_S seconds while it holds places or waits."""
        with self._locked() as (own, _):
            if not waiting:
                own[WAITING_SINCE] = 0

    def close(self) -> None:
        """Give everything back."""
        with self._locked() as (own, _):
            own[:] = 0
        self._row = -1
        self._forget_file()

    def _forget_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _with(self, rows: int) -> NDArray[np.int64]:
        """The table, which has so many rows at least from now on; nobody else may look meanwhile."""
        if self._file is None:  # this process is alone
            return np.concatenate([self._table, np.zeros((max(rows - len(self._table), 0), 4), np.int64)])
        size = max(os.fstat(self._file).st_size, rows * ROW_BYTES)  # others have mapped what there is
        os.ftruncate(self._file, size)
        return np.frombuffer(mmap.mmap(self._file, size), np.int64).reshape(-1, 4)

    def _used(self) -> int:
        """How many rows have been used; row 0 holds nothing but that."""
        return int(self._table[0, 0])

    @contextlib.contextmanager
    def _locked(self) -> Iterator[tuple[Row, int]]:
        """Our row and the time, while nobody else may look."""
        locked = self._file is not None and lock(self._file, self._folder, NO_LOCK)
        try:
            now = time.monotonic_ns()
            if self._used() >= len(self._table):  # another process has made it larger
                self._table = self._with(self._used() + 1)
            if self._row < 0 or self._table[self._row, OWNER] != self._owner:  # new, or given up as lost
                used = self._table[1 : self._used() + 1]
                lost = (used[:, OWNER] == 0) | (now - used[:, HEARD] > HOLDING_LOST_NS) | (used[:, HEARD] > now)
                self._row = int(lost.argmax()) + 1 if lost.any() else len(used) + 1
                if self._row == len(self._table):
                    self._table = self._with(2 * len(self._table))
                self._table[0, 0] = max(len(used), self._row)
                self._table[self._row] = (self._owner, self.holding, 0, now)
            own = self._table[self._row]
            own[HEARD] = now
            yield own, now
        finally:
            if locked and self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)
