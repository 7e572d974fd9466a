"""Working through a matrix some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_ELEMENTS = 1 << 18  # a megabyte of float32


def row_blocks(rows: int, columns: int, elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Slices of the rows of a matrix, of so many elements or a row each.

    Intermediate results that small stay in the cache. Ones as large as the matrix would take memory that the system
    hands out page by page, which takes longer than computing what is in them.
    """
    count = max(1, elements // columns)
    for begin in range(0, rows, count):
        yield slice(begin, min(begin + count, rows))
