"""A process that draws the pictures and reports of runs; it imports the libraries while the first run plays.

It reads pickled runs from standard input, and writes a pickled error or None for each to standard output. It exits at
the end of its input, so also when main is killed. It leaves signals to main, which draws itself if the process fails.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from typing import IO, TYPE_CHECKING, Any

from loguru import logger

from simulation.errors import SimulationError
from simulation.files import ROOT

if TYPE_CHECKING:
    from simulation.results.reader import SavedRun

LONGEST_S = 300.0  # a report that takes longer is considered hung
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ReportProcess:
    """The client side of the process, which `__init__` starts and `close` ends."""

    def __init__(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # inherited: blocked until the process ignores them
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
        """Draw the pictures and the report of a run into its folder, and wait for completion.

        Args:
            run: The run; its answers are read in the drawing process.

        Raises:
            SettingsError: The answers in its folder cannot be read.
            ResultsError: The results cannot be written.
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
        """Kill the process, which is not drawing but may still be importing."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # a run was sent only in part
                pipe.close()

    def _ask(self, run: SavedRun, told: list[SimulationError | None]) -> None:
        """Have the process draw a run, and append the error or None; append nothing if the process exits first."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError, EOFError, ValueError):
            pickle.dump(run, self._process.stdin)
            self._process.stdin.flush()
            told.append(pickle.load(self._process.stdout))


def serve() -> None:
    """Run the process: draw runs until standard input ends or standard output is closed."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    answers: IO[Any] = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keep output of libraries out of the answers
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
    from simulation.results.report_page import draw_all  # noqa: PLC0415 - where it is drawn alone

    draw_all(run)
