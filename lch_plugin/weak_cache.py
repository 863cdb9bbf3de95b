"""What was found out about objects, for as long as they live."""

from __future__ import annotations

from typing import Any, TypeVar
from weakref import WeakKeyDictionary

V = TypeVar("V")


class WeakCache(WeakKeyDictionary[Any, V]):
    """A dictionary that keeps none of its keys alive. Sent to another process it starts empty."""

    def __reduce__(self) -> tuple[type[WeakCache[V]], tuple[()]]:
        # Weak references do not travel, and code that is sent by value takes its globals along.
        return type(self), ()
