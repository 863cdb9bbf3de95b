"""Threads that share a model with centroids take turns."""

from __future__ import annotations

import threading


class Turn:
    """Held by a pass from its beginning to its end; other threads wait for it.

    What a pass has open (gradients, hooks, values put aside) belongs to the model, which one thread
    at a time can run. Within a pass the same thread may run the model again.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()  # Copies of a model, pickled ones too, take turns of their own.
