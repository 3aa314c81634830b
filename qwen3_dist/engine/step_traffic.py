"""Bytes that the ranks of a replica send each other in a step, from its layout and tokens. Imports no torch.

Legend: S tokens of the step, of all dp groups; D emb_dim; n ranks of a pipeline stage; r bytes of D activations.
An all-reduce of B bytes among t ranks counts as a reduce-scatter and an all-gather: 2 (t - 1) B over all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from qwen3_dist.config import ModelConfig
from qwen3_dist.parallel.expert_exchange import capacity, chosen_share, exchange_row_bytes, uses_all_to_all
from qwen3_dist.settings import EngineConfig


@dataclass
class Traffic:
    """Totals. `dispatched_tokens` counts each token once for each expert chosen for it in each MoE layer.

    Bytes are those received from other ranks: `tensor_bytes` by the all-reduces of the embedding, attention and dense
    layers over tp; `expert_bytes` by the exchange of MoE layers; `pipeline_bytes` by the next stage.
    """

    dispatched_tokens: int = 0
    tensor_bytes: float = 0.0
    expert_bytes: float = 0.0
    pipeline_bytes: float = 0.0


class StepTraffic:
    """Adds up the traffic of steps on a "cpu" or "cuda".

    It is computed, not measured: all-to-all counts the copies that even routing would send (on GPUs, the rows of its
    fixed capacity). Logits, the agreement of dp groups before a step, and moves of experts are not counted.
    """

    def __init__(self, settings: EngineConfig, config: ModelConfig, device: str) -> None:
        self.total = Traffic()
        self._settings, self._config, self._device = settings, config, device
        layout = settings.layout
        dtype = config.dtype if settings.dtype == "auto" else settings.dtype
        self._row = config.emb_dim * (4 if dtype == "float32" else 2)
        self._num_moe = sum(config.is_moe_layer(layer) for layer in range(config.n_layers))
        all_reduces = 1 + 2 * config.n_layers - self._num_moe
        self._tensor_of_token = 2 * (layout.tp - 1) * self._row * all_reduces
        self._pipeline_of_token = (layout.pp - 1) * layout.tp * self._row
        self._dispatched_of_token = self._num_moe * (config.num_experts_per_tok if self._num_moe else 0)
        self._exchanges = bool(self._num_moe) and layout.stage_size > 1
        self._experts_of_step: dict[int, float] = {}  # by S

    def add(self, tokens: int) -> None:
        """Counts a step of `tokens` (S)."""
        total = self.total
        total.dispatched_tokens += tokens * self._dispatched_of_token
        total.tensor_bytes += tokens * self._tensor_of_token
        total.pipeline_bytes += tokens * self._pipeline_of_token
        if self._exchanges:
            exchanged = self._experts_of_step.get(tokens)
            if exchanged is None:
                exchanged = self._experts_of_step[tokens] = self._num_moe * self._exchange(tokens)
            total.expert_bytes += exchanged

    def _exchange(self, tokens: int) -> float:
        """Bytes of one MoE layer of a step of `tokens`; the formulas are those of `expert_exchange.bytes_saved`."""
        settings, config, layout = self._settings, self._config, self._settings.layout
        if not uses_all_to_all(settings, layout, config, tokens, self._device):
            return 2 * (layout.tp - 1 + (layout.dp - 1) * layout.tp) * tokens * self._row
        fp8 = settings.dispatch_dtype == "fp8"
        there, routing = exchange_row_bytes(config, self._row, fp8)
        over_etp = (layout.etp - 1) * tokens * (2 * self._row + routing)
        if self._device == "cuda":
            rows: float = (
                capacity(layout, config, ceil(tokens / layout.stage_size) * layout.etp) * layout.stage_size
            )
        else:
            here = -(-config.num_experts // layout.ep)
            share = chosen_share(config.num_experts, config.num_experts_per_tok, here)
            rows = tokens * layout.etp * share
        return over_etp + (layout.ep - 1) * rows * (there + routing + self._row)
