"""Linear layers, alone or in groups with the same input, which an Ops computes by one call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from qwen3_dist.layout import padded_range
from qwen3_dist.model.lora import LowRank
from qwen3_dist.model.quantized import Quantizable
from qwen3_dist.ops.adapter_rows import AdapterRows
from qwen3_dist.ops.base import LinearWeights, Matrix, Ops
from qwen3_dist.parallel.communicator import Communicator


class Products(ABC):
    """One or more linear layers with the same input."""

    _ops: Ops
    _finalized: LinearWeights | None = None

    @property
    @abstractmethod
    def layers(self) -> tuple[Linear, ...]: ...

    def products(self, x: Tensor, adapters: AdapterRows | None = None) -> Sequence[Tensor]:
        """x [T, in_features] -> [T, out_features] for each layer, with the adapters of the rows."""
        outs = self._ops.linear(x, self.weights)
        if adapters is not None:
            for layer, out in zip(self.layers, outs, strict=True):
                if layer.low_rank is not None:
                    layer.low_rank.add(out, x, adapters)
        return outs

    @property
    def weights(self) -> LinearWeights:
        """The weights as loaded, or after `finalize` in the layout of the Ops."""
        if self._finalized is not None:
            return self._finalized
        return LinearWeights(tuple(each.matrix for each in self.layers))

    def finalize(self, int8: bool = False) -> None:
        """Converts the weights to the layout that is fastest for the Ops, and to int8 if `int8`."""
        self._finalized = self._ops.finalize_linear(self.weights, int8)
        for layer in self.layers:
            for name in layer.tensor_names:
                delattr(layer, name)  # frees the loaded weights


class Linear(nn.Linear, Quantizable, Products):
    """[T, in_features] -> [T, out_features]."""

    low_rank: LowRank | None = None  # LoRA weights; None if no adapter changes this layer

    def __init__(self, in_features: int, out_features: int, bias: bool, ops: Ops) -> None:
        super().__init__(in_features, out_features, bias)
        self._ops = ops
        self.codes = {}

    @property
    def layers(self) -> tuple[Linear, ...]:
        return (self,)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of the weight, and in a quantised checkpoint of what belongs to its codes."""
        companions = self.codes["weight"].companions if "weight" in self.codes else ()
        return ("weight", *(f"weight_{each}" for each in companions))

    @property
    def matrix(self) -> Matrix:
        """The weights as loaded."""
        if "weight" not in self.codes:
            return Matrix(self.weight, self.out_features, bias=self.bias)
        grid, companions = self.codes["weight"].grid, self.codes["weight"].companions
        parts = {each: self.get_parameter(f"weight_{each}") for each in companions}
        return Matrix(self.weight, self.out_features, bias=self.bias, grid=grid, **parts)

    def forward(self, x: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        return self.products(x, adapters)[0]


class LinearGroup(Products):
    """At most three layers with the same input, which an Ops may join to one product."""

    def __init__(self, ops: Ops, *layers: Linear) -> None:
        self._ops = ops
        self._layers = layers

    @property
    def layers(self) -> tuple[Linear, ...]:
        return self._layers


class RowParallel(Linear):
    """A layer whose inputs are split over `group`: [T, this rank's inputs] -> partial sum [T, outputs].

    In deterministic mode it returns the whole sum: the ranks exchange their inputs, each computes its part of the
    outputs from all inputs, and they exchange the outputs. No sum is split, so none depends on the number of ranks.
    """

    def __init__(
        self, in_features: int, outputs: int, bias: bool, ops: Ops, group: Communicator, deterministic: bool
    ) -> None:
        """`in_features` are those of all ranks, without padding."""
        _, inputs = padded_range(in_features, group.size, group.rank)
        _, own_outputs = padded_range(outputs, group.size, group.rank)
        shape = (in_features, own_outputs) if deterministic else (inputs, outputs)
        super().__init__(*shape, bias, ops)
        self._group, self._deterministic, self._outputs = group, deterministic, outputs

    def forward(self, x: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        if not self._deterministic:
            return super().forward(x, adapters)
        inputs = self._group.all_gather_columns(x, self.in_features)
        return self._group.all_gather_columns(super().forward(inputs, adapters), self._outputs)
