"""What LLM participants are told, and how their answers are held to numbers; pure.

A prompt names no participant: those who remember the same are asked the same, in one request. What all have in common
comes first, so that a model server that caches the beginnings of prompts reads it once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from simulation.game import Game, Question

Numbers = tuple[float | None, ...]  # one participant's answers in rounds 1, 2, ...; None where it gave none

CHARACTERS_PER_TOKEN = 4  # of English, in the usual tokenizers: for estimates only
TEMPLATE_TOKENS = 12  # what a chat template adds, about
FREE_TEXT_TOKENS = 256  # of an answer that nothing holds to a number
JSON_TOKENS = 48  # of {"number": "..."} with the white space that some models like
SPARE_TOKENS = 4


class Prompt(NamedTuple):
    """The two messages of a request."""

    system: str
    user: str

    @property
    def tokens(self) -> int:
        """An estimate of its length."""
        return (len(self.system) + len(self.user)) // CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS


def rules(game: Game) -> str:
    """The system prompt: the rules."""
    kind = "a whole number" if game.decimals == 0 else f"a number with up to {game.decimals} digits after the point"
    return (
        f"You play a game with many others. In every round each of you gives {kind} from 0 to {game.max_value}. "
        "The average of all numbers is announced, and whoever is closest to it wins. Answer with your number alone."
    )


@lru_cache(maxsize=16_384)
def prompt_for(system: str, question: Question, numbers: Numbers) -> Prompt:
    """The prompt of a round for those who gave these numbers in the rounds before it."""
    heard = [
        f"Round {told.round}: the average was {_shown(told.average)}."
        if told.average is not None
        else f"Round {told.round}: nobody answered."
        for told in question.announcements
    ]
    own = [f"Your numbers so far: {', '.join(map(_shown, numbers))}."] if numbers else []
    return Prompt(system, "\n".join([*heard, *own, question.text]))


def _shown(number: float | None) -> str:
    return "none" if number is None else f"{number:.10g}"


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
