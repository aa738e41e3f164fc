"""What happens beside the loop: log, evaluate, checkpoint."""

from tunesmith.hooks.base import Hook
from tunesmith.hooks.checkpoint import Checkpoint
from tunesmith.hooks.evaluate import Evaluate
from tunesmith.hooks.log import Log

__all__ = ["Checkpoint", "Evaluate", "Hook", "Log"]
