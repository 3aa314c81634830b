"""The operations of a GPU rank: Triton kernels, the chosen attention backend, and torch for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen3_dist.ops.base import DrawSettings, ExpertWeights, LinearWeights, Matrix
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.cuda.attention import Chosen
from qwen3_dist.ops.cuda.experts import FEW_PAIRS, grouped_experts, takes_codes, takes_grouped_mm
from qwen3_dist.ops.cuda.kernels import GpuKernels
from qwen3_dist.ops.quantize import kind_of
from qwen3_dist.ops.row_ops import RowKernelOps
from qwen3_dist.ops.slices import SORTED_ROWS
from qwen3_dist.ops.torch_experts import counted

_FEW_ROWS = (
    64  # up to this number of rows, a kernel reads int8 weights directly; else they are converted first
)


@dataclass(frozen=True)
class JoinedLinear(LinearWeights):
    """Weights whose parts are contiguous, so that all parts are one product with one launch."""

    joined: Matrix  # its outputs are those of the parts, one after the other

    @classmethod
    def of(cls, weights: LinearWeights) -> LinearWeights:
        """Joins the parts; returns `weights` unchanged if there is one part, or one has a bias or int8 weights, or
        blocks of codes differ or are cut where parts meet."""
        parts = weights.parts
        if len(parts) == 1 or not all(_can_join(part, parts[0]) for part in parts):
            return weights
        sizes, views = [part.outputs for part in parts], list(parts)
        joined = parts[0]._replace(outputs=sum(sizes), weight=torch.cat([part.weight for part in parts]))
        views = [
            part._replace(weight=view) for part, view in zip(views, joined.weight.split(sizes), strict=True)
        ]
        for name in ("scale", "zero"):
            tensors = [getattr(part, name) for part in parts]
            if tensors[0] is not None:
                whole: Any = torch.cat(tensors)
                joined = joined._replace(**{name: whole})
                split: Any = whole.split([len(each) for each in tensors])
                views = [part._replace(**{name: view}) for part, view in zip(views, split, strict=True)]
        return cls(tuple(views), joined)


def _can_join(part: Matrix, first: Matrix) -> bool:
    if part.bias is not None or part.order is not None or part.grid != first.grid:
        return False
    if part.grid is None:
        return part.scale is None and part.weight.dtype == first.weight.dtype
    whole = part.grid.first_row == 0 and part.outputs % part.grid.rows == 0
    return whole and part.weight.dtype == first.weight.dtype and (part.zero is None) == (first.zero is None)


class CudaOps(RowKernelOps):
    """Uses Triton kernels where they exist and work on this card, and torch for the rest."""

    _kernels: GpuKernels | None

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        kernels: Mapping[torch.dtype, GpuKernels | None],
        attention: Chosen,
        grouped_mm: bool,
    ) -> None:
        """`kernels` has the working kernels for the activations' dtype and for fp32 logits, None if they do not work.
        `grouped_mm`: whether torch's grouped_mm runs without the host on this card."""
        super().__init__()
        self._device = device
        self._kernels = kernels[dtype]
        self._draw_kernels = kernels
        self._attention = attention
        self._grouped_mm = grouped_mm

    def describe(self, experts: ExpertWeights | None) -> str:
        reasons = self._attention.reasons
        unused = f" (not {'; not '.join(reasons)})" if reasons else ""
        chosen = [f"attention by {self._attention.backend.name}{unused}"]
        chosen.append("rows by Triton kernels" if self._kernels is not None else "rows by torch alone")
        if experts is not None:
            triton = self._kernels is not None and (
                experts.grids is None or takes_codes(self._kernels, experts)
            )
            ways = ["Triton"] if triton else []
            ways += ["grouped_mm"] if self._takes_grouped_mm(experts) else []
            chosen.append(f"experts by {' and '.join(ways) or 'one product after the other'}")
        return f"{torch.cuda.get_device_name(self._device)}: {', '.join(chosen)}"

    def finalize_linear(self, weights: LinearWeights, int8: bool) -> LinearWeights:
        return JoinedLinear.of(self._tried(super().finalize_linear(weights, int8)))

    def _tried(self, weights: LinearWeights) -> LinearWeights:
        """Tries the kernels for the codes of `weights`: a trial waits for the card, which no step may do."""
        for part in weights.parts:
            if part.grid is not None and self._kernels is not None:
                self._kernels.reads_codes(kind_of(part.weight, part.grid))
        return weights

    def finalize_experts(self, weights: ExpertWeights, int8: bool) -> ExpertWeights:
        finalized = super().finalize_experts(weights, int8)
        takes_codes(self._kernels, finalized)  # tries the kernels, as `_tried` does
        return finalized

    def linear(self, x: Tensor, weights: LinearWeights) -> Sequence[Tensor]:
        if not isinstance(weights, JoinedLinear):
            return super().linear(x, weights)
        return self._product(x, weights.joined).split([part.outputs for part in weights.parts], dim=1)

    def _product(self, x: Tensor, part: Matrix) -> Tensor:
        if self._kernels is None or part.scale is None:
            return super()._product(x, part)
        if part.grid is not None:
            if not self._kernels.reads_codes(kind_of(part.weight, part.grid)):
                return super()._product(x, part)
            product = self._kernels.linear_codes(x.contiguous(), part)
        elif len(x) <= _FEW_ROWS:
            product = self._kernels.linear_int8(x.contiguous(), part.weight, part.scale)
        else:
            return super()._product(x, part)
        return product if part.bias is None else product + part.bias

    def attention(self, q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
        return self._attention.backend.attend(q, cache, batch, window)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().swiglu(gate, up) if self._kernels is None else self._kernels.swiglu(gate, up)

    def route(self, logits: Tensor, choices: int, normed: bool) -> tuple[Tensor, Tensor]:
        if self._kernels is None:
            return super().route(logits, choices, normed)
        return self._kernels.route(logits, choices, normed)

    def _experts_of_slice(
        self, x: Tensor, weights: ExpertWeights, ids: Tensor, routing: Tensor, counts: Tensor
    ) -> Tensor:
        if weights.grids is not None:
            if self._kernels is None or not takes_codes(self._kernels, weights):
                return super()._experts_of_slice(x, weights, ids, routing, counts)
            return self._kernels.experts_of_codes(x, weights, ids, routing, counts)
        few = ids.numel() < FEW_PAIRS * len(weights.stacks[0])
        grouped = self._takes_grouped_mm(weights)
        if self._kernels is not None and (few or not grouped):
            return self._kernels.experts(x, weights.stacks, weights.scales, ids, routing, counts)
        if not grouped:
            return super()._experts_of_slice(x, weights, ids, routing, counts)
        here = counted(ids, len(weights.stacks[0]))
        counts += here
        return grouped_experts(x, weights, ids, routing, here, self._kernels)

    def experts_stay_on_device(self, weights: ExpertWeights) -> bool:
        if weights.grids is not None:
            return takes_codes(self._kernels, weights)
        return self._kernels is not None or self._takes_grouped_mm(weights)

    def _takes_grouped_mm(self, weights: ExpertWeights) -> bool:
        return self._grouped_mm and takes_grouped_mm(weights)

    def draw_from_top_k(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        kernels = self._draw_kernels[logits.dtype]
        if kernels is None:
            return super().draw_from_top_k(logits, settings)
        most = min(max(settings.top_ks), logits.shape[-1])
        keys = kernels.ordering_keys(logits).topk(most, dim=-1).values
        return kernels.draw_from_ordered(keys, logits.shape[-1], settings.columns)

    def draw_from_top_p(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        kernels = self._draw_kernels[logits.dtype]
        if kernels is None:
            return super().draw_from_top_p(logits, settings)
        drawn = []
        few_rows = (logits.split(SORTED_ROWS), settings.columns.split(SORTED_ROWS, dim=1))
        for part, columns in zip(*few_rows, strict=True):
            keys = kernels.ordering_keys(part).sort(dim=-1, descending=True).values
            drawn.append(kernels.draw_from_ordered(keys, logits.shape[-1], columns.contiguous()))
        return torch.cat(drawn)

    def draw_from_all(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        kernels = self._draw_kernels[logits.dtype]
        if kernels is None:
            return super().draw_from_all(logits, settings)
        return kernels.draw_from_all(logits, settings.columns)
