"""A move of experts on a GPU that computes nothing: `python -m tests.fake_gpu_moves [--quantize int8]` prints where
its host waits, as JSON, by what was done: `read` in a thread, or `move` between two steps."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.compare.checkpoints import SHAPES
from qwen3_dist.config import ModelConfig
from qwen3_dist.expert_placement import ExpertPlacement
from qwen3_dist.model.experts import Experts
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.worker.expert_moves import ExpertReadThread
from tests.fake_gpu import fake_gpu
from tests.fake_rank import built_model


class Reader:
    """Gives zeros in place of a checkpoint's experts, on the CPU as they come from its files."""

    def __init__(self, experts: Experts) -> None:
        """`experts` are those of the layer; they keep codes as they are in files."""
        stacks = experts.weights.tensors if experts.codes else experts.weights.stacks
        self._kinds = [(each.shape[1:], each.dtype if experts.codes else torch.bfloat16) for each in stacks]

    def read(self, layer: int, experts: Sequence[int], progress: Callable[[int], None]) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(len(experts), *shape, dtype=dtype) for shape, dtype in self._kinds)

    def read_adapters(self, layer: int, hosted: Sequence[int]) -> None:
        """The model has none."""


def observe(quantize: str | None) -> dict[str, list[str]]:
    config = ModelConfig.from_dict({**SHAPES["moe"], "num_hidden_layers": 1})
    with fake_gpu(90) as watch, torch.no_grad():
        model = built_model(config, torch.bfloat16, ParallelContext.single(), quantize)
        moe = model.moe_layers[0]
        [hosted] = moe.placement.hosted
        placement = ExpertPlacement(((*hosted[1::-1], *hosted[2:]),))  # the first two change places
        watch.restart()
        thread = ExpertReadThread(
            Reader(moe.experts), moe, 0, placement, model.device, None, threading.Event()
        )
        prepared = thread.prepare()
        waits = {"read": list(watch.waits)}
        assert all(tensor.is_cuda for tensor in prepared.tensors)
        for tables in (moe.all_gather._places, moe.all_to_all._owners, moe.all_to_all._places):
            tables.values = tables.values.to("cuda")  # as after a step
        moe.experts.count_on(model.device)
        watch.restart()
        moe.move(prepared)
        waits["move"] = list(watch.waits)
        assert moe.placement == placement and watch.operators["aten.index_copy_.default"] == len(
            prepared.converted
        )
    return waits


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quantize")
    json.dump(observe(parser.parse_args().quantize), sys.stdout)


if __name__ == "__main__":
    main()
