"""The import of AgentScope in 0.7 s, not 1.7 s (rarely used libraries load on first use), and extra import folders."""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from simulation.errors import SettingsError, reason
from simulation.files import ROOT, append_to_path

DISTANCES = "scipy.spatial.distance"


class _Late(ModuleType):
    """A placeholder that imports the real module on first use, so that everything in AgentScope still works."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def import_agentscope() -> None:
    """Import AgentScope unless it is already imported. Must be called before any direct import of AgentScope."""
    if "agentscope" in sys.modules:
        return
    if os.path.expanduser("~") == "~":  # noqa: PTH111 - AgentScope needs a home folder
        os.environ["HOME"] = str(ROOT / "run")
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


def add_extra_folders(folders: str | None) -> None:
    """Append colon-separated folders to the import path. Raises SettingsError if a folder cannot be read."""
    for folder in filter(None, (folders or "").split(":")):
        try:
            os.listdir(folder)  # noqa: PTH208
        except OSError as error:
            problem = f"cannot read the folder {folder}: {reason(error)}"
            raise SettingsError(f"--extra-pythonpath {folders}: {problem}") from None
        append_to_path(folder)
