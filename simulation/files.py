"""User-supplied paths, file access with readable errors, and file locks."""

import fcntl
import functools
import os
import re
import sys
from pathlib import Path

from simulation.errors import UNSUPPORTED, SettingsError, printable, reason

PACKAGE = Path(__file__).resolve().parent
CODE = PACKAGE.parent  # folder of the program's modules: the checkout, or site-packages
IS_CHECKOUT = (CODE / "main.py").exists() and (CODE / "pyproject.toml").exists()
CONFIGS = (CODE if IS_CHECKOUT else PACKAGE) / "configs"
MAIN = CODE / "main.py" if IS_CHECKOUT else PACKAGE / "__main__.py"  # an installed package has it under this name
# The folder that contains runs/, run/ and .cluster/
HOME = Path(os.environ.get("SIMULATION_HOME") or (CODE if IS_CHECKOUT else "")).absolute()
# Servers that belong to a Python process have their pid files and logs in another folder
SERVERS = Path(os.environ.get("SIMULATION_SERVERS") or HOME / "run" / "servers")
CLASS_FILES = (".py", ".pkl")  # endings of the files of users' classes; a .pkl holds a class of a notebook
SOURCE = "source"  # a folder of copies of users' files in the folder of each run or experiment


def lock(descriptor: int, folder: Path, advice: str, wait: bool = True, shared: bool = False) -> bool:
    """Lock the open file or folder `descriptor` until it is closed. Return whether its file system supports locks.

    If it does not, log a warning with `folder` and `advice`. If `shared`, several processes can hold the lock at once.
    Raises BlockingIOError if `wait` is False and another process holds the lock. Raises OSError for other failures.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # for EAGAIN, the next line raises a BlockingIOError
            raise OSError(error.errno, f"it cannot be locked ({reason(error)})") from None
        warn_once(f"the file system of {folder} has no locks ({reason(error)}): {advice}")
        return False
    return True


@functools.cache
def warn_once(warning: str) -> None:
    """Log a warning, unless the same warning was logged before."""
    from loguru import logger  # noqa: PLC0415 - commands that stop servers usually log nothing

    logger.warning(warning)


def full_path(flag: str, text: str, folder: Path | None = None) -> str:
    """Return `text`, the path that the user gave for `flag`, as an absolute path. Raises SettingsError if invalid.

    Expand a leading `~`, `~user` or `$HOME`. A relative path is relative to `folder` (default: the working directory).
    """
    if not text or "\0" in text:
        raise SettingsError(f"{flag} {printable(text)!r}: must be a path" + (", and is empty" if not text else ""))
    text = re.sub(r"\A(\$HOME|\$\{HOME\})(?=/|\Z)", "~", text)  # in a settings file, no shell has expanded $HOME
    path = Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises RuntimeError
    if text.startswith("~") and str(path).startswith("~"):
        name = Path(text).parts[0]
        raise SettingsError(f"{flag} {text}: no home folder is known for {name}; a file of that name is ./{name}")
    try:
        os.fsencode(path)
        return str(path if path.is_absolute() else Path(folder or Path.cwd(), path))
    except OSError as error:
        raise SettingsError(f"{flag} {text}: the working directory cannot be found: {reason(error)}") from None
    except UnicodeEncodeError as error:
        raise SettingsError(f"{flag} {printable(text)}: {reason(error)}") from None


def shown(path: str | Path) -> str:
    """Return a path for display: relative if it is inside the working directory, otherwise unchanged."""
    try:
        return str(Path(path).absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):  # the path is elsewhere, or the working directory is gone
        return str(path)


def is_there(path: Path, flag: str = "") -> bool:
    """Return whether a file or folder exists. Raises SettingsError, which names `flag`, if access to the path fails."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise SettingsError(f"{flag} cannot look at {printable(shown(path))}: {reason(error)}".lstrip()) from None
    return True


def files_in(folder: Path, suffix: str = "") -> list[Path]:
    """Return the sorted files in `folder` that end with `suffix`; [] if the folder is missing. Raises SettingsError."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.endswith(suffix))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise SettingsError(f"cannot read {printable(shown(folder))}: {reason(error)}") from None


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark. Raises OSError or UnicodeDecodeError."""
    return path.read_text(encoding="utf-8-sig")


def content_of(path: str | Path) -> bytes | None:
    """Return the content of a file, or None if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return None


def from_root(path: str) -> str:
    """Return a path for a run folder: relative if it or its link target is in HOME or in the program's folder."""
    for form in (Path(path), real(path)):
        for folder in (HOME, CONFIGS.parent):
            if form.is_relative_to(folder) and ".." not in form.parts and to_root(form.relative_to(folder)) == form:
                return str(form.relative_to(folder))
    return path


def to_root(path: str | Path) -> Path:
    """Return the absolute path that `from_root` has made relative. An absolute path stays as it is."""
    ours, others = HOME / path, CONFIGS.parent / path
    is_theirs = not os.path.exists(ours) and os.path.exists(others)  # noqa: PTH110 - raises nothing
    return others if is_theirs else ours


def names_file(spec: str) -> bool:
    """Return whether `spec` is `FILE` or `FILE:CLASS` with a file of a user's class, not the name of a game."""
    return any(ending in spec for ending in CLASS_FILES)


def real(path: str | Path) -> Path:
    """Return the path with all links resolved. Unlike Path.resolve(), do not fail on a link loop."""
    return Path(os.path.realpath(path))


def append_to_path(folder: str) -> None:
    """Append a folder to the end of the import path, where its modules cannot shadow other modules."""
    if folder not in sys.path:
        sys.path.append(folder)
