"""Few calls of fused kernels for many regions of the scores.

A call costs some microseconds on the host, and only large ones fill a GPU. So the small regions of the same queries
become one rectangle, over all their keys in a row, and rectangles are packed into calls of many. What is large is a
call of its own, which reads keys where they are.

Letters: B batch, Q queries, K keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch

from sp_compile.kernels import fused
from sp_compile.kernels.fused import EVERYTHING, Lengths, Window
from sp_compile.kernels.regions import UNBOUNDED, Region, as_regions
from sp_compile.lasting import lasting

COPIES = 2  # of the keys, which a call may make; the two chunks of a zigzag rank see little more than all keys
KEPT = 16  # plans whose calls are kept, at most one for each kind of mask of a batch

Run = tuple[int, int]  # a first row, and the end


class Rows(NamedTuple):
    """Rows of a tensor: a range, or any by their numbers.

    Attributes:
        range: where they follow one another.
        numbers: int64, where they do not.
    """

    range: slice
    numbers: torch.Tensor | None = None

    def of(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """These rows of a tensor, a view where they follow one another."""
        if self.numbers is not None:
            return tensor.index_select(dim, self.numbers)
        return tensor.narrow(dim, self.range.start, self.range.stop - self.range.start)

    def put(self, tensor: torch.Tensor, part: torch.Tensor, dim: int = 0) -> None:
        """Write these rows."""
        if self.numbers is not None:
            tensor.index_copy_(dim, self.numbers, part.to(tensor.dtype))
        else:
            self.of(tensor, dim).copy_(part)

    def add(self, tensor: torch.Tensor, part: torch.Tensor) -> None:
        """Add to these rows, some of which may be there more than once."""
        if self.numbers is not None:
            tensor.index_add_(0, self.numbers, part.to(tensor.dtype))
        else:
            self.of(tensor).add_(part)


@dataclass(frozen=True)
class Rectangle:
    """Queries of a row of the batch, and runs of keys that are seen as if they followed one another.

    Attributes:
        row: of the batch, -1 for all.
        queries: of the row.
        keys: of the row.
        window: around the diagonal that ends in the corner of the last query and the last key.
    """

    row: int
    queries: Run
    keys: tuple[Run, ...]
    window: Window

    @property
    def runs(self) -> tuple[Sequence[Run], ...]:
        """Rows of queries, keys and values."""
        return (self.queries,), self.keys, self.keys

    @property
    def sizes(self) -> tuple[int, int]:
        """How many queries and keys there are."""
        return _size(self.queries), sum(map(_size, self.keys))


@dataclass(frozen=True)
class Call:
    """Rectangles with queries of their own, under one window.

    Attributes:
        batch: rows of the batch.
        lengths: queries and keys of a row of the batch.
        device: of the rows' numbers.
    """

    rectangles: tuple[Rectangle, ...]
    window: Window
    batch: int
    lengths: tuple[int, int]
    device: torch.device

    @cached_property
    def queries(self) -> Rows:
        """Rows of ``[B * Q]``."""
        return self._rows([(each.row, [each.queries]) for each in self.rectangles], self.lengths[0])

    @cached_property
    def keys(self) -> Rows:
        """Rows of ``[B * K]``."""
        return self._rows([(each.row, each.keys) for each in self.rectangles], self.lengths[1])

    @cached_property
    def apart(self) -> list[Call]:
        """Each rectangle as a call of its own."""
        if len(self.rectangles) == 1:
            return [self]
        return [replace(self, rectangles=(each,), window=each.window) for each in self.rectangles]

    @property
    def rows(self) -> tuple[Rows, Rows, Rows]:
        """Those of queries, keys and values."""
        return self.queries, self.keys, self.keys

    @cached_property
    @lasting
    def packed(self) -> Lengths:
        """Where the sequences begin and end."""
        sizes = np.asarray([each.sizes for each in self.rectangles])
        ends = torch.from_numpy(np.concatenate([np.zeros((1, 2), dtype=np.int64), sizes.cumsum(axis=0)]))
        ends = ends.to(self.device, torch.int32)
        return Lengths(ends[:, 0].contiguous(), ends[:, 1].contiguous(), *sizes.max(axis=0).tolist())

    @lasting
    def _rows(self, parts: Sequence[tuple[int, Sequence[Run]]], length: int) -> Rows:
        """Runs of a row of the batch, or of every row, as rows of all of so many each."""
        starts = [(each * length, runs) for row, runs in parts for each in (range(self.batch) if row < 0 else [row])]
        found = _adjoined([(first + start, first + end) for first, runs in starts for start, end in runs])
        if len(found) == 1:
            return Rows(slice(*found[0]))
        return Rows(slice(0), torch.from_numpy(np.concatenate([np.arange(*each) for each in found])).to(self.device))


@dataclass(frozen=True)
class Calls:
    """All regions of a plan.

    Attributes:
        calls: those that are bands.
        masked: regions whose elements decide.
        fresh: for each call, whether no query of it is in an earlier one.
        complete: every query is in a fresh call, and none in a call that is fresh in part.
    """

    calls: tuple[Call, ...]
    masked: tuple[Region, ...]
    fresh: tuple[bool, ...]
    complete: bool


def calls_of(plan: torch.Tensor, batch: int, lengths: tuple[int, int], device: torch.device) -> Calls:
    """The calls for a plan, made once for all layers.

    Args:
        plan: int64 ``[regions, 8]`` on the host.
        lengths: queries and keys of a row of the batch.
    """
    return _calls_of(plan.numpy().tobytes(), batch, lengths, device)


@lru_cache(maxsize=KEPT)
def _calls_of(plan: bytes, batch: int, lengths: tuple[int, int], device: torch.device) -> Calls:
    regions = as_regions(torch.from_numpy(np.frombuffer(plan, dtype=np.int64).reshape(-1, 8).copy()))
    alone, small = list[Rectangle](), list[Rectangle]()
    groups: dict[tuple[int, Run], list[Region]] = {}
    for each in regions:
        if not each.masked:
            groups.setdefault((each.row, (each.q_start, each.q_end)), []).append(each)
    for group in groups.values():
        for rectangle in _joined(group):
            queries, keys = rectangle.sizes
            if queries * keys >= fused.PLANNED:
                alone.append(rectangle)
            else:
                small += [replace(rectangle, row=row) for row in range(batch)] if rectangle.row < 0 else [rectangle]
    packs = [([each], each.window) for each in alone]
    packs += _packed(sorted(small, key=lambda each: (each.row, each.queries)), COPIES * batch * lengths[1])
    calls = tuple(Call(tuple(rectangles), window, batch, lengths, device) for rectangles, window in packs)
    written, fresh, complete = np.zeros((batch, lengths[0]), dtype=bool), [], True
    for call in calls:
        spans = [(each.row if each.row >= 0 else slice(None), slice(*each.queries)) for each in call.rectangles]
        some, every = any(written[span].any() for span in spans), all(written[span].all() for span in spans)
        fresh.append(not some)
        complete &= every or not some
        for span in spans:
            written[span] = True
    masked = tuple(each for each in regions if each.masked)
    return Calls(calls, masked, tuple(fresh), complete and bool(written.all()))


def windowed(region: Region) -> tuple[Region, Window] | None:
    """A region that is a band as a rectangle with a window, without rows and columns that see nothing.

    None where nothing is seen.
    """
    low, high = region.low, region.high
    rows, columns = region.q_end - region.q_start, region.k_end - region.k_start
    top = max(0, -high)  # rows that end before the first column, and columns that start before the first row
    left = max(0, low + top)
    rows, columns = rows - top, columns - left
    low, high = low + top - left, high + top - left
    rows = min(rows, columns - low)  # the last row starts at the last column or before it
    columns = min(columns, rows + high)  # and ends there or behind it
    if rows <= 0 or columns <= 0:
        return None
    q_start, k_start = region.q_start + top, region.k_start + left
    corner = columns - rows
    unbounded_left, unbounded_right = low <= 1 - rows, high >= columns - 1
    window = Window(-1 if unbounded_left else corner - low, -1 if unbounded_right else high - corner)
    return Region(region.row, q_start, q_start + rows, k_start, k_start + columns), window


def _joined(regions: Sequence[Region]) -> Iterator[Rectangle]:
    """Bands of the same queries as rectangles: the small ones as one where that is a band."""
    kinds: dict[tuple[bool, bool], list[Region]] = {}
    for each in regions:
        if _area(each) >= fused.PLANNED:
            yield from _rectangle([each])
        else:
            kinds.setdefault(_bounds(each), []).append(each)
    whole = kinds.pop((False, False), [])
    if sum(map(_area, whole)) >= fused.PLANNED:  # of which cuDNN takes no window but a square's
        yield from _rectangle(whole)
        whole = []
    begin, end = (kinds.pop(bounds, []) for bounds in ((True, False), (False, True)))
    row = [*begin[:1], *whole, *end[:1]]
    if row and _is_band(row):
        yield from _rectangle(row)
        others = [*begin[1:], *end[1:]]
    else:
        yield from _rectangle(whole)
        others = [*begin, *end]
    for each in [*others, *(each for both in kinds.values() for each in both)]:
        yield from _rectangle([each])


def _bounds(region: Region) -> tuple[bool, bool]:
    """Whether a band hides pairs of its region below and above it."""
    rows, columns = region.q_end - region.q_start, region.k_end - region.k_start
    return region.low > 1 - rows, region.high < columns - 1


def _is_band(row: Sequence[Region]) -> bool:
    """Whether regions in a row are one band: the first's lower bound ends in it, and the last's upper begins there."""
    rows, first, last = row[0].q_end - row[0].q_start, row[0], row[-1]
    ends = first.low <= first.k_end - first.k_start - rows + 1
    return len(row) == 1 or (ends and last.high >= -1)


def _rectangle(row: Sequence[Region]) -> Iterator[Rectangle]:
    """Regions in a row as a rectangle, without queries and keys that see nothing; nothing where nothing is seen."""
    if not row:
        return
    sizes = [each.k_end - each.k_start for each in row]
    high = row[-1].high if row[-1].high >= UNBOUNDED else row[-1].high + sum(sizes[:-1])
    for box, window in _no_taller(replace(row[0], k_start=0, k_end=sum(sizes), high=high)):
        keys, begin = [], 0
        for each, size in zip(row, sizes, strict=True):
            cut = max(box.k_start, begin) - begin, min(box.k_end, begin + size) - begin
            if cut[0] < cut[1]:
                keys.append((each.k_start + cut[0], each.k_start + cut[1]))
            begin += size
        yield Rectangle(box.row, (box.q_start, box.q_end), tuple(_adjoined(keys)), window)


def _no_taller(region: Region) -> Iterator[tuple[Region, Window]]:
    """A band as rectangles whose windows flash does not take for others.

    It takes a bound of as many keys as there are for none, and none beside a bound for that many; both hide or show
    other keys where queries are more than keys. Rows that one bound does not reach are rectangles of their own then.
    """
    found = windowed(region)
    if found is None:
        return
    box, (left, right) = found
    rows, columns = box.q_end - box.q_start, box.k_end - box.k_start
    if rows <= columns or (left < 0 and right < columns):
        yield found
        return
    low = columns - rows - left if left >= 0 else -UNBOUNDED
    high = columns - rows + right if right >= 0 else UNBOUNDED
    edges = sorted({0, rows, *(min(max(each, 0), rows) for each in (columns - 1 - high, 1 - low))})
    for start, end in itertools.pairwise(edges):
        q_start = box.q_start + start
        part = windowed(replace(box, q_start=q_start, q_end=box.q_start + end, low=low + start, high=high + start))
        if part is not None:
            yield part


def _adjoined(runs: Sequence[Run]) -> list[Run]:
    """Runs in the same order, those that follow one another as one."""
    found: list[Run] = []
    for run in runs:
        if found and found[-1][1] == run[0]:
            found[-1] = found[-1][0], run[1]
        else:
            found.append(run)
    return found


def _packed(rectangles: Sequence[Rectangle], most: int) -> list[tuple[list[Rectangle], Window]]:
    """Rectangles in the order of their queries, together where they have queries of their own and their windows agree.

    Args:
        most: keys of a pack, since they are copied.
    """
    windows = sorted({each.window for each in rectangles}, key=lambda each: (each == EVERYTHING, -1 in each, each))
    packs: list[tuple[list[Rectangle], Window]] = []
    filled: dict[int, int] = {}
    for rectangle in rectangles:
        window = next(each for each in windows if _agrees(rectangle, each))
        for i, (pack, of_pack) in enumerate(packs):
            last = pack[-1]
            behind = (last.row, last.queries[1]) <= (rectangle.row, rectangle.queries[0])
            if of_pack == window and behind and filled[i] + rectangle.sizes[1] <= most:
                break
        else:
            i = len(packs)
            packs.append(([], window))
            filled[i] = 0
        packs[i][0].append(rectangle)
        filled[i] += rectangle.sizes[1]
    return packs


def _agrees(rectangle: Rectangle, window: Window) -> bool:
    """Whether a rectangle sees the same under another window: a bound that its size does not reach hides nothing."""
    queries, keys = rectangle.sizes
    if window != rectangle.window and queries > keys:  # see _no_taller
        return False
    left = window.left == rectangle.window.left or (rectangle.window.left < 0 and window.left >= keys - 1)
    right = window.right == rectangle.window.right or (rectangle.window.right < 0 and window.right >= queries - 1)
    return left and right


def _area(region: Region) -> int:
    return (region.q_end - region.q_start) * (region.k_end - region.k_start)


def _size(run: Run) -> int:
    return run[1] - run[0]
