"""The base class of all participants, and functions that ask one individually."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from agentscope.agents import AgentBase
from agentscope.message import Msg
from agentscope.rpc import async_func

from simulation.agents.scheduler import Sleep, outcome_of
from simulation.errors import Failure, KnownCause, failure_of
from simulation.game.population import Persona
from simulation.game.rules import Announcement, Game, Question, to_units
from simulation.llm.chat import Chat
from simulation.llm.prompts import Numbers

Outcome = dict[str, Any]  # the answer of a participant in `units`, or its `failure`


@dataclass(frozen=True)
class Home:
    """What the participants of a group share: its remote id and event loop, and the client for models, if any."""

    oid: str
    loop: asyncio.AbstractEventLoop
    chat: Chat | None
    lock: threading.Lock = field(default_factory=threading.Lock)  # guards `_last_play` of each


class Participant(AgentBase):
    """One participant: an AgentScope agent that knows its index among all, from 0, and the game, which all share.

    The attributes that AgentBase keeps for each agent (name, hooks, memory, audience: 1.4 KB and 6 us) are created on
    first access, as most of a million participants never need them. A subclass may rely on all of them. A subclass with
    a further base class has to call the `__init__` of that class.
    """

    _home: Home | None = None  # set by the group
    _last_play: tuple[int, Future[Outcome]] | None = None  # when asked individually: round, outcome
    _creation_error = ""  # why the group could not create it

    def __init__(self, index: int, game: Game) -> None:
        self.index = index
        self.game = game

    @cached_property
    def name(self) -> str:  # AgentBase sets it
        return f"P{self.index}"

    @cached_property
    def _oid(self) -> str:
        if self._home is None:
            raise AttributeError(f"{self.name} is in no group, and has no remote id")
        return f"{self._home.oid}/{self.index}"

    @cached_property
    def personas(self) -> dict[str, Persona]:
        """Return this participant's personas by name of the set: `self.personas["education"].name`."""
        sets = self.game.cast.persona_sets if self.game.cast is not None else ()
        return dict(zip((each.name for each in sets), self._played(), strict=True))

    def _played(self) -> tuple[Persona, ...]:
        """Return the personas of this participant, one per set."""
        return self.game.cast.personas_of(self.index) if self.game.cast is not None else ()

    def think(self, seconds: float) -> Awaitable[None]:
        """Pause: `await self.think(1.5)`. asyncio.sleep does the same, but takes 1.3 KB and 25 us more."""
        return Sleep(seconds)

    async def answer(self, question: Question) -> float | str:
        """Return a number from 0 to `question.max_value`, or a text that contains one."""
        raise KnownCause(self._creation_error or f"{type(self).__name__} defines neither answer nor reply")

    def recall(self, numbers: Numbers) -> None:
        """Receive this participant's numbers of rounds 1, 2, ... (None where it gave none) after it was recreated.

        This happens on servers that replace a lost one, and in a resumed run. All other state of the participant is
        lost; the next question carries the announcements.
        """

    def reply(self, x: Msg | list[Msg] | None = None) -> Msg:
        """Answer one message: run `answer` once, on the group's event loop if there is one."""
        value = self._run(self.answer(question_in(x, self.game)))
        metadata = {"answer": value} if isinstance(value, (int, float)) else None
        return Msg(self.name, str(value), "assistant", metadata=metadata)

    @async_func
    def play(self, x: Msg) -> Msg:
        """Answer the question of a round individually, as in the group; the metadata is an Outcome.

        A repeated request, as from a moderator that replaces a lost one, returns the outcome of the first.
        """
        return Msg("participant", "", "assistant", metadata=_outcome_once(self, question_in(x, self.game)))

    def _run(self, answering: Awaitable[Any]) -> Any:
        """Wait in this thread for an answer from the event loop of the group, or from a new one without a group."""
        if self._home is None:
            value = asyncio.run(outcome_of(answering))
        else:
            value = asyncio.run_coroutine_threadsafe(outcome_of(answering), self._home.loop).result()
        if isinstance(value, BaseException):
            raise value
        return value


class _CreatedLate:
    """An attribute that AgentBase's __init__ sets, created on first access together with the others.

    Python uses it only if the instance has no such attribute. A `__getattr__` would do the same, but make every other
    attribute three times as slow to read.
    """

    def __init__(self, attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, participant: Participant | None, cls: type) -> Any:
        if participant is None:
            return self
        for attribute, value in vars(AgentBase(name=participant.name, use_memory=False)).items():
            if isinstance(getattr(cls, attribute, None), _CreatedLate):  # otherwise a subclass defines it
                participant.__dict__.setdefault(attribute, value)
        return participant.__dict__[self._attribute]


for _attribute in vars(AgentBase(name="", use_memory=False)).keys() - {"name", "_oid", "_init_settings"}:
    setattr(Participant, _attribute, _CreatedLate(_attribute))


def _outcome_once(participant: Participant, question: Question) -> Outcome:
    """Return the outcome of a participant in a round, computed once per round; see `play`."""
    home, own = participant._home, Future[Outcome]()
    if home is None or question.round == 0:  # outside the game
        return outcome_in_round(participant, question)
    with home.lock:
        latest, outcome = participant._last_play or (0, own)
        if question.round > latest:
            latest, outcome = participant._last_play = question.round, own
    if question.round < latest:
        return {"failure": Failure(f"round {question.round} is over")}
    if outcome is own:
        own.set_result(outcome_in_round(participant, question))
    return outcome.result()


def outcome_in_round(participant: Participant, question: Question) -> Outcome:
    """Ask one participant, and wait in this thread for its outcome."""
    try:
        if answers_many(type(participant)):
            answer = participant._run(participant.answer(question))
        else:
            answer = answer_in(participant.reply(message_of(question)))
        return {"units": to_units(answer, participant.game)}
    except BaseException as error:  # noqa: BLE001 - a person's own code may raise anything, and fails alone
        return {"failure": failure_of(error)}


def answers_many(cls: type[Participant]) -> bool:
    """Return whether the class defines `answer`, which takes precedence over `reply`."""
    return cls.answer is not Participant.answer


def message_of(question: Question) -> Msg:
    """Return the question as a message for `reply`; the metadata holds all fields of the question."""
    return Msg("Moderator", question.text, "user", metadata=asdict(question))


def question_in(message: Msg | list[Msg] | None, game: Game) -> Question:
    """Return the question in a message; a message without question metadata is a question of round 0."""
    if isinstance(message, list):
        message = message[-1] if message else None
    metadata: Any = message.metadata if message is not None else None
    if isinstance(metadata, dict) and "announcements" in metadata:
        announcements = tuple(Announcement(**each) for each in metadata["announcements"])
        return Question(**{**metadata, "announcements": announcements})
    return Question(0, (message and message.get_text_content()) or "", game.max_value)


def answer_in(message: Any) -> Any:
    """Return the answer in a reply: `answer` in its metadata, or else its text; what is no message is the answer."""
    if not isinstance(message, Msg):
        return message
    if isinstance(message.metadata, dict) and "answer" in message.metadata:
        return message.metadata["answer"]
    return message.get_text_content()
