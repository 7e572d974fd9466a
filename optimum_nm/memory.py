"""Memory of this process."""

from __future__ import annotations

import ctypes
import resource
import sys
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


def keep_freed_memory(largest: int = 1 << 30, kept: int = (1 << 31) - 1) -> None:
    """Have the allocator use again what is freed, where it is glibc's.

    By default it gives what is larger than 32 MB back to the system, and intermediate results of that size come page by
    page every time, which takes longer than computing what is in them.

    Args:
        largest: bytes of an allocation that is still not the system's.
        kept: bytes at the end of the heap that may stay free.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, largest)
        mallopt(_TRIM_THRESHOLD, kept)
