"""Ctrl-C and SIGTERM: finish the step, save, say how to go on. A second Ctrl-C stops at once."""

from __future__ import annotations

import signal
from time import monotonic
from types import FrameType, TracebackType
from typing import Any, Self

REPEAT_S = 1.0
"""A signal that comes so soon again is the same: schedulers send one to every process, and launchers pass theirs on."""


class StopRequest:
    """A context in which the first SIGINT or SIGTERM only sets a flag; calling the object asks for it."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.time_s = 0.0
        self.before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.signal is None:  # else the same signal may come once more, and must not hit what is done after saving
            self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.time_s = signal.Signals(number), monotonic()
        elif monotonic() - self.time_s > REPEAT_S:
            self._restore()
            signal.raise_signal(number)
