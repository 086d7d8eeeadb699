"""Start the program's commands without their imports: a process that has imported every library forks a child for each.

    python tests/warm.py <socket> <padding>

The child is the command in all that a test can see: its own pid, session, signals, exit status, standard streams and
command line. Only the libraries are shared; the program's own files are imported anew, from the checkout of the test.
What the command starts in turn (the launcher of agent servers, the process that draws reports) is forked likewise.
The process ends when its standard input does, so also when the worker that holds it open was killed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    *("aiohttp", "cloudpickle", "cryptography.x509", "grpc.aio", "jinja2", "loguru", "numpy", "openai", "psutil"),
    *("agentscope.agents", "agentscope.manager", "agentscope.rpc", "agentscope.server.servicer", "httpx2", "uvloop"),
    *("matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "matplotlib.figure", "multiprocessing"),
    *("pyarrow.compute", "pyarrow.parquet", "pydantic", "rich.progress", "yaml", "aiohttp.web", "concurrent.futures"),
    *("cryptography.hazmat.primitives.serialization", "matplotlib.style", "numpy.random", "pyarrow.csv", "tomllib"),
)
SETTINGS = {"OPENBLAS_NUM_THREADS": "1", "GRPC_VERBOSITY": "NONE", "GRPC_DNS_RESOLVER": "native"}
PADDING = 16_000  # room for the command line of a child
PR_SET_MM, PR_SET_MM_ARG_END = 35, 9


class WarmPopen(subprocess.Popen):  # type: ignore[type-arg]
    """A Popen; the process at `address` forks `<python> <.../main.py> ...`, and other commands start as ever."""

    address = ""  # of the socket; empty starts everything as ever
    _status: socket.socket | None = None

    def _execute_child(self, args: Any, *rest: Any) -> None:
        words = [os.fspath(word) for word in args] if isinstance(args, (list, tuple)) else []
        words = [word for place, word in enumerate(words) if (place, word) != (1, "-P")]  # main.py sees to its path
        if not self.address or [Path(word).name for word in words[:2]] != ["python", "main.py"]:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        assert rest[1] is None and not rest[3] and rest[21] == -1, "preexec_fn, pass_fds, process_group: start it cold"
        cwd, env, start_new_session = rest[4], rest[5], rest[20]
        in_read, in_write, out_read, out_write, err_read, err_write = rest[9:15]
        streams = [given if given != -1 else own for given, own in ((in_read, 0), (out_write, 1), (err_write, 2))]
        command = {
            "args": words,
            "cwd": os.fspath(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "new_session": bool(start_new_session),
        }
        self._status = socket.socket(socket.AF_UNIX)
        self._status.connect(self.address)
        text = json.dumps(command).encode()
        socket.send_fds(self._status, [len(text).to_bytes(8, "big")], streams)
        self._status.sendall(text)
        self.pid = int.from_bytes(_received(self._status, 8), "big")
        self._child_created = True
        nothing = getattr(self, "_devnull", None)
        for ours, theirs in ((in_write, in_read), (out_read, out_write), (err_read, err_write)):
            if -1 not in (ours, theirs) and theirs != nothing:  # a pipe, of which the other end is ours
                os.close(theirs)
        if nothing is not None:
            os.close(nothing)
        self._closed_child_pipe_fds = True

    def _internal_poll(self, *args: Any, **kwargs: Any) -> int | None:
        if self._status is None:
            return super()._internal_poll(*args, **kwargs)  # type: ignore[misc,no-any-return]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._status is None:
            return super()._wait(timeout)  # type: ignore[misc,no-any-return]
        with self._waitpid_lock:  # type: ignore[attr-defined]
            if self.returncode is None:
                if not select.select([self._status], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                status = int.from_bytes(_received(self._status, 8), "big")
                self.returncode = os.waitstatus_to_exitcode(status)
                self._status.close()
        return self.returncode


def _received(connection: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count:
        part = connection.recv(count - len(content))
        if not part:
            raise RuntimeError("the process that forks commands has ended")
        content += part
    return content


class WarmPython:
    """The process that forks; as a context it lasts as long as that."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "warm")
        command = [sys.executable, __file__, self.address, "x" * PADDING]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, env=os.environ | SETTINGS, start_new_session=True
        )

    def __enter__(self) -> WarmPython:
        while not Path(self.address).exists():
            assert self._process.poll() is None, "the process that forks commands has ended"
            time.sleep(0.01)
        WarmPopen.address = self.address
        return self

    def __exit__(self, *_: object) -> None:
        WarmPopen.address = ""
        self._process.communicate()  # which closes the pipe that it reads


def serve(address: str) -> NoReturn:
    """Import the libraries, and fork a child for each connection."""
    sys.path.append(str(ROOT))  # last: a file random.py there is none of Python's
    from simulation.rpc.lean_import import import_agentscope

    import_agentscope()
    for library in LIBRARIES:
        __import__(library)
    _draw()
    sys.path.remove(str(ROOT))
    for name in [name for name in sys.modules if name.split(".")[0] == "simulation"]:
        del sys.modules[name]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    Path(f"{address}.new").rename(address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for children
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _supervise(connection)
        connection.close()


def _draw() -> None:
    """Draw a picture, so that the processes that draw reports find the fonts and the modules for files loaded."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    figure.add_subplot().set_title("a")
    figure.savefig(io.BytesIO(), format="png")


def _supervise(connection: socket.socket) -> NoReturn:
    """Fork the child that a connection asks for, and send its pid, and its status when it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = socket.recv_fds(connection, 8, 3)
    command = json.loads(_received(connection, int.from_bytes(length, "big")))
    child = os.fork()
    if child == 0:
        connection.close()
        _run(command, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(child.to_bytes(8, "big"))
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):  # nobody asks any more
        connection.sendall(status.to_bytes(8, "big"))
    os._exit(0)


def _run(command: dict[str, Any], streams: list[int]) -> NoReturn:
    """Be the command, from its first line to its exit status."""
    if command["new_session"]:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    python, main, *arguments = command["args"]
    _show_command_line(command["args"])
    sys.executable, sys.argv = python, [main, *arguments]
    sys.path.insert(0, str(Path(main).parent))
    sys.stdin, sys.stdout, sys.stderr = _stream(0, "r", "strict"), _stream(1, "w", "strict"), _stream(2, "w", "")
    subprocess.Popen = WarmPopen  # type: ignore[misc]
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    vars(module)["__file__"] = main
    status = 0
    try:
        exec(compile(Path(main).read_bytes(), main, "exec"), vars(module))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:  # noqa: BLE001 - as Python itself
        traceback.print_exc()
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        print(f"Exception ignored in: {sys.stdout}\n{type(error).__name__}: {error}", file=sys.stderr)
        status = 120
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    if status < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def _stream(number: int, mode: str, errors: str) -> Any:
    """A standard stream as Python makes it."""
    unbuffered = mode == "w" and bool(os.environ.get("PYTHONUNBUFFERED"))
    file: Any = open(number, mode + "b", 0 if unbuffered else -1, closefd=False)  # noqa: SIM115
    by_line = number == 2 or os.isatty(number)
    return io.TextIOWrapper(
        file, "utf-8", errors or "backslashreplace", line_buffering=by_line, write_through=unbuffered
    )


def _show_command_line(words: list[str]) -> None:
    """Let the system show these as the command line of this process, and of those that it forks."""
    fields = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"".join(word.encode() + b"\0" for word in words)
    assert len(text) < end - start, words
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)
    ctypes.CDLL(None).prctl(PR_SET_MM, PR_SET_MM_ARG_END, ctypes.c_ulong(start + len(text)), 0, 0)  # root may


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    sys.modules["warm"] = sys.modules["__main__"]
    WarmPopen.address = sys.argv[1]
    serve(sys.argv[1])
