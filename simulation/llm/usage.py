"""What asking language models has cost, in requests, tokens and seconds; and the causes that say it cannot go on."""

from __future__ import annotations

from dataclasses import dataclass

MODEL_SERVER = "model server"  # how the causes begin that are no participant's doing
OUT_OF_TOKENS = "out of tokens (--max-tokens)"


@dataclass(frozen=True)
class Usage:
    """What the participants of a group, or of many, have cost so far.

    Attributes:
        requests: Requests sent, the repeated ones included.
        retries: Those of them that repeat one that failed, fell short, or brought an unusable answer.
        prompt_tokens: As the model servers count them, once per request.
        completion_tokens: Likewise.
        answering_s: Seconds from the questions to the last answers, of the group that took longest.
        client_s: What its server's own work was of that, in seconds of CPU.
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
