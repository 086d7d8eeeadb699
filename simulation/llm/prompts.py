"""Prompts of LLM participants, and the constraints that keep their answers numeric; pure functions.

A prompt names no participant, so participants with the same history share a prompt and a request. The common part
comes first, so that a model server with prefix caching processes it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

from simulation.game.population import Persona
from simulation.game.rules import Announcement, Game, Question

Numbers = tuple[float | None, ...]  # one participant's answers in rounds 1, 2, ...; None: no answer

CHARACTERS_PER_TOKEN = 4  # English text, common tokenizers; for estimates only
TEMPLATE_TOKENS = 12  # added by a chat template, approximately
FREE_TEXT_TOKENS = 256  # limit of an unconstrained answer
JSON_TOKENS = 48  # of {"number": "..."} with the white space that some models add
SPARE_TOKENS = 4
AVERAGE_DIGITS = 3  # extra decimal places, beyond those of answers
EXTRACT = "So which number is it? Answer with the number alone."


class Prompt(NamedTuple):
    """The messages of one request; after free-text reasoning, it contains that text and asks for the number alone.

    Attributes:
        system: Persona and rules.
        user: The question.
        thoughts: The reasoning text; None if there is none.
        thought_tokens: Token limit of the reasoning text.
    """

    system: str
    user: str
    thoughts: str | None = None
    thought_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Return the estimated length in tokens."""
        ours = len(self.system) + len(self.user) + (0 if self.thoughts is None else len(EXTRACT))
        thoughts = 0 if self.thoughts is None else min(len(self.thoughts), self.thought_tokens)  # any language
        return ours // CHARACTERS_PER_TOKEN + thoughts + TEMPLATE_TOKENS

    @property
    def messages(self) -> list[dict[str, str]]:
        """Return the messages in the format of the chat completions API."""
        said = [("system", self.system), ("user", self.user)]
        if self.thoughts is not None:
            said += [("assistant", self.thoughts), ("user", EXTRACT)]
        return [{"role": role, "content": content} for role, content in said]


def rules(game: Game, personas: Sequence[Persona] = (), team: str | None = None) -> str:
    """Return the system prompt for these personas and this team.

    If the template has no `{persona}`, the persona comes first; if it has no `{team}`, the team comes last.
    """
    assert game.wording is not None  # set in every game with LLM participants
    text = game.wording.system
    if "{persona}" not in text and any(persona.text for persona in personas):
        text = f"{{persona}} {text}"
    if "{team}" not in text and team is not None:
        text = f"{text}\nYour team is {{team}}."
    return _filled(text, game, personas, team)


def instruction(game: Game, personas: Sequence[Persona] = (), team: str | None = None) -> str:
    """Return the instruction on how to answer in a round."""
    assert game.wording is not None
    return _filled(game.wording.instruction, game, personas, team)


def _filled(text: str, game: Game, personas: Sequence[Persona], team: str | None) -> str:
    persona = " ".join(each.text for each in personas if each.text)
    return _filled_with(text, game.decimals, game.max_value, game.target, persona, team or "")


@lru_cache(maxsize=4096)
def _filled_with(text: str, decimals: int, max_value: int, target: str, persona: str, team: str) -> str:
    """Return a template of the prompts file with its placeholders filled in."""
    number = "a whole number" if decimals == 0 else f"a number with up to {decimals} digits after the point"
    return text.format(number=number, max_value=max_value, target=target, persona=persona, team=team).strip()


@lru_cache(maxsize=16_384)
def prompt_for(system: str, question: Question, numbers: Numbers, last: str = "", thoughts: str = "") -> Prompt:
    """Return the prompt of a round for participants with these previous answers.

    Args:
        system: The system prompt: persona and rules.
        question: The question, with previous announcements.
        numbers: The participant's previous answers.
        last: Text after the question: how to answer.
        thoughts: The last reasoning text, if the prompt should repeat it.
    """
    heard = [_heard(told, question.decimals) for told in question.announcements]
    own = [f"Your numbers so far: {', '.join(_shown(each, question.decimals) for each in numbers)}."] if numbers else []
    own += [f"What you thought before the last of them: {thoughts}"] if thoughts else []
    return Prompt(system, "\n".join([*heard, *own, f"{question.text} {last}".rstrip()]))


def _heard(told: Announcement, decimals: int) -> str:
    """Return the text of the announcement after a round."""
    if told.average is None or told.winning_number is None:
        return f"Round {told.round}: nobody answered."
    digits = decimals + AVERAGE_DIGITS
    said = f"Round {told.round}: the average was {_shown(told.average, digits)}"
    if told.winning_number != told.average:
        said += f", so the number to be closest to was {_shown(told.winning_number, digits)}"
    if told.winners is None:
        return f"{said}."
    won = " or ".join(f"{units / 10**decimals:.{decimals}f}" for units in told.winning_units)
    teams = ", ".join(f"{name} {_shown(average, digits)}" for name, average in told.teams)
    closest = " and ".join(told.closest_teams)
    more = f" The averages of the teams were: {teams}. The closest was that of {closest}." if teams else ""
    return f"{said}; {told.winners} won with {won}.{more}"


def _shown(number: float | None, digits: int) -> str:
    """Return a number with up to `digits` decimal places; "none" for None."""
    if number is None:
        return "none"
    text = f"{Decimal(repr(round(number, digits))):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def number_pattern(max_value: int, decimals: int) -> str:
    """Return a regular expression for exactly the numbers 0..max_value with up to `decimals` decimal places."""
    digits = str(max_value)
    below = [] if max_value == 0 else ["0"] if max_value <= 9 else ["[0-9]"]
    below += [f"[1-9][0-9]{{{length - 1}}}" for length in range(2, len(digits))]
    for place, digit in enumerate(map(int, digits)):
        lowest = 1 if place == 0 else 0
        if len(digits) == 1:
            below += [f"[1-{digit - 1}]"] if digit > 1 else []
        elif digit > lowest:
            rest = len(digits) - place - 1
            below.append(f"{digits[:place]}[{lowest}-{digit - 1}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    if decimals == 0:
        return f"({'|'.join([*below, digits])})"
    return f"(({'|'.join(below)})(\\.[0-9]{{1,{decimals}}})?|{digits}(\\.0{{1,{decimals}}})?)"


def structured_fields(kind: str, game: Game) -> dict[str, Any]:
    """Return the request fields that constrain a model to a number in range; `kind` is --structured-output."""
    pattern = number_pattern(game.max_value, game.decimals)
    if kind == "structured_outputs":
        return {"structured_outputs": {"regex": pattern}}
    if kind == "response_format":
        schema = {
            "type": "object",
            "properties": {"number": {"type": "string", "pattern": f"^{pattern}$"}},
            "required": ["number"],
            "additionalProperties": False,
        }
        return {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": schema},
            }
        }
    return {}


def answer_tokens(kind: str, game: Game) -> int:
    """Return the token limit of an answer: one token per character if `kind` constrains it, else FREE_TEXT_TOKENS."""
    number = len(str(game.max_value)) + (game.decimals + 1 if game.decimals else 0)
    extra = {"structured_outputs": SPARE_TOKENS, "response_format": JSON_TOKENS}
    return number + extra[kind] if kind in extra else FREE_TEXT_TOKENS
