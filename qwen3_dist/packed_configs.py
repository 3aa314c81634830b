"""Reads `Quantization` from the `quantization_config` of AWQ (AutoAWQ) and GPTQ (AutoGPTQ, GPTQModel).

Both keep integers in int32 words: AWQ [I, O / 8], with the outputs of a word in an order of its own; GPTQ
[I * bits / 32, O]. Scales are [groups, O], and zeros [groups, O * bits / 32].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_dist.config_checks import check, check_keys, strings
from qwen3_dist.errors import CheckpointError
from qwen3_dist.quantization import INT4, INT8, Packing, Quantization, Stored, WeightFormat

_LINEAR = "Linear"
_AWQ_KEYS = {"quant_method", "bits", "group_size", "zero_point", "version", "modules_to_not_convert"}
# Settings of how codes were found, or of kernels of other servers, which change no weight.
_AWQ_OTHERS = {
    "backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse", "format", "desc_act", "lm_head",
    "sym", "pack_dtype", "meta", "dynamic",
}  # fmt: skip
_AWQ_OLD = {"w_bit": "bits", "q_group_size": "group_size"}  # AutoAWQ's own names of both
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the outputs in a word
_GPTQ_KEYS = {
    "quant_method", "bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "pack_dtype", "lm_head",
    "dynamic",
}  # fmt: skip
_GPTQ_OTHERS = {
    "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_percent",
    "dataset", "disable_exllama", "exllama_config", "fail_safe", "hyb_act", "is_marlin_format", "max_input_length",
    "meta", "method", "model_file_base_name", "model_name_or_path", "model_seqlen",
    "module_name_preceding_first_block", "modules_in_block_to_quantize", "mse", "pad_token_id", "quantizer",
    "static_groups", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama",
}  # fmt: skip
_FLOATS = Packing(16, "floats", transposed=True)


def read_awq(config: Mapping[str, Any]) -> Quantization:
    """Raises CheckpointError if the settings are not supported."""
    config = {_AWQ_OLD.get(name, name): value for name, value in config.items()}
    check_keys(config, _AWQ_KEYS | _AWQ_OTHERS)
    check(config, "bits", (4,), "4 bits are")
    check(config, "zero_point", (None, True), "zero points are")
    check(config, "version", (None, "gemm", "GEMM"), "gemm is")
    _check_head(config)
    packing = Packing(4, axis=0, transposed=True, order=_AWQ_PLACES)
    stored = WeightFormat(
        INT4,
        _group(config),
        scale=Stored(("scales",), _FLOATS),
        weight=Stored(("qweight",), packing),
        zero=Stored(("qzeros",), packing),
    )
    return Quantization("awq", ((stored, (_LINEAR,)),), tuple(strings(config, "modules_to_not_convert")))


def read_gptq(config: Mapping[str, Any]) -> Quantization:
    """Raises CheckpointError if the settings are not supported."""
    check_keys(config, _GPTQ_KEYS | _GPTQ_OTHERS)
    for name in ("checkpoint_format", "format"):
        check(config, name, (None, "gptq", "gptq_v2"), "gptq and gptq_v2 are")
    check(config, "is_marlin_format", (None, False), "packing as gptq is")
    check(config, "pack_dtype", (None, "int32"), "int32 is")
    _check_head(config)
    groups, ignored = [], []
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"dynamic is {dynamic!r} where an object is expected")
    for pattern, changes in dynamic.items():
        regex = f"re:{pattern[2:] if pattern[:2] in ('+:', '-:') else pattern}"
        strings({"dynamic": [regex]}, "dynamic")
        if changes and not isinstance(changes, Mapping):
            raise CheckpointError(f"dynamic has {changes!r} for {pattern!r} where an object is expected")
        if pattern.startswith("-:"):
            ignored.append(regex)
        else:
            groups.append((_gptq({**config, **(changes or {})}), (regex,)))
    groups.append((_gptq(config), (_LINEAR,)))
    return Quantization("gptq", tuple(groups), tuple(ignored))


def _gptq(config: Mapping[str, Any]) -> WeightFormat:
    check(config, "bits", (4, 8), "4 and 8 bits are")
    bits, size = config["bits"], _group(config)
    signed = 128 if bits == 8 else 0  # 8-bit codes are kept with a sign
    less_one = "gptq_v2" not in (config.get("checkpoint_format"), config.get("format"))
    # The zeros of `gptq` are whole words of `gptq_v2` less ones, so that a zero of 0 has borrowed from the next.
    ones = sum(1 << place for place in range(0, 32, bits)) if less_one else 0
    zero = Stored(("qzeros",), Packing(bits, axis=0, transposed=True, plus=signed, word_plus=ones))
    return WeightFormat(
        INT4 if bits == 4 else INT8,
        size,
        scale=Stored(("scales",), _FLOATS),
        weight=Stored(("qweight",), Packing(bits, transposed=True, plus=signed)),
        zero=None if config.get("sym") is True else zero,
        order=Stored(("g_idx",)) if config.get("desc_act") and size is not None else None,
    )


def _group(config: Mapping[str, Any]) -> tuple[int, int] | None:
    size = config.get("group_size", 128)
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise CheckpointError(f"group_size={size!r} is neither a positive integer nor -1, for outputs")
    return None if size == -1 else (1, size)


def _check_head(config: Mapping[str, Any]) -> None:
    check(config, "lm_head", (None, False), "a head that is not quantised is")
