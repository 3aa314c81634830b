"""The load of each expert, and the placements that a model is loaded with. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import ConfigError
from qwen3_dist.expert_placement import ExpertPlacement, Placements, even_placements
from qwen3_dist.settings import EngineConfig


@dataclass(frozen=True)
class ExpertLoad:
    """The number of tokens routed to each expert, and the experts' placements, both by MoE layer.

    `imbalance` is the most loaded ep rank's tokens over the mean; 1.0 is even.
    """

    tokens: Mapping[int, tuple[int, ...]]
    placements: Placements

    @property
    def imbalance(self) -> dict[int, float]:
        return {
            layer: self.placements[layer].imbalance(tokens) if sum(tokens) else 1.0
            for layer, tokens in self.tokens.items()
        }

    def to_json(self) -> dict[str, object]:
        """The JSON that `EngineConfig.expert_load` reads and the service shows."""
        return {
            "tokens": {str(layer): list(tokens) for layer, tokens in self.tokens.items()},
            "hosted": {str(layer): each.hosted for layer, each in self.placements.items()},
            "imbalance": {str(layer): round(value, 4) for layer, value in self.imbalance.items()},
        }


def initial_placements(config: EngineConfig, model: ModelConfig) -> Placements:
    """The placements to load with: balanced by the file `config.expert_load` if there is one, else even.

    Raises ConfigError if the file is of another model, or if ranks cannot hold so many copies.
    """
    ep, redundant = config.layout.ep, config.redundant_experts
    most = model.num_experts * (ep - 1)
    if redundant > most:
        raise ConfigError(
            f"redundant_experts={redundant} is more than {most}, with which each of the ep={ep} ranks has all "
            f"{model.num_experts} experts"
        )
    even = even_placements(model, ep, redundant)
    if config.expert_load is None:
        return even
    tokens = _read_tokens(Path(config.expert_load), even, model.num_experts)
    return {layer: ExpertPlacement.balanced(tokens[layer], ep, redundant) for layer in even}


def _read_tokens(path: Path, layers: Placements, num_experts: int) -> dict[int, list[float]]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))["tokens"]
        tokens = {int(layer): [float(count) for count in counts] for layer, counts in raw.items()}
    except FileNotFoundError:
        raise ConfigError(
            f"expert_load={path} does not exist; save LLM.expert_load().to_json() there"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"expert_load={path} is not what LLM.expert_load().to_json() gives: {error!r}"
        ) from None
    if set(tokens) != set(layers) or any(len(counts) != num_experts for counts in tokens.values()):
        raise ConfigError(
            f"expert_load={path} does not fit this model's {len(layers)} MoE layers of {num_experts} experts; "
            "save it from the same model"
        )
    return tokens
