"""Experts move while steps go on: on all ranks between the same two steps, or on none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.engine.engine import Engine
from qwen3_dist.errors import CheckpointError, EngineDeadError
from qwen3_dist.launch import processes
from qwen3_dist.model.reference import load_reference
from qwen3_dist.protocol.messages import RankSpec
from tests import planted_ranks
from tests.checkpoints import write_checkpoint
from tests.ranks import by_name

PROMPTS = [list(range(3, 20)), [7, 1, 150, 198, 0], [42]]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
pytestmark = pytest.mark.usefixtures("nursery")
SETTINGS = {"layout": "tp=2,ep=2", "executor": "processes", "redundant_experts": 3, "use_tqdm": False}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "moe", moe=True, mlp_only_layers=[1], num_experts=10)


def started(monkeypatch: pytest.MonkeyPatch, main: Callable[[RankSpec], None], model: str) -> LLM:
    """An engine whose ranks run `main`, a function of `planted_ranks`."""
    monkeypatch.setattr(processes.ProcessLauncher, "main", by_name(main))
    return LLM(model, **SETTINGS)


def expected_tokens(checkpoint: Path) -> list[list[int]]:
    reference = load_reference(checkpoint)
    return [reference.generate_greedy(prompt, 24) for prompt in PROMPTS]


def collect(engine: Engine, tokens: list[list[int]], until: Callable[[], bool] = lambda: False) -> int:
    """Steps until nothing is left to do, or `until`; the tokens that came."""
    came = 0
    while engine.has_work and not until():
        for request, deltas in engine.step().items():
            added = [token for delta in deltas for token in delta.token_ids]
            tokens[int(request)] += added
            came += len(added)
    return came


def test_steps_go_on_while_experts_are_read_and_ranks_switch_when_all_have_theirs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint.parent
    with started(monkeypatch, planted_ranks.rank_that_reads_when_told, str(checkpoint)) as llm:
        engine, experts = llm._engine, llm._engine.experts
        tokens: list[list[int]] = [[] for _ in PROMPTS]
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(str(number), prompt, GREEDY)
        collect(engine, tokens, lambda: len(tokens[0]) >= 3)
        before = dict(experts.load().placements)
        answers: list[object] = []
        experts.begin(answers.append)
        collect(engine, tokens, (folder / "reads-1").exists)
        assert collect(engine, tokens, lambda: len(tokens[0]) >= 16) > 3 * 8, "steps waited for the reading"
        assert experts.load().placements == before and not answers
        (folder / "go").touch()
        collect(engine, tokens)
        while not answers:  # what the last step left to do
            experts.tick()
        [changed] = answers
        after = experts.load().placements
        assert changed and changed == [layer for layer in before if before[layer] != after[layer]]
        moved_again = [output.token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
        llm.rebalance_experts()
    assert tokens == moved_again == expected_tokens(checkpoint)
    for rank in (0, 1):
        assert (folder / f"opened-{rank}").read_text() == "xx"  # to load, and for all moves together


def test_a_rank_that_cannot_read_leaves_the_layer_as_it_was_on_all(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = checkpoint.parent / "broken"
    broken.touch()
    expected = expected_tokens(checkpoint)
    with started(monkeypatch, planted_ranks.rank_that_cannot_read, str(checkpoint)) as llm:
        before = llm.expert_load().placements
        assert [o.token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == expected
        with pytest.raises(CheckpointError, match=r"experts of layer \d could not be moved: .*planted"):
            llm.rebalance_experts()
        assert llm.expert_load().placements == before
        assert [o.token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == expected
        broken.unlink()
        assert llm.rebalance_experts()
        assert [o.token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == expected


def test_an_engine_that_is_shut_down_while_ranks_read_leaves_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = started(monkeypatch, planted_ranks.rank_that_reads_when_told, str(checkpoint))
    tokens: list[list[int]] = [[]]
    llm._engine.add_request("0", PROMPTS[0], GREEDY)
    collect(llm._engine, tokens, lambda: len(tokens[0]) >= 3)
    llm._engine.experts.begin(lambda answer: None)
    collect(llm._engine, tokens, (checkpoint.parent / "reads-1").exists)
    assert llm._engine.has_work
    llm.shutdown()
    assert all((checkpoint.parent / f"ended-{rank}").exists() for rank in (0, 1)), "ranks had to be killed"


def test_a_rank_that_fails_to_switch_ends_the_engine_rather_than_route_differently(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(monkeypatch, planted_ranks.rank_that_fails_to_switch, str(checkpoint)) as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        with pytest.raises(EngineDeadError, match="planted"):
            llm.rebalance_experts()
        with pytest.raises(EngineDeadError):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)


def test_ranks_load_what_the_engine_found_and_do_not_look_for_it_again(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = tmp_path / "hub"
    repository = hub / "models--org--name"
    shutil.copytree(checkpoint, repository / "snapshots" / ("a" * 40))
    write_checkpoint(repository / "snapshots" / ("b" * 40), moe=True, seed=1, num_experts=10)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load = tmp_path / "load.json"
    tokens = {layer: [1000, *range(1, 10)] for layer in ("0", "2", "3")}
    load.write_text(json.dumps({"tokens": tokens}))
    monkeypatch.setitem(SETTINGS, "expert_load", str(load))
    with started(monkeypatch, planted_ranks.rank_on_a_disk_of_its_own, "org/name") as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert llm.rebalance_experts()
        again = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in again] == expected_tokens(checkpoint)
    assert (hub / "asked-0").read_text() == (hub / "asked-1").read_text() == "x"
