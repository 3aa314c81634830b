"""Step batches with blocks in random places."""

from __future__ import annotations

from itertools import accumulate

import torch

from qwen3_dist.ops.batch import StepBatch
from qwen3_dist.protocol.step_plan import StepPlan
from qwen3_dist.worker.inputs import StepInputs


def random_batch(
    context_lens: tuple[int, ...], query_lens: tuple[int, ...], block_size: int, num_blocks: int = 128
) -> StepBatch:
    """What attention needs of a batch, on the CPU; the rest is empty."""
    blocks = torch.randperm(num_blocks)
    tables = torch.zeros(len(context_lens), -(-max(context_lens) // block_size), dtype=torch.int64)
    for row, length in enumerate(context_lens):
        needed = -(-length // block_size)
        tables[row, :needed], blocks = blocks[:needed], blocks[needed:]
    unused = torch.empty(0)
    return StepBatch(
        token_ids=unused,
        positions=unused,
        slots=unused,
        block_tables=tables.int(),
        table_rows=torch.arange(len(context_lens)),
        context_lens=torch.tensor(context_lens),
        query_starts=torch.tensor([0, *accumulate(query_lens)]),
        query_lens=query_lens,
        host_context_lens=context_lens,
        num_decodes=next((i for i, length in enumerate(query_lens) if length != 1), len(query_lens)),
        all_to_all=False,
        logits_rows=unused,
    )


def batch_of(plan: StepPlan, block_size: int = 4, in_single_tokens: bool = False) -> StepBatch:
    """The tensors on the CPU of a plan whose sequences bring all of their blocks along."""
    return StepInputs(8, 64, block_size, torch.device("cpu")).batch(plan, in_single_tokens)
