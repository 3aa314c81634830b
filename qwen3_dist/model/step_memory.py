"""The memory that a step needs on a GPU rank beside weights and KV cache.

An upper bound in closed form, which the planner uses too; `test_gpu_steps` compares it with what steps allocate. CUDA
graphs and communicators use memory that `gpu_memory_utilization` leaves.

Legend: T tokens of a step, D emb_dim, H heads, G KV groups, d head_dim, I hidden columns, K experts of a token.
"""

from __future__ import annotations

from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout
from qwen3_dist.ops import slices
from qwen3_dist.parallel.expert_exchange import capacity

PROMPT_LOGPROBS_ROWS = 128  # rows whose prompt logprobs are computed at once
_LIVE_ROWS = 4  # rows of D numbers for each token: residual, norm output, layer output, sent rows
_PAIR_BYTES = 32  # expert id, weight and index of a pair, and as much for sorting
# Bytes per logit, without the logits in the activations' dtype, which tp rank 0 holds twice:
_SAMPLED_BYTES = 20  # a sampled row: fp32 copies for sampling and for logprobs, penalties
_SORTED_BYTES = 42  # a row that is sorted: keys, sorted keys, indices, and as much for the sort itself
_LOGPROBS_BYTES = 12  # a row with prompt logprobs: fp32 logits, sums, comparisons


def step_bytes(
    config: ModelConfig,
    layout: Layout,
    tokens: int,
    samples: int,
    item_bytes: float,
    all_to_all: bool,
    widens: bool = False,
    deterministic: bool = False,
    adapted: bool = False,
) -> int:
    """An upper bound in bytes for a step of `tokens` tokens and `samples` samples in each dp group.

    An activation takes `item_bytes`. `all_to_all`: the step dispatches by all-to-all. `widens`: weights are int8
    and are converted to the activations' dtype for products of many rows. In `deterministic` mode each row has an
    output for each of its experts, until all are there. `adapted`: there are adapters, which may change experts.
    """
    heads, groups = config.n_heads // layout.tp, max(1, config.n_kv_groups // layout.tp)
    attention = (3 * heads + 2 * groups) * config.head_dim  # q, k, v; q after RoPE; the output
    hidden = 3 * -(-config.hidden_dim // layout.tp)
    blocks = tokens * (_LIVE_ROWS * config.emb_dim + max(attention, hidden))
    routing = 0
    if config.num_experts:
        rows, copies = _expert_rows(config, layout, tokens, all_to_all)
        columns = -(-config.moe_hidden_dim // layout.etp)
        at_once = rows if deterministic else min(rows, slices.rows_of_slice(config.num_experts_per_tok))
        pairs = config.num_experts_per_tok * at_once
        blocks += pairs * 3 * (columns + config.emb_dim) + rows * copies * config.emb_dim
        if adapted:  # pairs one by one: inputs of an adapter, what it adds, and outputs in fp32
            blocks += pairs * (columns + 2 * config.emb_dim)
        if deterministic:  # columns of all ranks; outputs that were sent back, and have arrived
            blocks += pairs * (config.moe_hidden_dim - columns + 2 * all_to_all * config.emb_dim)
        routing = rows * config.num_experts_per_tok * _PAIR_BYTES
    logits = samples * (2 * item_bytes + _SAMPLED_BYTES)
    logits += max(
        min(samples, slices.SORTED_ROWS) * _SORTED_BYTES,
        min(tokens, PROMPT_LOGPROBS_ROWS) * (2 * item_bytes + _LOGPROBS_BYTES),
    )
    # Logits are computed after the blocks, when only hidden states are left of them.
    sampling_bytes = 2 * tokens * config.emb_dim * item_bytes + logits * config.vocab_size
    widest = max(config.vocab_size, 2 * config.hidden_dim) // layout.tp * config.emb_dim if widens else 0
    return int(max(blocks * item_bytes + routing, sampling_bytes) + widest * item_bytes)


def _expert_rows(config: ModelConfig, layout: Layout, tokens: int, all_to_all: bool) -> tuple[int, int]:
    """The most rows that a rank's experts receive, for any routing, and how many copies of these rows exist besides
    the rank's own tokens."""
    if all_to_all:
        # Packed twice, received, split, summed, and sent back. An `exact` step needs no more.
        own = -(-tokens // layout.tp) * layout.etp
        return layout.ep * capacity(layout, config, own), 6
    if layout.dp == 1:
        return tokens, 1
    # Gathered, after the norm, without padding, summed, and with padding again.
    return layout.dp * min(tokens, slices.rows_of_slice(config.num_experts_per_tok, layout.dp)), 5
