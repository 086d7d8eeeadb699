"""What LLM participants are told, and how their answers are held to numbers; pure.

A prompt names no participant: those who remember the same are asked the same, in one request. What all have in common
comes first, so that a model server that caches the beginnings of prompts reads it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

from simulation.game.population import Persona
from simulation.game.rules import Announcement, Game, Question

Numbers = tuple[float | None, ...]  # one participant's answers in rounds 1, 2, ...; None where it gave none

CHARACTERS_PER_TOKEN = 4  # of English, in the usual tokenizers: for estimates only
TEMPLATE_TOKENS = 12  # what a chat template adds, about
FREE_TEXT_TOKENS = 256  # of an answer that nothing holds to a number
JSON_TOKENS = 48  # of {"number": "..."} with the white space that some models like
SPARE_TOKENS = 4
AVERAGE_DIGITS = 3  # after the point, more than answers have
EXTRACT = "So which number is it? Answer with the number alone."


class Prompt(NamedTuple):
    """The messages of a request; after thinking aloud it holds the thoughts, and asks for the number alone.

    Attributes:
        system: Who is asked, and the rules.
        user: The question.
        thoughts: What was thought aloud.
        thought_tokens: How long that may be at most.
    """

    system: str
    user: str
    thoughts: str | None = None
    thought_tokens: int = 0

    @property
    def tokens(self) -> int:
        """An estimate of its length."""
        ours = len(self.system) + len(self.user) + (0 if self.thoughts is None else len(EXTRACT))
        thoughts = 0 if self.thoughts is None else min(len(self.thoughts), self.thought_tokens)  # in any language
        return ours // CHARACTERS_PER_TOKEN + thoughts + TEMPLATE_TOKENS

    @property
    def messages(self) -> list[dict[str, str]]:
        """As the chat completions API takes them."""
        said = [("system", self.system), ("user", self.user)]
        if self.thoughts is not None:
            said += [("assistant", self.thoughts), ("user", EXTRACT)]
        return [{"role": role, "content": content} for role, content in said]


def rules(game: Game, personas: Sequence[Persona] = (), team: str | None = None) -> str:
    """The system prompt of those who are these personas, and in this team.

    A persona that has no place in it comes first, a team last.
    """
    assert game.wording is not None  # as in every game in which participants ask models
    text = game.wording.system
    if "{persona}" not in text and any(persona.text for persona in personas):
        text = f"{{persona}} {text}"
    if "{team}" not in text and team is not None:
        text = f"{text}\nYour team is {{team}}."
    return _filled(text, game, personas, team)


def instruction(game: Game, personas: Sequence[Persona] = (), team: str | None = None) -> str:
    """How to answer in a round."""
    assert game.wording is not None
    return _filled(game.wording.instruction, game, personas, team)


def _filled(text: str, game: Game, personas: Sequence[Persona], team: str | None) -> str:
    persona = " ".join(each.text for each in personas if each.text)
    return _filled_with(text, game.decimals, game.max_value, game.target, persona, team or "")


@lru_cache(maxsize=4096)
def _filled_with(text: str, decimals: int, max_value: int, target: str, persona: str, team: str) -> str:
    """A text of the prompts file with its braces filled."""
    number = "a whole number" if decimals == 0 else f"a number with up to {decimals} digits after the point"
    return text.format(number=number, max_value=max_value, target=target, persona=persona, team=team).strip()


@lru_cache(maxsize=16_384)
def prompt_for(system: str, question: Question, numbers: Numbers, last: str = "", thoughts: str = "") -> Prompt:
    """The prompt of a round for those who gave these numbers in the rounds before it.

    Args:
        system: Who they are, and the rules.
        question: What they are asked, and what was announced before.
        numbers: Their own.
        last: What is said after the question: how to answer.
        thoughts: What they thought aloud last time, if they are to remember it.
    """
    heard = [_heard(told, question.decimals) for told in question.announcements]
    own = [f"Your numbers so far: {', '.join(_shown(each, question.decimals) for each in numbers)}."] if numbers else []
    own += [f"What you thought before the last of them: {thoughts}"] if thoughts else []
    return Prompt(system, "\n".join([*heard, *own, f"{question.text} {last}".rstrip()]))


def _heard(told: Announcement, decimals: int) -> str:
    """What was announced after a round."""
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
    """A number with up to so many digits after the point."""
    if number is None:
        return "none"
    text = f"{Decimal(repr(round(number, digits))):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def number_pattern(max_value: int, decimals: int) -> str:
    """A regular expression for the numbers 0..max_value with up to `decimals` digits after the point, and no others."""
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
    """What holds the model to a number in range, as fields of the request's body; `kind` is the setting's value."""
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
    """The most tokens that an answer needs, at one a character, where `kind` holds it to a number."""
    number = len(str(game.max_value)) + (game.decimals + 1 if game.decimals else 0)
    extra = {"structured_outputs": SPARE_TOKENS, "response_format": JSON_TOKENS}
    return number + extra[kind] if kind in extra else FREE_TEXT_TOKENS
