"""Requests of a group for answers (samples) of a model, and the budget of tokens that pays for them."""

import asyncio
import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from simulation.errors import Ended, KnownCause
from simulation.llm.concurrency_limit import NO_LIMIT, bucket_size
from simulation.llm.model_configs import ModelConfig
from simulation.llm.prompts import Prompt
from simulation.llm.responses import Text, Usage

if TYPE_CHECKING:
    from simulation.llm.chat import Chat


class Waiting(NamedTuple):
    """A participant that waits for a text and, in time of time.monotonic(), the deadline for further requests."""

    participant: int
    future: asyncio.Future[tuple[Text, float]]


@dataclass(eq=False)
class SampleRequest:
    """A request of one group for answers (samples) to one prompt, one answer for each participant in `waiting`."""

    chat: "Chat"
    config: ModelConfig
    prompt: Prompt
    fields: dict[str, Any]  # fields of the request other than model, messages and n
    waiting: deque[Waiting]
    deadline: float  # time.monotonic() at which the request expires; infinite until it is first sent
    seed: int | None = None  # the seed of participant 0, or None without seeds; participant i has `seed + i`
    queued_at: float = field(default_factory=time.monotonic)
    errors: int = 0  # number of consecutive errors
    cause: str | None = None  # cause of the last error
    single_worked: bool = False  # after errors with several answers, a request for one answer succeeded
    reserved: float = 0.0  # tokens reserved in the group's budget
    _paused_at: float = math.inf  # until when the pause of the run is part of the deadline (time.monotonic)

    def postpone(self, seconds: float) -> None:
        """Let the request expire later."""
        self.queued_at += seconds
        self.deadline += seconds

    def postpone_if_paused(self, now: float) -> None:
        """Let the request expire later by the time for which its run has been paused. Call this regularly."""
        self.postpone(max(now - self._paused_at, 0.0))
        self._paused_at = now if self.chat.paused else math.inf

    def tokens(self, samples: int) -> int:
        """Return the maximum number of tokens of a request for `samples` samples, with an estimate for the prompt."""
        return self.prompt.tokens + samples * self._tokens_each

    @property
    def _tokens_each(self) -> int:
        return int(self.fields.get("max_completion_tokens") or self.fields["max_tokens"])

    def affordable(self, tokens: float) -> int:
        """Return the number of samples of one request that costs up to `tokens` tokens (at least 0)."""
        return int(max(min((tokens - self.prompt.tokens) / self._tokens_each, len(self.waiting)), 0))

    def sharing(self, most: int) -> int:
        """Return how many of the first `most` waiting participants may share a request.

        The limit of tokens per minute must allow the request. Sample i of a request with the seed s has the seed s + i,
        so participants with seeds share a request only if their indices are consecutive.
        """
        most = min(most, max(self.affordable(bucket_size(self.per_minute[1])), 1))
        if self.seed is None:
            return most
        first = self.waiting[0].participant
        shared = (each.participant == first + place for place, each in enumerate(itertools.islice(self.waiting, most)))
        return sum(itertools.takewhile(bool, shared))

    @property
    def per_minute(self) -> tuple[float, float]:
        """Return this host's share of the limits of requests and tokens per minute."""
        hosts = min(len(self.chat.settings.hosts), self.chat.settings.participant_num)
        requests, tokens = self.config.per_minute
        return (requests or NO_LIMIT) / hosts, (tokens or NO_LIMIT) / hosts

    def deliver(self, outcomes: Sequence[Text | KnownCause]) -> None:
        """Remove a participant from `waiting` for each outcome, and pass it the outcome on its group's event loop."""
        futures = [self.waiting.popleft().future for _ in outcomes]

        def set_outcomes() -> None:
            for future, outcome in zip(futures, outcomes, strict=True):
                if future.done():
                    continue
                if isinstance(outcome, KnownCause):
                    future.set_exception(outcome)
                else:
                    future.set_result((outcome, self.deadline))

        if futures:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the group was deleted
                futures[0].get_loop().call_soon_threadsafe(set_outcomes)

    def fail(self, cause: str, ended: Ended = Ended.COMPLETE) -> None:
        """Fail all waiting participants with this cause; `ended` states how the round ended for them."""
        self.deliver([KnownCause(cause, ended=ended) for _ in self.waiting])


@dataclass(eq=False)
class TokenBudget:
    """The tokens that one group may use, and its usage so far. The maximum cost of requests in flight is reserved."""

    left: float = math.inf  # including reserved tokens
    used: Usage = field(default_factory=Usage)  # its times stay 0
    reserved: float = 0.0

    def affordable(self, request: SampleRequest) -> int:
        """Return how many samples the remaining tokens can pay for."""
        return request.affordable(self.left - self.reserved)

    def reserve(self, request: SampleRequest, count: int) -> None:
        """Count the request, and reserve the maximum tokens of `count` samples."""
        request.reserved = request.tokens(count)
        self.reserved += request.reserved
        self.used.requests += 1
        self.used.retries += request.deadline < math.inf

    def commit(self, request: SampleRequest, usage: Usage | None = None, answered: bool = False) -> None:
        """Replace reserved tokens by `usage`. Without `usage`, charge all reserved tokens if `answered`, else none."""
        cost = request.reserved if answered else 0.0
        if usage is not None:
            self.used.prompt_tokens += usage.prompt_tokens
            self.used.completion_tokens += usage.completion_tokens
            cost = usage.tokens
        self.left -= cost
        self.reserved -= request.reserved
        request.reserved = 0.0
