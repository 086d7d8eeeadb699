"""Participants as a person would write them, for the table of scale.py that tells what each way of writing costs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from agentscope.message import Msg

from participant import RandomParticipant
from simulation.agents.participant import Participant
from simulation.game.rules import Question


class Thinks(Participant):
    """Nothing but `think`."""

    async def answer(self, question: Question) -> float:
        await self.think(self.game.sleep_time_s)
        return 50


class OwnInit(Thinks):
    """An `__init__` of its own, and two attributes."""

    def __init__(self, index: int, game: Any) -> None:
        super().__init__(index, game)
        self.mood = 0.5 * index
        self.history: list[float] = []


class Sleeps(Participant):
    """`asyncio.sleep` in place of `think`: a task and a timer for each."""

    async def answer(self, question: Question) -> float:
        await asyncio.sleep(self.game.sleep_time_s)
        return 50


class UsesAgentBase(Thinks):
    """Reads an attribute of AgentBase's own, so that all of these are made."""

    async def answer(self, question: Question) -> float:
        assert self.memory is None
        return await super().answer(question)


class Blocks(Participant):
    """An ordinary `reply`, which waits for nothing."""

    def reply(self, x: Msg | list[Msg] | None = None) -> Msg:
        return Msg(self.name, "50", "assistant")


class BlocksAWhile(Participant):
    """An ordinary `reply` that blocks its thread for 10 ms."""

    def reply(self, x: Msg | list[Msg] | None = None) -> Msg:
        time.sleep(0.01)
        return Msg(self.name, "50", "assistant")


CLASSES = (  # how it is written, the class, how many of them, what one thinks in seconds
    ("the ready random participant", RandomParticipant, 200_000, 1.0),
    ("`think` alone", Thinks, 200_000, 1.0),
    ("the same with an `__init__` and two attributes", OwnInit, 200_000, 1.0),
    ("the same, and something of `AgentBase` is read", UsesAgentBase, 200_000, 1.0),
    ("`asyncio.sleep` in place of `think`", Sleeps, 200_000, 1.0),
    ("a blocking `reply` that waits for nothing", Blocks, 50_000, 0.0),
    ("a blocking `reply` that takes 10 ms", BlocksAWhile, 50_000, 0.0),
)
