"""Shared memory and gloo between real processes: the same collectives, against values known in advance."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qwen3_dist.errors import EngineDeadError
from qwen3_dist.ops.cpu.build import library
from qwen3_dist.parallel.communicator import Communicator, GlooCommunicator
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.native_shared_memory import NativeSharedMemoryCommunicator, fastest_communicator
from qwen3_dist.parallel.shared_memory import (
    PeerLostError,
    SharedMemoryCommunicator,
    connect_shared_memory,
)
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
            residual = of_rank(n, rows, dtype)
            added = tp.add_all_reduced(residual, every[me].clone())
            assert torch.equal(added, residual + torch.stack(every).sum(0))
            assert torch.equal(tp.all_gather(every[me]), torch.cat(every))
            gathered = tp.gather(every[me])
            assert (gathered is None) == (me != 0)
            assert gathered is None or torch.equal(gathered, torch.cat(every, dim=1))
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


def random_of_rank(rank: int, elements: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(1000 * rank + elements)).to(dtype)


def check_native_equals_python(parallel: ParallelContext) -> None:
    """With slots of 256 bytes, so that payloads of every size and dtype go in rounds and end inside one."""
    group = dist.new_group(list(range(parallel.tp.size)))
    native = connect_shared_memory(group, NativeSharedMemoryCommunicator, slot_bytes=256)
    python = connect_shared_memory(group, SharedMemoryCommunicator, slot_bytes=256)
    assert type(native) is NativeSharedMemoryCommunicator and type(python) is SharedMemoryCommunicator
    n, me = native.size, native.rank
    for dtype in (*DTYPES, torch.int64, torch.uint8):
        for elements in (0, 1, 7, 63, 64, 65, 128, 1001):
            x, rows = random_of_rank(me, elements, dtype), 1 if elements % 7 else 7
            tall = random_of_rank(me, elements * n, dtype)
            shared = random_of_rank(n, elements, dtype)
            calls: list[Callable[[Communicator], Tensor | None]] = [
                lambda c, x=x: c.all_reduce(x.clone()),
                lambda c, x=x, shared=shared: c.add_all_reduced(shared, x.clone()),
                lambda c, tall=tall: c.reduce_scatter(tall.clone()),
                lambda c, x=x: c.all_gather(x),
                lambda c, x=x, rows=rows: c.gather(x.view(rows, -1) if len(x) else x.view(1, 0)),
                lambda c, x=x: c.broadcast(x.clone()),
            ]
            for call in calls:
                expected, got = call(python), call(native)
                assert (expected is None) == (got is None)
                assert expected is None or got is None or torch.equal(got, expected)
    column = torch.arange(12.0).view(4, 3).T + me  # not contiguous
    assert torch.equal(native.all_reduce(column), python.all_reduce(column))
    assert torch.equal(native.add_all_reduced(column, column), python.add_all_reduced(column, column))
    native.barrier()
    native.close()
    python.close()


def check_kinds_meet(parallel: ParallelContext) -> None:
    """With slots in which the longest payloads take dozens of rounds. They would take ten thousands in slots of a few
    KiB, and in each all ranks wait for each other: longer than its work if they share cores."""
    group = dist.new_group(list(range(parallel.tp.size)))
    kind = NativeSharedMemoryCommunicator if parallel.tp.rank % 2 else SharedMemoryCommunicator
    mixed = connect_shared_memory(group, kind, slot_bytes=1 << 18)
    assert type(mixed) is kind
    check_collectives(replace(parallel, tp=mixed))
    check_all_to_all(replace(parallel, tp=mixed))
    mixed.close()


def check_kinds(parallel: ParallelContext) -> None:
    print(type(parallel.tp).__name__, [g.size for g in (parallel.tp, parallel.ep, parallel.etp)])


def _survive(tp: Communicator) -> None:
    """Rank 1 dies while rank 0 waits for it inside a collective."""
    tp.barrier()
    if tp.rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(PeerLostError, match="ended"):
        tp.all_reduce(torch.ones(4))
    print(time.monotonic() - started)


def check_survivors(parallel: ParallelContext) -> None:
    assert type(parallel.tp) is fastest_communicator()
    _survive(parallel.tp)


def check_survivors_in_python(parallel: ParallelContext) -> None:
    communicator = connect_shared_memory(dist.new_group([0, 1]), SharedMemoryCommunicator)
    assert type(communicator) is SharedMemoryCommunicator
    _survive(communicator)


def check_refusals(parallel: ParallelContext) -> None:
    """In NCCL, what begins after an abort might wait for ever. Here both ranks would meet in it, and return."""
    tp, rows = parallel.tp, torch.ones(2, 4)
    every_collective: tuple[Callable[[], object], ...] = (
        lambda: tp.all_reduce(rows),
        lambda: tp.all_gather(rows),
        lambda: tp.reduce_scatter(rows),
        lambda: tp.gather(rows),
        lambda: tp.broadcast(rows),
        lambda: tp.all_to_all(rows, [1, 1]),
        lambda: tp.start_even_all_to_all(rows),
        tp.barrier,
    )
    for collective in every_collective:
        collective()
    with (
        patch.object(ParallelContext, "_uses_nccl", True),
        patch("torch.distributed.distributed_c10d._abort_process_group"),
    ):
        parallel.abort()
    for collective in every_collective:
        with pytest.raises(EngineDeadError, match="aborted"):
            collective()


def check_absent_peer(parallel: ParallelContext) -> None:
    for kind in (fastest_communicator(), SharedMemoryCommunicator):
        communicator = connect_shared_memory(dist.new_group([0, 1]), kind, timeout_s=0.2)
        assert communicator is not None
        if communicator.rank == 0:
            with pytest.raises(PeerLostError, match="did not answer within"):
                communicator.all_reduce(torch.ones(4))
    dist.barrier()


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
    def abandoned() -> set[Path]:
        files = Path("/dev/shm").glob("qwen3_dist-*")
        return {file for file in files if not Path("/proc", file.name.split("-")[1]).exists()}

    before = abandoned()
    printed = run_ranks(check_kinds, "tp=4,ep=2")
    assert printed == [f"{fastest_communicator().__name__} [4, 2, 2]\n"] * 4
    assert not abandoned() - before


def test_without_shared_memory_ranks_take_gloo() -> None:
    printed = run_ranks(check_kinds, "tp=2", shared_memory=False)
    assert printed == [f"{GlooCommunicator.__name__} [2, 1, 2]\n"] * 2


@pytest.mark.parametrize("check", [check_survivors, check_survivors_in_python])
def test_a_peer_killed_while_others_wait_is_noticed_within_five_seconds(
    check: Callable[[ParallelContext], None],
) -> None:
    survivor, _ = run_ranks(check, "tp=2", dies=1)
    assert float(survivor) < 5


def test_collectives_that_begin_after_an_abort_are_refused() -> None:
    run_ranks(check_refusals, "tp=2", shared_memory=False)


def test_a_peer_that_stays_away_is_given_up_after_the_timeout() -> None:
    run_ranks(check_absent_peer, "tp=2")


@pytest.mark.skipif(library() is None, reason="no kernels could be built here")
@pytest.mark.parametrize("world", [2, 3, 4])
def test_native_collectives_give_the_bits_of_those_in_python(world: int) -> None:
    run_ranks(check_native_equals_python, f"tp={world}")


@pytest.mark.skipif(library() is None, reason="no kernels could be built here")
def test_ranks_with_and_without_kernels_can_share_a_group() -> None:
    run_ranks(check_kinds_meet, "tp=4")
