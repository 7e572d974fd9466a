"""Memory of this process."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from pathlib import Path


def memory_bytes() -> tuple[int, int]:
    """Memory of this process in RAM: now and at most; where the system only tells the latter, twice that."""
    status = Path("/proc/self/status")
    if not status.exists():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return most, most
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now, most = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_NEVER_TRIM = (1 << 31) - 1


def keep_freed_memory(largest: int = 1 << 29) -> None:
    """Have the allocator use again what is freed, until `release_freed_memory`, where it is glibc's.

    By default it gives what is larger than 32 MB back to the system, and intermediate results of that size come page by
    page every time, which takes longer than computing what is in them.

    Args:
        largest: bytes of an allocation to which this applies.
    """
    if (mallopt := _of_glibc("mallopt")) is not None:
        mallopt(_MMAP_THRESHOLD, largest)
        mallopt(_TRIM_THRESHOLD, _NEVER_TRIM)


def release_freed_memory() -> None:
    """Give back to the system what is freed, between steps that need much and in different pieces."""
    if (malloc_trim := _of_glibc("malloc_trim")) is not None:
        malloc_trim(0)


def _of_glibc(function: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
