"""`python -m qwen3_dist.ops.cpu` builds the CPU kernels ahead of their first use."""

import sys

from qwen3_dist.ops.cpu.build import library

if __name__ == "__main__":
    built = library()
    print(f"kernels: {built.name if built else 'torch'}", file=sys.stderr)
