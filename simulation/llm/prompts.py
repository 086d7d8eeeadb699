"""Prompts of LLM participants, and the constraints that force models to answer with numbers; pure functions.

A prompt does not identify a participant, so participants with the same history share a prompt and a request. Text that
many prompts share comes first, so that a model server with prefix caching processes this text once.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from simulation.game.game import Game
from simulation.game.population import Persona
from simulation.game.rules import Question, plain_number, question_for

Numbers = tuple[float | None, ...]  # one participant's answers in rounds 1, 2, ...; None for a round without an answer

# A part of a text that common tokenizers make one token of, or fewer; used for estimates only
PIECE = re.compile(r"[a-zA-Z]{1,5}|\S")
TEMPLATE_TOKENS = 12  # approximate number of tokens that a chat template adds for two messages
FREE_TEXT_TOKENS = 256  # token limit of an unconstrained answer
JSON_TOKENS = 48  # tokens of {"number": "..."} in addition to the number, with white space that some models add
SPARE_TOKENS = 4  # in addition to one token per character of a constrained number
CHECK = "(This request only checks that you answer.)"
HASH_DIGITS = 16
EXTRACT = "So which number is it? Answer with the number alone."


class Prompt(NamedTuple):
    """The messages of one request. After a reasoning step, they contain the reasoning and ask for the number."""

    system: str  # persona and rules
    user: str  # the question
    thoughts: str | None = None  # the reasoning; None without reasoning
    thought_tokens: int = 0  # token limit of the reasoning

    @property
    def tokens(self) -> int:
        """Return the estimated number of tokens of the messages."""
        tokens = token_count(self.system) + token_count(self.user) + TEMPLATE_TOKENS
        if self.thoughts is not None:  # at most one token per character
            tokens += min(len(self.thoughts), self.thought_tokens) + token_count(EXTRACT) + TEMPLATE_TOKENS
        return tokens

    @property
    def messages(self) -> list[dict[str, str]]:
        """Return the messages in the format of the chat completions API."""
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]
        if self.thoughts is not None:
            messages += [{"role": "assistant", "content": self.thoughts}, {"role": "user", "content": EXTRACT}]
        return messages


@lru_cache(maxsize=16_384)
def token_count(text: str) -> int:
    """Return the estimated number of tokens of a text, rather too many than too few."""
    return len(PIECE.findall(text))


class Probe(NamedTuple):
    """A small request like those of a game, which shows before the game whether a model is usable."""

    system: str
    user: str
    tokens: int  # token limit of the answer
    structured: dict[str, Any]  # fields that constrain the answer


def probe_of(game: Game) -> Probe:
    """Return the first question of a game to participant 0, without reasoning."""
    assert game.llm is not None
    kind = game.llm.structured_output
    character = game.population.personas_of(0), game.teams and game.population.label_of(game.teams, 0)
    user = f"{question_for(game, 1, ()).text} {instruction(game, *character)}\n{CHECK}"
    return Probe(rules(game, *character), user, answer_tokens(kind, game), structured_fields(kind, game))


class KeptText(NamedTuple):
    """What a model wrote for one participant in one round."""

    participant: int
    model: str
    prompt: Prompt  # of the first request
    text: str | None  # states the number, or is the last unusable one; None if the model server did not answer
    thoughts: str | None  # the reasoning before the number; None without reasoning


class RecordedText(NamedTuple):
    """A text of a recorded run. `model` and `prompt` are None if the run recorded only answers."""

    round: int
    participant: int
    model: str | None  # the name on its server
    prompt: str | None  # a hash (see `hash_of`)
    text: str
    thoughts: str | None


@lru_cache(maxsize=4096)
def hash_of(prompt: Prompt) -> str:
    """Return a short hash of the messages of a prompt, the same in all runs."""
    return hashlib.sha256(json.dumps(prompt.messages).encode()).hexdigest()[:HASH_DIGITS]


def rules(game: Game, personas: Sequence[Persona] = (), team: str | None = None) -> str:
    """Build the system prompt. Put personas first if its template lacks {persona}, the team last if it lacks {team}."""
    assert game.prompt is not None  # set in every game with LLM participants
    text = game.prompt.system
    if "{persona}" not in text:
        text = f"{{persona}} {text}"
    if "{team}" not in text and team is not None:
        text = f"{text}\nYour team is {{team}}."
    return _filled(text, game, personas, team)


def instruction(game: Game, personas: Sequence[Persona] = (), team: str | None = None) -> str:
    """Return the instruction that states how to answer in a round."""
    assert game.prompt is not None
    return _filled(game.prompt.instruction, game, personas, team)


def _filled(text: str, game: Game, personas: Sequence[Persona], team: str | None) -> str:
    persona = " ".join(each.text for each in personas if each.text)
    rules = game.words.prompt or f"In every round, {game.words.question}"
    target = getattr(game, "target", "")  # a template with {target} is refused in a game without this attribute
    values = {"number": game.number_words, "max_value": int(game.high), "target": target, "rules": rules}
    return _format(text, **values, persona=persona, team=team or "")


@lru_cache(maxsize=4096)
def _format(text: str, **values: Any) -> str:
    return text.format(**values).strip()


@lru_cache(maxsize=16_384)
def prompt_for(system: str, question: Question, numbers: Numbers, last: str = "", thoughts: str = "") -> Prompt:
    """Return the prompt of a question for participants who gave the answers `numbers` in the earlier rounds.

    Append the instruction `last` to the question. Include `thoughts`, their latest reasoning, unless it is empty.
    """
    lines = [each.text for each in question.announcements]
    if numbers:
        lines.append(f"Your numbers so far: {', '.join(plain_number(each, question.decimals) for each in numbers)}.")
    if thoughts:
        lines.append(f"What you thought before the last of them: {thoughts}")
    return Prompt(system, "\n".join([*lines, f"{question.text} {last}".rstrip()]))


def number_pattern(max_value: int, decimals: int) -> str:
    """Return a regular expression that matches only the numbers 0..max_value with up to `decimals` decimal places."""
    digits = str(max_value)
    # Patterns for the whole numbers below max_value. First, those with fewer digits:
    below = ["[0-9]"] if len(digits) > 1 else []
    below += [f"[1-9][0-9]{{{length}}}" for length in range(1, len(digits) - 1)]
    # Then, for each digit of max_value, the numbers with the same digits before it and a lower digit in its place:
    for index, digit in enumerate(digits):
        lowest = "1" if index == 0 and len(digits) > 1 else "0"
        tail = len(digits) - index - 1
        if digit > lowest:
            below.append(f"{digits[:index]}[{lowest}-{int(digit) - 1}]" + (f"[0-9]{{{tail}}}" if tail else ""))
    if decimals == 0:
        return f"({'|'.join([*below, digits])})"
    return f"(({'|'.join(below)})(\\.[0-9]{{1,{decimals}}})?|{digits}(\\.0{{1,{decimals}}})?)"


def structured_fields(kind: str, game: Game) -> dict[str, Any]:
    """Return the request fields that constrain an answer to a number in range. --structured-output sets `kind`."""
    pattern = number_pattern(int(game.high), game.decimals)
    if kind == "structured_outputs":
        return {"structured_outputs": {"regex": pattern}}
    if kind != "response_format":
        return {}
    number = {"type": "string", "pattern": f"^{pattern}$"}
    schema = {"type": "object", "properties": {"number": number}, "required": ["number"], "additionalProperties": False}
    json_schema = {"name": "answer", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


def answer_tokens(kind: str, game: Game) -> int:
    """Return the token limit of an answer: at least one token per character. `kind` is set by --structured-output."""
    number = len(str(game.high)) + (game.decimals + 1 if game.decimals else 0)
    extra = {"structured_outputs": SPARE_TOKENS, "response_format": JSON_TOKENS}
    return number + extra[kind] if kind in extra else FREE_TEXT_TOKENS
