"""How many threads compute in the tests' process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def engines_of_one_thread() -> Iterator[None]:
    """Engines in this process compute with one thread: small models gain nothing by two, which wait for each other
    several times in a step, and for a core while other lanes of `make test` have both."""
    from qwen3_dist.worker import shard

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "cores", lambda: 1)
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Kernels share their work between threads, whatever engine ran before in this process."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
