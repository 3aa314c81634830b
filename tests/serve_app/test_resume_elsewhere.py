"""Streams that go on at replicas that differ: other layouts, speculation, adapters, caches; and those that cannot."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.settings import EngineConfig
from qwen3_dist.text.chat_template import ChatTemplate
from qwen3_dist.weights.fingerprint import fingerprint
from qwen3_dist.weights.source import bundled_path
from serve_app.apis.embeddings import parse_embedding
from serve_app.apis.shared.answer import DIED, Running
from serve_app.apis.shared.generation import with_identity
from serve_app.apis.shared.prompts import PromptRenderer
from serve_app.metrics import definitions as names
from serve_app.metrics.requests import RequestMetrics
from serve_app.replica.deployment import EngineReplica
from tests.adapters import ATTENTION, write_adapter
from tests.serve_app.resuming import Client, answered, asked, by_choice, replica_of
from tests.serve_app.support import server_events

DRAWN: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "top_k": 40}
FORM = {"structured_outputs": {"regex": "[a-z]{3,5}( [a-z]{3,5}){9}"}}
LOOP = "one two three one two three one two three one two"
STOPPED: dict[str, Any] = {  # choices that end one after the other
    "prompt": LOOP,
    "n": 4,
    "stop": "e",
    "max_tokens": 40,
    "return_token_ids": True,
    **DRAWN,
}


def started(**settings: Any) -> AsyncEngine:
    config = {"device": "cpu", "dtype": "float32", "num_blocks": 256, **settings}
    return AsyncEngine(EngineConfig(**config))


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    engine = started(prefix_caching=False)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def replica(engine: AsyncEngine) -> EngineReplica:
    return replica_of(engine)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), bundled_path(), ATTENTION)


@pytest.mark.usefixtures("nursery")
@pytest.mark.parametrize("layout", ["tp=2", "dp=2,ep=2"])
def test_it_goes_on_in_another_layout(replica: EngineReplica, layout: str) -> None:
    other = started(layout=layout, executor="processes", prefix_caching=False)
    try:
        for api, fields in (("chat", {"seed": 3, **DRAWN}), ("messages", {"temperature": 0}), ("chat", FORM)):
            whole = Client(asked(api, **fields)).read(replica)
            for cut in (1, len(whole.parts) // 2):
                assert whole.up_to(cut).read(replica_of(other)).data == whole.data
    finally:
        other.shutdown()


def test_it_goes_on_with_speculation_and_without(replica: EngineReplica) -> None:
    other = started(speculative="ngram,k=4,min=1", prefix_caching=False)
    try:
        guessing = replica_of(other)
        request = asked("completions", prompt=LOOP, max_tokens=60, return_token_ids=True, ignore_eos=True)
        plain, guessed = Client(request).read(replica), Client(request).read(guessing)
        expected = texts(plain.data)
        assert other.stats().accepted_tokens > 10 and max(guessed.resume.choices[0].sizes) > 1
        for first, second in ((guessed, guessing), (guessed, replica), (plain, guessing)):
            for cut in (1, 5, len(first.parts) - 2):
                assert texts(first.up_to(cut).read(second).data) == expected
        request = asked("responses", input="Say one two three one two three one two three.")
        expected_output = output(Client(request).read(replica).data)
        begun = Client(request).read(guessing)
        for cut in (2, 5, 9):
            data = begun.up_to(cut).read(guessing).data
            numbers = [event["sequence_number"] for event in server_events(data)]
            assert numbers == list(range(len(numbers)))
            assert output(data) == expected_output
    finally:
        other.shutdown()


def texts(data: bytes) -> dict[int, tuple[str, list[int], list[Any]]]:
    """The text, token ids and finish reasons of each choice, however they were split."""
    found = {}
    for index, events in by_choice(data).items():
        if index < 0:
            continue
        choices = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events]
        ids = [token_id for choice in choices for token_id in choice["token_ids"]]
        found[index] = ("".join(c["text"] for c in choices), ids, [c["finish_reason"] for c in choices][-1:])
    return found


def output(data: bytes) -> list[Any]:
    """The output of the response that a stream ends with."""
    items: list[Any] = server_events(data)[-1]["response"]["output"]
    return items


def test_it_goes_on_with_its_adapter_and_not_without(replica: EngineReplica, adapter: Path) -> None:
    engines = [started(lora=f"mine={adapter}", prefix_caching=False) for _ in range(2)]
    try:
        first, second = map(replica_of, engines)
        request = asked("chat", model="mine", **DRAWN)
        whole = Client(request).read(first)
        assert whole.up_to(9).read(second).data == whole.data
        base = Client(replace(request, model="m")).read(first)
        assert base.resume.choices[0].token_ids != whole.resume.choices[0].token_ids
        for ask in (request, replace(request, stream=False)):
            [(status, body)] = answered(replica, ask, whole.up_to(9).resume)
            assert status == 404 and b"'mine' is not a LoRA adapter here" in body
    finally:
        for engine in engines:
            engine.shutdown()


def test_usage_tells_what_the_first_replica_had_in_its_cache(replica: EngineReplica) -> None:
    engine = started()
    try:
        caching = replica_of(engine)
        usage = {"stream_options": {"include_usage": True}}
        request = asked("completions", prompt=list(range(5, 105)), n=2, **usage, **DRAWN)
        Client(request).read(caching)
        hit, missed = Client(request).read(caching), Client(request).read(replica)
        for begun, other in ((hit, replica), (missed, caching)):
            assert by_choice(begun.up_to(3).read(other).data)[-1] == by_choice(begun.data)[-1]
        assert by_choice(hit.data)[-1] != by_choice(missed.data)[-1]
        stats = engine.stats()
        assert 0 < stats.cached_prompt_tokens <= stats.prompt_tokens
    finally:
        engine.shutdown()


def test_choices_that_are_finished_are_not_run_again(replica: EngineReplica, engine: AsyncEngine) -> None:
    whole = Client(asked("completions", **STOPPED)).read(replica)
    begun = whole.up_to(len(whole.parts) // 2)
    done, found = texts(begun.data), texts(whole.data)
    assert 0 < sum(reason is not None for _, _, [reason] in done.values()) < 4
    left = sum(len(ids) for _, ids, _ in found.values()) - sum(len(ids) for _, ids, _ in done.values())
    before = engine.stats().generation_tokens
    assert texts(begun.read(replica).data) == found
    # A step is under way when the stop string of a choice is found.
    assert left <= engine.stats().generation_tokens - before <= left + 2 * 4


def test_a_stream_of_which_only_the_end_is_missing_needs_no_engine(
    replica: EngineReplica, engine: AsyncEngine
) -> None:
    whole = Client(asked("chat")).read(replica)
    steps = engine.stats().steps
    assert whole.up_to(len(whole.parts) - 1).read(replica).data == whole.data
    assert engine.stats().steps == steps


def test_what_cannot_go_on_is_refused_with_the_reason(replica: EngineReplica, engine: AsyncEngine) -> None:
    request = asked("chat", ignore_eos=True)
    request = replace(request, sampling={"ignore_eos": True})  # its limit would be refused at once
    whole = replace(request, stream=False)
    begun = Client(request).read(replica_of(engine, max_tokens=60)).up_to(30)
    small = started(max_model_len=begun.parts[-1].tokens)
    try:
        refusals = [answered(replica_of(small), ask, begun.resume) for ask in (request, whole)]
    finally:
        small.shutdown()
    for [(status, body)] in refusals:
        error = json.loads(body)["error"]
        assert status == 400 and error["code"] == "context_length_exceeded"
        assert f"fill the context of {begun.parts[-1].tokens};" in error["message"]
    for ask in (request, whole):
        [(status, body)] = answered(replica, ask, replace(begun.resume, model="another"))
        assert status == 409 and "the model was changed" in json.loads(body)["error"]["message"]
    resume = begun.resume
    resume.choices[0].token_ids[3] = 5000
    [(status, body)] = answered(replica, request, resume)
    assert status == 400 and "5000 is outside the vocabulary" in json.loads(body)["error"]["message"]


def test_an_engine_that_dies_hands_its_streams_over(replica: EngineReplica) -> None:
    dying = started(prefix_caching=False, max_num_seqs=1)
    request = asked("chat", max_tokens=300, ignore_eos=True, **DRAWN)
    told: dict[str, list[Any]] = {"running": [], "late": [], "pooled": []}

    async def outlive() -> tuple[Client, Any]:
        answer = replica_of(dying).answer(request, "request-7", tell=told["running"].append)
        assert await anext(answer) == Running("r")
        begun = Client(request, (await anext(answer)).model, [await anext(answer)])
        late = replica_of(dying).answer(
            asked("completions", prompt=["a", "b"]), "8", tell=told["late"].append
        )
        assert await anext(late) == Running("r") and (await anext(late)).item == (200, b"")
        pooled = replica_of(dying).answer(
            parse_embedding(b'{"input": ["a", "b"]}'), "9", tell=told["pooled"].append
        )
        assert await anext(pooled) == Running("r")
        await asyncio.to_thread(dying.shutdown)
        assert [await anext(late), await anext(pooled)] == [(503, DIED)] * 2
        items = [item async for item in answer]
        begun.parts += items[:-1]
        return begun, items[-1]

    begun, (status, body) = asyncio.run(outlive())
    assert (status, body) == (503, DIED)
    assert told == {"running": [], "late": [Running("r", waits=True)], "pooled": [Running("r", waits=True)]}
    assert begun.parts and begun.read(replica).data == Client(request).read(replica).data


def test_an_accepted_request_has_the_same_answer_whoever_gives_it(replica: EngineReplica) -> None:
    asks = {
        "prompt": ["the sea", "the sea"],
        "n": 2,
        "max_tokens": 20,
        "return_token_ids": True,
        "temperature": 2.0,
    }
    request = replace(asked("completions", **asks), identity=None)
    accepted, other = with_identity(request), with_identity(request)
    assert with_identity(accepted) is accepted
    first, again, drawn = (Client(each).read(replica) for each in (accepted, accepted, other))
    assert by_choice(first.data) == by_choice(again.data)
    said = [ids for _, ids, _ in texts(first.data).values()]
    assert len({tuple(ids) for ids in said}) == 4  # each choice of each prompt has draws of its own
    assert texts(drawn.data) != texts(first.data)
    assert accepted.params({}).seed is None  # logs and traces tell what the client asked


def test_a_request_that_is_sent_again_with_its_id_gets_the_same_draws(replica: EngineReplica) -> None:
    asks = {"prompt": "the sea", "max_tokens": 20, "return_token_ids": True, "temperature": 2.0}
    request = replace(asked("completions", **asks), identity=None)
    first, again, other = (
        texts(Client(with_identity(request, request_id)).read(replica).data) for request_id in ("a", "a", "b")
    )
    assert first == again != other


def test_a_prompt_that_tells_the_time_tells_that_of_the_acceptance(engine: AsyncEngine) -> None:
    template = ChatTemplate({"default": "{{ strftime_now('%Y') }}"}, {})
    renderer = PromptRenderer(engine.tokenizer, template, 4096)
    assert asked("chat").prompts(renderer)[0].text == "2023"


def test_checkpoints_and_settings_are_told_apart(tmp_path: Path) -> None:
    first = shutil.copytree(bundled_path(), tmp_path / "first")
    second = shutil.copytree(bundled_path(), tmp_path / "second")
    assert fingerprint(first) == fingerprint(second) != fingerprint(first, {"enable_thinking": False})
    for name, place in (("model.safetensors", -100), ("tokenizer.json", 5000), ("generation_config.json", 9)):
        before, file = fingerprint(second), second / name
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)
        assert fingerprint(second) != before


def test_a_choice_that_goes_on_is_counted_once_and_has_no_second_first_token(engine: AsyncEngine) -> None:
    first, second = RequestMetrics(), RequestMetrics()
    whole = Client(asked("completions", **STOPPED)).read(replica_of(engine, metrics=first))
    begun = whole.up_to(len(whole.parts) // 2)
    begun.read(replica_of(engine, metrics=second))
    unfinished = sum(reason is None for _, _, [reason] in texts(begun.data).values())
    assert 0 < unfinished < 4
    assert sum(first.e2e.read().counts) == 4 and sum(second.e2e.read().counts) == unfinished
    for histogram in (second.to_first_token, second.prefill, second.decode, second.per_output_token):
        assert sum(histogram.read().counts) == 0
    assert sum(second.between_tokens.read().counts) > 0
    assert sum(second.values.snapshot({}).values[names.REQUEST_SUCCESS.name].values()) == unfinished  # type: ignore[arg-type]
