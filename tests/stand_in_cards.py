"""GPUs that are not there: ranks that compute on the CPU and report a card, as Ray or the launcher gave it to them.

Everything between the launcher's choice and the engine's decision is the real thing: Ray's logical GPUs and its
CUDA_VISIBLE_DEVICES, the conversation at start, the count of ranks on a card, the share of its memory.
"""

from __future__ import annotations

import os
import socket
from unittest.mock import patch

import torch

from qwen3_dist.protocol.card import Card
from qwen3_dist.protocol.messages import RankSpec
from qwen3_dist.worker import cards, kv_cache
from qwen3_dist.worker.rank import rank_main

CARD_BYTES = 8 << 20


def rank_on_stand_in(spec: RankSpec) -> None:
    """`rank_main`, for `Launcher.main`. Collectives that would be NCCL's are those of CPU ranks."""
    free_bytes = kv_cache.free_bytes

    def of_card(device: torch.device, *arguments: float) -> int:
        return free_bytes(torch.device("cuda"), *arguments)  # type: ignore[arg-type]

    with (
        patch.object(cards, "set_card", take_stand_in),
        patch.object(kv_cache, "free_bytes", of_card),
        patch.object(torch.cuda, "mem_get_info", lambda _: (CARD_BYTES, CARD_BYTES)),
    ):
        rank_main(spec)


def take_stand_in(index: int) -> tuple[torch.device, Card]:
    """Card `index` of those that the process may see, named by its host (under Ray its node) and its number there."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    number = visible[index] if visible else str(index)
    uuid = f"GPU-{_node()}-{number}"
    return torch.device("cpu"), Card(uuid, "Stand-in", (9, 0), CARD_BYTES, CARD_BYTES)


def _node() -> str:
    import ray

    if not ray.is_initialized():
        return socket.gethostname()
    return str(ray.get_runtime_context().get_node_id())[:8]
