"""The autoscaling rule of Ray Serve.

The rule is `ray.serve.autoscaling_policy.replica_queue_length_autoscaling_policy` with its delay logic (Ray 2.60):
ongoing requests, averaged over the look-back period, divided by the target per replica. A test compares both. Serve
decides every 0.1 s on loads that are reported every `metrics_interval_s`; here it decides when they are reported.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from qwen3_dist.errors import ConfigError

_EPSILON_S = 1e-6  # as in Serve: sums of floating-point times may fall short of a delay by rounding


@dataclass(frozen=True)
class AutoscalingConfig:
    """Serve's settings of the same names; the defaults are those of our `ServiceConfig`."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 16.0
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    metrics_interval_s: float = 2.0
    look_back_period_s: float = 10.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"min_replicas={self.min_replicas} must lie between 1 and max_replicas={self.max_replicas}"
            )
        for name in ("target_ongoing_requests", "metrics_interval_s", "look_back_period_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be positive, not {value:g}")
        for name in ("upscale_delay_s", "downscale_delay_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must not be negative, not {value:g}")

    @property
    def is_fixed(self) -> bool:
        return self.min_replicas == self.max_replicas


class Autoscaler:
    """Decides the number of replicas. Keeps since when it has wanted to scale up or down."""

    def __init__(self, config: AutoscalingConfig) -> None:
        self.target = config.min_replicas
        self._config = config
        self._direction = 0  # 1: wants to scale up, -1: down
        self._since_s: float | None = None

    def decide(self, now_s: float, running: int, ongoing_requests: float) -> int:
        """The target number of replicas.

        `running` is the number of replicas that take requests, without those starting. `ongoing_requests` is the mean
        over the look-back period of all requests in replicas and waiting at the ingress.
        """
        config = self._config
        wanted = self.target
        if running > 0:
            error_ratio = ongoing_requests / (config.target_ongoing_requests * running)
            wanted = math.ceil(running + 1.0 * (running * error_ratio - running))  # rounds as Serve does
        decided = self._after_delay(now_s, max(1, wanted))
        self.target = max(config.min_replicas, min(config.max_replicas, decided))
        return self.target

    def _after_delay(self, now_s: float, wanted: int) -> int:
        direction = (wanted > self.target) - (wanted < self.target)
        if direction != self._direction or direction == 0:
            self._direction, self._since_s = direction, None
        if direction == 0:
            return self.target
        if self._since_s is None:
            self._since_s = now_s
        delay_s = self._config.upscale_delay_s if direction > 0 else self._config.downscale_delay_s
        if now_s - self._since_s + _EPSILON_S < delay_s:
            return self.target
        self._direction, self._since_s = 0, None
        return wanted


class MeanLoad:
    """The time-weighted mean of a count over the last `look_back_s` seconds."""

    def __init__(self, look_back_s: float) -> None:
        self._look_back_s = look_back_s
        self._count = 0
        self._changed_s = 0.0
        self._area = 0.0  # integral of the count from 0 to `_changed_s`
        self._read: deque[tuple[float, float]] = deque([(0.0, 0.0)])  # (time, area) of past readings

    def set(self, now_s: float, count: int) -> None:
        self._area += self._count * (now_s - self._changed_s)
        self._count, self._changed_s = count, now_s

    def mean(self, now_s: float) -> float:
        """The mean over the look-back period, or since time 0 if that is shorter.

        Exact if the period starts at a time of an earlier call; otherwise interpolates between two calls.
        """
        self.set(now_s, self._count)
        start_s = max(0.0, now_s - self._look_back_s)
        while len(self._read) > 1 and self._read[1][0] <= start_s + _EPSILON_S:
            self._read.popleft()
        (before_s, area), after = self._read[0], (self._read[1] if len(self._read) > 1 else None)
        after_s, after_area = after or (now_s, self._area)
        if after_s > before_s and start_s > before_s + _EPSILON_S:
            area += (after_area - area) * (start_s - before_s) / (after_s - before_s)
        self._read.append((now_s, self._area))
        return (self._area - area) / (now_s - start_s) if now_s > start_s else float(self._count)
