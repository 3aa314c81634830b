"""Ids of tool calls that are the same whenever an answer is generated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from hashlib import blake2b


def call_ids(unique: str, choice: int) -> Iterator[str]:
    """Yields the ids of the tool calls of one choice of the answer with the id `unique`."""
    for number in itertools.count():
        yield f"call_{blake2b(f'{unique}-{choice}-{number}'.encode(), digest_size=12).hexdigest()}"
