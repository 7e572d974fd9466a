"""Memory of this process."""

from __future__ import annotations

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
