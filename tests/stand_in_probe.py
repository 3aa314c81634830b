"""Ranks that measure collectives on GPUs that are not there, see `stand_in_cards`."""

from __future__ import annotations

import os
from unittest.mock import patch

from cluster.calibration.between_nodes import Points, ProbeActor
from qwen3_dist.worker import cards
from tests.stand_in_cards import take_stand_in


class StandInProbe(ProbeActor):
    """A rank on the card that Ray gave it. Its collectives are those of CPU ranks, over the network."""

    def measure(self, address: tuple[str, int], device: str) -> Points:
        assert device == "cuda" and len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")) == 1
        with patch.object(cards, "set_card", take_stand_in):
            return super().measure(address, device)
