"""N:M sparsity and k:block outlier patterns: parsing, arithmetic, nothing else."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import NMError

GROUP_WIDTHS = (4, 8, 16, 32)
LARGEST_OUTLIER_BLOCK = 256  # positions inside a block are stored in one byte


def _parse_ratio(text: str, what: str, example: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text) if isinstance(text, str) else None
    if match is None:
        raise NMError(f"{what} {text!r} is not of the form {example!r}.")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class NMPattern:
    """Keep `n` of every `m` consecutive input elements of a row; `n == m` means dense.

    Raises:
        NMError: `m` is not 4, 8, 16 or 32, or `n` is not in 1…m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if self.m not in GROUP_WIDTHS:
            raise NMError(f"pattern '{self.n}:{self.m}' has group width {self.m}; it must be one of 4, 8, 16, 32.")
        if not 1 <= self.n <= self.m:
            raise NMError(f"pattern '{self.n}:{self.m}' keeps {self.n} of {self.m}; N must be between 1 and M.")

    @classmethod
    def parse(cls, text: str | NMPattern) -> NMPattern:
        """Read `"8:16"`; an NMPattern passes through."""
        return text if isinstance(text, NMPattern) else cls(*_parse_ratio(text, "pattern", "8:16"))

    @property
    def density(self) -> float:
        return self.n / self.m

    @property
    def is_dense(self) -> bool:
        return self.n == self.m

    @property
    def code_bits(self) -> int:
        """Bits of one group's code, ⌈log2 C(m, n)⌉: 14 for 8:16, 0 when dense."""
        return (math.comb(self.m, self.n) - 1).bit_length()

    def groups(self, in_features: int) -> int:
        """Groups in a row; the last one may reach past `in_features`."""
        return -(-in_features // self.m)

    def stored_values(self, in_features: int) -> int:
        """Values stored per row."""
        return in_features if self.is_dense else self.groups(in_features) * self.n

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class OutlierPattern:
    """Keep the `k` most salient of every `block` consecutive input elements of a row outside the N:M budget.

    Raises:
        NMError: `block` is not in 1…256, or `k` is not in 1…block.
    """

    k: int
    block: int

    def __post_init__(self) -> None:
        if not 1 <= self.block <= LARGEST_OUTLIER_BLOCK:
            raise NMError(f"outliers '{self.k}:{self.block}' have block {self.block}; it must be between 1 and 256.")
        if not 1 <= self.k <= self.block:
            raise NMError(f"outliers '{self.k}:{self.block}' keep {self.k}; k must be between 1 and {self.block}.")

    @classmethod
    def parse(cls, text: str | OutlierPattern | None) -> OutlierPattern | None:
        """Read `"16:256"`; None (no outliers) and an OutlierPattern pass through."""
        if text is None or isinstance(text, OutlierPattern):
            return text
        return cls(*_parse_ratio(text, "outliers", "16:256"))

    def tail_count(self, in_features: int) -> int:
        """Outliers of a shorter last block: max(1, round(k·length/block)), half rounded up; 0 when there is none."""
        length = in_features % self.block
        return max(1, (2 * self.k * length + self.block) // (2 * self.block)) if length else 0

    def per_row(self, in_features: int) -> int:
        """Outliers stored per row."""
        return in_features // self.block * self.k + self.tail_count(in_features)

    def __str__(self) -> str:
        return f"{self.k}:{self.block}"
