"""How many tokens chose each expert, and the placements that a model is loaded with. Imports no torch."""

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
    """Tokens that chose each expert, by MoE layer, with where the experts are and how even the ranks' work is.

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
        """What `EngineConfig.expert_load` reads back, and a service shows."""
        return {
            "tokens": {str(layer): list(tokens) for layer, tokens in self.tokens.items()},
            "hosted": {str(layer): each.hosted for layer, each in self.placements.items()},
            "imbalance": {str(layer): round(value, 4) for layer, value in self.imbalance.items()},
        }


def initial_placements(config: EngineConfig, model: ModelConfig) -> Placements:
    """Where experts lie when loading: by the tokens of `config.expert_load` if it names a file, else evenly.

    Raises ConfigError if the file is not of this model, or more copies are asked for than ranks can hold.
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
