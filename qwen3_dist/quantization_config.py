"""Reads `Quantization` from `quantization_config` of config.json, in the spellings `fp8` (Qwen3-*-FP8; transformers,
DeepSeek) and `compressed-tensors` (llm-compressor); those of `packed_configs.py` too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_dist.config_checks import block, check, check_keys, strings
from qwen3_dist.errors import CheckpointError
from qwen3_dist.fp4_configs import FP4_FORMATS, fp4_format, read_modelopt
from qwen3_dist.kv_cache_dtype import kv_cache_scheme
from qwen3_dist.packed_configs import read_awq, read_gptq
from qwen3_dist.quantization import FP8, INT4, INT8, Packing, Quantization, Stored, WeightFormat

SUPPORTED = (
    "fp8 (e4m3, by blocks, outputs or tensors), compressed-tensors (float-quantized by blocks, outputs or tensors; "
    "int-quantized by groups, outputs or tensors; pack-quantized with 4 or 8 bits; nvfp4 and mxfp4), awq with 4 bits, "
    "gptq with 4 or 8 bits, and modelopt with NVFP4 or FP8"
)
_ADVICE = f"supported are {SUPPORTED}; use such a checkpoint or the bf16, fp16 or fp32 one"
_FP8_KEYS = {
    "quant_method", "fmt", "activation_scheme", "weight_block_size", "scale_fmt", "dequantize", "ignored_layers",
    "modules_to_not_convert", "modules_to_convert", "expert_dtype", "is_checkpoint_fp8_serialized", "kv_cache_scheme",
}  # fmt: skip
_COMPRESSED_KEYS = {
    "quant_method", "config_groups", "format", "ignore", "kv_cache_scheme", "quantization_status", "version",
    "global_compression_ratio", "sparsity_config", "transform_config",
}  # fmt: skip
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_LINEAR = "Linear"  # a target: all linear layers that no other group names
_FORMATS = (
    None, "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision",
    *FP4_FORMATS,
)  # fmt: skip
_ORDERED = (True, "group", "dynamic")  # values of actorder by which inputs name their groups


def read_quantization(raw: Mapping[str, Any]) -> Quantization | None:
    """The quantisation that config.json tells of. Raises CheckpointError if it is not supported or contradicts
    itself."""
    given = {name: raw[name] for name in ("quantization_config", "compression_config") if raw.get(name)}
    if not given:
        return None
    if len(given) > 1 and len({repr(value) for value in given.values()}) > 1:
        raise CheckpointError("quantization_config and compression_config disagree; keep one in config.json")
    name, config = next(iter(given.items()))
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{name} must be a JSON object, not {config!r}; {_ADVICE}")
    method = config.get("quant_method", "compressed-tensors" if name == "compression_config" else None)
    try:
        if method == "fp8":
            return _fp8(config)
        if method in ("compressed-tensors", "compressed_tensors"):
            return _compressed(config)
        if method == "awq":
            return read_awq(config)
        if method == "gptq":
            return read_gptq(config)
        if method in ("modelopt", "modelopt_fp4", "modelopt_fp8"):
            return read_modelopt(config)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    raise CheckpointError(f"quantisation {method!r} is not supported; {_ADVICE}")


def _fp8(config: Mapping[str, Any]) -> Quantization:
    check_keys(config, _FP8_KEYS)
    check(config, "fmt", (None, "e4m3", "float8_e4m3fn"), "e4m3 is")
    check(config, "activation_scheme", (None, "dynamic", "static"), "dynamic and static are")
    check(config, "scale_fmt", (None, "float", "ue8m0"), "float and ue8m0 are")
    check(config, "modules_to_convert", (None, []), "linear layers and experts in fp8 are")
    check(config, "expert_dtype", (None, "fp8"), "experts in fp8 are")
    check(config, "is_checkpoint_fp8_serialized", (None, True), "weights must be stored in fp8, which is")
    blocks = block(config.get("weight_block_size"), "weight_block_size")
    scale = Stored(("weight_scale_inv", "weight_scale"))
    ignored = [*strings(config, "modules_to_not_convert"), *strings(config, "ignored_layers")]
    return Quantization("fp8", ((WeightFormat(FP8, blocks, scale), (_LINEAR,)),), tuple(ignored))


def _compressed(config: Mapping[str, Any]) -> Quantization:
    check_keys(config, _COMPRESSED_KEYS)
    for name in ("sparsity_config", "transform_config"):
        value = config.get(name)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise CheckpointError(f"{name} is not supported; {_ADVICE}")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"config_groups is {groups!r} where an object of groups is expected")
    read = tuple(_group(name, group, config) for name, group in groups.items())
    if sum(_LINEAR in targets for _, targets in read) > 1:
        raise CheckpointError("several config_groups have the target 'Linear'; keep one of them")
    ignored = tuple(strings(config, "ignore"))
    return Quantization("compressed-tensors", read, ignored, kv_cache=kv_cache_scheme(config))


def _group(name: str, group: Any, config: Mapping[str, Any]) -> tuple[WeightFormat, tuple[str, ...]]:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise CheckpointError(f"{name} has no weights")
    check_keys(group, _GROUP_KEYS)
    for each in (config, group):
        check(each, "format", _FORMATS, f"{', '.join(filter(None, _FORMATS))} are")
    targets = tuple(strings(group, "targets"))
    if not targets:
        raise CheckpointError(f"{name} has no targets; correct config.json")
    form = group.get("format") or config.get("format")
    if form in FP4_FORMATS:
        return fp4_format(name, group["weights"], form), targets
    return (_packed if form == "pack-quantized" else _bytes)(name, group["weights"]), targets


def _bytes(name: str, weights: Mapping[str, Any]) -> WeightFormat:
    """Weights of which each code is a byte."""
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    codes = {"float": FP8, "int": INT8}.get(str(kind)) if bits == 8 else None
    if codes is None:
        packed = " without format='pack-quantized'" if kind == "int" else ""
        raise CheckpointError(f"{name} has {bits}-bit weights of type {kind!r}{packed}; {_ADVICE}")
    if not weights.get("symmetric", True):
        raise CheckpointError(f"{name} has 8-bit weights with zero points that are not packed; {_ADVICE}")
    allowed = ("tensor", "channel", "block" if codes == FP8 else "group")
    if strategy not in allowed or weights.get("actorder"):
        raise CheckpointError(f"{name} has {kind} weights with strategy {strategy!r}; {_ADVICE}")
    blocks = block(weights.get("block_structure"), "block_structure") if strategy == "block" else None
    if strategy == "block" and blocks is None:
        raise CheckpointError(f"{name} has strategy 'block' without block_structure; correct config.json")
    blocks = (1, _group_size(name, weights)) if strategy == "group" else blocks
    return WeightFormat(codes, blocks, Stored(("weight_scale",)))


def _packed(name: str, weights: Mapping[str, Any]) -> WeightFormat:
    """Integers that are packed in words."""
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    if kind != "int" or bits not in (4, 8):
        raise CheckpointError(f"{name} has packed {bits}-bit weights of type {kind!r}; {_ADVICE}")
    zeros, ordered = not weights.get("symmetric", True), weights.get("actorder") in _ORDERED
    if strategy not in ("group", "channel", "tensor") or (zeros and strategy == "tensor"):
        raise CheckpointError(f"{name} has packed weights with strategy {strategy!r}; {_ADVICE}")
    signed = 128 if bits == 8 else 0  # 8-bit codes are kept with a sign
    return WeightFormat(
        INT4 if bits == 4 else INT8,
        (1, _group_size(name, weights)) if strategy == "group" else None,
        scale=Stored(("weight_scale",)),
        weight=Stored(("weight_packed",), Packing(bits, plus=signed)),
        zero=Stored(("weight_zero_point",), Packing(bits, axis=0, plus=signed)) if zeros else None,
        order=Stored(("weight_g_idx",)) if ordered and strategy == "group" else None,
    )


def _group_size(name: str, weights: Mapping[str, Any]) -> int:
    size = weights.get("group_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise CheckpointError(f"{name} has group_size={size!r} where a positive integer is expected")
    return size
