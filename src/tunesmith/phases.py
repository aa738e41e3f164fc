"""Names for what a run is doing at the moment, for whoever watches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

Watcher = Callable[[str], AbstractContextManager[None]]
"""Called with a phase's name; what it returns is entered at its beginning and left at its end."""

_watchers: list[Watcher] = []


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Inside, the run does this: forward, logits, backward, update, evaluation, reference, generation,
    saving; host, disk: it puts aside what waits there."""
    with ExitStack() as stack:
        for watcher in _watchers:
            stack.enter_context(watcher(name))
        yield


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside, the watcher hears of phases."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
