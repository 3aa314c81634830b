"""Products with the codes of quantised checkpoints: each format against plain torch, its speed beside bf16, and whole
engines with fp8 weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_check.check import Figures, PlannedCheck, Setting, require
from benchmarks.gpu_check.experts import microseconds
from benchmarks.gpu_check.models import A3B, generate, running, shape_only, small_checkpoint
from benchmarks.gpu_check.parity import PROMPTS
from qwen3_dist.benchmark import Workload, measure, warm_up
from qwen3_dist.launch.processes import shared_nursery
from qwen3_dist.ops.base import ExpertWeights, LinearWeights, Matrix, Ops
from qwen3_dist.ops.choose import choose_ops
from qwen3_dist.ops.cuda.kernels import working_kernels
from qwen3_dist.ops.quantize import dequantized
from qwen3_dist.quantization import FP4, FP8, INT4, INT8, NIBBLES, Grid

_DTYPE = torch.bfloat16
_ROWS = (1, 8, 32, 256, 2048)
_MAX_ERROR = 0.01  # relative, of the norm: of bf16 sums in another order
_MAX_LOGPROB_ERROR = 1e-3  # of a token, in fp32


class _Form(NamedTuple):
    """Codes by blocks of `rows` outputs and `columns` inputs."""

    kind: str
    rows: int
    columns: int
    zeros: bool = False
    ordered: bool = False  # inputs name their groups, as with GPTQ's desc_act


_FORMS = {
    "fp8": _Form(FP8, 128, 128),
    "fp8 by outputs": _Form(FP8, 1, 1 << 22),
    "AWQ": _Form(INT4, 1, 128, zeros=True),
    "GPTQ, desc_act": _Form(INT4, 1, 128, zeros=True, ordered=True),
    "int8 by groups": _Form(INT8, 1, 128),
    "NVFP4": _Form(FP4, 1, 16),
    "MXFP4": _Form(FP4, 1, 32),
}
_OF_EXPERTS = ("fp8", "AWQ", "NVFP4")


class _Sizes(NamedTuple):
    """Products [outputs, inputs], and experts [columns, dim]."""

    products: tuple[tuple[int, int], ...]
    experts: int
    choices: int
    dim: int
    columns: int


_A3B_SIZES = _Sizes(((5120, 2048), (2048, 4096)), 128, 8, 2048, 768)  # Qwen3-30B-A3B's
_SMALL_SIZES = _Sizes(((160, 256),), 4, 2, 256, 96)


def checks(setting: Setting) -> Iterator[PlannedCheck]:
    ops, sizes = choose_ops(torch.device(setting.device), _DTYPE), _sizes(setting)
    rows = _ROWS if setting.on_gpu else _ROWS[:3]
    for name, form in _FORMS.items():
        for outputs, inputs in sizes.products:
            run = partial(_products, setting, ops, form, outputs, inputs, rows)
            yield PlannedCheck(f"{name}, products of {outputs} x {inputs}", run)
    for name in _OF_EXPERTS:
        yield PlannedCheck(f"{name}, experts", partial(_experts, setting, ops, _FORMS[name], sizes, rows))
    with shared_nursery():
        for kind, layout in (("dense", "tp=1"), ("moe", "tp=1"), ("moe", "tp=2,ep=2")):
            yield PlannedCheck(f"fp8, {kind}, {layout}", partial(_engine, setting, kind, layout), 10)
    if setting.on_gpu:
        yield PlannedCheck(
            f"fp8, rates, Qwen3-30B-A3B, {setting.layers} layers", partial(_rates, setting), 40
        )


def _sizes(setting: Setting) -> _Sizes:
    return _A3B_SIZES if setting.on_gpu else _SMALL_SIZES


def _matrix(setting: Setting, form: _Form, *shape: int) -> Matrix:
    """Random codes [..., N, D]; the weights have a norm of about 1 for each output."""
    *lead, outputs, inputs = shape
    generator = torch.Generator(setting.device).manual_seed(inputs)

    def random(most: int, *sizes: int) -> Tensor:
        return torch.randint(0, most, sizes, generator=generator, device=setting.device)

    nibbles = form.kind if form.kind in NIBBLES else None
    groups = -(-inputs // form.columns) if form.ordered else 0
    grid = Grid(form.rows, form.columns, nibbles=nibbles, groups=groups)
    blocks = (*lead, *grid.shape(outputs, inputs))
    if nibbles:
        codes = random(256, *lead, outputs, inputs // 2).to(torch.uint8)
    else:
        codes = random(120, *shape).to(torch.uint8) | 128 * random(2, *shape).to(torch.uint8)
        codes = codes.view(torch.float8_e4m3fn if form.kind == FP8 else torch.int8)
    zero = random(16, *blocks).to(torch.int8) if form.zeros else None
    order = random(groups, *lead, inputs).int() if form.ordered else None
    scale = (random(64, *blocks) + 64.0) / (64 * (100 if nibbles is None else 4) * inputs**0.5)
    return Matrix(codes, outputs, scale, None, grid, zero, order)


def _products(
    setting: Setting, ops: Ops, form: _Form, outputs: int, inputs: int, rows: tuple[int, ...]
) -> Figures:
    """Microseconds by number of rows, and of the same product in bf16. Raises CheckFailed if plain torch has another
    result."""
    _require_kernel(setting, form)
    part = _matrix(setting, form, outputs, inputs)
    assert part.scale is not None and part.grid is not None
    weight = dequantized(part.weight, part.scale, part.grid, range(outputs), _DTYPE, part.zero, part.order)
    weights = ops.finalize_linear(LinearWeights((part,)), False)
    figures: Figures = {}
    for number in rows:
        x = torch.randn(number, inputs, device=setting.device).to(_DTYPE)
        run, plain = partial(ops.linear, x, weights), partial(F.linear, x, weight)
        _require_equal(run()[0], plain(), number)
        figures[f"{number} rows, us"] = _beside_bf16(run, plain, setting)
    return figures


def _experts(setting: Setting, ops: Ops, form: _Form, sizes: _Sizes, rows: tuple[int, ...]) -> Figures:
    """As `_products`, for experts."""
    _require_kernel(setting, form)
    shapes = ((sizes.columns, sizes.dim), (sizes.columns, sizes.dim), (sizes.dim, sizes.columns))
    parts = [_matrix(setting, form, sizes.experts, *shape) for shape in shapes]
    wide = [torch.stack([_weight(part, expert) for expert in range(sizes.experts)]) for part in parts]
    triples = [
        None if getattr(parts[0], name) is None else tuple(getattr(part, name) for part in parts)
        for name in ("weight", "scale", "grid", "zero", "order")
    ]
    coded = ExpertWeights(triples[0], sizes.columns, *triples[1:])  # type: ignore[arg-type]
    weights = ops.finalize_experts(coded, False)
    plain_weights = ops.finalize_experts(ExpertWeights((wide[0], wide[1], wide[2]), sizes.columns), False)
    figures: Figures = {}
    for number in rows:
        x = torch.randn(number, sizes.dim, device=setting.device).to(_DTYPE)
        ids = (
            torch.rand(number, sizes.experts, device=setting.device)
            .argsort(dim=1)[:, : sizes.choices]
            .contiguous()
        )
        routed = (ids, torch.rand(ids.shape, device=setting.device), ids.new_zeros(1 + sizes.experts))
        run, plain = (
            partial(ops.experts, x, weights, *routed),
            partial(ops.experts, x, plain_weights, *routed),
        )
        _require_equal(run(), plain(), number)
        figures[f"{number} rows, us"] = _beside_bf16(run, plain, setting)
    return figures


def _weight(part: Matrix, expert: int) -> Tensor:
    assert part.scale is not None and part.grid is not None
    zero = None if part.zero is None else part.zero[expert]
    codes = (part.weight[expert], part.scale[expert], part.grid)
    return dequantized(*codes, range(part.outputs), _DTYPE, zero)


def _require_kernel(setting: Setting, form: _Form) -> None:
    """Raises CheckFailed if a GPU would compute without our kernel."""
    kernels = working_kernels(torch.device(setting.device), _DTYPE) if setting.on_gpu else None
    reads = not setting.on_gpu or (kernels is not None and kernels.reads_codes(form.kind))
    require(reads, f"the kernel for {form.kind} codes does not work here; the log says why")


def _require_equal(got: Tensor, expected: Tensor, rows: int) -> None:
    error = float((got.float() - expected.float()).norm() / expected.float().norm())
    require(
        error <= _MAX_ERROR,
        f"{rows} rows have a relative error of {error:.3g}; at most {_MAX_ERROR:g} is allowed",
    )


def _beside_bf16(run: Callable[[], object], plain: Callable[[], object], setting: Setting) -> Figures:
    return {"codes": microseconds(run, setting), "bf16": microseconds(plain, setting)}


def _engine(setting: Setting, kind: str, layout: str) -> Figures:
    """An engine with fp8 weights has the tokens and log-probabilities of one on a CPU with the same codes."""
    length = 16 if setting.on_gpu else 6
    settings: dict[str, Any] = {
        "dtype": "float32",
        "num_blocks": 128,
        "max_model_len": 1024,
        "quantize": "fp8",
    }
    path = small_checkpoint(kind, setting)
    with running(setting, path, layout, **settings) as engine:
        made = generate(engine, PROMPTS, length)
    with running(setting, path, device="cpu", share_gpus=False, **settings) as engine:
        expected = generate(engine, PROMPTS, length)
    largest = 0.0
    for number, (ours, theirs) in enumerate(zip(made, expected, strict=True)):
        require(ours.token_ids == theirs.token_ids, f"prompt {number} has other tokens than on a CPU")
        pairs = zip(ours.logprobs, theirs.logprobs, strict=True)
        largest = max(largest, *(abs(one.logprob - other.logprob) for one, other in pairs))
    require(
        largest <= _MAX_LOGPROB_ERROR,
        f"a log-probability differs by {largest:.3g} from a CPU's; at most {_MAX_LOGPROB_ERROR:g} is allowed",
    )
    return {"sequences": len(made), "error": float(f"{largest:.3g}")}


def _rates(setting: Setting) -> Figures:
    """Tokens/s of the large model by batch; the stage `rates` has those in bf16."""
    model = shape_only("A3B-fp8", {**A3B, "num_hidden_layers": setting.layers}, setting)
    settings: dict[str, Any] = {
        "max_num_seqs": 256,
        "max_num_batched_tokens": None,
        "max_model_len": 2048,
        "prefix_caching": False,
    }
    figures: Figures = {}
    with running(setting, model, load_format="random", quantize="fp8", **settings) as engine:
        warm_up(engine)
        for sequences in (1, 32, 256):
            measure(engine, Workload(sequences, 32, 2, seed=1))
            done = measure(engine, Workload(sequences, 32, 64))
            figures[f"{sequences} sequences, tokens_per_s"] = round(done["output_tokens_per_s"], 1)
        done = measure(engine, Workload(8, 1024, 1))
        figures["8 prompts of 1024, ttft_ms"] = done["ttft_ms"]
    return figures
