"""One choice of one request while it lives in the engine."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from qwen3_dist.engine.drafts import Drafter
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.protocol.outputs import PromptLogprobs, TokenLogprob
from qwen3_dist.protocol.sampling_setup import SamplingSetup
from qwen3_dist.protocol.step_plan import PromptScores, Reading
from qwen3_dist.sampling_params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """Its tokens (prompt, then output), how far they are computed, and the blocks that hold their KV.

    Steps are planned before the ones before them have answered, so a sequence may be longer than its
    known tokens: `num_pending` sampled tokens are on their way, and `num_computed` counts what every step
    planned so far will have computed. A fresh or preempted sequence has no blocks and `num_computed == 0`.

    With `max_tokens == 0` its prompt alone is computed, and what is pending after it is the end, no token. Such
    is a sequence with `pooling`, which gives a `vector`.
    """

    seq_id: int
    request_id: str
    index: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    priority: int = 0
    adapter: int = 0  # what plans call the LoRA adapter; 0 is none
    cache_salt: bytes = b""  # of sequences whose KV is not that of others with the same tokens
    setup: SamplingSetup | None = None  # of a sequence that is not plain
    pooling: PoolingParams | None = None
    prompt_len: int = field(init=False)
    arrival: int = 0  # steps the scheduler had planned when the sequence came
    is_set_up: bool = False  # whether a plan since its admission carried the setup
    slot: int = -1  # its place among the running ones, where ranks keep its last token
    num_computed: int = 0
    num_pending: int = 0
    num_drafted: int = 0  # guesses in flight, which `num_computed` leaves out
    drafter: Drafter | None = None  # if the sequence is to be guessed ahead
    num_cached: int | None = None  # prompt tokens found in the prefix cache, once admitted
    block_table: list[int] = field(default_factory=list)
    num_sent_blocks: int = 0  # leading blocks of the table that ranks know of
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks of known tokens
    num_registered: int = 0  # leading blocks that are in the prefix cache's index
    finish_reason: str | None = None
    error: str | None = None  # why it could not go on
    num_scored: int = field(init=False)  # leading tokens of which no later step must give log-probabilities
    vector: array[float] | None = None
    _scores: list[TokenLogprob] = field(default_factory=list)
    _scores_taken: bool = False

    def __post_init__(self) -> None:
        self.prompt_len = len(self.token_ids)
        # The choices of a prompt have its log-probabilities in common.
        scores = self.params.prompt_logprobs is not None and self.index == 0
        self.num_scored = 0 if scores else self.prompt_len

    @property
    def is_running(self) -> bool:
        return self.slot >= 0

    @property
    def current_setup(self) -> SamplingSetup | None:
        """The setup with the tokens so far; None for a plain sequence."""
        if self.setup is None:
            return None
        prompt = self.token_ids[: self.prompt_len] if self.setup.repetition_penalty != 1 else ()
        return self.setup._replace(prompt=tuple(prompt), output=tuple(self.token_ids[self.prompt_len :]))

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_tokens(self) -> int:
        """Tokens it has or is about to have."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Tokens that no step planned so far computes; 0 once its last output token is on its way."""
        num_tokens = len(self.token_ids) + self.num_pending  # several times a step: no property of a property
        if num_tokens - self.prompt_len >= (self.max_tokens or 1):
            return 0
        return num_tokens - self.num_computed

    def ends_without_token(self, end: int) -> bool:
        """Whether nothing is wanted of it after a step that computes its tokens up to `end`."""
        return self.max_tokens == 0 and end == self.prompt_len

    @property
    def num_findable(self) -> int:
        """Leading tokens whose KV, if it is there already, spares computing them."""
        return self.num_scored if self.num_scored < self.prompt_len else len(self.token_ids)

    def take_new_blocks(self) -> tuple[int, tuple[int, ...]]:
        """How many of its blocks the ranks know of already, and the others, which they are told of now."""
        known = self.num_sent_blocks
        self.num_sent_blocks = len(self.block_table)
        return known, tuple(self.block_table[known:])

    def next_reading(self, start: int, end: int) -> PromptScores | PoolingParams | None:
        """What a step that computes the tokens from `start` to `end` must read of the prompt; asked once each."""
        if self.pooling is not None:
            return self.pooling if end == self.prompt_len else None
        first, last = max(start, self.num_scored), min(end, self.prompt_len - 1)
        top = self.params.prompt_logprobs
        if self.num_scored < self.prompt_len:
            self.num_scored = self.prompt_len if end >= self.prompt_len else max(self.num_scored, end)
        if first >= last or top is None:
            return None
        return PromptScores(first - start, tuple(self.token_ids[first + 1 : last + 1]), top)

    def take_reading(self, reading: Reading) -> None:
        """Keeps what a step read."""
        if isinstance(reading, array):
            self.vector = reading
        else:
            self._scores.extend(reading)

    def take_prompt_logprobs(self) -> PromptLogprobs | None:
        """Log-probabilities of the prompt, once, after the step that ended it."""
        if self.params.prompt_logprobs is None or self.index or self._scores_taken:
            return None
        self._scores_taken = True
        return (None, *self._scores)

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> None:
        """Adds a sampled token and sets `finish_reason` if it is the last."""
        self.token_ids.append(token_id)
        # Nothing can follow the end of a form.
        ignores_eos = self.params.ignore_eos and self.params.structured_outputs is None
        is_eos = token_id in eos_token_ids and not ignores_eos
        if is_eos or token_id in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif self.num_output >= self.max_tokens:
            self.finish_reason = "length"
