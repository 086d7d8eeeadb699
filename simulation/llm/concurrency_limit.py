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
from simulation.files import SERVERS, lock, warn_once

FOLDER = SERVERS / "in-flight"
NO_LOCK = "--max-in-flight may be exceeded for moments"
WAITING_LOST_NS = 2 * 10**9  # after this time without a heartbeat, a process no longer counts as waiting
HOLDING_LOST_NS = 20 * 10**9  # after this time without a heartbeat, the permits of a process are free
BURST = 1 / 12  # share of the limit per minute that may be sent at once
NO_LIMIT = 10**15
BUCKET = struct.Struct("=3d")  # time.monotonic() of the last change, and the requests and tokens that may be sent
ROW = struct.Struct("=4q")  # owner (a random number), permits, start of waiting (0: not waiting), last heartbeat


class _SharedFile:
    """A file in `folder` that all processes of this host open under the same `name`.

    If the file cannot be used, `_file` is None, and the limit applies to this process alone.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None
        path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.rows"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._try_out()
        except OSError as error:
            warn_once(f"agent servers cannot share a limit through {path}: {reason(error)}; each keeps to its own")
            if self._file is not None:
                os.close(self._file)
            self._file = None

    def _try_out(self) -> None:
        """Access the file for the first time."""
        with self._locked_file():
            pass

    @contextlib.contextmanager
    def _locked_file(self) -> Iterator[None]:
        """Lock the file."""
        locked = self._file is not None and lock(self._file, self._folder, NO_LOCK)
        try:
            yield
        finally:
            if locked and self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)


class RateLimit(_SharedFile):
    """This process's handle on a limit of the requests and tokens per minute of one model.

    Both are buckets that hold BURST of the limit and fill at the rest of it, so no minute exceeds the limit. A request
    whose tokens exceed a full bucket waits for the full bucket; later requests then wait until it is paid off.
    """

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        super().__init__(f"{name} per minute", folder)
        self._state = b""  # used if there is no file

    def take(self, per_minute: tuple[float, float], tokens: float, force: bool = False) -> float:
        """Take one request and `tokens` tokens and return 0, or else return the seconds until they are free.

        `per_minute` are the limits of requests and tokens. If `force`, do not wait.
        """
        with self._locked_file():
            now, sizes = time.monotonic(), [bucket_size(each) for each in per_minute]
            speeds = [max(each - size, each / 2) / 60 for each, size in zip(per_minute, sizes, strict=True)]
            before, *levels = self._read() or (now, *sizes)
            if before > now:  # written before the host was restarted
                before, levels = now, sizes
            levels = [
                min(level + speed * (now - before), size)
                for level, speed, size in zip(levels, speeds, sizes, strict=True)
            ]
            needs = [1.0, min(tokens, sizes[1])]
            waits = [(need - level) / speed for need, level, speed in zip(needs, levels, speeds, strict=True)]
            if max(waits) <= 0 or force:
                self._write(now, levels[0] - 1, levels[1] - tokens)
                return 0.0
        return max(waits)

    def give_back(self, tokens: float) -> None:
        """Correct an estimate: `tokens` tokens of an earlier `take` were not used (negative: were used in addition)."""
        with self._locked_file():
            if (state := self._read()) is not None:
                self._write(state[0], state[1], state[2] + tokens)

    def _read(self) -> tuple[float, ...] | None:
        state = self._state if self._file is None else os.pread(self._file, BUCKET.size, 0)
        return BUCKET.unpack(state) if len(state) == BUCKET.size else None

    def _write(self, *state: float) -> None:
        self._state = BUCKET.pack(*state)
        if self._file is not None:
            os.pwrite(self._file, self._state, 0)


def bucket_size(per_minute: float) -> float:
    """Return how many requests or tokens may be sent at once if `per_minute` may be sent per minute."""
    return max(per_minute * BURST, 1.0)


class SharedSemaphore(_SharedFile):
    """This process's handle on the semaphore of the model server `address`, which limits the requests in flight.

    The file has one row per process. The waiting process with the fewest permits, then the longest wait, goes first.
    Rows without recent heartbeats expire.
    """

    def __init__(self, address: str, folder: Path = FOLDER) -> None:
        self.held = 0
        self._waiting_since = 0
        self._owner = secrets.randbits(62) + 1
        super().__init__(address, folder)

    def _try_out(self) -> None:
        self.beat(waiting=False)

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
        with self._locked_file():
            now, rows = time.monotonic_ns(), self.rows()
            # A row with a negative age was written before the host was restarted
            others = [row for row in rows if row[0] != self._owner and 0 <= now - row[3] < HOLDING_LOST_NS]
            yield now, others
            if self._file is not None:
                own = ROW.pack(self._owner, self.held, self._waiting_since, now)
                table = own + b"".join(itertools.starmap(ROW.pack, others))
                os.pwrite(self._file, table.ljust(len(rows) * ROW.size, b"\0"), 0)
