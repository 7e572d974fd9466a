"""What torchrun and `accelerate launch` tell the processes that they start."""

from __future__ import annotations

import os


def launched_processes() -> int:
    """How many they started; 1 for a process that was started alone."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))
