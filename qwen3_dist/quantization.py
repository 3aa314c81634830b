"""How a quantised checkpoint stores its weights: `Quantization`, read from `quantization_config` of config.json.

A quantised weight [O, I] is a tensor of codes and a tensor of scales; code * scale is the weight. A scale covers a
block of outputs and inputs. Two spellings are read: `fp8` (Qwen3-*-FP8; transformers, DeepSeek) and
`compressed-tensors` (llm-compressor).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from qwen3_dist.errors import CheckpointError

FP8, INT8 = "float8_e4m3fn", "int8"
SUPPORTED = (
    "fp8 (e4m3, by blocks, outputs or tensors) and compressed-tensors with 8-bit weights (float-quantized by blocks, "
    "outputs or tensors; int-quantized by outputs or tensors)"
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
_FORMATS = (None, "float-quantized", "int-quantized", "naive-quantized", "mixed-precision")
# Tensors of quantised activations and caches. Activations and the KV cache keep their dtype here.
_UNUSED = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale")


ALL_INPUTS = 1 << 22  # inputs of a block; no weight has as many


class Grid(NamedTuple):
    """The scales of a weight [..., N, D], which is a part of a larger one: each covers a block of `rows` outputs and
    `columns` inputs. The part begins `first_row` outputs and `first_column` inputs after the start of a block, whose
    scale it has whole."""

    rows: int
    columns: int
    first_row: int = 0
    first_column: int = 0

    def shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """The number of blocks that cover N outputs and D inputs, along each."""
        return -(-(self.first_row + outputs) // self.rows), -(-(self.first_column + inputs) // self.columns)


@dataclass(frozen=True)
class WeightFormat:
    """How a weight [O, I] is stored. `codes`: the dtype of its codes, FP8 or INT8. `block`: the outputs and inputs of
    a scale; None: a scale for each output, or one for all. `scale_names`: the possible ends of the scales' name, in
    the place of "weight"."""

    codes: str
    block: tuple[int, int] | None
    scale_names: tuple[str, ...]

    def __str__(self) -> str:
        name = {FP8: "fp8 (e4m3)", INT8: "int8"}[self.codes]
        return f"{name} by {'outputs' if self.block is None else 'blocks of {} x {}'.format(*self.block)}"

    def grid(self, first_output: int, first_input: int) -> Grid:
        """The blocks of a part that begins at these outputs and inputs of the weight."""
        if self.block is None:
            return Grid(1, ALL_INPUTS)
        rows, columns = self.block
        return Grid(rows, columns, first_output % rows, first_input % columns)


@dataclass(frozen=True)
class Quantization:
    """The formats of a checkpoint's linear layers. `groups` are formats with the modules that they are for; `ignored`
    modules are not quantised. A module is given by its name, a part of it between dots, a regular expression after
    "re:", or the class "Linear". `rounds`: the checkpoint's weights are plain, and are rounded to codes as they are
    read."""

    method: str
    groups: tuple[tuple[WeightFormat, tuple[str, ...]], ...]
    ignored: tuple[str, ...] = ()
    rounds: bool = False

    def describe(self) -> str:
        """One line for reports."""
        formats = ", ".join(dict.fromkeys(str(each) for each, _ in self.groups))
        return f"{formats}, rounded while loading" if self.rounds else f"{self.method}: {formats}"

    def of(self, module: str) -> WeightFormat | None:
        """The format of a linear layer or of stacked experts by its name; None: it is not quantised."""
        if module in self._ignored:
            return None
        named = (formats for formats, names in self._named if module in names)
        return next(named, self._of_linear)

    @cached_property
    def _ignored(self) -> _Names:
        return _Names(self.ignored)

    @cached_property
    def _named(self) -> list[tuple[WeightFormat, _Names]]:
        return [(formats, _Names(set(targets) - {_LINEAR})) for formats, targets in self.groups]

    @cached_property
    def _of_linear(self) -> WeightFormat | None:
        return next((formats for formats, targets in self.groups if _LINEAR in targets), None)

    @staticmethod
    def is_unused(name: str) -> bool:
        """Whether a tensor only concerns the quantisation of activations or of the KV cache."""
        return name.endswith(tuple(f".{end}" for end in _UNUSED)) or name.endswith("_proj_activation_scale")


# What `quantize=fp8` makes of a checkpoint: the format of Qwen's own FP8 checkpoints.
ROUNDS_TO_FP8 = Quantization(
    "fp8", ((WeightFormat(FP8, (128, 128), ("weight_scale_inv",)), (_LINEAR,)),), rounds=True
)


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
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    raise CheckpointError(f"quantisation {method!r} is not supported; {_ADVICE}")


def _fp8(config: Mapping[str, Any]) -> Quantization:
    _check_keys(config, _FP8_KEYS)
    _check(config, "fmt", (None, "e4m3", "float8_e4m3fn"), "e4m3 is")
    _check(config, "activation_scheme", (None, "dynamic", "static"), "dynamic and static are")
    _check(config, "scale_fmt", (None, "float", "ue8m0"), "float and ue8m0 are")
    _check(config, "modules_to_convert", (None, []), "linear layers and experts in fp8 are")
    _check(config, "expert_dtype", (None, "fp8"), "experts in fp8 are")
    _check(config, "is_checkpoint_fp8_serialized", (None, True), "weights must be stored in fp8, which is")
    block = _block(config.get("weight_block_size"), "weight_block_size")
    names = ("weight_scale_inv", "weight_scale")
    ignored = [*_strings(config, "modules_to_not_convert"), *_strings(config, "ignored_layers")]
    return Quantization("fp8", ((WeightFormat(FP8, block, names), (_LINEAR,)),), tuple(ignored))


def _compressed(config: Mapping[str, Any]) -> Quantization:
    _check_keys(config, _COMPRESSED_KEYS)
    _check(config, "format", _FORMATS, "float-quantized, int-quantized and naive-quantized are")
    for name in ("sparsity_config", "transform_config"):
        if config.get(name) and config[name].get("format") != "dense":
            raise CheckpointError(f"{name} is not supported; {_ADVICE}")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"config_groups is {groups!r} where an object of groups is expected")
    read = tuple(_group(name, group) for name, group in groups.items())
    if sum(_LINEAR in targets for _, targets in read) > 1:
        raise CheckpointError("several config_groups have the target 'Linear'; keep one of them")
    return Quantization("compressed-tensors", read, tuple(_strings(config, "ignore")))


def _group(name: str, group: Any) -> tuple[WeightFormat, tuple[str, ...]]:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise CheckpointError(f"{name} has no weights")
    _check_keys(group, _GROUP_KEYS)
    _check(group, "format", _FORMATS, "float-quantized, int-quantized and naive-quantized are")
    weights = group["weights"]
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    codes = {(8, "float"): FP8, (8, "int"): INT8}.get((bits, kind))
    if codes is None:
        raise CheckpointError(f"{name} has {bits}-bit weights of type {kind!r}; {_ADVICE}")
    if not weights.get("symmetric", True):
        raise CheckpointError(f"{name} has weights with zero points (symmetric is false); {_ADVICE}")
    if strategy not in ("tensor", "channel", "block") or (strategy == "block" and codes == INT8):
        raise CheckpointError(f"{name} has {kind} weights with strategy {strategy!r}; {_ADVICE}")
    block = _block(weights.get("block_structure"), "block_structure") if strategy == "block" else None
    if strategy == "block" and block is None:
        raise CheckpointError(f"{name} has strategy 'block' without block_structure; correct config.json")
    targets = tuple(_strings(group, "targets"))
    if not targets:
        raise CheckpointError(f"{name} has no targets; correct config.json")
    return WeightFormat(codes, block, ("weight_scale",)), targets


class _Names:
    """Patterns of module names."""

    def __init__(self, patterns: Collection[str]) -> None:
        self._parts = {pattern for pattern in patterns if not pattern.startswith("re:")}
        self._regexes = [re.compile(each.removeprefix("re:")) for each in patterns if each.startswith("re:")]
        self._known: dict[str, bool] = {}  # a plan of each rank asks for each of thousands of experts

    def __contains__(self, module: str) -> bool:
        if module not in self._known:
            self._known[module] = self._match(module)
        return self._known[module]

    def _match(self, module: str) -> bool:
        words = module.split(".")
        parts = (".".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
        return any(part in self._parts for part in parts) or any(
            regex.match(module) for regex in self._regexes
        )


def _check_keys(config: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(name for name in config.keys() - known if config[name]):
        raise CheckpointError(
            f"{unknown[0]}={config[unknown[0]]!r} is not understood; remove it if it changes no weight"
        )


def _check(config: Mapping[str, Any], name: str, allowed: tuple[Any, ...], are: str) -> None:
    if config.get(name) not in allowed:
        raise CheckpointError(f"{name}={config[name]!r} is not supported; {are} supported")


def _block(value: Any, name: str) -> tuple[int, int] | None:
    if value is None:
        return None
    sizes = list(value) if isinstance(value, list | tuple) else []
    if len(sizes) != 2 or any(
        not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes
    ):
        raise CheckpointError(f"{name} is {value!r} where two positive integers are expected")
    return sizes[0], sizes[1]


def _strings(config: Mapping[str, Any], name: str) -> list[str]:
    value = config.get(name) or []
    if not isinstance(value, list) or any(not isinstance(each, str) for each in value):
        raise CheckpointError(f"{name} is {value!r} where a list of module names is expected")
    for each in value:
        try:
            re.compile(each.removeprefix("re:") if each.startswith("re:") else "")
        except re.error as error:
            raise CheckpointError(f"{name} has {each!r}, which is no regular expression ({error})") from None
    return value
