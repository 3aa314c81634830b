"""The operations of deterministic mode: the bits of a row depend on nothing beside it, and its numbers are right.

Each operation is computed for all rows at once, and again for some rows, some outputs or heads, in other chunks and
with another number of threads. `tests/qwen3_dist/test_deterministic.py` compares whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from qwen3_dist.errors import ConfigError
from qwen3_dist.ops import choose
from qwen3_dist.ops.base import DrawSettings, ExpertWeights, LinearWeights, Matrix, NormWeights, Ops
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.choose import deterministic_ops
from qwen3_dist.ops.cpu import build
from qwen3_dist.ops.cuda.deterministic import DeterministicCudaOps
from qwen3_dist.ops.cuda.kernels import GpuKernels
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.quantization import Grid
from tests.batches import random_batch

CPU, TORCH = torch.device("cpu"), TorchOps()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-5}
KINDS = [("cpu", torch.bfloat16), ("cpu", torch.float32), ("triton", torch.float32)]
Kind = tuple[Ops, torch.dtype]
PARTS = (1, 2, 13, 29, 40)  # rows at a time: fewer and more than a tile of each kernel has


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{str(kind[1]).removeprefix('torch.')}")
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    name, dtype = request.param
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    if name == "triton":
        kernels = dict.fromkeys((dtype, torch.float32), GpuKernels())
        yield DeterministicCudaOps(CPU, dtype, kernels), dtype
    elif build.library(deterministic=True) is None:
        pytest.skip("no C++ compiler is here")
    else:
        yield deterministic_ops(CPU, dtype), dtype
    torch.set_num_threads(threads)


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)


def close(got: Tensor, expected: Tensor) -> None:
    error = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, expected.to(got.dtype), atol=error, rtol=error)


def row_by_row(compute: Callable[..., Tensor], *inputs: Tensor, parts: Sequence[int] = PARTS) -> Tensor:
    """`compute` of all rows of the inputs with two threads. Fails if rows differ when only `parts` of them are
    computed at once, with one thread and with three."""
    torch.set_num_threads(2)
    whole = compute(*inputs)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for begin, end in pairwise(accumulate(parts, initial=0)):
            assert compute(*(each[begin:end] for each in inputs)).equal(whole[begin:end]), (threads, begin)
    return whole


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("inner", "outputs"), [(200, 70), (64, 33)])
def test_a_product_depends_on_its_row_and_output_alone(
    kind: Kind, inner: int, outputs: int, int8: bool
) -> None:
    ops, dtype = kind
    rows = sum(PARTS)
    part = Matrix(drawn(outputs, inner, dtype=dtype), outputs, bias=drawn(outputs, dtype=dtype))
    x = torch.randn(rows, inner).to(dtype)

    def weights(begin: int, end: int) -> LinearWeights:
        assert part.bias is not None
        some = Matrix(part.weight[begin:end], end - begin, bias=part.bias[begin:end])
        return ops.finalize_linear(LinearWeights((some,)), int8)

    whole = weights(0, outputs)
    result = row_by_row(lambda x: ops.linear(x, whole)[0], x)
    close(result, TORCH.linear(x, TORCH.finalize_linear(LinearWeights((part,)), int8))[0])
    for begin, end in ((0, 7), (7, outputs)):
        assert ops.linear(x[:9], weights(begin, end))[0].equal(result[:9, begin:end])


def test_a_product_with_codes_depends_on_its_row_alone(kind: Kind) -> None:
    (ops, dtype), grid = kind, Grid(24, 32, 7, 13)
    codes = (100 * torch.randn(70, 200)).to(torch.float8_e4m3fn)
    part = Matrix(codes, 70, torch.rand(grid.shape(70, 200)) / 2000, None, grid)
    x, weights = torch.randn(sum(PARTS), 200).to(dtype), LinearWeights((part,))
    kept = ops.finalize_linear(weights, False)
    close(row_by_row(lambda x: ops.linear(x, kept)[0], x), TORCH.linear(x, weights)[0])


def test_experts_of_codes_depend_on_their_row_alone(kind: Kind) -> None:
    (ops, dtype), wide, tall = kind, Grid(24, 20, 7, 0), Grid(24, 20, 0, 7)
    grids, sizes = (wide, wide, tall), ((33, 48), (33, 48), (48, 33))
    codes = tuple((100 * torch.randn(3, *size)).to(torch.float8_e4m3fn) for size in sizes)
    scales = tuple(torch.rand(3, *g.shape(*size)) / 700 for g, size in zip(grids, sizes, strict=True))
    loaded = ExpertWeights(codes, 33, scales, grids)  # type: ignore[arg-type]
    kept, rows, counts = ops.finalize_experts(loaded, False), sum(PARTS), torch.zeros(4, dtype=torch.int64)
    x, ids, routing = torch.randn(rows, 48).to(dtype), torch.randint(0, 3, (rows,)), torch.rand(rows)

    def experts(x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        hidden = ops.expert_hidden(x, kept, ids, counts)
        return ops.expert_outputs(hidden, kept, ids, routing, 48)

    got = row_by_row(experts, x, ids, routing)
    close(got, TORCH.experts(x, loaded, ids[:, None], routing[:, None], counts))


def chunks_of(cuts: Sequence[int]) -> list[tuple[int, int]]:
    return [*pairwise((0, *cuts))][::-1]


def pieces(batch: StepBatch, cuts: Sequence[int]) -> StepBatch:
    """The batch of one sequence, whose tokens are computed in chunks that end at `cuts`, the last chunk first."""
    chunks = chunks_of(cuts)
    query_lens, ends = tuple(end - begin for begin, end in chunks), tuple(end for _, end in chunks)
    return replace(
        batch,
        table_rows=torch.zeros(len(chunks), dtype=torch.int64),
        context_lens=torch.tensor(ends),
        host_context_lens=ends,
        query_starts=torch.tensor([0, *accumulate(query_lens)]),
        query_lens=query_lens,
        num_decodes=next((i for i, length in enumerate(query_lens) if length != 1), len(query_lens)),
    )


# heads, KV groups, head_dim, tokens, ends of the chunks in which they come
SHAPES = [
    (8, 2, 24, 310, [*range(290, 311)]),
    (20, 2, 16, 310, [128, 129, 140, 310]),
    (4, 4, 128, 310, [1, 2, 51, 53, 60, 309, 310]),
]
ATTENTION = [(each, *shape) for each in KINDS[:2] for shape in SHAPES]
ATTENTION += [(KINDS[2], 4, 2, 16, 75, [1, 33, 34, 70, 75])]  # Triton's interpreter is slow


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize(("kind", "heads", "groups", "dim", "length", "cuts"), ATTENTION, indirect=["kind"])
def test_attention_depends_on_a_query_and_its_keys_alone(
    kind: Kind, heads: int, groups: int, dim: int, length: int, cuts: list[int], window: int | None
) -> None:
    ops, dtype = kind
    one = random_batch((length,), (length,), block_size=4)
    cache = LayerCache(*torch.randn(2, 128, 4, groups, dim).to(dtype))
    q = torch.randn(length, heads, dim).to(dtype)
    torch.set_num_threads(2)
    whole = ops.attention(q, cache, one, window)
    close(whole, TORCH.attention(q, cache, one, window))
    torch.set_num_threads(3)
    order = torch.cat([torch.arange(begin, end) for begin, end in chunks_of(cuts)])
    assert ops.attention(q[order], cache, pieces(one, cuts), window).equal(whole[order])
    half = LayerCache(cache.keys[:, :, :1].contiguous(), cache.values[:, :, :1].contiguous())
    alone = q[:, :1].contiguous()  # one head of a group: as on more ranks than there are groups
    assert ops.attention(alone, half, one, window).equal(whole[:, :1])


@pytest.mark.parametrize("kind", KINDS[:2], indirect=True)  # a program of the Triton kernels computes one row
def test_norm_swiglu_and_router_depend_on_their_row_alone(kind: Kind) -> None:
    ops, dtype = kind
    rows = sum(PARTS)
    weights = NormWeights(torch.rand(99).to(dtype), 1e-6)
    x, logits = torch.randn(rows, 99).to(dtype), torch.rand(rows, 37).argsort(dim=1).to(dtype) / 8
    close(row_by_row(lambda x: ops.norm(x, weights), x), TORCH.norm(x, weights))
    gate, up = (3 * torch.randn(rows, 2 * 90).to(dtype)).chunk(2, dim=1)
    whole = row_by_row(ops.swiglu, gate, up)
    close(whole, TORCH.swiglu(gate, up))
    assert ops.swiglu(gate[:, 5:18], up[:, 5:18]).equal(
        whole[:, 5:18]
    )  # columns, wherever they lie in a vector
    weights_of = row_by_row(lambda logits: ops.route(logits, 3, True)[1], logits)
    ids = row_by_row(lambda logits: ops.route(logits, 3, True)[0], logits)
    expected, theirs = TORCH.route(logits, 3, True)
    assert ids.equal(expected)
    close(weights_of.to(dtype), theirs.to(dtype))


@pytest.mark.parametrize("int8", [False, True])
def test_an_expert_depends_on_its_row_and_column_alone(kind: Kind, int8: bool) -> None:
    ops, dtype = kind
    here, dim, columns, rows = 4, 70, 45, sum(PARTS)
    fc1, fc2 = (drawn(here, columns, dim, dtype=dtype) for _ in range(2))
    fc3 = drawn(here, dim, columns, dtype=dtype)
    x, routing, ids = torch.randn(rows, dim).to(dtype), torch.rand(rows), torch.randint(-1, here, (rows,))

    def weights(ops: Ops, inner: slice = slice(None), outputs: slice = slice(None)) -> ExpertWeights:
        some = fc1[:, inner].contiguous(), fc2[:, inner].contiguous(), fc3[:, outputs].contiguous()
        return ops.finalize_experts(ExpertWeights(some, some[0].shape[1]), int8)

    def hidden_of(ops: Ops, of: ExpertWeights) -> Callable[[Tensor, Tensor], Tensor]:
        def hidden(x: Tensor, ids: Tensor) -> Tensor:
            return ops.expert_hidden(x, of, ids, counts).masked_fill(ids[:, None] < 0, 0)

        return hidden

    counts, whole = torch.zeros(1 + here, dtype=torch.int64), weights(ops)
    hidden = row_by_row(hidden_of(ops, whole), x, ids)
    seen = counts.clone()
    assert seen[1:].equal(3 * torch.bincount(ids[ids >= 0], minlength=here))
    close(hidden, hidden_of(TORCH, weights(TORCH))(x, ids))
    outputs = row_by_row(
        lambda *given: ops.expert_outputs(given[0], whole, *given[1:], dim), hidden, ids, routing
    )
    close(outputs, TORCH.expert_outputs(hidden, weights(TORCH), ids, routing, dim))
    assert not outputs[ids < 0].any()
    part = weights(ops, slice(7, 20), slice(30, 55))
    assert hidden_of(ops, part)(x, ids).equal(hidden[:, 7:20])
    assert ops.expert_outputs(hidden, part, ids, routing, 25).equal(outputs[:, 30:55])
    # With adapters the products are computed one by one; a row without one has the same bits.
    gate, up = (
        row_by_row(
            lambda *given, one=one: ops.expert_product(given[0], whole, one, given[1], columns), x, ids
        )
        for one in (0, 1)
    )
    assert ops.swiglu(gate, up).masked_fill(ids[:, None] < 0, 0).equal(hidden)
    down = ops.expert_product(hidden, whole, 2, ids, dim)
    assert down.float().mul_(routing[:, None]).to(dtype).equal(outputs)


# torch adds up a single row of more than 32,768 numbers in two parts
@pytest.mark.parametrize(
    ("kind", "vocab_size"), [(KINDS[0], 199), (KINDS[0], 40_004), (KINDS[1], 40_004)], indirect=["kind"]
)
def test_log_probabilities_and_draws_depend_on_their_row_alone(kind: Kind, vocab_size: int) -> None:
    ops, dtype = kind
    rows = sum(PARTS[:3])
    logits = (3 * torch.randn(rows, vocab_size)).to(dtype)
    whole = row_by_row(ops.log_softmax, logits, parts=PARTS[:3])
    close(whole, logits.double().log_softmax(dim=-1).float())
    for draw, top_ks, top_p in (
        ("draw_from_all", [vocab_size] * rows, 1.0),
        ("draw_from_top_k", [7, 1, 30] * rows, 0.6),
        ("draw_from_top_p", [vocab_size] * rows, 0.95),
        (
            "draw_from_top_p",
            [vocab_size, 150] * rows,
            0.999,
        ),  # too many candidates to select them, or cut by both
    ):
        columns = torch.tensor([[0.7], [0.0], [top_p], [0.0]], dtype=torch.float64).repeat(1, rows)
        columns[1], columns[3] = torch.tensor(top_ks[:rows]), torch.rand(rows, dtype=torch.float64)

        def drawn_from(logits: Tensor, columns: Tensor, draw: str = draw) -> Tensor:
            settings = DrawSettings(columns.t()[:, :, None].contiguous(), columns[:, 1].long().tolist())
            drawn: Tensor = getattr(ops, draw)(logits, settings)
            return drawn

        row_by_row(drawn_from, logits, columns.t(), parts=PARTS[:3])


def test_what_has_no_such_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="dtype=float16; set dtype to bfloat16 or float32"):
        deterministic_ops(CPU, torch.float16)
    monkeypatch.setattr(choose, "load_kernels", lambda dtype, deterministic: None)
    with pytest.raises(ConfigError, match="install g\\+\\+ or set deterministic=false"):
        deterministic_ops(CPU, torch.bfloat16)
    monkeypatch.setattr(choose, "working_kernels", lambda device, dtype, deterministic: None)
    with pytest.raises(ConfigError, match="Triton kernels for bfloat16 .* set deterministic=false"):
        deterministic_ops(torch.device("cuda"), torch.bfloat16)


def test_log_probabilities_by_triton() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 2100)
    close(GpuKernels().log_softmax(logits), logits.log_softmax(dim=-1))
