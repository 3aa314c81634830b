"""The process groups of a rank, created once per process and passed explicitly to every layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Thread

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from qwen3_dist.layout import Layout, RankCoords
from qwen3_dist.parallel.communicator import (
    Communicator,
    GlooCommunicator,
    SingleCommunicator,
    StagedCommunicator,
    TorchCommunicator,
)
from qwen3_dist.parallel.dispatch import DispatchOptions
from qwen3_dist.parallel.native_shared_memory import fastest_communicator
from qwen3_dist.parallel.pipeline import Pipeline
from qwen3_dist.parallel.shared_memory import connect_shared_memory

_DEFAULT_DISPATCH = DispatchOptions()


@dataclass(frozen=True)
class ParallelContext:
    """One rank's coordinates in a layout and its communicators, all within its pipeline stage.

    `tp`: ranks of the same dp group. `dp`: ranks with the same heads in all dp groups. `ep`: ranks with the same
    columns of other experts. `etp`: ranks with other columns of the same experts.
    """

    layout: Layout
    coords: RankCoords
    tp: Communicator
    dp: Communicator
    ep: Communicator
    etp: Communicator
    pipeline: Pipeline
    staged: bool = False  # whether collectives go over the host
    dispatch: DispatchOptions = _DEFAULT_DISPATCH
    deterministic: bool = False  # whether each sum is computed whole by one rank

    @classmethod
    def single(cls, deterministic: bool = False) -> ParallelContext:
        """The context of an unsharded model."""
        alone = SingleCommunicator()
        layout = Layout()
        groups = alone, alone, alone, alone
        return cls(layout, layout.coords(0), *groups, Pipeline(), deterministic=deterministic)

    @classmethod
    def connect(
        cls,
        layout: Layout,
        rank: int,
        store: dist.Store,
        device: torch.device,
        timeout_s: float = 300.0,
        shared_memory: bool = True,
        staged: bool = False,
        dispatch: DispatchOptions = _DEFAULT_DISPATCH,
        deterministic: bool = False,
    ) -> ParallelContext:
        """Joins the other ranks of `layout` through `store`: NCCL on GPUs, else shared memory or gloo.

        Every rank of the world must call this. `shared_memory=False` forces gloo between CPU ranks. `staged` sends
        tensors of any device over the host, for ranks that share a GPU.
        """
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and not staged else "gloo"
        host = torch.device("cpu") if staged else device
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=layout.world, timeout=timedelta(seconds=timeout_s)
        )
        mine: dict[tuple[int, ...], Communicator] = {}
        for members in _all_groups(layout):
            communicator = _join(members, rank, host, timeout_s, shared_memory)
            if communicator is not None:
                wrapped = staged and communicator.size > 1
                mine[members] = StagedCommunicator(communicator, device) if wrapped else communicator
        tp, dp, ep, etp = (mine[members] for members in _groups_of(layout, rank))
        at, stage_size = layout.coords(rank), layout.stage_size
        if dispatch.by_capacity is None:
            dispatch = replace(dispatch, by_capacity=device.type == "cuda")
        pipeline = Pipeline(at.stage, layout.pp, rank - stage_size, rank + stage_size, host=staged)
        return cls(layout, at, tp, dp, ep, etp, pipeline, staged, dispatch, deterministic)

    @property
    def collectives(self) -> str:
        """The transport of this rank's collectives, in a few words."""
        groups = set(self._groups)
        kinds = sorted({group.kind for group in groups} - {""})
        if self.pipeline.size > 1 and not kinds:
            kinds = ["over the host" if self.staged else "NCCL" if self._uses_nccl else "gloo"]
        return " and ".join(kinds) or "none: one rank"

    @property
    def waited_s(self) -> float | None:
        """Seconds for which this rank has waited for other ranks so far; None if the host cannot know."""
        parts = [group.waited_s for group in set(self._groups)]
        known = [part for part in (*parts, self.pipeline.waited_s) if part is not None]
        return sum(known) if len(known) > len(parts) else None

    @property
    def progress(self) -> tuple[int, tuple[int, ...]]:
        """How many collectives in shared memory this rank has entered, and the ranks that it awaits in one. May be
        read from any thread."""
        parts = [group.progress for group in set(self._groups)]
        awaited = {rank for _, behind in parts for rank in behind}
        return sum(entered for entered, _ in parts), tuple(sorted(awaited))

    def become(self, other: ParallelContext) -> None:
        """Takes the place of a context that was closed: everything built with it uses the groups of `other`, of the
        same rank and layout. Raises EngineDeadError if they are of other kinds."""
        replaced = {mine: theirs for mine, theirs in zip(self._groups, other._groups, strict=True)}
        for mine, theirs in replaced.items():
            mine.become(theirs)

    def with_tp_of(self, closed: ParallelContext) -> ParallelContext:
        """This context with the tp communicator of a `closed` one in place of its own: what was built with that uses
        the tp group of this context from now on."""
        closed.tp.become(self.tp)
        tp, dp, ep, etp = (closed.tp if group is self.tp else group for group in self._groups)
        return replace(self, tp=tp, dp=dp, ep=ep, etp=etp)

    @property
    def _uses_nccl(self) -> bool:
        return not self.staged and dist.is_initialized() and "nccl" in dist.get_backend()

    @property
    def _groups(self) -> tuple[Communicator, ...]:
        return self.tp, self.dp, self.ep, self.etp

    def abort(self) -> None:
        """Ends the collectives that wait inside NCCL for a lost rank, with void results, and leaves NCCL's groups;
        collectives that begin later raise EngineDeadError. May be called from any thread. Elsewhere collectives fail
        by themselves when a rank is lost.
        """
        if self._uses_nccl:
            for group in set(self._groups):
                group.refuse()
            # torch aborts one group after the other, each in a thread of its own, which its ncclGroupStart does not
            # reach. The first may wait for the card, and so for the kernel of a later one.
            joined = tuple(distributed_c10d._world.pg_names)
            aborts = [Thread(target=each.abort, daemon=True) for each in joined]
            for abort in aborts:
                abort.start()
            for abort in aborts:
                abort.join()
            distributed_c10d._abort_process_group()  # forgets them

    def close(self) -> None:
        """Leaves all groups. Ranks that wait for this one in a collective fail."""
        self.pipeline.forget()  # what holds a group keeps its connections open
        for communicator in set(self._groups):
            communicator.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _groups_of(layout: Layout, rank: int) -> tuple[tuple[int, ...], ...]:
    """The members of the tp, dp, ep and etp group of `rank`, in group-rank order."""
    at = layout.coords(rank)
    stage = [layout.coords(r) for r in range(layout.world) if layout.coords(r).stage == at.stage]
    tp = tuple(c.rank for c in stage if c.group == at.group)
    dp = tuple(c.rank for c in stage if c.tp_rank == at.tp_rank)
    ep = tuple(c.rank for c in stage if c.etp_rank == at.etp_rank)
    etp = tuple(c.rank for c in stage if c.ep_rank == at.ep_rank)
    return tp, dp, ep, etp


def _all_groups(layout: Layout) -> Iterable[tuple[int, ...]]:
    """Every distinct group of the layout, in one order on all ranks (creating groups is collective)."""
    return sorted({members for rank in range(layout.world) for members in _groups_of(layout, rank)})


def _join(
    members: tuple[int, ...], rank: int, device: torch.device, timeout_s: float, shared_memory: bool
) -> Communicator | None:
    if len(members) == 1:
        return SingleCommunicator() if rank in members else None
    group = dist.new_group(list(members), timeout=timedelta(seconds=timeout_s))
    if rank not in members:
        return None
    if device.type == "cpu" and shared_memory:
        communicator = connect_shared_memory(group, fastest_communicator(), timeout_s=timeout_s)
        if communicator is not None:
            return communicator
    return GlooCommunicator(group) if device.type == "cpu" else TorchCommunicator(group, device)
