"""Warm-up: steps that a GPU rank runs before it is ready, so that no later step compiles a kernel or runs out of
memory.

Which variant of a Triton kernel runs depends on the sizes of a step only through the next power of 2
(`ops/cuda/triton_*`), so steps of these sizes compile all variants. All ranks of a layout run the same steps, so their
collectives come in the same order. Sequences write all their KV to the spare block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product

import torch
from torch import Tensor

from qwen3_dist.errors import ResourceError
from qwen3_dist.model.experts import Experts
from qwen3_dist.model.step_memory import PROMPT_LOGPROBS_ROWS
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.slices import rows_of_slice
from qwen3_dist.parallel.dispatch import DispatchedTokens
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.protocol.sampling_setup import SamplingSetup
from qwen3_dist.protocol.step_limits import SchedulerLimits
from qwen3_dist.protocol.step_plan import LAST_SAMPLED, PromptLogprobsSpec, SampleSpec, SequenceStep, StepPlan
from qwen3_dist.settings import EngineConfig

_GREEDY = SampleSpec(temperature=0.0, top_p=1.0, top_k=0, seed=0, position=0, logprobs=None)
_SAMPLE_SPECS = (  # one for each sampling kernel; the last also has logprobs
    _GREEDY,
    _GREEDY._replace(temperature=1.0),
    _GREEDY._replace(temperature=1.0, top_k=20),
    _GREEDY._replace(temperature=0.7, top_p=0.9, logprobs=2),
)
_SETUP = SamplingSetup(
    min_p=0.1,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    repetition_penalty=1.2,
    logit_bias=((0, 1.0),),
    min_tokens=1,
    stop_token_ids=(1,),
    eos_token_ids=(1,),
    bad_words=((2,), (3, 4)),
    logprob_token_ids=(5,),
    thinking=None,
    reasoning="none",
    thinking_token_budget=None,
    grammar=None,
    prompt=(6, 7),
)


@dataclass(frozen=True)
class StepShapes:
    """The possible sizes of an engine's steps.

    `max_tokens` and `max_num_seqs` limit a step of one dp group. A sequence has up to `num_drafted` draft tokens in a
    step. No sequence owns `spare_block`.
    """

    dp: int
    max_num_seqs: int
    max_tokens: int
    max_model_len: int
    block_size: int
    vocab_size: int
    spare_block: int
    num_drafted: int = 0
    adapters: int = 0

    @classmethod
    def of(cls, config: EngineConfig, model: Qwen3Model, num_blocks: int) -> StepShapes:
        """The shapes for a KV cache of `num_blocks` blocks, with the spare block after them."""
        limits = SchedulerLimits.of(config, model.device.type, num_blocks)
        longest = config.max_model_len or num_blocks * config.block_size
        return cls(
            dp=model.parallel.layout.dp,
            max_num_seqs=limits.max_num_seqs,
            max_tokens=limits.max_step_tokens,
            max_model_len=min(longest, model.config.context_length),
            block_size=config.block_size,
            vocab_size=model.config.vocab_size,
            spare_block=num_blocks,
            num_drafted=config.speculative.k if config.speculative is not None else 0,
            adapters=len(config.lora.pairs),
        )

    def steps(self) -> Iterator[list[StepPlan]]:
        """Yields the plans of each warm-up step, one for each dp group. The first step is the largest possible."""
        yield self._for_all_groups(self.largest())
        for size in powers_of_2(self.max_tokens):
            prompts = self._prompts(size, slots=range(self.max_num_seqs))
            yield self._for_all_groups(prompts)
            yield self._for_all_groups(self._with_prompt_logprobs(prompts))
        for size in powers_of_2(self.max_num_seqs):
            yield self._for_all_groups(self._decodes(size))
            if size < self.max_num_seqs:
                yield self._for_all_groups([*self._decodes(size), *self._prompts(2, slots=[size])])
            if self.num_drafted:
                yield self._for_all_groups(self._drafted_decodes(size))
        yield from (self._for_all_groups(parts) for parts in self._sampling_steps())
        (unsampled,) = (part._replace(sample=None) for part in self._prompts(2, slots=[0]))
        for pooling in (None, PoolingParams(), PoolingParams(logits_of=(0, 1))):
            yield self._for_all_groups([unsampled._replace(prompt_request=pooling)])
        for parts in (self._prompts(2, slots=[0]), self._decodes(1)) if self.adapters else ():
            yield self._for_all_groups([part._replace(adapter=1) for part in parts])
        for size in (1, self.max_tokens) if self.dp > 1 else ():
            busy = tuple(self._prompts(size, slots=range(self.max_num_seqs)))
            yield StepPlan.for_groups(0, [busy, *[()] * (self.dp - 1)])

    def repeated(self) -> Iterator[list[StepPlan]]:
        """Yields steps that run again after an overflow. They use a dispatcher that steps of their size do not use
        otherwise."""
        sizes = powers_of_2(self.max_tokens)
        prompts = (self._prompts(size, slots=range(self.max_num_seqs)) for size in sizes)
        decodes = map(self._decodes, powers_of_2(self.max_num_seqs))
        for parts in (self.largest(), *prompts, *decodes):
            yield [plan._replace(exact=True) for plan in self._for_all_groups(parts)]

    def largest(self) -> list[SequenceStep]:
        """A step with the most tokens and samples, and the sampling parameters that take most memory."""
        long = -(-self.max_tokens // self.max_model_len)  # the number of prompts that fill a step
        decoding = max(0, self.max_num_seqs - long)
        first = self._drafted_decodes(decoding) if self.num_drafted else self._decodes(decoding)
        left = self.max_tokens - sum(len(part.token_ids) for part in first)
        prompts = self._prompts(max(left, 1), slots=range(decoding, self.max_num_seqs))
        return [
            self._with_sampling(part, _SAMPLE_SPECS[-1], _SETUP)
            for part in (*first, *self._with_prompt_logprobs(prompts))
        ]

    def _sampling_steps(self) -> Iterator[list[SequenceStep]]:
        """Decodes with each sampling kernel alone and with all of them mixed, without and with sampling state on the
        rank, and with both kinds together."""
        rows = self._decodes(min(self.max_num_seqs, 2 * len(_SAMPLE_SPECS)))
        for setup in (None, _SETUP):
            for spec in _SAMPLE_SPECS:
                yield [self._with_sampling(part, spec, setup) for part in rows]
                yield [self._with_sampling(part, spec, setup) for part in rows[:1]]
            yield [
                self._with_sampling(part, _SAMPLE_SPECS[at % len(_SAMPLE_SPECS)], setup)
                for at, part in enumerate(rows)
            ]
        both = zip(rows, cycle(product((_SETUP, None), _SAMPLE_SPECS)), strict=False)
        yield [self._with_sampling(part, spec, setup) for part, (setup, spec) in both]

    def _for_all_groups(self, parts: list[SequenceStep]) -> list[StepPlan]:
        return StepPlan.for_groups(0, [tuple(parts)] * self.dp)

    def _prompts(self, size: int, slots: Sequence[int]) -> list[SequenceStep]:
        """As few prompts as possible with `size` tokens in total, at most one for each of `slots`."""
        lengths = [self.max_model_len] * (size // self.max_model_len)
        lengths += [size % self.max_model_len] if size % self.max_model_len else []
        ids = [token % self.vocab_size for token in range(min(size, self.max_model_len))]
        return [
            self._part(slot, tuple(ids[:length]), 0) for slot, length in zip(slots, lengths, strict=False)
        ]

    def _decodes(self, count: int) -> list[SequenceStep]:
        """`count` decodes, the first of them at the last possible position."""
        starts = [self.max_model_len - 1, *[min(1, self.max_model_len - 1)] * (count - 1)][:count]
        return [self._part(slot, (LAST_SAMPLED,), start) for slot, start in enumerate(starts)]

    def _drafted_decodes(self, count: int) -> list[SequenceStep]:
        """`count` decodes with as many draft tokens as possible."""
        tokens = (0,) * min(1 + self.num_drafted, self.max_model_len)
        return [self._part(slot, tokens, 0, len(tokens) - 1) for slot in range(count)]

    def _part(self, slot: int, tokens: tuple[int, ...], start: int, num_drafted: int = 0) -> SequenceStep:
        blocks = -(-(start + len(tokens)) // self.block_size)
        return SequenceStep(
            seq_id=slot,
            slot=slot,
            token_ids=tokens,
            start=start,
            new_blocks=(self.spare_block,) * blocks,
            sample=_GREEDY,
            num_drafted=num_drafted,
        )

    def _with_sampling(
        self, part: SequenceStep, spec: SampleSpec, setup: SamplingSetup | None
    ) -> SequenceStep:
        """`part` with other sampling parameters. With a setup it gets another seq_id, since a rank keeps the setup of
        a sequence for its later steps."""
        seq_id = part.slot if setup is None else part.slot + self.max_num_seqs
        return part._replace(sample=spec, setup=setup, seq_id=seq_id)

    def _with_prompt_logprobs(self, prompts: list[SequenceStep]) -> list[SequenceStep]:
        """`prompts` with prompt logprobs of at most their last 2 * PROMPT_LOGPROBS_ROWS tokens."""
        scored = []
        for part in prompts:
            size = len(part.token_ids)
            rows = min(size, 2 * PROMPT_LOGPROBS_ROWS)
            scored.append(part._replace(prompt_request=PromptLogprobsSpec(size - rows, (0,) * rows, top=1)))
        return scored


def powers_of_2(largest: int) -> list[int]:
    """The powers of 2 up to `largest`, and `largest` itself."""
    return sorted({*(1 << bit for bit in range(largest.bit_length())), largest} - {0})


def warm_up_experts(experts: Experts, choices: int, row: Tensor) -> None:
    """Runs `experts` on every possible number of rows (up to the next power of 2) that an all-to-all may deliver.

    `row` [D] gives dtype and device, `choices` is the number of experts per token. All rows have ids of -1. Which
    kernel runs may change just above a power of 2, so these sizes are run too.
    """
    most = rows_of_slice(choices)
    for rows in sorted({size for power in powers_of_2(most) for size in (power, min(power + 1, most))}):
        ids = torch.full((rows, choices), -1, dtype=torch.int64, device=row.device)
        weights = torch.zeros(rows, choices, dtype=torch.float32, device=row.device)
        experts(DispatchedTokens(row.new_zeros(rows, len(row)), ids, weights))


@contextlib.contextmanager
def explained_failures(device: torch.device, shapes: StepShapes) -> Iterator[None]:
    """Turns out-of-memory errors and failures of Triton kernels during start into a ResourceError of one sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"a step of {shapes.max_tokens} tokens and {shapes.max_num_seqs} sequences does not fit beside the KV "
            "cache; lower gpu_memory_utilization, max_num_batched_tokens or max_num_seqs, or use more ranks"
        ) from error
    except Exception as error:
        if not (type(error).__module__.startswith("triton") or "Triton Error" in str(error)):
            raise  # for example a broken connection, since another rank has failed
        reason = " ".join(str(error).split())[:500]
        raise ResourceError(
            f"{torch.cuda.get_device_name(device)} does not run a Triton kernel in the shapes of this model: "
            f"{type(error).__name__}: {reason}; try another dtype, quantize or layout, or another card"
        ) from error
