"""What a model server's reply means, and how long to wait after a bad one; pure.

A reply that is no set of answers becomes a `RequestError`, which says whether asking again may help.
"""

from __future__ import annotations

import email.utils
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simulation.errors import printable, shortened
from simulation.llm.usage import MODEL_SERVER

BUSY = (429, 503)  # the server asks everyone to wait
REFUSED_REQUEST = (400, 422)  # something in the request itself
DENIED = (401, 403)  # whatever the request says
PASSING = (408, 409, 425)  # and every 5xx but 501, "not implemented"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CUT_OFF = {"length": "answer cut off by the token limit", "content_filter": "answer withheld by a content filter"}
NO_TEXT = "no text in the answer"
WORDS_SHOWN = 120
MOST_TOKENS = 10**12  # of one request; more is no count


@dataclass(frozen=True)
class Tokens:
    """What a request cost, as the server counts it."""

    prompt: int
    completion: int


class RequestError(Exception):
    """A request that brought no answers; the message is the cause of the failures that may come of it.

    Attributes:
        again: Whether the same request may succeed later.
        endpoint: Whether the server is in trouble as a whole, so that others had better wait too.
        garbled: Whether the server did answer, but nothing that can be read.
        refused: Whether the server refused what the request says.
        perhaps_n: Whether the server may have no trouble but with n, the number of answers in one request.
        retry_after_s: How long the server asked us to wait.
        tokens: What it cost all the same, if the server says so.
    """

    def __init__(
        self,
        cause: str,
        *,
        again: bool = True,
        endpoint: bool = False,
        malformed: bool = False,
        refused: bool = False,
        maybe_unsupported_n: bool = True,
        retry_after_s: float = 0.0,
        tokens: Tokens | None = None,
    ) -> None:
        super().__init__(cause)
        self.again = again
        self.endpoint = endpoint
        self.malformed = malformed
        self.refused = refused
        self.maybe_unsupported_n = maybe_unsupported_n
        self.retry_after_s = retry_after_s
        self.tokens = tokens


@dataclass(frozen=True)
class Reply:
    """The answers of one request: texts, and where there is none, why; and the tokens, None if the server keeps mum."""

    texts: tuple[tuple[str | None, str | None], ...]
    tokens: Tokens | None


def read_reply(status: int, headers: Mapping[str, str], body: bytes, now: float) -> Reply:
    """Read a reply of the chat completions API; `now` is the time in seconds since the epoch. Raises Trouble."""
    if status != 200:
        raise _refusal(status, headers, body, now)
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):  # nested too deep
        raise RequestError(f"{MODEL_SERVER}: the reply is not JSON", malformed=True) from None
    choices = reply.get("choices") if isinstance(reply, dict) else None
    tokens = _tokens_of(reply)
    if not isinstance(choices, list) or not choices:
        raise RequestError(f"{MODEL_SERVER}: no choices in the reply", malformed=True, tokens=tokens)
    return Reply(tuple(map(_text_of, choices)), tokens)


def _text_of(choice: Any) -> tuple[str | None, str | None]:
    """The text of a choice, and why it cannot be used, if it cannot."""
    message = choice.get("message") if isinstance(choice, dict) else None
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        return None, NO_TEXT
    reason = choice.get("finish_reason")
    return text, CUT_OFF.get(reason) if isinstance(reason, str) else None


def _tokens_of(reply: Any) -> Tokens | None:
    usage = reply.get("usage") if isinstance(reply, dict) else None
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if type(count) is int and 0 <= count <= MOST_TOKENS else None for count in counts)
    return None if prompt is None or completion is None else Tokens(prompt, completion)


def _refusal(status: int, headers: Mapping[str, str], body: bytes, now: float) -> RequestError:
    cause = f"{MODEL_SERVER}: HTTP {status}"
    if status in BUSY:
        return RequestError(
            cause, endpoint=True, maybe_unsupported_n=False, retry_after_s=retry_after(headers.get("retry-after"), now)
        )
    if (status >= 500 and status != 501) or status in PASSING:
        return RequestError(cause, retry_after_s=retry_after(headers.get("retry-after"), now))
    words = _words_of(body)
    said = f"{cause}: {words}" if words else cause
    return RequestError(said, again=False, refused=status in REFUSED_REQUEST, maybe_unsupported_n=status not in DENIED)


def _words_of(body: bytes) -> str:
    """The server's own words about an error, in one line."""
    try:
        reply = json.loads(body)
        error = reply.get("error", reply)
        words = error.get("message") if isinstance(error, dict) else error
        return in_one_line(words, WORDS_SHOWN) if words else ""
    except (ValueError, AttributeError, RecursionError):
        return ""


def in_one_line(words: Any, limit: int) -> str:
    """What a stranger says, fit to be printed: one line of at most `limit` characters that steers no terminal."""
    return shortened(printable(str(words)[: 10 * limit]), limit)


def retry_after(value: str | None, now: float) -> float:
    """The seconds that a Retry-After header asks for: a number, or a date (RFC 9110, 10.2.3); 0 if it says neither."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
        return min(seconds, 1e9) if seconds > 0 else 0.0
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - now, 0.0)
    except (ValueError, OverflowError):
        return 0.0


def pause_s(troubles: int, retry_after_s: float, chance: float) -> float:
    """Seconds to wait after so many troubles in a row: doubling, with jitter (`chance` is 0 to 1), or as asked."""
    grown = min(FIRST_PAUSE_S * 2 ** min(troubles - 1, 16), LONGEST_PAUSE_S)
    return max(retry_after_s, grown * (0.5 + chance / 2))
