"""Participants who answer when a test says so, not after a time: a round is under way for as long as the test needs."""

from __future__ import annotations

from pathlib import Path

WAITING = """
import pathlib
from participant import RandomParticipant
class Waiting(RandomParticipant):
    async def answer(self, question):
{waits}
        return await super().answer(question)
"""
WAIT = """
        while ({case}) and not pathlib.Path({gate!r}).exists():
            await self.think(0.25)
"""


class Gates:
    """A participant class, and what it waits for.

    Args:
        folder: Where the class and the gates are files.
        cases: When participants wait, in Python, of `self` and `question`; a case each has a gate of its number.
    """

    def __init__(self, folder: Path, *cases: str) -> None:
        self._folder = folder
        self.flags = ("--agent-class", f"{folder}/waiting.py:Waiting", "--sleep-time", "0")
        waits = (WAIT.format(case=case, gate=str(self._gate(number))) for number, case in enumerate(cases or ("True",)))
        (folder / "waiting.py").write_text(WAITING.format(waits="".join(waits)))

    def open(self, number: int = 0) -> None:
        """Let those answer who wait in this case."""
        self._gate(number).touch()

    def shut(self, number: int = 0) -> None:
        self._gate(number).unlink()

    def _gate(self, number: int) -> Path:
        return self._folder / f"gate-{number}"
