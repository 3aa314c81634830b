"""Which ranks share a GPU, and whether collectives can go over NCCL.

NCCL refuses two ranks of a group on one card, so each rank reports its card before it joins a process group, and the
engine decides once for all ranks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qwen3_dist.errors import ResourceError
from qwen3_dist.layout import Layout
from qwen3_dist.protocol.card import Card
from qwen3_dist.settings import EngineConfig

_log = logging.getLogger(__name__)
_FAR_BELOW = 0.75  # share of the wanted memory; if less is free, another process uses the card
_GIB = 2**30


@dataclass(frozen=True)
class CardUse:
    """How the ranks of a layout use cards.

    `ranks_on_card` and `free_bytes` have an entry for each rank: the number of ranks on its card, and the most free
    memory that any of them found there. With `over_host` collectives go through host memory; `collectives` says why.
    """

    ranks_on_card: tuple[int, ...]
    free_bytes: tuple[int, ...]
    over_host: bool = False
    collectives: str = ""


def use_of_cards(cards: Sequence[Card | None], config: EngineConfig) -> CardUse:
    """How the ranks with these cards (None: a CPU rank) use them.

    Raises ResourceError if ranks share a card without `share_gpus`, if the cards of a tp group differ in kind, or if
    another process holds a card.
    """
    present = [card for card in cards if card is not None]
    if not present:
        return CardUse((1,) * len(cards), (0,) * len(cards))
    assert len(present) == len(cards)
    _check_kinds(present, config.layout)
    on_card = Counter(card.uuid for card in present)
    free: dict[str, int] = {}
    for card in present:
        free[card.uuid] = max(card.free_bytes, free.get(card.uuid, 0))
    if config.num_blocks is None:
        for card in {card.uuid: card for card in present}.values():
            _check_memory(card, free[card.uuid], config.gpu_memory_utilization)
    uuid, most = on_card.most_common(1)[0]
    why = f"over the host, since {most} ranks share {uuid}" if most > 1 else ""
    if most > 1:
        if not config.share_gpus:
            raise ResourceError(
                f"{most} ranks of layout {config.layout} would share {uuid}; set share_gpus=true or use a smaller "
                "layout"
            )
        _log.warning("%d ranks share %s: their collectives go over the host, which is slow", most, uuid)
    by_rank = (tuple(on_card[card.uuid] for card in present), tuple(free[card.uuid] for card in present))
    return CardUse(*by_rank, over_host=most > 1, collectives=why)


def _check_kinds(cards: Sequence[Card], layout: Layout) -> None:
    """Raises ResourceError if the cards of a tp group differ: the slowest would set the pace, with other kernels."""
    for first in range(0, len(cards), layout.tp):
        for rank in range(first + 1, first + layout.tp):
            if cards[rank].kind != cards[first].kind:
                raise ResourceError(
                    f"rank {first} has {cards[first]} and rank {rank} of its tp group {cards[rank]}; use cards of one "
                    "kind, or a smaller tp so that each tp group has one kind"
                )


def _check_memory(card: Card, free: int, utilization: float) -> None:
    asked = utilization * card.total_bytes
    if free < _FAR_BELOW * asked:
        fits = int(free / card.total_bytes * 100) / 100
        lower = f", or lower gpu_memory_utilization to {fits:g}" if fits else ""
        raise ResourceError(
            f"{card} has {free / _GIB:.1f} of {card.total_bytes / _GIB:.1f} GiB free and "
            f"gpu_memory_utilization={utilization:g} asks for {asked / _GIB:.1f}; end the process that holds the rest"
            f"{lower}"
        )
