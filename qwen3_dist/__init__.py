"""Distributed inference of Qwen3 models (dense and Mixture-of-Experts): the library.

    from qwen3_dist import LLM, SamplingParams

Names are imported on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "LLM": "qwen3_dist.llm",
    "SamplingParams": "qwen3_dist.sampling_params",
    "ModelConfig": "qwen3_dist.config",
    "Layout": "qwen3_dist.layout",
    "EngineConfig": "qwen3_dist.settings",
    "RequestOutput": "qwen3_dist.protocol.outputs",
}
__all__ = ["LLM", "EngineConfig", "Layout", "ModelConfig", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qwen3_dist' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
