"""How many kernels Triton has compiled in this process.

Triton compiles a kernel anew for each combination of constants, dtypes, and of arguments' alignment and divisibility.
One compilation takes about a second, in which no sequence gets a token, so all are to happen before a rank is ready.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

compiled: Counter[str] = Counter()  # variants by the name of the kernel


def compiled_kernels() -> int:
    """Variants of Triton kernels compiled in this process so far, those from Triton's cache on disk included.

    0 where Triton is not installed.
    """
    return compiled.total()


def count_compilations() -> None:
    """Counts every compilation from now on. Needs Triton; a second call changes nothing."""
    from triton import knobs

    before = knobs.runtime.jit_post_compile_hook
    if getattr(before, "counts", False):
        return

    def after_compilation(**info: Any) -> Any:
        compiled[info["fn"].name.rpartition(".")[2]] += 1
        return before(**info) if before is not None else None

    after_compilation.counts = True  # type: ignore[attr-defined]
    knobs.runtime.jit_post_compile_hook = after_compilation
