"""What a run was played with: the version of the program, and the users' files, which each run folder keeps."""

import functools
import importlib.metadata
import platform
import re
import subprocess
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from simulation.errors import SettingsError, reason
from simulation.files import CODE, IS_CHECKOUT, SOURCE, content_of, files_in, from_root, real, shown, to_root, warn_once
from simulation.settings import OF_SET, SETTINGS, SimulationConfig, with_paths
from simulation.user_code import UserFile, file_of, files_of

PROJECT = "large-scale-simulation"  # the name of the installed package
RUN_FILE = "summary.json"  # which each run folder contains
EXPERIMENT = "experiment.yaml"  # a file beside the copies of users' files, which repeats the run
ALWAYS = ("participant_num", "rounds", "seed")  # settings in each EXPERIMENT, even if they have their default values
Kept = tuple[tuple[UserFile, ...], dict[str, str]]
MOST_FILES, GIT_TIMEOUT_S = 100, 5


@functools.cache
def versions(code: str) -> dict[str, Any]:
    """Return the versions of the program, whose files have the hash `code`, of Python and of the libraries."""
    if IS_CHECKOUT:
        project = tomllib.loads((CODE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        version, needed = project["version"], project["dependencies"]
    else:
        version, needed = importlib.metadata.version(PROJECT), importlib.metadata.requires(PROJECT) or ()
    names = [re.split(r"[^\w.-]", each)[0] for each in needed]
    packages: dict[str, str | None] = {}
    for name in sorted(names):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # the user has removed it, and nothing needs it
            packages[name] = None
    program = {"version": version, "code": code, "git": _commit()}
    return {"program": program, "python": platform.python_version(), "packages": packages}


def _commit() -> str | None:
    """Return the commit of the checkout, or None if it is not a git repository or git does not answer."""
    command = ["git", f"--git-dir={CODE / '.git'}", "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --- Users' files ----------------------------------------------------------------------------------------------------


def sources_of(config: SimulationConfig, texts: Iterable[str]) -> tuple[UserFile, ...]:
    """Return the files that a run uses: classes, which must have been loaded, recorded runs, and the files `texts`."""
    groups: list[Sequence[UserFile]] = [[_text_file(path)] for path in texts]
    files = [file_of(spec) for spec in (config.game, *(kind.agent_class or "" for kind in config.kinds))]
    groups += [files_of(file) for file in files if file]
    return arranged([*groups, *(_files_of_run(real(kind.run)) for kind in config.kinds if kind.run)])


def with_files(files: Iterable[UserFile], texts: Iterable[str]) -> tuple[UserFile, ...]:
    """Return the files of a run, and those of the files `texts` that are not among them."""
    known = [*files]
    added = {*texts} - {each.path for each in known}
    return arranged([[each] for each in (*known, *(_text_file(path) for path in sorted(added)))])


def _text_file(path: str) -> UserFile:
    return UserFile(Path(path).name, path, Path(path).read_bytes())


def _files_of_run(folder: Path) -> tuple[UserFile, ...]:
    """Return the files of a recorded run that surrogates need. Their names start with the name of its folder."""
    answers = [each for each in files_in(folder, ".parquet") if not each.name.startswith(("texts", "prompts"))]
    files = (folder / RUN_FILE, folder / "game.json", *answers)
    return tuple(UserFile(f"{folder.name}/{each.name}", str(each), each.read_bytes()) for each in files)


def arranged(groups: Iterable[Sequence[UserFile]]) -> tuple[UserFile, ...]:
    """Return the files of all groups. A group with a name that another file has moves to a folder 2/, 3/ and so on."""
    kept = {EXPERIMENT: UserFile(EXPERIMENT, "", b"")}
    for group in groups:
        for folder in ("", *(f"{number}/" for number in range(2, len(kept) + 3))):
            named = {folder + each.name: each for each in group}
            if all(kept[name].path == each.path for name, each in named.items() if name in kept):
                kept |= {name: replace(each, name=name) for name, each in named.items()}
                break
    if len(kept) > MOST_FILES:
        warn_once(f"{len(kept) - 1} files are in use, of which the run folder keeps the first {MOST_FILES - 1} only")
    return tuple(kept.values())[1:MOST_FILES]


def entries_of(sources: Iterable[UserFile]) -> list[Any]:
    """Return the entries of files in summary.json and sweep.json. Paths in the checkout are relative to it."""
    return [
        {"name": each.name, "file": str(Path(from_root(str(Path(each.path).parent)), Path(each.path).name))}
        | {"sha256": each.sha256}
        for each in sources
    ]


def kept_files(folder: Path, entries: Iterable[Mapping[str, Any]], flag: str = "--resume ") -> Kept:
    """Return the files that the folder of a run or experiment keeps, and the paths of copies to use in their place.

    If a user's file has changed or is gone, all copies are used; a change is logged. Otherwise no copy is used. Raises
    SettingsError if a copy is missing or differs from its entry.
    """
    files, current = [], []
    for each in entries:
        copy, path = folder / SOURCE / each["name"], to_root(each["file"])
        try:
            files.append(UserFile(each["name"], str(path), copy.read_bytes()))
        except OSError as error:
            problem = f"cannot read {error.filename}, with the SHA-256 {each['sha256']}: {reason(error)}"
            raise SettingsError(f"{flag}{folder}: {problem}") from None
        if files[-1].sha256 != each["sha256"]:
            was = f"its SHA-256 is {files[-1].sha256}, not {each['sha256']}"
            raise SettingsError(f"{flag}{folder}: {copy.relative_to(folder)} was changed after the run: {was}")
        current.append(content_of(path))
    for file, content in zip(files, current, strict=True):
        if content not in (None, file.content):
            change = f"from SHA-256 {file.sha256} to {sha256(content).hexdigest()}"
            warn_once(f"{shown(file.path)} has changed since the run was started, {change}: its kept copy is used")
    copies = {each.path: str(real(folder) / SOURCE / each.name) for each in files}
    return tuple(files), {} if [each.content for each in files] == current else copies


def renamed(config: SimulationConfig, paths: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that name files in `paths`, with the other paths in their place."""

    def change(_name: str, path: str) -> str:
        if run_file := paths.get(f"{path}/{RUN_FILE}"):
            return str(Path(run_file).parent)
        file = path if path in paths else file_of(path)
        return paths.get(file, file) + path[len(file) :]

    return {name: value for name, value in with_paths(vars(config), change).items() if value != getattr(config, name)}


def with_copies(config: SimulationConfig, copies: Mapping[str, str]) -> SimulationConfig:
    """Return the settings with the paths of copies in place of those of the users' files."""
    return replace(config, **dict[str, Any](renamed(config, copies)))


def experiment_text(
    title: str, configs: Iterable[SimulationConfig], names: dict[str, str], varies: Sequence[str] = (), repeats: int = 1
) -> str:
    """Return an experiment file that plays `configs`, combinations of values of `varies`, again. `names` map paths."""
    values: dict[str, list[Any]] = {"repeats": [repeats]}
    for config in configs:
        own = {name: getattr(config, name) for name, each in SETTINGS.items() if each.game} | renamed(config, names)
        own |= {f"{OF_SET}{name}": value for name, value in config.to_json()["set"].items()}
        for name in own.keys() - {"repeats", "set"}:
            known = values.setdefault(name, [])
            known.extend([own[name]] if own[name] not in known else [])
    order = [*(name for name in SETTINGS if name not in varies), *(name for name in values if name not in SETTINGS)]
    content: dict[str, Any] = {}
    for name in dict.fromkeys((*order, *varies)):
        known = values.get(name, [])
        if name not in SETTINGS or name in ALWAYS or known not in ([], [SETTINGS[name].default]):
            into = content.setdefault("set", {}) if name.startswith(OF_SET) else content
            into[name.removeprefix(OF_SET)] = known[0] if len(known) == 1 else known
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return f"# Plays {title} again: ./run_simulation.sh --experiment <this file>\n{text}"
