"""What callers of an `AsyncEngine` ask of its ranks between two steps."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from functools import partial
from typing import TypeVar

from qwen3_dist.engine.engine import Engine
from qwen3_dist.engine.expert_load import ExpertLoad
from qwen3_dist.engine.rank_pace import RankPace
from qwen3_dist.engine.weight_changes import WeightsLoaded
from qwen3_dist.errors import QwenDistError, RequestError
from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.protocol.sampling_setup import SamplingSetup
from qwen3_dist.weights.adapter_files import with_digests
from qwen3_dist.weights.version_files import with_digest
from qwen3_dist.weights_version import WeightsVersion

T = TypeVar("T")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.5  # between two questions whether a grammar is built
Answered = Callable[[T | QwenDistError], None]


class RankQuestions(ABC):
    """Asks in the engine's thread. Every method raises EngineDeadError if the engine dies meanwhile."""

    _engine: Engine
    _adapters_lock: asyncio.Lock  # one change at a time, so that each begins with the adapters of the last

    @abstractmethod
    async def _ask(self, question: Callable[[Answered[T]], object]) -> T:
        """Returns what the engine's thread answers to `question`, at once or some steps later. Raises the answer if it
        is an error."""

    async def expert_load(self) -> ExpertLoad:
        """Tokens that chose each expert of each MoE layer so far, and where the experts lie."""
        return await self._ask(lambda answer: answer(self._engine.experts.load()))

    async def rebalance_experts(self) -> list[int]:
        """Moves experts to balance the load since the last call; returns the layers that changed. Steps go on."""
        return await self._ask(self._engine.experts.begin)

    async def rank_pace(self) -> RankPace | None:
        """How long a step takes each rank without waiting for others; None if that is not known."""
        return await self._ask(lambda answer: answer(self._engine.paces.read()))

    async def _await_grammar(self, setup: SamplingSetup) -> None:
        """Waits until the ranks have built the setup's grammar. Steps of other requests go on meanwhile."""

        def build(answer: Callable[[bool | QwenDistError], None]) -> None:
            try:
                answer(self._engine.grammars.build(setup))
            except RequestError as error:
                answer(error)

        pause_s = _FIRST_PAUSE_S
        while not self._engine.grammars.has(setup) and not await self._ask(build):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def use_adapters(self, adapters: LoraAdapters, again: Collection[str] = ()) -> None:
        """Gives all ranks `adapters` in place of those that they have, while steps go on. The files of those that they
        have are read only if their names are in `again`.

        Sequences keep the adapter that they began with. Raises CheckpointError or ResourceError if an adapter cannot
        be loaded; then everything stays as it is.
        """
        async with self._adapters_lock:
            known = self._engine.config.lora
            read = await asyncio.to_thread(with_digests, adapters, self._engine.model_config, known, again)
            if read != known:
                await self._ask(partial(self._engine.changes.adapters.begin, read))

    async def use_weights(self, weights: WeightsVersion, keep_cache: bool = False) -> WeightsLoaded:
        """Gives all ranks `weights` in place of those that they have. Sequences wait meanwhile, and go on with the new
        weights: their KV is computed anew, unless it is to be kept. The prefix cache is empty afterwards. While the
        engine sleeps, the weights are only checked, and loaded when it wakes.

        Raises CheckpointError or ResourceError if a rank cannot load them; then everything stays as it is.
        """
        engine = self._engine
        arguments = (weights, engine.model_config, engine.config.hf_overrides)
        read = await asyncio.to_thread(with_digest, *arguments)
        return await self._ask(partial(engine.changes.weights.replace, read, keep_cache))

    @property
    def asleep(self) -> int:
        """The level of sleep; 0: awake."""
        return self._engine.changes.weights.asleep

    async def sleep(self, level: int = 1) -> None:
        """Gives up the memory of the KV cache and, on a GPU, moves the weights to host memory; at level 2 weights are
        dropped. Sequences wait until `wake`."""
        await self._ask(partial(self._engine.changes.weights.sleep, level))

    async def wake(self) -> None:
        """Ends `sleep`; sequences compute their KV anew. Raises ResourceError if a rank lacks memory, and
        CheckpointError or ResourceError if weights that were dropped cannot be loaded; then the engine sleeps on."""
        await self._ask(self._engine.changes.weights.wake)
