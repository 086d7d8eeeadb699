"""A process that draws the pictures and the report of runs: it imports what that takes while the first one plays.

It reads runs from its standard input, and writes on its standard output what became of each, both pickled. It ends when
its input does, so also with a main that was killed; a Ctrl-C in the terminal is main's, which waits for it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from simulation.config import ROOT
from simulation.errors import ResultsError, SimulationError

if TYPE_CHECKING:
    from simulation.past_runs import PastRun


class ReportProcess:
    """The process, as its starter sees it; started at once, and ended by `close`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), "--role", "report", "--draw"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )

    def draw(self, run: PastRun) -> None:
        """Draw the pictures and the report of a run into its folder, and wait for them.

        Args:
            run: The run; its `groups` are counted by the process.

        Raises:
            SettingsError: The answers in its folder cannot be read.
            ResultsError: The folder does not take them, or the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump(run, self._process.stdin)
            self._process.stdin.flush()
            error = pickle.load(self._process.stdout)
        except (OSError, EOFError):
            raise ResultsError(
                f"the report of {run.path} could not be drawn: its process ended with status {self._process.wait()}; "
                f"to draw it again: .venv/bin/python main.py --role report --run-dir {run.path}"
            ) from None
        if error is not None:
            raise error

    def close(self) -> None:
        """End the process, which draws nothing by now, but may still be importing."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):  # a run was left half-sent
            self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    """Be that process: draw runs until standard input ends."""
    answers: IO[Any] = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    from simulation.past_runs import read_groups  # noqa: PLC0415 - for this process alone
    from simulation.report_page import draw_all  # noqa: PLC0415 - what takes long

    while True:
        try:
            run: PastRun = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        error = None
        try:
            draw_all(replace(run, groups=read_groups(run.path, run.game, run.results)))
        except SimulationError as raised:
            error = raised
        pickle.dump(error, answers)
        answers.flush()
