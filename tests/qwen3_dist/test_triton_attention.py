"""The Triton kernel against plain torch, run by Triton's interpreter, so that no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.cuda.triton_attention import attention, splits_for
from qwen3_dist.ops.torch_attention import gathered_attention
from tests.batches import random_batch


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 4, 16), (8, 2, 24), (6, 1, 64)])
def test_it_equals_gathered_attention(
    heads: int, groups: int, dim: int, window: int | None, splits: int
) -> None:
    torch.manual_seed(0)
    batch = random_batch(context_lens=(1, 70, 17, 9, 150), query_lens=(1, 1, 1, 9, 23), block_size=4)
    keys, values = torch.randn(2, 128, 4, groups, dim)
    q = torch.randn(batch.query_starts[-1], heads, dim)
    where = (batch.block_tables, batch.table_rows, batch.context_lens, batch.query_starts)
    got = attention(q, LayerCache(keys, values), *where, window, longest=23, splits=splits)
    expected = gathered_attention(q, LayerCache(keys, values), batch, window)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_lone_query_is_split_and_a_full_gpu_is_not() -> None:
    assert splits_for(1, 8, 132) == 16
    assert splits_for(16, 8, 132) == 2
    assert splits_for(256, 8, 132) == 1
