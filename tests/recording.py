"""Ranks one after the other in one process, whose collectives are written down rather than made.

What a rank receives has the right shape and no meaning, so that ranks also differ in their data, as they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from graphlib import TopologicalSorter
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from qwen3_dist.layout import Layout
from qwen3_dist.parallel.communicator import Communicator, SingleCommunicator
from qwen3_dist.parallel.context import ParallelContext, _groups_of
from qwen3_dist.parallel.dispatch import DispatchOptions
from qwen3_dist.parallel.pipeline import Pipeline

Group = tuple[int, ...]  # global ranks
T = TypeVar("T")


class Call(NamedTuple):
    """One collective: all ranks of its group must make it with equal `operation`, `shape` and `dtype`."""

    group: Group
    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Record:
    """What one rank asks of its groups, in order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.underway: list[Group] = []

    def add(self, group: Group, operation: str, x: Tensor, shape: Iterable[int] | None = None) -> None:
        self.calls.append(Call(group, operation, tuple(x.shape if shape is None else shape), x.dtype))


class Recording(Communicator):
    """One rank's end of a group. `excludes_others`: as with NCCL, no other may be used while its work is under way."""

    overlaps = True

    def __init__(self, record: Record, members: Group, rank: int, excludes_others: bool) -> None:
        super().__init__(members.index(rank), len(members))
        self._record, self._members = record, members
        self.excludes_others = excludes_others

    def _add(self, operation: str, x: Tensor, shape: Iterable[int] | None = None) -> None:
        others = [group for group in self._record.underway if group != self._members]
        if self.excludes_others:
            assert not others, f"{operation} of {self._members} while work of {others} is under way"
        self._record.add(self._members, operation, x, shape)

    def all_reduce(self, x: Tensor) -> Tensor:
        self._add("all_reduce", x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        self._add("all_gather", x)
        return torch.cat([x] * self.size)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self._add("reduce_scatter", x)
        assert len(x) % self.size == 0
        return x[: len(x) // self.size].clone()

    def gather(self, x: Tensor) -> Tensor | None:
        self._add("gather", x)
        return None if self.rank else torch.cat([x] * self.size, dim=1)

    def broadcast(self, x: Tensor) -> Tensor:
        self._add("broadcast", x)
        return x

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        return self.start_all_to_all(x, send_counts, recv_counts)()

    def start_all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None
    ) -> Callable[[], tuple[Tensor, list[int]]]:
        assert len(send_counts) == self.size and sum(send_counts) == len(x)
        if recv_counts is None:
            self._add("all_to_all of counts", torch.empty(self.size, dtype=torch.int64))
        self._add("all_to_all of any rows", x, x.shape[1:])
        received = list(recv_counts or send_counts)
        return self._started(lambda: (x.new_zeros(sum(received), *x.shape[1:]), received))

    def start_even_all_to_all(self, x: Tensor) -> Callable[[], Tensor]:
        self._add("even all_to_all", x)
        assert len(x) % self.size == 0
        return self._started(lambda: x.clone())

    def _started(self, result: Callable[[], T]) -> Callable[[], T]:
        self._record.underway.append(self._members)

        def finish() -> T:
            self._record.underway.remove(self._members)
            return result()

        return finish

    def barrier(self) -> None:
        self._add("barrier", torch.empty(0))


class RecordingPipeline(Pipeline):
    """A send and the receive that it meets are one call of a group of two."""

    def __init__(self, record: Record, stage: int, size: int, rank: int, stage_size: int) -> None:
        super().__init__(stage, size)
        self._record, self._rank, self._stage_size = record, rank, stage_size

    def send(self, x: Tensor) -> None:
        assert not self._record.underway
        self._record.add((self._rank, self._rank + self._stage_size), "send", x)

    def receive(self, rows: int, like: Tensor) -> Tensor:
        x = like.new_zeros(rows, len(like))
        self._record.add((self._rank - self._stage_size, self._rank), "send", x)
        return x


def recorded(
    layout: Layout, rank: int, dispatch: DispatchOptions, nccl: bool
) -> tuple[ParallelContext, Record]:
    """A rank's context, and where its calls are written down."""
    record, at = Record(), layout.coords(rank)
    mine: dict[Group, Communicator] = {}
    for members in _groups_of(layout, rank):
        alone = len(members) == 1
        if members not in mine:
            mine[members] = SingleCommunicator() if alone else Recording(record, members, rank, nccl)
    tp, dp, ep, etp = (mine[members] for members in _groups_of(layout, rank))
    pipeline = RecordingPipeline(record, at.stage, layout.pp, rank, layout.stage_size)
    return ParallelContext(layout, at, tp, dp, ep, etp, pipeline, dispatch=dispatch), record


def check_order(calls: Mapping[int, Sequence[Call]]) -> None:
    """Raises AssertionError unless every group's ranks make equal calls, CycleError if groups wait for each other."""
    of_groups: dict[Group, dict[int, list[Call]]] = {}
    for rank, made in calls.items():
        for call in made:
            assert rank in call.group
            of_groups.setdefault(call.group, {}).setdefault(rank, []).append(call)
    for group, by_rank in of_groups.items():
        first = by_rank.get(group[0], [])
        for rank in group:
            mine = by_rank.get(rank, [])
            for number, (one, other) in enumerate(zip(first, mine, strict=False)):
                assert one == other, f"call {number} of {group}: rank {group[0]} {one}, rank {rank} {other}"
            assert len(mine) == len(first), f"{group}: rank {rank} makes {len(mine)} calls of {len(first)}"
    order: TopologicalSorter[tuple[Group, int]] = TopologicalSorter()
    for made in calls.values():
        seen: dict[Group, int] = {}
        nodes = []
        for call in made:
            seen[call.group] = seen.get(call.group, 0) + 1
            nodes.append((call.group, seen[call.group]))
        for before, after in pairwise(nodes):
            order.add(after, before)
    order.prepare()
