"""One choice of one request while it lives in the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen3_dist.sampling_params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """Its tokens (prompt, then output), how many have their KV cached, and the blocks that hold them.

    A fresh or preempted sequence has no blocks and `num_computed == 0`.
    """

    seq_id: int
    request_id: str
    index: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    prompt_len: int = field(init=False)
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.prompt_len = len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> None:
        """Adds a sampled token and sets `finish_reason` if it is the last."""
        self.token_ids.append(token_id)
        is_eos = token_id in eos_token_ids and not self.params.ignore_eos
        if is_eos or token_id in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif self.num_output >= self.max_tokens:
            self.finish_reason = "length"
