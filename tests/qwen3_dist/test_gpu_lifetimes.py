"""What a rank keeps of a card's memory when its engine starts anew, seen on stand-ins that count."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.distributed import distributed_c10d

from qwen3_dist.config import ModelConfig
from qwen3_dist.launch.in_process import InProcessExecutor
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.pipeline import Pipeline
from qwen3_dist.protocol.card import Card
from qwen3_dist.protocol.messages import RankSpec, Start
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.read_runs import Region, read_regions
from qwen3_dist.worker import cards, kv_cache, rendezvous, shard, sleep
from qwen3_dist.worker.background import Background
from qwen3_dist.worker.decode_graphs import DecodeGraphs
from qwen3_dist.worker.rank import _Rank
from qwen3_dist.worker.runner import ModelRunner
from tests.checkpoints import DENSE

CARD = torch.device("cuda", 1)


def test_all_groups_are_aborted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The abort of one may wait for the card, on which a kernel waits until another is aborted."""
    together = threading.Barrier(3)
    aborted: list[int] = []

    class Group:
        def abort(self) -> None:
            aborted.append(together.wait(timeout=10))

    monkeypatch.setattr(ParallelContext, "_uses_nccl", True)
    monkeypatch.setattr(
        distributed_c10d, "_world", SimpleNamespace(pg_names={Group(): "0" for _ in range(3)})
    )
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda: None)
    ParallelContext.single().abort()
    assert sorted(aborted) == [0, 1, 2]


def test_a_runner_that_is_closed_is_freed_although_the_heap_is_frozen() -> None:
    config = ModelConfig.from_dict({**DENSE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    model = Qwen3Model(config, ParallelContext.single(), TorchOps()).eval().requires_grad_(False)
    runner = ModelRunner(model, 8, EngineConfig(model="", max_model_len=16), Path())
    keys = weakref.ref(runner._cache[0].keys)
    gc.disable()  # as `freeze_gc_heap` does for what is there
    try:
        runner.close()
        del runner
        assert keys() is None
    finally:
        gc.enable()


def test_graphs_are_captured_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS keeps a workspace for each stream, for as long as the process lives."""
    made: list[MagicMock] = []
    captured_on: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: made.append(MagicMock()) or made[-1])
    for name in ("stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(
        torch.cuda, "graph", lambda _, pool, stream: captured_on.append(stream) or MagicMock()
    )
    monkeypatch.setattr(DecodeGraphs, "_padding_batch", lambda *_: None)
    model: Any = SimpleNamespace(
        activation_template=torch.zeros(4),
        stage=lambda *_: (None, None),
        parallel=SimpleNamespace(pipeline=Pipeline()),
    )
    cache: Any = [SimpleNamespace(keys=SimpleNamespace(shape=(8, 16), device=CARD))]
    DecodeGraphs(model, cache, 8, torch.zeros(2, 2))
    assert len(made) == 1 and captured_on == made * 4


def test_a_rank_that_joins_again_tells_what_was_free_before_it_took_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the engine takes the rank's own weights for those of another process, and refuses the card."""
    free = iter((100, 10))
    monkeypatch.setattr(
        cards, "set_card", lambda _: (torch.device("cpu"), Card("GPU-0", "H200", (9, 0), 140, next(free)))
    )
    monkeypatch.setattr(rendezvous, "_connect", lambda *_: ParallelContext.single())
    monkeypatch.setattr(rendezvous, "set_threads", lambda *_: None)
    monkeypatch.setattr(rendezvous, "use_interface_of", lambda _: None)
    for name in rendezvous._NO_NCCL_WATCHDOG:
        monkeypatch.setenv(name, "")  # so that what is set here ends with this test
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_ENABLE_MONITORING", "1")  # the user's
    monkeypatch.setattr(rendezvous.dist, "TCPStore", MagicMock())
    said: list[Any] = []
    start = Start(("127.0.0.1", 1), 1, 1, 100, False)
    channel: Any = SimpleNamespace(local_host="127.0.0.1", send=said.append, receive=lambda: start)
    spec = RankSpec(0, EngineConfig(model=""), {}, "cuda", ("127.0.0.1", 1), b"")
    rank = _Rank(spec, channel)
    for _ in range(2):
        rank._join(spec, SimpleNamespace())  # type: ignore[arg-type]
    assert [hello.card.free_bytes for hello in said] == [100, 100]
    assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "1"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"


def test_weights_sleep_in_pieces_that_pinned_memory_is_not_rounded_up_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    empty = torch.empty

    def pinned(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = empty(*shape, **options)
        if pin_memory:
            asked.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(sleep, "_PIECE_BYTES", 1 << 10)
    weight = torch.arange(1100, dtype=torch.int32)
    kept = sleep._on_host(weight[:7])  # all of its storage
    taken = sum(1 << (size - 1).bit_length() for size in asked)
    assert taken <= weight.nbytes + (1 << 10)
    assert torch.equal(torch.cat(kept).view(torch.int32), weight)


def test_what_torch_keeps_unused_is_freed_before_a_cards_memory_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    did: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: did.append("emptied"))
    monkeypatch.setattr(kv_cache, "free_bytes", lambda *_: did.append("measured") or 1 << 20)
    monkeypatch.setattr(kv_cache, "block_bytes", lambda *_: 1 << 10)
    monkeypatch.setattr(shard, "_step_bytes", lambda *_: 0)
    model: Any = SimpleNamespace(device=CARD, config=SimpleNamespace(context_length=64))
    shard.count_blocks(EngineConfig(model=""), model, shard.MemoryShare())
    assert did == ["emptied", "measured"]


class Contexts:
    """The cards on which a process has a context: those that a thread has made its own, as CUDA does from 12 on. A
    thread begins with card 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cards: set[int | None] = set()
        self._thread = threading.local()
        monkeypatch.setattr(torch.cuda, "set_device", lambda card: self._set(torch.device(card).index))
        monkeypatch.setattr(torch.cuda, "stream", self._stream)

    def _set(self, card: int | None) -> None:
        if card != getattr(self._thread, "card", 0):
            self._thread.card = card
            self.cards.add(card)

    @contextlib.contextmanager
    def _stream(self, stream: Any) -> Iterator[None]:
        before = getattr(self._thread, "card", 0)
        self._set(stream.device.index)
        yield
        self._set(before)


def test_threads_of_a_rank_take_no_memory_of_card_0(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = Contexts(monkeypatch)
    stream: Any = SimpleNamespace(device=CARD, synchronize=lambda: None)
    work = Background("adapters", lambda: 1, stream)
    work.start()
    work.join()
    assert work.result == 1 and contexts.cards == {1}


def test_threads_that_read_weights_take_no_memory_of_card_0(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = Contexts(monkeypatch)
    stream = SimpleNamespace(device=CARD)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    out: Any = SimpleNamespace(device=CARD, nbytes=4, element_size=lambda: 4)
    read: list[str] = []

    def reads(source: str, *_: Any) -> Iterator[Any]:
        read.append(source)
        yield from ()

    files: Any = SimpleNamespace(place=lambda source, _: source, reads=reads)
    read_regions(files, [Region(name, (), out) for name in "ab"], lambda _: None)
    assert sorted(read) == ["a", "b"] and contexts.cards == {1}


def test_an_engine_in_this_process_first_frees_what_an_earlier_one_held(
    monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Path]
) -> None:
    class Measured(Exception):
        pass

    def empties() -> None:
        assert keys() is None
        raise Measured

    config = EngineConfig(str(checkpoints["dense"]), num_blocks=8, device="cpu")
    executor = InProcessExecutor(config, {})
    assert executor._runner is not None
    keys = weakref.ref(executor._runner._cache[0].keys)
    executor.shutdown()
    monkeypatch.setattr(cards, "local_device", lambda _: "cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", empties)
    with pytest.raises(Measured):
        InProcessExecutor(config, {})
