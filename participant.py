"""The participants: what people edit, or copy from, first. `RandomParticipant` and `LLMParticipant` are the ready ones.

A participant of your own is a subclass of `Participant` that defines one of

    async def answer(self, question: Question) -> float | str
    def reply(self, x: Msg) -> Msg

The first answers many participants at once on one event loop, so it must not block, and thinks with `await
self.think(seconds)`; the second is AgentScope's ordinary method, which may block and runs in a bounded pool of threads.
`answer` wins where both are defined.
"""

from __future__ import annotations

import contextlib

from simulation.agents.participant import Participant
from simulation.errors import UnusableAnswer
from simulation.game.rules import Game, Question, draw, to_units
from simulation.llm.chat import Chat
from simulation.llm.model_configs import model_of
from simulation.llm.prompts import Numbers, Prompt, instruction, prompt_for, rules

TALK_TOKENS = 512  # of what a participant says when a person asks it something


class RandomParticipant(Participant):
    """Thinks for the game's think time, then gives the number that seed, round and index stand for."""

    async def answer(self, question: Question) -> float:
        game = self.game
        if game.sleep_time_s > 0:
            await self.think(game.sleep_time_s)
        return draw(game, question.round, self.index) / game.scale


class LLMParticipant(Participant):
    """Asks its model for the number, and remembers its own numbers; what was announced, the question carries.

    Everybody with the same memory has the same prompt, and shares requests with the others of its group.
    """

    def __init__(self, index: int, game: Game) -> None:
        super().__init__(index, game)
        self.numbers: Numbers = ()  # in rounds 1, 2, ...; None where it gave none
        self.thoughts = ""  # what it thought aloud before the last of them, where the prompt has it do so

    def recall(self, numbers: Numbers) -> None:
        self.numbers = numbers

    def system(self) -> str:
        """The system prompt; override it for a character of your own."""
        return rules(self.game, self._played(), self._team())

    def prompt(self, question: Question) -> Prompt:
        """What is asked of the model in a round; or, in round 0, when a person asks it about what it did."""
        if question.round == 0:
            missing = len(question.announcements) - len(self.numbers)  # it gave none in the last ones
            numbers, thoughts = (*self.numbers, *[None] * missing), "" if missing > 0 else self.thoughts
            return prompt_for(self.system(), question, numbers, thoughts=thoughts)
        return prompt_for(self.system(), question, self.numbers, instruction(self.game, self._played(), self._team()))

    async def answer(self, question: Question) -> float | str:
        """The model's number; to a message that is no question of a round, the model's words."""
        chat = self._home.chat if self._home and self._home.chat else Chat(self.game)
        model = self._model(chat)
        if question.round == 0:
            text, whole = await chat.talk(model, self.prompt(question), TALK_TOKENS)
            return text if whole else f"{text} [cut off after {TALK_TOKENS} tokens]"
        before = question.round - 1
        known = self.numbers[:before]
        self.numbers = known = known + (None,) * (before - len(known))
        prompt = self.prompt(question)
        if self.game.wording is not None and self.game.wording.reasoning_tokens is not None:
            units, thoughts = await self._think_aloud(chat, model, prompt, self.game.wording.reasoning_tokens)
        else:
            units, thoughts = await chat.ask(model, prompt, self._units), ""
        number = units / self.game.scale
        self.numbers, self.thoughts = (*known, number), thoughts  # one for each round, also where it is asked twice
        return number

    async def _think_aloud(self, chat: Chat, model: str, prompt: Prompt, tokens: int) -> tuple[int, str]:
        """Reason freely, and give the number at the end; where it is not certain, in a second answer."""
        thoughts, whole = await chat.talk(model, prompt, tokens)
        if whole:  # else the last line may be half a thought
            with contextlib.suppress(UnusableAnswer):
                return self._units(thoughts), thoughts
        extracting = prompt._replace(thoughts=thoughts, thought_tokens=tokens)
        return await chat.ask(model, extracting, self._units), thoughts

    def _team(self) -> str | None:
        """The team that it plays in, if any do."""
        cast, teams = self.game.cast, self.game.teams
        return None if cast is None or teams is None else cast.part_of(teams, self.index)

    def _model(self, chat: Chat) -> str:
        """The name of the model that it asks."""
        mixed = self.game.cast.model_of(self.index) if self.game.cast is not None else None
        return mixed or model_of(self.index, chat.sampling.models)

    def _units(self, text: str) -> int:
        return to_units(text, self.game)
