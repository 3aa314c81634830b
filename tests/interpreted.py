"""Makes Triton's interpreter faster: most of its time it finds out again what it has found before."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def remember() -> None:
    """From now on, in this process, the interpreter remembers what it replaces, and what types are."""
    _replace_once_in_a_launch()
    _keep_types()


def _replace_once_in_a_launch() -> None:
    """And not again in each call of a function by a kernel."""
    import triton.language as tl
    from triton.runtime import interpreter

    scopes: list[Any] = []
    replaced = interpreter._patch_lang

    class Everywhere:
        """Has the modules in which `_patch_lang` replaces functions, as the globals of a kernel."""

        __globals__ = {"tl": tl, "core": tl.core}

    def once(fn: Any) -> Any:
        if not scopes:
            scope = replaced(Everywhere)
            restore = scope.restore
            scope.restore = lambda: (scopes.clear(), restore())
            scopes.append(scope)
        return scopes[0]

    interpreter._patch_lang = once


def _keep_types() -> None:
    """By their names. Equal types of blocks have one dictionary of attributes, and with it those of their tensors."""
    from triton.language import core
    from triton.runtime import interpreter

    numpys: dict[str, Any] = {}
    find_numpys, make_block, make_tensor = (
        interpreter._get_np_dtype,
        core.block_type.__init__,
        core.tensor.__init__,
    )
    made: dict[tuple[Any, ...], dict[str, Any]] = {}

    def numpys_dtype(dtype: Any) -> Any:
        if dtype.name not in numpys:
            numpys[dtype.name] = find_numpys(dtype)
        return numpys[dtype.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in made:
            make_block(self, element_ty, shape)
            made[key] = self.__dict__
        self.__dict__ = made[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("of_tensors")
        if known is None:
            make_tensor(self, handle, type)
            type.of_tensors = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = known

    interpreter._get_np_dtype = numpys_dtype
    core.block_type.__init__, core.tensor.__init__ = block, tensor
