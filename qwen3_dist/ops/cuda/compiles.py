"""Counts the kernels that Triton has compiled in this process.

Triton compiles a variant of a kernel for each combination of constants, dtypes, and alignment and divisibility of
arguments. A compilation takes about a second and delays all sequences, so all must happen before a rank is ready.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

compiled: Counter[str] = Counter()  # variants by the name of the kernel


def compiled_kernels() -> int:
    """The number of kernel variants compiled in this process so far, including those loaded from Triton's disk cache.

    0 if Triton is not installed.
    """
    return compiled.total()


def count_compilations() -> None:
    """Starts counting compilations. Needs Triton; a second call has no effect."""
    from triton import knobs

    before = knobs.runtime.jit_post_compile_hook
    if getattr(before, "counts", False):
        return

    def after_compilation(**info: Any) -> Any:
        compiled[info["fn"].name.rpartition(".")[2]] += 1
        return before(**info) if before is not None else None

    after_compilation.counts = True  # type: ignore[attr-defined]
    knobs.runtime.jit_post_compile_hook = after_compilation
