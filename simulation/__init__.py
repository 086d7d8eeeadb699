"""Guessing games among very many agents, distributed over agent servers. docs/python.md describes these names.

`import simulation` imports nothing else: each name below is loaded when it is first used.
"""

import importlib
from typing import Any

NAMES = {
    **dict.fromkeys(("play", "plan", "servers"), "simulation.api"),
    **dict.fromkeys(("read", "Run", "Study"), "simulation.study"),
    **dict.fromkeys(("Game", "Rules", "setting"), "simulation.game"),
    **{"Participant": "simulation.agents.participant", "Hook": "simulation.monitoring.hooks"},
    **dict.fromkeys(("LLMParticipant", "RandomParticipant"), "participant"),
    **dict.fromkeys(
        ("SimulationError", "SettingsError", "ClusterError", "RunAborted", "ResultsError"), "simulation.errors"
    ),
    **dict.fromkeys(("Interrupted", "UnusableAnswer"), "simulation.errors"),
}
__all__ = [*NAMES]  # noqa: PLE0604 - all are texts


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module 'simulation' has no attribute {name!r}")
    if name in ("Participant", "LLMParticipant", "RandomParticipant"):
        importlib.import_module("simulation.api")  # prepares the import of AgentScope
    return getattr(importlib.import_module(NAMES[name]), name)


def __dir__() -> list[str]:
    return [*NAMES]
