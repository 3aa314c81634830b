"""What tests of whole engines share: small checkpoints, and runs of kernels on a card that is not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.forks import Forks
from tests.interpreted import remember
from tests.swapping import tokens_of, versions  # noqa: F401
from tests.threads import engines_of_one_thread, two_threads  # noqa: F401


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
        "tests.fake_gpu",
        "tests.fake_gpu_moves",
        "tests.fake_serving",
        "benchmarks.compare.checkpoints",
        "torch._dynamo",
    )
    forks = Forks(*modules, env={"TRITON_INTERPRET": "0"})
    yield forks
    forks.close()


@pytest.fixture(autouse=True)
def fast_interpreter() -> None:
    """As soon as a test module or an earlier test has imported Triton's interpreter."""
    if "triton.runtime.interpreter" in sys.modules:
        remember()
