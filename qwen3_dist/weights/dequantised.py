"""A quantised checkpoint's weights as plain fp32 ones, whole and one at a time: what `verify` and benchmarks compare
with.

Written from each format's definition, apart from what loads ranks (`packed.py`) and computes with codes; only the
names of tensors and the reading of config.json are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout
from qwen3_dist.quantization import FP4, INT4, INT8, Packing, Stored, WeightFormat
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.scale_pieces import format_of, stored_name
from qwen3_dist.weights.weight_plan import WeightPlan

_HALVES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # what the lower three bits of e2m1 say


def dequantised(config: ModelConfig, files: CheckpointFiles) -> Iterator[tuple[str, Tensor]]:
    """The names and values of all weights that the model reads, each code multiplied by its scale in fp32."""
    names, layout = files.names(), Layout()
    plan = WeightPlan(config, layout, names)
    shapes = {piece.source: piece.shape for piece in plan.plain_pieces(layout.coords(0))}
    for source, shape in shapes.items():
        form = format_of(source, config.quantization, names)
        if form is None:
            yield source, files.read_whole(source).float()
        else:
            yield source, _values(files, source, shape, form)


def _values(files: CheckpointFiles, source: str, shape: tuple[int, ...], form: WeightFormat) -> Tensor:
    *lead, outputs, inputs = shape

    def read(stored: Stored) -> Tensor:
        return files.read_whole(stored_name(source, stored, files.names()))

    rows, columns = form.block or (1, inputs)
    groups = torch.arange(inputs) // columns
    if form.order is not None:
        groups = read(form.order).long()
    scale = _numbers(read(form.scale), form.scale.packing).float()
    scale = scale.view(-1, 1) if scale.ndim < 2 else scale
    if form.factor is not None:
        factor = read(form.factor).float()
        if lead:  # one for each expert, or one for its gate and one for its up
            factor = factor.view(*lead, -1)
            factor = factor.repeat_interleave(outputs // factor.shape[-1], -1)[..., None]
        scale = scale * factor if form.factor_multiplies else scale / factor
    of_rows = torch.zeros(outputs, dtype=torch.long)
    if scale.shape[-2] > 1:
        of_rows = torch.arange(outputs) // rows
    codes = _numbers(read(form.weight), form.weight.packing)[..., :outputs, :inputs]
    codes = _meant(codes, form.codes)
    if form.zero is not None:
        zero = _numbers(read(form.zero), form.zero.packing)[..., : scale.shape[-2], :]
        zero = zero.view(torch.int8) if form.codes == INT8 else zero
        codes = codes - zero.float()[..., of_rows, :].index_select(-1, groups)
    elif form.codes == INT4:
        codes = codes - 8
    return codes * scale[..., of_rows, :].index_select(-1, groups)


def _meant(codes: Tensor, kind: str) -> Tensor:
    if kind == FP4:
        magnitude = torch.tensor(_HALVES)[(codes & 7).int()]
        return torch.where(codes > 7, -magnitude, magnitude)
    return (codes.view(torch.int8) if kind == INT8 else codes).float()


def _numbers(words: Tensor, packing: Packing | None) -> Tensor:
    """Numbers [..., O, I] of a stored tensor, at their ends more than there are if words are not full."""
    if packing is None:
        return words
    words = words.transpose(-1, -2) if packing.transposed else words
    if packing.dtype == "powers":
        return torch.exp2(words.view(torch.uint8).float() - 127)
    if packing.dtype == "floats":
        return words
    words = words + packing.word_plus
    along = packing.axis - 2
    places = packing.order or tuple(range(packing.per_word))
    mask = (1 << packing.bits) - 1
    numbers = [((words >> packing.bits * place) + packing.plus) & mask for place in places]
    return torch.stack(numbers, dim=along).flatten(along - 1, along).to(torch.uint8)
