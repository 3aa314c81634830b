"""`nn.Linear` over the tokens of a step, by whichever product is fastest where it runs, and int8 weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3_dist.model.lora import LowRank
from qwen3_dist.ops.adapter_rows import AdapterRows
from qwen3_dist.ops.kernels import Kernels, Weights, linears


class Linear(nn.Linear):
    """[T, in_features] -> [T, out_features]."""

    scale: Tensor | None = None  # fp32 [out_features] of int8 weights
    low_rank: LowRank | None = None  # what adapters add, if there are some for it
    joined: Tensor | None = None  # the weights of this and the layers that it was joined with

    def forward(self, x: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        return products(x, adapters, self)[0]

    @property
    def parts(self) -> Weights:
        """What the kernels take."""
        return Weights(self.weight, self.out_features, self.scale, self.bias)

    def quantize(self) -> None:
        """Keeps the weights as int8 from now on."""
        self.weight, self.scale = as_int8(self.weight)

    def pack(self, kernels: Kernels) -> None:
        """Keeps the weights as the kernels read them from now on."""
        self.weight = frozen(kernels.pack(self.weight))


def products(x: Tensor, adapters: AdapterRows | None, *layers: Linear) -> list[Tensor]:
    """What each of at most three layers makes of x [T, I], with the rows' adapters."""
    if len(layers) > 1 and layers[0].joined is not None:
        outs = list(F.linear(x, layers[0].joined).split([layer.out_features for layer in layers], dim=1))
    else:
        outs = linears(x, *(layer.parts for layer in layers))
    if adapters is not None:
        for layer, out in zip(layers, outs, strict=True):
            if layer.low_rank is not None:
                layer.low_rank.add(out, x, adapters)
    return outs


def join(*layers: Linear) -> None:
    """From now on `products` of these is one product, which a GPU launches once. Their weights lie side by side."""
    if any(layer.bias is not None or layer.scale is not None for layer in layers):
        return
    whole = torch.cat([layer.weight for layer in layers])
    for layer, part in zip(layers, whole.split([layer.out_features for layer in layers]), strict=True):
        layer.weight = frozen(part)
    layers[0].joined = whole


def frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def as_int8(weight: Tensor) -> tuple[nn.Parameter, Tensor]:
    """Symmetric per-channel int8: weight [..., N, D] ~ int8 [..., N, D] * fp32 scale [..., N].

    A scale is made of this rank's part of the inputs alone, so layouts that cut inputs elsewhere round
    elsewhere.
    """
    quantized = torch.empty_like(weight, dtype=torch.int8)
    scale = weight.abs().amax(dim=-1).float().div_(127).clamp_(min=1e-30)
    few_rows = (
        each.split(4096) for each in (weight.flatten(0, -2), quantized.flatten(0, -2), scale.flatten())
    )
    for wide, narrow, by in zip(*few_rows, strict=True):  # whose fp32 copies are small
        narrow.copy_((wide.float() / by[:, None]).round_())
    return frozen(quantized), scale
