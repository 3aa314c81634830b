"""What a replica takes up as it runs: adapters, weights, sleep."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import TypeVar

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import EngineDeadError, QwenDistError
from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.weights_version import WeightsVersion
from serve_app.settings import LiveSettings

T = TypeVar("T")
U = TypeVar("U")
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
        to = LoraAdapters.parse(lora)
        return await self._change(lambda: self._engine.use_adapters(to, again), lambda _: "")

    async def use_weights(
        self, weights: str, keep_cache: bool = False, again: bool = False
    ) -> str | dict[str, float]:
        """Has the engine load `weights`, unless it has that version already and not `again`. Returns the seconds and
        bytes that it took, or why it cannot."""
        to = WeightsVersion.parse(weights)
        if self._engine.config.weights.is_like(to) and not again:
            return ""
        return await self._change(
            lambda: self._engine.use_weights(to, keep_cache),
            lambda loaded: {"seconds": loaded.seconds, "bytes": loaded.bytes_read},
        )

    async def sleep(self, level: int) -> str:
        """Puts the engine to sleep, or wakes it with level 0. Returns why it cannot; "" if it does."""
        return await self._change(
            lambda: self._engine.sleep(level) if level else self._engine.wake(), lambda _: ""
        )

    async def _change(self, change: Callable[[], Awaitable[T]], told: Callable[[T], U]) -> U | str:
        """What `told` makes of what `change` returns, or why the engine refuses it. If a rank is lost meanwhile, it is
        tried once more when another is in its place. Raises EngineDeadError if that is lost too, or none comes."""
        try:
            await self._engine.recovered()
            with suppress(EngineDeadError):
                return told(await change())
            await self._engine.recovered()
            return told(await change())
        except EngineDeadError:
            raise
        except QwenDistError as error:
            return str(error)
