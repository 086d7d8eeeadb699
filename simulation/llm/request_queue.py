"""The queue of requests to model servers, with batching, retries, backoff and the shared semaphore.

Each model has its own client. All clients of a process run on one event loop in one thread.
"""

import asyncio
import contextlib
import math
import random
import threading
import time
from collections import deque
from dataclasses import replace

import uvloop
from loguru import logger

from simulation.errors import Ended, one_line
from simulation.llm.concurrency_limit import RateLimit, SharedSemaphore
from simulation.llm.model_configs import ModelConfig
from simulation.llm.responses import NO_ANSWER, OUT_OF_TOKENS, RequestError, Text, pause_s
from simulation.llm.sample_request import SampleRequest

WARN_AFTER_S = 2.0  # time without an answer after which a temporary error is reported
ANSWERS_IN_FLIGHT = 512  # twice vLLM's concurrent sequences (max_num_seqs, 256), so that vLLM is never idle
POLL_S = 0.01  # poll interval for a semaphore that other processes hold
TICK_S = 0.25  # interval of heartbeats to the semaphore, and of checks for expired requests
ERRORS_WITH_N = 3  # errors in a row after which a request asks for one answer instead of several


class ModelClient:
    """The client for one model. It must be created and used on the event loop of the model thread."""

    def __init__(self, config: ModelConfig) -> None:
        from simulation.llm.http_client import ModelHttp  # noqa: PLC0415 - imports openai, see Chat

        self._http = ModelHttp(config)
        self._semaphore = SharedSemaphore(self._http.url)
        self._rate = None if config.per_minute == (None, None) else RateLimit(f"{self._http.url} {config.model}")
        self._rate_full_since = math.inf  # time.monotonic() since when the limit per minute allows no request
        self._queue: deque[SampleRequest] = deque()
        self._last_success = -math.inf  # time.monotonic() of the last answer
        self._errors = 0  # consecutive errors that concern the whole server
        self._last_cause = NO_ANSWER
        self._has_warned = False  # of the errors since the last answer
        self._backoff_until = -math.inf
        self._pause_until = -math.inf  # the same, or time.monotonic() at which the limit per minute allows a request
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def put(self, request: SampleRequest, first: bool = False) -> None:
        """Add a request to the end of the queue or, if `first` (the request was queued before), to the front."""
        self._queue.insert(0 if first else len(self._queue), request)
        self._wake.set()

    async def _run(self) -> None:
        """Repeatedly send requests, fail expired requests, and record heartbeats of the semaphore."""
        next_tick = -math.inf
        while True:
            self._wake.clear()
            now = time.monotonic()
            try:
                if now >= next_tick or not self._queue:
                    next_tick = now + TICK_S
                    for request in self._queue:
                        request.postpone_if_paused(now)
                    if now > self._rate_full_since:  # no request expires because it waits for the limit per minute
                        waited_s, self._rate_full_since = now - self._rate_full_since, now
                        for request in self._queue:
                            request.postpone(waited_s)
                    self._queue = deque(request for request in self._queue if not self._prune(request))
                    self._semaphore.beat(waiting=bool(self._queue) and now >= self._pause_until)
                while now >= self._pause_until and self._send_next():
                    pass
            except Exception as error:  # noqa: BLE001 - every error must reach the participants
                for request in self._queue:
                    request.fail(one_line(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S if self._queue else TICK_S if self._semaphore.held else None):
                    await self._wake.wait()

    def _exceeds_rate(self, request: SampleRequest, count: int) -> bool:
        """Return whether the limit per minute allows no request for `count` samples now. Otherwise, count it."""
        if self._rate is None:
            return False
        now, wait_s = time.monotonic(), self._rate.take(request.per_minute, request.tokens(count))
        self._pause_until = max(self._pause_until, now + wait_s)
        self._rate_full_since = min(self._rate_full_since, now) if wait_s else math.inf
        return wait_s > 0

    def _prune(self, request: SampleRequest) -> bool:
        """Drop participants that no longer wait. Fail an expired request. Return whether no participant is left."""
        end = request.deadline
        if end == math.inf:  # not sent yet: does not expire while the server answers other requests
            end = max(request.queued_at, self._last_success) + request.chat.settings.reply_timeout
        while request.waiting and (request.chat.closed or request.waiting[0].future.done()):
            request.waiting.popleft()
        if time.monotonic() >= end:
            request.fail(request.cause or self._last_cause, Ended.MODEL_FAILED)
        return not request.waiting

    def _send_next(self) -> bool:
        """Send the next request that the semaphore and the token budgets allow. Return whether a request was sent."""
        for _ in range(len(self._queue)):
            request = self._queue[0]
            if self._prune(request):
                self._queue.popleft()
                continue
            chat, several = request.chat, request.fields.get("temperature") != 0  # vLLM refuses n > 1 at temperature 0
            several = several and request.config not in chat.n_unsupported
            wanted = request.sharing(chat.settings.samples_per_request if several else 1)
            count = 0 if chat.paused else min(wanted, chat.budget.affordable(request))
            if count == 0:
                if not (chat.tasks or chat.paused):  # otherwise, a request in flight may return reserved tokens
                    request.fail(OUT_OF_TOKENS, Ended.OUT_OF_TOKENS)
                self._queue.rotate(-1)
                continue
            limit = chat.settings.max_in_flight  # counts requests; the default limit (None) counts answers
            limit, slots = (ANSWERS_IN_FLIGHT, count) if limit is None else (limit, 1)
            if not self._semaphore.acquire(limit * request.config.entry.get("engines", 1), slots):
                return False
            if self._exceeds_rate(request, count):
                self._semaphore.release(slots)
                return False
            self._queue.rotate(-1)  # round-robin
            self._send(replace(request, waiting=deque(request.waiting.popleft() for _ in range(count))), slots)
            return True
        return False

    def _send(self, batch: SampleRequest, slots: int) -> None:
        chat = batch.chat
        chat.budget.reserve(batch, len(batch.waiting))
        batch.deadline = min(batch.deadline, time.monotonic() + chat.settings.reply_timeout)
        task = asyncio.create_task(self._serve(batch))
        chat.tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:  # also runs if the task is cancelled before its first step
            chat.tasks.remove(task)
            self._semaphore.release(slots)
            chat.budget.commit(batch)  # no effect if already committed
            self._wake.set()

        task.add_done_callback(ended)

    async def _serve(self, batch: SampleRequest) -> None:
        count, with_system = len(batch.waiting), self._http.takes_system
        try:
            try:
                texts = await self._request(batch, count, with_system)
            except RequestError as error:
                count, texts = 1, await self._request_one(batch, error, with_system)
            self._answered(batch, count, texts)
        except RequestError as error:
            self._retry_or_fail(batch, error)
        except Exception as error:  # noqa: BLE001 - every error must reach the participants
            batch.fail(one_line(error))

    async def _request_one(self, batch: SampleRequest, error: RequestError, with_system: bool) -> list[Text]:
        """Request one answer without what may have caused `error`: the field n, or then the role "system", if used.

        Raises RequestError, possibly `error` itself.
        """
        clear = not error.retryable or batch.single_worked or batch.errors + 1 >= ERRORS_WITH_N
        if clear and len(batch.waiting) > 1 and error.maybe_unsupported_n and self._reserve_one(batch):
            try:
                texts = await self._request(batch, 1, with_system)
            except RequestError as second:
                error = second
            else:
                if batch.single_worked or not error.retryable:
                    self._stop_using_n(batch, f"has trouble with several answers in one request ({error})")
                batch.single_worked = True
                return texts
        # Unless the server's words are clear, the role is not the cause if an earlier request with it succeeded
        works = self._http.takes_system and self._last_success > -math.inf
        doubtful = error.no_system or (error.no_system is None and clear and not works)
        if not (doubtful and with_system and self._reserve_one(batch)):
            raise error
        texts = await self._request(batch, 1, with_system=False)
        if error.no_system is None and self._reserve_one(batch):
            with contextlib.suppress(RequestError):
                return await self._request(batch, 1, with_system=True)  # the error was temporary
        self._http.stop_using_system()
        return texts

    def _reserve_one(self, batch: SampleRequest) -> bool:
        """Reserve the tokens of one more request for one answer. Return whether the budget allows that."""
        if not batch.chat.budget.affordable(batch):
            return False
        batch.chat.budget.reserve(batch, 1)
        if self._rate is not None:
            self._rate.take(batch.per_minute, batch.reserved, force=True)
        return True

    async def _request(self, batch: SampleRequest, count: int, with_system: bool) -> list[Text]:
        """Send one request for `count` answers. Charge its tokens before participants resume. Raises RequestError."""
        settings, left_s = batch.chat.settings, batch.deadline - time.monotonic()
        attempt_s = batch.config.timeout_s or settings.attempt_timeout
        fields = batch.fields | ({"n": count} if count > 1 else {})
        fields |= {"seed": batch.seed + batch.waiting[0].participant} if batch.seed is not None else {}
        body = self._http.body(batch.prompt, fields, with_system)
        usage, answered = None, False
        try:
            texts, usage = await self._http.post(body, min(attempt_s, left_s))
            answered = True
            return texts
        except RequestError as error:
            usage = error.usage
            if error.cause == NO_ANSWER and left_s < attempt_s and batch.cause is not None:
                error.cause = batch.cause  # the deadline shortened the attempt: the previous cause is more helpful
            raise
        finally:
            if self._rate is not None and usage is not None:
                self._rate.give_back(batch.reserved - usage.tokens)
            batch.chat.budget.commit(batch, usage, answered)

    def _stop_using_n(self, batch: SampleRequest, why: str) -> None:
        if batch.config not in batch.chat.n_unsupported:
            batch.chat.n_unsupported.add(batch.config)
            logger.warning(f"{batch.config.base_url} {why}: asking for one each")

    def _answered(self, batch: SampleRequest, count: int, texts: list[Text]) -> None:
        self._last_success = time.monotonic()
        self._errors, self._last_cause, self._has_warned = 0, NO_ANSWER, False
        if count > 1:
            batch.single_worked = False
            if len(texts) == 1:
                self._stop_using_n(batch, f"gives one answer where {count} were asked for")
        for errors in (batch.chat.failing_since, batch.chat.outages):
            errors.pop(batch.config.name, None)
        batch.deliver(texts[:count])
        if batch.waiting:
            batch.errors, batch.cause = 0, None
            self.put(batch, first=True)

    def _retry_or_fail(self, batch: SampleRequest, error: RequestError) -> None:
        """Put a failed request back into the queue, now or after a pause, or fail its participants."""
        batch.errors += 1
        batch.cause = self._last_cause = error.cause
        if not error.retryable:
            same = [each for each in self._queue if each.chat is batch.chat and each.prompt == batch.prompt]
            for request in [batch, *(same if error.refused else [])]:  # the server would refuse these, too
                request.fail(error.cause, Ended.MODEL_FAILED)
            return
        now, errors = time.monotonic(), batch.errors
        if error.server_wide:
            self._errors += now >= self._backoff_until  # an error during the backoff belongs to the previous burst
            errors = max(self._errors, 1)
        wait_s = min(pause_s(errors, error.retry_after_s, random.random()), max(batch.deadline - now, 0.0))
        self._warn_if_lasting(batch, error, now + wait_s)
        if error.server_wide:
            self._backoff_until = max(self._backoff_until, now + wait_s)
            self._pause_until = max(self._pause_until, now + wait_s)
            self.put(batch, first=True)
        else:
            asyncio.get_running_loop().call_later(wait_s, self.put, batch, True)

    def _warn_if_lasting(self, batch: SampleRequest, error: RequestError, again_at: float) -> None:
        """Log and report a temporary error once if no request succeeds for WARN_AFTER_S."""
        name, chat = batch.config.name, batch.chat
        if again_at - chat.failing_since.setdefault(name, time.monotonic()) < WARN_AFTER_S or name in chat.outages:
            return
        limit = f"requests are repeated for up to {chat.settings.reply_timeout:g} s (--reply-timeout)"
        chat.outages[name] = f"{name} at {batch.config.base_url}: {error.cause}; {limit}"
        if not self._has_warned:
            logger.warning(chat.outages[name])
            self._has_warned = True


class ModelThread:
    """The thread whose event loop runs all clients of this process."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self.clients: dict[ModelConfig, ModelClient] = {}
        threading.Thread(target=self.loop.run_forever, name="models", daemon=True).start()

    def put(self, requests: list[SampleRequest]) -> None:
        """Pass requests to the clients of their models. Create missing clients. Must be called on the model thread."""
        for request in requests:
            try:
                if request.config not in self.clients:
                    self.clients[request.config] = ModelClient(request.config)
                self.clients[request.config].put(request)
            except Exception as error:  # noqa: BLE001 - invalid client settings may raise any exception
                request.fail(one_line(error))


_thread: ModelThread | None = None
_thread_lock = threading.Lock()


def model_thread() -> ModelThread:
    """Return this process's model thread. It starts on first use, because threads do not survive a fork."""
    global _thread  # noqa: PLW0603 - one per process
    with _thread_lock:
        _thread = _thread or ModelThread()
        return _thread
