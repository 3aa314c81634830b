"""The form of generated text: grammars, thinking before them, and its budget, on real ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.engine.request_setup import make_setup
from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.weights.source import resolve_model
from qwen3_dist.worker.sampling.grammar_matcher import Grammars
from qwen3_dist.worker.sampling.output_constraint import OutputConstraint

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TIGHT: dict[str, Any] = {
    "num_blocks": 24,
    "block_size": 4,
    "max_num_batched_tokens": 16,
    "max_num_seqs": 6,
    "use_tqdm": False,
}
ASK = [{"role": "user", "content": "What is 47 + 38?"}]
pytestmark = pytest.mark.usefixtures("nursery")


@pytest.fixture(scope="module", params=["tp=1", "tp=2,ep=2", "dp=2,ep=2"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    executor = "in_process" if request.param == "tp=1" else "processes"
    with LLM(layout=request.param, executor=executor, num_blocks=128, use_tqdm=False) as llm:
        yield llm


def formed(seed: int = 0, **form: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=120, temperature=1.0, seed=seed, structured_outputs=StructuredOutputs(**form)
    )


def test_every_answer_has_the_form_that_was_asked_for_beside_free_ones(llm: LLM) -> None:
    free = SamplingParams(max_tokens=30, temperature=1.0, seed=1)
    params = [
        *(formed(seed, json=PERSON) for seed in range(4)),
        formed(regex=r"[a-f]{4}-\d{2}"),
        formed(choice=("red", "green", "blue")),
        formed(grammar='start: "<" /[a-z]{1,5}/ ">"'),
        free,
    ]
    outputs = llm.generate(["Say something:"] * len(params), params)
    *people, expression, choice, tag, _ = (output.text or "" for output in outputs)
    for text in people:
        Draft202012Validator(PERSON).validate(json.loads(text))
    assert re.fullmatch(r"[a-f]{4}-\d{2}", expression)
    assert choice in ("red", "green", "blue")
    assert re.fullmatch(r"<[a-z]{1,5}>", tag)
    assert all(output.finish_reason == "stop" for output in outputs[:-1])
    assert outputs[-1].token_ids == llm.generate("Say something:", free)[0].token_ids


def test_a_form_holds_for_what_follows_thinking(llm: LLM) -> None:
    params = formed(json=PERSON)
    thought = SamplingParams(
        **{**vars(params), "reasoning": "optional", "max_tokens": 400, "temperature": 0.0}
    )
    text = llm.chat(ASK, thought)[0].text or ""
    thinking, end, rest = text.partition("</think>")
    assert thinking.startswith("<think>") and end and "47" in thinking
    Draft202012Validator(PERSON).validate(json.loads(rest))


def test_a_form_may_begin_at_once_where_thinking_is_optional(llm: LLM) -> None:
    params = SamplingParams(
        **{
            **vars(formed(choice=("yes", "no"))),
            "reasoning": "optional",
            "logit_bias": {think("<think>"): -100},
        }
    )
    assert llm.chat(ASK, params)[0].text in ("yes", "no")


@pytest.mark.parametrize("budget", [0, 5])
def test_thinking_ends_with_its_budget(llm: LLM, budget: int) -> None:
    params = SamplingParams(max_tokens=200, temperature=0, reasoning="optional", thinking_token_budget=budget)
    ids = llm.chat(ASK, params)[0].token_ids
    assert ids[0] == think("<think>") and ids.index(think("</think>")) == 1 + budget
    unlimited = SamplingParams(max_tokens=200, temperature=0, reasoning="optional")
    assert llm.chat(ASK, unlimited)[0].token_ids[: 1 + budget] == ids[: 1 + budget]


def test_a_form_is_followed_again_after_preemption() -> None:
    params = [formed(seed, json=PERSON) for seed in range(6)]
    prompts = [f"{i}:" for i in range(6)]
    with LLM(dtype="float32", num_blocks=128, use_tqdm=False) as roomy:
        expected = [output.token_ids for output in roomy.generate(prompts, params)]
    with LLM(dtype="float32", **TIGHT) as tight:
        assert [output.token_ids for output in tight.generate(prompts, params)] == expected
        assert tight._engine.stats().preemptions > 0


def test_ignoring_eos_does_not_write_beyond_a_form(llm: LLM) -> None:
    params = SamplingParams(**{**vars(formed(choice=("red",))), "ignore_eos": True})
    assert llm.generate("A colour:", params)[0].text == "red"


def test_a_form_that_cannot_be_followed_to_its_end_ends_its_own_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever passes the trial and fails on the rank: here a grammar that was never tried."""
    monkeypatch.setattr("qwen3_dist.engine.request_setup.compile_grammar", lambda _: "start: nowhere")
    with LLM(num_blocks=64, use_tqdm=False) as llm:
        with pytest.raises(RequestError):
            llm.generate(["Hello!", "Hi"], [formed(regex="a"), SamplingParams(max_tokens=5)])
        assert len(llm.generate("Hello!", SamplingParams(max_tokens=5, ignore_eos=True))[0].token_ids) == 5
        assert not llm._engine.has_work


def think(token: str) -> int:
    tokenizer = Tokenizer.from_directory(resolve_model(""))
    assert tokenizer is not None
    token_id = tokenizer.token_id(token)
    assert token_id is not None
    return token_id


@pytest.fixture(scope="module")
def after_thoughts() -> AfterThoughts:
    return AfterThoughts()


class AfterThoughts:
    """Forms of sequences of the bundled model that are thinking, and the tokens of their line breaks."""

    def __init__(self) -> None:
        path = resolve_model("")
        tokenizer = Tokenizer.from_directory(path)
        assert tokenizer is not None
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token_ids
        self.closes = think("</think>")
        (self.one,), (self.two,) = tokenizer.encode("\n"), tokenizer.encode("\n\n")
        self._grammars = Grammars(path, tokenizer.vocab_size, self.eos)

    def form(self, grammar: str, *output: int, budget: int | None = None) -> OutputConstraint:
        """The form of a sequence that was admitted, after a preemption, with `output`."""
        outputs = StructuredOutputs(grammar=grammar)
        params = SamplingParams(
            reasoning="open", thinking_token_budget=budget, structured_outputs=outputs, max_tokens=None
        )
        setup = make_setup(params, self.tokenizer, self.eos, self.tokenizer.vocab_size)
        assert setup is not None
        form = OutputConstraint.of(
            setup._replace(output=output), lambda setup: self._grammars.matcher(setup.grammar or "")
        )
        assert form is not None
        return form

    def allowed(self, form: OutputConstraint) -> set[int]:
        mask = form.mask(self.tokenizer.vocab_size)
        assert mask is not None
        bits = (mask[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
        return set(bits.flatten().nonzero()[:, 0].tolist())


LETTER = 'start: "a"'


@pytest.mark.parametrize("breaks", ["", "2", "1", "11"])
@pytest.mark.parametrize("preempted", [False, True])
def test_one_break_may_stand_between_thoughts_and_the_form(
    after_thoughts: AfterThoughts, breaks: str, preempted: bool
) -> None:
    said = [
        5,
        after_thoughts.closes,
        *({"1": after_thoughts.one, "2": after_thoughts.two}[b] for b in breaks),
    ]
    form = after_thoughts.form(LETTER, *said if preempted else ())
    for token_id in () if preempted else said:
        form.accept(token_id)
    (letter,) = after_thoughts.tokenizer.encode("a")
    more = {"": {after_thoughts.one, after_thoughts.two}, "1": {after_thoughts.one}}.get(breaks, set())
    assert after_thoughts.allowed(form) == {letter} | more
    form.accept(letter)
    assert after_thoughts.allowed(form) == set(after_thoughts.eos)
    assert form.error is None


def test_one_break_may_follow_thoughts_whose_budget_is_used_up(after_thoughts: AfterThoughts) -> None:
    form = after_thoughts.form(LETTER, budget=1)
    form.accept(5)
    assert after_thoughts.allowed(form) == {after_thoughts.closes}
    form.accept(after_thoughts.closes)
    form.accept(after_thoughts.two)
    assert after_thoughts.allowed(form) == set(after_thoughts.tokenizer.encode("a"))


def test_line_breaks_of_the_form_itself_follow_the_break(after_thoughts: AfterThoughts) -> None:
    form = after_thoughts.form(r"start: /\n\na/", 5, after_thoughts.closes, after_thoughts.two)
    assert after_thoughts.allowed(form) == {after_thoughts.two}
    form.accept(after_thoughts.two)
    assert after_thoughts.allowed(form) == set(after_thoughts.tokenizer.encode("a"))


def test_a_form_after_thoughts_is_not_put_off_by_a_model_that_likes_line_breaks(llm: LLM) -> None:
    likes = {token: 100.0 for token in (*tokens_of("\n"), *tokens_of("\n\n"))}
    asked = {"max_tokens": 60, "temperature": 0, "reasoning": "optional", "thinking_token_budget": 4}
    params = SamplingParams(
        **asked, logit_bias=likes, structured_outputs=StructuredOutputs(choice=("yes", "no"))
    )
    rest = (llm.chat(ASK, params)[0].text or "").partition("</think>")[2]
    assert rest in ("\n\nyes", "\n\nno")


def tokens_of(text: str) -> list[int]:
    tokenizer = Tokenizer.from_directory(resolve_model(""))
    assert tokenizer is not None
    return tokenizer.encode(text)
