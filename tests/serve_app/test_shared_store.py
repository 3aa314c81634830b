"""Stores of several ingresses: what one adds the others have, until it is deleted from all."""

from __future__ import annotations

import json

import pytest

from qwen3_dist.errors import RequestError
from serve_app.apis.responses.shared_store import SharedStore, Turn
from serve_app.apis.shared.errors import to_json

MIB = 2**20


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def store(max_bytes: int = MIB, clock: Clock | None = None) -> SharedStore:
    return SharedStore(max_bytes, 100, clock or Clock())


def add(kept: SharedStore, name: str, previous: str | None = None) -> str:
    """Adds a response that says its own name to one that asks for it."""
    output = [{"id": f"msg_{name}_0", "text": name}]
    response = to_json({"id": f"resp_{name}", "output": output})
    return kept.add(response, [{"ask": name}], previous, kept.conversation(previous))


def said(kept: SharedStore, response_id: str) -> list[str]:
    return [next(v for k, v in item.items() if k != "id") for item in kept.conversation(response_id)]


def turn(kept: SharedStore, response_id: str) -> Turn:
    [found] = kept.turns([response_id], 0)
    assert found
    return found


def is_missing(kept: SharedStore, response_id: str) -> bool:
    with pytest.raises(RequestError) as refused:
        kept.response(response_id)
    return refused.value.status == 404


def test_a_copy_is_the_same_response_and_continues_the_same_conversation() -> None:
    one, other = store(), store()
    for name, previous in (("a", None), ("b", "resp_a")):
        assert other.keep(turn(one, add(one, name, previous)))
    assert other.response("resp_b") == one.response("resp_b")
    assert said(other, "resp_b") == ["a", "a", "b", "b"]
    assert other.num_bytes == one.num_bytes
    held = other.num_bytes
    assert other.keep(turn(one, "resp_b")) and other.num_bytes == held


def test_a_copy_whose_predecessor_is_not_here_is_refused_and_comes_whole() -> None:
    one, other = store(), store()
    add(one, "a")
    add(one, "b", "resp_a")
    assert not other.keep(turn(one, "resp_b")) and other.num_bytes == 0
    whole = one.whole("resp_b")
    assert whole and other.keep(whole)
    assert said(other, "resp_b") == ["a", "a", "b", "b"] and is_missing(other, "resp_a")
    assert other.resolve_references([{"type": "item_reference", "id": "msg_b_0"}])[0]["text"] == "b"


def test_a_deleted_response_does_not_come_back_with_a_late_copy() -> None:
    one, other = store(), store()
    late = turn(one, add(one, "a"))
    with pytest.raises(RequestError):
        other.delete("resp_a")
    assert other.keep(late) and not other.keep_chain([late]) and other.keep_older([late])
    assert is_missing(other, "resp_a") and other.num_bytes == 0


def test_what_follows_a_deleted_response_comes_with_it_and_it_stays_deleted() -> None:
    one, other = store(), store()
    add(one, "a")
    add(one, "b", "resp_a")
    one.delete("resp_a")
    assert other.keep_chain(one.chain("resp_b"))
    assert said(other, "resp_b") == ["a", "a", "b", "b"] and is_missing(other, "resp_a")
    assert one.chain("resp_a") == []

    third = store()  # heard of the deletion before it had a copy
    chain = one.chain("resp_b")
    with pytest.raises(RequestError):
        third.delete("resp_a")
    assert third.keep_chain([chain[0]._replace(response=b"{}"), chain[1]])
    assert is_missing(third, "resp_a") and said(third, "resp_b") == ["a", "a", "b", "b"]


def test_a_chain_joins_what_is_here_already() -> None:
    one, other = store(), store()
    add(one, "a")
    other.keep(turn(one, "resp_a"))
    add(one, "b", "resp_a")
    add(one, "c", "resp_b")
    held = other.num_bytes
    assert other.keep_chain(one.chain("resp_c"))
    assert said(other, "resp_c") == ["a", "a", "b", "b", "c", "c"] and other.num_bytes > held
    for name in ("resp_c", "resp_b", "resp_a"):
        other.delete(name)
    assert other.num_bytes == 0


def copied(one: SharedStore, other: SharedStore, max_bytes: int = 1) -> None:
    """Copies all in batches of `max_bytes`."""
    wanted = one.ids()
    while wanted:
        batch = one.turns(wanted, max_bytes)
        if not other.keep_older(each for each in batch if each):
            return
        wanted = wanted[len(batch) :]


@pytest.mark.parametrize("max_bytes", [1, 4000, MIB])
def test_a_store_that_starts_copies_all_of_another(max_bytes: int) -> None:
    clock = Clock()
    one, other = store(clock=clock), store(clock=clock)
    add(one, "a")
    add(one, "b", "resp_a")
    add(one, "c", "resp_a")
    clock.now = 60
    add(one, "d", "resp_c")
    add(other, "own")
    copied(one, other, max_bytes)
    assert other.ids() == ["resp_own", *one.ids()]
    assert said(other, "resp_d") == ["a", "a", "c", "c", "d", "d"]
    clock.now = 110  # the first was used last when the third began
    assert is_missing(other, "resp_b") and said(other, "resp_c")


def test_a_store_that_fills_up_copies_the_latest_and_keeps_its_own() -> None:
    one = store()
    for name in "abcd":
        add(one, name)
    size = turn(one, "resp_a").num_bytes
    other = store(max_bytes=3 * size)
    add(other, "o")
    copied(one, other)
    assert other.ids() == ["resp_o", "resp_d", "resp_c"]
    assert other.num_bytes <= 3 * size


def test_memory_stays_bounded_whatever_others_hand_over() -> None:
    one, small = store(), store(max_bytes=2500)
    for name in "abc":
        assert small.keep(turn(one, add(one, name)))
    assert small.num_bytes <= 2500 and small.ids() == ["resp_c", "resp_b"]
    tiny = store(max_bytes=100)
    assert not tiny.keep_chain(one.chain("resp_a")) and tiny.num_bytes == 0


def test_an_expired_response_is_not_handed_over() -> None:
    clock = Clock()
    one = store(clock=clock)
    add(one, "a")
    clock.now = 101
    assert one.chain("resp_a") == [] and one.ids() == []


def test_of_what_is_gone_meanwhile_nothing_is_copied() -> None:
    one, other = store(), store()
    for name in "ab":
        add(one, name)
    ids = one.ids()
    one.delete("resp_b")
    assert one.turns(ids, MIB)[0] is None
    assert len(one.turns(one.ids() * 3, 1)) == 1 and len(one.turns(one.ids() * 3, MIB)) == 3
    copied(one, other)
    assert json.loads(other.response("resp_a"))["id"] == "resp_a"
