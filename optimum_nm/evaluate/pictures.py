"""Pictures with matplotlib, the extra [report]."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NMError
from .whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Raise NMError, before anything is measured, unless pictures can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NMError("matplotlib is not installed; `pip install 'optimum-nm[report]'` brings it.") from None


def save_picture(figure: Figure, file: Path, dpi: int = 120) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        NMError: the file cannot be written.
    """
    with whole_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
