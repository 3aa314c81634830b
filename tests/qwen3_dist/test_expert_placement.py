"""Where experts and their copies go, and that moving them while a model runs changes no token."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.errors import ConfigError
from qwen3_dist.expert_placement import ExpertPlacement
from qwen3_dist.model.reference import ReferenceModel, load_reference
from tests.checkpoints import write_checkpoint

PROMPTS = [list(range(3, 40)), [7, 1, 150, 198, 0], [42], list(range(100, 120))]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
pytestmark = pytest.mark.usefixtures("nursery")


def test_uneven_experts_are_placed_in_runs_that_differ_by_one() -> None:
    placement = ExpertPlacement.even(10, 4)
    assert placement.hosted == ((0, 1), (2, 3, 4), (5, 6), (7, 8, 9))
    assert placement.owners == [[0, 0, 1, 1, 1, 2, 2, 3, 3, 3]]
    assert placement.places == [[0, 1, 0, 1, 2, 0, 1, 0, 1, 2]]
    assert placement.places_on(1) == [[-1, -1, 0, 1, 2, -1, -1, -1, -1, -1]]


def test_the_hottest_expert_gets_the_copy_and_rows_take_its_copies_in_turn() -> None:
    placement = ExpertPlacement.balanced([8, 1, 4, 3], ep=2, redundant=1)
    # Shares are 4 + 4, 1, 4 and 3: 4 + 4 on rank 0, 4 + 3 + 1 on rank 1. Rank 0 has room for two.
    assert placement.hosted == ((0, 2), (0, 1, 3))
    assert placement.owners == [[0, 1, 0, 1], [1, 1, 0, 1]]
    assert placement.places == [[0, 1, 1, 2], [0, 1, 1, 2]]
    assert placement.imbalance([8, 1, 4, 3]) == 1.0
    assert ExpertPlacement.even(4, 2).imbalance([8, 1, 4, 3]) == 9 / 8


@settings(max_examples=300, deadline=None)
@given(loads=st.lists(st.integers(0, 1000), min_size=1, max_size=24), ep=st.integers(1, 6), data=st.data())
def test_every_expert_is_placed_and_no_rank_has_one_twice(
    loads: list[float], ep: int, data: st.DataObject
) -> None:
    ep = min(ep, len(loads))
    redundant = data.draw(st.integers(0, len(loads) * (ep - 1)))
    placement = ExpertPlacement.balanced(loads, ep, redundant)
    copies = Counter(expert for experts in placement.hosted for expert in experts)
    assert set(copies) == set(range(len(loads))) and copies.total() == len(loads) + redundant
    assert all(len(set(experts)) == len(experts) for experts in placement.hosted)
    assert max(map(len, placement.hosted)) - min(map(len, placement.hosted)) <= 1
    for owners, places in zip(placement.owners, placement.places, strict=True):
        for expert, (owner, place) in enumerate(zip(owners, places, strict=True)):
            assert placement.hosted[owner][place] == expert
    for expert, count in copies.items():
        taken = Counter(owners[expert] for owners in placement.owners)
        assert len(taken) == count
        if count <= 6:
            assert len(set(taken.values())) == 1  # evenly

    other = ExpertPlacement.even(len(loads), ep, redundant)
    kept = placement.keeping_places_of(other)
    assert [set(experts) for experts in kept.hosted] == [set(experts) for experts in placement.hosted]
    for before, after in zip(other.hosted, kept.hosted, strict=True):
        stayed = set(before) & set(after)
        assert all(before[place] == after[place] for place in range(len(after)) if before[place] in stayed)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe"), moe=True, mlp_only_layers=[1], num_experts=10)


def routed(reference: ReferenceModel, sequences: list[list[int]]) -> dict[int, list[int]]:
    """How many tokens of these sequences each expert of each MoE layer gets, by hooks on the oracle's routers."""
    counts: dict[int, list[int]] = {}

    def count(layer: int) -> None:
        gate = reference.blocks[layer].ff.gate  # type: ignore[union-attr]

        def hook(module: object, given: object, logits: torch.Tensor) -> None:
            chosen = logits.topk(2, dim=-1).indices.flatten()
            totals = counts.setdefault(layer, [0] * 10)
            for expert in chosen.tolist():
                totals[expert] += 1

        gate.register_forward_hook(hook)  # type: ignore[union-attr, operator]

    for layer in (0, 2, 3):
        count(layer)
    for sequence in sequences:
        reference(torch.tensor(sequence))
    return counts


@pytest.mark.parametrize(
    ("layout", "dispatch"),
    [
        ("tp=1", "auto"),
        ("tp=2,ep=2", "all_gather"),
        ("tp=2,ep=2", "all_to_all"),
        ("dp=2,ep=2", "all_gather"),
        ("dp=2", "all_to_all"),
        ("tp=2,dp=2,ep=2", "all_gather"),
        ("pp=2,tp=2,ep=2", "all_to_all"),
    ],
)
def test_each_token_is_counted_once_for_each_expert_it_chose(
    checkpoint: Path, layout: str, dispatch: str
) -> None:
    with LLM(
        str(checkpoint),
        layout=layout,
        moe_dispatch=dispatch,
        executor="in_process" if layout == "tp=1" else "processes",
        prefix_caching=False,
        use_tqdm=False,
    ) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        load = llm.expert_load()
    # The last token of a sequence is sampled and never computed.
    sequences = [o.prompt_token_ids + o.token_ids[:-1] for o in outputs]
    assert {layer: list(tokens) for layer, tokens in load.tokens.items()} == routed(
        load_reference(checkpoint), sequences
    )


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("tp=2,ep=2", {"moe_dispatch": "all_gather"}),
        ("tp=2,ep=2", {"moe_dispatch": "all_to_all", "quantize": "int8"}),
        ("dp=2,ep=2", {"moe_dispatch": "all_to_all"}),
        ("tp=4,ep=2", {"moe_dispatch": "all_gather"}),
        ("tp=2,dp=2,ep=4", {"moe_dispatch": "all_to_all"}),
    ],
)
def test_copies_and_moves_in_mid_generation_change_no_token(
    checkpoint: Path, layout: str, settings: dict[str, str]
) -> None:
    common = {"layout": layout, "executor": "processes", "use_tqdm": False, **settings}
    with LLM(str(checkpoint), **common) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
        load = llm.expert_load()
    with LLM(str(checkpoint), redundant_experts=3, **common) as llm:
        engine = llm._engine
        tokens: dict[str, list[int]] = {}
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(str(number), prompt, GREEDY)
        moved, steps = [], 0
        while engine.has_work:
            for request, deltas in engine.step().items():
                tokens.setdefault(request, []).extend(t for delta in deltas for t in delta.token_ids)
            steps += 1
            if steps in (3, 7):
                moved += llm.rebalance_experts()
        after = llm.expert_load()
        again = [output.token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    assert moved, "no layer was worth moving, so nothing was tested"
    assert [tokens[str(number)] for number in range(len(PROMPTS))] == expected
    assert again == expected
    assert after.tokens == load.tokens  # moved experts take their counts along
    assert all(sum(map(len, placement.hosted)) == 13 for placement in after.placements.values())


def test_a_model_is_loaded_with_the_placement_that_a_load_asks_for(checkpoint: Path, tmp_path: Path) -> None:
    common = {"layout": "tp=2,ep=2", "executor": "processes", "use_tqdm": False}
    with LLM(str(checkpoint), **common) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
        load = llm.expert_load()
    saved = tmp_path / "load.json"
    saved.write_text(json.dumps(load.to_json()))
    with LLM(str(checkpoint), redundant_experts=3, expert_load=str(saved), **common) as llm:
        assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == expected
        placed = llm.expert_load()
    assert sum(placed.imbalance.values()) < sum(load.imbalance.values())


def test_experts_move_by_themselves_where_the_settings_say_so(checkpoint: Path) -> None:
    reference = load_reference(checkpoint)
    expected = [reference.generate_greedy(prompt, 12) for prompt in PROMPTS]
    with LLM(
        str(checkpoint),
        layout="tp=2,ep=2",
        executor="processes",
        redundant_experts=3,
        rebalance_experts_s=0.01,
        use_tqdm=False,
    ) as llm:
        before = llm.expert_load().placements
        for _ in range(100):  # experts move while steps run, as soon as their weights have been read
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            assert [output.token_ids for output in outputs] == expected
            if llm.expert_load().placements != before:
                break
        else:
            raise AssertionError("no expert has moved")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"redundant_experts": 11}, "redundant_experts=11 is more than 10"),
        ({"redundant_experts": -1}, "redundant_experts must be 0 or more"),
        ({"expert_load": "nowhere.json"}, "expert_load=nowhere.json does not exist"),
        ({"dispatch_dtype": "int4"}, "dispatch_dtype must be one of auto, fp8"),
    ],
)
def test_wrong_settings_are_refused(checkpoint: Path, settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LLM(str(checkpoint), layout="tp=2,ep=2", executor="processes", use_tqdm=False, **settings)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"tokens": {"0": [1, 2]}}', '{"tokens": 3}', '{"tokens": {"a": []}}']
)
def test_a_file_that_is_no_load_of_this_model_is_refused(checkpoint: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "load.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="expert_load="):
        LLM(str(checkpoint), expert_load=str(file), use_tqdm=False)
