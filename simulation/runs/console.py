"""Terminal output of the main process: log lines and stage progress, both on standard error."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from loguru import logger

from simulation.files import ROOT
from simulation.results.tables import fitting

if TYPE_CHECKING:  # rich is imported where there is a terminal
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.progress import Progress

LINE_EVERY_S = 5.0
TOLD_KEPT = 100  # most recent messages about servers
SAME_SIGNAL_S = 1.0  # `timeout` and similar tools signal a process and then its process group
SHORTEST_BAR, LONGEST_BAR = 8, 40  # terminal columns
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
        self.told: deque[tuple[float, str]] = deque(maxlen=TOLD_KEPT)  # (time.time, message)
        self.how_to_resume: Callable[[], str | None] = lambda: None  # printed on the second signal
        self._signalled_at = 0.0
        self._stage = ""
        self._bar: Progress | None = None
        self._began = self._last_line = 0.0

    def progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Show the progress of a stage, with an optional note."""
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            self._stage, self._began, self._last_line = stage, now, now
            if sys.stderr.isatty():
                self._bar = _new_bar()
                self._bar.add_task(stage, total=total, note=note)
                self._bar.start()
        self.stage = Stage(stage, done, total, self._began)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, note=note)
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            rate = done / (now - self._began)
            left = f", about {(total - done) / rate:.0f} s left" if rate > 0 else ""
            logger.info(f"{stage}: {done:,} of {total:,} ({rate:,.0f}/s{left})" + f"; {note}" * bool(note))
        if done == total:
            self.close()

    def warn(self, line: str) -> None:
        """Log a message about a server and keep it for the dashboard."""
        self.told.append((time.time(), line))
        logger.warning(line)

    def listen(self) -> None:
        """Install signal handlers: the first INT, TERM or HUP requests an early stop, the second exits at once."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores HUP
                signal.signal(number, self._signalled)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        if self.stop_signal is not None:
            if time.monotonic() < self._signalled_at + SAME_SIGNAL_S:
                return
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h")  # the bar hides the cursor
            try:
                os.write(2, f"{self.how_to_resume() or 'ended at once'}\n".encode(errors="replace"))
            finally:
                os._exit(128 + number)
        self.stop(number)

    def stop(self, number: int) -> None:
        """Request an early stop, as the first signal with this number does."""
        self._signalled_at = time.monotonic()  # first: another signal may arrive before the next line
        self.stop_signal = number
        # not through the log: the interrupted code may hold its lock
        with contextlib.suppress(OSError):  # the terminal is closed
            os.write(2, b"stopping; results so far are kept (once more to end at once)\n")

    def close(self) -> None:
        """End the stage and remove its bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal is closed
                self._bar.stop()
        self._bar = None
        self._stage = ""


def _new_bar() -> Progress:
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress, RenderableColumn  # noqa: PLC0415

    line = _ProgressLine()
    line.progress = Progress(
        RenderableColumn(line),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # the moderator's announcements belong on standard output
        redirect_stderr=False,
    )
    return line.progress


class _ProgressLine:
    """Renderable progress of a stage, limited to the columns that fit the current terminal width."""

    progress: Progress

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.cells import cell_len  # noqa: PLC0415
        from rich.progress import TimeRemainingColumn  # noqa: PLC0415
        from rich.progress_bar import ProgressBar  # noqa: PLC0415
        from rich.table import Column, Table  # noqa: PLC0415

        for task in self.progress.tasks:
            total = task.total or 0
            count = f"{task.completed:,.0f} of {total:,.0f}"
            rate = f"{task.speed:,.0f}/s" if task.speed else ""
            left = TimeRemainingColumn().render(task)
            cells: list[Any] = [task.description, "", count, rate, left, task.fields["note"]]
            widths = [cell_len(str(cell)) for cell in cells]
            widths[1] = SHORTEST_BAR
            name, bar, number, speed, time_left, note = range(len(cells))
            places = fitting(widths, (note, bar, speed, time_left, name), options.max_width, gap=1)
            spare = options.max_width - sum(widths[place] + 1 for place in places) + 1
            if spare < 0:  # even the count does not fit
                cells[number] = f"{task.percentage:.0f}%"
            width = min(SHORTEST_BAR + spare, LONGEST_BAR)
            cells[bar] = ProgressBar(total=total, completed=task.completed, width=width, animation_time=task.get_time())
            table = Table.grid(*[Column(no_wrap=True) for _ in places], padding=(0, 1))
            table.add_row(*[cells[place] for place in places])
            yield table
