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
    └── Interrupted    130/143   Ctrl-C, or a TERM signal

`UnusableAnswer` stands apart: it is one participant's failure, counted by its cause, and ends nothing.
"""

from __future__ import annotations

import errno

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


class Stranger(ServerLost):
    """What listens there does not hold our key, or hangs before it can show it."""


class AgentGone(ServerLost):
    """The agent server answers, but the agent is not there."""


class GameEnded(SimulationError):
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
    """An answer that is no number in range; the message is the cause that is counted.

    Args:
        cause: Why.
        text: What was answered, where there was a text.
    """

    def __init__(self, cause: str, text: str | None = None) -> None:
        super().__init__(cause)
        self.text = text


def one_line(error: BaseException, limit: int = 200) -> str:
    """The cause of a failure in one line of at most `limit` characters, `ValueError: what it said`; never raises."""
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - a person's own exception may fail at this, too
        text = "(its text cannot be shown)"
    text = printable(text[: 10 * limit])
    name = type(error).__name__
    line = text if isinstance(error, UnusableAnswer) else f"{name}: {text}" if text else name
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
