"""A process that creates the pictures and reports of runs. It imports slow libraries while the first run is under way.

The process reads pickled runs from standard input. For each run, it writes a pickled error or None to standard output.
The process ignores signals. It exits at the end of its input, also if the main process was killed. If the report
process fails, the main process creates the report itself.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

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
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # the child inherits this mask
        try:
            command = [sys.executable, str(ROOT / "main.py"), "--role", "report", "--draw-for-main"]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._requests = ThreadPoolExecutor(1)

    def draw(self, run: "SavedRun") -> None:
        """Write the pictures and the report of a run to its folder. If the process fails, write them in this process.

        Raises SettingsError if the answers cannot be read, and ResultsError if a file cannot be written.
        """
        try:
            error = self._requests.submit(self._request, run).result(LONGEST_S)
        except (OSError, EOFError, pickle.UnpicklingError, TimeoutError):
            self._process.kill()
            logger.warning(f"the process that draws reports ended with status {self._process.wait()}: drawing here")
            from simulation.results.report_page import draw_all  # noqa: PLC0415 - slow, and needed in this case only

            draw_all(run)
        else:
            if error is not None:
                raise error

    def _request(self, run: "SavedRun") -> SimulationError | None:
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump(run, self._process.stdin)
        self._process.stdin.flush()
        error: SimulationError | None = pickle.load(self._process.stdout)
        return error

    def close(self) -> None:
        """Kill the process. The process creates no report at this time, but its imports may still be under way."""
        self._process.kill()
        self._process.communicate()
        self._requests.shutdown()


def serve() -> None:
    """Run the report process until standard input ends or standard output is closed."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries that print do not damage the replies
    from simulation.results.report_page import draw_all  # noqa: PLC0415 - slow

    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            run: SavedRun = pickle.load(sys.stdin.buffer)
            try:
                draw_all(run)
                replies.write(pickle.dumps(None))
            except SimulationError as error:
                replies.write(pickle.dumps(error))
