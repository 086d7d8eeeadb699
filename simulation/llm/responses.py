"""Parsing of model server replies, and the backoff after failed requests; pure functions.

A reply without answers becomes a `RequestError`, which says whether a retry may help.
"""

from __future__ import annotations

import email.utils
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simulation.errors import printable
from simulation.llm.usage import MODEL_SERVER

BUSY = (429, 503)  # the server asks all clients to wait
REFUSED_REQUEST = (400, 422)  # the request itself is invalid
DENIED = (401, 403)  # regardless of the request's content
PASSING = (408, 409, 425)  # temporary, as is every 5xx but 501 (not implemented)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CUT_OFF = {"length": "answer cut off by the token limit", "content_filter": "answer withheld by a content filter"}
NO_TEXT = "no text in the answer"
WORDS_SHOWN = 120
MOST_TOKENS = 10**12  # of one request; a larger value is not a valid count


@dataclass(frozen=True)
class Tokens:
    """The token usage of one request, as counted by the server."""

    prompt: int
    completion: int


class RequestError(Exception):
    """A request without answers; the message is the cause that failed answers are counted by.

    Attributes:
        retryable: Whether the same request may succeed later.
        server_wide: Whether the error concerns the whole server, so that other requests must wait too.
        malformed: Whether the server sent a reply that cannot be parsed.
        refused: Whether the server refused the content of the request.
        maybe_unsupported_n: Whether n (the number of answers in one request) may be the only cause.
        retry_after_s: Wait requested by the server, in seconds.
        tokens: Token usage despite the error, if the server reports it.
    """

    def __init__(
        self,
        cause: str,
        *,
        retryable: bool = True,
        server_wide: bool = False,
        malformed: bool = False,
        refused: bool = False,
        maybe_unsupported_n: bool = True,
        retry_after_s: float = 0.0,
        tokens: Tokens | None = None,
    ) -> None:
        super().__init__(cause)
        self.retryable = retryable
        self.server_wide = server_wide
        self.malformed = malformed
        self.refused = refused
        self.maybe_unsupported_n = maybe_unsupported_n
        self.retry_after_s = retry_after_s
        self.tokens = tokens


@dataclass(frozen=True)
class Reply:
    """The samples of one reply, each a text and why it is unusable, and token usage (None if not reported)."""

    texts: tuple[tuple[str | None, str | None], ...]
    tokens: Tokens | None


def read_reply(status: int, headers: Mapping[str, str], body: bytes, now: float) -> Reply:
    """Parse a reply of the chat completions API; `now` is in seconds since the epoch. Raises RequestError."""
    if status != 200:
        raise _refusal(status, headers, body, now)
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):  # RecursionError: nested too deep
        raise RequestError(f"{MODEL_SERVER}: the reply is not JSON", malformed=True) from None
    choices = reply.get("choices") if isinstance(reply, dict) else None
    tokens = _tokens_of(reply)
    if not isinstance(choices, list) or not choices:
        raise RequestError(f"{MODEL_SERVER}: no choices in the reply", malformed=True, tokens=tokens)
    return Reply(tuple(map(_text_of, choices)), tokens)


def _text_of(choice: Any) -> tuple[str | None, str | None]:
    """Return the text of a choice, and why it is unusable (None if it is usable)."""
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
            cause,
            server_wide=True,
            maybe_unsupported_n=False,
            retry_after_s=retry_after(headers.get("retry-after"), now),
        )
    if (status >= 500 and status != 501) or status in PASSING:
        return RequestError(cause, retry_after_s=retry_after(headers.get("retry-after"), now))
    words = _words_of(body)
    said = f"{cause}: {words}" if words else cause
    return RequestError(
        said, retryable=False, refused=status in REFUSED_REQUEST, maybe_unsupported_n=status not in DENIED
    )


def _words_of(body: bytes) -> str:
    """Return the server's error message in one line; empty if there is none."""
    try:
        reply = json.loads(body)
        error = reply.get("error", reply)
        words = error.get("message") if isinstance(error, dict) else error
        return in_one_line(words, WORDS_SHOWN) if words else ""
    except (ValueError, AttributeError, RecursionError):
        return ""


def in_one_line(words: Any, limit: int) -> str:
    """Return untrusted text made printable: one line of up to `limit` characters, without terminal control codes."""
    return printable(str(words), limit)


def retry_after(value: str | None, now: float) -> float:
    """Return the seconds of a Retry-After header, a number or a date (RFC 9110, 10.2.3); 0 if it is neither."""
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
    """Return the backoff (s) after `troubles` errors: doubling, jitter by `chance` (0 to 1), min. `retry_after_s`."""
    grown = min(FIRST_PAUSE_S * 2 ** min(troubles - 1, 16), LONGEST_PAUSE_S)
    return max(retry_after_s, grown * (0.5 + chance / 2))
