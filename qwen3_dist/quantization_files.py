"""The quantisation of a checkpoint whose config.json does not tell it, from the file beside it that older versions of
AutoGPTQ and AutoAWQ wrote, and that ModelOpt writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_dist.errors import CheckpointError
from qwen3_dist.quantization_config import read_quantization

# Each file with its tool, and the field that holds the settings, if it is not the whole file.
_FILES = {
    "hf_quant_config.json": ("modelopt", "quantization"),
    "quantize_config.json": ("gptq", None),
    "quant_config.json": ("awq", None),
}
QUANTIZATION_FILES = tuple(_FILES)
_IN_CONFIG = ("quantization_config", "compression_config")


def with_quantization(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The config.json `raw` of the checkpoint at `path`, with a `quantization_config` from such a file if it has none.
    A file of ModelOpt may tell of a KV cache alone. Raises CheckpointError for a file that cannot be read, or tells
    what is not supported."""
    if any(raw.get(name) for name in _IN_CONFIG):
        return dict(raw)
    for name, (method, field) in _FILES.items():
        try:
            found = json.loads((path / name).read_text(encoding="utf-8"))
            settings = found if field is None else found[field]
            told = {"quantization_config": {"quant_method": method, **settings}}
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(
                f"{path / name} does not tell a quantisation ({error}); fetch it again, or remove it if the weights "
                "are not quantised"
            ) from None
        if method == "modelopt" and not settings.get("quant_algo"):
            continue
        try:
            read_quantization(told)
        except CheckpointError as error:
            reason = str(error).removeprefix("quantization_config: ")
            raise CheckpointError(f"{path / name}: {reason}") from None
        return {**raw, **told}
    return dict(raw)
