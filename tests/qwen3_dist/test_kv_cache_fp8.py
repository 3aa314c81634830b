"""The KV cache in fp8: its codes, attention over them, its memory, a checkpoint's scales, and whole models."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError, ConfigError
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.cpu.kernels import load_kernels
from qwen3_dist.ops.cuda.attention import activate_flash
from qwen3_dist.ops.kv_codes import CODES, encode
from qwen3_dist.ops.torch_attention import gathered_attention
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.settings import EngineConfig
from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.verify import _batch
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.kv_scales import read_kv_scales
from qwen3_dist.weights.loader import load_model
from qwen3_dist.weights.source import bundled_path
from qwen3_dist.worker import kv_cache
from tests.batches import random_batch
from tests.checkpoints import TIGHT
from tests.quantized import edit_config, write_fp8
from tests.qwen3_dist.test_ops import PRODUCTS, TORCH, close, ops_of

pytestmark = pytest.mark.usefixtures("nursery")
CPU = torch.device("cpu")
SCALES = tuple(torch.tensor([0.7, 0.03]).tolist())  # numbers of fp32, as a checkpoint's are


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def cache_of(keys: Tensor, values: Tensor) -> LayerCache:
    return LayerCache(encode(keys, SCALES[0]), encode(values, SCALES[1]), *SCALES)


def widened(cache: LayerCache) -> LayerCache:
    """The numbers that the codes stand for, fp32."""
    return LayerCache(cache.keys.float() * cache.key_scale, cache.values.float() * cache.value_scale)


EACH = [("torch", torch.float32), *PRODUCTS]
# Triton's interpreter takes seconds for each, so it has the window only with prompts.
ATTENTION = [
    (*each, query_lens, window)
    for each, query_lens, window in product(EACH, [(1, 1, 1), (1, 1, 23), (7, 2, 9)], [None, 6])
    if each[0] != "triton" or (window is None) == (query_lens == (1, 1, 1))
]


@pytest.mark.parametrize(("kind", "dtype", "query_lens", "window"), ATTENTION)
@pytest.mark.parametrize("shape", [(8, 2, 16), (4, 4, 24), (8, 1, 128), (3, 1, 20)])
def test_attention_is_that_over_the_numbers_of_the_codes(
    kind: str, dtype: torch.dtype, window: int | None, query_lens: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    heads, groups, dim = shape
    batch = random_batch((12, 70, 33), query_lens, block_size=4)
    cache = cache_of(*torch.randn(2, 128, 4, groups, dim))
    q = torch.randn(sum(query_lens), heads, dim).to(dtype)
    ops = TORCH if kind == "torch" else ops_of(kind, dtype)
    expected = gathered_attention(q.float(), widened(cache), batch, window)
    close(ops.attention(q, cache, batch, window), expected.to(dtype))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [4, 16, 32])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(8, 2, 24), (8, 4, 128), (16, 8, 128), (128, 1, 8)])
def test_cpu_kernels_with_long_contexts(
    dtype: torch.dtype, deterministic: bool, block_size: int, heads: int, groups: int, dim: int
) -> None:
    kernels = load_kernels(dtype, deterministic)
    assert kernels is not None
    batch = random_batch((1, 150, 17, 9, 50, 330), (1, 1, 1, 9, 23, 190), block_size, num_blocks=256)
    cache = cache_of(*torch.randn(2, 256, block_size, groups, dim))
    q = torch.randn(225, heads, dim).to(dtype)
    where = (batch.block_tables, batch.table_rows, batch.context_lens, batch.query_starts)
    expected = gathered_attention(q.float(), widened(cache), batch, None)
    close(kernels.attention(q, cache, *where, None), expected.to(dtype))


# Halfway between two codes, below the least code, beyond the largest, infinite.
EDGES = (
    0.0,
    -0.0,
    17.0,
    19.0,
    2**-9,
    2**-10,
    3 * 2**-10,
    2**-11,
    15.5 * 2**-10,
    448,
    463,
    465,
    1e30,
    math.inf,
)


@pytest.mark.parametrize(("kind", "dtype"), EACH)
def test_keys_and_values_become_the_nearest_codes_and_none_is_nan(kind: str, dtype: torch.dtype) -> None:
    ops = TORCH if kind == "torch" else ops_of(kind, dtype)
    edges = torch.tensor(EDGES)
    many = torch.cat([edges, -edges, torch.linspace(-500, 500, 4097), torch.randn(4096) * 2.0**-7])
    dim = 24
    v = many[: len(many) // dim * dim].view(-1, 1, dim).to(dtype)
    tokens, scales = len(v), (1.0, SCALES[1])
    still, none = torch.ones(tokens, 1, dim).to(dtype), torch.zeros(tokens, 1, dim).to(dtype)
    k = v.clamp(-1e4, 1e4)  # infinity times the sine of 0 is no number
    cache = LayerCache(*torch.zeros(2, tokens, 1, 1, dim).to(CODES), *scales)
    slots = torch.randperm(tokens)
    ops.rotate_and_store(k.clone(), k, v, None, still, none, cache, slots)
    nearest = (v.float() * (1 / scales[1])).clamp(-448, 448).to(CODES)
    assert not cache.keys.float().isnan().any() and not cache.values.float().isnan().any()
    assert torch.equal(bits(cache.values.view(tokens, 1, dim))[slots], bits(nearest))
    assert torch.equal(
        cache.keys.view(tokens, 1, dim).float()[slots], k.float().clamp(-448, 448).to(CODES).float()
    )


def test_flash_attention_leaves_codes_to_the_other_backends() -> None:
    assert activate_flash(CPU, torch.bfloat16, CODES) == "its KV cache must be in bfloat16, not float8_e4m3fn"


def test_other_kinds_of_cache_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="kv_cache_dtype must be one of auto, bfloat16, fp8, fp8_e4m3, not 'fp8_e5m2'"
    ):
        EngineConfig(kv_cache_dtype="fp8_e5m2")
    with pytest.raises(
        ConfigError, match="kv_cache_dtype=bfloat16 needs dtype=bfloat16, and the compute dtype is fl"
    ):
        LLM(kv_cache_dtype="bfloat16", dtype="float32", device="cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_same_memory_holds_more_tokens(dtype: str) -> None:
    blocks = {}
    for kept in ("auto", "fp8"):
        sizes = {"kv_cache_gib": 0.001, "max_num_seqs": 512, "dtype": dtype, "use_tqdm": False}
        with LLM(kv_cache_dtype=kept, device="cpu", **sizes) as llm:  # type: ignore[arg-type]
            blocks[kept] = llm._engine.stats().total_blocks
            assert ("KV cache in fp8" in llm._engine.backends) is (kept == "fp8")
    times = {"bfloat16": 2, "float32": 4}[dtype]
    assert times * blocks["auto"] <= blocks["fp8"] < times * (blocks["auto"] + 1)


def model_of(path: Path, dtype: torch.dtype = torch.float32, cache: torch.dtype | None = CODES) -> Qwen3Model:
    """The whole model in plain torch."""
    config = ModelConfig.from_directory(path)
    model = load_model(path, config, ParallelContext.single(), dtype, CPU, ops=TorchOps())
    model.kv_cache_dtype = cache
    return model


@torch.inference_mode()
def logits_of(model: Qwen3Model, tokens: list[int]) -> Tensor:
    batch: StepBatch = _batch(tokens)
    logits = model(batch, kv_cache.allocate(model, batch.block_tables.shape[1], 16))[1]
    assert logits is not None
    return logits


PROMPTS = [[*range(20, 46), 60 + i, 3] for i in range(4)] + [[7, 8], list(range(100, 150))]
GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)


@functools.cache
def answers_of_oracle(path: Path, cache: torch.dtype | None = CODES) -> list[list[int]]:
    model, answers = model_of(path, cache=cache), []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(10):
            tokens.append(int(logits_of(model, tokens)[-1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("dense", "tp=1"),
        ("dense", "tp=2"),
        ("dense", "tp=4"),  # replicates KV groups
        ("moe", "tp=1"),
        ("moe", "tp=2,ep=2"),
        ("moe", "dp=2,pp=2,ep=2"),
    ],
)
def test_every_layout_gives_the_tokens_of_plain_torch(
    checkpoints: dict[str, Path], kind: str, layout: str
) -> None:
    """With chunks of prompts, preemption, cached prefixes and drafts."""
    form = "in_process" if layout == "tp=1" else "processes"
    drafts = None if "pp" in layout else "ngram,k=3"
    settings: dict[str, Any] = {**TIGHT, "dtype": "float32", "speculative": drafts}
    with LLM(str(checkpoints[kind]), layout=layout, executor=form, kv_cache_dtype="fp8", **settings) as llm:
        first = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        again = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert llm._engine.stats().prefix_hit_rate > 0
        llm._engine.check_integrity()
    assert answers_of_oracle(checkpoints[kind]) != answers_of_oracle(checkpoints[kind], None)
    assert [output.token_ids for output in first] == answers_of_oracle(checkpoints[kind])
    assert [output.token_ids for output in again] == answers_of_oracle(checkpoints[kind])


SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
OUTPUTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": OUTPUTS}},
    "ignore": ["lm_head", "re:.*"],
}


def with_scheme(original: Path, path: Path, scheme: Any, scales: dict[str, Tensor]) -> Path:
    """A checkpoint that asks for a KV cache, with tensors of its attention layers."""
    path.mkdir()
    (path / "config.json").write_text((original / "config.json").read_text())
    edit_config(path, quantization_config={**COMPRESSED, "kv_cache_scheme": scheme})
    layers = ModelConfig.from_directory(original).n_layers
    named = {
        f"model.layers.{i}.self_attn.{name}": each * (1 + i)
        for i in range(layers)
        for name, each in scales.items()
    }
    save_file(
        {**load_file(original / "model.safetensors"), **named}, path / "model.safetensors", {"format": "pt"}
    )
    return path


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ({}, (1, 1)),
        ({"k_scale": torch.tensor(0.5), "v_scale": torch.tensor([0.25])}, (0.5, 0.25)),
        (
            {"k_scale": torch.tensor([0.5, 2.0]), "v_scale": torch.tensor([0.25, 0.125])},
            (2, 0.25),
        ),  # for each head
        ({"k_proj.k_scale": torch.tensor(0.5), "v_proj.v_scale": torch.tensor(0.25)}, (0.5, 0.25)),
        ({"k_proj.output_scale": torch.tensor(0.5), "v_proj.output_scale": torch.tensor(0.25)}, (0.5, 0.25)),
        ({"kv_scale": torch.tensor(0.5)}, (0.5, 0.5)),
    ],
)
def test_a_checkpoint_brings_the_scales_of_its_cache(
    checkpoints: dict[str, Path], tmp_path: Path, scales: dict[str, Tensor], expected: tuple[float, float]
) -> None:
    path = with_scheme(checkpoints["dense"], tmp_path / "scaled", SCHEME, scales)
    model = model_of(path)
    read_kv_scales(model, CheckpointFiles(path))
    caches = kv_cache.allocate(model, 1, 4)
    for layer, cache in enumerate(caches):
        times = 1 + layer if scales else 1
        assert (cache.key_scale, cache.value_scale) == (expected[0] * times, expected[1] * times)
    model.kv_cache_dtype = None
    assert {(each.key_scale, each.value_scale) for each in kv_cache.allocate(model, 1, 4)} == {(1.0, 1.0)}


def test_scales_that_are_not_positive_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = with_scheme(checkpoints["dense"], tmp_path / "scaled", SCHEME, {"v_scale": torch.tensor(-1.0)})
    with pytest.raises(CheckpointError, match="layers.0.self_attn.v_scale has a scale that is not positive"):
        LLM(str(path), use_tqdm=False)


@pytest.mark.parametrize("layout", ["tp=1", "pp=2"])
def test_auto_is_what_the_checkpoint_was_made_for(
    checkpoints: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    """Scales that are powers of two leave the codes of large numbers as they are; all others would change tokens."""
    scales = {"k_scale": torch.tensor(2.0**-4), "v_scale": torch.tensor(2.0**-6)}
    path = with_scheme(checkpoints["dense"], tmp_path / "scaled", SCHEME, scales)
    model = model_of(path)
    read_kv_scales(model, CheckpointFiles(path))
    form = "in_process" if layout == "tp=1" else "processes"
    with LLM(str(path), layout=layout, executor=form, dtype="float32", use_tqdm=False, num_blocks=32) as llm:
        assert "KV cache in fp8" in llm._engine.backends
        outputs = llm.generate(PROMPTS, replace(GREEDY, logprobs=0), use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        logprobs = logits_of(model, [*prompt, *output.token_ids]).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logprobs.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        got = torch.tensor([entry.logprob for entry in output.logprobs or []])
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("scheme", "setting", "expected"),
    [
        (None, "auto", "float32"),
        (SCHEME, "auto", "fp8"),
        ({**SCHEME, "strategy": "attn_head"}, "auto", "fp8"),
        ({**SCHEME, "type": "int"}, "auto", CheckpointError),
        ({**SCHEME, "dynamic": True}, "auto", CheckpointError),
        ({**SCHEME, "dynamic": True}, "fp8", "fp8"),
    ],
)
def test_the_setting_and_the_scheme_decide(
    checkpoints: dict[str, Path], tmp_path: Path, scheme: Any, setting: str, expected: Any
) -> None:
    model = ModelConfig.from_directory(with_scheme(checkpoints["dense"], tmp_path / "made", scheme, {}))
    config = EngineConfig(kv_cache_dtype=setting)
    if expected is CheckpointError:
        with pytest.raises(
            CheckpointError, match="made for a KV cache of .* set kv_cache_dtype to fp8 or bfloat16"
        ):
            config.cache_dtype(model)
    else:
        assert config.cache_dtype(model) == expected
    assert replace(config, kv_cache_dtype="bfloat16", dtype="bfloat16").cache_dtype(model) == "bfloat16"


def test_a_scheme_of_an_fp8_checkpoint_is_not_followed_by_itself(tmp_path: Path) -> None:
    """As in vLLM, which follows those of compressed-tensors and ModelOpt."""
    path = write_fp8(tmp_path, 24, 20, moe=False).quantized
    raw = ModelConfig.from_directory(path)
    assert raw.quantization is not None and EngineConfig().cache_dtype(raw) == raw.dtype


def test_the_bundled_model_says_almost_the_same() -> None:
    text = "The weather in Paris is mild, and the answer to the question of what to wear is a light coat. "
    tokenizer = Tokenizer.from_directory(bundled_path())
    assert tokenizer is not None
    tokens = tokenizer.encode(text * 8)
    plain, coded = (
        logits_of(model_of(bundled_path(), torch.bfloat16, kept), tokens).double().log_softmax(-1)
        for kept in (None, CODES)
    )
    divergence = (plain.exp() * (plain - coded)).sum(-1)
    print(f"KL over {len(tokens)} tokens: mean {divergence.mean():.2e}, largest {divergence.max():.2e}")
    assert 0 < divergence.mean() < 0.1
