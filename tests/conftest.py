"""What must be so before any test module is imported, and the process from which ranks are forked."""

import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import certifi
import pytest

from qwen3_dist.rank_env import openmp_environment
from tests.processes import RUN

os.environ[RUN] = uuid.uuid4().hex
os.environ.update(openmp_environment())  # engines in the tests' process wait as ranks do

# Each client of httpx and openai reads all certificates that it trusts, for 24 ms of CPU time: let there be one.
_certificate, _end, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----")
_trusted = tempfile.NamedTemporaryFile("w", suffix=".pem")  # noqa: SIM115 - as long as this process
_trusted.write(_certificate + _end)
_trusted.flush()
os.environ["SSL_CERT_FILE"] = _trusted.name

if not Path("/dev/nvidia0").exists():  # Triton's kernels are interpreted without a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell's background job ignores Ctrl-C and so would all it starts, and there are tests of Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def nursery() -> Iterator[None]:
    """Engines of the module start their ranks from the process that `run_ranks` uses too."""
    from qwen3_dist.launch import processes
    from tests.ranks import kept_nursery

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_shared", kept_nursery())
        yield
