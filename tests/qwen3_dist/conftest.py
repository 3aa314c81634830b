"""What tests of whole engines share: small checkpoints, and one process from which their ranks are forked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3_dist.launch import processes
from tests.checkpoints import write_checkpoint
from tests.forks import Forks
from tests.ranks import kept_nursery


@pytest.fixture(scope="module")
def nursery() -> Iterator[None]:
    """Engines of the module start their ranks from the process that `run_ranks` uses too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_shared", kept_nursery())
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "dense": write_checkpoint(tmp_path_factory.mktemp("dense"), moe=False),
        "moe": write_checkpoint(tmp_path_factory.mktemp("moe"), moe=True, mlp_only_layers=[1]),
    }


@pytest.fixture(scope="session")
def fake_cards() -> Iterator[Forks]:
    """Runs of `tests.fake_gpu` and its like, whose kernels Triton compiles."""
    modules = (
        "tests.fake_gpu_moves",
        "tests.fake_serving",
        "benchmarks.compare.checkpoints",
        "torch._dynamo",
    )
    forks = Forks(*modules, env={"TRITON_INTERPRET": "0"})
    yield forks
    forks.close()
