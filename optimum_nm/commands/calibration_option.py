"""The option --calibration, in which several sources and their shares can be named."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from ..errors import NMError


def add_calibration_option(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        nargs="+",
        default="wikitext2",
        metavar="SOURCE[=SHARE]",
        help="text to calibrate on: a text file, a .jsonl file with a text field, the dataset wikitext2 or c4, or "
        "'self', which the model writes; of several, each gives its share of the windows, as in self=0.5 c4=0.5, and "
        "equal ones if none is named",
    )


def read_calibration(given: str | list[str]) -> str | dict[str, float]:
    """What `NMOptimizer.optimize` takes, from what the option gives.

    Raises:
        NMError: a share is no number.
    """
    sources = [given] if isinstance(given, str) else given
    shares: dict[str, float] = {}
    for text in sources:
        source, separator, share = text.rpartition("=")
        if not separator or Path(text).is_file():
            source, share = text, "1"
        try:
            shares[source] = shares.get(source, 0.0) + float(share)
        except ValueError:
            raise NMError(
                f"calibration source {text!r} has share {share!r}; it must be a number, as in c4=0.5."
            ) from None
    return next(iter(shares)) if len(shares) == 1 else dict(shares)
