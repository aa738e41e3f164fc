"""The folder for files that can be made anew."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$TUNESMITH_CACHE, else $XDG_CACHE_HOME/tunesmith, else ~/.cache/tunesmith. It need not exist yet."""
    chosen = os.environ.get("TUNESMITH_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tunesmith"
