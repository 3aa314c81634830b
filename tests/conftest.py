"""What must be so before any test module is imported."""

import os
import signal
import uuid
from pathlib import Path

from qwen3_dist.rank_env import openmp_environment
from tests.processes import RUN

os.environ[RUN] = uuid.uuid4().hex
os.environ.update(openmp_environment())  # engines in the tests' process wait as ranks do

if not Path("/dev/nvidia0").exists():  # Triton's kernels are interpreted without a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell's background job ignores Ctrl-C and so would all it starts, and there are tests of Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
