"""Batched access to chat models for LLM participants: equal prompts share one request, and its cost counts once.

A group has one `Chat`. Equal prompts for the same model in one pass of the event loop become one `SampleRequest`.
There is one client per model server and credentials; all clients of a process run on one thread.
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
Sampled = tuple[Outcome, float]  # a text or a cause, and the deadline for further attempts


class Chat:
    """The model access of one group, whose participants all run on one event loop.

    Args:
        game: The game, with its LLM settings (`sampling`).
    """

    def __init__(self, game: Game) -> None:
        assert game.sampling is not None  # groups without LLM participants have no Chat
        import_client()
        self.sampling: LLMSettings = game.sampling
        self.requests = self.retries = self.prompt_tokens = self.completion_tokens = 0
        self._game = game
        self._fresh: dict[tuple[str, Prompt, int | None, float | None], Waiting] = {}
        self._tokens_left: float | None = None  # None: no limit
        self._reserved = 0.0

    async def ask(self, model: str, prompt: Prompt, read: Callable[[str], V]) -> V:
        """Return one participant's answer as parsed by `read`; ask again if `read` raises UnusableAnswer.

        Args:
            model: The model's name, such as `model_1`.
            prompt: The prompt. Equal prompts at the same time share requests; each participant gets its own sample.
            read: Parses the text.

        Raises:
            UnusableAnswer: `max_attempts` failed (with the last cause and text), or the model does not answer.
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
            except UnusableAnswer as error:  # re-raised as is: failure_of checks its class
                unusable = error
                unusable.text = text
        raise unusable

    async def talk(self, model: str, prompt: Prompt, tokens: int) -> tuple[str, bool]:
        """Return free text of up to `tokens` tokens, and whether it is complete (not cut off by that limit).

        Raises UnusableAnswer as `ask` does.
        """
        deadline: float | None = None
        for _ in range(self.sampling.max_attempts):
            (text, cause), deadline = await self._sample(model, prompt, tokens, deadline)
            if text is not None and cause in (None, CUT_OFF["length"]):
                return text, cause is None
        raise KnownCause(cause or "", text)

    def allow(self, tokens: float | None) -> None:
        """Set the token budget from now on (None: no limit)."""
        self._tokens_left = tokens

    def usage(self) -> Usage:
        """Return the usage so far, without times."""
        return Usage(self.requests, self.retries, self.prompt_tokens, self.completion_tokens)

    def close(self) -> None:
        """Drop all pending requests; their futures stay unresolved."""
        if _thread is not None:
            _thread.loop.call_soon_threadsafe(_thread.drop, self)

    # --- What the model's client calls, on its thread ----------------------------------------------------------------

    @property
    def has_reservations(self) -> bool:
        return self._reserved > 0

    def reserve(self, ask: SampleRequest, wanted: int) -> int:
        """Reserve tokens for up to `wanted` samples; return the number of samples that the budget allows."""
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
        """Replace a reservation by the actual cost; charge it in full if a server answers without token counts."""
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
        """Return the most tokens that a request may cost; the prompt's length is an estimate."""
        return ask.prompt.tokens + count * _most_tokens(ask)

    def _sample(
        self, model: str, prompt: Prompt, free_tokens: int | None, deadline: float | None
    ) -> asyncio.Future[Sampled]:
        """Return a future for one sample. A plain future suffices: a participant awaits one sample at a time.

        `free_tokens` is the token limit of a free text; None constrains the model to a number in range.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sampled] = loop.create_future()
        if not self._fresh:
            loop.call_soon(self._flush, loop)
        self._fresh.setdefault((model, prompt, free_tokens, deadline), []).append(future)
        return future

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        """Pass the requests of this pass of the event loop to the model thread."""
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
    """Register the models with AgentScope in this process and return them by name. Raises SettingsError."""
    models = read_models(config)
    ModelManager.get_instance().load_model_configs([each.entry for each in models.values()], clear_existing=True)
    return models


def config_of(model: str) -> ModelConfig:
    """Return the model registered with AgentScope in this process; raise KnownCause if there is none of this name."""
    entry = ModelManager.get_instance().get_config_by_name(model)
    if entry is None:
        raise KnownCause(f"this agent server knows no model {model}")
    return ModelConfig(model, entry["model_name"], entry["client_args"]["base_url"].rstrip("/"), entry)


def import_client() -> None:
    """Import the model client, and with it openai, early: a call with a deadline must not wait for the import."""
    import simulation.llm.http_client  # noqa: F401, PLC0415 - for those alone that ask a model


def check_models(names: list[str], timeout_s: float) -> dict[str, str]:
    """Check that the servers of these models answer; return the cause by name for those that do not."""
    import_client()
    thread = _model_thread()
    checks = {name: thread.run(thread.check(config_of(name), timeout_s)) for name in names}
    troubles = {name: check.result() for name, check in checks.items()}
    return {name: trouble for name, trouble in troubles.items() if trouble is not None}


def _fields(game: Game, config: ModelConfig, free_tokens: int | None) -> dict[str, Any]:
    """Return the fields of a request besides model, messages and n."""
    assert game.sampling is not None
    kind = game.sampling.structured_output if free_tokens is None else "none"
    fields = config.generate_args
    if free_tokens is not None:  # a limit in the settings applies to numbers only
        fields.pop("max_completion_tokens", None)
        fields["max_tokens"] = free_tokens
    elif not fields.keys() & {"max_tokens", "max_completion_tokens"}:
        fields["max_tokens"] = answer_tokens(kind, game)
    return fields | structured_fields(kind, game)


def _most_tokens(ask: SampleRequest) -> int:
    """Return the token limit of one sample."""
    return int(ask.fields.get("max_completion_tokens") or ask.fields["max_tokens"])


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the group was deleted
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
    """The thread that runs all model clients of this process."""

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
        except Exception as error:  # noqa: BLE001 - returned to the caller
            return f"cannot be asked with these settings: {one_line(error)}"
        return await client.check(config, timeout_s)

    def run(self, work: Coroutine[Any, Any, V]) -> Any:
        """Run a coroutine on this thread; return a concurrent.futures.Future."""
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
