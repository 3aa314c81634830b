"""Chooses all-gather or all-to-all for a step, and computes the capacity of an all-to-all. Imports no torch.

Both depend only on numbers that every rank knows before the step, so all ranks get the same result.
Legend: E experts of a layer, K experts of a token, D emb_dim.
"""

from __future__ import annotations

from math import ceil, comb, sqrt

from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout
from qwen3_dist.settings import EngineConfig

# Measured on CPU ranks that share memory (`benchmarks.dispatch`): all-to-all is faster from this number of tokens on,
# unless a row is sent to almost all ranks: 8 evenly chosen experts of 64 are on 99.6% of 2 ranks, 91% of 4.
CPU_ALL_TO_ALL_FROM = 512
_SENT_TO_ALMOST_ALL = 0.95

# Derived, not measured yet (`gpu-check --stages nccl` measures both). A layer by all-to-all has about 50 more launches
# than by all-gather (counted by `tests.fake_gpu`), of 4 us each outside a CUDA graph. A card receives about 200 GB/s
# over NVLink. Between hosts it is less, so all-to-all is faster there earlier than computed here.
CUDA_ALL_TO_ALL_COSTS_S = 200e-6
CUDA_LINK_BYTES_PER_S = 200e9

# The capacity allows for experts that are chosen this many times as often as the mean, plus standard deviations.
_LOAD_MARGIN, _DEVIATIONS = 2, 4
_ITEM_BYTES = 2  # of an activation on a GPU
_ROUTING_BYTES = 8  # of an expert's id and weight
_FP8_RUN = 128  # numbers that share a scale


def prefers_all_to_all(
    layout: Layout, config: ModelConfig, tokens: float, fp8: bool = False, device: str = "cpu"
) -> bool:
    """Whether all-to-all is faster than all-gather for a step of `tokens`, of all dp groups together.

    All-gather sends every token to every rank. All-to-all sends less, unless a token has experts on almost all ranks,
    but costs more for few tokens. `device` is "cpu" or "cuda".
    """
    if not config.num_experts or layout.stage_size == 1:
        return False
    if device == "cuda":
        saved = bytes_saved(layout, config, tokens, fp8)
        return saved > CUDA_ALL_TO_ALL_COSTS_S * CUDA_LINK_BYTES_PER_S
    sent = chosen_share(config.num_experts, config.num_experts_per_tok, -(-config.num_experts // layout.ep))
    return tokens >= CPU_ALL_TO_ALL_FROM and (layout.dp > 1 or fp8 or sent < _SENT_TO_ALMOST_ALL)


def uses_all_to_all(
    settings: EngineConfig, layout: Layout, config: ModelConfig, tokens: int, device: str
) -> bool:
    """Whether a step of `tokens`, of all dp groups together, dispatches by all-to-all. `device` is "cpu" or "cuda"."""
    if settings.moe_dispatch == "auto":
        return prefers_all_to_all(layout, config, tokens, settings.dispatch_dtype == "fp8", device)
    return settings.moe_dispatch == "all_to_all"


def exchange_row_bytes(config: ModelConfig, row: int, fp8: bool) -> tuple[int, int]:
    """Bytes of a token on its way to an expert by all-to-all, where it has `row` bytes as activations: of its numbers,
    and of its experts' ids and weights."""
    there = config.emb_dim + 4 * ceil(config.emb_dim / _FP8_RUN) if fp8 else row
    return there, config.num_experts_per_tok * _ROUTING_BYTES


def bytes_saved(layout: Layout, config: ModelConfig, tokens: float, fp8: bool = False) -> float:
    """Bytes per layer that a GPU rank receives less by all-to-all than by all-gather, in a step of `tokens` of all dp
    groups together. An all-reduce counts as a reduce-scatter and an all-gather."""
    of_group = tokens / layout.dp
    own = of_group / layout.tp
    row = config.emb_dim * _ITEM_BYTES
    there, routing = exchange_row_bytes(config, row, fp8)
    over_tp = 2 * (layout.tp - 1) * own * row
    by_all_gather = 2 * over_tp + 2 * (layout.dp - 1) * of_group * row
    over_etp = (layout.etp - 1) * own * (2 * row + routing)
    slots = capacity(layout, config, ceil(own) * layout.etp)
    return by_all_gather - over_tp - over_etp - (layout.ep - 1) * slots * (there + routing + row)


def capacity(layout: Layout, config: ModelConfig, rows: int) -> int:
    """Rows that a rank with at most `rows` rows can send to each ep rank.

    This is the share of a rank whose experts are chosen twice as often as the mean, plus four standard deviations, and
    at most `rows`. With pp it is `rows`: nothing overflows, so that stages need not inform each other.
    """
    if layout.pp > 1:
        return rows
    here = min(config.num_experts, _LOAD_MARGIN * -(-config.num_experts // layout.ep))
    share = chosen_share(config.num_experts, config.num_experts_per_tok, here)
    return min(rows, ceil(rows * share + _DEVIATIONS * sqrt(rows * share * (1 - share))))


def chosen_share(experts: int, chosen: int, here: int) -> float:
    """Probability that at least one of a token's `chosen` experts, all equally likely, is among `here` of
    `experts`."""
    if experts - here < chosen:
        return 1.0
    return 1 - comb(experts - here, chosen) / comb(experts, chosen)
