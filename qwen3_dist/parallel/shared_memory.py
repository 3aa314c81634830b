"""Collectives of CPU ranks on one host: they write into shared memory and spin on sequence numbers.

Gloo takes over a millisecond for a small all-reduce between two one-thread ranks; this takes tens of
microseconds, and in C++ (`native_shared_memory.py`) a few. The segment of a group of n ranks is double-buffered:

    flags   [n, 2]       last operation each rank has published, and whether it has left (a cache line apart)
    header  [2, n, 1+n]  int64: rounds this rank needs, rows for each destination (all-to-all only)
    slots   [2, n, slot] bytes of payload

A rank writes operation k into buffer k % 2, publishes k, and continues when all ranks have published k. It writes the
same buffer again at k + 2, after all ranks have published k + 1 and so have finished reading k: one wait for each
operation is enough. Publishing is a plain store after plain stores, which only x86 keeps in order (`supported()`);
ranks on other CPUs use gloo.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import select
import time
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from qwen3_dist.errors import PeerLostError
from qwen3_dist.parallel.communicator import Communicator

_DIRECTORY = Path("/dev/shm")
_LINE = 128  # bytes between flags, so that no two ranks write one cache line (or its prefetched pair)
_SPINS = 400
_YIELDING_S = 0.002  # a time and no count: a yield takes long if other processes want the core
_LIVENESS_PERIOD_S = 0.1


def supported() -> bool:
    """Whether this machine keeps stores in order and can watch a process for its end."""
    return platform.machine() in ("x86_64", "AMD64") and hasattr(os, "pidfd_open") and _DIRECTORY.is_dir()


def connect_shared_memory(
    group: dist.ProcessGroup,
    kind: type[SharedMemoryCommunicator],
    slot_bytes: int = 1 << 20,
    timeout_s: float = 300.0,
) -> SharedMemoryCommunicator | None:
    """Joins the ranks of a gloo `group` through one segment, or returns None on every rank.

    A slot holds whole numbers of every dtype: `slot_bytes` is a multiple of 16.

    Ranks share memory if all of them can open the segment and watch each other's processes, which this tries. The
    segment's name is removed before this returns, so the segment cannot outlive its ranks.
    """
    assert slot_bytes % 16 == 0
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    path: list[str | None] = [None]
    segment: Segment | None = None
    if rank == 0 and supported():
        path = [str(_DIRECTORY / f"qwen3_dist-{os.getpid()}-{secrets.token_hex(8)}")]
        segment = Segment.create(Path(path[0] or ""), size, slot_bytes)
    try:
        dist.broadcast_object_list(path, group=group, group_src=0)
        if segment is None and path[0] and supported():
            segment = Segment.attach(Path(path[0]), size, slot_bytes)
        pids: list[int | None] = [None] * size
        dist.all_gather_object(pids, os.getpid() if segment else None, group=group)
        watchers = None if None in pids else _open_pidfds([pid for pid in pids if pid], rank)
        agreed: list[bool] = [False] * size
        dist.all_gather_object(agreed, watchers is not None, group=group)
    finally:
        if rank == 0 and path[0]:
            Path(path[0]).unlink(missing_ok=True)
    if not all(agreed) or segment is None or watchers is None:
        for descriptor in watchers or {}:
            os.close(descriptor)
        return None
    communicator = kind(rank, size, segment, watchers, timeout_s)
    communicator.world_ranks = dist.get_process_group_ranks(group)
    return communicator


def _open_pidfds(pids: Sequence[int], rank: int) -> dict[int, int] | None:
    """pidfd -> rank in the group, for every other rank; None where that is not permitted."""
    descriptors: dict[int, int] = {}
    try:
        for peer, pid in enumerate(pids):
            if peer != rank:
                descriptors[os.pidfd_open(pid)] = peer
    except OSError:
        for descriptor in descriptors:
            os.close(descriptor)
        return None
    return descriptors


class Segment:
    """The mapped memory of one group, cut into flags, headers and slots."""

    def __init__(self, memory: mmap.mmap, size: int, slot_bytes: int) -> None:
        flags_end = size * _LINE
        headers_end = flags_end + 2 * size * (1 + size) * 8
        slots_start = -(-headers_end // 4096) * 4096
        view = memoryview(memory)
        self.flags = view[:flags_end].cast("q")
        self.headers = view[flags_end:headers_end].cast("q", (2, size, 1 + size))
        raw = torch.frombuffer(memory, dtype=torch.uint8)
        self.flags_address = raw.data_ptr()
        self.slots = raw[slots_start:][: 2 * size * slot_bytes].view(2, size, slot_bytes)
        self.slot_bytes = slot_bytes

    @staticmethod
    def total_bytes(size: int, slot_bytes: int) -> int:
        flags_and_headers = size * _LINE + 2 * size * (1 + size) * 8
        return -(-flags_and_headers // 4096) * 4096 + 2 * size * slot_bytes

    @classmethod
    def create(cls, path: Path, size: int, slot_bytes: int) -> Segment | None:
        total = cls.total_bytes(size, slot_bytes)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            return None
        try:
            os.posix_fallocate(descriptor, 0, total)  # a full /dev/shm must fail here, not as SIGBUS later
            return cls(mmap.mmap(descriptor, total), size, slot_bytes)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    @classmethod
    def attach(cls, path: Path, size: int, slot_bytes: int) -> Segment | None:
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            return None
        try:
            return cls(mmap.mmap(descriptor, cls.total_bytes(size, slot_bytes)), size, slot_bytes)
        except (OSError, ValueError):
            return None
        finally:
            os.close(descriptor)


class SharedMemoryCommunicator(Communicator):
    """Collectives over a `Segment`; payloads larger than a slot go in rounds.

    Raises PeerLostError if another rank's process ends, or does not answer within `timeout_s`.
    """

    kind = "shared memory"

    def __init__(
        self, rank: int, size: int, segment: Segment, watchers: dict[int, int], timeout_s: float
    ) -> None:
        super().__init__(rank, size)
        self.world_ranks: Sequence[int] = range(size)  # names of the group's ranks in errors
        self._segment = segment
        self._watchers = watchers
        self._poll = select.poll()
        for descriptor in watchers:
            self._poll.register(descriptor, select.POLLIN)
        self._timeout_s = timeout_s
        self._operation = 0
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        return self._waited_s

    @property
    def progress(self) -> tuple[int, tuple[int, ...]]:
        entered = self._segment.flags[:: _LINE // 8].tolist()
        mine = entered[self.rank]
        behind = (peer for peer in range(self.size) if entered[peer] < mine)
        return mine, tuple(self.world_ranks[peer] for peer in behind)

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        flat = x.view(-1)
        for lo, hi, slots in self._rounds(flat.numel(), self._segment.slot_bytes // x.element_size()):
            mine, everybody = self._typed(slots, x.dtype, hi - lo)
            mine.copy_(flat[lo:hi])
            self._exchange()
            self._sum(everybody, out=flat[lo:hi])
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        flat, out_flat = x.contiguous().view(-1), out.view(self.size, -1)
        for lo, hi, slots in self._rounds(flat.numel(), self._segment.slot_bytes // x.element_size()):
            mine, everybody = self._typed(slots, x.dtype, hi - lo)
            mine.copy_(flat[lo:hi])
            self._exchange()
            out_flat[:, lo:hi].copy_(everybody)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        pieces, out_flat = x.contiguous().view(self.size, -1), out.view(-1)
        capacity = self._segment.slot_bytes // x.element_size() // self.size
        for lo, hi, slots in self._rounds(out_flat.numel(), capacity):
            mine, everybody = self._typed(slots, x.dtype, self.size * (hi - lo))
            mine.view(self.size, -1).copy_(pieces[:, lo:hi])
            self._exchange()
            self._sum(everybody.unflatten(1, (self.size, -1))[:, self.rank], out=out_flat[lo:hi])
        return out

    def gather(self, x: Tensor) -> Tensor | None:
        out = x.new_empty(self.size, *x.shape) if self.rank == 0 else None
        flat = x.contiguous().view(-1)
        for lo, hi, slots in self._rounds(flat.numel(), self._segment.slot_bytes // x.element_size()):
            mine, everybody = self._typed(slots, x.dtype, hi - lo)
            mine.copy_(flat[lo:hi])
            self._exchange()
            if out is not None:
                out.view(self.size, -1)[:, lo:hi].copy_(everybody)
        return None if out is None else out.transpose(0, 1).flatten(1)

    def broadcast(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        flat = x.view(-1)
        for lo, hi, slots in self._rounds(flat.numel(), self._segment.slot_bytes // x.element_size()):
            mine, everybody = self._typed(slots, x.dtype, hi - lo)
            if self.rank == 0:
                mine.copy_(flat[lo:hi])
            self._exchange()
            if self.rank != 0:
                flat[lo:hi].copy_(everybody[0])
        return x

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        row = prod(x.shape[1:])
        capacity = self._segment.slot_bytes // x.element_size() // self.size  # elements for each rank a round
        sent = torch.split(x.contiguous().view(-1), [count * row for count in send_counts])
        rounds = max(1, -(-max(send_counts) * row // capacity))
        header = self._segment.headers
        parts: list[list[Tensor]] = [[] for _ in range(self.size)]
        done, total = 0, 1
        while done < total:
            buffer = (self._operation + 1) % 2
            header[buffer, self.rank, 0] = rounds
            for peer, elements in enumerate(sent):
                header[buffer, self.rank, 1 + peer] = send_counts[peer]
                chunk = elements[done * capacity : (done + 1) * capacity]
                self._part(buffer, self.rank, peer * capacity, chunk.numel(), x.dtype).copy_(chunk)
            self._exchange()
            total = max(header[buffer, peer, 0] for peer in range(self.size))
            counts = [header[buffer, peer, 1 + self.rank] for peer in range(self.size)]
            for peer, count in enumerate(counts):
                left = min(max(count * row - done * capacity, 0), capacity)
                parts[peer].append(self._part(buffer, peer, self.rank * capacity, left, x.dtype).clone())
            done += 1
        out = torch.cat([chunk for chunks in parts for chunk in chunks])
        return out.view(-1, *x.shape[1:]), counts

    def barrier(self) -> None:
        self._exchange()

    def close(self) -> None:
        self._segment.flags[self.rank * _LINE // 8 + 1] = 1
        for descriptor in self._watchers:
            os.close(descriptor)
        self._watchers = {}

    def _rounds(self, elements: int, capacity: int) -> Iterator[tuple[int, int, Tensor]]:
        for lo in range(0, max(1, elements), capacity):
            yield lo, min(lo + capacity, elements), self._segment.slots[(self._operation + 1) % 2]

    def _typed(self, slots: Tensor, dtype: torch.dtype, elements: int) -> tuple[Tensor, Tensor]:
        everybody = slots[:, : elements * dtype.itemsize].view(dtype)
        return everybody[self.rank], everybody

    def _part(self, buffer: int, rank: int, start: int, elements: int, dtype: torch.dtype) -> Tensor:
        """`elements` of a rank's slot from element `start` on."""
        size = dtype.itemsize
        return self._segment.slots[buffer, rank, start * size : (start + elements) * size].view(dtype)

    @staticmethod
    def _sum(parts: Tensor, out: Tensor) -> None:
        if parts.shape[0] == 2:
            torch.add(parts[0], parts[1], out=out)
        else:
            torch.sum(parts, dim=0, out=out)  # accumulates half precision in fp32

    def _exchange(self) -> None:
        """Publishes this rank's next operation and waits until every rank has published it."""
        self._operation += 1
        flags, operation, step = self._segment.flags, self._operation, _LINE // 8
        flags[self.rank * step] = operation
        for peer in range(self.size):
            if flags[peer * step] < operation:
                began = time.perf_counter()
                self._wait(peer, operation)
                self._waited_s += time.perf_counter() - began

    def _wait(self, peer: int, operation: int) -> None:
        flags, step = self._segment.flags, _LINE // 8
        at = peer * step
        for _ in range(_SPINS):
            if flags[at] >= operation:
                return
        end = time.monotonic() + _YIELDING_S
        while time.monotonic() < end:  # gives the core away: ranks may outnumber cores
            os.sched_yield()
            if flags[at] >= operation:
                return
        self._watch(peer, operation)

    def _watch(self, peer: int, operation: int) -> None:
        """Sleeps until `peer` has published `operation`; raises if a rank that has not is gone or too late."""
        flags, step = self._segment.flags, _LINE // 8
        at = peer * step
        now = time.monotonic()
        deadline, next_check = now + self._timeout_s, now
        while flags[at] < operation:
            time.sleep(5e-5)
            now = time.monotonic()
            if now >= next_check:
                ended = [self._watchers[descriptor] for descriptor, _ in self._poll.poll(0)]
                ended += [rank for rank in range(self.size) if flags[rank * step + 1]]
                lost = [
                    rank for rank in ended if flags[rank * step] < operation
                ]  # others ended after their part
                if lost:
                    raise PeerLostError(f"rank {self.world_ranks[lost[0]]} ended or left the group")
                next_check = now + _LIVENESS_PERIOD_S
            if now > deadline:
                late = self.world_ranks[peer]
                raise PeerLostError(f"rank {late} did not answer within {self._timeout_s:g} s")
