"""Which keys each rank's queries can see, and who sends them: the exchange of the strategies ``fetch`` and ``ring``.

A rank holds runs of rows. What the queries of a run can see is an interval of rows: their request, as far back and
ahead as the mask's rule reaches. Every rank knows the layout, and so what all others need of it. Source: the group-cast
of MagiAttention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from sp_compile.kernels.pieces import SMALL
from sp_compile.kernels.regions import BOX
from sp_compile.layout import TokenLayout

FEWEST = 2  # rows that code is generated for
TOGETHER = math.isqrt(BOX)  # queries of short requests that are computed with one another


class Reach(NamedTuple):
    """Which tokens of its row a query sees at most.

    Attributes:
        back: so many of itself and those before it; None for no bound.
        ahead: so many of those behind it; None for no bound.
    """

    back: int | None
    ahead: int | None


class Fetch(NamedTuple):
    """What a rank fetches for some attentions.

    Attributes:
        reach: how far their queries see.
        stage: from the ranks that are so many before it in the circle of all, from the first to before the end; None
            for all others, whose rows then come behind the rank's own.
    """

    reach: Reach
    stage: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        """What the index inputs of its keys are called."""
        return "reach" if self.stage is None else "stage"

    def comes(self, source: int, rank: int, sp: int) -> bool:
        """Whether rows of one rank come to another."""
        first, end = self.stage or (1, sp)
        return first <= (rank - source) % sp < end


STAGES = 8  # of a ring at most: every one is an attention of its own in the graph


def ring_stages(sp: int) -> list[tuple[int, int]]:
    """The stages in which keys and values of the other ranks come in a ring, nearest first.

    >>> ring_stages(4), ring_stages(12)[:2]
    ([(1, 2), (2, 3), (3, 4)], [(1, 3), (3, 5)])
    """
    size = -(-(sp - 1) // STAGES)
    return [(first, min(first + size, sp)) for first in range(1, sp, size)]


@lru_cache(maxsize=256)
def fetched_rows(layout: TokenLayout, rank: int, fetch: Fetch, apart: bool) -> tuple[np.ndarray, ...]:
    """What a rank sends and receives.

    Args:
        apart: no query sees another request.

    Returns:
        Its local rows that others need, by destination, int64 ``[sent]``; how many go to each and come from each, int64
        ``[2, sp]``; and the normal-order rows that it receives, by their rank, int64 ``[received]``.
    """
    nothing = np.zeros(0, dtype=np.int64)

    def crossing(source: int, target: int) -> np.ndarray:
        """Places among the rows of one rank that come to another."""
        if not fetch.comes(source, target, layout.sp):
            return nothing
        return _within(rows_of(layout, source), _intervals(layout, target, fetch.reach, apart))

    sent = [crossing(rank, i) for i in range(layout.sp)]
    found = [rows_of(layout, i)[crossing(i, rank)] for i in range(layout.sp)]
    counts = np.asarray([[len(each) for each in part] for part in (sent, found)], dtype=np.int64)
    return np.concatenate(sent), counts, np.concatenate(found)


def index_inputs(layout: TokenLayout, rank: int, fetches: Sequence[Fetch], apart: bool) -> dict[str, torch.Tensor]:
    """Index inputs for programs that fetch keys, on the host; see :func:`fetched_rows`."""
    found: dict[str, np.ndarray] = {}
    for i, fetch in enumerate(fetches):
        sent, counts, received = fetched_rows(layout, rank, fetch, apart)
        real = np.arange(max(FEWEST, len(received))) < len(received)
        rows = padded(received)
        found |= {f"fetch_rows_{i}": padded(sent), f"fetch_counts_{i}": counts, f"fetched_rows_{i}": rows}
        if fetch.stage is None:
            rows = np.concatenate([layout.local_index[rank].numpy(), rows])
            real = np.concatenate([layout.valid[rank].numpy(), real])
        found |= {f"{fetch.kind}_index_{i}": rows, f"{fetch.kind}_valid_{i}": real}
    return {name: torch.from_numpy(each) for name, each in found.items()}


@lru_cache(maxsize=64)
def received(layout: TokenLayout, reach: Reach, apart: bool) -> int:
    """Rows that the rank which needs most receives."""
    found = 0
    for rank in range(layout.sp):
        intervals = _intervals(layout, rank, reach, apart)  # in ascending order
        begins = np.maximum(intervals[:, 0], np.append(0, np.maximum.accumulate(intervals[:-1, 1])))
        seen = int(np.maximum(intervals[:, 1] - begins, 0).sum())
        found = max(found, seen - layout.tokens_per_rank[rank])
    return found


@lru_cache(maxsize=64)
def exchanged(layout: TokenLayout, fetch: Fetch, apart: bool) -> tuple[int, int]:
    """Rows that the rank which sends most sends, and that the one which gets most receives."""
    counts = [fetched_rows(layout, rank, fetch, apart)[1].sum(axis=1) for rank in range(layout.sp)]
    sent, come = np.max(counts, axis=0).tolist()
    return sent, come


@lru_cache(maxsize=64)
def seen_pairs(layout: TokenLayout, reach: Reach, apart: bool) -> tuple[int, ...]:
    """Pairs of query and key that each rank's queries can see."""
    return tuple(int(np.diff(_seen(layout, rank, reach, apart)).sum()) for rank in range(layout.sp))


@lru_cache(maxsize=64)
def seen_parts(layout: TokenLayout, reach: Reach, apart: bool) -> tuple[float, ...]:
    """Parts of the scores that each rank's queries are computed in: one for the keys of a request on each rank.

    A part of fewer than :data:`TOGETHER` queries counts as a share of one, since its neighbours are computed with it.
    """
    edges = np.cumsum(layout.lengths)
    found = []
    for rank in range(layout.sp):
        rows, runs = rows_of(layout, rank), _intervals(layout, rank, reach, apart)
        own = np.searchsorted(edges, rows, side="right")
        shares = np.minimum(1.0, np.bincount(own, minlength=len(edges)) / TOGETHER)
        of_run = own[_run_begins(rows, own)]
        parts = 0.0
        for source in range(layout.sp):
            keys = rows_of(layout, source)
            some = np.searchsorted(keys, runs[:, 0]) < np.searchsorted(keys, runs[:, 1])
            parts += float(shares[np.unique(of_run[some])].sum())
        found.append(parts)
    return tuple(found)


@lru_cache(maxsize=64)
def short_runs(layout: TokenLayout) -> bool:
    """Whether rows of a rank that follow one another in a request are few, on average over ranks."""
    request = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
    rows = [rows_of(layout, rank) for rank in range(layout.sp)]
    runs = sum(len(_run_begins(each, request[each])) for each in rows)
    return layout.tokens < SMALL * runs


@lru_cache(maxsize=64)
def whole_on_ranks(layout: TokenLayout) -> bool:
    """Whether every request lies whole on one rank."""
    request = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
    holders = sum(len(np.unique(request[rows_of(layout, rank)])) for rank in range(layout.sp))
    return holders == len(layout.lengths)


def rows_of(layout: TokenLayout, rank: int) -> np.ndarray:
    """Normal-order rows of a rank, ascending."""
    rows: np.ndarray = layout.local_index[rank].numpy()[: layout.tokens_per_rank[rank]]
    return rows


def _seen(layout: TokenLayout, rank: int, reach: Reach, apart: bool) -> np.ndarray:
    """Rows that each of a rank's queries can see: int64 ``[rows, 2]`` of first and end."""
    rows = rows_of(layout, rank)
    edges = np.append(0, np.cumsum(layout.lengths if apart else [layout.tokens]))
    request = np.searchsorted(edges[1:], rows, side="right")
    low, high = edges[request], edges[request + 1]
    if reach.back is not None:
        low = np.maximum(low, rows - reach.back + 1)
    if reach.ahead is not None:
        high = np.minimum(high, rows + 1 + reach.ahead)
    return np.stack([low, high], axis=1)


@lru_cache(maxsize=1024)
def _intervals(layout: TokenLayout, rank: int, reach: Reach, apart: bool) -> np.ndarray:
    """Rows that a rank's queries can see: int64 ``[runs, 2]`` of first and end, which may overlap."""
    rows, seen = rows_of(layout, rank), _seen(layout, rank, reach, apart)
    request = np.searchsorted(np.cumsum(layout.lengths), rows, side="right")
    begins = _run_begins(rows, request)
    ends = np.append(begins[1:], len(rows))[: len(begins)] - 1
    return np.stack([seen[begins, 0], seen[ends, 1]], axis=1)


def _run_begins(rows: np.ndarray, request: np.ndarray) -> np.ndarray:
    """Places where a run of consecutive rows of one request begins."""
    found: np.ndarray = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | (np.diff(request, prepend=-1) != 0))
    return found


def _within(rows: np.ndarray, intervals: np.ndarray) -> np.ndarray:
    """Places of ascending rows that lie in any interval."""
    steps = np.zeros(len(rows) + 1, dtype=np.int64)
    np.add.at(steps, np.searchsorted(rows, intervals[:, 0]), 1)
    np.add.at(steps, np.searchsorted(rows, intervals[:, 1]), -1)
    return np.flatnonzero(np.cumsum(steps)[:-1] > 0)


def padded(rows: np.ndarray) -> np.ndarray:
    """Code is generated for any number of rows from 2 on; what is too much is not used."""
    return np.pad(rows, (0, max(0, FEWEST - len(rows))))
