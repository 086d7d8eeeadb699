"""Usage of language models in requests, tokens and seconds, and the failure causes that end their use."""

from __future__ import annotations

from dataclasses import dataclass, replace

MODEL_SERVER = "model server"  # prefix of causes that are not a participant's fault
OUT_OF_TOKENS = "out of tokens (--max-tokens)"


@dataclass(frozen=True)
class Usage:
    """The usage of one or more groups so far; tokens are as counted by the model servers, once per request."""

    requests: int = 0  # sent, including retries
    retries: int = 0  # that repeat one that failed, returned too few answers, or returned an unusable answer
    prompt_tokens: int = 0
    completion_tokens: int = 0
    answering_s: float = 0.0  # from question to last answer, summed over rounds, of the slowest group
    client_s: float = 0.0  # CPU seconds of that group's server process during this time

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        counts = ("requests", "retries", "prompt_tokens", "completion_tokens")
        slower = max(self, other, key=lambda each: each.answering_s)
        return replace(slower, **{name: getattr(self, name) + getattr(other, name) for name in counts})
