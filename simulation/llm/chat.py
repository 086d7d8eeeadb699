"""Access to chat models for LLM participants: equal prompts share one request, and its cost counts once.

A group has one `Chat`. Equal prompts for the same model in one pass of the event loop become one `SampleRequest`.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from agentscope.manager import ModelManager

from simulation.errors import KnownCause, UnusableAnswer
from simulation.game.rules import Game
from simulation.llm.model_configs import ModelConfig, read_models
from simulation.llm.prompts import Prompt, answer_tokens, structured_fields
from simulation.llm.request_queue import Sample, SampleRequest, model_thread
from simulation.llm.responses import CUT_OFF, Tokens
from simulation.llm.usage import Usage
from simulation.settings import SimulationConfig

V = TypeVar("V")
_models: dict[str, ModelConfig] = {}  # of this process, by name


class Chat:
    """The model access of one group, whose participants all run on one event loop."""

    def __init__(self, game: Game) -> None:
        assert game.sampling is not None  # groups without LLM participants have no Chat
        import_client()
        self.sampling = game.sampling
        self.closed = False
        self.n_unsupported: set[str] = set()  # addresses of servers that do not support n
        self.tasks: set[asyncio.Task[None]] = set()  # of the requests in flight, on the model thread
        self._game = game
        self._fresh: dict[tuple[ModelConfig, Prompt, int | None, float], deque[asyncio.Future[Sample]]] = {}
        self._requests = self._retries = self._prompt_tokens = self._completion_tokens = 0
        self._tokens_left = math.inf
        self._reserved = 0.0

    async def ask(self, model: str, prompt: Prompt, read: Callable[[str], V]) -> V:
        """Return one participant's own answer as parsed by `read`; ask again if `read` raises UnusableAnswer.

        Raises UnusableAnswer if `max_attempts` failed (with the last cause and text), or the model does not answer.
        """
        deadline = math.inf
        for _ in range(self.sampling.max_attempts):
            text, cause, deadline = await self._sample(model, prompt, None, deadline)
            if text is None or cause is not None:
                unusable: UnusableAnswer = KnownCause(cause or "", text)
                continue
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
        deadline = math.inf
        for _ in range(self.sampling.max_attempts):
            text, cause, deadline = await self._sample(model, prompt, tokens, deadline)
            if text is not None and cause in (None, CUT_OFF["length"]):
                return text, cause is None
        raise KnownCause(cause or "", text)

    def allow(self, tokens: float | None) -> None:
        """Set the token budget from now on (None: no limit)."""
        self._tokens_left = math.inf if tokens is None else tokens

    def usage(self) -> Usage:
        """Return the usage so far, without times."""
        return Usage(self._requests, self._retries, self._prompt_tokens, self._completion_tokens)

    def close(self) -> None:
        """Drop all requests; their participants stay without an answer."""
        self.closed = True
        model_thread().loop.call_soon_threadsafe(lambda: [task.cancel() for task in self.tasks])

    # --- What the model's client calls, on its thread ----------------------------------------------------------------

    def affordable(self, request: SampleRequest, wanted: int) -> int:
        """Return for how many of `wanted` samples the tokens left suffice."""
        left = self._tokens_left - self._reserved - request.prompt.tokens
        return int(max(min(wanted, left / request.tokens_each), 0))

    def reserve(self, request: SampleRequest, count: int) -> None:
        """Count a request and reserve the most tokens that it may cost; the prompt's length is an estimate."""
        request.reserved = request.prompt.tokens + count * request.tokens_each
        self._reserved += request.reserved
        self._requests += 1
        self._retries += request.deadline < math.inf

    def commit(self, request: SampleRequest, tokens: Tokens | None = None, answered: bool = False) -> None:
        """Replace a reservation by the actual cost; charge it in full if a server answers without token counts."""
        cost, request.reserved = request.reserved, 0.0
        self._reserved -= cost
        if tokens is not None:
            self._prompt_tokens += tokens.prompt
            self._completion_tokens += tokens.completion
            cost = sum(tokens)
        if tokens is not None or answered:
            self._tokens_left -= cost

    def _sample(self, model: str, prompt: Prompt, free_tokens: int | None, deadline: float) -> asyncio.Future[Sample]:
        """Return a future for one sample; `free_tokens` limits a free text (None: a number in range)."""
        config = _models.get(model)
        if config is None:
            raise KnownCause(f"this agent server knows no model {model}")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sample] = loop.create_future()
        if not self._fresh:
            loop.call_soon(self._flush)
        self._fresh.setdefault((config, prompt, free_tokens, deadline), deque()).append(future)
        return future

    def _flush(self) -> None:
        """Pass the requests of this pass of the event loop to the model thread."""
        fresh, self._fresh = self._fresh, {}
        requests = [
            SampleRequest(self, config, prompt, self._fields(config, free_tokens), waiting, deadline)
            for (config, prompt, free_tokens, deadline), waiting in fresh.items()
        ]
        thread = model_thread()
        thread.loop.call_soon_threadsafe(thread.put, requests)

    def _fields(self, config: ModelConfig, free_tokens: int | None) -> dict[str, Any]:
        """Return the fields of a request besides model, messages and n."""
        kind = self.sampling.structured_output if free_tokens is None else "none"
        fields = config.generate_args
        if free_tokens is not None:  # a limit in the settings applies to numbers only
            fields.pop("max_completion_tokens", None)
            fields["max_tokens"] = free_tokens
        elif not fields.keys() & {"max_tokens", "max_completion_tokens"}:
            fields["max_tokens"] = answer_tokens(kind, self._game)
        return fields | structured_fields(kind, self._game)


def load_models(config: SimulationConfig) -> dict[str, ModelConfig]:
    """Set the models of this process, also for AgentScope, and return them by name. Raises SettingsError."""
    models = read_models(config)
    ModelManager.get_instance().load_model_configs([each.entry for each in models.values()], clear_existing=True)
    _models.clear()
    _models.update(models)
    return models


def import_client() -> None:
    """Import the model client, and with it openai, early: a call with a deadline must not wait for the import."""
    import simulation.llm.http_client  # noqa: F401, PLC0415 - for those alone that ask a model
