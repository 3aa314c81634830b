"""Reads many regions of a checkpoint, several files at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Event

import torch
from torch import Tensor

from qwen3_dist.weights.file_reader import FileReader, Read
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.parts import Index

_THREADS = 16  # some wait for the disk while others copy


@dataclass(frozen=True)
class Region:
    """`out`, of any device and dtype, becomes source[index]."""

    source: str
    index: Index
    out: Tensor


def read_regions(files: CheckpointFiles, regions: Sequence[Region], advance: Callable[[int], object]) -> None:
    """Fills all regions, on a GPU on this thread's stream. Each of several threads reads a run of them, in the order
    of the files: so they read several files at once, each from its beginning to its end.

    `advance` is called, on this thread, with numbers of bytes of the regions. Raises CheckpointError as soon as one
    cannot be read.
    """
    failed = Event()
    device = next((region.out.device for region in regions), torch.device("cpu"))
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    done: SimpleQueue[int | None] = SimpleQueue()

    def reads_of(run: Sequence[Region]) -> Iterator[Read]:
        for region in run:
            item = region.out.element_size()
            for read in files.reads(region.source, region.index, region.out, partial(tell, item)):
                if failed.is_set():
                    return
                yield read

    def tell(item: int, elements: int) -> None:
        done.put(elements * item)

    @torch.inference_mode()  # a setting of each thread, without which tensors made in it cannot be written to
    def read(run: Sequence[Region]) -> None:
        reader = FileReader()
        if stream is not None:
            torch.cuda.set_device(device)  # else the thread goes back to card 0, whose memory that takes
        try:
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                reader.run(reads_of(run))
        except BaseException:
            failed.set()
            raise
        finally:
            reader.close()
            done.put(None)

    with ThreadPoolExecutor(_THREADS, "weights") as pool:
        reads = [pool.submit(read, run) for run in _runs(files, regions)]
        left = len(reads)
        try:
            while left:
                if (size := done.get()) is None:
                    left -= 1
                else:
                    advance(size)
        except BaseException:  # of `advance`, as when the engine is gone
            failed.set()
            raise
        for each in wait(reads).done:
            each.result()


def _runs(files: CheckpointFiles, regions: Sequence[Region]) -> Iterator[list[Region]]:
    """Runs of about as many bytes each."""
    ordered = sorted(regions, key=lambda region: files.place(region.source, region.index))
    share = sum(region.out.nbytes for region in ordered) / _THREADS
    run: list[Region] = []
    size = 0
    for region in ordered:
        run.append(region)
        size += region.out.nbytes
        if size >= share:
            yield run
            run, size = [], 0
    if run:
        yield run
