"""Sequences that ask for more than temperature, top-k and top-p: against a slow reference, on every kind of rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.errors import RequestError
from qwen3_dist.model.reference import load_reference
from qwen3_dist.ops.choose import choose_ops
from qwen3_dist.protocol.step_plan import SampleSpec, SequenceStep
from qwen3_dist.worker.sampling.penalties import Penalties
from qwen3_dist.worker.sampling.sampler_state import SamplingState
from tests.checkpoints import TIGHT, write_checkpoint
from tests.setups import setup

LENGTH = 12
OPS = choose_ops(torch.device("cpu"), torch.float32)
# A repeating prompt, so that its tokens are likely ones.
PROMPTS = [[5, 6, 7, 8] * 3, [9, 11] * 5, list(range(100, 120)), [3]]
GREEDY = SamplingParams(max_tokens=LENGTH, temperature=0, ignore_eos=True)
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition": {"repetition_penalty": 1.7},
    "rewarded": {"repetition_penalty": 0.6, "presence_penalty": -0.3},
    "presence": {"presence_penalty": 0.4},
    "frequency": {"frequency_penalty": 0.2},
    "bias": {"logit_bias": {17: 2.5, 40: -3, 41: 1.25}},
    "all": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "logit_bias": {17: 1.5},
        "min_tokens": 5,
        "stop_token_ids": (17, 33),
    },
}
pytestmark = pytest.mark.usefixtures("nursery")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe"), moe=True, mlp_only_layers=[1])


def asked(name: str, **more: Any) -> SamplingParams:
    return replace(GREEDY, **ASKED[name], **more)


def adjusted(
    logits: list[float], prompt: list[int], output: list[int], params: SamplingParams
) -> list[float]:
    """What vLLM and OpenAI document, a token at a time."""
    logits = list(logits)
    for token, bias in params.logit_bias:
        logits[token] += bias
    for token in params.stop_token_ids:
        if len(output) < params.min_tokens:
            logits[token] = -float("inf")
    for token in {*prompt, *output}:
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token, count in Counter(output).items():
        logits[token] -= params.presence_penalty + params.frequency_penalty * count
    return logits


def slow_tokens(checkpoint: Path, prompt: list[int], params: SamplingParams) -> list[int]:
    model = load_reference(checkpoint, torch.float32)
    output: list[int] = []
    while len(output) < LENGTH and not (output and output[-1] in params.stop_token_ids):
        logits = model(torch.tensor([*prompt, *output]))[-1].tolist()
        scores = adjusted(logits, prompt, output, params)
        output.append(scores.index(max(scores)))
    return output


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, list[list[int]]]:
    with torch.inference_mode():
        return {name: [slow_tokens(checkpoint, p, asked(name)) for p in PROMPTS] for name in ASKED}


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("tp=1", {}),
        ("tp=2,ep=2", {}),
        ("tp=2,ep=2", {"overlap": False}),
        ("pp=2", {}),
        ("dp=2,ep=2", {"num_blocks": 17}),
    ],
)
def test_every_layout_gives_the_tokens_of_a_slow_reference_in_mixed_and_preempted_batches(
    checkpoint: Path, expected: dict[str, list[list[int]]], layout: str, settings: dict[str, Any]
) -> None:
    jobs = [(name, index) for index in range(len(PROMPTS)) for name in ASKED]
    executor = "in_process" if layout == "tp=1" else "processes"
    with LLM(str(checkpoint), layout=layout, executor=executor, **{**TIGHT, **settings}) as llm:
        outputs = llm.generate([PROMPTS[i] for _, i in jobs], [asked(name) for name, _ in jobs])
        assert llm._engine.stats().preemptions > 0
    for (name, index), output in zip(jobs, outputs, strict=True):
        assert output.token_ids == expected[name][index], (name, index)


def test_the_features_change_what_is_said(expected: dict[str, list[list[int]]]) -> None:
    for name in ASKED:
        assert name == "plain" or expected[name] != expected["plain"], name


def test_seeded_draws_are_those_without_neighbours(checkpoint: Path) -> None:
    drawn = [
        asked(name, temperature=0.9, top_p=0.9, min_p=0.02, seed=seed) if name != "plain" else asked(name)
        for seed, name in enumerate(ASKED)
    ]
    drawn = [replace(params, temperature=0.9, seed=3) for params in drawn]
    prompts = [PROMPTS[0]] * len(drawn)
    with LLM(str(checkpoint), num_blocks=200, use_tqdm=False) as llm:
        alone = [llm.generate(PROMPTS[0], params)[0].token_ids for params in drawn]
        together = [output.token_ids for output in llm.generate(prompts, drawn)]
    with LLM(str(checkpoint), layout="tp=2,ep=2", executor="processes", **TIGHT) as llm:
        sharded = [output.token_ids for output in llm.generate(prompts, drawn)]
    assert alone == together == sharded


def sampled(logits: Tensor, position: int = 0, temperature: float = 0.0, **changes: Any) -> list[int]:
    """What sequences with this setup get from rows of logits [L, V], each drawn at a position of its own."""
    state = SamplingState(logits.shape[1], logits.device, lambda _: pytest.fail("no grammar here"), OPS)
    steps = [
        SequenceStep(
            row, row, (1,), 0, (0,), SampleSpec(temperature, 1.0, 0, 1, row, None), setup=setup(**changes)
        )
        for row in range(len(logits))
    ]
    state.admit(steps)
    return state.sample(logits, steps).tokens.tolist()


def test_penalties_are_the_hand_worked_ones() -> None:
    penalties = Penalties(5, torch.device("cpu"))
    place = penalties.open(prompt=[0, 3, 3], output=[1, 1, 3])
    asked = setup(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    logits = torch.tensor([[4.0, 2.0, 1.0, -1.0, -2.0]])

    def penalised(logits: Tensor) -> list[list[float]]:
        changed = logits.clone()
        penalties.apply(changed, [0], [place], [asked])
        return changed.tolist()

    # 0: in the prompt alone, 4 / 2. 1: twice in the output, 2 / 2 - 0.5 - 2 * 0.25.
    # 3: once there, -1 * 2 - 0.5 - 0.25.
    hand_worked = [[2.0, 0.0, 1.0, -2.75, -2.0]]
    assert penalised(logits) == hand_worked
    penalties.add([place], torch.tensor([4]))  # -2 * 2 - 0.5 - 0.25
    hand_worked[0][4] = -4.75
    assert penalised(logits) == hand_worked


def test_a_place_is_blank_for_the_sequence_that_gets_it_next() -> None:
    penalties = Penalties(5, torch.device("cpu"))
    place = penalties.open([1, 2, 3], [4, 4])
    penalties.close(place)
    assert penalties.open([0], []) == place
    logits = torch.ones(1, 5)
    asked = setup(repetition_penalty=2.0, presence_penalty=1.0)
    penalties.apply(logits, [0], [place], [asked])
    assert logits.tolist() == [[0.5, 1, 1, 1, 1]]


@pytest.mark.parametrize("penalty", [5e-324, 1e-30, 10.0])
def test_no_penalty_makes_a_logit_that_is_no_number(penalty: float) -> None:
    penalties = Penalties(3, torch.device("cpu"))
    place = penalties.open([0, 1, 2], [])
    logits = torch.tensor([[30.0, -30.0, 0.0]])
    penalties.apply(logits, [0], [place], [setup(repetition_penalty=penalty)])
    assert torch.isfinite(logits).all()


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest() -> None:
    draws = 20_000
    logits = torch.log(torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1])).expand(draws, -1)
    shares = Counter(sampled(logits, temperature=1.0, min_p=0.3))
    expected = {0: 0.4 / 0.85, 2: 0.3 / 0.85, 3: 0.15 / 0.85}  # 0.1 < 0.3 * 0.4
    assert set(shares) == set(expected)
    chi_square = sum((shares[t] / draws - share) ** 2 / share for t, share in expected.items()) * draws
    assert chi_square < 18  # the seeds are fixed; 2 degrees of freedom pass this with p < 2e-4
    # At temperature 0.5 the shares are 0.16, 0.0025, 0.09, 0.0225, 0.01, of which 0.09 alone reaches 0.3 * 0.16.
    assert set(sampled(logits, temperature=0.5, min_p=0.3)) == {0, 2}


def test_bad_words_of_several_tokens_are_forbidden_where_they_would_be_complete() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    words = ((2,), (3, 3, 1))
    assert sampled(logits, bad_words=words) == [1]
    assert sampled(logits, bad_words=((1,), (2,))) == [3]
    assert sampled(logits, bad_words=words, output=(3, 3)) == [3]
    assert sampled(logits, bad_words=words, output=(0, 3)) == [1]


def test_a_slot_that_a_plain_sequence_takes_over_is_plain() -> None:
    logits = torch.tensor([[0.0, 3.0]])
    state = SamplingState(2, logits.device, lambda _: pytest.fail("no grammar here"), OPS)
    spec = SampleSpec(0.0, 1.0, 0, 1, 0, None)
    first = SequenceStep(1, 0, (1,), 0, (0,), spec, setup=setup(logit_bias=((0, 9.0),)))
    state.admit([first])
    assert state.sample(logits, [first._replace(setup=None)]).tokens.tolist() == [0]
    assert state.sample(logits, [first._replace(seq_id=2, setup=None)]).tokens.tolist() == [1]


def test_bad_words_and_min_tokens_through_the_tokenizer() -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    params = SamplingParams(max_tokens=30, temperature=0)
    for layout, executor in (("tp=1", "in_process"), ("tp=2,ep=2", "processes")):
        with LLM(layout=layout, executor=executor, num_blocks=64, use_tqdm=False) as llm:
            plain = llm.chat(messages, params, enable_thinking=False)[0]
            word = plain.text.split()[1]  # type: ignore[union-attr]
            without = llm.chat(messages, replace(params, bad_words=(word,)), enable_thinking=False)[0]
            longer = llm.chat(messages, replace(params, min_tokens=25), enable_thinking=False)[0]
        assert word not in without.text and without.text  # type: ignore[operator]
        assert plain.finish_reason == "stop" and len(plain.token_ids) < 25 <= len(longer.token_ids)


def test_asked_for_tokens_have_their_log_probabilities_beside_the_likeliest(checkpoint: Path) -> None:
    params = replace(GREEDY, max_tokens=3, logprob_token_ids=(7, 150), logit_bias={7: 1.0})
    with LLM(str(checkpoint), num_blocks=32, use_tqdm=False) as llm:
        (output,) = llm.generate(PROMPTS[0], params)
    with torch.inference_mode():
        model = load_reference(checkpoint, torch.float32)
        logits = model(torch.tensor([*PROMPTS[0], *output.token_ids]))[len(PROMPTS[0]) - 1 :]
    assert output.logprobs is not None and len(output.logprobs) == 3
    for found, row in zip(output.logprobs, logits.log_softmax(dim=-1), strict=False):
        assert dict(found.top) == pytest.approx({t: float(row[t]) for t in (7, 150)}, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"logit_bias": {10**6: 1.0}}, "logit_bias"),
        ({"logprob_token_ids": (10**6,)}, "logprob_token_ids"),
        ({"stop_token_ids": (10**6,)}, "stop_token_ids"),
        ({"bad_words": ("x",)}, "bad_words"),
    ],
)
def test_what_the_model_lacks_is_refused(checkpoint: Path, changes: dict[str, Any], param: str) -> None:
    with LLM(str(checkpoint), num_blocks=32, use_tqdm=False) as llm:
        with pytest.raises(RequestError) as error:
            llm.generate(PROMPTS[0], replace(GREEDY, **changes))
        assert error.value.param == param
        assert llm.generate(PROMPTS[0], GREEDY)
