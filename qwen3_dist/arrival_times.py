"""When requests are sent: Poisson or gamma arrivals at a mean rate."""

from __future__ import annotations

import itertools
import math
import random


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which each of `count` requests is sent, in order; all 0 for an infinite `rate`.

    Gaps follow a gamma distribution of shape `burstiness` and mean 1/`rate`: 1 is a Poisson process, less comes in
    bursts, infinity is evenly spaced. Times are scaled so that the last is count/rate for every seed; otherwise
    the rate of a short run would differ from the one that was asked for.
    """
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(seed)
    even = math.isinf(burstiness)
    times = list(
        itertools.accumulate(1.0 if even else rng.gammavariate(burstiness, 1.0) for _ in range(count))
    )
    total = times[-1] if times else 0.0
    if total == 0:  # so bursty that every gap is below the smallest float
        return [0.0] * count
    return [time * (count / rate) / total for time in times]
