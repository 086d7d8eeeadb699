"""All errors that this program raises on purpose, with the exit status of main for each.

    SimulationError          1   a bug in this program
    ├── SettingsError        2   bad usage, settings or files: nothing was started
    ├── ClusterError         3   the cluster is not ready, or does not hold our key
    │   └── ServerLost           one server is lost; the game may continue without it
    │       ├── ServerUnreachable    nothing answers at the address
    │       ├── UntrustedServer      the process that answers does not hold our key
    │       └── AgentNotFound        the server answers, but no longer holds the agent
    ├── RunAborted           4   the game ended with participants unanswered
    ├── ResultsError         5   results could not be written
    └── Interrupted        129/130/143   Ctrl-C, or a HUP or TERM signal

`UnusableAnswer` is separate: it is one participant's failure, counted by cause, and does not end the game. A custom
participant may raise it with any text. No decision depends on that text, because only `Ended` states how a round ended.
The program itself raises `KnownCause`.
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

# Errors of file systems for unsupported operations: locks, links, flushing a folder
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF)


class SimulationError(Exception):
    """The root class; its message is one line that states what failed, where, and what to do."""

    exit_status = 1


class SettingsError(SimulationError):
    """An invalid flag, setting or file that prevents the start."""

    exit_status = 2


class ClusterError(SimulationError):
    """A failure of the cluster: agent servers are missing, unreachable or untrusted."""

    exit_status = 3


class ServerLost(ClusterError):
    """The loss of one agent server; the message starts with its address."""

    @property
    def address(self) -> str:
        """Return `host:port` of the server."""
        return str(self).partition(": ")[0]


class ServerUnreachable(ServerLost):
    """An agent server that does not answer."""


class UntrustedServer(ServerLost):
    """A listening process that does not hold our key, or hangs before it proves that it does."""


class AgentNotFound(ServerLost):
    """An agent that is missing from a server that answers."""


class RunAborted(SimulationError):
    """The end of a game that cannot continue; the rounds finished so far are written."""

    exit_status = 4


class ResultsError(SimulationError):
    """A failure to write results to the run directory."""

    exit_status = 5


class Interrupted(SimulationError):
    """A stop request from the user or the system.

    Args:
        signal_number: The signal received; the exit status is 128 plus this number.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted")
        self.exit_status = 128 + signal_number


class UnusableAnswer(Exception):
    """An answer that is not a number in range; custom participants may raise it too.

    Args:
        cause: The reason.
        text: The text of the answer, if there was one.
    """

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
    """An unusable answer whose cause is worded by this program, and counted verbatim.

    Args:
        cause: The reason.
        text: The text of the answer, if there was one.
        ended: How the round ended because of it.
    """

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


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the cause of a failure in one line of at most `limit` characters, as `ValueError: text`; never raises.

    The text of a KnownCause has no prefix; any other text follows the class name, so the two cannot be confused.
    """
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - the text of a user's exception may raise, too
        text = "(its text cannot be shown)"
    text = printable(text[: 10 * limit])
    name = type(error).__name__
    if not name.isidentifier():  # type() accepts any text as a class name
        name = "Exception"
    if type(error) is KnownCause:  # a derived class is a user's own
        return shortened(text, limit)
    return shortened(name if not text and name[0].isupper() else f"{name}: {text or 'no words'}", limit)


def shortened(line: str, limit: int) -> str:
    """Return the line, truncated to `limit` characters."""
    return line if len(line) <= limit else line[: limit - 3] + "..."


def reason(error: Exception) -> str:
    """Return a short reason why a file cannot be read or written."""
    if isinstance(error, UnicodeDecodeError):
        return "is no text in UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return "the locale has no such letters in names of files; set LC_ALL=C.UTF-8"
    return getattr(error, "strerror", None) or printable(str(error)) or type(error).__name__


def printable(text: str) -> str:
    """Return the text in one line, with unprintable characters escaped."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in " ".join(text.split()))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for an unknown name, or else the list of known names."""
    names = list(known)
    return meant_by(name, names) or f"known are {listed(names)}"


def meant_by(name: str, known: Iterable[str], likeness: float = LIKENESS) -> str:
    """Return "did you mean ...?" with the most similar known name; an empty string if none is similar.

    The comparison ignores leading dashes and case, and treats _ as -.
    """
    import difflib  # noqa: PLC0415 - needed only after a mistake

    plain, wanted = {_plain(each): each for each in known}, _plain(name)
    begin = [each for each in plain if each.startswith(wanted)] if len(wanted) >= SHORTEST_BEGINNING else []
    meant = [*sorted(begin, key=len), *difflib.get_close_matches(wanted, plain, 1, likeness)]
    return f"did you mean {plain[meant[0]]}?" if meant else ""


def _plain(name: str) -> str:
    return name.lstrip("-").casefold().replace("_", "-")


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
    more = len(all_names) - NAMES_SHOWN
    return (", ".join(all_names[:NAMES_SHOWN]) or "none") + (f" and {more} more" if more > 0 else "")


def say(line: str, stream: TextIO | None = None) -> None:
    """Print to standard output or another stream; a closed pipe or a full disk is not an error."""
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
