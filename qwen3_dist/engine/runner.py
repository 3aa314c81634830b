"""What one rank does with a plan: build the batch, run the model, sample.

Legend as in `layers/batch.py`: T tokens of the step, S sequences, L rows whose logits are wanted.
"""

from __future__ import annotations

import torch

from qwen3_dist.engine import kv_cache
from qwen3_dist.engine.plan import StepPlan, StepResult
from qwen3_dist.engine.sampler import sample
from qwen3_dist.layers.batch import StepBatch
from qwen3_dist.model import Qwen3Model


class ModelRunner:
    """One rank's model with its KV cache."""

    def __init__(self, model: Qwen3Model, num_blocks: int, block_size: int) -> None:
        weight = model.tok_emb.weight
        self.model = model
        self.block_size = block_size
        self._device = weight.device
        self._cache = kv_cache.allocate(
            model.config, model.parallel.layout, num_blocks, block_size, weight.dtype, weight.device
        )

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult | None:
        """Runs one step. The result is there on tp rank 0, None on the other ranks."""
        logits = self.model(make_batch(plan, self.block_size, self._device), self._cache)
        if logits is None:
            return None
        specs = [sequence.sample for sequence in plan.sequences if sequence.sample is not None]
        token_ids, logprobs = sample(logits, specs)
        return StepResult(plan.step, tuple(token_ids), tuple(logprobs))


def make_batch(plan: StepPlan, block_size: int, device: torch.device) -> StepBatch:
    """The plan's tensors on `device`."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logits_rows: list[int] = []
    longest = max(len(sequence.block_table) for sequence in plan.sequences)
    for sequence in plan.sequences:
        token_ids.extend(sequence.token_ids)
        for position in range(sequence.start, sequence.start + len(sequence.token_ids)):
            positions.append(position)
            slots.append(sequence.block_table[position // block_size] * block_size + position % block_size)
        if sequence.sample is not None:
            logits_rows.append(len(token_ids) - 1)
    query_lens = tuple(len(sequence.token_ids) for sequence in plan.sequences)
    context_lens = tuple(sequence.start + len(sequence.token_ids) for sequence in plan.sequences)
    tables = [(*s.block_table, *[0] * (longest - len(s.block_table))) for s in plan.sequences]
    num_decodes = next((i for i, length in enumerate(query_lens) if length != 1), len(query_lens))
    return StepBatch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        block_tables=torch.tensor(tables, device=device),
        context_lens=torch.tensor(context_lens, device=device),
        query_lens=query_lens,
        host_context_lens=context_lens,
        num_decodes=num_decodes,
        logits_rows=torch.tensor(logits_rows, dtype=torch.int64, device=device),
    )
