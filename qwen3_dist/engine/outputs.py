"""What an engine hands back: token deltas while it runs, `RequestOutput` when a request is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one generated token, and of the likeliest alternatives (likeliest first)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenDelta:
    """What one step added to choice `index` of a request.

    `finish_reason` is None while it runs, then "stop" (EOS or a stop token, whose id is the last of
    `token_ids`), "length" or "abort".
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One finished choice. `text` is None when the checkpoint has no tokenizer."""

    index: int
    token_ids: list[int]
    text: str | None
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """One finished request. `token_ids`, `text`, ... are those of its first choice."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def text(self) -> str | None:
        return self.outputs[0].text

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.outputs[0].logprobs


@dataclass(frozen=True)
class EngineStats:
    """A reading of one engine's load."""

    num_running: int
    num_waiting: int
    free_blocks: int
    total_blocks: int
    steps: int
