"""Cutting a band into calls of torch's flash kernel that touch little besides it.

The kernel goes through keys in steps of 512 whatever its ``is_causal`` says, so triangles up to that size run as strips
of few rows with a mask of their shape; larger ones are halved into two triangles and an unmasked square. A narrow band,
such as a sliding window, is one call: its strips have one shape and become a batch of overlapping views.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from sp_compile.kernels.regions import UNBOUNDED, Region

STRIP = 64  # rows of a masked strip
TRIANGLE = 512  # rows up to which a triangle is cut into strips
NARROW = 1024  # keys up to which a band is cut into strips of its width
NARROW_STRIP = 32


@dataclass(frozen=True)
class Strip:
    """One call: a rectangle, under a band of its own where ``band`` is given.

    ``repeats`` strips of this shape follow one another along the diagonal; row i of each sees columns ``band[0] + i``
    to ``band[1] + i``.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    band: tuple[int, int] | None = None
    repeats: int = 1


@lru_cache(maxsize=4096)
def strips(region: Region, merging: bool = True) -> tuple[Strip, ...]:
    """Calls that compute a region that is a band, each visible element once.

    Args:
        merging: halve large triangles, whose parts are then merged; else they run as strips of all their keys.
    """
    return tuple(_strips(region, merging))


def _strips(region: Region, merging: bool) -> Iterator[Strip]:
    shift = region.k_start - region.q_start
    low = -UNBOUNDED if region.low == -UNBOUNDED else region.low + shift
    high = UNBOUNDED if region.high == UNBOUNDED else region.high + shift
    box = (region.q_start, region.q_end, region.k_start, region.k_end)
    first, last = max(box[0], box[2] - high), min(box[1], box[3] - low)
    if first >= last:
        return
    cuts = sorted({first, last, *(each for each in (box[2] - low, box[3] - high) if first < each < last)})
    for start, end in itertools.pairwise(cuts):
        left_free, right_free = end - 1 + low <= box[2], start + high >= box[3] - 1
        if left_free and right_free:
            yield Strip(start, end, box[2], box[3])
        elif left_free:
            yield from _lower(start, end, box[2], start + high, merging)
        elif right_free:
            yield from _upper(start, end, start + low, box[3], merging)
        else:
            yield from _between(start, end, low, high, merging)


def _lower(start: int, end: int, k_start: int, diagonal: int, merging: bool) -> Iterator[Strip]:
    """Row i sees the keys from ``k_start`` to ``diagonal + i``."""
    rows, before = end - start, diagonal - k_start
    if merging and rows > TRIANGLE:
        half = -(-rows // 2 // STRIP) * STRIP
        yield from _lower(start, start + half, k_start, diagonal, merging)
        yield Strip(start + half, end, k_start, diagonal + half)
        yield from _lower(start + half, end, diagonal + half, diagonal + half, merging)
    elif merging and before > TRIANGLE:
        yield Strip(start, end, k_start, diagonal)
        yield from _lower(start, end, diagonal, diagonal, merging)
    else:
        for at in range(start, end, STRIP):
            stop = min(at + STRIP, end)
            ahead = diagonal + at - start - k_start
            yield Strip(at, stop, k_start, k_start + ahead + stop - at, (-UNBOUNDED, ahead))


def _upper(start: int, end: int, diagonal: int, k_end: int, merging: bool) -> Iterator[Strip]:
    """Row i sees the keys from ``diagonal + i`` to ``k_end``."""
    rows = end - start
    if merging and rows > TRIANGLE:
        half = -(-rows // 2 // STRIP) * STRIP
        yield from _upper(start, start + half, diagonal, diagonal + half, merging)
        yield Strip(start, start + half, diagonal + half, k_end)
        yield from _upper(start + half, end, diagonal + half, k_end, merging)
    elif merging and k_end - diagonal - rows > TRIANGLE:
        yield from _upper(start, end, diagonal, diagonal + rows, merging)
        yield Strip(start, end, diagonal + rows, k_end)
    else:
        for at in range(start, end, STRIP):
            stop = min(at + STRIP, end)
            yield Strip(at, stop, diagonal + at - start, k_end, (0, UNBOUNDED))


def _between(start: int, end: int, low: int, high: int, merging: bool) -> Iterator[Strip]:
    """Row q sees the keys from ``q + low`` to ``q + high``."""
    width = high - low + 1
    if width >= NARROW and merging:
        for at in range(start, end, TRIANGLE):
            stop = min(at + TRIANGLE, end)
            yield from _upper(at, stop, at + low, stop + low, merging)
            yield Strip(at, stop, stop + low, at + high)
            yield from _lower(at, stop, at + high, at + high, merging)
        return
    size = NARROW_STRIP if width < NARROW else STRIP
    at = start
    while at < end:
        rows = min(size, end - at)
        repeats = (end - at) // rows
        yield Strip(at, at + rows, at + low, at + rows + high, (0, width - 1), repeats)
        at += rows * repeats
