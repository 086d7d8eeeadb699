"""The chat model as LLM participants use it: equal prompts become one request, and what they cost is counted once.

A group has a `Chat`. Whoever asks the same prompt of the same model in one pass of the event loop goes to the model's
client as one `SampleRequest`; clients live on one thread of the process, and each model server has one of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop
from agentscope.manager import ModelManager

from simulation.errors import Ended, KnownCause, UnusableAnswer, one_line
from simulation.game.rules import Game, LLMSettings
from simulation.llm.model_configs import ModelConfig, read_models
from simulation.llm.prompts import Prompt, answer_tokens, structured_fields
from simulation.llm.request_queue import ModelClient, Outcome, SampleRequest
from simulation.llm.responses import CUT_OFF, Tokens
from simulation.llm.usage import Usage
from simulation.settings import SimulationConfig

V = TypeVar("V")
Waiting = list[asyncio.Future[Any]]
Sampled = tuple[Outcome, float]  # a text or a cause, and the deadline for asking again


class Chat:
    """What the participants of one group ask their models through. They all live on one event loop.

    Args:
        game: The game; its `sampling` says how to ask.
    """

    def __init__(self, game: Game) -> None:
        assert game.sampling is not None  # participants that ask no model have no chat
        import_client()
        self.sampling: LLMSettings = game.sampling
        self.requests = self.retries = self.prompt_tokens = self.completion_tokens = 0
        self._game = game
        self._fresh: dict[tuple[str, Prompt, int | None, float | None], Waiting] = {}
        self._tokens_left: float | None = None  # None is no limit
        self._reserved = 0.0

    async def ask(self, model: str, prompt: Prompt, read: Callable[[str], V]) -> V:
        """One participant's number, as `read` makes it of the text; UnusableAnswer of `read` asks again.

        Args:
            model: The model's name, such as `model_1`.
            prompt: What is asked; who asks the same at the same time shares requests, each with a sample of its own.
            read: Called with the text.

        Raises:
            UnusableAnswer: After `max_attempts`, with the last cause and text; or the model does not answer.
        """
        deadline: float | None = None
        for _ in range(self.sampling.max_attempts):
            (text, cause), deadline = await self._sample(model, prompt, None, deadline)
            if cause is not None:
                unusable: UnusableAnswer = KnownCause(cause, text)
                continue
            assert text is not None
            try:
                return read(text)
            except UnusableAnswer as error:  # of whatever class: whose words it has stays known
                unusable = error
                unusable.text = text
        raise unusable

    async def talk(self, model: str, prompt: Prompt, tokens: int) -> tuple[str, bool]:
        """What one participant says freely, in up to so many tokens, and whether that is all it had to say.

        Raises UnusableAnswer as `ask` does.
        """
        deadline: float | None = None
        for _ in range(self.sampling.max_attempts):
            (text, cause), deadline = await self._sample(model, prompt, tokens, deadline)
            if text is not None and cause in (None, CUT_OFF["length"]):
                return text, cause is None
        raise KnownCause(cause or "", text)

    def allow(self, tokens: float | None) -> None:
        """What may be spent from now on, in tokens; None is no limit."""
        self._tokens_left = tokens

    def usage(self) -> Usage:
        """What was spent so far, but for time."""
        return Usage(self.requests, self.retries, self.prompt_tokens, self.completion_tokens)

    def close(self) -> None:
        """Take everything back that was asked: nobody waits for it."""
        if _thread is not None:
            _thread.loop.call_soon_threadsafe(_thread.drop, self)

    # --- What the model's client calls, on its thread ----------------------------------------------------------------

    @property
    def has_reservations(self) -> bool:
        return self._reserved > 0

    def reserve(self, ask: SampleRequest, wanted: int) -> int:
        """Set tokens aside for up to `wanted` samples, and return for how many there are some."""
        count = wanted
        if self._tokens_left is not None:
            left = self._tokens_left - self._reserved - ask.prompt.tokens
            count = max(min(wanted, int(left // _most_tokens(ask))), 0)
        if count:
            ask.reserved = self._price(ask, count)
            self._reserved += ask.reserved
            self.requests += 1
            self.retries += ask.deadline is not None
        return count

    def commit(self, ask: SampleRequest, tokens: Tokens | None, answered: bool) -> None:
        """Count what a request did cost; one that was answered by a server that tells no tokens, what was set aside."""
        price, ask.reserved = ask.reserved, 0.0
        self._reserved -= price
        if tokens is not None:
            self.prompt_tokens += tokens.prompt
            self.completion_tokens += tokens.completion
            price = tokens.prompt + tokens.completion
        if self._tokens_left is not None and (tokens is not None or answered):
            self._tokens_left -= price

    # --- Inside ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _price(ask: SampleRequest, count: int) -> float:
        """The most that a request may cost, the prompt's length being an estimate."""
        return ask.prompt.tokens + count * _most_tokens(ask)

    def _sample(
        self, model: str, prompt: Prompt, free_tokens: int | None, deadline: float | None
    ) -> asyncio.Future[Sampled]:
        """What will come of one request's share; no coroutine of its own, as everybody waits for one at a time.

        `free_tokens` is how long a free text may be; None where the model is to be held to a number in range.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sampled] = loop.create_future()
        if not self._fresh:
            loop.call_soon(self._flush, loop)
        self._fresh.setdefault((model, prompt, free_tokens, deadline), []).append(future)
        return future

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand over what was asked in this pass of the event loop."""
        fresh, self._fresh = self._fresh, {}
        asks: list[tuple[ModelConfig, SampleRequest]] = []

        def deliver(waiting: Waiting, outcomes: list[Outcome], deadline: float) -> None:
            _in_loop(loop, _set_results, waiting, outcomes, deadline)

        def fail(waiting: Waiting, cause: str, ended: Ended) -> None:
            _in_loop(loop, _set_failures, waiting, cause, ended)

        for (model, prompt, free_tokens, deadline), waiting in fresh.items():
            waiting.reverse()
            try:
                config = config_of(model)
            except KnownCause as error:
                _set_failures(waiting, str(error))
                continue
            fields = _fields(self._game, config, free_tokens)
            asks.append((config, SampleRequest(self, config, prompt, fields, waiting, deliver, fail, deadline)))
        if asks:
            thread = _model_thread()
            thread.loop.call_soon_threadsafe(thread.put, asks)


def load_models(config: SimulationConfig) -> dict[str, ModelConfig]:
    """Make the models known to AgentScope in this process; returns them. Raises SettingsError."""
    models = read_models(config)
    ModelManager.get_instance().load_model_configs([each.entry for each in models.values()], clear_existing=True)
    return models


def config_of(model: str) -> ModelConfig:
    """What AgentScope in this process knows of a model; raises KnownCause if it knows none of this name."""
    entry = ModelManager.get_instance().get_config_by_name(model)
    if entry is None:
        raise KnownCause(f"this agent server knows no model {model}")
    return ModelConfig(model, entry["model_name"], entry["client_args"]["base_url"].rstrip("/"), entry)


def import_client() -> None:
    """Import what asks models, openai among it, unless that was done: before anything with a deadline waits for it."""
    import simulation.llm.http_client  # noqa: F401, PLC0415 - for those alone that ask a model


def check_models(names: list[str], timeout_s: float) -> dict[str, str]:
    """Ask the servers of these models whether they answer; returns what is wrong, by name, of those that do not."""
    import_client()
    thread = _model_thread()
    checks = {name: thread.run(thread.check(config_of(name), timeout_s)) for name in names}
    troubles = {name: check.result() for name, check in checks.items()}
    return {name: trouble for name, trouble in troubles.items() if trouble is not None}


def _fields(game: Game, config: ModelConfig, free_tokens: int | None) -> dict[str, Any]:
    """What a request says besides model, messages and n."""
    assert game.sampling is not None
    kind = game.sampling.structured_output if free_tokens is None else "none"
    fields = config.generate_args
    if free_tokens is not None:  # a limit in the settings is meant for numbers
        fields.pop("max_completion_tokens", None)
        fields["max_tokens"] = free_tokens
    elif not fields.keys() & {"max_tokens", "max_completion_tokens"}:
        fields["max_tokens"] = answer_tokens(kind, game)
    return fields | structured_fields(kind, game)


def _most_tokens(ask: SampleRequest) -> int:
    """The most tokens that one sample may have."""
    return int(ask.fields.get("max_completion_tokens") or ask.fields["max_tokens"])


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the group is gone, and nobody waits
        loop.call_soon_threadsafe(call, *arguments)


def _set_results(waiting: Waiting, outcomes: list[Outcome], deadline: float) -> None:
    for future, outcome in zip(waiting, outcomes, strict=True):
        if not future.done():
            future.set_result((outcome, deadline))


def _set_failures(waiting: Waiting, cause: str, ended: Ended = Ended.COMPLETE) -> None:
    for future in waiting:
        if not future.done():
            future.set_exception(KnownCause(cause, ended=ended))


class _ModelThread:
    """The thread of this process that all model clients live on."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._clients: dict[tuple[str, str], ModelClient] = {}
        threading.Thread(target=self._serve, name="models", daemon=True).start()

    def put(self, asks: list[tuple[ModelConfig, SampleRequest]]) -> None:
        for config, ask in asks:
            try:
                self._client(config).put([ask])
            except Exception as error:  # noqa: BLE001 - whatever a setting of the client brings: they must hear of it
                ask.give_up(one_line(error))

    def drop(self, chat: Chat) -> None:
        for client in self._clients.values():
            client.drop(chat)

    async def check(self, config: ModelConfig, timeout_s: float) -> str | None:
        try:
            client = self._client(config)
        except Exception as error:  # noqa: BLE001 - told to whoever asks
            return f"cannot be asked with these settings: {one_line(error)}"
        return await client.check(config, timeout_s)

    def run(self, work: Coroutine[Any, Any, V]) -> Any:
        """Do something there; returns a future of another thread's kind."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def _client(self, config: ModelConfig) -> ModelClient:
        key = (config.base_url, str([config.entry.get(name) for name in ("client_args", "api_key", "organization")]))
        if key not in self._clients:
            self._clients[key] = ModelClient(config)
        return self._clients[key]

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()


_thread: _ModelThread | None = None
_thread_lock = threading.Lock()


def _model_thread() -> _ModelThread:
    global _thread  # noqa: PLW0603 - one per process, made when it is needed: a server is forked before
    with _thread_lock:
        if _thread is None:
            _thread = _ModelThread()
        return _thread
