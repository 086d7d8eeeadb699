"""Import AgentScope, and find what participants of a person's own import.

AgentScope is imported without libraries that it imports for parts this program never calls: half of its import time.
Measured on two cores: 1.7 s with them, 0.7 s without. Each is imported after all when it is first used, so that a
participant of a person's own may use all of AgentScope.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from simulation.errors import SettingsError, reason
from simulation.files import ROOT


def import_agentscope() -> None:
    """Import AgentScope, unless that was done; to be called before anything else that imports it."""
    if "agentscope" in sys.modules:
        return
    if os.path.expanduser("~") == "~":  # noqa: PTH111 - of a user without one, AgentScope cannot be imported
        os.environ["HOME"] = str(ROOT / "run")
    # None makes an import fail: AgentScope goes on without dashscope, whose version it would ask for at once
    late: dict[str, Any] = {"dashscope": None, "socketio": _Late("socketio"), "scipy.spatial.distance": _distances()}
    late = {name: stand_in for name, stand_in in late.items() if name not in sys.modules}
    sys.modules.update(late)
    try:
        importlib.import_module("agentscope")
    finally:  # whoever else imports them gets the real ones
        for name in late:
            del sys.modules[name]
    if "dashscope" in late:
        vars(sys.modules["agentscope.models.dashscope_model"])["dashscope"] = _Late("dashscope")


def add_extra_folders(folders: str | None) -> None:
    """Append the folders of --extra-pythonpath, which colons separate, to the path of imports.

    Raises:
        SettingsError: One of them does not exist.
    """
    for folder in filter(None, (folders or "").split(":")):
        try:
            os.listdir(folder)  # noqa: PTH208
        except OSError as error:
            raise SettingsError(
                f"--extra-pythonpath {folders}: cannot read the folder {folder}: {reason(error)}"
            ) from None
        append_to_path(folder)


def append_to_path(folder: str) -> None:
    """Append a folder to the path of imports: its modules hide none of Python, the libraries and this program."""
    if folder not in sys.path:
        sys.path.append(folder)


class _Late(ModuleType):
    """Stands for a module that is imported when something in it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def _distances() -> ModuleType:
    """Stands for scipy.spatial.distance, of which AgentScope's prompt generator takes one function."""
    module = ModuleType("scipy.spatial.distance")

    def cdist(*args: Any, **kwargs: Any) -> Any:
        return importlib.import_module(module.__name__).cdist(*args, **kwargs)

    vars(module)["cdist"] = cdist
    return module
