"""A fair semaphore that limits the requests in flight to one model server, shared by all processes of this host.

It is a file with one row per process, locked during each access; if a process exits, the kernel releases the lock.
The waiting process with the fewest permits, then the longest wait, goes first. Rows without recent heartbeats expire.
"""

import contextlib
import fcntl
import hashlib
import itertools
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
    """This process's handle on the semaphore of the model server `address`. The semaphore is a file in `folder`.

    If the file cannot be used, the limit applies to this process alone.
    """

    def __init__(self, address: str, folder: Path = FOLDER) -> None:
        self.held = 0
        self._waiting_since = 0
        self._owner = secrets.randbits(62) + 1
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
        """Acquire `slots` permits and return True if fewer than `limit` are in use and no other process comes first.

        Otherwise, mark this process as waiting and return False. All `slots` permits are granted even if fewer are
        free, so up to `limit + slots - 1` permits may be in use.
        """
        with self._locked() as (now, others):
            self._waiting_since = self._waiting_since or now
            first, used = True, self.held
            for _, permits, waiting_since, beat_at in others:
                used += permits
                if waiting_since and now - beat_at < WAITING_LOST_NS:
                    first = first and (self.held, self._waiting_since) <= (permits, waiting_since)
            granted = first and used < limit
            if granted:
                self.held, self._waiting_since = self.held + slots, 0
        return granted

    def release(self, slots: int = 1) -> None:
        with self._locked():
            self.held -= slots

    def beat(self, waiting: bool) -> None:
        """Record a heartbeat and the state `waiting`. A process without heartbeats loses its turn and its permits."""
        with self._locked():
            self._waiting_since = self._waiting_since if waiting else 0

    def rows(self) -> list[tuple[int, ...]]:
        """Return the rows of all processes. Their fields are those of `ROW`; times are monotonic, in ns."""
        if self._file is None:
            return []
        return list(ROW.iter_unpack(os.pread(self._file, os.lseek(self._file, 0, os.SEEK_END), 0)))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
        """Lock the file. Yield the time and the rows of other live processes. At the end, write these rows and ours."""
        locked = self._file is not None and lock(self._file, self._folder, NO_LOCK)
        try:
            now, rows = time.monotonic_ns(), self.rows()
            # A row with a negative age was written before the host was restarted
            others = [row for row in rows if row[0] != self._owner and 0 <= now - row[3] < HOLDING_LOST_NS]
            yield now, others
            if self._file is not None:
                own = ROW.pack(self._owner, self.held, self._waiting_since, now)
                table = own + b"".join(itertools.starmap(ROW.pack, others))
                os.pwrite(self._file, table.ljust(len(rows) * ROW.size, b"\0"), 0)
        finally:
            if locked and self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)
