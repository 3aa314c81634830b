"""First stage: GPUs, driver, versions and installed packages. The other stages run only if it passes."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_check.check import CheckFailed, Figures, PlannedCheck, Setting
from qwen3_dist.machine import hardware, versions
from qwen3_dist.worker.cards import why_no_gpu

_USED = ("triton", "ray", "transformers", "pydantic_core", "flash_attn_interface")


def checks(setting: Setting) -> Iterator[PlannedCheck]:
    yield PlannedCheck("machine", lambda: _machine(setting))


def _machine(setting: Setting) -> Figures:
    if setting.on_gpu and (why := why_no_gpu()):
        raise CheckFailed(f"torch sees no GPU: {why}, or run with --device cpu")
    about: Figures = {
        "hardware": hardware(),
        "versions": versions(),
        "not_installed": [name for name in _USED if importlib.util.find_spec(name) is None],
    }
    return {**about, **_cards()} if setting.on_gpu else about


def _cards() -> Figures:
    cards = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        cards.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(total / 2**30, 1),
                "free_gib": round(free / 2**30, 1),
            }
        )
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    return {
        "cards": cards,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "nccl": nccl,
        **_topology(len(cards)),
    }


def _driver() -> str:
    return (
        _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        or "unknown"
    )


def _topology(cards: int) -> dict[str, Any]:
    """The topology of the GPUs (NVLink or PCIe), if there are several."""
    return {"topology": _output_of("nvidia-smi", "topo", "-m").splitlines()} if cards > 1 else {}


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
