"""Access to chat models for LLM participants. Each group has one `Chat` and one token budget.

Equal prompts that participants send to the same model in one pass of the event loop become one `SampleRequest`.
"""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from agentscope.manager import ModelManager

from simulation.errors import KnownCause, UnusableAnswer
from simulation.game.game import Game
from simulation.game.rules import draw_below
from simulation.llm.model_configs import ModelConfig, read_models
from simulation.llm.prompts import Prompt, RecordedText, answer_tokens, hash_of, structured_fields
from simulation.llm.request_queue import model_thread
from simulation.llm.responses import CUT_OFF, Text
from simulation.llm.sample_request import SampleRequest, TokenBudget, Waiting
from simulation.settings import SimulationConfig

V = TypeVar("V")
NOT_RECORDED = "the recorded run has no usable answer to this prompt (--offline)"
SEEDS = 2**52  # number of seeds from which the first one of a round is drawn
_models: dict[str, ModelConfig] = {}  # the models of this process, by name


class Turn(NamedTuple):
    """The participant and the round that a text is requested for. Round 0 is a question outside the game."""

    participant: int
    round: int


class Chat:
    """The access of one group to its language models. The participants of a group all run on one event loop."""

    def __init__(self, game: Game) -> None:
        assert game.llm is not None  # groups without LLM participants have no Chat
        import simulation.llm.http_client  # noqa: F401, PLC0415 - imports openai now, so that no request waits for it

        self.settings = game.llm
        self.budget = TokenBudget()
        self.closed = self.paused = False  # if paused, no requests are sent
        self.n_unsupported: set[ModelConfig] = set()  # models whose servers reject several answers (n) per request
        self.failing_since: dict[str, float] = {}  # time.monotonic() of the first error since the last answer, by model
        self.outages: dict[str, str] = {}  # messages for the user about models with lasting errors, by model
        self.tasks: set[asyncio.Task[None]] = set()  # one task per request in flight, on the model thread
        self._game = game
        self._recorded: dict[Turn, RecordedText] = {}
        self._fresh: dict[tuple[ModelConfig, Prompt, int | None, float, int | None], deque[Waiting]] = {}

    def record(self, texts: Iterable[RecordedText]) -> None:
        self._recorded |= {Turn(each.participant, each.round): each for each in texts}

    def recorded(self, model: str, prompt: Prompt, read: Callable[[str], V], turn: Turn) -> tuple[V, str | None] | None:
        """Return what `ask` would return, from the recorded run. None: it has no usable answer to this prompt."""
        found = self._recorded.get(turn)
        if found is not None and found.prompt in (None, hash_of(prompt)) and found.model in (None, served_name(model)):
            with contextlib.suppress(UnusableAnswer):
                value = read(found.text)
                self.budget.used.replayed += 1
                return value, found.thoughts
        return None

    async def ask(self, model: str, prompt: Prompt, read: Callable[[str], V], turn: Turn) -> tuple[V, str | None]:
        """Request a number for one participant. Return `read(text)` and the reasoning, if the server returns any apart.

        If the text is unusable or `read` raises UnusableAnswer, request another text, up to `max_attempts` in all.
        Raises UnusableAnswer with the last cause and text if all attempts fail, or if the model server does not answer.
        """
        deadline = math.inf
        for attempt in range(self.settings.max_attempts):
            (text, cause, thoughts), deadline = await self._sample(model, prompt, None, deadline, turn, attempt)
            try:
                if text is None or cause is not None:
                    raise KnownCause(self._explained(cause or "", model, None))
                return read(text), thoughts
            except UnusableAnswer as error:  # raised again unchanged: failure_of checks its class
                unusable = error
                unusable.text, unusable.thoughts = text, thoughts
        raise unusable

    async def talk(self, model: str, prompt: Prompt, tokens: int, turn: Turn) -> tuple[str, bool, str | None]:
        """Return a free text of up to `tokens` tokens, whether it is complete, and the reasoning apart. See `ask`."""
        deadline = math.inf
        for attempt in range(self.settings.max_attempts):
            (text, cause, thoughts), deadline = await self._sample(model, prompt, tokens, deadline, turn, attempt)
            if text is not None and (cause is None or cause.startswith(CUT_OFF["length"])):
                return text, cause is None, thoughts
        raise KnownCause(self._explained(cause or "", model, tokens if turn.round else 0), text)

    def _explained(self, cause: str, model: str, free_tokens: int | None) -> str:
        """Return the cause of a failure. If an answer was cut off, add its token limit and the setting to raise."""
        if not cause.startswith(CUT_OFF["length"]) or free_tokens == 0:
            return cause
        config = _models[model]
        limit = self._fields(config, free_tokens)[config.limit_name]
        setting = "reasoning_tokens of the prompt" if free_tokens else f"{config.limit_name} in generate_args"
        return f"{cause.replace('by the token limit', f'after {limit} tokens')}; raise {setting}"

    def model_in_turn(self, index: int) -> str:
        """Return the name of the participant's model if models are assigned round-robin."""
        return f"model_{index // self._game.population.block % self.settings.model_per_host + 1}"

    def close(self) -> None:
        """Cancel all requests. The participants that wait for them never get an answer."""
        self.closed = True
        model_thread().loop.call_soon_threadsafe(lambda: [task.cancel() for task in self.tasks])

    def _sample(
        self, model: str, prompt: Prompt, free_tokens: int | None, deadline: float, turn: Turn, attempt: int
    ) -> asyncio.Future[tuple[Text, float]]:
        """Request a text of up to `free_tokens` tokens (if None: a number). Raises KnownCause if `model` is unknown."""
        if self.settings.offline:
            raise KnownCause(NOT_RECORDED)
        config = _models.get(model)
        if config is None:
            raise KnownCause(f"this agent server knows no model {model}")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[Text, float]] = loop.create_future()
        if not self._fresh:
            loop.call_soon(self._flush)
        seed = None  # that of participant 0; the number after a reasoning step has another one than the reasoning
        if self._game.seeds_models:
            seed = draw_below(SEEDS, self._game.seed, turn.round, 2 * attempt + (prompt.thoughts is not None))
        key = (config, prompt, free_tokens, deadline, seed)
        self._fresh.setdefault(key, deque()).append(Waiting(turn.participant, future))
        return future

    def _flush(self) -> None:
        fresh, self._fresh = self._fresh, {}
        requests = [
            SampleRequest(self, config, prompt, self._fields(config, free_tokens), waiting, deadline, seed)
            for (config, prompt, free_tokens, deadline, seed), waiting in fresh.items()
        ]
        model_thread().loop.call_soon_threadsafe(model_thread().put, requests)

    def _fields(self, config: ModelConfig, free_tokens: int | None) -> dict[str, Any]:
        if free_tokens is not None:
            return config.fields(free_tokens, None)
        kind = self.settings.structured_output
        return config.fields(answer_tokens(kind, self._game), structured_fields(kind, self._game))


def served_name(model: str) -> str:
    """Return the name that a model of this process has on its server."""
    return _models[model].model


def load_models(config: SimulationConfig) -> dict[str, ModelConfig]:
    """Return the models of the model file. Register them in `_models` and with AgentScope. Raises SettingsError."""
    models = read_models(config, required=False)
    ModelManager.get_instance().load_model_configs([each.entry for each in models.values()], clear_existing=True)
    _models.clear()
    _models.update(models)
    return models
