"""The base class of all participants, and functions that ask a single participant."""

import asyncio
from collections.abc import Awaitable
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from agentscope.agents import AgentBase
from agentscope.message import Msg
from agentscope.rpc import async_func

from simulation.agents.scheduler import Sleep, outcome_of
from simulation.errors import KnownCause
from simulation.game.game import Game
from simulation.game.population import Persona
from simulation.game.rules import Announcement, Question, to_units
from simulation.llm.prompts import Numbers

if TYPE_CHECKING:
    from simulation.agents.group import ParticipantGroup


class _Rng:
    """The descriptor of `Participant.rng`. It is no property, so that a class may assign its own `self.rng`."""

    def __get__(self, participant: "Participant | None", cls: type) -> np.random.Generator:
        """Return the generator of the current answer, a Philox with the key (seed, round). The first use creates it.

        The index is the highest of the four 64-bit words of its counter, so no two generators have a block in common.
        """
        if participant is None:
            return self  # type: ignore[return-value]
        if participant._rng is None:
            round_number, home = 0, participant._home
            if home is not None:
                round_number, home.uses_rng = home.current_round, True  # the group deletes generators after each answer
            key, counter = [participant.game.seed, round_number], [0, 0, 0, participant.index]
            philox = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64))
            participant._rng = np.random.Generator(philox)
        return participant._rng


class Participant(AgentBase):
    """One participant: an AgentScope agent with an index, counted from 0, and the game that all participants share.

    AgentBase creates several attributes for each agent (name, hooks, memory, audience), which takes 1.4 KB and 6 us.
    Here, the first access to one creates it, because most of a million participants never need them. If a subclass has
    a further base class, it must call the `__init__` of that class.
    """

    _home: "ParticipantGroup | None" = None  # set by the group
    _creation_error = _creation_traceback = ""  # why the group could not create this participant
    # numpy's random generator for the current answer. It depends on seed, round and index alone. The round is 0 in
    # `__init__`, in `recall`, and for questions outside the game.
    rng = _Rng()
    _rng: np.random.Generator | None = None

    def __init__(self, index: int, game: Game) -> None:
        self.index = index
        self.game = game

    @cached_property
    def name(self) -> str:  # replaces the attribute that AgentBase sets
        return f"P{self.index}"

    @cached_property
    def _oid(self) -> str:
        if self._home is None:
            raise AttributeError(f"{self.name} is in no group, and has no remote id")
        return f"{self._home.oid}/{self.index}"

    @cached_property
    def personas(self) -> dict[str, Persona]:
        """Return this participant's personas, with the set names as keys, as in `self.personas["education"].name`."""
        population = self.game.population
        return dict(zip(population.persona_sets, population.personas_of(self.index), strict=True))

    def think(self, seconds: float) -> Awaitable[None]:
        """Pause for `seconds` when awaited: `await self.think(1.5)`. asyncio.sleep takes 1.3 KB and 25 us more."""
        return Sleep(seconds)

    async def answer(self, question: Question) -> float | str:
        """Return a number from 0 to `question.max_value`, or a text that states one. A subclass overrides this."""
        error = KnownCause(self._creation_error or f"{type(self).__name__} defines neither answer nor reply")
        error.traceback = self._creation_traceback
        raise error

    def last_round(self, question: Question) -> int:
        """Return the last announced round, or the one before if this participant has no answer in that. 0: none."""
        last = len(question.announcements)
        return last - 1 if last and self._home is not None and not self._home.has_answered(self.index, last) else last

    def recall(self, numbers: Numbers) -> None:
        """Called after this participant was recreated, because its server was lost or the run was resumed.

        `numbers` are its answers in rounds 1, 2, ... (None: no answer). All its other data is lost.
        """

    def reply(self, x: Msg | list[Msg] | None = None) -> Msg:
        """Answer one message: run `answer` once, on the group's event loop if the participant is in a group."""
        value = self._run(self.answer(question_in(x, self.game)))
        metadata = {"answer": value} if isinstance(value, (int, float)) else None
        return Msg(self.name, str(value), "assistant", metadata=metadata)

    @async_func
    def answer_round(self, x: Msg, index: int) -> Msg:
        """Answer the question of a round in a call to this participant alone. The group records the answer (`ask_one`).

        `index` is what the group gave to the participant: a subclass may have changed `self.index`.
        """
        assert self._home is not None  # only participants in groups can be called
        self._home.ask_one(index, question_in(x, self._home.game))  # not `self.game`, which a subclass may lack
        return Msg("participant", "", "assistant")

    def _run(self, answering: Awaitable[Any]) -> Any:
        """Block until `answering` ends on the group's event loop (without a group: on a new loop). Return its value."""
        work = outcome_of(answering)
        home = self._home
        value = asyncio.run(work) if home is None else asyncio.run_coroutine_threadsafe(work, home.loop).result()
        if isinstance(value, BaseException):
            raise value
        return value


def _create_late(attribute: str) -> None:
    """Create an attribute of AgentBase when it is first read. A `__getattr__` would triple the time of other reads."""
    late = cached_property(lambda each: vars(AgentBase(name=each.name, use_memory=False))[attribute])
    late.__set_name__(Participant, attribute)
    setattr(Participant, attribute, late)


for _attribute in vars(AgentBase(name="", use_memory=False)).keys() - {"name", "_oid", "_init_settings"}:
    _create_late(_attribute)


def ask_in_thread(participant: Participant, question: Question, game: Game) -> int:
    """Ask one participant, block the calling thread, and return the answer in units. May raise any exception."""
    if answers_many(type(participant)):
        answer = participant._run(participant.answer(question))
    else:
        answer = answer_in(participant.reply(message_of(question)))
    return to_units(answer, game)  # not `participant.game`, which a subclass may lack


def answers_many(cls: type[Participant]) -> bool:
    """Return whether the class overrides `answer`, which then takes precedence over `reply`."""
    return cls.answer is not Participant.answer


def message_of(question: Question) -> Msg:
    """Return the question as a message for `reply`. The metadata contains all fields of the question."""
    return Msg("Moderator", question.text, "user", metadata=asdict(question))


def question_in(message: Msg | list[Msg] | None, game: Game) -> Question:
    """Return the question in a message (in the last of a list). Plain text is a question outside the game (round 0)."""
    if isinstance(message, list):
        message = message[-1] if message else None
    metadata: Any = message.metadata if message is not None else None
    if isinstance(metadata, dict) and "announcements" in metadata:
        announcements = tuple(Announcement(**each) for each in metadata["announcements"])
        return Question(**{**metadata, "announcements": announcements})
    text = (message and message.get_text_content()) or ""
    return Question(0, text, int(game.high), min_value=int(game.low))


def answer_in(message: Any) -> Any:
    """Return the metadata entry `answer` of a Msg or, if missing, its text. Return any other reply unchanged."""
    if not isinstance(message, Msg):
        return message
    if isinstance(message.metadata, dict) and "answer" in message.metadata:
        return message.metadata["answer"]
    return message.get_text_content()
