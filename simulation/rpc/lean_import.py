"""The import of AgentScope in 0.7 s, not 1.7 s (rarely used libraries load on first use), and extra import folders.

Likewise the import of pyarrow in 0.1 s, not 0.4 s, without pandas.
"""

import importlib
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

from simulation.errors import SettingsError, reason
from simulation.files import HOME, append_to_path

DISTANCES = "scipy.spatial.distance"


class _Late(ModuleType):
    """A placeholder that imports the real module on first use, so that everything in AgentScope still works."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def import_agentscope(silent: bool = False) -> None:
    """Import AgentScope unless it is already imported. Must be called before any direct import of AgentScope.

    If `silent`, AgentScope does not log.
    """
    if silent:
        from loguru import logger  # noqa: PLC0415 - commands that stop servers usually log nothing

        logger.disable("agentscope")
    if "agentscope" in sys.modules:
        return
    if os.path.expanduser("~") == "~":  # noqa: PTH111 - AgentScope needs a home folder
        os.environ["HOME"] = str(HOME / "run")
    distances = ModuleType(DISTANCES)  # a placeholder: AgentScope imports the function `cdist` by name
    vars(distances)["cdist"] = lambda *args, **kwargs: importlib.import_module(DISTANCES).cdist(*args, **kwargs)
    # dashscope is None: AgentScope tolerates a failed import, but would read the version of a _Late and so import it
    late: dict[str, Any] = {"dashscope": None, "socketio": _Late("socketio"), DISTANCES: distances}
    late = {name: stand_in for name, stand_in in late.items() if name not in sys.modules}
    sys.modules.update(late)
    try:
        importlib.import_module("agentscope")
    finally:  # later imports get the real modules
        for name in late:
            del sys.modules[name]
    if "dashscope" in late:
        vars(sys.modules["agentscope.models.dashscope_model"])["dashscope"] = _Late("dashscope")


def import_pyarrow() -> None:
    """Import pyarrow and have it decide that pandas is not needed. A later import of pandas works, also for pyarrow."""

    def find_spec(name: str, _path: object = None, _target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name, name=name)

    finder: Any = SimpleNamespace(find_spec=find_spec)
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module("pyarrow").array([0])
    finally:
        sys.meta_path.remove(finder)


def add_extra_folders(folders: str | None) -> None:
    """Append colon-separated folders to the import path. Raises SettingsError if a folder cannot be read."""
    for folder in filter(None, (folders or "").split(":")):
        try:
            os.listdir(folder)  # noqa: PTH208
        except OSError as error:
            problem = f"cannot read the folder {folder}: {reason(error)}"
            raise SettingsError(f"--extra-pythonpath {folders}: {problem}") from None
        append_to_path(folder)
