"""What a model's client knows of participants: that so many of them wait for a sample of the same prompt.

The first of them that gets its sample is the first that asked.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, Protocol

from simulation.errors import Ended
from simulation.game import Sampling
from simulation.model_configs import ModelConfig
from simulation.prompts import Prompt
from simulation.replies import Tokens

Outcome = tuple[str | None, str | None]  # a text, and why it cannot be used


class Purse(Protocol):
    """Whose requests they are, and what they may cost."""

    sampling: Sampling

    def afford(self, ask: Ask, wanted: int) -> int:
        """Set tokens aside for up to so many samples, and return for how many."""

    def settle(self, ask: Ask, tokens: Tokens | None, answered: bool) -> None:
        """Count what a request did cost, if the server says so, and let go of what was set aside for it."""

    @property
    def owes(self) -> bool:
        """Whether tokens are set aside that may come back."""


class Ask:
    """So many participants who wait for a sample of the same prompt.

    Args:
        purse: The group they are in.
        config: The model.
        prompt: What is asked.
        fields: What else the request says, n excepted.
        waiting: A future for each, the first one last.
        deliver: Takes futures and their outcomes, in the thread that waits for them.
        fail: Takes futures, the cause why they get nothing, and how the round ended by that.
        deadline: When they are given up, as time.monotonic() tells it; None before the first request.
    """

    def __init__(
        self,
        purse: Purse,
        config: ModelConfig,
        prompt: Prompt,
        fields: dict[str, Any],
        waiting: list[asyncio.Future[Any]],
        deliver: Callable[[list[asyncio.Future[Any]], list[Outcome], float], None],
        fail: Callable[[list[asyncio.Future[Any]], str, Ended], None],
        deadline: float | None,
    ) -> None:
        self.purse = purse
        self.config = config
        self.prompt = prompt
        self.fields = fields
        self.waiting = waiting
        self.deliver = deliver
        self.fail = fail
        self.deadline = deadline
        self.asked_at = time.monotonic()
        self.troubles = 0  # in a row
        self.cause: str | None = None  # of the last one
        self.got_one = False  # one answer alone, when several brought trouble
        self.set_aside = 0.0  # tokens, by its purse

    def cut(self, count: int) -> Ask:
        """Take off the first `count` that still wait."""
        first: list[asyncio.Future[Any]] = []
        while self.waiting and len(first) < count:
            future = self.waiting.pop()
            if not future.done():
                first.append(future)
        first.reverse()
        return self.of(first)

    def put_back(self, part: Ask) -> None:
        """Let a part that was cut off wait again, as the first."""
        self.waiting += part.waiting

    def cut_rest(self, count: int) -> Ask:
        """Take off all but the first `count`."""
        place = len(self.waiting) - count
        rest = self.of(self.waiting[:place])
        self.waiting = self.waiting[place:]
        return rest

    def of(self, waiting: list[asyncio.Future[Any]]) -> Ask:
        """The same for others."""
        part = Ask(self.purse, self.config, self.prompt, self.fields, waiting, self.deliver, self.fail, self.deadline)
        part.asked_at, part.troubles, part.cause = self.asked_at, self.troubles, self.cause
        part.got_one = self.got_one
        return part

    def give_up(self, cause: str, ended: Ended = Ended.COMPLETE) -> None:
        """Let all of them know that they get nothing, why, and how the round ended by that."""
        self.fail(self.waiting, cause, ended)
        self.waiting = []

    def body(self, count: int) -> bytes:
        """The request for so many samples."""
        fields = {"model": self.config.model, "messages": self.prompt.messages, **self.fields}
        return json.dumps(fields | ({"n": count} if count > 1 else {})).encode()
