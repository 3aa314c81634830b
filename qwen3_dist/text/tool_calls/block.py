"""The result of parsing the whole text of a block of tool calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WrittenCall:
    """A parsed call; `arguments` is a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Block:
    """The calls of a block and the text after the last of them. Text without calls is not a block.

    `is_cut`: the text ends inside a value, so that more text could change the result. `is_closed`: the last call was
    complete, with nothing to add at its end.
    """

    calls: tuple[WrittenCall, ...] = ()
    rest: str = ""
    is_cut: bool = False
    is_closed: bool = True
