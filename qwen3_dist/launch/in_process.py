"""The executor for a single rank, which runs in the engine's process."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from qwen3_dist.expert_placement import Placements
from qwen3_dist.launch.base import Executor, RankPlace
from qwen3_dist.launch.card_use import use_of_cards
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.protocol.messages import Progress
from qwen3_dist.protocol.step_plan import StepPlan, StepResult
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.source import resolve_model
from qwen3_dist.worker import cards
from qwen3_dist.worker.rank import describe_failure
from qwen3_dist.worker.runner import ModelRunner, StepOutput
from qwen3_dist.worker.shard import MemoryShare, count_blocks, held_bytes, load_shard, set_threads


class InProcessExecutor(Executor):
    """Loads the whole model in this process. A step is a function call, from any thread."""

    def __init__(
        self, config: EngineConfig, placements: Placements, progress: Progress | None = None
    ) -> None:
        os.environ.update(config.rank_env)
        device, card, memory = torch.device("cpu"), None, MemoryShare()
        if cards.local_device(config.device) == "cpu":
            set_threads(config, ranks_on_host=1)
        else:
            gc.collect()  # an earlier engine's runner refers to itself
            torch.cuda.empty_cache()  # frees what that engine left
            device, card = cards.set_card(torch.cuda.current_device())
            memory = MemoryShare(1, *use_of_cards([card], config).free_bytes)
        self.device = device.type
        self._card = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        self.depth = 2 if config.overlap and device.type == "cuda" else 1
        with _explained_out_of_memory("loading the model"):
            path = resolve_model(config.model, config.revision)
            parallel = ParallelContext.single(config.deterministic)
            model = load_shard(config, path, placements, parallel, device, progress)
            self.num_blocks = count_blocks(config, model, memory)
            runner = ModelRunner(model, self.num_blocks, config, path)
            runner.warm_up()
        self._runner: ModelRunner | None = runner
        self.backends = runner.backends
        self.collectives = model.parallel.collectives
        self.ranks = (RankPlace(0, socket.gethostname(), os.getpid(), card, held_bytes(device)),)
        self._launched: deque[StepOutput] = deque()

    def submit(self, plans: Sequence[StepPlan]) -> None:
        """Starts the step on a GPU, or runs it on a CPU."""
        assert self._runner is not None, "the executor was shut down"
        with self._card, _explained_out_of_memory("running a step"):
            output = self._runner.launch(plans[0])
        assert output is not None
        self._launched.append(output)

    def collect(self, limit_s: float | None = None) -> list[StepResult | None]:
        with self._card, _explained_out_of_memory("running a step"):
            return [self._launched.popleft().result()]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        with self._card:
            return [getattr(self._runner, method)(*arguments)]

    def check(self) -> None:
        pass

    def shutdown(self) -> None:
        self._runner = None


@contextlib.contextmanager
def _explained_out_of_memory(activity: str) -> Iterator[None]:
    """Turns torch.OutOfMemoryError into ResourceError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise describe_failure(error, 0, activity) from error
