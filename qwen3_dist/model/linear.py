"""Products of the tokens of a step with weights, on their own or several of the same input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from qwen3_dist.model.lora import LowRank
from qwen3_dist.ops.adapter_rows import AdapterRows
from qwen3_dist.ops.base import LinearWeights, Matrix, Ops


class Products(ABC):
    """What some layers make of the same input, by one call of an Ops."""

    _ops: Ops
    _finalized: LinearWeights | None = None

    @property
    @abstractmethod
    def layers(self) -> tuple[Linear, ...]: ...

    def products(self, x: Tensor, adapters: AdapterRows | None = None) -> Sequence[Tensor]:
        """What each layer makes of x [T, in_features], with the rows' adapters."""
        outs = self._ops.linear(x, self.weights)
        if adapters is not None:
            for layer, out in zip(self.layers, outs, strict=True):
                if layer.low_rank is not None:
                    layer.low_rank.add(out, x, adapters)
        return outs

    @property
    def weights(self) -> LinearWeights:
        """As they were loaded, or in the form that the Ops gave them."""
        if self._finalized is not None:
            return self._finalized
        plain = (Matrix(each.weight, each.out_features, bias=each.bias) for each in self.layers)
        return LinearWeights(tuple(plain))

    def finalize(self, int8: bool = False) -> None:
        """Gives the weights the form that the Ops reads fastest, rounded to int8 if asked."""
        self._finalized = self._ops.finalize_linear(self.weights, int8)
        for layer in self.layers:
            del layer.weight  # so that memory holds them once


class Linear(nn.Linear, Products):
    """[T, in_features] -> [T, out_features]."""

    low_rank: LowRank | None = None  # what adapters add, if there are some for it

    def __init__(self, in_features: int, out_features: int, bias: bool, ops: Ops) -> None:
        super().__init__(in_features, out_features, bias)
        self._ops = ops

    @property
    def layers(self) -> tuple[Linear, ...]:
        return (self,)

    def forward(self, x: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        return self.products(x, adapters)[0]


class LinearGroup(Products):
    """At most three layers with the same input, which an Ops may make one product."""

    def __init__(self, ops: Ops, *layers: Linear) -> None:
        self._ops = ops
        self._layers = layers

    @property
    def layers(self) -> tuple[Linear, ...]:
        return self._layers
