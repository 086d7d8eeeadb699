"""Limits of the requests to one model, shared by all processes of this host: in flight at once, and per minute.

A limit is a file that is locked during each access; if a process exits, the kernel releases the lock.
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
from simulation.files import HOME, lock, warn_once

FOLDER = HOME / "run" / "servers" / "in-flight"  # of all servers of this host
NO_LOCK = "--max-in-flight may be exceeded for moments"
WAITING_LOST_NS = 2 * 10**9  # after this time without a heartbeat, a process no longer counts as waiting
HOLDING_LOST_NS = 20 * 10**9  # after this time without a heartbeat, the permits of a process are free
BURST = 1 / 12  # share of the limit per minute that may be sent at once
NO_LIMIT = 10**15
BUCKET = struct.Struct("=3d")  # time.monotonic() of the last change, and the requests and tokens that may be sent
ROW = struct.Struct("=4q")  # owner (a random number), permits, start of waiting (0: not waiting), last heartbeat


class _SharedFile:
    """A file in `folder` that all processes of this host open under the same `name`. At first, it is one row of zeros.

    If the file cannot be used, `_file` is None, and the limit applies to this process alone.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._folder, self._content = folder, bytes(ROW.size)
        self._file: int | None = None
        path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.rows"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            with self._locked_file():
                self._write(self._read() or self._content)
        except OSError as error:
            warn_once(f"agent servers cannot share a limit through {path}: {reason(error)}; each keeps to its own")
            self._file = None

    @contextlib.contextmanager
    def _locked_file(self) -> Iterator[None]:
        locked = self._file is not None and lock(self._file, self._folder, NO_LOCK)
        try:
            yield
        finally:
            if locked and self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _read(self) -> bytes:
        return self._content if self._file is None else os.pread(self._file, os.fstat(self._file).st_size, 0)

    def _write(self, content: bytes) -> None:
        self._content = content
        if self._file is not None:
            os.pwrite(self._file, content, 0)


class RateLimit(_SharedFile):
    """This process's handle on a limit of the requests and tokens per minute of one model.

    Both are buckets that hold BURST of the limit and fill at the rest of it, so no minute exceeds the limit. A request
    that needs more than a full bucket waits for a full one; later requests then wait until it is paid off.
    """

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        super().__init__(f"{name} per minute", folder)

    def take(self, per_minute: tuple[float, float], tokens: float, force: bool = False) -> float:
        """Take one request and `tokens` tokens and return 0, or else return the seconds until they are free.

        `per_minute` are the limits of requests and tokens. If `force`, do not wait.
        """
        with self._locked_file():
            now = time.monotonic()
            before, *levels = BUCKET.unpack_from(self._read())
            wait_s = 0.0
            for kind, (limit, needed) in enumerate(zip(per_minute, (1, tokens), strict=True)):
                size = bucket_size(limit)
                speed = max(limit - size, limit / 2) / 60
                filled = levels[kind] + speed * (now - before)
                level = min(filled, size) if 0 < before <= now else size  # otherwise, from before the host restarted
                wait_s = max(wait_s, (min(needed, size) - level) / speed)
                levels[kind] = level - needed
            if wait_s > 0 and not force:
                return wait_s
            self._write(BUCKET.pack(now, *levels))
            return 0.0

    def give_back(self, tokens: float) -> None:
        """Correct an estimate: `tokens` tokens of an earlier `take` were not used (negative: were used in addition)."""
        with self._locked_file():
            changed_at, requests, left = BUCKET.unpack_from(self._read())
            self._write(BUCKET.pack(changed_at, requests, left + tokens))


def bucket_size(per_minute: float) -> float:
    """Return how many requests or tokens may be sent at once if `per_minute` may be sent per minute."""
    return max(per_minute * BURST, 1.0)


class SharedSemaphore(_SharedFile):
    """This process's handle on the semaphore of the model server `address`, which limits the requests in flight.

    The file has one row per process. The waiting process with the fewest permits, then the longest wait, goes first.
    Rows without recent heartbeats expire.
    """

    def __init__(self, address: str, folder: Path = FOLDER) -> None:
        self.held = self._waiting_since = 0
        self._owner = secrets.randbits(62) + 1
        super().__init__(address, folder)
        self.beat(waiting=False)

    def acquire(self, limit: int, slots: int = 1) -> bool:
        """Acquire `slots` permits and return True if fewer than `limit` are in use and no other process comes first.

        Otherwise, mark this process as waiting and return False. Up to `limit + slots - 1` permits may be in use.
        """
        with self._locked() as (now, others):
            self._waiting_since = self._waiting_since or now
            ours = (self.held, self._waiting_since)
            waiting = [row[1:3] for row in others if row[2] and now - row[3] < WAITING_LOST_NS]
            if self.held + sum(row[1] for row in others) >= limit or min([ours, *waiting]) < ours:
                return False
            self.held, self._waiting_since = self.held + slots, 0
            return True

    def release(self, slots: int = 1) -> None:
        with self._locked():
            self.held -= slots

    def beat(self, waiting: bool) -> None:
        """Record a heartbeat and the state `waiting`. A process without heartbeats loses its turn and its permits."""
        with self._locked():
            self._waiting_since = self._waiting_since if waiting else 0

    def rows(self) -> list[tuple[int, ...]]:
        """Return the rows of all processes. Their fields are those of `ROW`; times are monotonic, in ns."""
        return list(ROW.iter_unpack(self._read()))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
        """Lock the file. Yield the time and the rows of other live processes. At the end, write these rows and ours."""
        with self._locked_file():
            now, rows = time.monotonic_ns(), self.rows()
            # A row with a negative age was written before the host was restarted
            others = [row for row in rows if row[0] != self._owner and 0 <= now - row[3] < HOLDING_LOST_NS]
            yield now, others
            table = itertools.starmap(ROW.pack, [(self._owner, self.held, self._waiting_since, now), *others])
            self._write(b"".join(table).ljust(len(rows) * ROW.size, b"\0"))
