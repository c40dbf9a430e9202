"""Being told to stop by SIGTERM, as when the time of a job is over: a run then reports what it has."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_told = threading.Event()


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Within it SIGTERM ends nothing, but is `told`; in the main thread only."""
    before = signal.signal(signal.SIGTERM, lambda *_: _told.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _told.clear()


def told() -> bool:
    """Whether it has been told."""
    return _told.is_set()
