"""Starts and drives ranks. `make_executor` picks the executor; Ray is imported only if ranks run as Ray actors,
and torch only if they do not."""

from __future__ import annotations

import importlib.util

from qwen3_dist.errors import ConfigError
from qwen3_dist.expert_placement import Placements
from qwen3_dist.launch.base import Executor, Grouping
from qwen3_dist.protocol.messages import Progress
from qwen3_dist.settings import EngineConfig, runs_in_process


def require_device(config: EngineConfig) -> None:
    """Raises ResourceError if ranks must run on GPUs of this host and torch sees none."""
    if config.device == "cuda" and (runs_in_process(config) or not _in_ray(config)):
        from qwen3_dist.worker.cards import local_device

        local_device(config.device)


def make_executor(config: EngineConfig, placements: Placements, progress: Progress | None = None) -> Executor:
    """Loads the model on the ranks of `config.layout`, experts placed by `placements`. Returns when all are ready.

    Calls `progress(done_bytes, total_bytes)` while weights load. Raises CheckpointError, ResourceError,
    ParallelLayoutError or EngineDeadError; then no process is left behind.
    """
    if runs_in_process(config):
        from qwen3_dist.launch.in_process import InProcessExecutor

        return InProcessExecutor(config, placements, progress)
    from qwen3_dist.launch.rank_group import RankGroupExecutor

    if not _in_ray(config):
        from qwen3_dist.launch.processes import ProcessLauncher

        return RankGroupExecutor(config, ProcessLauncher(config), placements, progress)
    if not _has_ray():
        raise ConfigError("executor ray needs the ray package; install it or use executor=processes")
    from qwen3_dist.launch.ray_ranks import RayLauncher

    return RankGroupExecutor(config, RayLauncher(config), placements, progress)


def _in_ray(config: EngineConfig) -> bool:
    """Whether ranks are Ray actors rather than processes of this host."""
    return config.executor == "ray" or (config.executor == "auto" and _has_ray())


def _has_ray() -> bool:
    return importlib.util.find_spec("ray") is not None


__all__ = ["Executor", "Grouping", "make_executor", "require_device"]
