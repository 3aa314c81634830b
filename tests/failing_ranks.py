"""Functions for `Launcher.main`: ranks with a planted fault, or that tell what they were given."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from qwen3_dist.errors import CheckpointError, EngineDeadError
from qwen3_dist.parallel.communicator import GlooCommunicator
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.protocol.messages import RankSpec
from qwen3_dist.worker import rank
from qwen3_dist.worker.rank import rank_main
from qwen3_dist.worker.runner import ModelRunner
from qwen3_dist.worker.sleep import SleepingMemory


def rank_1_runs_out_of_memory(spec: RankSpec) -> None:
    """In its second step, while rank 0 waits for it; to leave the process groups would take for ever."""
    if spec.rank == 1:
        steps, launch = [], ModelRunner.launch

        def fails(runner: ModelRunner, plan: Any) -> Any:
            steps.append(plan)
            if len(steps) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")
            return launch(runner, plan)

        ModelRunner.launch = fails  # type: ignore[method-assign]
        dist.destroy_process_group = lambda: time.sleep(1000)
    rank_main(spec)


def rank_1_lacks_memory_every_other_time_it_wakes(spec: RankSpec) -> None:
    if spec.rank == 1:
        lacks, wake = cycle((True, False)), SleepingMemory.wake

        def wakes(memory: SleepingMemory) -> str:
            return "it needs 3.00 GiB" if next(lacks) else wake(memory)

        SleepingMemory.wake = wakes  # type: ignore[method-assign]
    rank_main(spec)


def rank_1_fails_before_it_says_anything(spec: RankSpec) -> None:
    if spec.rank == 1:
        raise OSError("No route to host\nthat engine")
    rank_main(spec)


def rank_1_ends_before_it_says_anything(spec: RankSpec) -> None:
    if spec.rank == 1:
        os._exit(7)
    rank_main(spec)


def rank_0_cannot_meet_others(spec: RankSpec) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("The server socket has failed to listen")

    dist.TCPStore = refuses  # type: ignore[misc]
    rank_main(spec)


def ranks_whose_groups_are_never_left(spec: RankSpec) -> None:
    dist.destroy_process_group = lambda: time.sleep(1000)
    rank_main(spec)


def tells_its_environment(spec: RankSpec) -> None:
    """A rank whose runner answers `joined_with`: what was set when the process groups were made, and of OpenMP, which
    reads it earlier, when the rank's process began."""
    seen: list[Any] = []
    timeouts: list[Any] = []
    start, new_group = dist.init_process_group, dist.new_group

    def starts(*arguments: Any, **options: Any) -> None:
        seen.extend((os.environ.get("NCCL_IB_HCA"), os.environ.get("GLOO_SOCKET_IFNAME")))
        start(*arguments, **options)

    def makes_group(*arguments: Any, **options: Any) -> Any:
        timeouts.append(options.get("timeout"))
        return new_group(*arguments, **options)

    dist.init_process_group, dist.new_group = starts, makes_group
    began = dict(entry.partition("=")[::2] for entry in Path("/proc/self/environ").read_text().split("\0"))
    ModelRunner.joined_with = lambda _: (*seen, began.get("GOMP_SPINCOUNT"), timeouts)  # type: ignore[attr-defined]
    rank_main(spec)


def notes_its_end(spec: RankSpec) -> None:
    """A rank that writes beside the checkpoint in which order it drops its graphs and leaves its groups."""
    note = Path(spec.config.model) / f"end-{spec.rank}"
    drop_graphs, leave = ModelRunner.close, ParallelContext.close

    def drops_graphs(runner: ModelRunner, keeps_model: bool) -> None:
        note.write_text("graphs ")
        drop_graphs(runner, keeps_model)

    def leaves(parallel: ParallelContext) -> None:
        with note.open("a") as file:
            file.write("groups")
        leave(parallel)

    ModelRunner.close, ParallelContext.close = drops_graphs, leaves  # type: ignore[method-assign]
    rank_main(spec)


def rank_1_ends_as_it_loads(spec: RankSpec) -> None:
    """By an EOFError of its own, such as a cut file gives."""

    def cut(*_: Any) -> None:
        raise EOFError("the file ends early")

    if spec.rank == 1:
        rank.load_shard = cut  # type: ignore[assignment]
    rank_main(spec)


def ranks_over_gloo(spec: RankSpec) -> None:
    """As ranks of several hosts are."""
    ParallelContext.connect = partial(ParallelContext.connect, shared_memory=False)  # type: ignore[method-assign]
    rank_main(spec)


def ranks_that_wait_as_in_nccl(spec: RankSpec) -> None:
    """A collective that another rank does not enter, since it was lost, waits until its groups are aborted; one that
    would begin after that, for ever."""
    ends: list[threading.Event] = []

    def waits(_: GlooCommunicator, collective: Any) -> Any:
        results: list[Any] = []
        end = threading.Event()
        ends.append(end)

        def run() -> None:
            with contextlib.suppress(RuntimeError), torch.inference_mode():
                with contextlib.suppress(EngineDeadError):  # of a collective that is refused after the abort
                    results.append(collective())
                end.set()

        threading.Thread(target=run, daemon=True).start()
        end.wait()
        ends.remove(end)
        if not results:
            raise RuntimeError("aborted")
        return results[0]

    def abort() -> None:
        dist.destroy_process_group()
        for end in ends:
            end.set()

    distributed_c10d._abort_process_group = abort  # type: ignore[assignment]
    GlooCommunicator._waiting = waits  # type: ignore[method-assign]
    ParallelContext._uses_nccl = property(lambda _: dist.is_initialized())  # type: ignore[assignment, method-assign]
    ranks_over_gloo(spec)


def rank_1_sleeps_in_a_step(spec: RankSpec) -> None:
    """In its fourth step, for ever; its other threads run on."""
    if spec.rank == 1:
        steps, launch = [], ModelRunner.launch

        def sleeps(runner: ModelRunner, plan: Any) -> Any:
            steps.append(plan)
            if len(steps) == 4:
                time.sleep(100_000)
            return launch(runner, plan)

        ModelRunner.launch = sleeps  # type: ignore[method-assign]
    rank_main(spec)


def rank_1_sleeps_in_a_step_over_gloo(spec: RankSpec) -> None:
    ParallelContext.connect = partial(ParallelContext.connect, shared_memory=False)  # type: ignore[method-assign]
    rank_1_sleeps_in_a_step(spec)


def ranks_that_end_in_their_first_step(spec: RankSpec) -> None:
    ModelRunner.launch = lambda *_: os._exit(9)  # type: ignore[method-assign,assignment]
    rank_main(spec)


def refused(spec: RankSpec) -> bool:
    """Whether a file beside the checkpoint says that no rank may start."""
    return (Path(spec.config.model) / "refused").exists()


def ranks_that_end_while_refused(spec: RankSpec) -> None:
    if refused(spec):
        os._exit(7)
    rank_main(spec)


def ranks_that_end_and_wait_as_in_nccl(spec: RankSpec) -> None:
    """Which end while they are refused."""
    if refused(spec):
        os._exit(7)
    ranks_that_wait_as_in_nccl(spec)


def ranks_that_sleep_while_refused(spec: RankSpec) -> None:
    """As an actor for which Ray finds no room."""
    while refused(spec):
        time.sleep(0.1)
    rank_main(spec)


def ranks_that_cannot_load_while_refused(spec: RankSpec) -> None:
    if refused(spec):

        def unreadable(*_: Any) -> None:
            raise CheckpointError("model.safetensors cannot be read")

        rank.load_shard = unreadable  # type: ignore[assignment]
    rank_main(spec)


def rank_2_ends_as_it_starts_and_others_while_refused(spec: RankSpec) -> None:
    if refused(spec) or (spec.attempt and spec.rank == 2):
        os._exit(7)
    rank_main(spec)
