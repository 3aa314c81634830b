"""The interface of collectives over one group of ranks, and its implementations.

`SingleCommunicator` is a group of one. `TorchCommunicator` uses a torch.distributed group (NCCL, or gloo, whose time
`GlooCommunicator` measures).
`StagedCommunicator` sends GPU tensors over the host, for ranks that share a GPU, which NCCL refuses.
`parallel/shared_memory.py` is the fast path for CPU ranks on one host. All of them add in the same order on every
rank, so that replicated tensors stay bit-identical.

Shapes: n = group size, T = rows (any trailing shape).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qwen3_dist.errors import EngineDeadError

T = TypeVar("T")


class Communicator(ABC):
    """One rank's end of a group. Every rank of the group must make the same calls in the same order."""

    kind = ""  # transport, in a word or two; a group of one needs none
    overlaps = False  # whether a started all-to-all proceeds while the rank computes
    excludes_others = False  # whether other groups must wait for a started all-to-all

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    @property
    def waited_s(self) -> float | None:
        """Seconds for which this rank has waited for others in the group's collectives so far; None if the host cannot
        know, since a GPU runs the collectives."""
        return None

    @property
    def progress(self) -> tuple[int, tuple[int, ...]]:
        """How many collectives this rank has entered, and which ranks of the world have not entered the last of them;
        0 and none where that cannot be seen. May be read from any thread."""
        return 0, ()

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Returns the sum of all ranks' `x`, on every rank. `x` may be overwritten."""

    def add_all_reduced(self, x: Tensor, partial: Tensor) -> Tensor:
        """Returns x + the sum of all ranks' `partial` [x's shape], on every rank. `partial` may be overwritten."""
        return x + self.all_reduce(partial)

    @abstractmethod
    def all_gather(self, x: Tensor) -> Tensor:
        """[T, ...] of equal shape on every rank -> [n * T, ...], in rank order."""

    def all_gather_columns(self, x: Tensor, columns: int) -> Tensor:
        """[T, C] of equal shape on every rank -> the first `columns` of [T, n * C], side by side in rank order."""
        if self.size == 1:
            return x
        parts = self.all_gather(x).view(self.size, *x.shape)
        return parts.transpose(0, 1).flatten(1)[:, :columns].contiguous()

    @abstractmethod
    def reduce_scatter(self, x: Tensor) -> Tensor:
        """[n * T, ...] -> [T, ...]: this rank's slice of the sum. `x` may be overwritten."""

    @abstractmethod
    def gather(self, x: Tensor) -> Tensor | None:
        """[T, C] of equal shape -> [T, n * C], side by side in rank order, on rank 0 of the group; None elsewhere."""

    @abstractmethod
    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x` on every rank; the others pass one of equal shape, which may be overwritten."""

    @abstractmethod
    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        """Sends consecutive runs of rows of `x`, `send_counts[r]` of them to rank r.

        Returns the rows received, in rank order, and how many came from each rank. Where the caller
        knows `recv_counts` already, passing them saves an exchange.
        """

    def start_all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None
    ) -> Callable[[], tuple[Tensor, list[int]]]:
        """Starts `all_to_all` and returns a function that waits for its result. `x` must not change before that."""
        received = self.all_to_all(x, send_counts, recv_counts)
        return lambda: received

    def start_even_all_to_all(self, x: Tensor) -> Callable[[], Tensor]:
        """Starts sending x [n * C, ...], C rows to each rank.

        Returns a function that waits for the received rows [n * C, ...], in rank order.
        """
        counts = [x.shape[0] // self.size] * self.size
        arriving = self.start_all_to_all(x, counts, counts)
        return lambda: arriving()[0]

    def in_kernel(self, kernel: Callable[[int, int], int]) -> bool:
        """Lets `kernel` run the group's all-reduces itself, if the group supports that. Returns whether it ran.

        It is given the group's address (0 for a group of one) and the number of its last operation, and returns
        the number of its own last one, or -1 if a rank was lost.
        """
        return False

    @abstractmethod
    def barrier(self) -> None:
        """Returns when every rank of the group has called it."""

    def refuse(self) -> None:
        """Has collectives that begin from now on raise EngineDeadError: in an aborted group they might wait for ever.
        May be called from any thread."""

    def close(self) -> None:
        """Frees what the group holds outside this process. Ranks that wait for this one in the group fail."""

    def become(self, other: Communicator) -> None:
        """Takes the place of a group that was closed: whoever holds this object uses the group of `other` from now on.
        Raises EngineDeadError if that is of another kind."""
        if type(self) is not type(other):
            raise EngineDeadError(f"ranks met over {other.kind} after they had met over {self.kind}")
        self.__dict__ = other.__dict__  # one state: what C++ calls back on `other` is seen here


class SingleCommunicator(Communicator):
    """A group of one: every collective is the identity."""

    def __init__(self) -> None:
        super().__init__(rank=0, size=1)

    @property
    def waited_s(self) -> float:
        return 0.0

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        return x

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        return x, list(send_counts)

    def in_kernel(self, kernel: Callable[[int, int], int]) -> bool:
        kernel(0, 0)
        return True

    def barrier(self) -> None:
        pass


class TorchCommunicator(Communicator):
    """Collectives of a torch.distributed process group."""

    overlaps = True

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(rank=dist.get_rank(group), size=dist.get_world_size(group))
        self._joined = group
        self._aborted = False
        self._device = device
        # torch.distributed: "Using multiple process groups with the NCCL backend concurrently is not safe".
        self.excludes_others = device.type == "cuda"
        self.kind = "NCCL" if device.type == "cuda" else "gloo"

    @property
    def _group(self) -> dist.ProcessGroup:
        if self._aborted:
            raise EngineDeadError("the group was aborted")
        return self._joined

    def refuse(self) -> None:
        self._aborted = True

    def all_reduce(self, x: Tensor) -> Tensor:
        if not x.numel():  # of an idle dp group, so on all its ranks; not every backend accepts it
            return x
        x = x.contiguous()
        dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        if out.numel():
            dist.all_gather_into_tensor(out, x.contiguous(), group=self._group)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        if out.numel():
            dist.reduce_scatter_tensor(out, x.contiguous(), group=self._group)
        return out

    def gather(self, x: Tensor) -> Tensor | None:
        parts = list(x.new_empty(self.size, *x.shape)) if self.rank == 0 else None
        dist.gather(x.contiguous(), parts, group=self._group, group_dst=0)
        return torch.cat(parts, dim=1) if parts else None

    def broadcast(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.broadcast(x, group=self._group, group_src=0)
        return x

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        return self.start_all_to_all(x, send_counts, recv_counts)()

    def start_all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None
    ) -> Callable[[], tuple[Tensor, list[int]]]:
        if recv_counts is None:
            sent = torch.tensor(list(send_counts), dtype=torch.int64, device=self._device)
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=self._group)
            recv_counts = received.tolist()
        recv_counts, send_counts = list(recv_counts), list(send_counts)
        x = x.contiguous()
        out = x.new_empty(sum(recv_counts), *x.shape[1:])
        work = dist.all_to_all_single(out, x, recv_counts, send_counts, group=self._group, async_op=True)

        def finish() -> tuple[Tensor, list[int]]:
            work.wait()
            assert x is not None  # keeps x alive until the rows are sent
            return out, recv_counts

        return finish

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, device=self._device))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class GlooCommunicator(TorchCommunicator):
    """Collectives of CPU tensors. A rank waits for the others, and for the network, in each."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group, torch.device("cpu"))
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        return self._waited_s

    def _waiting(self, collective: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return collective()
        finally:
            self._waited_s += time.perf_counter() - began

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._waiting(lambda: TorchCommunicator.all_reduce(self, x))

    def all_gather(self, x: Tensor) -> Tensor:
        return self._waiting(lambda: TorchCommunicator.all_gather(self, x))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self._waiting(lambda: TorchCommunicator.reduce_scatter(self, x))

    def gather(self, x: Tensor) -> Tensor | None:
        return self._waiting(lambda: TorchCommunicator.gather(self, x))

    def broadcast(self, x: Tensor) -> Tensor:
        return self._waiting(lambda: TorchCommunicator.broadcast(self, x))

    def start_all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None
    ) -> Callable[[], tuple[Tensor, list[int]]]:
        start = TorchCommunicator.start_all_to_all
        arriving = self._waiting(lambda: start(self, x, send_counts, recv_counts))
        return lambda: self._waiting(arriving)


class StagedCommunicator(Communicator):
    """Collectives of tensors on `device` through a group of their hosts: for checks, not for speed."""

    kind = "over the host"

    def __init__(self, host: Communicator, device: torch.device) -> None:
        super().__init__(host.rank, host.size)
        self._host = host
        self._device = device

    @property
    def waited_s(self) -> float | None:
        return self._host.waited_s

    @property
    def progress(self) -> tuple[int, tuple[int, ...]]:
        return self._host.progress

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._host.all_reduce(x.cpu()).to(self._device)

    def all_gather(self, x: Tensor) -> Tensor:
        return self._host.all_gather(x.cpu()).to(self._device)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self._host.reduce_scatter(x.cpu()).to(self._device)

    def gather(self, x: Tensor) -> Tensor | None:
        parts = self._host.gather(x.cpu())
        return None if parts is None else parts.to(self._device)

    def broadcast(self, x: Tensor) -> Tensor:
        return self._host.broadcast(x.cpu()).to(self._device)

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        rows, counts = self._host.all_to_all(x.cpu(), send_counts, recv_counts)
        return rows.to(self._device), counts

    def barrier(self) -> None:
        self._host.barrier()

    def close(self) -> None:
        self._host.close()
