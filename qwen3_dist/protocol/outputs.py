"""Outputs of an engine: token deltas while a request runs, `RequestOutput` when it is finished."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class TokenLogprob:
    """Logprob of one output or prompt token, and the `top` likeliest tokens at its position with their logprobs.

    `rank` is set for prompt tokens only: 1 if the token is the likeliest at its position.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


PromptLogprobs = tuple[TokenLogprob | None, ...]


@dataclass(slots=True)  # not frozen, which would triple what making one costs the engine's thread
class TokenDelta:
    """The tokens that one step added to choice `index` of a request.

    `finish_reason` is None while the choice runs, then "stop" (EOS or a stop token, the last of `token_ids`),
    "length", "abort" or "error" (see `error`). `num_cached_tokens` prompt tokens came from the prefix cache.

    The first delta of choice 0 holds `prompt_logprobs` if they were requested: one entry for each prompt token, None
    for the first. With max_tokens=0 a choice has one delta, without tokens; a pooling request has one with `vector`.

    `scheduled_s` is when the choice was first scheduled and `step_s` when the step ended, on the engine's monotonic
    clock; 0.0 in a delta that no step made.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    error: str | None = None
    vector: array[float] | None = None
    scheduled_s: float = 0.0
    step_s: float = 0.0

    @property
    def is_last(self) -> bool:
        """Whether this is the last delta of its choice."""
        return self.finish_reason is not None or self.error is not None

    def first(self, count: int) -> TokenDelta:
        """This delta with its first `count` tokens only. The other tokens come after a stop string."""
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
    """One finished request. The properties `token_ids`, `text`, `finish_reason` and `logprobs` are of the first
    choice.

    `prompt_logprobs`, if requested, has one entry for each prompt token, None for the first.
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


class EngineLoad(NamedTuple):
    """The load of one engine, in tokens, of all its dp groups together.

    `queued_tokens` are those that waiting sequences need computed, prefixes in the cache among them; `running_tokens`
    those that running sequences consist of. The KV cache holds `capacity_tokens`. Half of the sequences that wait for
    the first time have waited for `median_wait_s` seconds.
    """

    queued_tokens: int
    running_tokens: int
    capacity_tokens: int
    median_wait_s: float


@dataclass(slots=True)  # not frozen for the same reason; nobody changes one
class EngineStats:
    """The load of one engine now, and totals since its start, of all its dp groups together.

    No sequence holds the `free_blocks`; `cached_blocks` of them still hold a prefix that can be reused.
    `prompt_tokens` and `cached_prompt_tokens` count a sequence when it is first scheduled; `generation_tokens` are
    those sampled and kept, `computed_tokens` those of all steps, prompts and drafts included.

    `dispatched_tokens` counts each token once for each expert chosen for it in each MoE layer. The bytes are those
    that ranks received from each other, computed from the layout (`engine/step_traffic.py`): by all-reduces over tp,
    by the exchange of MoE layers, and from one pipeline stage to the next. `wait_for_requests_s` and
    `wait_for_engine_s` are seconds in which ranks had no step to run, without and with work in the engine.
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
    repeated_steps: int = 0  # steps that ran again because an all-to-all of fixed capacity overflowed
    generation_tokens: int = 0
    computed_tokens: int = 0
    last_step_tokens: int = 0
    last_step_sequences: int = 0
    dispatched_tokens: int = 0
    tensor_bytes: float = 0.0
    expert_bytes: float = 0.0
    pipeline_bytes: float = 0.0
    wait_for_requests_s: float = 0.0
    wait_for_engine_s: float = 0.0

    @property
    def mean_batch(self) -> float:
        """Mean number of sequences in a step."""
        return self.scheduled_sequences / self.steps if self.steps else 0.0

    @property
    def kv_usage(self) -> float:
        """Share of the KV-cache blocks that sequences hold."""
        return 1 - self.free_blocks / self.total_blocks if self.total_blocks else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of prompt tokens found in the prefix cache."""
        return self.cached_prompt_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of draft tokens that were accepted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0
