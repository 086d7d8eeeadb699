"""A process that creates the pictures and reports of runs. It imports slow libraries while the first run is under way.

The process ignores INT, TERM and HUP signals. It exits when main exits or closes the connection. If the process fails,
main creates the report itself.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import cloudpickle
from loguru import logger

from simulation.errors import SimulationError
from simulation.files import ROOT

if TYPE_CHECKING:
    from simulation.results.reader import SavedRun

LONGEST_S = 300.0  # if a report takes longer, the process counts as hung
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ReportProcess:
    """The client of the report process. `__init__` starts the process, and `close` kills it."""

    def __init__(self) -> None:
        self._connection, other_end = socket.socketpair()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # the process inherits and keeps this mask
        try:
            command = [sys.executable, str(ROOT / "main.py"), "--role", "report", "--draw-for-main"]
            with other_end:  # `stdout=2` is standard error: libraries may print, but standard output is for results
                stdin = other_end.fileno()
                self._process = subprocess.Popen(command, stdin=stdin, stdout=2, cwd=ROOT, start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def draw(self, run: "SavedRun") -> None:
        """Make the process write a run's pictures and report to its folder. If the process fails, write them in main.

        Raises SettingsError if the answers cannot be read, and ResultsError if a file cannot be written.
        """
        try:
            self._connection.settimeout(LONGEST_S)
            self._connection.sendall(cloudpickle.dumps(run))  # a user's game travels by value
            error: SimulationError | None = pickle.load(self._connection.makefile("rb"))
        except (OSError, EOFError, pickle.UnpicklingError):
            self._process.kill()
            logger.warning(f"the process that draws reports ended with status {self._process.wait()}: drawing here")
            from simulation.results.report_page import draw_all  # noqa: PLC0415 - slow, and needed in this case only

            draw_all(run)
        else:
            if error is not None:
                raise error

    def close(self) -> None:
        """Kill the process, which may still be importing modules. Never called while a report is being created."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


def serve() -> None:
    """Create reports in the report process until main closes the connection (standard input)."""
    from simulation.results.report_page import draw_all  # noqa: PLC0415 - slow

    connection = socket.socket(fileno=os.dup(0))
    requests = connection.makefile("rb")
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            run: SavedRun = pickle.load(requests)
            error = None
            try:
                draw_all(run)
            except SimulationError as caught:
                error = caught
            connection.sendall(pickle.dumps(error))
