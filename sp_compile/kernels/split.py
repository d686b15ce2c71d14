"""Keys of a cache in parts, so that few queries give a GPU enough to do: which blocks of keys are in which part.

Source: FlashDecoding, https://pytorch.org/blog/flash-decoding. Queries of any number are rows that all parts see::

    blocks of keys        0 1 2 3 4 5       part 0: 0 1    part 1: 2 3    part 2: 4 5
    rows 0..127 see       x x x x x x

Where each request has one new token, a query sees keys of its own, and a part is that of a query::

    query 0 sees          x x x x . .       part 0: 0 1 of query 0    part 1: 2 3 of query 0
    query 1 sees          . . . . x .       part 2: 4 of query 1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sp_compile.kernels.flex import blocks, flagged
from sp_compile.kernels.regions import BLOCK
from sp_compile.kernels.runs import Seen, numbered, seen_within

AT_ONCE = 256  # programs, two for each of a large GPU's processors
WIDTH = 64  # numbers of blocks are kept in lists of so many, so that their size seldom changes


def split_count(rows: int, keys: int, heads: int) -> Any:
    """Into how many parts keys are split so that a GPU has enough to do: as many as it runs blocks of queries at once.

    The sizes may be symbols. There are two parts at least, since code for one would be other code.
    """
    of_queries = heads * ((rows + BLOCK - 1) // BLOCK)
    return torch.sym_max(2, torch.sym_min(AT_ONCE // of_queries, (keys + BLOCK - 1) // BLOCK))


def split_blocks(listed: np.ndarray, queries: int, rows: int, splits: int) -> np.ndarray:
    """The blocks of keys that each block of rows sees, dealt to splits in runs of about as many.

    Args:
        listed: from :func:`~sp_compile.kernels.flex.block_mask`, of one row of the batch.
        queries: of which the rows are copies, one after another.

    Returns:
        int32 ``[splits, row blocks, 2, 2 + key blocks of a split]``, listed alike.
    """
    partial, full = flagged(listed[0]).swapaxes(0, 1)
    numbers = np.arange(rows)
    pairs = np.unique(numbers // BLOCK * len(full) + numbers % queries // BLOCK)  # blocks of rows and of their queries
    begins = np.searchsorted(pairs // len(full), np.arange(-(-rows // BLOCK)))
    some, every = (reduce.reduceat(of[pairs % len(full)], begins, axis=0)
                   for reduce, of in ((np.logical_or, partial | full), (np.logical_and, full)))  # fmt: skip
    found = np.zeros((splits, blocks(rows), 2, 2 + -(-full.shape[1] // splits)), dtype=np.int32)
    for block, touched in enumerate(some):
        seen = np.flatnonzero(touched)
        edges = (np.arange(splits + 1) * len(seen) + splits - 1) // splits
        for split in range(splits):
            part = seen[edges[split] : edges[split + 1]]
            whole = every[block, part]
            for kind, chosen in enumerate((part[~whole], part[whole])):
                found[split, block, kind, 0] = len(chosen)
                found[split, block, kind, 1 : 1 + len(chosen)] = chosen
    return found


def spare_parts(keys: int, heads: int) -> Any:
    """How many parts there are besides one for each query, where each is on its own; the sizes may be symbols."""
    return torch.sym_max(1, torch.sym_min(AT_ONCE // heads, (keys + BLOCK - 1) // BLOCK))


def part_size(keys: int, runs: int, spare: int) -> Any:
    """Blocks that a part of one query's keys has at most; the sizes may be symbols."""
    touched = (keys + BLOCK - 1) // BLOCK + 2 * runs  # a run begins and ends within blocks
    return ((touched + spare - 1) // spare + WIDTH - 1) // WIDTH * WIDTH


def query_blocks(
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
    queries: int,
    keys: int,
    runs: torch.Tensor,
    parts: int,
    size: int,
) -> np.ndarray:
    """The blocks of keys that each query sees, in parts of about as many.

    Args:
        operands, tables, rule, valid: as of :func:`~sp_compile.kernels.flex.block_mask`.
        runs: int64 ``[runs, 4]``, ranges outside of which no query sees a key, each of one query.
        parts: ``queries + spare_parts``.
        size: from :func:`part_size`.

    Returns:
        int32 ``[parts, 1, 3, 2 + size]``: of each part, partial and full blocks of keys, listed as of ``block_mask``,
        and whose query it is; behind that, of the query with the number of the part, its first part and how many.
    """
    each = runs.numpy()
    each = each[(each[:, 0] < each[:, 1]) & (each[:, 2] < each[:, 3])]
    query, block, full = _touched(seen_within(each, operands, tables, rule, valid), blocks(keys))
    own = np.bincount(query, minlength=queries)
    at_most = max(1, -(-len(query) // (parts - queries)))
    assert at_most <= size, "a run is of one query, and keys are in one run"
    counts = -(-own // at_most)
    begins = np.cumsum(counts) - counts
    _, nth = numbered(own)
    listed = (begins[query] + nth * counts[query] // np.maximum(own, 1)[query]) * 2 + full  # part and kind
    order = np.argsort(listed, kind="stable")
    lengths = np.bincount(listed, minlength=2 * parts)
    of, place = numbered(lengths)
    found = np.zeros((parts, 1, 3, 2 + size), dtype=np.int32)
    found[:, 0, :2, 0] = lengths.reshape(parts, 2)
    found[of // 2, 0, of % 2, 1 + place] = block[order]
    found[: counts.sum(), 0, 2, 0] = np.repeat(np.arange(queries), counts)
    found[:queries, 0, 2, 1:3] = np.stack([begins, counts], axis=1)
    return found


def _touched(seen: Seen, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries and blocks of which something is seen, in order, and whether all is."""
    some = seen.by_any > 0
    numbers, at = np.unique(seen.query[some] * width + seen.block[some], return_inverse=True)
    keys = np.bincount(at, weights=seen.by_all[some], minlength=len(numbers))
    return numbers // width, numbers % width, keys == BLOCK
