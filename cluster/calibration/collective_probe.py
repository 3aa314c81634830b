"""Measures collectives between rank processes. `measure` starts them; they run this module as a program."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from cluster.hardware import Link
from qwen3_dist.errors import ResourceError
from qwen3_dist.layout import Layout
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.worker import cards

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
BYTES = (2 << 10, 16 << 10, 128 << 10, 1 << 20, 4 << 20)
_TIMEOUT_S = 300.0
_COLUMNS = 512  # of a bf16 row of 1 KiB


def measure(world: int, device: str) -> dict[str, list[tuple[int, float]]]:
    """(bytes, seconds) of each kind of collective among `world` ranks of this host.

    Bytes are counted as in `cluster.planning.collectives`: the whole gathered or scattered tensor, the tensor that
    each rank reduces, or the bytes that each rank sends. Raises ResourceError if a rank fails.
    """
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
    command = [
        sys.executable,
        "-m",
        "cluster.calibration.collective_probe",
        str(store.port),
        str(world),
        device,
    ]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        answers = [rank.communicate(timeout=_TIMEOUT_S) for rank in ranks]
    except subprocess.TimeoutExpired:
        raise ResourceError(f"{world} ranks did not finish their collectives in {_TIMEOUT_S:g} s") from None
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank, (_, errors) in zip(ranks, answers, strict=True):
        if rank.returncode:
            last = errors.strip().splitlines()[-1] if errors.strip() else f"code {rank.returncode}"
            raise ResourceError(f"a rank failed while collectives were measured: {last}")
    measured: dict[str, list[tuple[int, float]]] = json.loads(answers[0][0])
    return measured


def fit(points: list[tuple[int, float]], share: float) -> Link:
    """Fits latency and bandwidth to `points` of (bytes, seconds), where `share` of the bytes crosses the link.

    Least squares of the relative error of t = latency + share * bytes / rate, with the latency at least 0 and the rate
    positive.
    """
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    slope /= sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = max(slope, 1e-15)
    return Link(max(0.0, mean_y - slope * mean_x), share / slope)


def link(points: dict[str, list[tuple[int, float]]]) -> Link:
    """The link of two ranks, with fits for each kind of collective, from what `measure` returns."""
    shares = {"all_reduce": 1.0, "all_gather": 0.5, "reduce_scatter": 0.5, "all_to_all": 0.5, "send": 1.0}
    links = {kind: fit(points[kind], share) for kind, share in shares.items()}
    return Link(links["all_gather"].latency_s, links["all_gather"].bytes_per_s, **links)  # type: ignore[arg-type]


def measure_rank(
    store: dist.Store, world: int, device_type: str, rank: int, card: int, shared_memory: bool = True
) -> dict[str, list[tuple[int, float]]]:
    """What `measure` returns, on one of the ranks, which meet at `store`. `card` is this rank's GPU.

    CPU ranks use the network without `shared_memory`. Raises ResourceError if the GPU cannot be used.
    """
    torch.set_num_threads(1)
    device = cards.set_card(card)[0] if device_type == "cuda" else torch.device("cpu")
    parallel = ParallelContext.connect(
        Layout(tp=world), rank, store, device, timeout_s=_TIMEOUT_S, shared_memory=shared_memory
    )
    measured = {kind: [(size, _time(parallel, kind, size, device)) for size in BYTES] for kind in COLLECTIVES}
    parallel.close()
    return measured


def _run_rank(port: int, world: int, device_type: str, rank: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, world, is_master=False)
    measured = measure_rank(store, world, device_type, rank, card=rank)
    if rank == 0:
        print(json.dumps(measured))


def _time(parallel: ParallelContext, kind: str, size: int, device: torch.device) -> float:
    """Median seconds of one collective that moves `size` bytes."""
    group = parallel.tp
    rows = max(group.size, size // (2 * _COLUMNS) // group.size * group.size)
    x = torch.ones(rows, _COLUMNS, dtype=torch.bfloat16, device=device)
    part, counts = x[: rows // group.size].clone(), [rows // group.size] * group.size
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: group.all_reduce(x),
        "all_gather": lambda: group.all_gather(part),
        "reduce_scatter": lambda: group.reduce_scatter(x),
        "all_to_all": lambda: group.all_to_all(x, counts, counts),
        "send": lambda: _round_trip(x, parallel.coords.rank),
    }
    call, samples = calls[kind], []
    for turn in range(60 if size <= 1 << 18 else 15):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn >= 5:
            samples.append(time.perf_counter() - started)
    return statistics.median(samples) / (2 if kind == "send" else 1)


def _round_trip(x: torch.Tensor, rank: int) -> None:
    """Sends `x` from rank 0 to rank 1 and back, as pipeline stages send."""
    if rank == 0:
        dist.send(x, 1)
        dist.recv(x, 1)
    elif rank == 1:
        dist.recv(x, 0)
        dist.send(x, 0)


if __name__ == "__main__":
    _run_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
