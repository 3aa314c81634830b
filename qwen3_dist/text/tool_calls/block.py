"""What a block of tool calls says once its text is known."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WrittenCall:
    """A call that a model wrote; `arguments` is JSON of an object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Block:
    """The calls of a block and the text after the last of them; without calls it is none.

    `is_cut` where the text ends inside a value, so that more of it may mean something else. `is_closed` where
    nothing had to be added to its end.
    """

    calls: tuple[WrittenCall, ...] = ()
    rest: str = ""
    is_cut: bool = False
    is_closed: bool = True
