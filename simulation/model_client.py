"""One model server, as this process asks it: one HTTP client, one queue, retries, and its part of the common limit.

It lives on the event loop of the process's one model thread. What it knows of participants is that somebody waits for
so many samples of a prompt; the first of an `Ask` that gets its samples is the first that asked.
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

import aiohttp
import httpx2
import openai
from loguru import logger

from simulation.errors import one_line
from simulation.game import Sampling
from simulation.in_flight import InFlight
from simulation.model_configs import ModelConfig, is_within
from simulation.prompts import Prompt
from simulation.replies import MODEL_SERVER, Reply, Trouble, pause_s, read_reply

ANSWERS_IN_FLIGHT = 512  # twice the sequences that vLLM runs at a time (max_num_seqs, 256), so that it never waits
FEWEST_IN_FLIGHT = 4
POLL_S = 0.005  # between two looks at a limit that other processes use up
TICK_S = 0.25  # between two looks at who has waited too long
GARBLED_REPLIES = 8  # in a row, for one request
REPLY_BYTES = 256 * 2**20
KEEP_ALIVE_S = 4.0  # vLLM closes an idle connection after 5
NO_ANSWER = f"{MODEL_SERVER}: no answer in time"
OUT_OF_TOKENS = "out of tokens (--max-tokens)"

Outcome = tuple[str | None, str | None]  # a text, and why it cannot be used


class Purse(Protocol):
    """Whose requests they are, and what they may cost."""

    sampling: Sampling

    def afford(self, ask: Ask, wanted: int) -> int:
        """Set tokens aside for up to so many samples, and return for how many."""

    def settle(self, ask: Ask, count: int, reply: Reply | None) -> None:
        """Count what a request did cost, of `count` samples that were set aside for."""

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
        fail: Takes futures and the cause why they get nothing.
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
        fail: Callable[[list[asyncio.Future[Any]], str], None],
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

    def cut(self, count: int) -> Ask:
        """Take off the first `count` that still wait."""
        first: list[asyncio.Future[Any]] = []
        while self.waiting and len(first) < count:
            future = self.waiting.pop()
            if not future.done():
                first.append(future)
        first.reverse()
        return self.of(first)

    def of(self, waiting: list[asyncio.Future[Any]]) -> Ask:
        """The same for others."""
        part = Ask(self.purse, self.config, self.prompt, self.fields, waiting, self.deliver, self.fail, self.deadline)
        part.asked_at, part.troubles, part.cause = self.asked_at, self.troubles, self.cause
        return part

    def give_up(self, cause: str) -> None:
        """Let all of them know that they get nothing, and why."""
        self.fail(self.waiting, cause)
        self.waiting = []

    def body(self, count: int) -> bytes:
        """The request for so many samples."""
        messages = [{"role": "system", "content": self.prompt.system}, {"role": "user", "content": self.prompt.user}]
        fields = {"model": self.config.model, "messages": messages, **self.fields}
        return json.dumps(fields | ({"n": count} if count > 1 else {})).encode()


class ModelClient:
    """The one client of this process for one model server; to be made and used on the event loop that it lives on."""

    def __init__(self, config: ModelConfig) -> None:
        arguments = {name: value for name, value in config.entry["client_args"].items() if name != "base_url"}
        local = is_within(config.base_url, ())
        self._http = openai.DefaultAioHttpClient(
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S),
            timeout=None,  # see _post: one time-out for the whole of a request
            trust_env=not local,  # a proxy of the environment has no business on this host
            follow_redirects=False,
        )
        url = config.base_url.replace("//localhost", "//127.0.0.1")  # on ::1 somebody else may listen
        client = openai.AsyncOpenAI(
            api_key=config.entry.get("api_key") or ("EMPTY" if local else None),  # None: of the environment
            organization=config.entry.get("organization"),
            base_url=url,
            http_client=self._http,
            **arguments,
        )
        self._url = httpx2.URL(url + "/chat/completions")
        self._models_url = httpx2.URL(url + "/models")
        said = {**client.default_headers, **client.auth_headers}
        self._headers = httpx2.Headers({name: value for name, value in said.items() if isinstance(value, str)})
        self._headers["content-type"] = "application/json"
        self._loop = asyncio.get_running_loop()
        self._places = InFlight(url)
        self._queue: deque[Ask] = deque()
        self._serving: dict[asyncio.Task[None], Ask] = {}
        self._one_each: set[Purse] = set()  # for whom this server does not take n
        self._life = -math.inf  # when it last answered
        self._troubles = 0  # in a row
        self._last_cause = NO_ANSWER
        self._resting_until = -math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._ticking: asyncio.Task[None] | None = None

    def put(self, asks: list[Ask], first: bool = False) -> None:
        """Queue asks, as the next ones if they have been in the queue before."""
        if first:
            self._queue.extendleft(asks)
        else:
            self._queue.extend(asks)
        if self._ticking is None:
            self._ticking = self._loop.create_task(self._tick())
        self._pump()

    def drop(self, purse: Purse) -> None:
        """Forget whatever somebody asked: nobody waits for it any more."""
        self._queue = deque(ask for ask in self._queue if ask.purse is not purse)
        self._one_each.discard(purse)
        for task, ask in self._serving.items():
            if ask.purse is purse:
                task.cancel()

    async def check(self, config: ModelConfig, timeout_s: float) -> str | None:
        """What keeps the server from answering for this model; None if nothing does."""
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._http.get(self._models_url, headers=self._headers)
        except TimeoutError:
            return f"does not answer within {timeout_s:g} s"
        except (httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
            return f"does not answer: {_connection_cause(error)}"
        if reply.status_code in (401, 403) or reply.status_code >= 500:
            return f"answers with HTTP {reply.status_code}"
        try:
            listed = reply.json() if reply.status_code == 200 else {}
        except ValueError:
            return "answers, but is no server of the OpenAI API"
        data = listed.get("data") if isinstance(listed, dict) else None
        served = [str(each.get("id")) for each in data if isinstance(each, dict)] if isinstance(data, list) else []
        if served and config.model not in served:
            return f"serves {', '.join(served[:5])}, not {config.model}"
        return None

    # --- Inside ------------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send whatever may be sent now."""
        while (ask := self._next()) is not None:
            now = time.monotonic()
            if now < self._resting_until:
                self._look_again(min(self._resting_until - now, TICK_S))
                return
            samples = self._samples_of(ask)
            limit = ask.purse.sampling.max_in_flight or max(-(-ANSWERS_IN_FLIGHT // samples), FEWEST_IN_FLIGHT)
            if not self._places.take(limit):
                if self._places.holding < limit:  # else the end of one of ours is what we wait for
                    self._look_again(POLL_S)
                return
            batch = ask.cut(samples)
            count = ask.purse.afford(batch, len(batch.waiting)) if batch.waiting else 0
            if count < len(batch.waiting):
                ask.waiting += batch.waiting[: len(batch.waiting) - count]
                batch.waiting = batch.waiting[len(batch.waiting) - count :]
            if not batch.waiting:
                self._places.give_back()
                if ask.waiting and ask.purse.owes:
                    return  # the end of one of its requests may bring some tokens back
                ask.give_up(OUT_OF_TOKENS)
                continue
            if batch.deadline is None:
                batch.deadline = now + batch.purse.sampling.reply_timeout_s
            self._queue.rotate(-1)  # to everyone in turn
            task = self._loop.create_task(self._serve(batch))
            self._serving[task] = batch

    def _next(self) -> Ask | None:
        """The next ask that somebody waits for; those that have waited too long are given up."""
        while self._queue:
            ask = self._queue[0]
            if ask.waiting and time.monotonic() >= self._end_of(ask):
                ask.give_up(ask.cause or self._last_cause)
            if ask.waiting:
                return ask
            self._queue.popleft()
        return None

    def _end_of(self, ask: Ask) -> float:
        """When an ask is given up: for as long as the server answers others, nobody in the queue is."""
        if ask.deadline is not None:
            return ask.deadline
        return max(ask.asked_at, self._life) + ask.purse.sampling.reply_timeout_s

    def _samples_of(self, ask: Ask) -> int:
        greedy = ask.fields.get("temperature") == 0  # vLLM refuses to draw twice where there is no chance in it
        return 1 if greedy or ask.purse in self._one_each else ask.purse.sampling.samples_per_request

    def _look_again(self, delay_s: float) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(delay_s, self._timer_rang)

    def _timer_rang(self) -> None:
        self._timer = None
        self._pump()

    async def _tick(self) -> None:
        """While there is work: say that we live, and give up on what has waited too long."""
        while self._queue or self._serving:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            for ask in self._queue:
                if now >= self._end_of(ask):
                    ask.give_up(ask.cause or self._last_cause)
            self._places.beat(waiting=bool(self._queue) and now >= self._resting_until)
            self._pump()
        self._places.beat(waiting=False)
        self._ticking = None

    async def _serve(self, batch: Ask) -> None:
        """One request, and what comes of it."""
        count = len(batch.waiting)
        reply = None
        try:
            reply = await self._post(batch, count)
        except Trouble as trouble:
            self._trouble(batch, count, trouble)
        except Exception as error:  # noqa: BLE001 - whatever it is: the participants must hear of it
            batch.give_up(one_line(error))
        else:
            self._answered(batch, count, reply)
        finally:
            del self._serving[asyncio.current_task()]  # type: ignore[arg-type]
            self._places.give_back()
            batch.purse.settle(batch, count, reply)
            self._pump()

    async def _post(self, batch: Ask, count: int) -> Reply:
        """One attempt. Raises Trouble."""
        sampling = batch.purse.sampling
        request = httpx2.Request("POST", self._url, headers=self._headers, content=batch.body(count))
        patience_s = min(sampling.attempt_timeout_s, self._left_s(batch))
        try:
            async with asyncio.timeout(patience_s):
                response = await self._http.send(request, stream=True)
                body = await _body_of(response)
        except TimeoutError:
            cut_short = patience_s < sampling.attempt_timeout_s  # then what was wrong before says more
            raise Trouble((batch.cause if cut_short else None) or NO_ANSWER) from None
        except (httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
            raise Trouble(f"{MODEL_SERVER}: {_connection_cause(error)}", endpoint=True) from None
        return read_reply(response.status_code, response.headers, body, time.time())

    def _answered(self, batch: Ask, count: int, reply: Reply) -> None:
        self._life = time.monotonic()
        self._troubles = 0
        self._last_cause = NO_ANSWER
        outcomes = list(reply.texts[:count])
        if count > 1 and len(outcomes) == 1 and batch.purse not in self._one_each:
            self._one_each.add(batch.purse)
            logger.warning(f"{batch.config.address} gives one answer where {count} were asked for: asking for one each")
        served = [batch.waiting.pop() for _ in outcomes]
        batch.deliver(served, outcomes, batch.deadline or 0.0)
        if batch.waiting:
            batch.troubles, batch.cause = 0, None
            self.put([batch], first=True)

    def _trouble(self, batch: Ask, count: int, trouble: Trouble) -> None:
        """What becomes of a request that brought nothing: once more, now or later, or the end."""
        cause = str(trouble)
        batch.troubles += 1
        batch.cause = self._last_cause = cause
        if trouble.refused and count > 1:  # n, or something else? asked for one, the server will say
            self._one_each.add(batch.purse)
            logger.warning(
                f"{batch.config.address} refuses {count} answers in one request ({cause}): asking for one each"
            )
            self.put([batch], first=True)
        elif not trouble.again or (trouble.garbled and batch.troubles >= GARBLED_REPLIES):
            same = [ask for ask in self._queue if (ask.purse, ask.prompt) == (batch.purse, batch.prompt)]
            for ask in [batch, *(same if trouble.refused else [])]:  # none of them would fare better
                ask.give_up(cause)
        elif trouble.endpoint:
            self._troubles += 1
            pause = min(pause_s(self._troubles, trouble.retry_after_s, random.random()), self._left_s(batch))
            self._resting_until = max(self._resting_until, time.monotonic() + pause)
            self.put([batch], first=True)
        else:
            pause = min(pause_s(batch.troubles, trouble.retry_after_s, random.random()), self._left_s(batch))
            self._loop.call_later(pause, self.put, [batch], True)

    def _left_s(self, batch: Ask) -> float:
        """How long somebody may still wait."""
        return max((batch.deadline or math.inf) - time.monotonic(), 0.0)


async def _body_of(response: httpx2.Response) -> bytes:
    """The whole of a reply. Raises Trouble if it breaks off, or is too long."""
    parts, size = [], 0
    try:
        async for part in response.aiter_bytes():
            parts.append(part)
            size += len(part)
            if size > REPLY_BYTES:
                raise Trouble(f"{MODEL_SERVER}: a reply of more than {REPLY_BYTES >> 20} MB", garbled=True)
    except (httpx2.HTTPError, aiohttp.ClientError, OSError):
        raise Trouble(f"{MODEL_SERVER}: the reply breaks off", garbled=True) from None
    finally:
        await response.aclose()
    return b"".join(parts)


def _connection_cause(error: BaseException | None) -> str:
    """Why there is no connection, or no longer; in words that are the same each time."""
    chain = error
    while chain is not None:
        if isinstance(chain, ConnectionRefusedError):
            return "connection refused"
        if isinstance(chain, aiohttp.ClientConnectorDNSError):
            return "no address is known for its host"
        chain = chain.__cause__ or chain.__context__ or _os_error(chain)
    return "connection lost"


def _os_error(error: BaseException) -> BaseException | None:
    inner = getattr(error, "os_error", None)
    return inner if isinstance(inner, BaseException) else None
