"""Parsing of model server replies, and the backoff after failed requests; pure functions.

A reply without answers becomes a `RequestError`, which says whether a retry may help.
"""

from __future__ import annotations

import email.utils
import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

from simulation.errors import printable
from simulation.llm.usage import MODEL_SERVER

BUSY = (429, 503)  # the server asks all clients to wait
PASSING = (408, 409, 425)  # temporary, as is every 5xx but 501 (not implemented)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CUT_OFF = {"length": "answer cut off by the token limit", "content_filter": "answer withheld by a content filter"}
NO_TEXT = "no text in the answer"
NO_ANSWER = f"{MODEL_SERVER}: no answer in time"
MESSAGE_SHOWN = 120  # characters of a server's error message
MOST_TOKENS = 10**12  # of one request; a larger value is not a valid count


class Tokens(NamedTuple):
    """The token usage of one request, as counted by the server."""

    prompt: int
    completion: int


@dataclass(eq=False)
class RequestError(Exception):
    """A request without answers; failed answers are counted by its cause."""

    cause: str
    _: KW_ONLY
    retryable: bool = True  # the same request may succeed later
    server_wide: bool = False  # it concerns the whole server: other requests must wait too
    malformed: bool = False  # the reply cannot be parsed
    refused: bool = False  # the server refused the content of the request
    maybe_unsupported_n: bool = True  # n (the number of answers in one request) may be the only cause
    retry_after_s: float = 0.0  # as the server requests
    tokens: Tokens | None = None  # usage despite the error, if the server reports it

    def __str__(self) -> str:
        return self.cause


class Reply(NamedTuple):
    """The samples of one reply, each a text and why it is unusable, and token usage (None if not reported)."""

    texts: list[tuple[str | None, str | None]]
    tokens: Tokens | None


def read_reply(status: int, headers: Mapping[str, str], body: bytes, now: float) -> Reply:
    """Parse a reply of the chat completions API; `now` is in seconds since the epoch. Raises RequestError."""
    if status != 200:
        raise _refusal(status, headers, body, now)
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):  # RecursionError: nested too deep
        raise RequestError(f"{MODEL_SERVER}: the reply is not JSON", malformed=True) from None
    counts = [_get(reply, "usage", f"{kind}_tokens") for kind in Tokens._fields]
    valid = all(type(count) is int and 0 <= count <= MOST_TOKENS for count in counts)
    choices, tokens = _get(reply, "choices"), Tokens(*counts) if valid else None
    if not isinstance(choices, list) or not choices:
        raise RequestError(f"{MODEL_SERVER}: no choices in the reply", malformed=True, tokens=tokens)
    return Reply([_text_in(choice) for choice in choices], tokens)


def _get(data: Any, *names: str) -> Any:
    """Return a nested value of JSON data; None if there is none."""
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _text_in(choice: Any) -> tuple[str | None, str | None]:
    """Return the text of a choice, and why it is unusable (None if it is usable)."""
    text, reason = _get(choice, "message", "content"), _get(choice, "finish_reason")
    if not isinstance(text, str):
        return None, NO_TEXT
    return text, CUT_OFF.get(reason) if isinstance(reason, str) else None


def _refusal(status: int, headers: Mapping[str, str], body: bytes, now: float) -> RequestError:
    cause, busy = f"{MODEL_SERVER}: HTTP {status}", status in BUSY
    if busy or status in PASSING or (status >= 500 and status != 501):
        wait_s = retry_after(headers.get("retry-after"), now)
        return RequestError(cause, server_wide=busy, maybe_unsupported_n=not busy, retry_after_s=wait_s)
    message = _message_in(body)
    return RequestError(
        f"{cause}: {message}" if message else cause,
        retryable=False,
        refused=status in (400, 422),
        maybe_unsupported_n=status not in (401, 403),  # denied, regardless of the request's content
    )


def _message_in(body: bytes) -> str:
    """Return the server's error message in one line; empty if there is none."""
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    message = _get(reply, "error", "message") or _get(reply, "message") or _get(reply, "error")
    return printable(str(message), MESSAGE_SHOWN) if message and not isinstance(message, dict) else ""


def retry_after(value: str | None, now: float) -> float:
    """Return the seconds of a Retry-After header, a number or a date (RFC 9110, 10.2.3); 0 if it is neither."""
    text = value or "0"
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - now
        except (ValueError, OverflowError):
            return 0.0
    return min(seconds, 1e9) if seconds > 0 else 0.0


def pause_s(errors: int, retry_after_s: float, chance: float) -> float:
    """Return the backoff (s) after `errors` errors: doubling, jitter by `chance` (0 to 1), min. `retry_after_s`."""
    grown = min(FIRST_PAUSE_S * 2 ** min(errors - 1, 16), LONGEST_PAUSE_S)
    return max(retry_after_s, grown * (0.5 + chance / 2))
