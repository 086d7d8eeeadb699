"""Participants who answer when a test says so, not after a time: a round is under way for as long as the test needs."""

from __future__ import annotations

from pathlib import Path

WAITING = """
import pathlib
from participant import RandomParticipant
class Waiting(RandomParticipant):
    async def answer(self, question):
{notes}
{waits}
        return await super().answer(question)
"""
WAIT = """
        while ({case}) and not pathlib.Path({gate!r}).exists():
            await self.think(0.25)
"""


NOTE = """
        with open({asked!r}, "a") as asked:  # a line at a time
            asked.write(f"{{question.round}} {{self.index}}\\n")
"""


class Gates:
    """A participant class, and what it waits for.

    Args:
        folder: Where the class and the gates are files.
        cases: When participants wait, in Python, of `self` and `question`; a case each has a gate of its number.
        note: Whether they note whenever they are asked, for `asked`.
    """

    def __init__(self, folder: Path, *cases: str, note: bool = False) -> None:
        self._folder = folder
        self.flags = ("--agent-class", f"{folder}/waiting.py:Waiting", "--sleep-time", "0")
        waits = (WAIT.format(case=case, gate=str(self._gate(number))) for number, case in enumerate(cases or ("True",)))
        notes = NOTE.format(asked=str(folder / "asked")) if note else ""
        (folder / "waiting.py").write_text(WAITING.format(notes=notes, waits="".join(waits)))

    def asked(self) -> list[tuple[int, int]]:
        """The rounds and the participants that were asked, as often as they were, in order."""
        lines = (self._folder / "asked").read_text().splitlines()
        return sorted((int(number), int(index)) for number, index in map(str.split, lines))

    def open(self, number: int = 0) -> None:
        """Let those answer who wait in this case."""
        self._gate(number).touch()

    def shut(self, number: int = 0) -> None:
        self._gate(number).unlink()

    def _gate(self, number: int) -> Path:
        return self._folder / f"gate-{number}"
