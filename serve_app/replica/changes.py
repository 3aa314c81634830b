"""What a replica takes up as it runs: adapters, weights, sleep."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import EngineDeadError, QwenDistError
from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.weights_version import WeightsVersion
from serve_app.settings import LiveSettings

T = TypeVar("T")
logger = logging.getLogger("qwen3_dist.replica")


class ChangesAsItRuns:
    """The part of a replica that changes its engine. Ingresses call the methods that return problems."""

    _engine: AsyncEngine
    _live_problem = ""  # why it has not taken up what it was told last

    async def _take_up(self, live: LiveSettings) -> None:
        problems: list[object] = []
        try:
            problems.append(await self.use_weights(str(live.weights)))
            if not live.asleep:
                problems.append(await self.sleep(0))
            if not self._engine.asleep:  # else they would wait until it wakes
                problems.append(await self.use_adapters(str(live.lora)))
            if live.asleep:
                problems.append(await self.sleep(live.asleep))
        except EngineDeadError as error:
            problems.append(str(error))
        self._live_problem = "; ".join(each for each in problems if isinstance(each, str) and each)
        if self._live_problem:
            logger.error("changed settings were not taken up: %s", self._live_problem)

    async def use_adapters(self, lora: str, again: Collection[str] = ()) -> str:
        """Has the engine use the adapters `lora`, and read again the files of those whose names are in `again`.
        Returns why it cannot; "" if it does."""

        async def change() -> str:
            await self._engine.use_adapters(LoraAdapters.parse(lora), again)
            return ""

        return await self._told(change)

    async def use_weights(
        self, weights: str, keep_cache: bool = False, again: bool = False
    ) -> str | dict[str, float]:
        """Has the engine load `weights`, unless it has that version already and not `again`. Returns the seconds and
        bytes that it took, or why it cannot."""

        async def change() -> str | dict[str, float]:
            to = WeightsVersion.parse(weights)
            if self._engine.config.weights.is_like(to) and not again:
                return ""
            loaded = await self._engine.use_weights(to, keep_cache)
            return {"seconds": loaded.seconds, "bytes": loaded.bytes_read}

        return await self._told(change)

    async def sleep(self, level: int) -> str:
        """Puts the engine to sleep, or wakes it with level 0. Returns why it cannot; "" if it does."""

        async def change() -> str:
            await (self._engine.sleep(level) if level else self._engine.wake())
            return ""

        return await self._told(change)

    async def _told(self, change: Callable[[], Awaitable[T]]) -> T | str:
        """What `change` returns, or why the engine refuses it. Raises EngineDeadError if a rank is lost meanwhile."""
        try:
            await self._engine.recovered()
            return await change()
        except EngineDeadError:
            raise
        except QwenDistError as error:
            return str(error)
