"""Regions of the scores, and making few of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

UNBOUNDED = 1 << 40
BLOCK = 128  # queries and keys of a block of FlexAttention, torch's default
BOX = 1 << 12  # elements that are looked at in one go


@dataclass(frozen=True)
class Region:
    """Queries ``[q_start, q_end)`` by keys ``[k_start, k_end)``, of which a band is seen.

    Attributes:
        row: the batch row, -1 for all.
        low, high: row i of the region sees column j where ``low <= j - i <= high``; ``UNBOUNDED`` for no bound.
        masked: the mask is no band; its elements decide.
    """

    row: int
    q_start: int
    q_end: int
    k_start: int
    k_end: int
    low: int = -UNBOUNDED
    high: int = UNBOUNDED
    masked: bool = False

    @property
    def rows(self) -> slice:
        """The rows of the batch."""
        return batch_rows(self.row)

    @property
    def full(self) -> bool:
        """Whether every query sees every key."""
        return not self.masked and self.low == -UNBOUNDED and self.high == UNBOUNDED


def batch_rows(row: int) -> slice:
    """A row of the batch, or all for -1."""
    return slice(row, row + 1) if row >= 0 else slice(None)


def as_tensor(regions: Sequence[Region]) -> torch.Tensor:
    """The plan as an op returns it, int64 ``[regions, 8]``: the fields of :class:`Region`."""
    return torch.tensor([list(vars(each).values()) for each in regions], dtype=torch.int64).reshape(-1, 8)


def as_regions(plan: torch.Tensor) -> list[Region]:
    """The regions of a plan."""
    return [
        Region(row, q_start, q_end, k_start, k_end, low, high, bool(masked))
        for row, q_start, q_end, k_start, k_end, low, high, masked in plan.tolist()
    ]


def joined(regions: list[Region], across_queries: bool = True) -> list[Region]:
    """Regions without a band of the same queries that lie side by side become one, then those of the same keys."""
    across = _chained(regions, lambda each: (each.masked, each.q_start, each.q_end), ("k_start", "k_end"))
    if not across_queries:
        return across
    return _chained(across, lambda each: (each.masked, each.k_start, each.k_end), ("q_start", "q_end"))


def boxed(regions: list[Region]) -> list[Region]:
    """Small regions that follow one another become one, whose elements decide: a call costs more than to look at them.

    Regions that share queries stay together, so that no box reaches into another region.
    """
    found: list[Region] = []
    box: list[Region] = []
    for shared in _sharing_queries(regions):
        if box and _area(_box([*box, *shared])) > BOX:
            found += box if len(box) == 1 else [_box(box)]
            box = []
        if len(shared) == 1 or _area(_box(shared)) <= BOX:
            box += shared
        else:
            found += shared
    if box:
        found += box if len(box) == 1 else [_box(box)]
    return found


def _sharing_queries(regions: list[Region]) -> Iterator[list[Region]]:
    """Regions whose queries overlap, together, in the order of the queries."""
    shared: list[Region] = []
    end = 0
    for each in sorted(regions, key=lambda region: region.q_start):
        if shared and each.q_start >= end:
            yield shared
            shared = []
        shared.append(each)
        end = max(end, each.q_end)
    if shared:
        yield shared


def _box(regions: Sequence[Region]) -> Region:
    return Region(
        regions[0].row,
        min(each.q_start for each in regions),
        max(each.q_end for each in regions),
        min(each.k_start for each in regions),
        max(each.k_end for each in regions),
        masked=True,
    )


def _area(region: Region) -> int:
    return (region.q_end - region.q_start) * (region.k_end - region.k_start)


def _chained(regions: list[Region], key: Any, side: tuple[str, str]) -> list[Region]:
    start, end = side
    open_runs: dict[Any, Region] = {}
    done = []
    for each in sorted(regions, key=lambda region: getattr(region, start)):
        if not (each.full or each.masked):
            done.append(each)
            continue
        before = open_runs.get(key(each))
        if before is not None and getattr(before, end) == getattr(each, start):
            each = replace(before, **{end: getattr(each, end)})
        elif before is not None:
            done.append(before)
        open_runs[key(each)] = each
    return done + list(open_runs.values())
