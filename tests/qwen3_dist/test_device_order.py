"""What must wait for a device, or must not outlive its use, seen on stand-ins that count."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qwen3_dist.config import ModelConfig
from qwen3_dist.expert_placement import ExpertPlacement
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.ops.transfer import ToHost
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.pipeline import Pipeline
from qwen3_dist.worker.expert_moves import ExpertMoves
from tests.checkpoints import DENSE, MOE

CARD = torch.device("cuda", 1)


class Line:
    """What a card was asked to do, in order: a stand-in for `torch.cuda`'s streams and events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.did: list[str] = []
        line = self

        class Event:
            def record(self, stream: str) -> None:
                line.did.append(f"record on {stream}")

            def synchronize(self) -> None:
                line.did.append("wait")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device}")

    def tensor(self) -> Any:
        def to(*_: Any, **__: Any) -> Tensor:
            self.did.append("copy")
            return torch.zeros(1)

        return SimpleNamespace(is_cuda=True, device=CARD, to=to)


def test_a_result_is_read_after_the_event_that_follows_its_copies_on_their_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line(monkeypatch)
    ToHost(line.tensor(), line.tensor()).arrived()
    assert line.did == ["copy", "copy", "record on the stream of cuda:1", "wait"]


@pytest.mark.parametrize("on_card", [True, False])
def test_a_stage_on_a_card_waits_for_its_send_before_other_groups_work(
    on_card: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []
    work = SimpleNamespace(wait=lambda: did.append("wait"))
    monkeypatch.setattr(dist, "isend", lambda *_: did.append("send") or work)
    x: Any = SimpleNamespace(is_cuda=on_card)
    x.contiguous = lambda: x
    Pipeline(0, 2, -1, 1).send(x)
    assert did == (["send", "wait"] if on_card else ["send"])


@pytest.mark.parametrize("wanted", [True, False], ids=["moved", "dropped"])
def test_experts_that_have_moved_are_held_once_and_their_stream_is_told(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.from_dict(
        {**DENSE, **MOE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    )
    model = Qwen3Model(config, ParallelContext.single(), TorchOps()).eval().requires_grad_(False)
    moves = ExpertMoves(model, Path(), random=True)
    layer, moe = next(iter(model.moe_layers.items()))
    [hosted] = moe.placement.hosted
    moves.start(layer, ExpertPlacement(((*hosted[1::-1], *hosted[2:]),)))
    while not moves.arrived:
        time.sleep(0.001)
    assert moves._thread is not None and moves._thread.prepared is not None
    read = [weakref.ref(tensor) for tensor in moves._thread.prepared.tensors]
    told: list[Any] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda _, stream: told.append(stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the steps' stream")
    moves._stream = "beside the steps"  # type: ignore[assignment]
    if wanted:
        moves.finish()
        assert told == ["the steps' stream"] * len(read)
    else:
        moves.drop()
    gc.collect()
    assert not any(tensor() is not None for tensor in read)
