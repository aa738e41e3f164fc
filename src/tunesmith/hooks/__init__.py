"""What happens beside the loop: log, evaluate, checkpoint, tell of ranks that are gone."""

from tunesmith.hooks.base import Hook
from tunesmith.hooks.checkpoint import Checkpoint
from tunesmith.hooks.evaluate import Evaluate
from tunesmith.hooks.log import Log
from tunesmith.hooks.ranks import Ranks

__all__ = ["Checkpoint", "Evaluate", "Hook", "Log", "Ranks"]
