"""The usage of language models in requests, tokens and seconds, and failure causes that concern all participants."""

from dataclasses import dataclass, replace

MODEL_SERVER = "model server"  # prefix of failure causes that are due to a model server
OUT_OF_TOKENS = "out of tokens (--max-tokens)"


@dataclass(frozen=True)
class Usage:
    """The usage of one or more groups so far. The tokens are those that the model servers report for each request."""

    requests: int = 0  # requests sent, including retries
    retries: int = 0  # requests that repeat one with an error, too few answers, or an unusable answer
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
