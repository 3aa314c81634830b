"""Steps that a GPU rank runs before it is ready, so that no later step of any shape compiles a kernel or runs out of
memory.

The kernels' variants depend on a step's sizes by way of their next powers of 2 (`ops/cuda/triton_*`), so steps of such
sizes meet them all. All ranks of a layout run the same steps, so their collectives come in the same order. Sequences
have all their blocks in the one that belongs to nobody.
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
from qwen3_dist.model.step_memory import SCORED_ROWS
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.slices import rows_of_slice
from qwen3_dist.parallel.dispatch import DispatchedTokens
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.protocol.sampling_setup import SamplingSetup
from qwen3_dist.protocol.step_limits import SchedulerLimits
from qwen3_dist.protocol.step_plan import LAST_SAMPLED, PromptScores, SampleSpec, SequenceStep, StepPlan
from qwen3_dist.settings import EngineConfig

_GREEDY = SampleSpec(temperature=0.0, top_p=1.0, top_k=0, seed=0, position=0, logprobs=None)
_DRAWS = (  # by each of the ways of `sampler`, and with log-probabilities
    _GREEDY,
    _GREEDY._replace(temperature=1.0),
    _GREEDY._replace(temperature=1.0, top_k=20),
    _GREEDY._replace(temperature=0.7, top_p=0.9, logprobs=2),
)
_ADJUSTED = SamplingSetup(
    min_p=0.1,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    repetition_penalty=1.2,
    logit_bias=((0, 1.0),),
    min_tokens=1,
    ending=(1,),
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
    """What steps of one engine can be. `spare_block` is nobody's; `guesses` are those of a sequence in a step."""

    dp: int
    max_num_seqs: int
    max_tokens: int
    max_model_len: int
    block_size: int
    vocab_size: int
    spare_block: int
    guesses: int = 0
    adapters: int = 0

    @classmethod
    def of(cls, config: EngineConfig, model: Qwen3Model, num_blocks: int, max_num_seqs: int) -> StepShapes:
        """Those of an engine whose cache has `num_blocks` blocks; the one after them is nobody's."""
        limits = SchedulerLimits.of(config, model.device.type, num_blocks)
        guesses = config.speculative.k if config.speculative is not None else 0
        longest = config.max_model_len or num_blocks * config.block_size
        return cls(
            dp=model.parallel.layout.dp,
            max_num_seqs=max_num_seqs,
            max_tokens=max(limits.max_num_batched_tokens, max_num_seqs * (1 + guesses)),
            max_model_len=min(longest, model.config.context_length),
            block_size=config.block_size,
            vocab_size=model.config.vocab_size,
            spare_block=num_blocks,
            guesses=guesses,
            adapters=len(config.lora.pairs),
        )

    @property
    def max_draws(self) -> int:
        return self.max_num_seqs * (1 + self.guesses)

    def steps(self) -> Iterator[list[StepPlan]]:
        """Each step's plans, one for each dp group. The first step is the largest there can be."""
        yield self._everywhere(self.largest())
        for size in powers_of_2(self.max_tokens):
            prompts = self._prompts(size, slots=range(self.max_num_seqs))
            yield self._everywhere(prompts)
            yield self._everywhere(self._scored(prompts))
        for size in powers_of_2(self.max_num_seqs):
            yield self._everywhere(self._decodes(size))
            if size < self.max_num_seqs:
                yield self._everywhere([*self._decodes(size), *self._prompts(2, slots=[size])])
            if self.guesses:
                yield self._everywhere(self._guessing(size))
        yield from (self._everywhere(parts) for parts in self._draws())
        (unsampled,) = (part._replace(sample=None) for part in self._prompts(2, slots=[0]))
        for reading in (None, PoolingParams(), PoolingParams(logits_of=(0, 1))):
            yield self._everywhere([unsampled._replace(reading=reading)])
        for parts in (self._prompts(2, slots=[0]), self._decodes(1)) if self.adapters else ():
            yield self._everywhere([part._replace(adapter=1) for part in parts])
        for size in (1, self.max_tokens) if self.dp > 1 else ():
            busy = tuple(self._prompts(size, slots=range(self.max_num_seqs)))
            yield StepPlan.for_groups(0, [busy, *[()] * (self.dp - 1)])

    def repeated(self) -> Iterator[list[StepPlan]]:
        """Steps that are run again after an overflow: their experts' rows travel as no first try's of the size do."""
        sizes = powers_of_2(self.max_tokens)
        prompts = (self._prompts(size, slots=range(self.max_num_seqs)) for size in sizes)
        decodes = map(self._decodes, powers_of_2(self.max_num_seqs))
        for parts in (self.largest(), *prompts, *decodes):
            yield [plan._replace(exact=True) for plan in self._everywhere(parts)]

    def largest(self) -> list[SequenceStep]:
        """A step of the most tokens and the most draws, each of which asks for what takes most memory."""
        long = -(-self.max_tokens // self.max_model_len)  # prompts that fill a step alone
        decoding = max(0, self.max_num_seqs - long)
        first = self._guessing(decoding) if self.guesses else self._decodes(decoding)
        left = self.max_tokens - sum(len(part.token_ids) for part in first)
        prompts = self._prompts(max(left, 1), slots=range(decoding, self.max_num_seqs))
        return [self._drawn(part, _DRAWS[-1], _ADJUSTED) for part in (*first, *self._scored(prompts))]

    def _draws(self) -> Iterator[list[SequenceStep]]:
        """Rows that are all drawn in one way, and rows in all ways, plain and adjusted ones and both together."""
        rows = self._decodes(min(self.max_num_seqs, 2 * len(_DRAWS)))
        for setup in (None, _ADJUSTED):
            for spec in _DRAWS:
                yield [self._drawn(part, spec, setup) for part in rows]
                yield [self._drawn(part, spec, setup) for part in rows[:1]]
            yield [self._drawn(part, _DRAWS[at % len(_DRAWS)], setup) for at, part in enumerate(rows)]
        both = zip(rows, cycle(product((_ADJUSTED, None), _DRAWS)), strict=False)
        yield [self._drawn(part, spec, setup) for part, (setup, spec) in both]

    def _everywhere(self, parts: list[SequenceStep]) -> list[StepPlan]:
        return StepPlan.for_groups(0, [tuple(parts)] * self.dp)

    def _prompts(self, size: int, slots: Sequence[int]) -> list[SequenceStep]:
        """Prompts of `size` tokens in all, as few as can have them, at most one for each of `slots`."""
        lengths = [self.max_model_len] * (size // self.max_model_len)
        lengths += [size % self.max_model_len] if size % self.max_model_len else []
        ids = [token % self.vocab_size for token in range(min(size, self.max_model_len))]
        return [
            self._part(slot, tuple(ids[:length]), 0) for slot, length in zip(slots, lengths, strict=False)
        ]

    def _decodes(self, count: int) -> list[SequenceStep]:
        """The first of them is at the last position there is."""
        starts = [self.max_model_len - 1, *[min(1, self.max_model_len - 1)] * (count - 1)][:count]
        return [self._part(slot, (LAST_SAMPLED,), start) for slot, start in enumerate(starts)]

    def _guessing(self, count: int) -> list[SequenceStep]:
        tokens = (0,) * min(1 + self.guesses, self.max_model_len)
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

    def _drawn(self, part: SequenceStep, spec: SampleSpec, setup: SamplingSetup | None) -> SequenceStep:
        """Drawn so; it is another sequence than the one without a setup, which would else go on by it."""
        seq_id = part.slot if setup is None else part.slot + self.max_num_seqs
        return part._replace(sample=spec, setup=setup, seq_id=seq_id)

    def _scored(self, prompts: list[SequenceStep]) -> list[SequenceStep]:
        """With the log-probabilities of their tokens, of the last ones where there are many."""
        scored = []
        for part in prompts:
            size = len(part.token_ids)
            rows = min(size, 2 * SCORED_ROWS)
            scored.append(part._replace(reading=PromptScores(size - rows, (0,) * rows, top=1)))
        return scored


def powers_of_2(largest: int) -> list[int]:
    """Those up to `largest`, and `largest` itself."""
    return sorted({*(1 << bit for bit in range(largest.bit_length())), largest} - {0})


def warm_up_experts(experts: Experts, choices: int, row: Tensor) -> None:
    """Computes slices of every size, of rows like `row` [D] whose experts are elsewhere: by all-to-all a rank gets as
    many rows as the routing gives it. What computes them may change between two powers of 2."""
    most = rows_of_slice(choices)
    for rows in sorted({size for power in powers_of_2(most) for size in (power, min(power + 1, most))}):
        ids = torch.full((rows, choices), -1, dtype=torch.int64, device=row.device)
        weights = torch.zeros(rows, choices, dtype=torch.float32, device=row.device)
        experts(DispatchedTokens(row.new_zeros(rows, len(row)), ids, weights))


@contextlib.contextmanager
def explained_failures(device: torch.device, shapes: StepShapes) -> Iterator[None]:
    """Too little memory and kernels that fail, before a rank is ready, as one sentence that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"a step of {shapes.max_tokens} tokens and {shapes.max_num_seqs} sequences does not fit beside the KV "
            "cache; lower gpu_memory_utilization, max_num_batched_tokens or max_num_seqs, or use more ranks"
        ) from error
    except Exception as error:
        if not (type(error).__module__.startswith("triton") or "Triton Error" in str(error)):
            raise  # another rank's failure, for example, which comes as a broken connection
        reason = " ".join(str(error).split())[:500]
        raise ResourceError(
            f"{torch.cuda.get_device_name(device)} does not run a Triton kernel in the shapes of this model: "
            f"{type(error).__name__}: {reason}; try another dtype, quantize or layout, or another card"
        ) from error
