"""Sends activations from a pipeline stage to the next: each rank has one rank before it and one after."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

_MOST_UNDERWAY = 4  # sends that may be under way before the oldest is waited for


class Pipeline:
    """A rank's place in its pipeline of `size` stages, and its neighbours' global ranks.

    Between CPUs a send returns at once, so that a stage goes on with its next micro-batch while the one after it
    still has the last. On NCCL the stream waits until the next stage has taken the rows (the host does not), since no
    other group may be used while a send is under way. `host` says that tensors must go over the host.
    """

    def __init__(
        self,
        stage: int = 0,
        size: int = 1,
        before: int = -1,
        after: int = -1,
        host: bool = False,
    ) -> None:
        self.stage, self.size = stage, size
        self._before, self._after, self._host = before, after, host
        self._underway: deque[tuple[dist.Work, Tensor]] = deque()

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.size - 1

    def send(self, x: Tensor) -> None:
        """Has the next stage's `receive` return `x`. On a CPU it must not change from now on."""
        x = x.contiguous()
        x = x.cpu() if self._host else x
        work = dist.isend(x, self._after)
        assert work is not None
        if x.is_cuda:
            work.wait()
            return
        self._underway.append((work, x))
        if len(self._underway) > _MOST_UNDERWAY:
            self._underway.popleft()[0].wait()

    def receive(self, rows: int, template: Tensor) -> Tensor:
        """The [rows, D] that the stage before sent, where and of what dtype `template` [D] is."""
        x = torch.empty(
            rows, template.shape[0], dtype=template.dtype, device="cpu" if self._host else template.device
        )
        dist.recv(x, self._before)
        return x.to(template.device)
