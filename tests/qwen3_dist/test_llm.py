"""Offline generation with the bundled checkpoint: what results hold, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.errors import RequestError
from qwen3_dist.protocol.outputs import CompletionOutput
from qwen3_dist.weights.source import bundled_path

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
STORY = (
    "<|im_start|>user\nTell me a story about a fox.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", use_tqdm=False, num_blocks=512) as model:
        yield model


def test_results_keep_the_order_of_prompts_given_as_text_or_ids(llm: LLM) -> None:
    prompts = ["The sea", [40, 41, 42], "A small dog"]
    together = llm.generate(prompts, GREEDY, use_tqdm=False)
    alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert [output.prompt for output in together] == ["The sea", None, "A small dog"]
    assert together[1].prompt_token_ids == [40, 41, 42]
    assert all(output.finish_reason == "length" and output.text for output in together)


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate(STORY, GREEDY, use_tqdm=False)[0]
    assert whole.text is not None
    stop = whole.text[10:14]
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, stop=(stop,))
    stopped = llm.generate(STORY, params, use_tqdm=False)[0]
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < 24


def test_choices_of_one_request_differ_and_repeat_with_their_seed(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=11, temperature=1.5, max_tokens=12)
    first, second = (llm.generate(STORY, params, use_tqdm=False)[0] for _ in range(2))
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in second.outputs]
    assert len({tuple(c.token_ids) for c in first.outputs}) == 3


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (2, 5)]
    outputs = llm.generate(["One", "Two"], params, use_tqdm=False)
    assert [len(output.token_ids) for output in outputs] == [2, 5]
    with pytest.raises(RequestError, match="2 sampling params for 1 prompts"):
        llm.generate(["One"], params, use_tqdm=False)


def test_logprobs_come_with_the_alternatives_asked_for(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, temperature=0, logprobs=2, ignore_eos=True)
    output = llm.generate("The sea", params, use_tqdm=False)[0]
    assert output.logprobs is not None
    for token_id, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert entry.token_id == token_id == entry.top[0][0]
        assert entry.logprob == entry.top[0][1] >= entry.top[1][1]
    assert llm.generate("The sea", GREEDY, use_tqdm=False)[0].logprobs is None


def test_chat_goes_through_the_template(llm: LLM) -> None:
    output = llm.chat([{"role": "user", "content": "Hi"}], GREEDY, use_tqdm=False)[0]
    assert output.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "the prompt is empty"),
        ([4096], "token id 4096 is outside the vocabulary of 4096"),
        ([1] * 4096, "the prompt has 4096 tokens and the context holds 4096"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_and_the_others_are_not_begun(
    llm: LLM, prompt: list[int], sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence):
        llm.generate([[1, 2], prompt], GREEDY, use_tqdm=False)
    stats = llm._engine.stats()
    assert stats.num_waiting == stats.num_running == 0
    assert llm.generate([[1, 2]], GREEDY, use_tqdm=False)[0].finish_reason == "length"


def test_preemption_changes_no_token() -> None:
    prompts = [[i + 1] * 30 for i in range(6)]
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    with LLM(dtype="float32", use_tqdm=False, num_blocks=512) as roomy:
        expected = [output.token_ids for output in roomy.generate(prompts, params, use_tqdm=False)]
    limits = {"num_blocks": 14, "max_num_batched_tokens": 32, "max_num_seqs": 6}
    with LLM(dtype="float32", use_tqdm=False, **limits) as tight:
        outputs = tight.generate(prompts, params, use_tqdm=False)
        assert tight._engine.stats().preemptions > 0
        tight._engine.check_integrity()
    assert [output.token_ids for output in outputs] == expected


def test_every_end_that_a_file_states_ends_a_generation(tmp_path: Path) -> None:
    shutil.copytree(bundled_path(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4070, 999999]}')
    greedy = SamplingParams(temperature=0, max_tokens=60)
    with LLM(str(tmp_path), use_tqdm=False, num_blocks=512, dtype="float32") as llm:
        ends = {4070, llm._engine.tokenizer.token_id("<|im_end|>")}  # type: ignore[union-attr]

        def chat(params: SamplingParams) -> CompletionOutput:
            hello = [{"role": "user", "content": "Hello!"}]
            return llm.chat(hello, params, use_tqdm=False, enable_thinking=False)[0].outputs[0]

        short = chat(greedy)
        assert short.finish_reason == "stop" and set(short.token_ids) & ends == {short.token_ids[-1]}
        longer = chat(replace(greedy, min_tokens=len(short.token_ids) + 5))
        assert not ends & set(longer.token_ids[: len(short.token_ids) + 5])
        assert chat(replace(greedy, ignore_eos=True)).finish_reason == "length"


def test_without_params_the_checkpoint_recommends_them(tmp_path: Path) -> None:
    shutil.copytree(bundled_path(), tmp_path, dirs_exist_ok=True)
    defaults = {"do_sample": True, "temperature": 0.0, "eos_token_id": []}
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    with LLM(str(tmp_path), use_tqdm=False, num_blocks=512, dtype="float32") as llm:
        greedy = llm.generate("The sea", SamplingParams(temperature=0), use_tqdm=False)[0]
        assert llm.generate("The sea", use_tqdm=False)[0].token_ids == greedy.token_ids
