"""Progress bars, if tqdm is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self


class Bar(Protocol):
    """The part of tqdm's interface that is used here."""

    n: float
    total: float | None

    def update(self, n: float = 1) -> Any: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: Any) -> Any: ...


class _NoBar:
    n: float = 0
    total: float | None = None

    def update(self, n: float = 1) -> None:
        self.n += n

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def progress_bar(enabled: bool, **options: Any) -> Bar:
    """A tqdm bar on stderr with these options; a bar that shows nothing if not `enabled` or without tqdm."""
    if not enabled:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    bar: Bar = tqdm(**options)
    return bar


@contextlib.contextmanager
def loading_bar(enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """A callback for the bytes that are loaded and those to load, which draws a bar on stderr."""
    with progress_bar(enabled, desc="loading weights", unit="B", unit_scale=True) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
