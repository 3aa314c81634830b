"""`Ops`, the interface of all operations that depend on the device, and the types of its arguments.

`choose.choose_ops` makes one `Ops` at a rank's start, and layers get it in their constructors. `TorchOps` is plain
torch and works on every device; `CpuOps` and `CudaOps` replace operations by kernels.

Legend: T tokens or rows, D inputs (emb_dim), N outputs, H heads, G KV groups, d head_dim, I hidden columns, E experts,
e experts of this rank, K experts per token, L rows of logits, V vocab_size, v rows of the vocabulary on this rank.
Activations have the Ops's dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.quantization import Grid


class NormWeights(NamedTuple):
    """The parameters of an RMSNorm."""

    scale: Tensor  # [D]
    eps: float
    shift: Tensor | None = None  # [D]
    qwen3_compatible: bool = True  # fp32 inside, cast back before the scale

    @property
    def is_plain(self) -> bool:
        """Whether this is Qwen3's RMSNorm, without options of the reference architecture. Kernels need that."""
        return self.qwen3_compatible and self.shift is None


class Matrix(NamedTuple):
    """The weights of one matrix product."""

    weight: Tensor  # [N, D], or in the layout of an Ops
    outputs: int  # N
    # fp32 [N] of an int8 weight; with a grid [blocks of outputs, blocks of inputs], or in the layout of an Ops
    scale: Tensor | None = None
    bias: Tensor | None = None  # [N]
    grid: Grid | None = None  # the blocks of the codes of a quantised checkpoint
    zero: Tensor | None = None  # int8, of the shape of `scale`: the zeros of codes, if they have any
    order: Tensor | None = None  # int32 [D], the group of each input, if `grid` has groups


@dataclass(frozen=True)
class LinearWeights:
    """At most three matrices that multiply the same input. An Ops may use a subclass with its own layout."""

    parts: tuple[Matrix, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the parts."""
        return tuple(
            tensor
            for part in self.parts
            for tensor in (part.weight, part.scale, part.bias, part.zero, part.order)
            if tensor is not None
        )


@dataclass(frozen=True)
class ExpertWeights:
    """The SwiGLU experts of a rank, stacked. An Ops may use a subclass with its own layout."""

    stacks: tuple[Tensor, Tensor, Tensor]  # fc1 and fc2 [e, I, D], fc3 [e, D, I]
    columns: int  # I
    # fp32 of int8 stacks: [e, I], [e, I], [e, D]; with grids as in `Matrix`, for each expert
    scales: tuple[Tensor, Tensor, Tensor] | None = None
    grids: tuple[Grid, Grid, Grid] | None = None  # the blocks of the codes of a quantised checkpoint
    zeros: tuple[Tensor, Tensor, Tensor] | None = None  # as in `Matrix`, for each expert
    orders: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Stacks, and what belongs to their codes; the first dimension of each is the expert."""
        return tuple(tensor for name in self._triples for tensor in getattr(self, name))

    def with_tensors(self, tensors: Sequence[Tensor]) -> ExpertWeights:
        """These weights with others in the place of `tensors`."""
        triples: dict[str, Any] = {
            name: tuple(tensors[3 * i : 3 * i + 3]) for i, name in enumerate(self._triples)
        }
        return replace(self, **triples)

    @property
    def _triples(self) -> list[str]:
        return [name for name in ("stacks", "scales", "zeros", "orders") if getattr(self, name) is not None]


class DrawSettings(NamedTuple):
    """Sampling parameters of L rows of logits."""

    columns: Tensor  # fp64 [4, L, 1]: temperature, top-k (V for all), top-p, a uniform number in [0, 1)
    top_ks: list[int]  # top-k of each row, on the host


@dataclass(frozen=True)
class AttentionParts:
    """The finalized weights of an attention layer and of the norm before it."""

    norm: NormWeights
    qkv: LinearWeights
    out: LinearWeights
    q_norm: NormWeights | None
    k_norm: NormWeights | None
    head_dim: int
    window: int | None


@dataclass(frozen=True)
class FeedForwardParts:
    """The finalized weights of a dense feed-forward layer and of the norm before it."""

    norm: NormWeights
    gate_up: LinearWeights
    down: LinearWeights


@dataclass(frozen=True)
class MoEParts:
    """The finalized weights of a MoE layer and of the norm before it."""

    norm: NormWeights
    gate: LinearWeights
    experts: ExpertWeights
    # [C, E + 1] int64, index of each expert in the stacks, -1 if it is on another rank; token t uses row t % C
    places: Tensor
    counts: Tensor  # [1 + e] int64, see `Ops.experts`
    choices: int
    norm_topk_prob: bool


@dataclass(frozen=True)
class HeadParts:
    """The finalized weights of the output head and of the norm before it."""

    norm: NormWeights
    weights: LinearWeights


BlockParts = tuple[AttentionParts, FeedForwardParts | MoEParts]


class BlockKernels(Protocol):
    """Fused kernels of a transformer block's two sublayers, each with the norm before it. Results are partial sums
    over tp."""

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        """x [T, D] -> [T, D]."""

    def feed_forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]; in a MoE layer the sum over this rank's experts."""


class StageKernels(Protocol):
    """A fused kernel of all blocks of a pipeline stage."""

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
        """Runs all blocks on x [T, D], in place. Fills `logits` [L, v], if not None, with the head's logits of
        `batch.logits_rows`. `group`, `operation` and the result are as in `Communicator.in_kernel`."""


class Ops(ABC):
    """All operations that depend on the device. A method makes the host wait for a GPU only if its docstring says
    so."""

    @abstractmethod
    def describe(self, experts: ExpertWeights | None) -> str:
        """Describes in one line the device, the kernels in use, and why others are not used."""

    # Weights, after loading

    @abstractmethod
    def finalize_linear(self, weights: LinearWeights, int8: bool) -> LinearWeights:
        """Converts weights as loaded to the layout in which `linear` is fastest, and plain ones to int8 if `int8`."""

    @abstractmethod
    def finalize_experts(self, weights: ExpertWeights, int8: bool) -> ExpertWeights:
        """Converts stacks as loaded to the layout in which `experts` is fastest, and plain ones to int8 if `int8`."""

    @abstractmethod
    def fuse(self, blocks: Sequence[BlockParts], head: HeadParts | None) -> StageKernels | None:
        """Fused kernels of these blocks; None if there are none. The tensors of the parts must keep their
        addresses."""

    # The model

    @abstractmethod
    def linear(self, x: Tensor, weights: LinearWeights) -> Sequence[Tensor]:
        """x [T, D] -> x @ weight^T * scale + bias [T, N] for each part. Rows of the results are contiguous."""

    @abstractmethod
    def embedding(self, ids: Tensor, weights: LinearWeights) -> Tensor:
        """Looks up rows `ids` [T] int64 of `weights`, which has one part that is not int8 -> [T, D]."""

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
        """Applies RMSNorm (`norms` of q and k) and RoPE (cos and sin [T, 1, d]) to q [T, H, d] and k [T, G, d], and
        writes k and v [T, G, d] to their `slots` [T] of the cache. Returns q, which may be changed in place."""

    @abstractmethod
    def attention(self, q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
        """Causal attention of q [T, H, d] over the KV cache of its sequences -> [T, H, d]. With a sliding `window`
        each query sees that many positions, its own included."""

    @abstractmethod
    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, both [T, I] with contiguous rows -> [T, I]."""

    @abstractmethod
    def route(self, logits: Tensor, choices: int, normed: bool) -> tuple[Tensor, Tensor]:
        """Ids int64 and weights fp32 [T, K] of the top experts of router logits [T, E]: softmax over all experts in
        fp32, then top-k. `normed` makes the weights of a row add up to 1. Weights are rounded to the logits' dtype."""

    @abstractmethod
    def experts(
        self, x: Tensor, weights: ExpertWeights, ids: Tensor, routing: Tensor, counts: Tensor
    ) -> Tensor:
        """Sum over the K choices of routing * expert(x) -> [T, D]. x [T, D]; ids int64 [T, K] of this rank's experts,
        -1 for experts of other ranks; routing fp32 [T, K]. Adds the number of occurrences of each id, from -1 on, to
        `counts` [1 + e] int64. The host may wait unless `experts_stay_on_device`."""

    # In deterministic mode `experts` in two halves, one row for each choice of a token: ranks that split an expert's
    # columns exchange the hidden columns in between, and nobody adds up outputs of some experts only.

    @abstractmethod
    def expert_hidden(self, x: Tensor, weights: ExpertWeights, ids: Tensor, counts: Tensor) -> Tensor:
        """silu(fc1 x) * fc2 x by each row's expert -> [T, I]. x [T, D]; ids int64 [T], -1 for experts of other ranks,
        whose rows are arbitrary. Adds to `counts` and makes the host wait as `experts` does."""

    @abstractmethod
    def expert_outputs(
        self, hidden: Tensor, weights: ExpertWeights, ids: Tensor, routing: Tensor, outputs: int
    ) -> Tensor:
        """routing * fc3 hidden by each row's expert -> [T, outputs], both factors rounded to the Ops's dtype; 0 where
        the id is -1. hidden [T, I]; ids int64 [T]; routing fp32 [T]."""

    # With adapters of experts: the three products one by one, so that an adapter's outputs are added in between.

    @abstractmethod
    def expert_product(
        self, x: Tensor, weights: ExpertWeights, which: int, ids: Tensor, outputs: int
    ) -> Tensor:
        """Each row times the matrix `which` of its expert -> [T, outputs]: 0 is fc1, 1 is fc2, 2 is fc3. 0 where the
        id is -1. x [T, inputs]; ids int64 [T]. The host may wait."""

    @abstractmethod
    def experts_stay_on_device(self, weights: ExpertWeights) -> bool:
        """Whether `experts` runs without the host, which a CUDA graph needs."""

    # Sampling, from logits [L, V] in fp32 or the Ops's dtype

    @abstractmethod
    def greedy(self, logits: Tensor) -> Tensor:
        """The argmax of each row, the first of equal ones -> int64 [L]. Rows are contiguous."""

    @abstractmethod
    def log_softmax(self, logits: Tensor) -> Tensor:
        """Log-probabilities of each row, fp32 [L, V]."""

    @abstractmethod
    def likeliest(self, logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest of logprobs fp32 [L, V] in order, and their token ids: both [L, count]."""

    @abstractmethod
    def draw_from_top_k(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        """Samples token ids int64 [L] for rows with a small top-k, from candidates sorted by logit."""

    @abstractmethod
    def draw_from_top_p(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        """Samples token ids int64 [L] for rows with any top-k and top-p, from candidates sorted by logit."""

    @abstractmethod
    def draw_from_all(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        """Samples token ids int64 [L] for rows without top-k and top-p, from the vocabulary in order of ids."""
