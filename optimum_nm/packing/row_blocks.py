"""Working through a matrix some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

BLOCK_ELEMENTS = 1 << 18  # a megabyte of float32


def row_blocks(rows: int, columns: int, elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Slices of the rows of a matrix, of so many elements or a row each.

    Intermediate results that small stay in the cache. Ones as large as the matrix would take memory that the system
    hands out page by page, which takes longer than computing what is in them.
    """
    count = max(1, elements // columns)
    for begin in range(0, rows, count):
        yield slice(begin, min(begin + count, rows))


def for_row_blocks(function: Callable[[slice], None], rows: int, columns: int, elements: int = BLOCK_ELEMENTS) -> None:
    """Call a function with each of `row_blocks`, on as many threads as torch uses; it records no gradients.

    Choosing and packing is a chain of small steps, most of which numpy and torch do on one thread.

    Raises:
        whatever the function raises, of the first block that fails.
    """
    blocks = list(row_blocks(rows, columns, elements))
    threads = min(torch.get_num_threads(), len(blocks))

    @torch.no_grad()
    def call(block: slice) -> None:
        function(block)

    if threads == 1:
        for block in blocks:
            call(block)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(call, blocks):
            pass
