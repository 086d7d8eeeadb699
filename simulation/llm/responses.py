"""Pure functions that parse model server replies, add up token usage, and compute pauses after failed requests."""

import email.utils
import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from simulation.errors import printable

BUSY = (429, 503)  # the server asks all clients to wait
PASSING = (408, 409, 425)  # temporary errors, like every 5xx status except 501 (not implemented)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CUT_OFF = {"length": "answer cut off by the token limit", "content_filter": "answer withheld by a content filter"}
NO_TEXT = "no text in the answer"
NO_ANSWER = "model server: no answer in time"
OUT_OF_TOKENS = "out of tokens (--max-tokens)"
MESSAGE_SHOWN = 120  # maximum length of a server's error message
MOST_TOKENS = 10**12  # a larger token count of one request is invalid


@dataclass
class Usage:
    """The requests, tokens and times of one or more groups so far. Token counts are those that model servers report."""

    requests: int = 0  # requests sent, including retries
    retries: int = 0  # requests sent after an error, too few answers, or an unusable answer
    prompt_tokens: int = 0
    completion_tokens: int = 0
    answering_s: float = 0.0  # of the slowest group: from question to last answer, summed over rounds
    client_s: float = 0.0  # CPU time of the slowest group's server process during `answering_s`

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Usage") -> "Usage":
        counts = ("requests", "retries", "prompt_tokens", "completion_tokens")
        slower = max(self, other, key=lambda each: each.answering_s)
        return replace(slower, **{name: getattr(self, name) + getattr(other, name) for name in counts})


Text = tuple[str | None, str | None]  # an answer (None: no text), and why it is unusable (None: usable)
Reply = tuple[list[Text], Usage | None]  # the usage is None if the server does not report it


@dataclass(eq=False)
class RequestError(Exception):
    """The failure of a request. If participants fail because of it, `cause` is the failure cause counted for them."""

    cause: str
    _: KW_ONLY
    retryable: bool = True  # the same request may succeed later
    server_wide: bool = False  # the error concerns the server: other requests for this model must wait, too
    refused: bool = False  # the server refused the content of the request
    maybe_unsupported_n: bool = True  # the field n (number of answers per request) may have caused the error
    retry_after_s: float = 0.0  # pause that the server requests
    usage: Usage | None = None  # the tokens, if the server reports them despite the error

    def __str__(self) -> str:
        return self.cause


def read_reply(status: int, headers: Mapping[str, str], body: bytes, now: float) -> Reply:
    """Parse a reply of the chat completions API. `now` is the Unix time. Raises RequestError if the request failed."""
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):  # RecursionError: JSON nested too deep
        reply = None
    if status != 200:
        raise _refusal(status, headers, reply, now)
    if reply is None:
        raise RequestError("model server: the reply is not JSON")
    prompt, completion = (_get(reply, "usage", f"{kind}_tokens") for kind in ("prompt", "completion"))
    valid = all(type(count) is int and 0 <= count <= MOST_TOKENS for count in (prompt, completion))
    usage = Usage(prompt_tokens=prompt, completion_tokens=completion) if valid else None
    choices = _get(reply, "choices")
    if not isinstance(choices, list) or not choices:
        raise RequestError("model server: no choices in the reply", usage=usage)
    return [_text_in(choice) for choice in choices], usage


def _get(data: Any, *names: str) -> Any:
    """Return the value at the nested keys `names` of JSON data, or None if a key is missing."""
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _text_in(choice: Any) -> Text:
    text, reason = _get(choice, "message", "content"), _get(choice, "finish_reason")
    if not isinstance(text, str):
        return None, NO_TEXT
    return text, CUT_OFF.get(reason) if isinstance(reason, str) else None


def _refusal(status: int, headers: Mapping[str, str], reply: Any, now: float) -> RequestError:
    cause, busy = f"model server: HTTP {status}", status in BUSY
    if busy or status in PASSING or (status >= 500 and status != 501):
        wait_s = retry_after(headers.get("retry-after"), now)
        return RequestError(cause, server_wide=busy, maybe_unsupported_n=not busy, retry_after_s=wait_s)
    message = _get(reply, "error", "message") or _get(reply, "message") or _get(reply, "error")
    if message and not isinstance(message, dict):
        cause = f"{cause}: {printable(str(message), MESSAGE_SHOWN)}"
    denied = status in (401, 403)  # regardless of the content of the request
    return RequestError(cause, retryable=False, refused=status in (400, 422), maybe_unsupported_n=not denied)


def retry_after(value: str | None, now: float) -> float:
    """Return the pause (s) that the Retry-After header `value` (number or date) requests; 0 if missing or invalid."""
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
    """Return the pause (s) after `errors` errors in a row, at least `retry_after_s`. `chance` (0..1) adds jitter."""
    grown = min(FIRST_PAUSE_S * 2 ** min(errors - 1, 16), LONGEST_PAUSE_S)
    return max(retry_after_s, grown * (0.5 + chance / 2))
