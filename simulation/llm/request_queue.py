"""The request queue of this process for one model server: batching, retries, backoff and the shared semaphore.

Runs on the event loop of the process's single model thread.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from loguru import logger

from simulation.errors import Ended, one_line
from simulation.game.rules import LLMSettings
from simulation.llm.concurrency_limit import SharedSemaphore
from simulation.llm.model_configs import ModelConfig
from simulation.llm.prompts import Prompt
from simulation.llm.responses import Reply, RequestError, Tokens, pause_s
from simulation.llm.usage import MODEL_SERVER, OUT_OF_TOKENS

ANSWERS_IN_FLIGHT = 512  # twice vLLM's concurrent sequences (max_num_seqs, 256), so that vLLM is never idle
POLL_S, LONGEST_POLL_S = 0.005, 0.05  # poll interval for a semaphore that other processes hold
TICK_S = 0.25  # interval between checks for expired requests
GARBLED_REPLIES = 8  # in a row for one request, then it fails
TROUBLES_WITH_N = 3  # in a row, before a request asks for one answer instead of several
NO_ANSWER = f"{MODEL_SERVER}: no answer in time"


class ModelClient:
    """This process's only client for one model server; create and use it on the event loop of the model thread."""

    def __init__(self, config: ModelConfig) -> None:
        from simulation.llm.http_client import ModelHttp  # noqa: PLC0415 - openai, see import_client

        self._http = ModelHttp(config)
        self._loop = asyncio.get_running_loop()
        self._semaphore = SharedSemaphore(self._http.url)
        self._queue: deque[SampleRequest] = deque()
        self._serving: dict[asyncio.Task[None], SampleRequest] = {}
        self._n_unsupported: set[TokenBudget] = set()  # groups for which this server does not support n
        self._last_success = -math.inf  # time.monotonic() of the last answer
        self._troubles = 0  # in a row
        self._last_cause = NO_ANSWER
        self._backoff_until = -math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._poll_s = POLL_S
        self._ticking: asyncio.Task[None] | None = None

    def put(self, asks: list[SampleRequest], first: bool = False) -> None:
        """Queue requests: at the end, or at the front if they were queued before (`first`)."""
        if first:
            self._queue.extendleft(asks)
        else:
            self._queue.extend(asks)
        if self._ticking is None:
            self._ticking = self._loop.create_task(self._tick())
        self._pump()

    def drop(self, budget: TokenBudget) -> None:
        """Drop all requests of one group; their futures stay unresolved."""
        self._queue = deque(ask for ask in self._queue if ask.budget is not budget)
        self._n_unsupported.discard(budget)
        for task, ask in self._serving.items():
            if ask.budget is budget:
                task.cancel()

    async def check(self, config: ModelConfig, timeout_s: float) -> str | None:
        """Return why the server cannot answer for this model; None if it can."""
        return await self._http.check(config.model, timeout_s)

    # --- Inside ------------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send every request that the backoff, the semaphore and the token budgets allow now."""
        broke = 0  # requests in a row whose token budget is fully reserved
        while broke < max(len(self._queue), 1) and (ask := self._next()) is not None:
            now = time.monotonic()
            if now < self._backoff_until:
                self._look_again(min(self._backoff_until - now, TICK_S))
                return
            batch = ask.cut(self._samples_of(ask))
            if not batch.waiting:
                continue
            limit, slots = self._measure(batch)
            if not self._semaphore.acquire(limit, slots):
                ask.requeue(batch)
                if self._semaphore.held < limit:  # else we wait for one of our own requests to end
                    self._look_again(self._poll_s)
                    self._poll_s = min(1.5 * self._poll_s, LONGEST_POLL_S)
                return
            self._poll_s = POLL_S
            count = batch.budget.reserve(batch, len(batch.waiting))
            if count < len(batch.waiting):
                ask.requeue(batch.split_off(count))
            self._queue.rotate(-1)  # round-robin
            if batch.waiting:
                broke = 0
                self._send(batch, slots)
                continue
            self._semaphore.release(slots)
            if ask.budget.has_reservations:  # a request that ends may return some tokens
                broke += 1
            else:
                ask.give_up(OUT_OF_TOKENS, Ended.OUT_OF_TOKENS)

    def _measure(self, batch: SampleRequest) -> tuple[int, int]:
        """Return the limit and the permits a request needs: in requests if --max-in-flight is set, else in answers."""
        limit = batch.budget.sampling.max_in_flight
        return (ANSWERS_IN_FLIGHT, len(batch.waiting)) if limit is None else (limit, 1)

    def _send(self, batch: SampleRequest, slots: int) -> None:
        if batch.deadline is None:
            batch.deadline = time.monotonic() + batch.budget.sampling.reply_timeout_s
        count = len(batch.waiting)
        task = self._loop.create_task(self._serve(batch, count))
        self._serving[task] = batch

        def ended(task: asyncio.Task[None]) -> None:  # also runs for a task cancelled before its first step
            del self._serving[task]
            self._semaphore.release(slots)
            batch.budget.commit(batch, None, False)  # no effect if already committed
            self._pump()

        task.add_done_callback(ended)

    def _next(self) -> SampleRequest | None:
        """Return the next pending request; fail those that have expired."""
        while self._queue:
            ask = self._queue[0]
            if ask.waiting and time.monotonic() >= self._end_of(ask):
                ask.give_up(ask.cause or self._last_cause, Ended.MODEL_FAILED)
            if ask.waiting:
                return ask
            self._queue.popleft()
        return None

    def _end_of(self, ask: SampleRequest) -> float:
        """Return when a request expires; one not sent yet does not expire while the server answers others."""
        if ask.deadline is not None:
            return ask.deadline
        return max(ask.asked_at, self._last_success) + ask.budget.sampling.reply_timeout_s

    def _samples_of(self, ask: SampleRequest) -> int:
        greedy = ask.fields.get("temperature") == 0  # vLLM refuses n > 1 at temperature 0
        return 1 if greedy or ask.budget in self._n_unsupported else ask.budget.sampling.samples_per_request

    def _look_again(self, delay_s: float) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(delay_s, self._timer_rang)

    def _timer_rang(self) -> None:
        self._timer = None
        self._pump()

    async def _tick(self) -> None:
        """Send heartbeats to the semaphore and fail expired requests, as long as there is work."""
        try:
            while self._queue or self._serving:
                await asyncio.sleep(TICK_S)
                now = time.monotonic()
                for ask in self._queue:
                    if now >= self._end_of(ask):
                        ask.give_up(ask.cause or self._last_cause, Ended.MODEL_FAILED)
                self._semaphore.beat(waiting=bool(self._queue) and now >= self._backoff_until)
                self._pump()
            self._semaphore.beat(waiting=False)
        finally:
            self._ticking = None

    async def _serve(self, batch: SampleRequest, count: int) -> None:
        """Send a request and handle its outcome; after an error that `n` may have caused, request a single answer."""
        try:
            reply = await self._request(batch, count)
            if isinstance(reply, RequestError) and count > 1 and self._doubts_n(batch, reply):
                trouble, count, reply = reply, 1, await self._request(batch, 1)
                if isinstance(reply, Reply):
                    if batch.single_worked or not trouble.retryable:
                        self._stop_using_n(batch, f"has trouble with several answers in one request ({trouble})")
                    batch.single_worked = True
            if isinstance(reply, RequestError):
                self._trouble(batch, reply)
            else:
                self._answered(batch, count, reply)
        except Exception as error:  # noqa: BLE001 - whatever it is: the participants must hear of it
            batch.give_up(one_line(error))

    async def _request(self, batch: SampleRequest, count: int) -> Reply | RequestError:
        """Make one attempt and commit its cost."""
        try:
            reply = await self._post(batch, count)
        except RequestError as trouble:
            batch.budget.commit(batch, trouble.tokens, False)
            return trouble
        batch.budget.commit(batch, reply.tokens, True)  # before usage can be read
        return reply

    def _doubts_n(self, batch: SampleRequest, trouble: RequestError) -> bool:
        """Return whether to retry now for one answer (after a refusal or repeated errors), and reserve its tokens."""
        clear = not trouble.retryable or batch.single_worked or batch.troubles + 1 >= TROUBLES_WITH_N
        return trouble.maybe_unsupported_n and clear and batch.budget.reserve(batch, 1) == 1

    def _stop_using_n(self, batch: SampleRequest, why: str) -> None:
        if batch.budget not in self._n_unsupported:
            self._n_unsupported.add(batch.budget)
            logger.warning(f"{batch.config.address} {why}: asking for one each")

    async def _post(self, batch: SampleRequest, count: int) -> Reply:
        """Make one attempt. Raises RequestError."""
        attempt_s, left_s = batch.budget.sampling.attempt_timeout_s, self._left_s(batch)
        try:
            return await self._http.post(batch.body(count), min(attempt_s, left_s))
        except TimeoutError:
            # if the deadline cut the attempt short, the previous cause says more
            raise RequestError((batch.cause if left_s < attempt_s else None) or NO_ANSWER) from None

    def _answered(self, batch: SampleRequest, count: int, reply: Reply) -> None:
        self._last_success = time.monotonic()
        self._troubles = 0
        self._last_cause = NO_ANSWER
        outcomes = list(reply.texts[:count])
        if count > 1:
            batch.single_worked = False
            if len(outcomes) == 1:
                self._stop_using_n(batch, f"gives one answer where {count} were asked for")
        batch.deliver(batch.waiting[: -len(outcomes) - 1 : -1], outcomes, batch.deadline or 0.0)
        del batch.waiting[-len(outcomes) :]
        if batch.waiting:
            batch.troubles, batch.cause = 0, None
            self.put([batch], first=True)

    def _trouble(self, batch: SampleRequest, trouble: RequestError) -> None:
        """Retry a failed request now or later, or give up."""
        cause = str(trouble)
        batch.troubles += 1
        batch.cause = self._last_cause = cause
        if not trouble.retryable or (trouble.malformed and batch.troubles >= GARBLED_REPLIES):
            same = [ask for ask in self._queue if (ask.budget, ask.prompt) == (batch.budget, batch.prompt)]
            for ask in [batch, *(same if trouble.refused else [])]:  # the server would refuse these too
                ask.give_up(cause, Ended.MODEL_FAILED)
        elif trouble.server_wide:
            if time.monotonic() >= self._backoff_until:  # else it belongs to the same burst as the previous error
                self._troubles += 1
            pause = min(pause_s(max(self._troubles, 1), trouble.retry_after_s, random.random()), self._left_s(batch))
            self._backoff_until = max(self._backoff_until, time.monotonic() + pause)
            self.put([batch], first=True)
        else:
            pause = min(pause_s(batch.troubles, trouble.retry_after_s, random.random()), self._left_s(batch))
            self._loop.call_later(pause, self.put, [batch], True)

    def _left_s(self, batch: SampleRequest) -> float:
        """Return the seconds left until the deadline."""
        return max((batch.deadline or math.inf) - time.monotonic(), 0.0)


Outcome = tuple[str | None, str | None]  # a text, and why it is unusable


class TokenBudget(Protocol):
    """The owner of requests: its LLM settings and its token budget."""

    sampling: LLMSettings

    def reserve(self, ask: SampleRequest, wanted: int) -> int:
        """Reserve tokens for up to `wanted` samples; return the number of samples that the budget allows."""

    def commit(self, ask: SampleRequest, tokens: Tokens | None, answered: bool) -> None:
        """Count the actual cost of a request, if the server reports it, and release its reservation."""

    @property
    def has_reservations(self) -> bool:
        """Return whether tokens are reserved, some of which may be returned."""


class SampleRequest:
    """A request for samples of one prompt, one for each of several participants.

    Args:
        budget: The token budget of the participants' group.
        config: The model.
        prompt: The prompt.
        fields: Other fields of the request, except n.
        waiting: One future per participant, in reverse order (the first is last).
        deliver: Passes outcomes and the deadline to futures, on their own event loop.
        fail: Fails futures with a cause and how the round ended for them.
        deadline: When the request expires (time.monotonic()); None before it is first sent.
    """

    def __init__(
        self,
        budget: TokenBudget,
        config: ModelConfig,
        prompt: Prompt,
        fields: dict[str, Any],
        waiting: list[asyncio.Future[Any]],
        deliver: Callable[[list[asyncio.Future[Any]], list[Outcome], float], None],
        fail: Callable[[list[asyncio.Future[Any]], str, Ended], None],
        deadline: float | None,
    ) -> None:
        self.budget = budget
        self.config = config
        self.prompt = prompt
        self.fields = fields
        self.waiting = waiting
        self.deliver = deliver
        self.fail = fail
        self.deadline = deadline
        self.asked_at = time.monotonic()
        self.troubles = 0  # in a row
        self.cause: str | None = None  # of the last error
        self.single_worked = False  # a request for one answer succeeded where several failed
        self.reserved = 0.0  # tokens, by its token budget

    def cut(self, count: int) -> SampleRequest:
        """Remove the first `count` pending futures and return them as a request."""
        first: list[asyncio.Future[Any]] = []
        while self.waiting and len(first) < count:
            future = self.waiting.pop()
            if not future.done():
                first.append(future)
        first.reverse()
        return self.of(first)

    def requeue(self, part: SampleRequest) -> None:
        """Put a part that was cut off back at the front."""
        self.waiting += part.waiting

    def split_off(self, count: int) -> SampleRequest:
        """Remove all but the first `count` futures and return them as a request."""
        place = len(self.waiting) - count
        rest = self.of(self.waiting[:place])
        self.waiting = self.waiting[place:]
        return rest

    def of(self, waiting: list[asyncio.Future[Any]]) -> SampleRequest:
        """Return a copy of this request for other futures."""
        part = SampleRequest(
            self.budget, self.config, self.prompt, self.fields, waiting, self.deliver, self.fail, self.deadline
        )
        part.asked_at, part.troubles, part.cause = self.asked_at, self.troubles, self.cause
        part.single_worked = self.single_worked
        return part

    def give_up(self, cause: str, ended: Ended = Ended.COMPLETE) -> None:
        """Fail all futures with a cause and how the round ended for them."""
        self.fail(self.waiting, cause, ended)
        self.waiting = []

    def body(self, count: int) -> bytes:
        """Return the JSON body of a request for `count` samples."""
        fields = {"model": self.config.model, "messages": self.prompt.messages, **self.fields}
        return json.dumps(fields | ({"n": count} if count > 1 else {})).encode()
