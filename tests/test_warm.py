"""What tests/warm.py forks ends as what Python starts: with the same status and output, and of the same signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import until
from warm import WarmPopen

HEAD = "import os, pathlib, signal, sys, time\nsignal.signal(signal.SIGCHLD, signal.SIG_DFL)\n"
ENDS = {
    "a status": "print('out'); print('err', file=sys.stderr); sys.exit(3)",
    "a text": "sys.exit('bye')",
    "no status": "sys.exit()",
    "an error": "raise ValueError('no')",
    "an interrupt": "raise KeyboardInterrupt",
    "a signal": "os.kill(os.getpid(), signal.SIGKILL)",
    "at exit": "import atexit; atexit.register(print, 'at exit')",
    "a thread": "import threading; threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
    "arguments": "print(sys.argv[1:], os.environ['GIVEN'], os.getcwd(), sys.stdin.read())",
    "its own session": "print(os.getsid(0) == os.getpid())",
}


def ended(popen, folder, code, unbuffered="", **options):
    """Status and output of a main.py with this code; of what it wrote about an error, the last line."""
    (folder / "main.py").write_text(HEAD + code)
    command = [sys.executable, str(folder / "main.py"), "a b", "c"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE, **options}
    env = {**os.environ, "GIVEN": "ä", "PYTHONUNBUFFERED": unbuffered}
    with popen(command, text=True, cwd=folder, env=env, start_new_session=True, **options) as process:
        out, err = process.communicate("in", timeout=120)
    return process.returncode, out, err.splitlines()[-1:]


@pytest.mark.parametrize("end", ENDS)
def test_a_warm_command_ends_like_a_cold_one(tmp_path, end):
    assert ended(WarmPopen, tmp_path, ENDS[end]) == ended(subprocess.Popen, tmp_path, ENDS[end])


@pytest.mark.parametrize(("unbuffered", "status"), [("", 120), ("1", 1)])
def test_a_full_disk_fails_a_warm_command(tmp_path, unbuffered, status):
    with Path("/dev/full").open("w") as full:
        options = {"stdout": full, "unbuffered": unbuffered}
        ends = [ended(each, tmp_path, "print('x')", **options) for each in (WarmPopen, subprocess.Popen)]
    assert ends[0] == ends[1] == (status, None, ["OSError: [Errno 28] No space left on device"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_a_warm_command(tmp_path, number):
    (tmp_path / "main.py").write_text(HEAD + "pathlib.Path('ready').touch(); time.sleep(600)")
    command = [sys.executable, str(tmp_path / "main.py")]
    with WarmPopen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        until((tmp_path / "ready").exists, 30, "it runs")
        assert process.poll() is None and os.getsid(process.pid) == process.pid
        process.send_signal(number)
        assert process.wait(timeout=120) == -number


def test_a_warm_process_ends_with_its_parent(tmp_path):
    code = "import sys, time, pathlib, warm\nwith warm.WarmPython(pathlib.Path(sys.argv[1])) as made:\n"
    code += "    print(made._process.pid, flush=True)\n    time.sleep(600)\n"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        forking = psutil.Process(pid)
        until(lambda: forking.status() == psutil.STATUS_ZOMBIE, 30, "it has ended, too")
