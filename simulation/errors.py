"""Every error this program raises on purpose, each with the exit status that main ends with.

    SimulationError          1   a defect of ours
    ├── SettingsError        2   bad usage, settings or files: nothing was started
    ├── ClusterError         3   the cluster is not ready, or not ours
    │   └── ServerLost           a server that a game may go on without
    │       ├── ServerUnreachable    nothing answers at the address
    │       ├── Stranger             what answers does not hold our key
    │       └── AgentGone            the server answers, but no longer holds the agent
    ├── GameEnded            4   the game ended with participants unanswered
    ├── ResultsError         5   results could not be written
    └── Interrupted        129/130/143   Ctrl-C, or a HUP or TERM signal

`UnusableAnswer` stands apart: it is one participant's failure, counted by its cause, and ends nothing. A participant
may raise it with any words, which decide nothing: how a round ended is told by `Ended` alone. What the program itself
raises of that kind is a `KnownCause`.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, TextIO

LIKENESS = 0.65  # of a name that may have been meant, by difflib
SHORTEST_BEGINNING = 3  # of a name that is unlike in length only
NAMES_SHOWN = 12

# What a file system says of what it cannot do: locks, links, flushing a folder
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF)


class SimulationError(Exception):
    """The root: its message is one line that says what, where and what to do."""

    exit_status = 1


class SettingsError(SimulationError):
    """A flag, a setting or a file that this program cannot start with."""

    exit_status = 2


class ClusterError(SimulationError):
    """Agent servers are missing, unreachable or strangers."""

    exit_status = 3


class ServerLost(ClusterError):
    """One agent server is of no use any more; its address begins the message."""

    @property
    def address(self) -> str:
        """`host:port` of the server."""
        return str(self).partition(": ")[0]


class ServerUnreachable(ServerLost):
    """The agent server does not answer."""


class UntrustedServer(ServerLost):
    """What listens there does not hold our key, or hangs before it can show it."""


class AgentNotFound(ServerLost):
    """The agent server answers, but the agent is not there."""


class RunAborted(SimulationError):
    """The game cannot go on; the rounds finished so far are written."""

    exit_status = 4


class ResultsError(SimulationError):
    """The run directory does not take the results."""

    exit_status = 5


class Interrupted(SimulationError):
    """A person or the system asked us to stop.

    Args:
        signal_number: The signal that asked; the exit status is 128 plus this number.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted")
        self.exit_status = 128 + signal_number


class UnusableAnswer(Exception):
    """An answer that is no number in range; participants of one's own may raise it, too.

    Args:
        cause: Why.
        text: What was answered, where there was a text.
    """

    def __init__(self, cause: str, text: str | None = None) -> None:
        super().__init__(cause)
        self.text = text


class Ended(IntEnum):
    """How a round ended for some of its participants; for all of them together, as the last of these."""

    COMPLETE = 0  # everyone was asked to the end, whatever they answered
    MODEL_FAILED = 1  # a model server gave no answer
    OUT_OF_TOKENS = 2  # the budget did not suffice
    INTERRUPTED = 3  # a person ended it


class KnownCause(UnusableAnswer):
    """An unusable answer for a reason that the program itself gives: its words are counted as they are.

    Args:
        cause: Why.
        text: What was answered, where there was a text.
        ended: How the round ended by that.
    """

    def __init__(self, cause: str, text: str | None = None, ended: Ended = Ended.COMPLETE) -> None:
        super().__init__(cause, text)
        self.ended = ended


class Failure(NamedTuple):
    """What is kept of a participant's failure: the words it is counted by, what it said, and how its round ended."""

    cause: str
    text: str | None = None
    ended: Ended = Ended.COMPLETE


def failure_of(error: BaseException) -> Failure:
    """What is kept of whatever a participant raised; never raises."""
    text = vars(error).get("text") if isinstance(error, UnusableAnswer) else None  # a class of theirs may have none
    ended = error.ended if type(error) is KnownCause else Ended.COMPLETE
    return Failure(one_line(error), str.__str__(text) if isinstance(text, str) else None, ended)


def one_line(error: BaseException, limit: int = 200) -> str:
    """The cause of a failure in one line of at most `limit` characters, `ValueError: what it said`; never raises.

    The program's own words stand alone; those of others come after the name of what was raised, so that nobody takes
    the one for the other.
    """
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - a person's own exception may fail at this, too
        text = "(its text cannot be shown)"
    text = printable(text[: 10 * limit])
    name = type(error).__name__
    if not name.isidentifier():  # so can a class be named that is made by a call
        name = "Exception"
    if type(error) is KnownCause:  # a class derived from it is theirs
        return shortened(text, limit)
    return shortened(name if not text and name[0].isupper() else f"{name}: {text or 'no words'}", limit)


def shortened(line: str, limit: int) -> str:
    """The line in at most `limit` characters."""
    return line if len(line) <= limit else line[: limit - 3] + "..."


def reason(error: Exception) -> str:
    """Why a file cannot be read or written, in a few words."""
    if isinstance(error, UnicodeDecodeError):
        return "is no text in UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return "the locale has no such letters in names of files; set LC_ALL=C.UTF-8"
    return getattr(error, "strerror", None) or printable(str(error)) or type(error).__name__


def printable(text: str) -> str:
    """The text in one line, of signs that can be shown."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in " ".join(text.split()))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return what may have been meant by a name that is not known; otherwise what is known."""
    names = list(known)
    return meant_by(name, names) or f"known are {listed(names)}"


def meant_by(name: str, known: Iterable[str], likeness: float = LIKENESS) -> str:
    """Return "did you mean ...?" with the known name that is most like this one; nothing where none is.

    Names are compared without the dashes of flags, and neither capitals nor _ in place of - make a difference.
    """
    import difflib  # noqa: PLC0415 - only mistakes need it

    plain, wanted = {_plain(each): each for each in known}, _plain(name)
    begin = [each for each in plain if each.startswith(wanted)] if len(wanted) >= SHORTEST_BEGINNING else []
    meant = [*sorted(begin, key=len), *difflib.get_close_matches(wanted, plain, 1, likeness)]
    return f"did you mean {plain[meant[0]]}?" if meant else ""


def _plain(name: str) -> str:
    return name.lstrip("-").casefold().replace("_", "-")


def near_file(path: str | Path) -> str:
    """Return "; did you mean ...?" with a file of a similar name beside a path that is missing; nothing else."""
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
    """Names one after another, never too many."""
    all_names = list(names)
    more = len(all_names) - NAMES_SHOWN
    return (", ".join(all_names[:NAMES_SHOWN]) or "none") + (f" and {more} more" if more > 0 else "")


def say(line: str, stream: TextIO | None = None) -> None:
    """Print on standard output, or another stream; a reader that has gone away, or a full disk, stops nothing."""
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
