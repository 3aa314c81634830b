"""Streamed text is the unstreamed text, however the tokens arrive, and shows nothing it must take back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_dist.text.detokenizer import TextStream
from qwen3_dist.text.tokenizer import Tokenizer

REPO = Path(__file__).resolve().parents[2]
REAL = REPO.parent / "shared" / "data" / "qwen3-tokenizer"


def loaded(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer is not None
    return tokenizer


BUNDLED_TOKENIZER = loaded(REPO / "qwen3_dist" / "bundled")
REAL_TOKENIZER = loaded(REAL) if REAL.exists() else None
BOTH = pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(BUNDLED_TOKENIZER, id="bundled"),
        pytest.param(
            REAL_TOKENIZER, id="real", marks=pytest.mark.skipif(not REAL_TOKENIZER, reason="not at hand")
        ),
    ],
)
MANY = settings(max_examples=150, deadline=None)

FRAGMENTS = [
    "👩‍👩‍👧",
    "e\u0301",
    "日本語",
    "\ufffd",
    "<|im_end|>",
    "<|im_start|>",
    "</think>",
    "stop",
    "st",
    "END",
    "\n",
    " a",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join)
STOPS = st.lists(
    st.sampled_from(["stop", "top s", "END\n", "語", "\ufffd", "\u0301", "a a", "</th", "s"])
    | st.text(min_size=1, max_size=3),
    max_size=3,
)


@st.composite
def token_ids(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Ids of readable text, with any ids (half characters, special, padding) strewn in."""
    anything = st.integers(0, tokenizer.vocab_size + 50)
    bytes_only = st.integers(0, 255)  # the 256 single bytes are the first ids of both vocabularies
    runs = draw(
        st.lists(TEXTS.map(tokenizer.encode) | st.lists(anything | bytes_only, max_size=6), max_size=4)
    )
    return [token_id for run in runs for token_id in run]


def chunks(data: st.DataObject, ids: list[int]) -> Iterator[list[int]]:
    start = 0
    while start < len(ids):
        size = data.draw(st.integers(1, 4))
        yield ids[start : start + size]
        start += size


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """What a reader would do who gets one character at a time and leaves at the first stop string."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@BOTH
@MANY
@given(data=st.data())
def test_deltas_join_to_the_decoded_text_cut_at_the_first_stop(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    ids, stops, skip = data.draw(token_ids(tokenizer)), data.draw(STOPS), data.draw(st.booleans())
    expected, stopped = cut_at_stop(tokenizer.decode(ids, skip), stops)
    stream = TextStream(tokenizer, stops, skip)
    shown = ""
    for chunk in chunks(data, ids):
        shown += stream.push(chunk)
        assert expected.startswith(shown)
        assert stream.text == shown
    shown += stream.finish()
    assert (shown, stream.text, stream.stopped) == (expected, expected, stopped)


@BOTH
@MANY
@given(data=st.data())
def test_no_more_is_held_back_than_one_unfinished_character(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(token_ids(tokenizer))
    stream = TextStream(tokenizer, ())
    for end, token_id in enumerate(ids, 1):
        stream.push([token_id])
        assert tokenizer.decode(ids[:end]) in (stream.text, stream.text + "\ufffd")


def in_single_bytes(text: str) -> list[int]:
    ids = [BUNDLED_BYTES[byte] for byte in text.encode()]
    assert BUNDLED_TOKENIZER.decode(ids) == text
    return ids


BUNDLED_BYTES = {BUNDLED_TOKENIZER.token_bytes(token_id)[0]: token_id for token_id in range(256)}


def test_a_character_comes_out_with_its_last_byte() -> None:
    stream = TextStream(BUNDLED_TOKENIZER, ())
    assert [stream.push([token_id]) for token_id in in_single_bytes("é🙂")] == ["", "é", "", "", "", "🙂"]


def test_bytes_that_begin_no_character_come_out_at_once() -> None:
    stream = TextStream(BUNDLED_TOKENIZER, ())
    assert [stream.push([BUNDLED_BYTES[0x80]]) for _ in range(5)] == ["\ufffd"] * 5


def test_finish_shows_an_unfinished_character_and_an_unfinished_stop_string() -> None:
    stream = TextStream(BUNDLED_TOKENIZER, ("stop",))
    assert stream.push(in_single_bytes("a sto")) == "a "
    assert stream.finish() == "sto"
    stream = TextStream(BUNDLED_TOKENIZER, ())
    assert stream.push(in_single_bytes("a🙂")[:-1]) == "a"
    assert stream.finish() == "\ufffd"


def test_what_turns_out_not_to_be_a_stop_string_is_shown() -> None:
    stream = TextStream(BUNDLED_TOKENIZER, ("stop",))
    assert [stream.push([token_id]) for token_id in in_single_bytes("ststore")] == [
        "",
        "",
        "st",
        "",
        "",
        "stor",
        "e",
    ]
    assert not stream.stopped


def test_nothing_is_shown_after_a_stop_string() -> None:
    stream = TextStream(BUNDLED_TOKENIZER, ("stop",))
    assert stream.push(in_single_bytes("one stop two")) == "one "
    assert stream.stopped
    assert (stream.push(in_single_bytes("more")), stream.finish(), stream.text) == ("", "", "one ")


def test_ids_are_taken_up_to_the_one_that_completes_a_stop_string() -> None:
    for size in (1, 3, 12):
        ids = in_single_bytes("one stop two")
        stream = TextStream(BUNDLED_TOKENIZER, ("stop",))
        for start in range(0, len(ids), size):
            stream.push(ids[start : start + size])
        assert stream.num_tokens == len("one stop")


def test_the_stop_string_that_is_complete_first_wins_whatever_the_chunks() -> None:
    for size in (1, 4):
        ids = in_single_bytes("abcd")
        stream = TextStream(BUNDLED_TOKENIZER, ("abcd", "bc"))
        shown = "".join(stream.push(ids[start : start + size]) for start in range(0, len(ids), size))
        assert (shown, stream.stopped) == ("a", True)


def test_special_tokens_are_shown_only_on_request() -> None:
    ids = BUNDLED_TOKENIZER.encode("<think>a</think>b<|im_end|>")
    assert TextStream(BUNDLED_TOKENIZER, ()).push(ids) == "<think>a</think>b"
    assert (
        TextStream(BUNDLED_TOKENIZER, (), skip_special_tokens=False).push(ids)
        == "<think>a</think>b<|im_end|>"
    )


@BOTH
def test_half_a_surrogate_is_no_unfinished_character(tokenizer: Tokenizer) -> None:
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in range(256)}
    stream = TextStream(tokenizer, ())
    assert stream.push([by_bytes[b"\xed"]]) == ""
    assert stream.push([by_bytes[b"\xa0"]]) == "\ufffd\ufffd"
    assert stream.push([by_bytes[b"a"]]) + stream.finish() == "a"
