"""Text put through an output parser in pieces, and every way of cutting a text into two, a short one into three."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from qwen3_dist.text.parsed import OutputParser, Parsed, ToolCallDelta

_SHORT = 60
NewParser = Callable[[], OutputParser]


def parsed(parser: OutputParser, pieces: Iterable[str]) -> Parsed:
    """All that `parser` makes of `pieces`, each call as one part."""
    shown = Parsed()
    for piece in pieces:
        shown += parser.push(piece)
    shown += parser.finish()
    calls: dict[int, ToolCallDelta] = {}
    for part in shown.tool_calls:
        if part.index in calls:
            assert part.id is None and part.name is None
            before = calls[part.index]
            calls[part.index] = dataclasses.replace(before, arguments=before.arguments + part.arguments)
        else:
            assert part.id and part.name and part.index == len(calls)
            calls[part.index] = part
    return Parsed(shown.content, shown.reasoning, tuple(calls.values()))


def cuts(text: str) -> Iterator[tuple[str, ...]]:
    """Every way of cutting `text` in two and, if it is short, in three, of which some may be empty."""
    for a in range(len(text) + 1):
        yield text[:a], text[a:]
        for b in range(a, len(text) + 1) if len(text) <= _SHORT else ():
            yield text[:a], text[a:b], text[b:]


def however_cut(new_parser: NewParser, text: str) -> Parsed:
    """What a parser makes of `text`; fails if it depends on how the text is cut."""
    whole = parsed(new_parser(), [text])
    assert parsed(new_parser(), text) == whole
    for pieces in cuts(text):
        assert parsed(new_parser(), pieces) == whole, pieces
    return whole


def pieces_of(text: str, sizes: Sequence[int]) -> Iterator[str]:
    """`text` in pieces of `sizes`, over and over."""
    start = 0
    for size in itertools.cycle(sizes or [len(text) or 1]):
        if start >= len(text):
            return
        yield text[start : start + size]
        start += size
