"""The sequences of a plan as columns, one for each field, which pickle many times faster than objects.

No column grows with the context, since a plan holds only new blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, repeat
from typing import Any, NamedTuple, TypeVar

from qwen3_dist.protocol.sequence_step import SampleSpec, SequenceStep

T = TypeVar("T")
_NO_LOGPROBS = -1


class SequenceColumns(NamedTuple):
    """The fields of the sequences, in order, without `blocks`, which stay with the engine.

    Fields that are lists are concatenated, with a column of lengths. `samples` has the specs of the sequences that
    have one, whose indices are `sampled`. `setups` and `prompt_requests`, which few sequences have, are by index.
    """

    seq_ids: array[int]
    slots: array[int]
    lengths: array[int]  # of each sequence's tokens
    token_ids: array[int]
    starts: array[int]
    block_counts: array[int]  # of each sequence's new blocks
    new_blocks: array[int]
    first_blocks: array[int]
    num_drafted: array[int]
    adapters: array[int]
    sampled: array[int]
    samples: tuple[array[Any], ...]  # temperature, top_p, top_k, seed, position, logprobs
    setups: dict[int, Any]
    prompt_requests: dict[int, Any]

    @classmethod
    def of(cls, sequences: Sequence[SequenceStep]) -> SequenceColumns:
        columns = zip(*sequences, strict=True) if sequences else ((),) * len(SequenceStep._fields)
        ids, slots, tokens, starts, blocks, samples, firsts, drafted, adapters, setups, requests, _ = columns
        sampled = _given(samples)
        return cls(
            array("q", ids),
            array("i", slots),
            array("i", map(len, tokens)),
            array("i", chain.from_iterable(tokens)),
            array("i", starts),
            array("i", map(len, blocks)),
            array("i", chain.from_iterable(blocks)),
            array("i", firsts),
            array("i", drafted),
            array("i", adapters),
            array("i", sampled),
            _sample_columns(tuple(sampled.values())),
            _given(setups),
            _given(requests),
        )

    def sequences(self) -> tuple[SequenceStep, ...]:
        """The inverse of `of`."""
        count = len(self.seq_ids)
        return tuple(
            map(
                SequenceStep,
                self.seq_ids,
                self.slots,
                _parted(self.token_ids, self.lengths),
                self.starts,
                _parted(self.new_blocks, self.block_counts),
                _spread(dict(zip(self.sampled, _samples(self.samples), strict=True)), count),
                self.first_blocks,
                self.num_drafted,
                self.adapters,
                _spread(self.setups, count),
                _spread(self.prompt_requests, count),
            )
        )


def _sample_columns(specs: Sequence[SampleSpec]) -> tuple[array[Any], ...]:
    columns = zip(*specs, strict=True) if specs else ((),) * len(SampleSpec._fields)
    temperature, top_p, top_k, seed, position, logprobs = columns
    counts = (_NO_LOGPROBS if count is None else count for count in logprobs)
    kinds = zip("ddqqqi", (temperature, top_p, top_k, seed, position, counts), strict=True)
    return tuple(array(kind, column) for kind, column in kinds)


def _samples(columns: Sequence[array[Any]]) -> Iterable[SampleSpec]:
    *others, counts = columns
    logprobs = [None if count == _NO_LOGPROBS else count for count in counts]
    return map(SampleSpec, *others, logprobs)


def _parted(values: array[int], lengths: array[int]) -> Iterable[tuple[int, ...]]:
    """Splits `values` into consecutive tuples of these lengths."""
    if lengths.count(1) == len(lengths):
        return zip(values)
    flat = tuple(values)
    return [flat[end - length : end] for end, length in zip(accumulate(lengths), lengths, strict=True)]


def _given(values: Sequence[T | None]) -> dict[int, T]:
    """The values that are not None, by index."""
    if values.count(None) == len(values):
        return {}
    return {place: value for place, value in enumerate(values) if value is not None}


def _spread(given: dict[int, T], count: int) -> Iterable[T | None]:
    """The inverse of `_given`, for `count` values."""
    if len(given) == count:
        return given.values()
    return map(given.get, range(count)) if given else repeat(None, count)
