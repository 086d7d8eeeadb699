"""Commands for a run in progress: status, pause, continue, stop, set. They come from the live page or from a socket.

Only the user of the run can open the socket. It is in a short private folder, because the path of a socket has 108
characters at most; the run folder contains its path.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import socketserver
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from simulation.errors import ClusterError, SettingsError, SimulationError, nearest, one_line, printable, reason
from simulation.files import shown
from simulation.monitoring.dashboard_state import DashboardState
from simulation.results.run_directory import CONTROL
from simulation.results.tables import table_lines
from simulation.runs.console import ConsoleProgress
from simulation.settings import KINDS, SETTINGS, flag_of, to_number

if TYPE_CHECKING:
    from simulation.runs.run import Run

COMMANDS = ("status", "pause", "continue", "stop", "set")
CHANGEABLE = ("rounds", "max_tokens", "max_in_flight", "heartbeat_timeout")  # by the command `set`
SHORT, LONGEST = Path("/tmp"), 80  # folder for the socket if the path of the usual one is too long
TIMEOUT_S = 30.0
POLL_S = 0.02  # longest time that `close` waits for the thread
REQUEST_BYTES = 4096


class Control:
    """Executes commands until `close`. The constructor opens the socket; `announce` tells other commands its path."""

    def __init__(self, console: ConsoleProgress) -> None:
        self.console = console
        self.state: DashboardState | None = None  # of the current run, or of the last one
        self._folder: Path | None = None  # None: no socket could be opened
        self._server: socketserver.BaseServer | None = None
        try:
            usual = Path(tempfile.gettempdir())
            self._folder = Path(tempfile.mkdtemp(prefix="run-", dir=usual if len(str(usual)) < LONGEST else SHORT))
            self._server = self._listening(str(self._folder / "socket"))
        except OSError as error:  # the game needs no commands
            logger.warning(f"--role control cannot reach this run: no socket can be opened: {reason(error)}")

    def _listening(self, path: str) -> socketserver.BaseServer:
        execute = self.execute

        class Handler(socketserver.StreamRequestHandler):
            timeout = TIMEOUT_S

            def handle(self) -> None:
                try:
                    words = json.loads(self.rfile.readline(REQUEST_BYTES))
                    if not isinstance(words, list):
                        raise ValueError("it is no list of words")
                    try:
                        reply = execute([*map(str, words)])
                    except SimulationError as error:
                        reply = {"error": str(error)}
                    self.wfile.write(json.dumps(reply).encode() + b"\n")
                except (ValueError, RecursionError, OSError) as error:
                    logger.warning(f"no command for the run, or its sender has gone: {one_line(error)}")

        class Server(socketserver.ThreadingUnixStreamServer):
            request_queue_size = 128  # commands that wait while the run is busy

        server = Server(path, Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(POLL_S,), name="control", daemon=True).start()
        return server

    def close(self) -> None:
        """Close the socket and remove its folder."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def announce(self, folder: Path) -> Iterator[None]:
        """Write the path of the socket to the folder of a run or sweep during the `with` block."""
        if self._server is not None:
            content = {"socket": f"{self._folder}/socket", "host": socket.gethostname(), "pid": os.getpid()}
            with contextlib.suppress(OSError):  # a full disk is reported by what must be written
                (folder / CONTROL).write_text(json.dumps(content), encoding="utf-8")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / CONTROL).unlink(missing_ok=True)

    @contextmanager
    def observe(self, run: "Run") -> Iterator[None]:
        """Execute commands for `run` during the `with` block, and then show its last state."""
        state = self.state = DashboardState(run)
        try:
            with self.announce(run.directory.path):
                yield
        finally:
            state.over = True

    def execute(self, words: Sequence[str]) -> dict[str, Any]:
        """Execute a command, such as ["set", "rounds", "5"], and return the state. Raises SettingsError."""
        name, *values = checked(words)
        if name in ("pause", "continue"):
            self.console.pause(name == "pause")
            if self.state is not None and not self.state.over:
                self.state.run.change()
        elif name == "stop" and self.console.stop_signal is None:
            logger.info("an early end of the run is requested")
            self.console.stop(signal.SIGINT)
        elif name == "set":
            self._set(*values)
        stage, state = self.console.stage, self.state
        return {
            "run": None if state is None else state.state(stage),
            "stage": None if stage is None else stage._asdict(),
            "paused": self.console.paused,
            "stopping": self.console.stop_signal is not None,
            "log": list(self.console.warnings),
        }

    def _set(self, name: str, text: str) -> None:
        name = name.lstrip("-").replace("-", "_")
        if name not in CHANGEABLE:
            raise SettingsError(f"set {printable(name)}: cannot be changed in a run; {nearest(name, CHANGEABLE)}")
        if self.state is None or self.state.over:
            raise SettingsError(f"set {name}: no run is in progress at the moment")
        kind, flag = KINDS[name], flag_of(name)
        value = None if text == "none" and type(None) in kind else to_number(kind[0], flag, text)
        SETTINGS[name].check(flag, value)
        self.state.run.change(**{name: value})
        logger.info(f"{flag} is {value if value is not None else 'none'} from now on")


def checked(words: Sequence[str]) -> Sequence[str]:
    """Return the words of a command. Raises SettingsError if there is no such command."""
    flag = f"--role control {printable(' '.join(words))}"
    if not words or words[0] not in COMMANDS:
        raise SettingsError(f"{flag}: there is no such command; {nearest(''.join(words[:1]), COMMANDS)}")
    if len(words) != (3 if words[0] == "set" else 1):
        raise SettingsError(f"{flag}: " + ("write set NAME VALUE" if words[0] == "set" else f"write {words[0]} alone"))
    return words


def send(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Send a command to the run or sweep in `folder` and return the reply. Raises ClusterError or SettingsError."""
    words, flag = checked(words), f"--role control {shown(folder)}"
    try:
        found = json.loads((folder / CONTROL).read_text(encoding="utf-8"))
        if found["host"] != socket.gethostname():
            raise ClusterError(f"{flag}: is played on host {printable(str(found['host']))}; run this command there")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(found["socket"])
            connection.sendall(json.dumps([*words]).encode() + b"\n")
            reply = json.loads(connection.makefile("rb").readline())
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        raise ClusterError(f"{flag}: no command plays this run now; --run-dir names another") from None
    except OSError as error:
        raise ClusterError(f"{flag}: no answer from the run: {reason(error)}") from None
    except (ValueError, KeyError, TypeError):
        raise ClusterError(f"{flag}: its {CONTROL}, or the answer of the run, is damaged") from None
    if "error" in reply:
        raise SettingsError(reply["error"])
    return dict(reply)


def state_lines(reply: dict[str, Any]) -> list[str]:
    """Return a text with what the live page shows."""
    run, stage = reply["run"], reply["stage"]
    how = "stopping" if reply["stopping"] else "paused" if reply["paused"] else "in progress"
    if run is None:
        return [f"no round yet; {how}" + (f"; {stage['name']}: {stage['done']} of {stage['total']}" if stage else "")]
    config, number = run["config"], run["round"]
    lines = [f"run {run['run_id']} {run['label']}".rstrip() + f": {how}"]
    lines += [f"{config['participant_num']:,} participants ({config['kind']}), {config['rounds']} rounds"]
    if number is not None:
        done, failed = number["done"] - number["failed"], number["failed"]
        lines += [f"round {number['number']}: {done:,} answers and {failed:,} failures in {number['seconds']:.1f} s"]
    columns = ("round", "answered", "failed", "average", "seconds")
    rows = [[_text(each[name]) for name in columns] for each in run["rounds"]]
    lines += table_lines(columns, rows, dropped=("seconds",), left=()) if rows else []
    lines += [f"failures: {printable(cause)}: {count:,}" for cause, count in run["failures"]]
    if run["llm"] is not None:
        usage = run["llm"]
        tokens = f"{usage['prompt_tokens']:,} tokens of prompts and {usage['completion_tokens']:,} of answers"
        lines += [f"{usage['requests']:,} requests ({usage['retries']:,} repeated), {tokens}"]
    if run["servers"] is not None:
        lines += ["servers: " + ", ".join(f"{count} {state}" for state, count in run["servers"]["states"].items())]
    return [*lines, *(f"warning: {printable(text)}" for _, text in reply["log"][-3:])]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:,g}"
