"""Sampling against its distribution, and its independence of the batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from qwen3_dist.ops.choose import choose_ops
from qwen3_dist.protocol.step_plan import SampleSpec
from qwen3_dist.worker.sampling.sampler import SampledLogprobs, sample, uniform

LOGITS = torch.log(torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1]))
DRAWS = 20_000
OPS = choose_ops(torch.device("cpu"), torch.float32)


def spec(position: int = 0, **changes: object) -> SampleSpec:
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1, "position": position, "logprobs": None}
    return SampleSpec(**{**values, **changes})  # type: ignore[arg-type]


def shares(**changes: object) -> dict[int, float]:
    specs = [spec(position, **changes) for position in range(DRAWS)]
    tokens = sample(LOGITS.expand(DRAWS, -1), specs, OPS)
    return {token: count / DRAWS for token, count in Counter(tokens.tolist()).items()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0: 0.4, 1: 0.05, 2: 0.3, 3: 0.15, 4: 0.1}),
        ({"top_k": 2}, {0: 4 / 7, 2: 3 / 7}),
        ({"top_k": -1}, {0: 0.4, 1: 0.05, 2: 0.3, 3: 0.15, 4: 0.1}),
        ({"top_p": 0.69}, {0: 4 / 7, 2: 3 / 7}),
        ({"top_p": 0.71}, {0: 0.4 / 0.85, 2: 0.3 / 0.85, 3: 0.15 / 0.85}),
        ({"top_k": 5}, {0: 0.4, 1: 0.05, 2: 0.3, 3: 0.15, 4: 0.1}),
        ({"top_p": 1e-9}, {0: 1.0}),
        ({"top_k": 3, "top_p": 0.8}, {0: 4 / 7, 2: 3 / 7}),  # p counts what k kept: 0.7 / 0.85 > 0.8
        (
            {"temperature": 0.5},
            {0: 0.16 / 0.285, 1: 0.0025 / 0.285, 2: 0.09 / 0.285, 3: 0.0225 / 0.285, 4: 0.01 / 0.285},
        ),
        ({"temperature": 0.0}, {0: 1.0}),
        ({"temperature": 1e-6}, {0: 1.0}),
        ({"temperature": 1e-231}, {0: 1.0}),  # none at all in fp32
        ({"temperature": 1e-231, "top_k": 3, "top_p": 0.3}, {0: 1.0}),
    ],
)
def test_tokens_are_drawn_in_proportion(changes: dict[str, object], expected: dict[int, float]) -> None:
    drawn = shares(**changes)
    assert set(drawn) <= set(expected)
    chi_square = sum((drawn.get(t, 0) - share) ** 2 / share for t, share in expected.items()) * DRAWS
    assert chi_square < 25  # the seeds are fixed; 4 degrees of freedom pass this with p < 1e-4


def test_a_draw_depends_on_seed_and_position_and_not_on_its_neighbours() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    limits = [{"top_p": 0.9}, {"top_k": 3}, {}, {"top_k": 40, "top_p": 0.5}, {"top_k": 2}, {"top_p": 0.2}]
    specs = [spec(position=i, seed=i % 2, **limits[i]) for i in range(6)]
    together = sample(logits, specs, OPS).tolist()
    alone = [sample(logits[i : i + 1], [specs[i]], OPS).item() for i in range(6)]
    mixed = sample(logits.flip(0), [spec(temperature=0.0), *specs[::-1][1:]], OPS).tolist()
    assert together == alone
    assert mixed[1:] == together[::-1][1:]


@pytest.mark.parametrize("limits", [{"top_k": 7}, {"top_k": 7, "top_p": 0.6}, {"top_p": 0.9}, {"top_p": 0.1}])
@pytest.mark.parametrize("vocab_size", [50, 300, 4096])
def test_selecting_the_likeliest_draws_what_sorting_all_draws(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, object], vocab_size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, vocab_size, generator=generator).mul(4).round()  # many ties
    specs = [spec(position=i, **limits) for i in range(500)]
    selected = sample(logits, specs, OPS)
    monkeypatch.setattr("qwen3_dist.worker.sampling.sampler.MOST_SELECTED", 1)
    monkeypatch.setattr("qwen3_dist.ops.torch_draws.MOST_SELECTED", 1)
    assert torch.equal(selected, sample(logits, specs, OPS))


def test_uniform_numbers_are_spread_evenly_and_differ_by_seed() -> None:
    numbers = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert len(set(numbers)) == len(numbers)
    tenths = Counter(int(number * 10) for number in numbers)
    assert set(tenths) == set(range(10)) and max(tenths.values()) - min(tenths.values()) < 200
    assert uniform(-1, 0) != uniform(1, 0)


def test_logprobs_are_those_of_the_raw_logits_likeliest_first() -> None:
    specs = [spec(logprobs=2), spec(), spec(logprobs=0)]
    sampled = SampledLogprobs(LOGITS.expand(3, -1), torch.tensor([0, 3, 4]), specs, OPS)
    with_top, absent, with_none = sampled.on_host()
    assert with_top is not None and with_none is not None and absent is None
    assert with_top.token_id == 0 and with_top.logprob == pytest.approx(float(LOGITS[0]), abs=1e-5)
    assert [token for token, _ in with_top.top] == [0, 2]
    assert [value for _, value in with_top.top] == pytest.approx(LOGITS[[0, 2]].tolist(), abs=1e-5)
    assert with_none.token_id == 4 and with_none.top == ()
    assert with_none.logprob == pytest.approx(float(LOGITS[4]), abs=1e-5)
