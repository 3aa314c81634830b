"""The layouts in which trainers write the adapters of experts.

- One pair for each projection of each expert, as PEFT writes it for a model whose experts are modules, and Megatron's
  exporters: `mlp.experts.3.gate_proj.lora_A.weight`. These are like the pairs of any linear layer.
- One pair for the stacked weights of a layer's E experts, as PEFT writes its `target_parameters`. The inner of two
  wrappers is `mlp.experts.base_layer`, the outer one `mlp.experts`; a pair's shapes tell which weight it changes.
  With inputs H and outputs O, A is [E * r, H], each expert's r rows after the other, and B is [O, r * E], where the
  expert is the fastest index. PEFT before 0.19 has inputs and outputs swapped: A is [E * r, O] and B is [H, r * E].

Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError

GATE_UP, DOWN = "gate_up_proj", "down_proj"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # fc1, fc2 and fc3
EXPERT = re.compile(r".*\.mlp\.experts\.\d+\.\w+_proj")  # of a pair
_WRAPPED = re.compile(r"(.+\.mlp\.experts)(?:\.base_layer)?\.lora_[AB]\.weight")
_UNSWAPPED_SINCE = (0, 19)  # versions of PEFT


@dataclass(frozen=True)
class StackedPair:
    """A pair for the stacked weights of a layer: `{source}.lora_A.weight` and `{source}.lora_B.weight`."""

    source: str
    rank: int  # of each expert
    scale: float
    swapped: bool  # A has the outputs, and B the inputs


def stacked_sources(names: set[str]) -> dict[str, str]:
    """The sources of stacked pairs among the tensors `names`, each with its module `...mlp.experts`."""
    found = filter(None, map(_WRAPPED.fullmatch, names))
    return {match[0].rpartition(".lora_")[0]: match[1] for match in found}


def stacked_weight(
    a: tuple[int, ...], b: tuple[int, ...], model_config: ModelConfig, version: Any
) -> tuple[str, bool] | None:
    """Which stacked weight a pair of these shapes changes, and whether it is swapped; None if it fits none. `version`
    is PEFT's, which decides where inputs and outputs are equally many."""
    inner, emb_dim = model_config.moe_hidden_dim, model_config.emb_dim
    if len(a) != 2 or len(b) != 2:
        return None
    for name, inputs, outputs in ((GATE_UP, emb_dim, 2 * inner), (DOWN, inner, emb_dim)):
        found = [swapped for swapped in (False, True) if (a[1], b[0]) == _order(inputs, outputs, swapped)]
        if found:
            return name, found[0] if len(found) == 1 else _is_swapped(version)
    return None


def _order(inputs: int, outputs: int, swapped: bool) -> tuple[int, int]:
    return (outputs, inputs) if swapped else (inputs, outputs)


def _is_swapped(version: Any) -> bool:
    parts = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return parts is not None and (int(parts[1]), int(parts[2])) < _UNSWAPPED_SINCE


def check_stacked_rank(
    name: str, shape: tuple[int, ...], dim: int, rank: int, model_config: ModelConfig
) -> None:
    """Raises CheckpointError unless the tensor has `rank` rows or columns for each expert."""
    wanted = rank * model_config.num_experts
    if shape[dim] != wanted:
        expected = [wanted if place == dim else size for place, size in enumerate(shape)]
        raise CheckpointError(
            f"{name} has shape {list(shape)} where model and adapter_config.json make it {expected}"
        )


def target_parameters(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """The weights that `target_parameters` names. Raises CheckpointError for a name that fits none."""
    parameters = {f"{pair}.weight": pair for pair in shapes if not EXPERT.fullmatch(pair)}
    modules = {pair.rpartition(".experts.")[0] for pair in shapes if EXPERT.fullmatch(pair)}
    parameters |= {
        name: name
        for module in modules
        for name in (f"{module}.experts.{GATE_UP}", f"{module}.experts.{DOWN}")
    }
    found: set[str] = set()
    for target in config.get("target_parameters") or []:
        fitting = {pair for name, pair in parameters.items() if f".{name}".endswith(f".{target}")}
        if not fitting:
            raise CheckpointError(
                f"adapter_config.json targets the parameter {target!r}, which adapters may not change here"
            )
        found |= fitting
    return found
