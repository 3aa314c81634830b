"""Chooses between all-gather and all-to-all for a step, and the capacity of an all-to-all. Imports no torch.

Both follow from numbers that every rank knows before a step, so all ranks choose alike.
Legend: E experts of a layer, K experts of a token, D emb_dim.
"""

from __future__ import annotations

from math import ceil, comb, sqrt

from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout

# Measured on CPU ranks that share memory (`benchmarks.dispatch`): all-to-all wins from so many tokens of a step on,
# unless a row goes to almost all ranks: 8 of 64 experts evenly chosen lie on 99.6% of 2 ranks, 91% of 4.
CPU_ALL_TO_ALL_FROM = 512
_SENT_TO_ALMOST_ALL = 0.95

# Derived, not yet measured (`gpu-check --stages nccl` would set both). A layer by all-to-all takes about 50 launches
# more than one by all-gather (counted by `tests.fake_gpu`), which find slots, pack and unpack rows: 4 us each where no
# graph holds them. A card receives about 200 GB/s over NVLink; between hosts less, so that all-to-all gains there
# earlier than this says.
CUDA_ALL_TO_ALL_COSTS_S = 200e-6
CUDA_LINK_BYTES_PER_S = 200e9

# Room for a rank whose experts are chosen so many times as often as the mean, and so many standard deviations more.
_LOAD_MARGIN, _DEVIATIONS = 2, 4
_ITEM_BYTES = 2  # of an activation on a GPU
_ROUTING_BYTES = 8  # of an expert's id and weight
_FP8_RUN = 128  # numbers that share a scale


def prefers_all_to_all(
    layout: Layout, config: ModelConfig, tokens: float, fp8: bool = False, device: str = "cpu"
) -> bool:
    """Whether a step of `tokens`, of all dp groups together, reaches its experts sooner by all-to-all.

    By all-gather every rank has every token. All-to-all sends them where their experts are, which is less unless
    that is almost everywhere and they travel as wide, but costs more for few. `device` is "cpu" or "cuda".
    """
    if not config.num_experts or layout.stage_size == 1:
        return False
    if device == "cuda":
        saved = bytes_saved(layout, config, tokens, fp8)
        return saved > CUDA_ALL_TO_ALL_COSTS_S * CUDA_LINK_BYTES_PER_S
    sent = chosen_share(config.num_experts, config.num_experts_per_tok, -(-config.num_experts // layout.ep))
    return tokens >= CPU_ALL_TO_ALL_FROM and (layout.dp > 1 or fp8 or sent < _SENT_TO_ALMOST_ALL)


def bytes_saved(layout: Layout, config: ModelConfig, tokens: float, fp8: bool = False) -> float:
    """Bytes that a GPU rank receives less in a layer of a step of `tokens`, of all dp groups, by all-to-all than by
    all-gather. An all-reduce counts as a reduce-scatter and an all-gather."""
    of_group = tokens / layout.dp
    own = of_group / layout.tp
    row, routing = config.emb_dim * _ITEM_BYTES, config.num_experts_per_tok * _ROUTING_BYTES
    there = config.emb_dim + 4 * ceil(config.emb_dim / _FP8_RUN) if fp8 else row
    over_tp = 2 * (layout.tp - 1) * own * row
    by_all_gather = 2 * over_tp + 2 * (layout.dp - 1) * of_group * row
    over_etp = (layout.etp - 1) * own * (2 * row + routing)
    slots = capacity(layout, config, ceil(own) * layout.etp)
    return by_all_gather - over_tp - over_etp - (layout.ep - 1) * slots * (there + routing + row)


def capacity(layout: Layout, config: ModelConfig, rows: int) -> int:
    """Rows that a rank can send each ep rank when it has at most `rows`.

    That is the share of them that a rank gets whose experts are chosen twice as often as the mean, and four standard
    deviations; at most all. With pp it is all: nothing overflows, so that no stage must tell the next.
    """
    if layout.pp > 1:
        return rows
    here = min(config.num_experts, _LOAD_MARGIN * -(-config.num_experts // layout.ep))
    share = chosen_share(config.num_experts, config.num_experts_per_tok, here)
    return min(rows, ceil(rows * share + _DEVIATIONS * sqrt(rows * share * (1 - share))))


def chosen_share(experts: int, chosen: int, here: int) -> float:
    """Chance that one of a token's `chosen` experts, each as likely, is among `here` of all."""
    if experts - here < chosen:
        return 1.0
    return 1 - comb(experts - here, chosen) / comb(experts, chosen)
