"""`RequestSummary`: what a replica tells the ingress about a request when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class RequestSummary:
    """Counts and times of one request on one replica.

    Times are in seconds since the request came to the replica; None for what it never reached: `queued_s` when it was
    given to the engine, `scheduled_s` when its first sequence was first scheduled, `first_token_s`, `last_token_s`.
    `prompt_tokens` counts each prompt once, `completion_tokens` sums over all choices, `cached_tokens` are prompt
    tokens found in the prefix cache. `finish_reasons` has one entry for each choice that ended.
    """

    replica: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queued_s: float | None = None
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float = 0.0
    finish_reasons: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """The summary as fields of a log line; times are in milliseconds."""
        queue_s = None
        if self.scheduled_s is not None and self.queued_s is not None:
            queue_s = max(0.0, self.scheduled_s - self.queued_s)
        return {
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "queue_ms": milliseconds(queue_s),
            "ttft_ms": milliseconds(self.first_token_s),
            "finish_reasons": self.finish_reasons,
            "replica": self.replica,
        }


class LastPart(bytes):
    """The last part of an answer, with the request's summary beside its bytes."""

    summary: RequestSummary

    @classmethod
    def of(cls, part: bytes, summary: RequestSummary) -> LastPart:
        last = cls(part)
        last.summary = summary
        return last


def milliseconds(seconds: float | None) -> float | None:
    """Seconds as milliseconds, to a microsecond."""
    return None if seconds is None else round(seconds * 1e3, 3)
