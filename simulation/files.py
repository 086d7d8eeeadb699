"""Paths that users give, and locks on files."""

from __future__ import annotations

import fcntl
import functools
import os
import re
from pathlib import Path

from simulation.errors import UNSUPPORTED, SettingsError, printable, reason

ROOT = Path(__file__).resolve().parent.parent
SERVERS = ROOT / "run" / "servers"


def lock(descriptor: int, folder: Path, advice: str, wait: bool = True, shared: bool = False) -> bool:
    """Lock an open file, or folder, for this process alone, until it is closed.

    Args:
        descriptor: Of the file.
        folder: Where it is.
        advice: What people have to see to where nothing can be locked.
        wait: Whether to wait for a process that has it locked.
        shared: Whether other processes may lock it so, too.

    Returns:
        Whether it is locked; if not, its file system has no locks, which is told once.

    Raises:
        BlockingIOError: Another process has it locked, and is not waited for.
        OSError: It cannot be locked for another reason.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise
        if error.errno not in UNSUPPORTED:
            raise OSError(error.errno, f"it cannot be locked ({reason(error)})") from None
        tell_once(f"the file system of {folder} has no locks ({reason(error)}): {advice}")
        return False
    return True


@functools.cache
def tell_once(warning: str) -> None:
    """Log a warning the first time."""
    from loguru import logger  # noqa: PLC0415 - what stops servers has nothing else to log

    logger.warning(warning)


def full_path(flag: str, text: str, folder: Path | None = None) -> str:
    """The absolute path that a person means by a text; `~`, `~user` and `$HOME` at its start are home folders.

    Args:
        flag: The flag that it was given by.
        text: What was given.
        folder: What a relative path starts from (default: the working directory).

    Raises:
        SettingsError: It can be no path.
    """
    if not text or "\0" in text:
        raise SettingsError(f"{flag} {printable(text)!r}: must be a path, and is {'none' if text else 'empty'}")
    text = re.sub(r"\A(\$HOME|\$\{HOME\})(?=/|\Z)", "~", text)  # from a file, which no shell has read
    path = Path(os.path.expanduser(text))  # noqa: PTH111 - pathlib's raises RuntimeError
    if text.startswith("~") and str(path).startswith("~"):
        name = Path(text).parts[0]
        raise SettingsError(f"{flag} {text}: no home folder is known for {name}; ./{name} is a file called so")
    try:
        os.fsencode(path)
        return str(path if path.is_absolute() else Path(folder or Path.cwd(), path))
    except OSError as error:
        raise SettingsError(f"{flag} {text}: the working directory cannot be found: {reason(error)}") from None
    except UnicodeEncodeError as error:
        raise SettingsError(f"{flag} {printable(text)}: {reason(error)}") from None


def shown(path: str | Path) -> str:
    """A path as people know it: from where they are, if it is below."""
    try:
        return str(Path(path).absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):  # elsewhere, or the working directory is gone
        return str(path)


def is_there(path: Path, flag: str = "") -> bool:
    """Whether there is such a file or folder. Raises SettingsError, which names the flag, where that is not known.

    Path.exists() and its like raise what the system says instead, such as PermissionError.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise SettingsError(
            f"{f'{flag} ' * bool(flag)}cannot look at {printable(shown(path))}: {reason(error)}"
        ) from None
    return True


def files_in(folder: Path, suffix: str = "") -> list[Path]:
    """The files of a folder with this suffix, in order; none if there is no folder.

    Raises SettingsError if it cannot be read.

    Path.glob() finds nothing in a folder that is closed to us.
    """
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.endswith(suffix))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise SettingsError(f"cannot read {printable(shown(folder))}: {reason(error)}") from None


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, whatever the locale says, with or without a byte order mark, its lines ended by LF.

    Raises OSError, or UnicodeDecodeError.
    """
    return path.read_text(encoding="utf-8-sig")


def real(path: str | Path) -> Path:
    """The path with all links followed; unlike Path.resolve() it does not raise where they lead in circles."""
    return Path(os.path.realpath(path))
