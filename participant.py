"""The built-in participants, `RandomParticipant` and `LLMParticipant`: examples to edit or copy.

To write your own participant, subclass `Participant` and define `async def answer(self, question)`. This method runs
for many participants concurrently on one event loop, so it must not block; use `await self.think(seconds)` to wait. Or
define AgentScope's `def reply(self, x)`. This method may block, and runs in a thread pool of limited size. If a class
defines both methods, the group calls `answer`.
"""

import contextlib

from simulation.agents.participant import Participant
from simulation.errors import UnusableAnswer
from simulation.game.game import Game
from simulation.game.population import Persona
from simulation.game.rules import Question, draw, to_units
from simulation.llm.chat import Chat, Turn
from simulation.llm.prompts import KeptText, Numbers, Prompt, instruction, prompt_for, rules

TALK_TOKENS = 512  # token limit of the answer to a user's question


class RandomParticipant(Participant):
    """A participant that waits for the think time, then returns the number that seed, round and index determine."""

    async def answer(self, question: Question) -> float | str:
        round_number = question.round or self.last_round(question)  # 0: a question outside the game (--role ask)
        if round_number == 0:
            return "no number yet"
        if question.round > 0 and self.game.sleep_time_s > 0:
            await self.think(self.game.sleep_time_s)
        return draw(self.game, round_number, self.index) / self.game.scale


class LLMParticipant(Participant):
    """A participant that asks a model. The prompt contains the participant's earlier numbers and all announcements.

    Participants with the same group, prompt and model share requests.
    """

    def __init__(self, index: int, game: Game) -> None:
        super().__init__(index, game)
        self.numbers: Numbers = ()  # the answers in rounds 1, 2, ...; None for a round without an answer
        self.thoughts = ""  # the reasoning before the last number, if the prompt asks for reasoning

    def recall(self, numbers: Numbers) -> None:
        self.numbers = numbers

    def system(self) -> str:
        """Return the system prompt. A subclass may override this method to define another character."""
        return rules(self.game, *self._character())

    def prompt(self, question: Question) -> Prompt:
        """Return the prompt for `question`. A question that a user asks outside the game (--role ask) has round 0."""
        if question.round > 0:
            return prompt_for(self.system(), question, self.numbers, instruction(self.game, *self._character()))
        missing = len(question.announcements) - len(self.numbers)  # number of rounds after the last recorded one
        numbers, thoughts = (*self.numbers, *[None] * missing), "" if missing > 0 else self.thoughts
        return prompt_for(self.system(), question, numbers, thoughts=thoughts)

    async def answer(self, question: Question) -> float | str:
        """Ask the model and return its number, or its text if a user asks outside the game (round 0)."""
        chat = self._home.chat if self._home and self._home.chat else Chat(self.game)
        model = self.game.population.model_of(self.index) or chat.model_in_turn(self.index)
        turn = Turn(self.index, question.round)
        if question.round == 0:
            reply, whole, _ = await chat.talk(model, self.prompt(question), TALK_TOKENS, turn)
            return reply if whole else f"{reply} [cut off after {TALK_TOKENS} tokens]"
        before = question.round - 1
        known = self.numbers[:before]
        self.numbers = known = known + (None,) * (before - len(known))
        prompt = self.prompt(question)
        tokens = None if self.game.prompt is None else self.game.prompt.reasoning_tokens
        text: str | None = None
        thoughts: str | None = None
        aloud = ""  # the reasoning for which the prompt asks
        try:
            if question.round > 0 and (known_text := chat.recorded(model, prompt, self._read, turn)) is not None:
                (units, text), thoughts = known_text
                aloud = thoughts or ""
            elif tokens is None:
                (units, text), thoughts = await chat.ask(model, prompt, self._read, turn)
            else:
                aloud, whole, before_it = await chat.talk(model, prompt, tokens, turn)
                thoughts = aloud if before_it is None else f"{before_it}\n\n{aloud}"
                stated = self._stated(aloud) if whole else None  # otherwise, the last line may be truncated
                if stated is None:
                    extracting = prompt._replace(thoughts=aloud, thought_tokens=tokens)
                    stated = (await chat.ask(model, extracting, self._read, turn))[0]
                units, text = stated
        except UnusableAnswer as error:
            text, thoughts = error.text, thoughts or error.thoughts
            raise
        finally:
            if self._home is not None:
                self._home.keep_text(question.round, KeptText(self.index, model, prompt, text, thoughts))
        number = units / self.game.scale
        # One number per round, even if the question is repeated
        self.numbers, self.thoughts = (*known, number), aloud
        return number

    def _character(self) -> tuple[tuple[Persona, ...], str | None]:
        """Return the personas and the team of this participant; the team is None in a game without teams."""
        population, teams = self.game.population, self.game.teams
        team = None if teams is None else population.label_of(teams, self.index)
        return population.personas_of(self.index), team

    def _read(self, text: str) -> tuple[int, str]:
        """Return the number that `text` states, in units, and the text. Raises UnusableAnswer."""
        return to_units(text, self.game), text

    def _stated(self, thoughts: str) -> tuple[int, str] | None:
        """Return the same of the reasoning before a number, or None if no number is certain."""
        with contextlib.suppress(UnusableAnswer):
            return self._read(thoughts)
        return None
