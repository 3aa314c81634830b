"""Shared memory and gloo between real processes: the same collectives, against values known in advance."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen3_dist.parallel.communicator import Communicator, TorchCommunicator
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.shared_memory import PeerLostError, SharedMemoryCommunicator
from tests.ranks import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 3, 700)  # the last one takes several rounds through a slot


def of_rank(rank: int, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `rank` contributes: small integers, so that every sum is exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 * rank + rows)
    return torch.randint(-4, 5, (rows, 1024), generator=generator).to(dtype)


def check_collectives(parallel: ParallelContext) -> None:
    tp = parallel.tp
    n, me = tp.size, tp.rank
    for dtype in DTYPES:
        for rows in ROWS:
            every = [of_rank(rank, rows, dtype) for rank in range(n)]
            assert torch.equal(tp.all_reduce(every[me].clone()), torch.stack(every).sum(0))
            assert torch.equal(tp.all_gather(every[me]), torch.cat(every))
            gathered = tp.gather(every[me])
            assert (gathered is None) == (me != 0)
            assert gathered is None or torch.equal(gathered, torch.stack(every))
            assert torch.equal(tp.broadcast(every[me].clone()), every[0])
            tall = [of_rank(rank, rows * n, dtype) for rank in range(n)]
            piece = torch.stack(tall).sum(0)[me * rows : (me + 1) * rows]
            assert torch.equal(tp.reduce_scatter(tall[me].clone()), piece)
    strided = of_rank(me, 8).T[:4]  # not contiguous
    assert torch.equal(tp.all_gather(strided), torch.cat([of_rank(rank, 8).T[:4] for rank in range(n)]))
    assert tp.broadcast(torch.tensor([7 + me])).tolist() == [7]
    tp.barrier()


def check_all_to_all(parallel: ParallelContext) -> None:
    tp = parallel.tp
    n, me = tp.size, tp.rank
    tables = [
        [[1] * n for _ in range(n)],
        [[0] * n for _ in range(n)],
        [[700 * (source == 0) for _ in range(n)] for source in range(n)],  # only rank 0 sends
        [[5 * (to == n - 1) for to in range(n)] for _ in range(n)],  # only the last rank receives
        [[(3 * source + 5 * to) % 7 for to in range(n)] for source in range(n)],
        [[2000 if (source, to) == (0, n - 1) else 1 for to in range(n)] for source in range(n)],
    ]
    for table in tables:
        sent = [of_rank(source, sum(table[source])).split(table[source]) for source in range(n)]
        expected = torch.cat([sent[source][me] for source in range(n)])
        counts = [table[source][me] for source in range(n)]
        mine = torch.cat(sent[me])
        for known in (None, counts):
            received, received_counts = tp.all_to_all(mine, table[me], known)
            assert received_counts == counts
            assert torch.equal(received, expected)
        ids, _ = tp.all_to_all(torch.arange(sum(table[me])), table[me])  # one-dimensional, int64
        assert ids.shape == (sum(counts),) and ids.dtype == torch.int64


def check_bit_identical_sums(parallel: ParallelContext) -> None:
    tp = parallel.tp
    mine = torch.randn(64, 1024, generator=torch.Generator().manual_seed(tp.rank))
    reduced = tp.all_reduce(mine)
    everybody = tp.all_gather(reduced).unflatten(0, (tp.size, 64))
    assert all(torch.equal(everybody[0], copy) for copy in everybody)


def check_kinds(parallel: ParallelContext) -> None:
    print(type(parallel.tp).__name__, [g.size for g in (parallel.tp, parallel.ep, parallel.etp)])


def check_survivors(parallel: ParallelContext) -> None:
    tp: Communicator = parallel.tp
    tp.barrier()
    if tp.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(PeerLostError, match="ended"):
        tp.all_reduce(torch.ones(4))
    print(time.monotonic() - started)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("check", [check_collectives, check_all_to_all])
def test_collectives_give_what_their_definition_says(
    check: Callable[[ParallelContext], None], world: int, shared_memory: bool
) -> None:
    run_ranks(check, f"tp={world}", shared_memory)


@pytest.mark.parametrize("check", [check_collectives, check_all_to_all])
def test_collectives_staged_through_the_host_do_too(check: Callable[[ParallelContext], None]) -> None:
    run_ranks(check, "tp=2", staged=True)


def test_replicated_sums_are_bit_identical_on_every_rank() -> None:
    run_ranks(check_bit_identical_sums, "tp=4")


def test_ranks_of_one_host_take_shared_memory_and_leave_no_file_of_it() -> None:
    before = set(Path("/dev/shm").iterdir())
    printed = run_ranks(check_kinds, "tp=4,ep=2")
    assert printed == [f"{SharedMemoryCommunicator.__name__} [4, 2, 2]\n"] * 4
    assert not {p for p in set(Path("/dev/shm").iterdir()) - before if "qwen3_dist" in p.name}


def test_without_shared_memory_ranks_take_gloo() -> None:
    printed = run_ranks(check_kinds, "tp=2", shared_memory=False)
    assert printed == [f"{TorchCommunicator.__name__} [2, 1, 2]\n"] * 2


def test_a_killed_peer_is_noticed_within_five_seconds() -> None:
    survivor, _ = run_ranks(check_survivors, "tp=2", dies=1)
    assert float(survivor) < 5
