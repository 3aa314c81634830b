"""What each format of quantised weights changes: KL divergence of logits from the bf16 original's, and the difference
from the weights that the codes stand for.

    python -m benchmarks.quantized_error

The model is the bundled one, the prompts are those of `verify`, and both models of a comparison are computed in fp32
with this project's kernels. Formats other than fp8, int8 and int4 are written by the tests' writers, by rounding to
nearest: a checkpoint that was calibrated is nearer. KL is in nats, of single positions. `same` is the share of
positions with the original's most likely token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import keep
from qwen3_dist.ops.quantize import as_int4, as_int8
from qwen3_dist.verify import differences
from qwen3_dist.weights.converter import Conversion
from qwen3_dist.weights.source import bundled_path
from tests.quantized import from_blocks, in_blocks, write_twins
from tests.quantized_packed import write_awq, write_fp4, write_gptq, write_pack_quantized

Values = Callable[[Tensor], Tensor]
_SIZE = 128  # inputs of a group


def fp8(weight: Tensor) -> Tensor:
    return from_blocks(*in_blocks(weight, _SIZE, _SIZE), _SIZE, _SIZE)


def int8(weight: Tensor) -> Tensor:
    codes, scales = as_int8(weight)
    return codes * scales[:, None]


def int4(weight: Tensor) -> Tensor:
    numbers, scales = as_int4(weight)
    return from_blocks(numbers.float() - 8, scales, 1, _SIZE)


def _as_is(values: Values, name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {name: weight}, values(weight)


def models(directory: Path) -> Iterator[tuple[str, Path, str, Path]]:
    """Each format with a checkpoint, how it is rounded while it loads, and a checkpoint of the same weights."""
    original = bundled_path()
    for name, values in {"fp8": fp8, "int4": int4, "int8": int8}.items():
        twin = write_twins(directory / name, partial(_as_is, values), {}, original=original).plain
        if name == "int8":  # while loading, the head is rounded too
            Conversion.open(original, name).write(directory / "int8-file", lambda size: None)
            yield "int8 by outputs (quantize --to int8)", directory / "int8-file", "none", twin
        else:
            yield f"{name} (--quantize {name})", original, name, twin
    writers: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "pack-quantized int4, groups of 128": (write_pack_quantized, {"size": _SIZE}),
        "AWQ, groups of 128": (write_awq, {"size": _SIZE}),
        "GPTQ 4 bits, groups of 128": (write_gptq, {"size": _SIZE}),
        "GPTQ 8 bits, groups of 128": (write_gptq, {"size": _SIZE, "bits": 8}),
        "NVFP4": (write_fp4, {"kind": "nvfp4"}),
        "MXFP4": (write_fp4, {"kind": "mxfp4"}),
    }
    for name, (write, how) in writers.items():
        twins = write(directory / name.replace(" ", "-"), original=original, **how)
        yield name, twins.quantized, "none", twins.plain


def run() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        for name, path, quantize, twin in models(Path(directory)):
            of_original = differences(path, quantize, bundled_path())
            of_twin = differences(path, quantize, twin)
            yield {
                "format": name,
                "mean_kl": f"{of_original.mean_kl:.2g}",
                "largest_kl": f"{of_original.largest_kl:.2g}",
                "same": f"{of_original.same_argmax:.1%}",
                "kl_from_dequantised": f"{of_twin.largest_kl:.1g}",
                "logit_from_dequantised": f"{of_twin.largest_logit_error:.1g}",
            }


if __name__ == "__main__":
    torch.manual_seed(0)
    keep("quantized-error", list(run()))
