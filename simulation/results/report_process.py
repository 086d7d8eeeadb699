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
from typing import TYPE_CHECKING

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
            command = [sys.executable, str(ROOT / "main.py"), "--role", "report", "--draw-for-main"]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to_process, self._from_process = self._process.stdin, self._process.stdout

    def draw(self, run: SavedRun) -> None:
        """Draw the pictures and the report of a run into its folder. Raises SettingsError, ResultsError."""
        errors: list[SimulationError | None] = []  # empty if the process exits first

        def request() -> None:
            with contextlib.suppress(OSError, EOFError, ValueError):
                pickle.dump(run, self._to_process)
                self._to_process.flush()
                errors.append(pickle.load(self._from_process))

        thread = threading.Thread(target=request, daemon=True)
        thread.start()
        thread.join(LONGEST_S)
        if not errors:
            self._process.kill()
            logger.warning(f"the process that draws reports ended with status {self._process.wait()}: drawing here")
            from simulation.results.report_page import draw_all  # noqa: PLC0415 - only here in this process

            draw_all(run)
        elif errors[0] is not None:
            raise errors[0]

    def close(self) -> None:
        """Kill the process, which is not drawing but may still be importing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._to_process, self._from_process):
            with contextlib.suppress(OSError):  # a run was sent only in part
                pipe.close()


def serve() -> None:
    """Run the process: draw runs until standard input ends or standard output is closed."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keep output of libraries out of the replies
    from simulation.results.report_page import draw_all  # noqa: PLC0415 - what takes long

    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            run: SavedRun = pickle.load(sys.stdin.buffer)
            try:
                draw_all(run)
                replies.write(pickle.dumps(None))
            except SimulationError as error:
                replies.write(pickle.dumps(error))
