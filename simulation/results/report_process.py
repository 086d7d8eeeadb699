"""A process that draws the pictures and the report of runs: it imports what that takes while the first one plays.

It reads runs from its standard input, and writes on its standard output what became of each, both pickled. It ends
when its input does, so also with a main that was killed. Signals are for main, which draws itself if the process fails.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from loguru import logger

from simulation.errors import SimulationError
from simulation.files import ROOT

if TYPE_CHECKING:
    from simulation.results.reader import SavedRun

LONGEST_S = 300.0  # a report that takes longer hangs
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ReportProcess:
    """The process, as its starter sees it; started at once, and ended by `close`."""

    def __init__(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # the process has them blocked until it ignores them
        try:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "main.py"), "--role", "report", "--draw-for-main"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def draw(self, run: SavedRun) -> None:
        """Draw the pictures and the report of a run into its folder, and wait for them.

        Args:
            run: The run; its `groups` are counted where it is drawn.

        Raises:
            SettingsError: The answers in its folder cannot be read.
            ResultsError: The folder does not take them.
        """
        told: list[SimulationError | None] = []
        asking = threading.Thread(target=self._ask, args=(run, told), daemon=True)
        asking.start()
        asking.join(LONGEST_S)
        if not told:
            self._process.kill()
            logger.warning(f"the process that draws reports ended with status {self._process.wait()}: drawing here")
            _draw(run)
        elif told[0] is not None:
            raise told[0]

    def close(self) -> None:
        """End the process, which draws nothing by now, but may still be importing."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # a run was left half-sent
                pipe.close()

    def _ask(self, run: SavedRun, told: list[SimulationError | None]) -> None:
        """Have the process draw a run, and append what became of it; nothing if the process ends before."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError, EOFError, ValueError):
            pickle.dump(run, self._process.stdin)
            self._process.stdin.flush()
            told.append(pickle.load(self._process.stdout))


def serve() -> None:
    """Be that process: draw runs until standard input ends, or nobody reads what became of them."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    answers: IO[Any] = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    import simulation.results.report_page  # noqa: F401, PLC0415 - what takes long

    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            run: SavedRun = pickle.load(sys.stdin.buffer)
            error = None
            try:
                _draw(run)
            except SimulationError as raised:
                error = raised
            answers.write(pickle.dumps(error))


def _draw(run: SavedRun) -> None:
    from simulation.results.reader import read_groups  # noqa: PLC0415 - where it is drawn alone
    from simulation.results.report_page import draw_all  # noqa: PLC0415

    draw_all(replace(run, groups=read_groups(run.path, run.game, run.results)))
