"""Terminal output of the main process: log lines and stage progress, both on standard error."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import NamedTuple

from loguru import logger

from simulation.files import ROOT
from simulation.results.tables import fitting

LINE_EVERY_S = 5.0
WARNINGS_KEPT = 100
SAME_SIGNAL_S = 1.0  # `timeout` and similar tools signal a process and then its process group
SHORTEST_BAR, LONGEST_BAR, USUAL_WIDTH = 8, 40, 80  # terminal columns
DEFECT_LOG = ROOT / "run" / "defects.log"


def log_to_stderr() -> None:
    """Send the log to standard error, without tracebacks: `keep_traceback` writes those to DEFECT_LOG."""
    logger.remove()
    logger.add(sys.stderr, format="{time:YYYY-MM-DD HH:mm:ss.SSS} | {level: <8} | {message}", level="INFO")


def keep_traceback() -> str:
    """Append the current traceback to DEFECT_LOG; returns its path, or the traceback if the log cannot be written."""
    text = traceback.format_exc()
    try:
        DEFECT_LOG.parent.mkdir(exist_ok=True)
        with DEFECT_LOG.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(time.strftime("%Y-%m-%d %H:%M:%S\n") + text + "\n")
    except OSError:
        return f"this traceback (which could not be kept in {DEFECT_LOG}): {text}"
    return str(DEFECT_LOG)


class Stage(NamedTuple):
    """Progress of a stage, and its start time (time.monotonic)."""

    name: str
    done: int
    total: int
    began: float


class ConsoleProgress:
    """Progress display: a bar for each stage on a terminal, otherwise a log line every LINE_EVERY_S seconds."""

    def __init__(self) -> None:
        self.stop_signal: int | None = None
        self.stage: Stage | None = None  # the most recent one
        self.warnings: deque[tuple[float, str]] = deque(maxlen=WARNINGS_KEPT)  # (time.time, message)
        self.how_to_resume: Callable[[], str | None] = lambda: None  # printed on the second signal
        self._is_open = False  # whether the stage is under way
        self._has_bar = False
        self._signalled_at = self._last_line = 0.0

    def progress(self, name: str, done: int, total: int, note: str = "") -> None:
        """Show the progress of a stage, with an optional note."""
        now = time.monotonic()
        if not self._is_open or self.stage is None or name != self.stage.name:
            self.stage, self._last_line = Stage(name, done, total, now), now
        self.stage = self.stage._replace(done=done, total=total)
        self._is_open = done != total
        if sys.stderr.isatty():
            self._draw_bar(note if self._is_open else None)
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            rate = done / (now - self.stage.began)
            left = f", about {(total - done) / rate:.0f} s left" if rate > 0 else ""
            logger.info(f"{name}: {done:,} of {total:,} ({rate:,.0f}/s{left})" + f"; {note}" * bool(note))

    def close(self) -> None:
        """End the stage and remove its bar."""
        self._is_open = False
        self._draw_bar(None)

    def _draw_bar(self, note: str | None) -> None:
        """Replace the bar by one of the current stage with this note; None removes it."""
        line = "\r\x1b[K" if self._has_bar else ""
        self._has_bar = note is not None
        with contextlib.suppress(OSError):  # the terminal is closed
            if note is not None and self.stage is not None:
                columns = os.get_terminal_size(sys.stderr.fileno()).columns or USUAL_WIDTH
                line += progress_line(self.stage, time.monotonic(), note, columns - 1)
            sys.stderr.write(line)
            sys.stderr.flush()

    def warn(self, line: str) -> None:
        """Log a message about a server and keep it for the dashboard."""
        self.warnings.append((time.time(), line))
        self._draw_bar(None)
        logger.warning(line)

    def listen(self) -> None:
        """Install signal handlers: the first INT, TERM or HUP requests an early stop, the second exits at once."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores HUP
                signal.signal(number, self._signalled)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        if self.stop_signal is None:
            self.stop(number)
        elif time.monotonic() >= self._signalled_at + SAME_SIGNAL_S:
            try:
                os.write(2, f"{self.how_to_resume() or 'ended at once'}\n".encode(errors="replace"))
            finally:
                os._exit(128 + number)

    def stop(self, number: int) -> None:
        """Request an early stop, as the first signal with this number does."""
        self._signalled_at = time.monotonic()  # first: another signal may arrive before the next line
        self.stop_signal = number
        # not through the log: the interrupted code may hold its lock
        with contextlib.suppress(OSError):  # the terminal is closed
            os.write(2, b"stopping; results so far are kept (once more to end at once)\n")


def progress_line(stage: Stage, now: float, note: str, room: int) -> str:
    """Return the progress of a stage in at most `room` columns; the least important parts are dropped, never cut."""
    _, done, total, began = stage
    rate = done / (now - began) if now > began else 0.0
    left = str(timedelta(seconds=math.ceil((total - done) / rate))) if rate else ""
    cells = [stage.name, " " * SHORTEST_BAR, f"{done:,} of {total:,}", f"{rate:,.0f}/s" if rate else "", left, note]
    name, bar, count, speed, time_left, last = range(len(cells))
    columns = fitting([len(cell) for cell in cells], (last, bar, speed, time_left, name), room, gap=1)
    spare = room - sum(len(cells[column]) + 1 for column in columns) + 1
    if spare < 0:  # even the count does not fit
        cells[count] = f"{100 * done / total:.0f}%"
    width = min(SHORTEST_BAR + spare, LONGEST_BAR)
    filled = width * done // max(total, 1)
    full, empty = "━╺" if "utf" in (sys.stderr.encoding or "").lower() else "=-"
    cells[bar] = full * filled + empty * (width - filled)
    return " ".join(cells[column] for column in columns)
