"""A model server that misbehaves on demand: small, OpenAI-compatible, on a thread of the test's own.

Each request takes the next of its `habits`; when they are used up, it behaves, or goes on with `for_ever`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from aiohttp import web

from simulation.game.game import PromptTemplate
from simulation.llm.model_configs import REPEATABLE
from simulation.llm.prompts import CHECK

WORDING = PromptTemplate(
    "basic", "You give {number} from 0 to {max_value}; whoever is closest to {target} wins.", "Just it."
)

LONG = "This model's maximum context length is 128 tokens. However, you requested {} tokens. Please reduce the length."
NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template"
)
HABITS = {
    "over quota": (429, {}, '{"error": {"message": "You exceeded your current quota"}}'),
    "500 with words": (500, {}, "out of memory"),
    "no system": (400, {}, '{"error": {"message": "System role not supported"}}'),
    "redirects": (307, {"Location": "https://example.com/v1/chat/completions"}, ""),
    "no such path": (404, {}, '{"detail": "Not Found"}'),
    "no template": (400, {}, json.dumps({"error": {"message": NO_TEMPLATE}})),
    "too long": (400, {}, json.dumps({"error": {"message": LONG.format(1000)}})),
    "longer": (400, {}, json.dumps({"error": {"message": LONG.format(2000)}})),
    "not that field": (400, {}, '{"error": {"message": "Unknown field structured_outputs"}}'),
    "429": (429, {}, '{"error": {"message": "too many"}}'),
    "429 for 1 s": (429, {"Retry-After": "1"}, ""),
    "500": (500, {}, "Internal Server Error"),
    "503": (503, {}, ""),
    "404": (404, {}, '{"error": {"message": "no such model"}}'),
    "html": (200, {"Content-Type": "text/html"}, "<html><body>Welcome! 42</body></html>"),
    "garbage": (200, {"Content-Type": "application/json"}, '{"choices": [{"mess'),
    "not an object": (200, {"Content-Type": "application/json"}, "37"),
    "no choices": (200, {"Content-Type": "application/json"}, '{"choices": [], "usage": null}'),
    "an error with 200": (200, {"Content-Type": "application/json"}, '{"error": {"message": "no"}}'),
    "501": (501, {}, ""),
    "nested": (200, {"Content-Type": "application/json"}, '{"choices":[' * 100_000),
    "null choices": (200, {"Content-Type": "application/json"}, '{"choices": null}'),
}
CUT_OFF = ("cut off", "only thinks", "opens a tag")  # habits that end at the limit of tokens
PROMPT_TOKENS, ANSWER_TOKENS = 50, 3


class FakeModel:
    """It counts what it was asked, and what it answered, so that tests can compare."""

    def __init__(self, habits: Iterable[str] = (), for_ever: str = "well", delay_s: float = 0.0, port: int = 0) -> None:
        self.habits: Iterator[str] = itertools.chain(habits, itertools.repeat(for_ever))
        self.port = port
        self.delay_s = delay_s
        self.model = "participant-model"
        self.repeatable = False  # whether it lists its model as one whose seeded answers repeat
        self.listed: Callable[[Any], str] | None = None  # how the list of models is written
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.check_habit = "well"  # what it does with requests that only check it; they are not in `bodies`
        self.checks: list[dict[str, Any]] = []
        self.requests: list[web.Request] = []  # of completions
        self.without_system: str | None = None  # what it does with requests that have a system message
        self.listing = (200, "")  # status and text of the list of models ("": its model)
        self.texts: list[str] = []
        self.thoughts: list[str] = []  # what it says, by chance, where it may say anything
        self.cut_off: set[str] = set()  # those of them that the limit of tokens ends
        self.thought: list[str] = []  # what it did say so
        self.now = self.most_at_once = 0
        self.held: Callable[[str], bool] | None = None  # of which of the last words it was told it says nothing for now
        self._random = random.Random(1)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def samples(self) -> list[int]:
        """How many samples each request asked for."""
        return [body.get("n", 1) for body in self.bodies]

    def for_ever(self, habit: str) -> None:
        """Behave like this from now on."""
        self.habits = itertools.repeat(habit)

    def close(self) -> None:
        """Stop; does nothing the second time."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())  # first, so that connections being accepted are closed
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _start(self) -> None:
        application = web.Application()
        application.router.add_get("/v1/models", self._models)
        application.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def _models(self, _request: web.Request) -> web.Response:
        if self.listing != (200, ""):
            return web.Response(status=self.listing[0], text=self.listing[1])
        data = [{"id": self.model}, *([{"id": self.model + REPEATABLE}] if self.repeatable else [])]
        return web.json_response({"object": "list", "data": data}, dumps=self.listed or json.dumps)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.requests.append(request)
        if body["messages"][-1]["content"].endswith(CHECK):
            self.checks.append(body)
            has_system = body["messages"][0]["role"] == "system"
            habit, before = (has_system and self.without_system) or self.check_habit, len(self.texts)
            response = await self._answer(request, body, habit)
            del self.texts[before:]
            return response
        self.bodies.append(body)
        self.times.append(time.monotonic())
        habit = next(self.habits)
        if self.without_system is not None and body["messages"][0]["role"] == "system":
            habit = self.without_system
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        try:
            await asyncio.sleep(self.delay_s)
            while self.held is not None and self.held(body["messages"][-1]["content"]):
                await asyncio.sleep(0.02)
            return await self._answer(request, body, habit)
        finally:
            self.now -= 1

    def _number(self, seed: int | None, sample: int) -> str:
        """Draw a number; sample k of a request with a seed has the seed `seed + k`, as in vLLM."""
        source = self._random if seed is None else random.Random(seed + sample)
        return str(source.randint(0, 100))

    async def _answer(self, request: web.Request, body: dict[str, Any], habit: str) -> web.StreamResponse:
        asked = body.get("n", 1)
        if request.headers.getall("Content-Type") != ["application/json"]:  # as vLLM does
            return web.Response(status=400, text="Unsupported Media Type: Only 'application/json' is allowed")
        if habit in HABITS:
            status, headers, text = HABITS[habit]
            return web.Response(status=status, headers=headers, body=text.encode())
        if habit == "never":
            await asyncio.sleep(3600)
        if habit == "reset":
            assert request.transport is not None
            request.transport.abort()
        if habit == "breaks off":
            response = web.StreamResponse(headers={"Content-Length": "10000", "Content-Type": "application/json"})
            await response.prepare(request)
            await response.write(b'{"choices": [')
            assert request.transport is not None
            request.transport.abort()
            return response
        if habit == "odd status line":
            assert request.transport is not None
            request.transport.write(b"HTTP/1.1 200 \xff\xfe\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
            request.transport.close()
        if habit == "refuses n" and asked > 1:
            return web.json_response({"error": {"message": "n must be 1"}}, status=400)
        if habit.startswith("with n: ") and asked > 1:
            return await self._answer(request, body, habit.removeprefix("with n: "))
        given = {"ignores n": 1, "gives one fewer": max(asked - 1, 1), "gives one more": asked + 1}.get(habit, asked)
        said = {
            "null": None,
            "words": "I will not say",
            "out of range": "1000",
            "talks": "between 0 and 100 I choose 37",
            "a total": "37 of 100",
            "five": "5",
            "cut off": "3",
            "half an emoji": "\ud83d",
            "parts": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "low"}]},
                {"type": "text", "text": "37"},
            ],
            "thinks apart": "37",
            "only thinks": None,
            "opens a tag": "<think>Others pick 50",
        }
        texts = [said.get(habit, self._number(body.get("seed"), sample)) for sample in range(given)]
        if self.thoughts and "structured_outputs" not in body and len(body["messages"]) == 2:
            texts = [self._random.choice(self.thoughts) for _ in range(given)]
            self.thought += texts
        else:
            self.texts += [str(text) for text in texts[:asked]]
        choices = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": text,
                    **({"reasoning_content": "low"} if "thinks" in habit else {}),
                },
                "finish_reason": "length" if habit in CUT_OFF or str(text) in self.cut_off else "stop",
            }
            for index, text in enumerate(texts)
        ]
        if habit == "paid, but empty":
            choices = []
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": ANSWER_TOKENS * given}
        if habit == "absurd usage":
            usage["prompt_tokens"] = 10**400
        return web.json_response({"choices": choices} | ({} if habit == "keeps mum" else {"usage": usage}))
