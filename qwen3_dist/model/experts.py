"""A rank's SwiGLU experts on the rows it received.

Legend: R rows, K experts per token, P = R * K pairs of a row and one of its choices, D emb_dim, I hidden
columns, e experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3_dist.model.linear import as_int8, frozen
from qwen3_dist.model.step_memory import rows_of_slice
from qwen3_dist.ops.kernels import Kernels, Weights, gpu_kernels_for, linears
from qwen3_dist.parallel.dispatch import DispatchedTokens

_Three = tuple[Tensor, Tensor, Tensor]
# Pairs for each expert up to which a GPU takes our kernel rather than torch's. On an H200 ours was still faster at 256
# (`benchmarks/results/gpu-check-NVIDIA-H200.json`); what torch does with more was not measured.
_FEW_PAIRS = 256


class Experts(nn.Module):
    """This rank's experts, stacked: fc1 and fc2 [e, I, D], fc3 [e, D, I]."""

    scales: _Three | None = None  # fp32 of int8 stacks: [e, I], the same, [e, D]
    _packed_for: Kernels | None = None

    def __init__(self, num_experts: int, emb_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.columns = hidden_dim
        self.fc1 = nn.Parameter(torch.empty(num_experts, hidden_dim, emb_dim))
        self.fc2 = nn.Parameter(torch.empty(num_experts, hidden_dim, emb_dim))
        self.fc3 = nn.Parameter(torch.empty(num_experts, emb_dim, hidden_dim))
        # [1 + e] int64, tokens so far for each expert after those for experts elsewhere; never on meta.
        self._counts = torch.zeros(num_experts + 1, dtype=torch.int64, device="cpu")

    def forward(self, received: DispatchedTokens) -> Tensor:
        """Each row's weighted sum over those of its experts that are here -> [R, D].

        Many rows go in slices, so that memory is bounded also where every row chose experts of this rank.
        """
        x, ids, weights = received.tokens, received.expert_ids, received.weights
        if self._packed_for is not None:
            stacks = (self.fc1, self.fc2, self.fc3)
            return self._packed_for.experts(x, stacks, self.columns, self.scales, ids, weights, self.counts)
        self.count_on(ids.device)
        x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
        rows = rows_of_slice(ids.shape[1])
        if len(x) <= rows:
            return self._sums(x, ids, weights)
        out = torch.empty_like(x)
        for mine, *part in zip(*(each.split(rows) for each in (out, x, ids, weights)), strict=True):
            mine.copy_(self._sums(*part))
        return out

    def _sums(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """`forward` of contiguous rows whose pairs, of whatever experts, fit a step's memory."""
        stacks = (self.fc1, self.fc2, self.fc3)
        kernels = gpu_kernels_for(x)
        few = ids.numel() < _FEW_PAIRS * len(self.fc1)
        grouped = self.scales is None and grouped_mm_works(x, self.fc1)
        if kernels is not None and (few or not grouped):
            return kernels.experts(x, stacks, self.scales, ids, weights, self._counts)
        counts = counted(ids, len(self.fc1))
        self._counts += counts
        if grouped:
            return grouped_experts(x, stacks, ids, weights, counts)
        return looped_experts(x, stacks, self.scales, ids, weights)

    def stays_on_device(self, x: Tensor) -> bool:
        """Whether a GPU computes rows like `x` without asking the host, as a CUDA graph needs."""
        return gpu_kernels_for(x) is not None or (self.scales is None and grouped_mm_works(x, self.fc1))

    def count_on(self, device: torch.device) -> None:
        """Keeps `counts` there from now on."""
        if self._counts.device != device:
            self._counts = self._counts.to(device)

    @property
    def counts(self) -> Tensor:
        """[e] int64, rows that each expert has computed so far."""
        return self._counts[1:]

    def as_kept(self, stacks: _Three) -> list[Tensor]:
        """`stacks`, fc1 and fc2 [n, I, D] and fc3 [n, D, I] as a checkpoint has them, in the form in which these are
        kept: packed, or int8 with the three scales after them. Changes nothing here."""
        kept, scales = list(stacks), []
        if self.scales is not None:
            kept, scales = map(list, zip(*map(as_int8, stacks), strict=True))
        if self._packed_for is not None:
            kept = [self._packed_for.pack(stack) for stack in kept]
        return kept + scales

    def replace(self, places: Tensor, kept: list[Tensor]) -> None:
        """Puts other experts' weights, as `as_kept` made them, in these places [n]; they have computed no rows yet.

        Copies alone, of tensors on the weights' device, for which a GPU's host does not wait.
        """
        for old, new in zip((self.fc1, self.fc2, self.fc3, *(self.scales or ())), kept, strict=True):
            old.index_copy_(0, places, new)
        self.counts.index_fill_(0, places, 0)

    def quantize(self) -> None:
        """Keeps the weights as int8 from now on."""
        (self.fc1, one), (self.fc2, two), (self.fc3, three) = map(as_int8, (self.fc1, self.fc2, self.fc3))
        self.scales = (one, two, three)

    def pack(self, kernels: Kernels) -> None:
        """Keeps the weights as the kernels read them from now on, each matrix [e, panels, inputs, outputs]."""
        self._packed_for = kernels
        for name in ("fc1", "fc2", "fc3"):
            setattr(self, name, frozen(kernels.pack(getattr(self, name))))


def counted(ids: Tensor, num_experts: int) -> Tensor:
    """[1 + e] int64: how often `ids` has each place, from -1 on."""
    chosen = (ids + 1).flatten()
    return chosen.new_zeros(1 + num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of [T, I]."""
    kernels = gpu_kernels_for(gate)
    return F.silu(gate) * up if kernels is None else kernels.swiglu(gate, up)


def grouped_mm_works(x: Tensor, fc1: Tensor) -> bool:
    """Whether `grouped_mm` computes these on the device: bf16 on compute capability 9 (elsewhere torch 2.11 loops on
    the host), rows of whole 16 bytes."""
    _, columns, dim = fc1.shape
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and columns % 8 == dim % 8 == 0
        and torch.cuda.get_device_capability(x.device)[0] == 9
    )


def grouped_experts(x: Tensor, stacks: _Three, ids: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Three grouped products over pairs sorted by expert, of which each id from -1 on has `counts` [1 + e].

    Nothing waits for the host. Pairs whose expert is elsewhere are sorted to the end, where the products leave them
    out.
    """
    fc1, fc2, fc3 = (stack.transpose(1, 2) for stack in stacks)
    (rows, choices), experts = ids.shape, fc1.shape[0]
    keys = torch.where(ids < 0, experts, ids).flatten()
    order = keys.argsort(stable=True)
    ends = counts[1:].cumsum(0, dtype=torch.int32)
    pairs = x[order // choices]
    hidden = swiglu(F.grouped_mm(pairs, fc1, offs=ends), F.grouped_mm(pairs, fc2, offs=ends))
    answers = F.grouped_mm(hidden, fc3, offs=ends)[order.argsort()]
    kernels = gpu_kernels_for(x)
    if kernels is not None:
        return kernels.summed(answers, ids, weights)
    answers = answers.view(rows, choices, -1)
    answers = torch.where((ids >= 0)[..., None], answers.float() * weights[..., None], 0.0)
    return answers.sum(dim=1).to(x.dtype)


def looped_experts(x: Tensor, stacks: _Three, scales: _Three | None, ids: Tensor, weights: Tensor) -> Tensor:
    """The same in plain torch, an expert at a time."""
    rows, choice = (ids >= 0).nonzero(as_tuple=True)
    order = ids[rows, choice].argsort(stable=True)
    rows, choice = rows[order], choice[order]
    counts = torch.bincount(ids[rows, choice], minlength=stacks[0].shape[0]).tolist()
    out = torch.zeros_like(x, dtype=torch.float32)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            pairs = slice(start, start + count)
            one, two, three = (stack[expert] for stack in stacks)
            by_one, by_two, by_three = (scale[expert] for scale in scales) if scales else (None,) * 3
            given = x[rows[pairs]]
            wide = (Weights(one, len(one), by_one), Weights(two, len(two), by_two))
            gate, up = linears(given, *wide)
            (answers,) = linears(F.silu(gate) * up, Weights(three, len(three), by_three))
            out.index_add_(0, rows[pairs], answers.float() * weights[rows[pairs], choice[pairs], None])
            start += count
    return out.to(x.dtype)
