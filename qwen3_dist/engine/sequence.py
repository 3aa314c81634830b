"""A sequence: one choice of one request while it is in the engine."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from collections.abc import Sequence as IntSequence
from dataclasses import dataclass, field

from qwen3_dist.engine.drafts import Drafter
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.protocol.outputs import PromptLogprobs, TokenDelta, TokenLogprob
from qwen3_dist.protocol.sampling_setup import SamplingSetup
from qwen3_dist.protocol.step_plan import PromptLogprobsSpec, PromptOutput
from qwen3_dist.sampling_params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """The tokens of a sequence (prompt, then output), how many are computed, and the blocks that hold their KV.

    Steps are planned before earlier ones return results, so a sequence may be longer than its known tokens:
    `num_pending` sampled tokens are still to come, and `num_computed` counts all tokens of planned steps. A waiting
    sequence has no blocks and `num_computed == 0`.

    With `max_tokens == 0` only the prompt is computed and no token is sampled. Pooling requests are of this kind:
    they have `pooling` and end with a `vector`.
    """

    seq_id: int
    request_id: str
    index: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    priority: int = 0
    adapter: int = 0  # number of the LoRA adapter in plans; 0 is none
    client: str = ""  # who sent it; waiting sequences of different clients take turns
    cache_salt: bytes = b""  # keeps prefix hits within sequences of one adapter and one salt of clients
    setup: SamplingSetup | None = None  # None if sampling needs no state on the ranks
    pooling: PoolingParams | None = None
    prompt_len: int = field(init=False)
    arrival: int = 0  # steps that had been planned when the sequence was added; 0 if another engine began it
    suspect: str = (
        ""  # the request's id while another engine was lost as it ran it, and this one gave it no token yet
    )
    is_set_up: bool = False  # whether a plan since admission carried the setup
    slot: int = -1  # index of its state on the ranks while it runs; -1 while it waits
    num_computed: int = 0
    num_pending: int = 0
    num_drafted: int = 0  # draft tokens in flight, not counted in `num_computed`
    drafter: Drafter | None = None  # with speculative decoding
    num_cached: int | None = None  # prompt tokens found in the prefix cache, once admitted
    block_table: list[int] = field(default_factory=list)
    num_sent_blocks: int = 0  # leading blocks of the table that were sent to the ranks
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks of known tokens
    num_registered: int = 0  # leading blocks that are in the prefix cache
    arrival_s: float = field(default_factory=time.monotonic)
    scheduled_s: float = 0.0  # when it was first admitted, on the monotonic clock
    on_begin: Callable[[], object] = lambda: None  # called when it is first admitted
    finish_reason: str | None = None
    error: str | None = None  # why the sequence failed
    num_logprobs_done: int = field(init=False)  # leading tokens whose prompt logprobs are done or not wanted
    vector: array[float] | None = None
    _prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    _prompt_logprobs_taken: bool = False

    def __post_init__(self) -> None:
        self.prompt_len = len(self.token_ids)
        # Choices of one prompt share its logprobs; the first computes them.
        wanted = self.params.prompt_logprobs is not None and self.index == 0
        self.num_logprobs_done = 0 if wanted else self.prompt_len

    @property
    def is_running(self) -> bool:
        return self.slot >= 0

    @property
    def current_setup(self) -> SamplingSetup | None:
        """The setup with the tokens so far; None if there is no setup."""
        if self.setup is None:
            return None
        prompt = self.token_ids[: self.prompt_len] if self.setup.repetition_penalty != 1 else ()
        return self.setup._replace(prompt=tuple(prompt), output=tuple(self.token_ids[self.prompt_len :]))

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_tokens(self) -> int:
        """Known tokens and those that planned steps will sample."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Tokens that no planned step computes yet; 0 once a planned step samples the last output token."""
        num_tokens = len(self.token_ids) + self.num_pending  # called often in a step, so no nested property
        if num_tokens - self.prompt_len >= (self.max_tokens or 1):
            return 0
        return num_tokens - self.num_computed

    def ends_without_token(self, end: int) -> bool:
        """Whether the sequence is finished after a step that computes its tokens up to `end`, without sampling."""
        return self.max_tokens == 0 and end == self.prompt_len

    @property
    def num_cacheable(self) -> int:
        """Leading tokens that may come from the prefix cache; tokens whose logprobs are wanted must be computed."""
        return self.num_logprobs_done if self.num_logprobs_done < self.prompt_len else len(self.token_ids)

    def take_new_blocks(self) -> tuple[int, tuple[int, ...]]:
        """The number of blocks that ranks know already, and the ids of the others, which count as sent from now on."""
        known = self.num_sent_blocks
        self.num_sent_blocks = len(self.block_table)
        return known, tuple(self.block_table[known:])

    def next_prompt_request(self, start: int, end: int) -> PromptLogprobsSpec | PoolingParams | None:
        """The prompt request for a step that computes tokens `start` to `end`. Call it once for each step."""
        if self.pooling is not None:
            return self.pooling if end == self.prompt_len else None
        first, last = max(start, self.num_logprobs_done), min(end, self.prompt_len - 1)
        top = self.params.prompt_logprobs
        if self.num_logprobs_done < self.prompt_len:
            self.num_logprobs_done = (
                self.prompt_len if end >= self.prompt_len else max(self.num_logprobs_done, end)
            )
        if first >= last or top is None:
            return None
        return PromptLogprobsSpec(first - start, tuple(self.token_ids[first + 1 : last + 1]), top)

    def add_prompt_output(self, output: PromptOutput) -> None:
        """Stores prompt logprobs or a vector that a step returned."""
        if isinstance(output, array):
            self.vector = output
        else:
            self._prompt_logprobs.extend(output)

    def take_prompt_logprobs(self) -> PromptLogprobs | None:
        """The prompt logprobs, the first time this is called after the prompt is complete; None otherwise."""
        if self.params.prompt_logprobs is None or self.index or self._prompt_logprobs_taken:
            return None
        self._prompt_logprobs_taken = True
        return (None, *self._prompt_logprobs)

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> None:
        """Adds a sampled token and sets `finish_reason` if it is the last."""
        self.token_ids.append(token_id)
        if is_stop(token_id, self.params, eos_token_ids):
            self.finish_reason = "stop"
        elif self.num_output >= self.max_tokens:
            self.finish_reason = "length"

    def delta(
        self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...], collected_s: float
    ) -> TokenDelta:
        """What a step that ended at `collected_s` added, for the caller."""
        return TokenDelta(
            self.index,
            token_ids,
            logprobs,
            self.finish_reason,
            self.num_cached or 0,
            self.take_prompt_logprobs(),
            self.error,
            self.vector,
            self.scheduled_s,
            collected_s,
        )

    def resume(self, output: IntSequence[int], eos_token_ids: frozenset[int]) -> None:
        """Adds the `output` so far of another engine, before the sequence is scheduled. Its tokens are computed again,
        as after a preemption. Sets `finish_reason` if the last one ended the sequence."""
        if output:
            self.token_ids += output[:-1]
            self.append(output[-1], eos_token_ids)
            # Whoever got the output got the prompt logprobs with its first token.
            self.num_logprobs_done, self._prompt_logprobs_taken = self.prompt_len, True


def is_stop(token_id: int, params: SamplingParams, eos_token_ids: frozenset[int]) -> bool:
    """Whether a sequence ends with `token_id`, wherever it comes."""
    # No token can follow a complete structured output.
    ignores_eos = params.ignore_eos and params.structured_outputs is None
    return (token_id in eos_token_ids and not ignores_eos) or token_id in params.stop_token_ids
