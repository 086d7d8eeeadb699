"""Usage of language models in requests, tokens and seconds, and the failure causes that end their use."""

from __future__ import annotations

from dataclasses import dataclass

MODEL_SERVER = "model server"  # prefix of causes that are not a participant's fault
OUT_OF_TOKENS = "out of tokens (--max-tokens)"


@dataclass(frozen=True)
class Usage:
    """The usage of one or more groups so far.

    Attributes:
        requests: Requests sent, including retries.
        retries: Requests that repeat one that failed, returned too few answers, or returned an unusable answer.
        prompt_tokens: As counted by the model servers, once per request.
        completion_tokens: Likewise.
        answering_s: Seconds from question to last answer, summed over rounds, of the slowest group.
        client_s: CPU seconds of that group's server process during this time.
    """

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    answering_s: float = 0.0
    client_s: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        slower = max(self, other, key=lambda each: each.answering_s)
        return Usage(
            self.requests + other.requests,
            self.retries + other.retries,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            slower.answering_s,
            slower.client_s,
        )
