"""The errors that this program raises on purpose: one line each, and the exit status of main.

SimulationError          1   a bug in this program
├── SettingsError        2   bad usage, settings or files: nothing was started
├── ClusterError         3   the cluster is not ready, or does not hold our key
│   └── ServerLost           one server is lost; the game may continue without it
│       ├── ServerUnreachable    nothing answers at the address
│       ├── UntrustedServer      the process that answers does not hold our key, or hangs before it proves it
│       └── AgentNotFound        the server answers, but no longer holds the agent
├── RunAborted           4   the game ended with participants unanswered; finished rounds are written
├── ResultsError         5   results could not be written
└── Interrupted        129/130/143   Ctrl-C, or a HUP or TERM signal

UnusableAnswer               the failure of one participant, counted by cause; the game continues
└── KnownCause               with a cause in the words of this program
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, TextIO

LIKENESS = 0.65  # difflib ratio from which a name is suggested
SHORTEST_BEGINNING = 3  # characters of a prefix for which a longer name is suggested
NAMES_SHOWN = 12
CAUSE_LENGTH = 200  # characters

# Errors of file systems for unsupported operations: locks, links, flushing a folder
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF)


class SimulationError(Exception):
    """The root class; its message is one line that states what failed, where, and what to do."""

    exit_status = 1


class SettingsError(SimulationError):
    exit_status = 2


class ClusterError(SimulationError):
    exit_status = 3


class ServerLost(ClusterError):
    """The message starts with the address of the server."""

    @property
    def address(self) -> str:
        """Return `host:port` of the server."""
        return str(self).partition(": ")[0]


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
    """An answer that is not a number in range, with its cause and text. Custom participants may raise it too."""

    def __init__(self, cause: str, text: str | None = None) -> None:
        super().__init__(cause)
        self.text = text


class Ended(IntEnum):
    """The way a round ended for some of its participants; over all participants, the highest value applies."""

    COMPLETE = 0  # no participant was cut off, whatever the answers
    MODEL_FAILED = 1  # a model server did not answer
    OUT_OF_TOKENS = 2  # the token budget was too small
    INTERRUPTED = 3  # the user ended it


class KnownCause(UnusableAnswer):
    """An unusable answer whose cause is counted verbatim. Only `ended`, not the text, affects the run."""

    def __init__(self, cause: str, text: str | None = None, ended: Ended = Ended.COMPLETE) -> None:
        super().__init__(cause, text)
        self.ended = ended


class Failure(NamedTuple):
    """The record of a participant's failure: the cause it is counted by, its text, and how its round ended."""

    cause: str
    text: str | None = None
    ended: Ended = Ended.COMPLETE


def failure_of(error: BaseException) -> Failure:
    """Return the record of any exception that a participant raised; never raises."""
    text = vars(error).get("text") if isinstance(error, UnusableAnswer) else None  # a user's subclass may lack it
    ended = error.ended if type(error) is KnownCause else Ended.COMPLETE
    return Failure(one_line(error), str.__str__(text) if isinstance(text, str) else None, ended)


def one_line(error: BaseException) -> str:
    """Return the cause of a failure as `ValueError: text`, or the text alone of a KnownCause; never raises."""
    try:
        text = printable(str(error), CAUSE_LENGTH)
    except BaseException:  # noqa: BLE001 - the text of a user's exception may raise, too
        text = "(its text cannot be shown)"
    if type(error) is KnownCause:  # a derived class is a user's own
        return text
    name = type(error).__name__
    name = name if name.isidentifier() else "Exception"  # type() accepts any text as a class name
    return printable(name if not text and name[0].isupper() else f"{name}: {text or 'no words'}", CAUSE_LENGTH)


def reason(error: Exception) -> str:
    """Return a short reason why a file cannot be read or written."""
    if isinstance(error, UnicodeDecodeError):
        return "is no text in UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return "the locale cannot encode this file name; set LC_ALL=C.UTF-8"
    return getattr(error, "strerror", None) or printable(str(error)) or type(error).__name__


def printable(text: str, limit: int | None = None) -> str:
    """Return the text in one line of at most `limit` characters, with unprintable characters escaped."""
    words = " ".join((text if limit is None else text[: 10 * limit]).split())
    line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in words)
    return line if limit is None or len(line) <= limit else line[: limit - 3] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for an unknown name, or else the list of known names."""
    names = list(known)
    return meant_by(name, names) or f"known are {listed(names)}"


def meant_by(name: str, known: Iterable[str], likeness: float = LIKENESS) -> str:
    """Return "did you mean ...?" with the most similar known name; an empty string if none is similar.

    The comparison ignores leading dashes and case, and treats _ as -.
    """
    import difflib  # noqa: PLC0415 - needed only after a mistake

    def plain(name: str) -> str:
        return name.lstrip("-").casefold().replace("_", "-")

    names, wanted = {plain(each): each for each in known}, plain(name)
    longer = [each for each in names if each.startswith(wanted)] if len(wanted) >= SHORTEST_BEGINNING else []
    meant = [*sorted(longer, key=len), *difflib.get_close_matches(wanted, names, 1, likeness)]
    return f"did you mean {names[meant[0]]}?" if meant else ""


def near_file(path: str | Path) -> str:
    """Return "; did you mean ...?" with a similarly named file beside a missing path, or an empty string."""
    wanted = Path(path)
    try:
        if os.path.exists(wanted):  # noqa: PTH110 - it raises less
            return ""
        names = [each.name for each in wanted.parent.iterdir() if each.suffix == wanted.suffix and each != wanted]
    except (OSError, ValueError):
        return ""
    meant = meant_by(wanted.name, names)
    return f"; {printable(meant)}" if meant else ""


def listed(names: Iterable[str]) -> str:
    """Return the names joined by commas, at most NAMES_SHOWN of them."""
    all_names = list(names)
    more = f" and {len(all_names) - NAMES_SHOWN} more" if len(all_names) > NAMES_SHOWN else ""
    return (", ".join(all_names[:NAMES_SHOWN]) or "none") + more


def say(line: str, stream: TextIO | None = None) -> None:
    """Print to standard output or another stream; a closed pipe or a full disk is not an error."""
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
