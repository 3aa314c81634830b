"""What a step holds on a rank beside weights and cache, which a GPU must have left when its cache is made.

An estimate from above in closed form, so that a planner has it too; `test_gpu_steps` compares it with what whole steps
allocate. What CUDA graphs and communicators take comes out of what `gpu_memory_utilization` leaves.

Legend: T tokens of a step, D emb_dim, H heads, G KV groups, d head_dim, I hidden columns, K experts of a token.
"""

from __future__ import annotations

from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout
from qwen3_dist.ops import slices
from qwen3_dist.parallel.expert_exchange import capacity

PROMPT_LOGPROBS_ROWS = 128  # of a prompt's logits that are held at once
_LIVE_ROWS = 4  # of D for each token: the residual, what is normed, what is added, what travels
_PAIR_BYTES = 32  # of a pair's expert id, weight and place, whose slice's sort takes as much again
# Bytes of each logit, beside those of the activations' dtype, which tp rank 0 holds twice:
_DRAWN_BYTES = 20  # of a draw: fp32 copies to be changed and for log-probabilities, what is penalised
_SORTED_BYTES = 42  # of a row that is sorted: keys, sorted, places, and as much for the sort itself
_SCORED_BYTES = 12  # of a row that is scored: fp32, what is summed of it, comparisons


def step_bytes(
    config: ModelConfig,
    layout: Layout,
    tokens: int,
    draws: int,
    item_bytes: float,
    all_to_all: bool,
    widens: bool = False,
) -> int:
    """Most bytes on one rank for a step of `tokens` tokens and `draws` draws in each dp group; a number of an
    activation takes `item_bytes`. `all_to_all`: so tokens reach their experts. `widens`: weights are int8, which many
    rows are multiplied with as activations are.
    """
    heads, groups = config.n_heads // layout.tp, max(1, config.n_kv_groups // layout.tp)
    attention = (3 * heads + 2 * groups) * config.head_dim  # q, k, v; q rotated; what attention gives
    hidden = 3 * -(-config.hidden_dim // layout.tp)
    blocks = tokens * (_LIVE_ROWS * config.emb_dim + max(attention, hidden))
    routing = 0
    if config.num_experts:
        rows, copies = _expert_rows(config, layout, tokens, all_to_all)
        columns = -(-config.moe_hidden_dim // layout.etp)
        pairs = config.num_experts_per_tok * min(rows, slices.rows_of_slice(config.num_experts_per_tok))
        blocks += pairs * 3 * (columns + config.emb_dim) + rows * copies * config.emb_dim
        routing = rows * config.num_experts_per_tok * _PAIR_BYTES
    logits = draws * (2 * item_bytes + _DRAWN_BYTES)
    logits += max(
        min(draws, slices.SORTED_ROWS) * _SORTED_BYTES,
        min(tokens, PROMPT_LOGPROBS_ROWS) * (2 * item_bytes + _SCORED_BYTES),
    )
    # Logits come when of the blocks only their answers are left.
    sampling_bytes = 2 * tokens * config.emb_dim * item_bytes + logits * config.vocab_size
    widest = max(config.vocab_size, 2 * config.hidden_dim) // layout.tp * config.emb_dim if widens else 0
    return int(max(blocks * item_bytes + routing, sampling_bytes) + widest * item_bytes)


def _expert_rows(config: ModelConfig, layout: Layout, tokens: int, all_to_all: bool) -> tuple[int, int]:
    """Most rows that a rank's experts take at once, however tokens choose, and how many copies of them there are
    beside those of the rank's own tokens."""
    if (
        all_to_all
    ):  # packed twice, as they arrive, apart, summed, and back; an `exact` step's fit in their place
        own = -(-tokens // layout.tp) * layout.etp
        return layout.ep * capacity(layout, config, own), 6
    if layout.dp == 1:
        return tokens, 1
    # Of all groups, normed, without padding, summed, and in their places again.
    return layout.dp * min(tokens, slices.rows_of_slice(config.num_experts_per_tok, layout.dp)), 5
