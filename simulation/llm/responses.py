"""Parsing of model server replies, and the backoff after failed requests; pure functions.

A reply without answers raises a `RequestError`, which states whether a retry may help.
"""

import email.utils
import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

from simulation.errors import printable
from simulation.llm.usage import MODEL_SERVER

BUSY = (429, 503)  # the server asks all clients to wait
PASSING = (408, 409, 425)  # temporary errors, like every 5xx status except 501 (not implemented)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CUT_OFF = {"length": "answer cut off by the token limit", "content_filter": "answer withheld by a content filter"}
NO_TEXT = "no text in the answer"
NO_ANSWER = f"{MODEL_SERVER}: no answer in time"
MESSAGE_SHOWN = 120  # maximum length of a server's error message
MOST_TOKENS = 10**12  # a larger token count of one request is invalid


class Tokens(NamedTuple):
    """The token usage of one request, as counted by the server."""

    prompt: int
    completion: int


@dataclass(eq=False)
class RequestError(Exception):
    """The failure of a request. Failures of the waiting participants are counted by `cause`."""

    cause: str
    _: KW_ONLY
    retryable: bool = True  # the same request may succeed later
    server_wide: bool = False  # the error concerns the whole server, so other requests must wait too
    malformed: bool = False  # the reply cannot be parsed
    refused: bool = False  # the server refused the content of the request
    maybe_unsupported_n: bool = True  # the field n (number of answers per request) may have caused the error
    retry_after_s: float = 0.0  # pause that the server requests
    tokens: Tokens | None = None  # the usage, if the server reports it despite the error

    def __str__(self) -> str:
        return self.cause


class Reply(NamedTuple):
    """The samples and the token usage of one reply; `tokens` is None if the server does not report the usage.

    A sample is a text, and the reason why the text is unusable (None: it is usable).
    """

    texts: list[tuple[str | None, str | None]]
    tokens: Tokens | None


def read_reply(status: int, headers: Mapping[str, str], body: bytes, now: float) -> Reply:
    """Parse a reply of the chat completions API. `now` is the current time in seconds since the epoch.

    Raises RequestError if the reply has no answers.
    """
    if status != 200:
        raise _refusal(status, headers, body, now)
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):  # RecursionError: JSON nested too deep
        raise RequestError(f"{MODEL_SERVER}: the reply is not JSON", malformed=True) from None
    counts = [_get(reply, "usage", f"{kind}_tokens") for kind in Tokens._fields]
    valid = all(type(count) is int and 0 <= count <= MOST_TOKENS for count in counts)
    choices, tokens = _get(reply, "choices"), Tokens(*counts) if valid else None
    if not isinstance(choices, list) or not choices:
        raise RequestError(f"{MODEL_SERVER}: no choices in the reply", malformed=True, tokens=tokens)
    return Reply([_text_in(choice) for choice in choices], tokens)


def _get(data: Any, *names: str) -> Any:
    """Return the value at the nested keys `names` of JSON data, or None if a key is missing."""
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _text_in(choice: Any) -> tuple[str | None, str | None]:
    """Return the text of a choice, and the reason why the text is unusable (None: it is usable)."""
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
        maybe_unsupported_n=status not in (401, 403),  # access denied, regardless of the request's content
    )


def _message_in(body: bytes) -> str:
    """Return the server's error message in one line, or "" if the body contains none."""
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    message = _get(reply, "error", "message") or _get(reply, "message") or _get(reply, "error")
    return printable(str(message), MESSAGE_SHOWN) if message and not isinstance(message, dict) else ""


def retry_after(value: str | None, now: float) -> float:
    """Return the seconds to wait by a Retry-After header, a number or a date (RFC 9110, 10.2.3); 0 if invalid."""
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
    """Return the pause in seconds after `errors` errors in a row: at least `retry_after_s`.

    The pause doubles with each error up to LONGEST_PAUSE_S. A random number `chance` from 0 to 1 adds jitter.
    """
    grown = min(FIRST_PAUSE_S * 2 ** min(errors - 1, 16), LONGEST_PAUSE_S)
    return max(retry_after_s, grown * (0.5 + chance / 2))
