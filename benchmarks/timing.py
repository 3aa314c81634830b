"""Times repeated calls, on the host or by the clock of the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable


def host_seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, by the host's clock."""
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    return samples


def gpu_seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, by CUDA events, which leave out launching and waiting on the host."""
    import torch

    samples = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return samples
