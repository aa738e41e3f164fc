"""What a hook is: called after every step, and free to look at everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from tunesmith.learner import Learner


class Hook(Protocol):
    """`step` counts the updates done so far; `metrics` are those of the last one."""

    def __call__(self, step: int, metrics: Mapping[str, Tensor], learner: Learner) -> None: ...
