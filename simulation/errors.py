"""The exceptions that this program raises on purpose, and their exit statuses of main.py.

A message is one line: what failed, where it failed, and what to do.

SimulationError          1   a bug in this program
├── SettingsError        2   a flag, setting or file is invalid; nothing was started
├── ClusterError         3   the cluster is not ready, or has another cluster key
│   └── ServerLost           one server has failed; the run may continue without this server
│       ├── ServerUnreachable    no process answers at the address
│       ├── UntrustedServer      the process at the address does not prove that it has our cluster key
│       └── AgentNotFound        the server answers, but the agent no longer exists
├── RunAborted           4   the run ended before all participants answered; the finished rounds are saved
├── ResultsError         5   results could not be written
└── Interrupted        129/130/143   Ctrl-C, or a HUP or TERM signal

UnusableAnswer               one participant has failed; the failure is counted by its cause, and the run continues
└── KnownCause               raised by this program; its text is counted verbatim as the cause
"""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import TextIO

LIKENESS = 0.65  # a name is suggested if its difflib ratio is at least this
SHORTEST_BEGINNING = 3  # minimum length of a prefix for which a longer name is suggested
NAMES_SHOWN = 12
CAUSE_LENGTH = 200  # characters
TRACEBACK_LENGTH, NAME_LENGTH = 4000, 60  # maximum number of characters of a kept traceback and a file name
OWN = "own_"  # prefix of the module names of users' files, so that a user's random.py hides no library
# Causes of unusable answers
NO_NUMBER, UNCERTAIN = "no number in the answer", "not certain which number is the answer"
OUT_OF_RANGE = "number out of range"

# Errors of file systems that do not support an operation: locking, linking, or flushing a folder
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF)


class SimulationError(Exception):
    exit_status = 1


class SettingsError(SimulationError):
    exit_status = 2


class ClusterError(SimulationError):
    exit_status = 3


class ServerLost(ClusterError):
    """One server has failed. The message starts with the address of the server, as `host:port: `."""


class ServerUnreachable(ServerLost): ...


class UntrustedServer(ServerLost): ...


class AgentNotFound(ServerLost): ...


class RunAborted(SimulationError):
    exit_status = 4


class ResultsError(SimulationError):
    exit_status = 5


class Interrupted(SimulationError):
    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted")
        self.exit_status = 128 + signal_number


class UnusableAnswer(Exception):
    """A participant gave no valid number. `text` is its answer, if any. Custom participants may raise this error."""

    thoughts: str | None = None  # the reasoning that a model server returned beside the answer, if any

    def __init__(self, cause: str, text: str | None = None) -> None:
        super().__init__(cause)
        self.text = text


class Ended(IntEnum):
    """The way in which a round ended for a participant. The highest value of all participants applies to the round."""

    COMPLETE = 0  # no participant was cut off; answers may be unusable
    MODEL_FAILED = 1  # a model server did not answer
    OUT_OF_TOKENS = 2  # the token budget was too small
    INTERRUPTED = 3  # the user ended the round


class KnownCause(UnusableAnswer):
    """An unusable answer whose cause is counted verbatim. `ended` states how the round ended for the participant."""

    traceback = ""  # the formatted traceback of an earlier exception that is the cause, if any

    def __init__(self, cause: str, text: str | None = None, ended: Ended = Ended.COMPLETE) -> None:
        super().__init__(cause, text)
        self.ended = ended


def failure_of(error: BaseException) -> tuple[str, str | None, Ended]:
    """Return the cause of a participant's failure, its unusable answer (None: no answer), and how its round ended."""
    text = vars(error).get("text") if isinstance(error, UnusableAnswer) else None  # a user's subclass may have no text
    ended = error.ended if type(error) is KnownCause else Ended.COMPLETE
    return one_line(error), str.__str__(text) if isinstance(text, str) else None, ended


def one_line(error: BaseException) -> str:
    """Describe an error as `ValueError: text (my_file.py, line 12)`, and a KnownCause by its text. Never raises."""
    text, place = "(its text cannot be shown)", ""
    with contextlib.suppress(BaseException):  # attributes and text of a user's exception may raise, too
        for frame, line in traceback.walk_tb(error.__traceback__):
            if _is_own(frame):  # the last one is the innermost
                place = f" ({printable(Path(frame.f_code.co_filename).name, NAME_LENGTH)}, line {line})"
        text = printable(str(error), CAUSE_LENGTH)
    if type(error) is KnownCause:  # not a subclass, which users may define
        return text
    name = type(error).__name__ if type(error).__name__.isidentifier() else "Exception"  # type() accepts any text
    description = name if not text and name[0].isupper() else f"{name}: {text or 'no words'}"
    return printable(description, CAUSE_LENGTH) + place


def _is_own(frame: FrameType) -> bool:
    """Return whether a frame is in a user's file, or in a class of a notebook or script, which came by value."""
    name, file = str(frame.f_globals.get("__name__")), frame.f_code.co_filename
    return name.startswith(OWN) or ((name == "__main__" or name not in sys.modules) and not file.startswith("<"))


def traceback_of(error: BaseException) -> str:
    """Return a traceback from the first line in a user's file on ("" for a KnownCause without one). Never raises."""
    if type(error) is KnownCause:
        return error.traceback
    text = "(the traceback cannot be shown)"
    with contextlib.suppress(BaseException):  # as in `one_line`
        start = error.__traceback__
        while start is not None and not _is_own(start.tb_frame):
            start = start.tb_next
        text = "".join(traceback.format_exception(type(error), error, start or error.__traceback__))
    half = TRACEBACK_LENGTH // 2
    return text if len(text) <= TRACEBACK_LENGTH else f"{text[:half]}\n...\n{text[-half:]}"


def reason(error: Exception) -> str:
    """Return in a few words why a file cannot be read or written."""
    if isinstance(error, UnicodeDecodeError):
        return "is no text in UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return "the locale cannot encode this file name; set LC_ALL=C.UTF-8"
    return getattr(error, "strerror", None) or printable(str(error)) or type(error).__name__


def printable(text: str, limit: int | None = None) -> str:
    """Convert a text to one line of at most `limit` characters (None: no limit). Escape unprintable characters."""
    words = " ".join((text if limit is None else text[: 10 * limit]).split())
    line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in words)
    return line if limit is None or len(line) <= limit else line[: limit - 3] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for an unknown name. If no known name is similar, return a list of the known names."""
    names = list(known)
    return meant_by(name, names) or f"known are {listed(names)}"


def meant_by(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" with the most similar name, or "". Ignore case and leading dashes. Equate _ and -."""
    import difflib  # noqa: PLC0415 - needed only after a mistake

    (wanted, _), *others = ((each.lstrip("-").casefold().replace("_", "-"), each) for each in (name, *known))
    names, is_long = dict(others), len(wanted) >= SHORTEST_BEGINNING
    longer = sorted((each for each in names if is_long and each.startswith(wanted)), key=len)
    meant = [*longer, *difflib.get_close_matches(wanted, names, 1, LIKENESS)]
    return f"did you mean {names[meant[0]]}?" if meant else ""


def near_file(path: str | Path) -> str:
    """Return "; did you mean ...?" with a file in the folder of the missing `path` that has a similar name, or ""."""
    wanted, names = Path(path), list[str]()
    with contextlib.suppress(OSError, ValueError):
        names = [each.name for each in wanted.parent.iterdir() if each.suffix == wanted.suffix]
    meant = meant_by(wanted.name, names) if wanted.name not in names else ""
    return f"; {printable(meant)}" if meant else ""


def listed(names: Iterable[str]) -> str:
    """Join at most NAMES_SHOWN names with commas. State how many names are omitted."""
    first, rest = (every := list(names))[:NAMES_SHOWN], len(every) - NAMES_SHOWN
    return (", ".join(first) or "none") + (f" and {rest} more" if rest > 0 else "")


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line to `stream` (default: standard output). After a write error, discard all further output."""
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
