"""The rows that an all-to-all sends to each rank: exact counts, or a fixed number of slots (a capacity).

The host must read exact counts before it can send, which suits CPUs. With slots every rank sends `capacity` rows to
every other, including empty ones. The host does not wait, so a CUDA graph can hold it. Rows that do not fit are
dropped, and a flag on the device is set.

Legend: N rows of this rank, K experts of a row, n ep ranks, C capacity, M rows sent, R rows received, D emb_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.ops.transfer import on_device
from qwen3_dist.parallel.communicator import Communicator


class OverflowFlag:
    """Whether an all-to-all of the step has dropped rows. All MoE layers of a rank share one flag."""

    def __init__(self) -> None:
        # [1] fp32, since every communicator can add it; on the device of its last use, never on meta.
        self._dropped = torch.zeros(1, device="cpu")

    def add(self, dropped: Tensor) -> None:
        """Records one exchange's overflow flag, a bool on the device."""
        if self._dropped.device != dropped.device:
            self._dropped = on_device(self._dropped, self._dropped.dtype, dropped.device)
        self._dropped += dropped

    def reduce_and_clear(self, *groups: Communicator) -> Tensor:
        """Returns [1] fp32, above 0 if any rank of the `groups` dropped rows since the last call, and clears the flag.
        All ranks of the groups must call it."""
        total = self._dropped.clone()
        self._dropped.zero_()
        for group in groups:
            total = group.all_reduce(total)
        return total


class SendPlan(ABC):
    """The rows of one dispatch and combine. Used once."""

    sent_rows: Tensor  # [M] int64, the source row of each sent row; N: an empty slot
    destinations: Tensor  # [M] int64, the ep rank to which it goes

    @abstractmethod
    def start(self, ep: Communicator, rows: Tensor) -> Callable[[], Tensor]:
        """Starts sending rows [M, bytes]; returns a function that waits for the rows received [R, bytes]."""

    @abstractmethod
    def start_back(self, ep: Communicator, sums: Tensor) -> Callable[[], Tensor]:
        """Starts sending the outputs of received rows [R, D] back. Returns a function that waits for them and returns
        the sum of each row [N, D]."""


class CountedRows(SendPlan):
    """An all-to-all with exact counts, which the host reads before it sends."""

    def __init__(self, owners: Tensor, size: int) -> None:
        """owners [N, K]: the ep rank, of `size` ranks, of each expert of each row; -1: none."""
        self._num_rows = len(owners)
        wanted = wanted_by(owners, size)
        self.destinations, self.sent_rows = wanted.nonzero(as_tuple=True)
        self._send_counts: list[int] = wanted.sum(dim=1).tolist()
        self._recv_counts: list[int] = []

    def start(self, ep: Communicator, rows: Tensor) -> Callable[[], Tensor]:
        arriving = ep.start_all_to_all(rows, self._send_counts)

        def finish() -> Tensor:
            received, self._recv_counts = arriving()
            return received

        return finish

    def start_back(self, ep: Communicator, sums: Tensor) -> Callable[[], Tensor]:
        returning = ep.start_all_to_all(sums, self._recv_counts, self._send_counts)

        def finish() -> Tensor:
            returned, _ = returning()
            out = sums.new_zeros(self._num_rows, sums.shape[1], dtype=torch.float32)
            return out.index_add_(0, self.sent_rows, returned.float()).to(sums.dtype)

        return finish


class SlottedRows(SendPlan):
    """An all-to-all of `capacity` rows to every rank. Rows that do not fit are dropped and flagged."""

    def __init__(self, owners: Tensor, size: int, capacity: int, overflow: OverflowFlag) -> None:
        """owners [N, K] as for `CountedRows`. `capacity` must be equal on all ranks."""
        num_rows, device = len(owners), owners.device
        wanted = wanted_by(owners, size)
        places = wanted.cumsum(dim=1) - 1  # [n, N] index of each row among the rows for a rank
        if capacity < num_rows:
            overflow.add((wanted & (places >= capacity)).any())
        ranks, nowhere = torch.arange(size, device=device), size * capacity
        slots = (ranks[:, None] * capacity + places).masked_fill(~wanted | (places >= capacity), nowhere)
        rows = torch.arange(num_rows, device=device).repeat(size)
        filled = torch.full((nowhere + 1,), num_rows, device=device).scatter_(0, slots.flatten(), rows)
        self.sent_rows = filled[:-1]
        self.destinations = ranks.repeat_interleave(capacity, output_size=nowhere)
        # A row's sum is over the slots of its choices, counting each rank once. Other choices have a weight of 0 and
        # read the slot of the row's first choice, so that NaN of another row is never multiplied by 0.
        self._slots = slots.t().gather(1, owners.clamp(min=0))
        counts = (self._slots < nowhere) & (owners >= 0) & ~repeats(owners)
        self._slots = torch.where(counts, self._slots, self._slots[:, :1].clamp(max=nowhere - 1))
        self._counts = counts

    def start(self, ep: Communicator, rows: Tensor) -> Callable[[], Tensor]:
        return ep.start_even_all_to_all(rows)

    def start_back(self, ep: Communicator, sums: Tensor) -> Callable[[], Tensor]:
        returning = ep.start_even_all_to_all(sums)
        # embedding_bag adds rows up in fp32, in one order.
        return lambda: F.embedding_bag(
            self._slots, returning(), mode="sum", per_sample_weights=self._counts.to(sums.dtype)
        )


def wanted_by(owners: Tensor, size: int) -> Tensor:
    """[n, N] bool: which rows are sent to each ep rank."""
    ranks = torch.arange(size, device=owners.device)
    return (owners[None] == ranks[:, None, None]).any(dim=-1)


def repeats(owners: Tensor) -> Tensor:
    """[N, K] bool: whether an earlier choice of the row has the owner too."""
    same: Tensor = owners[:, :, None] == owners[:, None, :]
    return same.tril(diagonal=-1).any(dim=-1)
