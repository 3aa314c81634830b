"""Ranks as processes of this host, without Ray: for one machine, tests, and GPU boxes that have none."""

from __future__ import annotations

import pickle
import subprocess
import sys

from qwen3_dist.errors import ResourceError
from qwen3_dist.executor.in_process import local_device
from qwen3_dist.executor.rank import RankSpec, rank_main
from qwen3_dist.executor.rank_group import Launcher
from qwen3_dist.settings import EngineConfig

_END_WAIT_S = 5.0


class ProcessLauncher(Launcher):
    """One fresh Python interpreter per rank, told what to do on its standard input.

    Not `multiprocessing`: its spawn would import the caller's `__main__` again in every rank.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.host = "127.0.0.1"
        self.device = local_device(config.device)
        if self.device == "cuda":
            _check_gpus(config.layout.world)
        self._processes: list[subprocess.Popen[bytes]] = []

    def launch(self, specs: list[RankSpec]) -> None:
        for spec in specs:
            process = subprocess.Popen(
                [sys.executable, "-m", "qwen3_dist.executor.processes"], stdin=subprocess.PIPE
            )
            self._processes.append(process)
            assert process.stdin is not None
            process.stdin.write(pickle.dumps(spec))
            process.stdin.close()

    def exit_reason(self) -> str | None:
        codes = [process.poll() for process in self._processes]
        ended = [f"process of rank {rank} ended with code {code}" for rank, code in enumerate(codes) if code]
        return ended[0] if ended else None

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(_END_WAIT_S)
        self._processes = []


def _check_gpus(world: int) -> None:
    import torch

    if torch.cuda.device_count() < world:
        raise ResourceError(
            f"{world} ranks need {world} GPUs and this host has {torch.cuda.device_count()}; "
            "use a smaller layout or device=cpu"
        )


if __name__ == "__main__":
    rank_main(pickle.loads(sys.stdin.buffer.read()))
