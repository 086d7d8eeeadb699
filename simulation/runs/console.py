"""Terminal output of the main process on standard error: log lines and the progress of stages."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any, NamedTuple

from loguru import logger

from simulation.errors import say
from simulation.files import HOME
from simulation.results.tables import fitting

LINE_EVERY_S = 5.0
WARNINGS_KEPT = 100
SAME_SIGNAL_S = 1.0  # `timeout` and similar tools send the same signal twice
SHORTEST_BAR, LONGEST_BAR, USUAL_WIDTH = 8, 40, 80  # terminal columns
LONGEST_LEFT_S = 1e8  # a longer estimate, of about 3 years, is not shown
DEFECT_LOG = HOME / "run" / "defects.log"


def log_to_stderr(quiet: bool = False) -> None:
    """Configure the log on standard error, without tracebacks. If `quiet`, it has only warnings and errors.

    On a terminal, a line has only the time of day and the text.
    """
    logger.enable("simulation")
    logger.remove()
    line = _short_line if sys.stderr.isatty() else "{time:YYYY-MM-DD HH:mm:ss.SSS} | {level: <8} | {message}"
    logger.add(sys.stderr, format=line, level="WARNING" if quiet else "INFO")


def _short_line(record: Any) -> str:
    level = record["level"]
    return f"{{time:HH:mm:ss}} {f'{level.name.lower()}: ' if level.name != 'INFO' else ''}{{message}}\n"


def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Set the handler of the signals INT, TERM and HUP. Ignored signals stay ignored, such as HUP with nohup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def keep_traceback() -> str:
    """Append the current traceback to DEFECT_LOG, and return that path. If this fails, return the traceback instead."""
    text = traceback.format_exc()
    try:
        DEFECT_LOG.parent.mkdir(exist_ok=True)
        with DEFECT_LOG.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(time.strftime("%Y-%m-%d %H:%M:%S\n") + text + "\n")
    except OSError:
        return f"this traceback (which could not be kept in {DEFECT_LOG}): {text}"
    return str(DEFECT_LOG)


class Stage(NamedTuple):
    """The progress of a stage of the run, such as waiting for the answers of a round."""

    name: str
    done: int
    total: int
    began: float  # time.monotonic


class ConsoleProgress:
    """Progress on standard error: a bar on a terminal, else a line every LINE_EVERY_S seconds. Handles stop signals.

    If `quiet`, only warnings are shown. If `json`, results are log lines: standard output is for summary.json.
    """

    def __init__(self, quiet: bool = False, json: bool = False) -> None:
        self.quiet, self.json = quiet, json
        self.stop_signal: int | None = None
        self.paused = False  # no round starts, and models receive no requests; see `pause`
        self.resumed = threading.Event()  # set by `pause` when the game goes on
        self.waiting_since = time.monotonic()  # the start of the program, or the end of the previous run
        self.stage: Stage | None = None  # the latest stage
        self.warnings: deque[tuple[float, str]] = deque(maxlen=WARNINGS_KEPT)  # (time.time, message)
        self.how_to_resume: Callable[[], str | None] = lambda: None  # called on the second signal; its line is printed
        self._is_open = False  # whether the latest stage is still in progress
        self._has_bar = False
        self._signalled_at = self._last_line = 0.0

    def progress(self, name: str, done: int, total: int, note: str = "") -> None:
        """Show the progress of a stage. `note` is an additional text."""
        now = time.monotonic()
        if not self._is_open or self.stage is None or name != self.stage.name:
            self.stage, self._last_line = Stage(name, done, total, now), now
        self.stage = self.stage._replace(done=done, total=total)
        self._is_open = done != total
        if sys.stderr.isatty():
            room = self._columns - 1
            self._replace_bar(progress_line(self.stage, time.monotonic(), note, room) if self._is_open else "")
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            logger.info(f"{name}: {done:,} of {total:,}{self._pace(now)}" + f"; {note}" * bool(note))

    def _pace(self, now: float) -> str:
        """Return the rate of the stage and the time left, in parentheses; "" below one in a second."""
        assert self.stage is not None
        rate = self.stage.done / (now - self.stage.began)
        left = (self.stage.total - self.stage.done) / rate if rate else 0
        return f" ({rate:,.0f}/s, about {left:.0f} s left)" if rate >= 1 else ""

    def close(self) -> None:
        """End the stage and remove its bar."""
        self._is_open = False
        self._replace_bar("")

    @contextlib.contextmanager
    def during(self, work: str) -> Iterator[None]:
        """Show `work` on a terminal while the block is executed."""
        if sys.stderr.isatty():
            self._replace_bar(work if len(work) < self._columns else "")
        try:
            yield
        finally:
            self._replace_bar("")

    @property
    def _columns(self) -> int:
        with contextlib.suppress(OSError):  # the terminal is closed
            return os.get_terminal_size(sys.stderr.fileno()).columns or USUAL_WIDTH
        return USUAL_WIDTH

    def _replace_bar(self, line: str) -> None:
        """Draw `line` in place of the previous bar, if any. If `line` is empty, only remove the previous bar."""
        line = "" if self.quiet else line
        text, self._has_bar = "\r\x1b[K" * self._has_bar + line, bool(line)
        with contextlib.suppress(OSError):  # the terminal is closed
            sys.stderr.write(text)
            sys.stderr.flush()

    def say(self, lines: Iterable[str]) -> None:
        """Print results, after removing the bar."""
        self._replace_bar("")
        for line in lines:
            (logger.info if self.json else say)(line)

    def explain(self, text: str) -> None:
        """Print a text on standard error."""
        say(text, sys.stderr)

    def warn(self, line: str) -> None:
        """Log a warning about a server, and store the warning for the dashboard."""
        self.warnings.append((time.time(), line))
        self._replace_bar("")
        logger.warning(line)

    def pause(self, paused: bool) -> None:
        """Pause the game after the answers under way, or let it go on."""
        if paused != self.paused:
            self.paused = paused
            (self.resumed.clear if paused else self.resumed.set)()
            logger.info("paused: no request and no round starts" if paused else "going on")

    def signalled(self, number: int, _frame: FrameType | None) -> None:
        """Handle a stop signal. The first requests an early stop; one at least SAME_SIGNAL_S later exits at once."""
        if self.stop_signal is None:
            self.stop(number)
        elif time.monotonic() >= self._signalled_at + SAME_SIGNAL_S:
            try:
                os.write(2, f"{self.how_to_resume() or 'ended at once'}\n".encode(errors="replace"))
            finally:
                os._exit(128 + number)

    def stop(self, number: int) -> None:
        """Request an early stop, as if the signal `number` had arrived."""
        self._signalled_at = time.monotonic()  # set this first: another signal may arrive before the next line
        self.stop_signal = number
        # Do not use the log: the interrupted code may have locked it
        with contextlib.suppress(OSError):  # the terminal is closed
            os.write(2, b"stopping; results so far are kept (once more to end at once)\n")


class PythonProgress(ConsoleProgress):
    """Progress for the Python interface. Nothing is printed if `quiet`. If `bar`, a bar shows each stage."""

    def __init__(self, quiet: bool, bar: bool) -> None:
        super().__init__(quiet)
        self._shows_bar = bar
        self._bar: Any = None  # of tqdm

    def progress(self, name: str, done: int, total: int, note: str = "") -> None:
        is_new = not self._is_open or self.stage is None or name != self.stage.name
        super().progress(name, done, total, note)
        if not self._shows_bar:
            return
        with warnings.catch_warnings(action="ignore"):  # without ipywidgets, a notebook shows text instead of a widget
            from tqdm.auto import tqdm  # noqa: PLC0415 - takes 0.1 s

        if is_new:
            self._close_bar()
            self._bar = tqdm(total=total, desc=name, leave=False)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def stop(self, number: int) -> None:
        self._signalled_at, self.stop_signal = time.monotonic(), number

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def close(self) -> None:
        self._close_bar()
        super().close()

    def _replace_bar(self, line: str) -> None:
        if not (self.quiet or self._shows_bar):
            super()._replace_bar(line)

    def say(self, lines: Iterable[str]) -> None:
        if not self.quiet:
            super().say(lines)

    def explain(self, text: str) -> None:
        if not self.quiet:
            super().explain(text)

    def signalled(self, number: int, _frame: FrameType | None) -> None:
        """Request an early stop. Raise KeyboardInterrupt if that was requested at least SAME_SIGNAL_S before."""
        if self.stop_signal is None:
            self.stop(number)
        elif time.monotonic() >= self._signalled_at + SAME_SIGNAL_S:
            raise KeyboardInterrupt


def progress_line(stage: Stage, now: float, note: str, room: int) -> str:
    """Return a line that shows the progress of a stage. If it exceeds `room` columns, omit less important parts."""
    _, done, total, began = stage
    rate = done / (now - began) if now > began else 0.0
    seconds_left = max(total - done, 0) / rate if rate else math.inf
    left = str(timedelta(seconds=math.ceil(seconds_left))) if seconds_left < LONGEST_LEFT_S else ""
    cells = [stage.name, " " * SHORTEST_BAR, f"{done:,} of {total:,}", f"{rate:,.0f}/s" if rate else "", left, note]
    name, bar, count, speed, time_left, last = range(len(cells))
    columns = fitting([len(cell) for cell in cells], (last, bar, speed, time_left, name), room, gap=1)
    spare = room - sum(len(cells[column]) + 1 for column in columns) + 1
    if spare < 0:  # the count does not fit, either
        cells[count] = f"{100 * done // total}%"
    width = min(SHORTEST_BAR + spare, LONGEST_BAR)
    filled = width * min(done, total) // max(total, 1)
    full, empty = "━╺" if "utf" in (sys.stderr.encoding or "").lower() else "=-"
    cells[bar] = full * filled + empty * (width - filled)
    return " ".join(cells[column] for column in columns)
