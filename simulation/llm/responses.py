"""Pure functions that parse model server replies, add up token usage, and compute pauses after failed requests."""

import contextlib
import email.utils
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple

from simulation.errors import printable

BUSY = (429, 503)  # the server asks all clients to wait
PASSING = (408, 409, 425)  # temporary errors, like every 5xx status except 501 (not implemented)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CUT_OFF = {"length": "answer cut off by the token limit", "content_filter": "answer withheld by a content filter"}
CUT_WHILE_THINKING = f"{CUT_OFF['length']} while thinking"
NO_TEXT = "no text in the answer"
NO_ANSWER = "model server: no answer in time"
OUT_OF_TOKENS = "out of tokens (--max-tokens)"
CAUSE_SHOWN, WORDS_SHOWN = 148, 40  # maximum length of a cause, and minimum length of a server's words in it
MOST_TOKENS = 10**12  # a larger token count of one request is invalid

# What servers answer to a request that they refuse: patterns, and remedies
NO_SYSTEM = re.compile(
    r"system (role|message|prompt)s?\b.{0,20} not |role.{0,40}'system'|roles must alternate|developer instruction"
    r"|only (support )?'?user'?(,| and)",
    re.IGNORECASE,
)
TOO_LONG = re.compile(
    r"context[ _-]?(?:length|size|window)|(?:prompt|input) is too long|max_new_tokens|maximum number of tokens"
    r"|maximum (?:model|input) length",
    re.IGNORECASE,
)
CONTEXT = re.compile(r"(?:context length|context size|model length)\D{0,20}?(\d+)", re.IGNORECASE)
SHORTEN = "raise --max-model-len of the server, or play fewer rounds or use a shorter prompt"
REMEDIES = {
    r"chat.?template(?!_kwargs)": "start it with --chat-template, or serve a model for chats",
    r"use 'max_completion_tokens'": "put max_completion_tokens into generate_args",
    r"structured|response_format|json.?schema|guided|grammar": "try --structured-output response_format or none",
}
CORRECT_URL = "correct base_url, which usually ends with /v1"


@dataclass
class Usage:
    """The requests, tokens and times of one or more groups so far. Token counts are those that model servers report."""

    requests: int = 0  # requests sent, including retries
    retries: int = 0  # requests sent after an error, too few answers, or an unusable answer
    prompt_tokens: int = 0
    completion_tokens: int = 0
    answering_s: float = 0.0  # of the slowest group: from question to last answer, summed over rounds
    client_s: float = 0.0  # CPU time of the slowest group's server process during `answering_s`
    replayed: int = 0  # answers taken from a recorded run, without a request

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Usage") -> "Usage":
        counts = ("requests", "retries", "prompt_tokens", "completion_tokens", "replayed")
        slower = max(self, other, key=lambda each: each.answering_s)
        return replace(slower, **{name: getattr(self, name) + getattr(other, name) for name in counts})


class Text(NamedTuple):
    """One answer of a model."""

    text: str | None  # None: no text
    cause: str | None  # why the text is unusable (None: usable)
    thoughts: str | None = None  # the reasoning, if the server returns it separately


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
    no_system: bool | None = False  # whether the role "system" has caused the error (None: perhaps)
    remedy: str = ""  # what helps, if known; part of the cause
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
        raise _refusal(status, headers, reply, body, now)
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
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _text_in(choice: Any) -> Text:
    message, reason = _get(choice, "message"), _get(choice, "finish_reason")
    content = _get(message, "content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    text = _joined(_get(part, "text") for part in parts if _get(part, "type") == "text")
    separate = _get(message, "reasoning_content") or _get(message, "reasoning")
    nested = [_get(part, "thinking") for part in parts]
    pieces = [piece for each in nested for piece in (each if isinstance(each, list) else [{"text": each}])]
    thoughts = _joined([separate, *(_get(piece, "text") for piece in pieces)])
    text = None if thoughts and not text else text
    cause = CUT_OFF.get(reason) if isinstance(reason, str) else None
    if reason == "length" and ((thoughts and text is None) or "<think>" in (text or "").rpartition("</think>")[2]):
        cause = CUT_WHILE_THINKING
    return Text(text, cause or (NO_TEXT if text is None else None), thoughts)


def _joined(texts: Iterable[Any]) -> str | None:
    found = [each for each in texts if isinstance(each, str)]
    return "".join(found) if found else None


def _refusal(status: int, headers: Mapping[str, str], reply: Any, body: bytes, now: float) -> RequestError:
    words, busy = _words(reply, body), status in BUSY
    if status not in (401, 403, 429) and TOO_LONG.search(words):
        size = "".join(f" of {each} tokens" for each in CONTEXT.findall(words)[:1])  # other numbers differ by prompt
        cause = f"model server: HTTP {status}: prompt and answer exceed the context{size}; {SHORTEN}"
        return RequestError(cause, retryable=False, refused=True, maybe_unsupported_n=False, remedy=SHORTEN)
    no_system = NO_SYSTEM.search(words) is not None
    found = (each for pattern, each in REMEDIES.items() if re.search(pattern, words, re.IGNORECASE) and not no_system)
    remedy = CORRECT_URL if status in (404, 405) and "model" not in words else next(found, "")
    if 300 <= status < 400:
        words, remedy = f"redirects to {headers.get('location')}", CORRECT_URL
    start, end = f"model server: HTTP {status}", f"; {remedy}" if remedy else ""
    shown = printable(words, max(CAUSE_SHOWN - len(start) - len(end) - 2, WORDS_SHOWN))
    retryable = not no_system and (busy or status in PASSING or (status >= 500 and status != 501))
    return RequestError(
        start + (f": {shown}" if shown else "") + end,
        retryable=retryable,
        server_wide=retryable and busy,
        refused=not retryable and status in (400, 422),
        maybe_unsupported_n=not busy if retryable else not no_system and status not in (401, 403),
        no_system=True if no_system else None if status in (400, 422, 500) and not remedy else False,
        remedy=remedy,
        retry_after_s=retry_after(headers.get("retry-after"), now) if retryable else 0.0,
    )


def _words(reply: Any, body: bytes) -> str:
    """Return the error message in a reply, or "" if it has none."""
    reply = reply[0] if isinstance(reply, list) and reply else reply
    found = _get(reply, "error", "message") or _get(reply, "message") or _get(reply, "error") or _get(reply, "detail")
    if reply is None and len(body) < 1000 and not body.lstrip().startswith((b"<", b"{", b"[")):
        found = body.decode(errors="replace")
    return str(found) if found and not isinstance(found, dict) else ""


def retry_after(value: str | None, now: float) -> float:
    """Return the pause (s) that the Retry-After header `value` (number or date) requests; 0 if missing or invalid."""
    seconds = 0.0
    with contextlib.suppress(ValueError, OverflowError):
        try:
            seconds = float(value or 0)
        except ValueError:
            seconds = email.utils.parsedate_to_datetime(value or "").timestamp() - now
    return min(seconds, 1e9) if seconds > 0 else 0.0


def pause_s(errors: int, retry_after_s: float, chance: float) -> float:
    """Return the pause (s) after `errors` errors in a row, at least `retry_after_s`. `chance` (0..1) adds jitter."""
    grown = min(FIRST_PAUSE_S * 2 ** min(errors - 1, 16), LONGEST_PAUSE_S)
    return max(retry_after_s, grown * (0.5 + chance / 2))
