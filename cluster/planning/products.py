"""Time of matrix products by the number of rows and the format of the weights."""

from __future__ import annotations

from bisect import bisect_left

from cluster.hardware import Device, WeightRates
from qwen3_dist.config import ModelConfig
from qwen3_dist.quantization import FP4, FP8, INT4, INT8

PLAIN = "bf16"
_KINDS = {INT8: "int8", INT4: "int4", FP4: "fp4"}


def weight_kind(config: ModelConfig) -> str:
    """The kind of the model's weights, a field of `Device` unless it is "bf16" (weights that are not quantised).

    fp8_block: fp8 with a scale for a block of outputs and inputs, as Qwen's own; fp8: with a scale for an output.
    """
    if config.quantization is None:
        return PLAIN
    form = config.quantization.groups[0][0]
    if form.codes == FP8:
        return "fp8" if form.block is None else "fp8_block"
    return _KINDS[form.codes]


def weight_rates(device: Device, kind: str) -> WeightRates | None:
    """What products with weights of this kind reach on `device`; None if it is not known."""
    found: WeightRates | None = None if kind == PLAIN else getattr(device, kind)
    return found


class MatmulTime:
    """Time of a matrix product by number of rows: the longer of reading the weights once and multiplying at the rate
    that this number of rows reaches."""

    def __init__(self, device: Device, weight_bytes: float, given: WeightRates | None = None) -> None:
        read = device.read_efficiency if given is None else given.read_efficiency
        speed = 1.0 if given is None else given.speed
        self._read_s = weight_bytes / (device.read_bytes_per_s * read)  # per weight
        rates = device.row_rates or ((1.0, device.flops_per_s * device.flops_efficiency),)
        self._rows = [rows for rows, _ in rates]
        self._seconds = [2 * rows / (rate * speed) for rows, rate in rates]  # per weight

    def seconds(
        self, rows: float, weights: float, efficiency: float = 1.0, read_efficiency: float = 1.0
    ) -> float:
        """Seconds of a product of `rows` rows with `weights` weights.

        Interpolates linearly between measured numbers of rows; beyond the last, time is proportional to rows.
        efficiency, read_efficiency: shares of the rates of multiplying and of reading that this product reaches.
        """
        known, seconds = self._rows, self._seconds
        at = bisect_left(known, rows)
        if at == len(known):
            product = seconds[-1] * rows / known[-1]
        elif at == 0:
            product = seconds[0] * (rows / known[0] if len(known) == 1 else min(1.0, rows))
        else:
            share = (rows - known[at - 1]) / (known[at] - known[at - 1])
            product = seconds[at - 1] + share * (seconds[at] - seconds[at - 1])
        return weights * max(product / efficiency, self._read_s / read_efficiency if rows else 0.0)
