"""Which GPUs ranks take and share as processes, and what is refused before weights are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qwen3_dist import EngineConfig, Layout
from qwen3_dist.errors import ResourceError
from qwen3_dist.launch.card_use import use_of_cards
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.launch.processes import ProcessLauncher, shared_nursery
from qwen3_dist.launch.rank_group import RankGroupExecutor
from qwen3_dist.launch.ray_ranks import part_of_card
from qwen3_dist.protocol.card import Card
from qwen3_dist.worker import cards, kv_cache
from qwen3_dist.worker.cards import local_device
from tests.stand_in_cards import rank_on_stand_in

GIB = 2**30


def card(number: int, name: str = "NVIDIA H200", free: float = 139) -> Card:
    return Card(f"GPU-{number}", name, (9, 0), 140 * GIB, int(free * GIB))


@pytest.fixture(scope="module")
def nursery() -> Iterator[None]:
    with shared_nursery():
        yield


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launcher, "main", staticmethod(rank_on_stand_in))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_processes_take_a_card_each(two_cards: None, nursery: None, checkpoints: dict[str, Path]) -> None:
    config = EngineConfig(str(checkpoints["dense"]), layout=Layout(tp=2), executor="processes")
    executor = RankGroupExecutor(config, ProcessLauncher(config))
    assert len({rank.card for rank in executor.ranks}) == 2
    assert executor.collectives == "shared memory"  # as NCCL between GPUs that are there
    executor.shutdown()


def test_processes_share_cards_only_if_they_may(
    two_cards: None, nursery: None, checkpoints: dict[str, Path]
) -> None:
    config = EngineConfig(str(checkpoints["dense"]), layout=Layout(dp=4), executor="processes")
    with pytest.raises(ResourceError, match="4 ranks need 4 GPUs and this host has 2; set share_gpus=true"):
        ProcessLauncher(config)
    blocks = {}
    for dp in (2, 4):
        config = EngineConfig(str(checkpoints["dense"]), layout=Layout(dp=dp), share_gpus=True)
        executor = RankGroupExecutor(config, ProcessLauncher(config))
        blocks[dp] = executor.num_blocks
        on_card = Counter(rank.card.uuid for rank in executor.ranks if rank.card)
        assert list(on_card.values()) == [dp // 2] * 2
        executor.shutdown()
    assert executor.collectives == f"over the host, since 2 ranks share {next(iter(on_card))}"
    assert blocks[4] == blocks[2] // 2


def test_a_card_with_one_rank_uses_nccl_only_if_all_have_one() -> None:
    layout = Layout(dp=3)
    alone = use_of_cards([card(0), card(1), card(2)], EngineConfig(layout=layout))
    assert (alone.ranks_on_card, alone.over_host) == ((1, 1, 1), False)
    shared = use_of_cards([card(0), card(1), card(1)], EngineConfig(layout=layout, share_gpus=True))
    assert (shared.ranks_on_card, shared.over_host) == ((1, 2, 2), True)
    assert shared.collectives == "over the host, since 2 ranks share GPU-1"


def test_what_is_free_on_a_shared_card_is_what_its_first_rank_found() -> None:
    config = EngineConfig(layout=Layout(dp=2), share_gpus=True)
    assert use_of_cards([card(0, free=138), card(0, free=139)], config).free_bytes == (139 * GIB,) * 2


@pytest.mark.parametrize(
    ("ranks", "settings", "sentence"),
    [
        (
            [card(0), card(0)],
            {},
            "2 ranks of layout .* would share GPU-0; set share_gpus=true or use a smaller",
        ),
        (
            [card(0), card(1, "NVIDIA A100")],
            {},
            r"rank 0 has GPU-0 \(NVIDIA H200\) and rank 1 of its tp group GPU-1 \(NVIDIA A100\); use cards of one",
        ),
        (
            [card(0), card(1, free=35)],
            {},
            r"GPU-1 \(NVIDIA H200\) has 35.0 of 140.0 GiB free and gpu_memory_utilization=0.9 asks for 126.0; "
            "end the process that holds the rest, or lower gpu_memory_utilization to 0.25",
        ),
    ],
)
def test_cards_that_cannot_serve_are_named(
    ranks: list[Card], settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ResourceError, match=sentence):
        use_of_cards(ranks, EngineConfig(layout=Layout(tp=2), **settings))  # type: ignore[arg-type]


def test_tp_groups_may_have_different_kinds_of_cards() -> None:
    kinds = [card(0), card(1), card(2, "NVIDIA A100"), card(3, "NVIDIA A100")]
    assert not use_of_cards(kinds, EngineConfig(layout=Layout(tp=2, dp=2))).over_host


def test_a_lowered_utilization_is_what_the_cache_gets_beside_another_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The card has 40 of 140 GiB free at the start, then the weights take 10."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30 * GIB, 140 * GIB))
    gpu = torch.device("cuda")
    assert kv_cache.free_bytes(gpu, 0.25, 1, 40 * GIB) == 25 * GIB  # a quarter of the card, less the weights
    assert kv_cache.free_bytes(gpu, 0.9, 1, 40 * GIB) == 26 * GIB  # most of what was left, less the weights
    assert kv_cache.free_bytes(gpu, 0.25, 5, 40 * GIB) == 5 * GIB


@pytest.mark.parametrize(
    ("built", "visible", "driver", "sentence"),
    [
        (False, None, "", "is built without CUDA; install a CUDA build of torch, or use device=cpu"),
        (True, "", "", "CUDA_VISIBLE_DEVICES='' hides all of them; unset it or name GPUs in it"),
        (True, "-1", "", "CUDA_VISIBLE_DEVICES='-1' hides all of them"),
        (
            True,
            "0",
            "The NVIDIA driver on your system is too old (found version 11040). Please update.",
            r"the NVIDIA driver does not fit torch .* \(The NVIDIA driver on .* is too old .*; update the driver",
        ),
        (True, None, "Found no NVIDIA GPUs", "Found no NVIDIA GPUs; check that nvidia-smi lists GPUs"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_with_what_to_change(
    built: bool, visible: str | None, driver: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        if driver:
            raise RuntimeError(driver)

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ResourceError, match=sentence):
        local_device("cuda")
    with pytest.raises(ResourceError, match="built without CUDA|hides|driver|nvidia-smi"):
        cards.set_card(0)  # as a rank of another host does
    assert local_device("auto") == "cpu"


@pytest.mark.parametrize(("gpus", "ranks"), [(2.0, 4), (2.0, 3), (1.0, 3), (0.5, 2), (0.3333, 1), (4.0, 4)])
def test_parts_of_cards_fit_the_bundle_and_no_rank_needs_two(gpus: float, ranks: int) -> None:
    part = part_of_card(gpus, ranks)
    assert 0 < part <= 1 and part * ranks <= gpus
    if gpus >= 1:
        assert int(1 / part) * gpus >= ranks
