"""User-supplied paths, file access with plain errors, and file locks."""

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
    """Lock an open file or folder for this process until it is closed.

    Args:
        descriptor: The file descriptor.
        folder: The folder of the file, for the warning.
        advice: What the user must ensure if locks are not supported.
        wait: Whether to wait while another process holds the lock (default: yes).
        shared: Whether to take a shared instead of an exclusive lock (default: no).

    Returns:
        Whether the file is locked; False if its file system has no locks, which is logged once.

    Raises:
        BlockingIOError: Another process holds the lock, and `wait` is False.
        OSError: The file cannot be locked for another reason.
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
    """Log each distinct warning once."""
    from loguru import logger  # noqa: PLC0415 - commands that stop servers log nothing else

    logger.warning(warning)


def full_path(flag: str, text: str, folder: Path | None = None) -> str:
    """Return a user's path as an absolute path; a leading `~`, `~user` or `$HOME` is expanded.

    Args:
        flag: The flag of the path, for errors.
        text: The path as given.
        folder: The base of a relative path (default: the working directory).

    Raises:
        SettingsError: The text is not a valid path, or the home folder or working directory is unknown.
    """
    if not text or "\0" in text:
        raise SettingsError(f"{flag} {printable(text)!r}: must be a path, and is {'none' if text else 'empty'}")
    text = re.sub(r"\A(\$HOME|\$\{HOME\})(?=/|\Z)", "~", text)  # in a file, no shell has expanded it
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
    """Return a path for display: relative if it is below the working directory."""
    try:
        return str(Path(path).absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):  # elsewhere, or the working directory is gone
        return str(path)


def is_there(path: Path, flag: str = "") -> bool:
    """Return whether a file or folder exists. Raises SettingsError with the flag if that cannot be determined.

    Path.exists() and similar methods raise the system's error instead, such as PermissionError.
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
    """Return the files of a folder with this suffix, sorted; an empty list if the folder does not exist.

    Raises SettingsError if the folder cannot be read; Path.glob() would find nothing instead.
    """
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.endswith(suffix))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise SettingsError(f"cannot read {printable(shown(folder))}: {reason(error)}") from None


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, whatever the locale, without a byte order mark and with LF line ends.

    Raises OSError or UnicodeDecodeError.
    """
    return path.read_text(encoding="utf-8-sig")


def real(path: str | Path) -> Path:
    """Return the path with all links resolved; unlike Path.resolve(), it does not raise on a link loop."""
    return Path(os.path.realpath(path))
