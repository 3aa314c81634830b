"""The executor of a world of one: the rank lives in the engine's own process."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from qwen3_dist.engine.plan import StepPlan, StepResult
from qwen3_dist.engine.runner import ModelRunner, StepOutput
from qwen3_dist.engine.scheduler import SchedulerLimits
from qwen3_dist.errors import ConfigError, ResourceError
from qwen3_dist.executor.base import Executor
from qwen3_dist.executor.rank import count_blocks, load_shard, set_threads
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.loader import Progress


class InProcessExecutor(Executor):
    """Loads the whole model here; a step is a function call."""

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        if config.layout.world != 1:
            raise ConfigError(f"executor in_process runs one rank and layout {config.layout} has more")
        device = torch.device(local_device(config.device))
        if device.type == "cpu":
            set_threads(config, ranks_on_host=1)
        model = load_shard(config, ParallelContext.single(), device, progress)
        self.device = device.type
        self.depth = 2 if config.overlap and device.type == "cuda" else 1
        self.num_blocks = count_blocks(config, model, ranks_on_host=1)
        limits = SchedulerLimits.of(config, self.device, self.num_blocks)
        runner = ModelRunner(model, self.num_blocks, config, limits.max_num_seqs)
        self._runner: ModelRunner | None = runner
        self.backends = runner.backends
        self._launched: deque[StepOutput] = deque()

    def submit(self, plans: Sequence[StepPlan]) -> None:
        """On a GPU this returns while the step runs; on a CPU it has run."""
        assert self._runner is not None, "the executor was shut down"
        output = self._runner.launch(plans[0])
        assert output is not None
        self._launched.append(output)

    def collect(self) -> list[StepResult | None]:
        return [self._launched.popleft().result()]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(self._runner, method)(*arguments)]

    def check(self) -> None:
        pass

    def shutdown(self) -> None:
        self._runner = None


def local_device(device: str) -> str:
    """ "cpu" or "cuda" for a rank of this host. Raises ResourceError for a GPU that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ResourceError("device=cuda was asked for and torch sees no GPU here; use device=cpu")
    return device
