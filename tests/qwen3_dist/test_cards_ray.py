"""Which GPUs ranks take under Ray, and what follows: logical GPUs in a real Ray, for which stand-ins answer."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.errors import ResourceError
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.model.reference import load_reference
from tests.checkpoints import write_checkpoint
from tests.ranks import end_nursery
from tests.stand_in_cards import rank_on_stand_in

GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
UNHIDDEN = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


@pytest.fixture(scope="module", autouse=True)
def no_processes_of_other_tests() -> None:
    end_nursery()


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launcher, "main", staticmethod(rank_on_stand_in))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense"), moe=False)


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A Ray with one node, which has as many GPUs as `parametrize` says."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": request.param})
    try:
        cluster.connect()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def engine(checkpoint: Path, layout: str, **settings: Any) -> LLM:
    return LLM(str(checkpoint), layout=layout, executor="ray", use_tqdm=False, **settings)


def cards_of(llm: LLM) -> list[str]:
    return [rank.card.uuid for rank in llm._engine.ranks if rank.card is not None]


def check_tokens(llm: LLM, checkpoint: Path) -> None:
    """That the ranks compute, and compute the right thing."""
    tokens = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].token_ids
    assert tokens == load_reference(checkpoint).generate_greedy([5, 6, 7], 4)


@pytest.mark.parametrize("cluster", [8], indirect=True)
def test_ranks_that_ray_gives_a_card_each_talk_directly_and_fill_it(
    cluster: Cluster, checkpoint: Path
) -> None:
    with engine(checkpoint, "tp=2") as llm:
        assert len(set(cards_of(llm))) == 2
        assert llm._engine.collectives == "shared memory"  # as NCCL between GPUs that are there
        whole = llm._engine._executor.num_blocks
        check_tokens(llm, checkpoint)
    with engine(checkpoint, "tp=2,dp=2") as llm:
        assert len(set(cards_of(llm))) == 4
        assert llm._engine.collectives == "shared memory"
        assert llm._engine._executor.num_blocks == whole  # no rank shares its card


@pytest.mark.parametrize("cluster", [8], indirect=True)
@pytest.mark.parametrize("hidden", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_engines_on_a_node_take_different_cards(cluster: Cluster, checkpoint: Path, hidden: bool) -> None:
    with contextlib.ExitStack() as stack:
        rank_env = {} if hidden else UNHIDDEN
        llms = [stack.enter_context(engine(checkpoint, "tp=2", rank_env=rank_env)) for _ in range(2)]
        assert len({card for llm in llms for card in cards_of(llm)}) == 4
        assert [llm._engine.collectives for llm in llms] == ["shared memory"] * 2
        check_tokens(llms[1], checkpoint)


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_ranks_share_cards_only_if_they_may(
    cluster: Cluster, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ResourceError, match="needs 2 GPUs .* has 1; add GPUs, set share_gpus=true"):
        engine(checkpoint, "tp=2")
    with engine(checkpoint, "tp=1") as llm:
        alone = llm._engine._executor.num_blocks
    with engine(checkpoint, "dp=2", share_gpus=True) as llm:
        (card, ranks), *others = Counter(cards_of(llm)).items()
        assert (ranks, others) == (2, [])
        assert llm._engine.collectives == f"over the host, since 2 ranks share {card}"
        assert llm._engine._executor.num_blocks == alone // 2
        check_tokens(llm, checkpoint)
    assert "2 ranks share 1 GPUs, 2 on each" in caplog.text


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_cards_of_two_nodes_are_told_apart(cluster: Cluster, checkpoint: Path) -> None:
    node = cluster.add_node(num_cpus=2, num_gpus=1)
    cluster.wait_for_nodes()
    try:
        with engine(checkpoint, "tp=2") as llm:
            cards = cards_of(llm)
            assert len(set(cards)) == 2
            assert {card.rpartition("-")[2] for card in cards} == {"0"}  # both are the first of their node
            assert llm._engine.collectives == "shared memory"
    finally:
        cluster.remove_node(node)
