"""Do a piece of work once, however many threads ask for its result."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

__all__ = ["Once"]

_T = TypeVar("_T")


class Once:
    """Results by key, kept for the object's life. A failure is raised to all who waited, then forgotten."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[Hashable, Future[Any]] = {}

    def __call__(self, key: Hashable, work: Callable[[], _T]) -> _T:
        """`work()` by the first who asks; the others wait for it."""
        with self._lock:
            future = self._futures.get(key)
            mine = future is None
            if future is None:
                future = self._futures[key] = Future()
        if mine:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - passed on below, to everybody
                with self._lock:
                    del self._futures[key]
                future.set_exception(error)
        result: _T = future.result()
        return result
