"""A kernel that cannot be used where it runs is left out, and the log says why."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
import torch
import torch.nn.attention
from torch import Tensor

from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.cuda import attention as gpu_attention
from qwen3_dist.ops.cuda import kernels as gpu
from qwen3_dist.ops.cuda.attention import Backend, activate_flash, chosen_attention
from qwen3_dist.ops.probe import failure
from qwen3_dist.ops.torch_attention import gathered_attention
from qwen3_dist.quantization import FP4, FP8, INT4, INT8

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
SHAPES = (CPU, torch.float32, 8, 2, 16, 4)  # heads, KV groups, head_dim, block_size


@pytest.fixture(autouse=True)
def nothing_found_before() -> Iterator[None]:
    for found in (gpu.working_kernels, chosen_attention):
        found.cache_clear()
    yield
    for found in (gpu.working_kernels, chosen_attention):
        found.cache_clear()


def wrong(q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
    return gathered_attention(q, cache, batch, window) + 0.25


def broken(q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
    raise RuntimeError("no kernel image\nfor this card")


def test_an_answer_of_nan_is_wrong() -> None:
    assert failure(lambda: torch.tensor([float("nan")]), torch.zeros(1), tolerance=1.0) is not None


def test_backends_that_fail_are_logged_once_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_attention, "BACKENDS", (Backend("A", broken), Backend("B", wrong)))
    for _ in range(3):
        assert chosen_attention(*SHAPES).backend.attend is gathered_attention
    first, second = (record.getMessage() for record in caplog.records)
    assert "Attention by A" in first and "RuntimeError: no kernel image for this card" in first
    assert "Attention by B" in second and "off by 0.25" in second
    assert [reason[:2] for reason in chosen_attention(*SHAPES).reasons] == ["A:", "B:"]


def test_triton_that_does_not_compile_is_logged_once_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gpu, "GpuKernels", no_compiler)
    assert [gpu.working_kernels(CPU, torch.bfloat16) for _ in range(2)] == [None, None]
    (record,) = caplog.records
    assert "bfloat16" in record.getMessage() and "Failed to find C compiler" in record.getMessage()


def test_kernels_that_are_all_right_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(gpu.working_kernels(CPU, torch.float32), gpu.GpuKernels)
    assert not caplog.records


@pytest.mark.parametrize(
    "name",
    ["norm", "rotate", "swiglu", "experts", "linear_int8", "draw_from_all", "draw_from_ordered"],
)
def test_a_kernel_that_computes_something_else_is_logged_with_its_name_and_error(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = gpu.GpuKernels()
    right = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *arguments: right(*arguments) + 2)
    monkeypatch.setattr(gpu, "GpuKernels", lambda: kernels)
    assert gpu.working_kernels(CPU, torch.float32) is None
    (record,) = caplog.records
    assert f"{name}: its result is off by 2 " in record.getMessage()


@pytest.mark.parametrize("kind", [FP8, INT8, INT4, FP4])
def test_kernels_for_codes_that_are_wrong_leave_the_others_and_are_logged_once(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = gpu.working_kernels(CPU, torch.float32)
    assert kernels is not None and kernels.reads_codes(kind) and not caplog.records
    right = kernels.linear_codes
    gpu.working_kernels.cache_clear()
    wrong_kernels = gpu.GpuKernels()
    monkeypatch.setattr(wrong_kernels, "linear_codes", lambda x, part: right(x, part) + 2)
    monkeypatch.setattr(gpu, "GpuKernels", lambda: wrong_kernels)
    kept = gpu.working_kernels(CPU, torch.float32)
    assert kept is wrong_kernels and not kept.reads_codes(kind) and not kept.reads_codes(kind)
    (record,) = caplog.records
    assert f"{kind} codes" in record.getMessage() and "off by 2 " in record.getMessage()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A card of compute capability 9 with the package of FlashAttention 3; what is activated on it."""
    activated: list[str] = []
    package = types.ModuleType("flash_attn_interface")
    package.__spec__ = types.SimpleNamespace(name="flash_attn_interface")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    return activated


def test_flash_attention_3_is_activated_where_it_can_be(card: list[str]) -> None:
    assert activate_flash(CUDA, torch.bfloat16) is None
    assert card == ["FA3"]


def test_flash_attention_3_says_what_it_lacks(card: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float32" in str(activate_flash(CUDA, torch.float32))
    with monkeypatch.context() as older:
        older.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        assert "capability 9, not 8.0" in str(activate_flash(CUDA, torch.bfloat16))
    with monkeypatch.context() as bare:
        bare.delitem(sys.modules, "flash_attn_interface")
        assert "flash_attn_interface is not installed" in str(activate_flash(CUDA, torch.bfloat16))
    with monkeypatch.context() as older:
        older.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, k, v: q)
        assert "has no block tables" in str(activate_flash(CUDA, torch.bfloat16))
    assert not card


def test_a_package_that_does_not_load_is_a_reason(card: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def undefined_symbol(_: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", undefined_symbol)
    assert activate_flash(CUDA, torch.bfloat16) == "ImportError: undefined symbol"
