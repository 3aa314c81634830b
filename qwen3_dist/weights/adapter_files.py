"""Finds and checks LoRA adapters in PEFT's format. An adapter has, for a weight [O, I], the pair `lora_A` [r, I] and
`lora_B` [O, r]. Imports no torch, since engines check adapters before ranks load them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from qwen3_dist.config import ModelConfig
from qwen3_dist.config_checks import strings
from qwen3_dist.errors import CheckpointError
from qwen3_dist.layout import Layout
from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.text.sidecars import read_json_object
from qwen3_dist.weights.expert_adapters import (
    EXPERT,
    StackedPair,
    check_stacked_rank,
    stacked_sources,
    stacked_weight,
    target_parameters,
)
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.pieces import Piece
from qwen3_dist.weights.source import resolve_model
from qwen3_dist.weights.weight_plan import WeightPlan

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_READ_BYTES = 2**22
_ADAPTED = ("W_query", "W_key", "W_value", "out_proj", "fc1", "fc2", "fc3", "gate")
_PREFIX = "base_model.model."
_ROUTER = ".mlp.gate"
_MERGE = (
    "adapters may change the q, k, v and o_proj of attention, the gate, up and down_proj of dense layers and of "
    "experts, and routers; serve a checkpoint into which PEFT's merge_and_unload has merged it"
)
# Settings of adapter_config.json with the supported values: other kinds of LoRA are not supported.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_rslora": (False, None, True),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None, {}),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "kasa_config": (None, {}),
    "velora_config": (None, {}),
    "monteclora_config": (None, {}),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def open_adapters(adapters: LoraAdapters, config: ModelConfig) -> list[Adapter]:
    """Finds and checks every adapter.

    Raises CheckpointError, naming the adapter, if it is damaged, of an unsupported kind, or not for the model of
    `config`.
    """
    return [Adapter.open(name, path, config) for name, path in adapters.pairs]


def with_digests(
    adapters: LoraAdapters,
    config: ModelConfig,
    known: LoraAdapters = LoraAdapters(),  # noqa: B008 - frozen
    again: Collection[str] = (),
) -> LoraAdapters:
    """`adapters` with digests of the contents of their files, which are checked and read.

    A pair that is among the `known` keeps its digest, without a look at its files, unless its name is in `again`.
    Raises what `open_adapters` raises.
    """
    found = dict(zip(known.pairs, known.digests, strict=True))
    digests = [
        found[name, path]
        if (name, path) in found and name not in again
        else Adapter.open(name, path, config).digest()
        for name, path in adapters.pairs
    ]
    return replace(adapters, digests=tuple(digests))


@dataclass(frozen=True)
class Adapter:
    """One adapter whose files were checked. `pairs` are the names of the weights that it changes, with their ranks and
    scales; `stacked` has those of stacked experts, by the names of their weights. `saved` are the routers that it
    replaces."""

    directory: Path
    files: CheckpointFiles
    pairs: dict[str, tuple[int, float]]
    stacked: dict[str, StackedPair] = field(default_factory=dict)
    saved: frozenset[str] = frozenset()
    stamp: tuple[int, ...] = ()  # of the file of weights as it was opened

    def digest(self) -> str:
        """A digest of the contents of its files, all of which it reads. Raises CheckpointError."""
        digest = blake2b(digest_size=16)
        try:
            for name in (_CONFIG, _WEIGHTS):
                with (self.directory / name).open("rb") as file:
                    digest.update(f"{name} {file.seek(0, 2)} ".encode())
                    file.seek(0)
                    while part := file.read(_READ_BYTES):
                        digest.update(part)
        except OSError as error:
            raise CheckpointError(f"the adapter in {self.directory} cannot be read: {error}") from None
        return digest.hexdigest()

    @classmethod
    def open(cls, name: str, path: str, model_config: ModelConfig) -> Adapter:
        everything = WeightPlan(model_config, Layout(), set()).plain_pieces(Layout().coords(0))
        shapes = {cls.pair_of(piece.source): piece.shape for piece in everything if _is_adapted(piece)}
        try:
            directory = resolve_model(path)
            config = read_json_object(directory / _CONFIG)
            _check_kind(config, shapes)
            files = CheckpointFiles(directory, _weights_of(directory))
            stacked = _stacked_pairs(files, config, model_config)
            saved = _saved_routers(files, config, shapes)
            pairs = _checked_pairs(files, config, shapes, stacked, saved)
            return cls(directory, files, pairs, stacked, saved, _stamp(directory))
        except CheckpointError as error:
            raise CheckpointError(f"the adapter {name} cannot be used: {error}") from None

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the file of weights is not the one that was opened."""
        if _stamp(self.directory) != self.stamp:
            raise CheckpointError(
                f"{self.directory / _WEIGHTS} has changed since it was loaded as an adapter; load the adapter again"
            )

    def changes_experts(self, layer: int) -> bool:
        """Whether it changes an expert of this layer."""
        return layer in self._layers_of_experts

    @cached_property
    def _layers_of_experts(self) -> frozenset[int]:
        names = [pair for pair in self.pairs if EXPERT.fullmatch(pair)] + [*self.stacked]
        return frozenset(int(name.split(".layers.")[1].split(".")[0]) for name in names)

    @staticmethod
    def pair_of(source: str) -> str:
        return _PREFIX + source.removesuffix(".weight")


def _stamp(directory: Path) -> tuple[int, ...]:
    try:
        status = (directory / _WEIGHTS).stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _weights_of(path: Path) -> dict[Path, set[str] | None]:
    """The adapter's weight file. Other files in the directory, for example of a merged model, are ignored."""
    file = path / _WEIGHTS
    if not file.exists():
        pickle = (
            ", but a pickle, which may run code as it is read" if file.with_suffix(".bin").exists() else ""
        )
        raise CheckpointError(
            f"{path} holds no {file.name}{pickle}; load the adapter with PEFT and save it again as safetensors"
        )
    return {file: None}


def adapted_pieces(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces of the linear layers that adapters may change: no experts."""
    for piece in pieces:
        module, _, kind = piece.parameter.rpartition(".")
        if kind == "weight" and module.rpartition(".")[2] in _ADAPTED:
            yield piece


def _is_adapted(piece: Piece) -> bool:
    return ".ff.experts." in piece.parameter or any(adapted_pieces(iter([piece])))


def _check_kind(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError if the adapter is of a kind that is not supported, by its adapter_config.json."""
    if not config:
        raise CheckpointError(f"it has no {_CONFIG}; give the directory of an adapter in PEFT's format")
    for key, neutral in _NEUTRAL.items():
        if config.get(key, neutral[0]) not in neutral:
            raise CheckpointError(f"{_CONFIG} has {key}={config[key]!r}, which is not supported")
    for key in ("target_modules", "target_parameters", "modules_to_save"):
        if key != "target_modules" or not isinstance(config.get(key), str):
            strings(config, key)
    routers = [pair for pair in shapes if pair.endswith(_ROUTER)]
    for module in config.get("modules_to_save") or []:
        if not any(router.endswith(f".{module}") for router in routers):
            raise CheckpointError(
                f"it holds the whole of {module} (modules_to_save={config['modules_to_save']!r}), which is supported "
                f"for routers alone; {_MERGE}"
            )


def _saved_routers(
    files: CheckpointFiles, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> frozenset[str]:
    """The routers that the adapter replaces. Raises CheckpointError if one is missing or of another shape."""
    modules = config.get("modules_to_save") or []
    saved = {pair for pair in shapes for module in modules if pair.endswith(f".{module}")}
    for pair in sorted(saved):
        name = f"{pair}.weight"
        if name not in files.names():
            raise CheckpointError(f"it lacks {name}; fetch it again")
        if files.shape(name) != shapes[pair]:
            raise CheckpointError(
                f"{name} has shape {list(files.shape(name))} where the model has {list(shapes[pair])}"
            )
        files.dtype(name)
    return frozenset(saved)


def _stacked_pairs(
    files: CheckpointFiles, config: dict[str, Any], model_config: ModelConfig
) -> dict[str, StackedPair]:
    """The pairs of stacked experts in the file, by the weights that they change. Raises CheckpointError."""
    pairs: dict[str, StackedPair] = {}
    for source, module in sorted(stacked_sources(files.names()).items()):
        names = [f"{source}.lora_{ab}.weight" for ab in "AB"]
        for name in names:
            if name not in files.names():
                raise CheckpointError(f"it lacks {name}; fetch it again")
            files.dtype(name)
        a, b = map(files.shape, names)
        weight = stacked_weight(a, b, model_config, config.get("peft_version"))
        if weight is None:
            raise CheckpointError(
                f"{names[0]} and {names[1]} have shapes {list(a)} and {list(b)}, which fit neither the gate_up_proj "
                "nor the down_proj of the model's experts; train it for this model"
            )
        pair = f"{module}.{weight[0]}"
        if pair in pairs:
            raise CheckpointError(f"{pairs[pair].source} and {source} both change {pair}; train it again")
        rank, scale = _rank_and_scale(config, pair)
        check_stacked_rank(names[0], a, 0, rank, model_config)
        check_stacked_rank(names[1], b, 1, rank, model_config)
        pairs[pair] = StackedPair(source, rank, scale, weight[1])
    return pairs


def _is_parameter(config: dict[str, Any], name: str) -> bool:
    """Whether `target_parameters` names the parameter `name`."""
    return any(f".{name}".endswith(f".{each}") for each in config.get("target_parameters") or [])


def _rank_and_scale(config: dict[str, Any], pair: str) -> tuple[int, float]:
    pair += ".weight" if _is_parameter(config, f"{pair}.weight") else ""
    rank, alpha = (
        _by_pattern(config, f"{kind}_pattern", pair, config.get(name))
        for kind, name in (("rank", "r"), ("alpha", "lora_alpha"))
    )
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(f"{_CONFIG} has r={rank!r} where a positive integer is expected")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise CheckpointError(f"{_CONFIG} has lora_alpha={alpha!r} where a number is expected")
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _by_pattern(config: dict[str, Any], key: str, pair: str, otherwise: Any) -> Any:
    """The value of the first regular expression in `key` that fits the end of the weight's name, as in PEFT."""
    patterns = config.get(key) or {}
    try:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", pair.removeprefix(_PREFIX)):
                return value
    except (re.error, AttributeError):
        raise CheckpointError(f"{_CONFIG} has {key}={patterns!r}, which is no object of patterns") from None
    return otherwise


def _checked_pairs(
    files: CheckpointFiles,
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    stacked: dict[str, StackedPair],
    saved: frozenset[str],
) -> dict[str, tuple[int, float]]:
    """The ranks and scales of the weights that the adapter changes, but for `stacked` ones and the routers that are
    `saved`. `shapes` are those of all weights that adapters may change.

    Raises CheckpointError if a tensor is missing, left over or of another shape."""
    names = files.names() - {f"{pair}.weight" for pair in saved}
    names -= {f"{pair.source}.lora_{ab}.weight" for pair in stacked.values() for ab in "AB"}
    scales = {pair: _rank_and_scale(config, pair) for pair in shapes}
    expected: dict[str, tuple[int, ...]] = {}
    for pair, (outputs, inputs) in shapes.items():
        rank = scales[pair][0]
        expected[f"{pair}.lora_A.weight"] = (rank, inputs)
        expected[f"{pair}.lora_B.weight"] = (outputs, rank)
    for name in sorted(names):
        if name not in expected:
            raise CheckpointError(f"it changes {name.removeprefix(_PREFIX)}; {_MERGE}")
        if files.shape(name) != expected[name]:
            raise CheckpointError(
                f"{name} has shape {list(files.shape(name))} where model and {_CONFIG} make it {list(expected[name])}"
            )
        files.dtype(name)
    if not files.names():
        raise CheckpointError("adapter_model.safetensors holds no tensor; train or fetch the adapter again")
    pairs = {name.rpartition(".lora_")[0] for name in names}
    required = pairs | _targets(config, shapes)
    for kind in (EXPERT, re.compile(rf".*{re.escape(_ROUTER)}")):
        # `target_modules` may name what is no linear module in the trainer's model, which then has no tensor.
        if not any(map(kind.fullmatch, pairs)):
            required = {pair for pair in required if not kind.fullmatch(pair)}
    missing = {f"{pair}.lora_{ab}.weight" for pair in required for ab in "AB"} - names
    missing |= target_parameters(config, shapes) - pairs - stacked.keys()
    if missing:
        raise CheckpointError(f"it lacks {min(missing)}; fetch it again")
    return {pair: scales[pair] for pair in pairs}


def _targets(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """The weights that `target_modules` names; none if the config restricts the layers."""
    modules = config.get("target_modules")
    if config.get("layers_to_transform") or config.get("exclude_modules") or not modules:
        return set()
    if modules == "all-linear":
        return set(shapes)
    if isinstance(modules, str):  # a regular expression of whole names
        try:
            targets = {pair for pair in shapes if re.fullmatch(modules, pair.removeprefix(_PREFIX))}
        except re.error as error:
            raise CheckpointError(f"{_CONFIG} has target_modules={modules!r}: {error}") from None
        modules = [] if targets else [modules]
    else:
        targets = {pair for pair in shapes for module in modules if f".{pair}".endswith(f".{module}")}
    for module in modules:
        if not any(f".{pair}".endswith(f".{module}") for pair in shapes):
            raise CheckpointError(f"{_CONFIG} targets {module!r}, which adapters may not change here")
    return targets
