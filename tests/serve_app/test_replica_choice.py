"""Which replica takes a request."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from serve_app.apis.chat.request import parse_chat
from serve_app.apis.completions import parse_completion
from serve_app.ingress.prefix_memory import PrefixMemory, prefixes_of
from serve_app.ingress.replica_table import MAX_SHARED_TOKENS, TOKENS_OF_REQUEST, ReplicaTable
from serve_app.replica_status import ReplicaStatus

REPLICAS = ["a", "b", "c"]


def prompt(name: int, num_bytes: int) -> bytes:
    return (f"{name:09} " * (num_bytes // 10 + 1)).encode()[:num_bytes]


def table_with(**queued: int) -> ReplicaTable:
    table = ReplicaTable()
    table.update([ReplicaStatus("", tokens, replica=name) for name, tokens in queued.items()], [])
    return table


def test_requests_without_a_common_start_are_spread_evenly() -> None:
    table = ReplicaTable()
    chosen = Counter(table.choose(REPLICAS, prompt(number, 1000)) for number in range(30))
    assert chosen == dict.fromkeys(REPLICAS, 10)


def test_a_replica_with_fewer_tokens_waiting_comes_first() -> None:
    assert table_with(a=900, b=0, c=500).choose(REPLICAS, b"") == "b"


def test_a_sequence_counts_as_so_many_tokens() -> None:
    table = ReplicaTable()
    busy = ReplicaStatus("", 0, 2, "a"), ReplicaStatus("", 2 * TOKENS_OF_REQUEST + 1, 0, "b")
    table.update(busy, [])
    assert table.choose(["a", "b"], b"") == "a"


@pytest.mark.parametrize("asks", [1, 50])
def test_a_conversation_stays_where_its_beginning_was_computed(asks: int) -> None:
    table = ReplicaTable()
    conversation = prompt(0, 4000)
    first = table.choose(REPLICAS, conversation)
    for number in range(1, asks):
        table.choose(REPLICAS, prompt(number, 1000))
    table.update([ReplicaStatus("", 0, 1, name) for name in REPLICAS], [])
    for _ in range(3):
        conversation += b"more"
        assert table.choose(REPLICAS, conversation) == first
        table.update([ReplicaStatus("", 0, 1, name) for name in REPLICAS], [])


def test_a_common_start_draws_only_so_many_requests_to_a_replica() -> None:
    table, shared = ReplicaTable(), prompt(0, 400_000)
    first = table.choose(REPLICAS, shared)
    table.update([ReplicaStatus("", 0, 0, name) for name in REPLICAS], [])
    chosen = [table.choose(REPLICAS, shared + b"x") for _ in range(100)]
    most = chosen.index(next(each for each in chosen if each != first))
    assert 0 < most <= MAX_SHARED_TOKENS // TOKENS_OF_REQUEST
    counts = Counter(chosen)
    assert max(counts.values()) - min(counts.values()) <= most


def test_a_replica_that_is_ill_silent_or_lost_takes_nothing_while_another_can() -> None:
    table = ReplicaTable()
    well, ill = ReplicaStatus("", 0, 9, "a"), ReplicaStatus("a rank was lost", replica="b")
    table.update([well, ill], ["c"])
    assert {table.choose(REPLICAS, b"") for _ in range(9)} == {"a"}
    table.update([well, ill], ["c"])
    table.avoid("a")
    assert {table.choose(REPLICAS, b"") for _ in range(60)} == {*REPLICAS}
    table.update([well], [])
    assert {table.choose(REPLICAS, b"") for _ in range(60)} == {*REPLICAS}


def test_a_replica_that_is_gone_draws_nothing() -> None:
    table, shared = ReplicaTable(), prompt(0, 4000)
    first = table.choose(REPLICAS, shared)
    table.forget(first)
    table.update([ReplicaStatus("", 0, first == name, name) for name in REPLICAS], [])  # another of that id
    assert table.choose(REPLICAS, shared) != first


def test_the_oldest_prefixes_are_forgotten() -> None:
    memory = PrefixMemory(max_prefixes=3)
    memory.add(prefixes_of(prompt(0, 600)), "a")  # two prefixes
    assert memory.shared_bytes(prefixes_of(prompt(0, 10_000)), ["a", "b"]) == {"a": 512, "b": 0}
    memory.add(prefixes_of(prompt(1, 600)), "b")
    assert memory.shared_bytes(prefixes_of(prompt(1, 600)), ["a", "b"]) == {"a": 0, "b": 512}
    assert memory.shared_bytes(prefixes_of(prompt(0, 600)), ["a"]) == {"a": 0}


@pytest.mark.parametrize("length", [0, 255, 256, 8_192, 9_000, 100_000, 1_000_000])
def test_most_of_a_prompt_is_recognised(length: int) -> None:
    memory = PrefixMemory()
    memory.add(prefixes_of(prompt(0, length)), "a")
    shared = memory.shared_bytes(prefixes_of(prompt(0, length) + b"tail"), ["a"])["a"]
    assert min(length - 255, 0.8 * length) <= shared <= length


def chat(*texts: str, **fields: Any) -> Any:
    messages = [{"role": "user", "content": text} for text in texts]
    return parse_chat(json.dumps({"messages": messages, **fields}).encode())


def test_prompts_that_begin_alike_have_bytes_that_begin_alike() -> None:
    one, two = chat("Hello", "there").prompt_bytes(), chat("Hello", "there", "x", seed=1).prompt_bytes()
    assert two.startswith(one.rstrip(b"]}"))
    for apart in ({"model": "adapter"}, {"cache_salt": "mine"}):
        assert chat("Hello", **apart).prompt_bytes()[:12] != one[:12]
    given = [parse_completion(json.dumps({"prompt": each}).encode()) for each in ("abc", "abcd", [1, 2])]
    assert given[1].prompt_bytes().startswith(given[0].prompt_bytes()[:-2])
    assert b"1,2" in given[2].prompt_bytes()
