"""Ranks in which something is planted, to be started in place of `rank_main`. Nurseries import it, so it is light."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from qwen3_dist.model import feed_forward
from qwen3_dist.model.feed_forward import MoEFeedForward
from qwen3_dist.model.rope import RopeTables
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.dispatch import DispatchOptions
from qwen3_dist.protocol.messages import RankSpec
from qwen3_dist.weights import hub
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.loader import ExpertReader
from qwen3_dist.worker import rendezvous
from qwen3_dist.worker.rank import rank_main
from qwen3_dist.worker.sampling.grammar_matcher import Grammars

SLOW_S = 0.05  # added to each step of a slow rank


def rank_that_reads_when_told(spec: RankSpec) -> None:
    """Rank 1 reads experts once a file `go` lies beside the checkpoint; all note how often they read headers."""
    folder = Path(spec.config.model).parent
    read, open_files = ExpertReader.read, CheckpointFiles.__init__

    def waiting(self: ExpertReader, *arguments: object) -> object:
        (folder / f"reads-{spec.rank}").touch()
        while spec.rank == 1 and not (folder / "go").exists():
            time.sleep(0.002)
        return read(self, *arguments)  # type: ignore[arg-type]

    def noting(self: CheckpointFiles, path: Path) -> None:
        with (folder / f"opened-{spec.rank}").open("a") as notes:
            notes.write("x")
        open_files(self, path)

    ExpertReader.read = waiting  # type: ignore[method-assign, assignment]
    CheckpointFiles.__init__ = noting  # type: ignore[method-assign, assignment]
    close = ParallelContext.close

    def ending(self: ParallelContext) -> None:
        close(self)
        (folder / f"ended-{spec.rank}").touch()  # the engine waits no longer than until the channel closes

    ParallelContext.close = ending  # type: ignore[method-assign]
    rank_main(spec)


def rank_that_cannot_read(spec: RankSpec) -> None:
    """Rank 1 cannot read experts while a file `broken` lies beside the checkpoint."""
    read = ExpertReader.read

    def failing(self: ExpertReader, *arguments: object) -> object:
        if spec.rank == 1 and (Path(spec.config.model).parent / "broken").exists():
            raise MemoryError("planted")
        return read(self, *arguments)  # type: ignore[arg-type]

    ExpertReader.read = failing  # type: ignore[method-assign, assignment]
    rank_main(spec)


def rank_that_fails_to_switch(spec: RankSpec) -> None:
    move = MoEFeedForward.move

    def failing(self: MoEFeedForward, *arguments: object) -> None:
        if spec.rank == 1:
            raise MemoryError("planted")
        move(self, *arguments)  # type: ignore[arg-type]

    MoEFeedForward.move = failing  # type: ignore[method-assign, assignment]
    rank_main(spec)


def rank_on_a_disk_of_its_own(spec: RankSpec) -> None:
    """A rank whose disk has another file of loads, and a hub cache whose branch has moved on."""
    from huggingface_hub import constants

    assert spec.config.expert_load is not None
    cache = Path(spec.config.expert_load).parent / "hub"
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(cache), True
    (cache / "models--org--name" / "refs" / "main").write_text("b" * 40)
    Path(spec.config.expert_load).unlink(missing_ok=True)
    find = hub.snapshot_of

    def noting(*arguments: object) -> Path | None:
        with (cache / f"asked-{spec.rank}").open("a") as notes:
            notes.write("x")
        return find(*arguments)  # type: ignore[arg-type]

    hub.snapshot_of = noting  # type: ignore[assignment]
    rank_main(spec)


def rank_that_builds_when_told(spec: RankSpec) -> None:
    """Grammars are built once a file `go` lies beside the checkpoint."""
    folder, build = Path(spec.config.model).parent, Grammars._build

    def waiting(self: Grammars, grammar: str) -> object:
        (folder / f"building-{spec.rank}").touch()
        while not (folder / "go").exists():
            time.sleep(0.002)
        return build(self, grammar)

    Grammars._build = waiting  # type: ignore[method-assign, assignment]
    rank_main(spec)


def rank_with_room_for_few_rows(spec: RankSpec) -> None:
    """Experts' rows travel in slots, as on a GPU, with room for a third of them: most steps overflow."""
    rendezvous.DispatchOptions = partial(DispatchOptions, by_capacity=True)  # type: ignore[attr-defined, misc]
    feed_forward.capacity = lambda layout, config, rows: -(-rows // 3)  # type: ignore[attr-defined]
    rank_main(spec)


def rank_of_which_the_second_is_slow(spec: RankSpec) -> None:
    """Rank 1 sleeps in each step, between two collectives."""
    rows = RopeTables.rows

    def slow(self: RopeTables, *arguments: object) -> object:
        if spec.rank == 1:
            time.sleep(SLOW_S)
        return rows(self, *arguments)  # type: ignore[arg-type]

    RopeTables.rows = slow  # type: ignore[method-assign, assignment]
    rank_main(spec)
