"""What a rank computes with: one interface over devices, and the values that cross it.

`choose.choose_ops` picks a rank's `Ops` once, at its start, and its layers are handed it. `TorchOps` is plain torch,
right on every device; `CpuOps` and `CudaOps` take kernels in its place where they have some.

Legend: T tokens or rows, D inputs (emb_dim), N outputs, H heads, G KV groups, d head_dim, I hidden columns, E experts,
e those of a rank, K experts of a token, L rows of logits, V vocab_size. Activations have the Ops's dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from qwen3_dist.ops.batch import LayerCache, StepBatch


class NormWeights(NamedTuple):
    """What an RMSNorm multiplies and adds, and how it rounds."""

    scale: Tensor  # [D]
    eps: float
    shift: Tensor | None = None  # [D]
    qwen3_compatible: bool = True  # fp32 inside, cast back before the scale

    @property
    def is_plain(self) -> bool:
        """Whether it is Qwen3's own form, without the reference architecture's options."""
        return self.qwen3_compatible and self.shift is None


class Matrix(NamedTuple):
    """One product's weights."""

    weight: Tensor  # [N, D], or as an Ops has laid it out
    outputs: int  # N
    scale: Tensor | None = None  # fp32 [N] of an int8 weight
    bias: Tensor | None = None  # [N]


@dataclass(frozen=True)
class LinearWeights:
    """At most three matrices that multiply the same input. An Ops may keep them in a form of its own."""

    parts: tuple[Matrix, ...]


@dataclass(frozen=True)
class ExpertWeights:
    """A rank's SwiGLU experts, stacked. An Ops may keep them in a form of its own."""

    stacks: tuple[Tensor, Tensor, Tensor]  # fc1 and fc2 [e, I, D], fc3 [e, D, I]
    columns: int  # I
    scales: tuple[Tensor, Tensor, Tensor] | None = None  # fp32 of int8 stacks: [e, I], [e, I], [e, D]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them; an expert's part is at its place in the first dimension of each."""
        return (*self.stacks, *(self.scales or ()))


class DrawSettings(NamedTuple):
    """What rows of logits are drawn by."""

    columns: Tensor  # fp64 [4, L, 1]: temperature, top-k (V for all), top-p, a uniform number in [0, 1)
    top_ks: list[int]  # on the host


@dataclass(frozen=True)
class AttentionParts:
    """A finished attention layer and the norm before it."""

    norm: NormWeights
    qkv: LinearWeights
    out: LinearWeights
    q_norm: NormWeights | None
    k_norm: NormWeights | None
    head_dim: int
    window: int | None


@dataclass(frozen=True)
class FeedForwardParts:
    """A finished dense feed-forward layer and the norm before it."""

    norm: NormWeights
    gate_up: LinearWeights
    down: LinearWeights


@dataclass(frozen=True)
class MoEParts:
    """A finished mixture of experts and the norm before it."""

    norm: NormWeights
    gate: LinearWeights
    experts: ExpertWeights
    places: Tensor  # [C, E + 1] int64 place of each expert in the stacks, -1 elsewhere; row t looks in table t % C
    counts: Tensor  # [1 + e] int64, as `Ops.experts` has it
    choices: int
    norm_topk_prob: bool


@dataclass(frozen=True)
class HeadParts:
    """A finished output head and the norm before it."""

    norm: NormWeights
    weights: LinearWeights


BlockParts = tuple[AttentionParts, FeedForwardParts | MoEParts]


class BlockKernels(Protocol):
    """A block's two sublayers, each in one call with the norm before it. Results are partial sums over tp."""

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        """x [T, D] -> [T, D]."""

    def feed_forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D], of a mixture of experts what those of this rank add."""


class StageKernels(Protocol):
    """All blocks of a pipeline stage."""

    @property
    def blocks(self) -> Sequence[BlockKernels]: ...

    def run(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        caches: Sequence[LayerCache],
        batch: StepBatch,
        logits: Tensor | None,
        group: int,
        operation: int,
    ) -> int:
        """Makes x [T, D] what the last block makes of it, in one call. `logits` [L, v], if not None, become the head's
        of `batch.logits_rows`. `group` and `operation` are those of `Communicator.in_kernel`, and so is the result."""


class Ops(ABC):
    """Everything that depends on the device. No method makes the host wait for a GPU unless it says so."""

    @abstractmethod
    def describe(self, experts: ExpertWeights | None) -> str:
        """The device and the kernels that are used, in one line, with the reasons why others are not."""

    # Weights, once they are loaded

    @abstractmethod
    def finalize_linear(self, weights: LinearWeights, int8: bool) -> LinearWeights:
        """Plain weights in the form in which `linear` is fastest, rounded to int8 if asked."""

    @abstractmethod
    def finalize_experts(self, weights: ExpertWeights, int8: bool) -> ExpertWeights:
        """Plain stacks in the form in which `experts` is fastest, rounded to int8 if asked."""

    @abstractmethod
    def fuse(self, blocks: Sequence[BlockParts], head: HeadParts | None) -> StageKernels | None:
        """Kernels of whole blocks, if there are some for these. The parts' tensors must stay where they are."""

    # The model

    @abstractmethod
    def linear(self, x: Tensor, weights: LinearWeights) -> Sequence[Tensor]:
        """x [T, D] -> x @ weight^T * scale + bias [T, N] of each part; rows of a result are contiguous."""

    @abstractmethod
    def embedding(self, ids: Tensor, weights: LinearWeights) -> Tensor:
        """Rows `ids` [T] int64 of the only part, which is not int8 -> [T, D]."""

    @abstractmethod
    def norm(self, x: Tensor, weights: NormWeights) -> Tensor:
        """RMSNorm of x [..., D] over its last dimension."""

    @abstractmethod
    def rotate_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: tuple[NormWeights, NormWeights] | None,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache,
        slots: Tensor,
    ) -> Tensor:
        """Norms (by q's and k's of `norms`) and rotates q [T, H, d] and k [T, G, d] by cos and sin [T, 1, d], and
        stores k and v [T, G, d] in their `slots` [T] of the cache. Returns q, in place or not."""

    @abstractmethod
    def attention(self, q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
        """Causal attention of q [T, H, d] over everything its sequences have cached -> [T, H, d]. `window` limits each
        query to that many latest positions, itself included."""

    @abstractmethod
    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up of [T, I], whose rows are contiguous."""

    @abstractmethod
    def route(self, logits: Tensor, choices: int, normed: bool) -> tuple[Tensor, Tensor]:
        """Ids int64 and weights fp32 [T, K] of the likeliest experts of logits [T, E]: softmax over all in fp32, then
        top-k; `normed` makes a row's weights add up to 1. Weights are rounded to the logits' dtype."""

    @abstractmethod
    def experts(
        self, x: Tensor, weights: ExpertWeights, ids: Tensor, routing: Tensor, counts: Tensor
    ) -> Tensor:
        """Sum over a row's choices of routing * expert(x): x [T, D], ids int64 [T, K] of this rank's experts, -1 for
        none, routing fp32 [T, K] -> [T, D]. How often each id comes, from -1 on, is added to `counts` [1 + e] int64.
        The host may wait unless `experts_stay_on_device`."""

    @abstractmethod
    def experts_stay_on_device(self, weights: ExpertWeights) -> bool:
        """Whether `experts` never asks the host, as a CUDA graph needs."""

    # Draws, of logits [L, V] in fp32 or the Ops's dtype

    @abstractmethod
    def greedy(self, logits: Tensor) -> Tensor:
        """The likeliest token id of each row, of equals the first -> int64 [L]. Each row is contiguous."""

    @abstractmethod
    def draw_from_top_k(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        """Token ids int64 [L] drawn where all rows have a small top-k, among the likeliest in their order."""

    @abstractmethod
    def draw_from_top_p(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        """Token ids int64 [L] drawn with any top-k and top-p, among the likeliest in their order."""

    @abstractmethod
    def draw_from_all(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        """Token ids int64 [L] drawn from the vocabulary in its order, of rows that top-k and top-p do not cut."""
