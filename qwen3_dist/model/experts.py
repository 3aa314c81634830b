"""The SwiGLU experts of a rank.

Legend: R rows, K experts per token, D emb_dim, I hidden columns, e experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import padded_range
from qwen3_dist.model.expert_lora import ExpertLowRank
from qwen3_dist.model.quantized import Quantizable
from qwen3_dist.ops import slices
from qwen3_dist.ops.base import ExpertWeights, Ops
from qwen3_dist.ops.host_memory import zeros
from qwen3_dist.ops.torch_experts import counted
from qwen3_dist.parallel.communicator import Communicator
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.dispatch import DispatchedTokens


class ExpertShape(NamedTuple):
    """The sizes of a rank's part of an expert: fc1 and fc2 [columns, emb_dim], fc3 [outputs, inputs].

    etp ranks split the hidden columns. In deterministic mode a rank's fc3 has the columns of all as inputs, and a part
    of the outputs.
    """

    emb_dim: int
    columns: int
    outputs: int
    inputs: int

    @classmethod
    def of(cls, config: ModelConfig, parallel: ParallelContext) -> ExpertShape:
        emb_dim, hidden_dim, etp = config.emb_dim, config.moe_hidden_dim, parallel.etp
        _, columns = padded_range(hidden_dim, etp.size, etp.rank)
        if not parallel.deterministic:
            return cls.of_columns(emb_dim, columns)
        _, outputs = padded_range(emb_dim, etp.size, etp.rank)
        return cls(emb_dim, columns, outputs, hidden_dim)

    @classmethod
    def of_columns(cls, emb_dim: int, columns: int) -> ExpertShape:
        """Some hidden columns of an expert with all of its inputs and outputs."""
        return cls(emb_dim, columns, emb_dim, columns)

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """The shapes of fc1, fc2 and fc3."""
        wide = (self.columns, self.emb_dim)
        return wide, wide, (self.outputs, self.inputs)


class Experts(Quantizable):
    """This rank's experts, stacked: fc1 and fc2 [e, I, D], fc3 [e, D, I] or as `ExpertShape` says."""

    low_rank: ExpertLowRank | None = None  # LoRA weights; None if no adapter changes an expert of the layer

    def __init__(self, num_experts: int, shape: ExpertShape, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        self._shape = shape
        self._columns = shape.columns
        self._finalized: ExpertWeights | None = None
        self.codes = {}
        self.fc1, self.fc2, self.fc3 = (
            nn.Parameter(torch.empty(num_experts, *sizes)) for sizes in shape.matrices
        )
        # [1 + e] int64, rows so far for experts of other ranks, then for each expert of this rank; never on meta.
        self.all_counts = torch.zeros(num_experts + 1, dtype=torch.int64, device="cpu")

    def forward(self, received: DispatchedTokens) -> Tensor:
        """The weighted sum of each row over its experts on this rank -> [R, D]."""
        x, ids, routing = received.tokens, received.expert_ids, received.weights
        self.count_on(x.device)
        if self.low_rank is not None and received.adapters is not None:
            return self._adapted(x, ids, routing, received.adapters)
        return self._ops.experts(x, self.weights, ids, routing, self.all_counts)

    def contributions(self, received: DispatchedTokens, etp: Communicator) -> Tensor:
        """In deterministic mode: each choice's weighted output, side by side -> [R, K * D]. It is 0 where the expert
        is on another rank, or the column is in the part of another rank of `etp`; so sums over ranks are exact."""
        ids, shape = received.expert_ids.flatten(), self._shape
        self.count_on(ids.device)
        choices, adapters = received.expert_ids.shape[1], received.adapters
        numbers = None if adapters is None else adapters.repeat_interleave(choices)
        hidden = self._hidden(received.tokens.repeat_interleave(choices, dim=0), ids, numbers)
        hidden = etp.all_gather_columns(hidden, shape.inputs)
        outputs = self._weighted_outputs(hidden, ids, received.weights.flatten(), numbers)
        before = etp.rank * shape.outputs
        whole = F.pad(outputs, (before, (etp.size - 1) * shape.outputs - before))[:, : shape.emb_dim]
        return whole.reshape(len(received.tokens), choices * shape.emb_dim)  # which may be no rows

    def _adapted(self, x: Tensor, ids: Tensor, routing: Tensor, adapters: Tensor) -> Tensor:
        """`forward` with the adapters [R] of the rows, in slices, which limits memory."""
        choices, rows, sums = ids.shape[1], slices.rows_of_slice(ids.shape[1]), []
        for some, its_ids, its_routing, its_adapters in zip(
            *(each.split(rows) for each in (x, ids, routing, adapters)), strict=True
        ):
            pairs, numbers = its_ids.flatten(), its_adapters.repeat_interleave(choices)
            hidden = self._hidden(some.repeat_interleave(choices, dim=0), pairs, numbers)
            outputs = self._weighted_outputs(hidden, pairs, its_routing.flatten(), numbers)
            sums.append(outputs.unflatten(0, (-1, choices)).sum(dim=1, dtype=torch.float32).to(x.dtype))
        return torch.cat(sums)

    # The two halves of an expert, a row for each pair of a token and one of its experts, with adapters or without.

    def _hidden(self, x: Tensor, ids: Tensor, numbers: Tensor | None) -> Tensor:
        """x [P, D] -> hidden columns [P, I]. ids [P] are the experts, `numbers` [P] the adapters."""
        if numbers is None or self.low_rank is None:
            return self._ops.expert_hidden(x, self.weights, ids, self.all_counts)
        self.all_counts += counted(ids, len(self.all_counts) - 1)
        return self._ops.swiglu(*(self._product(x, which, ids, numbers, self._columns) for which in (0, 1)))

    def _weighted_outputs(
        self, hidden: Tensor, ids: Tensor, routing: Tensor, numbers: Tensor | None
    ) -> Tensor:
        """hidden [P, I] -> outputs times `routing` [P]: [P, outputs]."""
        if numbers is None or self.low_rank is None:
            return self._ops.expert_outputs(hidden, self.weights, ids, routing, self._shape.outputs)
        outputs = self._product(hidden, 2, ids, numbers, self._shape.outputs)
        return outputs.float().mul_(routing[:, None]).to(outputs.dtype)

    def _product(self, x: Tensor, which: int, ids: Tensor, numbers: Tensor, outputs: int) -> Tensor:
        assert self.low_rank is not None
        out = self._ops.expert_product(x, self.weights, which, ids, outputs)
        self.low_rank.add(out, x, which, ids, numbers)
        return out

    @property
    def weights(self) -> ExpertWeights:
        """The weights as loaded, or after `finalize` in the layout of the Ops."""
        return self._finalized or self._as_loaded(tuple(getattr(self, name) for name in self.tensor_names))

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of the stacks, and in a quantised checkpoint of what belongs to their codes."""
        stacks = ("fc1", "fc2", "fc3")
        companions = self.codes["fc1"].companions if self.codes else ()
        return (*stacks, *(f"{name}_{each}" for each in companions for name in stacks))

    def _as_loaded(self, tensors: tuple[Tensor, ...]) -> ExpertWeights:
        """Weights in the checkpoint's layout: `tensors` are those of `tensor_names`."""
        triples = [(tensors[i], tensors[i + 1], tensors[i + 2]) for i in range(0, len(tensors), 3)]
        if not self.codes:
            return ExpertWeights(triples[0], self._columns)
        grids = (self.codes["fc1"].grid, self.codes["fc2"].grid, self.codes["fc3"].grid)
        parts = {
            f"{each}s": triple for each, triple in zip(self.codes["fc1"].companions, triples[1:], strict=True)
        }
        return ExpertWeights(triples[0], self._columns, grids=grids, **parts)

    def finalize(self, int8: bool = False) -> None:
        """Converts the weights to the layout that is fastest for the Ops, and to int8 if `int8`."""
        self._finalized = self._ops.finalize_experts(self.weights, int8)
        for name in self.tensor_names:
            delattr(self, name)  # frees the loaded weights

    def take(self, other: Experts, places: Sequence[int | None], tensors: tuple[Tensor, ...]) -> None:
        """In place of loading and `finalize`: this module gets the experts at the indices `places` of `other`, which
        is finalized, and where that is None the next of `tensors`, which are as `convert` takes them."""
        converted = other.convert(tensors) if None in places else other.weights.tensors
        taken = []
        for theirs, new in zip(other.weights.tensors, converted, strict=True):
            mine, arriving = zeros((len(places), *theirs.shape[1:]), theirs.dtype, theirs.device), iter(new)
            for place, there in enumerate(places):
                mine[place].copy_(next(arriving) if there is None else theirs[there])
            taken.append(mine)
        self._finalized = other.weights.with_tensors(taken)
        del self.fc1, self.fc2, self.fc3
        self.codes = other.codes

    @property
    def stays_on_device(self) -> bool:
        """Whether a GPU computes the experts without the host, which a CUDA graph needs."""
        return self._ops.experts_stay_on_device(self.weights)

    def count_on(self, device: torch.device) -> None:
        """Moves `counts` to `device`."""
        if self.all_counts.device != device:
            self.all_counts = self.all_counts.to(device)

    @property
    def counts(self) -> Tensor:
        """Rows that each expert of this rank has computed so far, [e] int64."""
        return self.all_counts[1:]

    def convert(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Converts weights of n experts from the checkpoint's layout (fc1 and fc2 [n, I, D], fc3 [n, D, I], and their
        scales if the checkpoint is quantised) to that of `weights.tensors`. Does not change this module."""
        if self._finalized is None:
            return tensors
        int8 = self._finalized.scales is not None and not self.codes
        return self._ops.finalize_experts(self._as_loaded(tensors), int8).tensors

    def replace(self, places: Tensor, converted: tuple[Tensor, ...]) -> None:
        """Replaces the experts at the indices `places` [n] of the stacks by others, whose weights `convert` returned,
        and sets their counts to 0.

        All tensors are on the weights' device, so the host does not wait.
        """
        for old, new in zip(self.weights.tensors, converted, strict=True):
            narrow = old.dtype.itemsize == 1  # torch copies no single rows of fp8
            old, new = (each.view(torch.int8) if narrow else each for each in (old, new))
            old.index_copy_(0, places, new)
        self.counts.index_fill_(0, places, 0)
