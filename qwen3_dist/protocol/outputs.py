"""What an engine hands back: token deltas while it runs, `RequestOutput` when a request is done."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one token, generated or of a prompt, and of the likeliest there (likeliest first).

    `rank`, of a prompt's tokens alone, is its place among all, 1 for the likeliest.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


PromptLogprobs = tuple[TokenLogprob | None, ...]


@dataclass(frozen=True)
class TokenDelta:
    """What one step added to choice `index` of a request.

    `finish_reason` is None while it runs, then "stop" (EOS or a stop token, whose id is the last of
    `token_ids`), "length", "abort" or "error", which `error` explains. `num_cached_tokens` of the prompt were
    found in the prefix cache.

    The first delta of choice 0 holds `prompt_logprobs` where they were asked for: an entry for each token of
    the prompt, None for the first. With max_tokens=0 a choice has one delta, without tokens; an embedding has
    one too, whose `vector` it is.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    error: str | None = None
    vector: array[float] | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing of its choice comes after it."""
        return self.finish_reason is not None or self.error is not None

    def first(self, count: int) -> TokenDelta:
        """The same with the first `count` tokens alone, the others being after a stop string."""
        if count == len(self.token_ids):
            return self
        return replace(self, token_ids=self.token_ids[:count], logprobs=self.logprobs[:count])


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
    """One finished request. `token_ids`, `text`, ... are those of its first choice.

    `prompt_logprobs`, where they were asked for, has an entry for each token of the prompt, None for the first.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None

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
    """A reading of one engine's load, and totals since its start.

    `free_blocks` are held by no sequence; `cached_blocks` of them still hold a prefix that can be found.
    """

    num_running: int
    num_waiting: int
    free_blocks: int
    cached_blocks: int
    total_blocks: int
    steps: int
    scheduled_sequences: int
    preemptions: int
    prompt_tokens: int
    cached_prompt_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    repeated_steps: int = 0  # since an exchange of experts' tokens had too little room

    @property
    def mean_batch(self) -> float:
        """Sequences in a step, on average."""
        return self.scheduled_sequences / self.steps if self.steps else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of prompt tokens that the prefix cache spared."""
        return self.cached_prompt_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of guessed tokens that were right."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0
