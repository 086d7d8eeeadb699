"""Participant classes such as users write. A table of scale.py compares their costs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from agentscope.message import Msg

from participant import RandomParticipant
from simulation.agents.participant import Participant
from simulation.game.rules import Question


class Thinks(Participant):
    """A participant that only calls `think`."""

    async def answer(self, question: Question) -> float:
        await self.think(self.game.sleep_time_s)
        return 50


class OwnInit(Thinks):
    """A participant with a custom `__init__` and two attributes."""

    def __init__(self, index: int, game: Any) -> None:
        super().__init__(index, game)
        self.mood = 0.5 * index
        self.history: list[float] = []


class Sleeps(Participant):
    """A participant that uses `asyncio.sleep` instead of `think`, which costs a task and a timer."""

    async def answer(self, question: Question) -> float:
        await asyncio.sleep(self.game.sleep_time_s)
        return 50


class UsesAgentBase(Thinks):
    """A participant that reads an attribute of AgentBase, so that all attributes of AgentBase are created."""

    async def answer(self, question: Question) -> float:
        assert self.memory is None
        return await super().answer(question)


class Blocks(Participant):
    """A participant with a blocking `reply` that returns immediately."""

    def reply(self, x: Msg | list[Msg] | None = None) -> Msg:
        return Msg(self.name, "50", "assistant")


class BlocksAWhile(Participant):
    """A participant with a blocking `reply` that blocks its thread for 10 ms."""

    def reply(self, x: Msg | list[Msg] | None = None) -> Msg:
        time.sleep(0.01)
        return Msg(self.name, "50", "assistant")


CLASSES = (  # description, class, number of participants, think time in seconds
    ("the ready random participant", RandomParticipant, 200_000, 1.0),
    ("`think` alone", Thinks, 200_000, 1.0),
    ("the same with an `__init__` and two attributes", OwnInit, 200_000, 1.0),
    ("the same, and something of `AgentBase` is read", UsesAgentBase, 200_000, 1.0),
    ("`asyncio.sleep` in place of `think`", Sleeps, 200_000, 1.0),
    ("a blocking `reply` that waits for nothing", Blocks, 50_000, 0.0),
    ("a blocking `reply` that takes 10 ms", BlocksAWhile, 50_000, 0.0),
)
