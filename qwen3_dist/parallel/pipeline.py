"""Sends hidden states from a pipeline stage to the next. Each rank has one peer in the stage before and one after."""

from __future__ import annotations

import time
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

_MOST_UNDERWAY = 4  # unfinished sends before the oldest is awaited


class Pipeline:
    """Stage `index` of a pipeline of `size` stages, and the global ranks of this rank's peers `before` and `after`.

    Between CPUs a send returns at once, so that a stage can start its next micro-batch before the next stage has
    received the last. With NCCL the stream (not the host) waits until the rows are received, since no other group may
    be used during a send. `host`: tensors go over the host.
    """

    def __init__(
        self,
        index: int = 0,
        size: int = 1,
        before: int = -1,
        after: int = -1,
        host: bool = False,
    ) -> None:
        self.index, self.size = index, size
        self._before, self._after, self._host = before, after, host
        self._underway: deque[tuple[dist.Work, Tensor]] = deque()
        self.waited_s: float | None = 0.0  # for other stages so far; None if the host cannot know

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.size - 1

    def forget(self) -> None:
        """Forgets sends to a stage that is gone."""
        self._underway.clear()

    def send(self, x: Tensor) -> None:
        """Sends `x` [rows, D] to the next stage. On a CPU `x` must not change afterwards."""
        x = x.contiguous()
        x = x.cpu() if self._host else x
        work = dist.isend(x, self._after)
        assert work is not None
        if x.is_cuda:
            work.wait()
            return
        self._underway.append((work, x))
        if len(self._underway) > _MOST_UNDERWAY:
            began = time.perf_counter()
            self._underway.popleft()[0].wait()
            self._add_wait(x, began)

    def receive(self, rows: int, template: Tensor) -> Tensor:
        """Receives [rows, D] from the stage before, with the device and dtype of `template` [D]."""
        x = torch.empty(
            rows, template.shape[0], dtype=template.dtype, device="cpu" if self._host else template.device
        )
        began = time.perf_counter()
        dist.recv(x, self._before)
        self._add_wait(x, began)
        return x.to(template.device)

    def _add_wait(self, x: Tensor, began_s: float) -> None:
        if x.is_cuda or self.waited_s is None:
            self.waited_s = None
        else:
            self.waited_s += time.perf_counter() - began_s
