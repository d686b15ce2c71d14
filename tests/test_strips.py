"""Strips compute each element of a band once, and little besides."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sp_compile.kernels.regions import UNBOUNDED, Region
from sp_compile.kernels.strips import NARROW_STRIP, STRIP, Strip, strips
from sp_compile.kernels.tiles import _band_mask, band_mask

FREE = st.sampled_from([-UNBOUNDED, UNBOUNDED])
SIZES = st.integers(1, 200) | st.sampled_from([511, 512, 513, 1024, 1025, 1400, 2500])


@st.composite
def regions(draw: st.DrawFn) -> Region:
    rows, keys = draw(SIZES), draw(SIZES)
    q_start, k_start = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    low = draw(st.just(-UNBOUNDED) | st.integers(-rows - 5, keys + 5))
    high = draw(st.just(UNBOUNDED) | st.integers(max(low, -rows - 5), keys + 2000))
    return Region(-1, q_start, q_start + rows, k_start, k_start + keys, low, high)


def single(found: tuple[Strip, ...]) -> Iterator[Strip]:
    """Strips one by one, those that repeat along the diagonal written out."""
    for each in found:
        rows = each.q_end - each.q_start
        for i in range(each.repeats):
            by = i * rows
            yield Strip(each.q_start + by, each.q_end + by, each.k_start + by, each.k_end + by, each.band)


def visible(region: Region) -> torch.Tensor:
    """The band, over all queries and keys up to the region's end."""
    distance = torch.arange(region.k_end) - region.k_start - (torch.arange(region.q_end) - region.q_start)[:, None]
    band = (distance >= region.low) & (distance <= region.high)
    band[: region.q_start], band[:, : region.k_start] = False, False
    return band


def counted(region: Region, found: tuple[Strip, ...]) -> torch.Tensor:
    counts = torch.zeros(region.q_end, region.k_end, dtype=torch.int16)
    for each in single(found):
        assert region.q_start <= each.q_start < each.q_end <= region.q_end
        assert region.k_start <= each.k_start < each.k_end <= region.k_end
        part = counts[each.q_start : each.q_end, each.k_start : each.k_end]
        part += 1 if each.band is None else band_mask(*part.shape, *each.band, torch.float32)[0, 0] == 0
    return counts


def area(found: tuple[Strip, ...]) -> int:
    return sum((each.q_end - each.q_start) * (each.k_end - each.k_start) for each in single(found))


@settings(max_examples=150, deadline=None)
@given(regions(), st.booleans())
@example(Region(-1, 0, 2500, 0, 2500, high=0), True)
@example(Region(-1, 0, 2500, 0, 2500, low=-1100, high=0), True)
@example(Region(-1, 0, 1400, 0, 2500, low=-1100, high=900), True)
@example(Region(-1, 0, 1025, 0, 2500, low=3, high=3), False)
def test_each_element_of_a_band_is_computed_once(region: Region, merging: bool):
    assert torch.equal(counted(region, strips(region, merging)), visible(region).to(torch.int16))


@settings(max_examples=60, deadline=None)
@given(regions())
def test_every_row_of_a_strip_sees_a_key(region: Region):
    """torch's kernel gives a row whose keys are all masked the wrong log-sum-exp."""
    for each in strips(region):
        if each.band is not None:
            mask = band_mask(each.q_end - each.q_start, each.k_end - each.k_start, *each.band, torch.float32)
            assert bool((mask == 0).any(dim=-1).all())


@settings(max_examples=150, deadline=None)
@given(regions())
def test_what_is_computed_besides_the_band_is_a_triangle_for_each_strip(region: Region):
    wasted = area(strips(region)) - int(visible(region).sum())
    rows = region.q_end - region.q_start
    assert wasted <= 2 * rows * STRIP


@pytest.mark.parametrize("rows", [512, 1000, 2048, 4000])
@pytest.mark.parametrize(
    ("low", "high", "bound"),
    [
        (-UNBOUNDED, 0, 1.25),
        (0, UNBOUNDED, 1.25),
        (-UNBOUNDED, -1, 1.25),
        (-255, 0, 1.2),
        (-99, 99, 1.2),
        (-31, 0, 2.1),
        (0, 0, 32.0),
    ],
)
@pytest.mark.parametrize("merging", [True, False])
def test_the_area_follows_the_band(rows: int, low: int, high: int, bound: float, merging: bool):
    region = Region(-1, 0, rows, 0, rows, low, high)
    assert area(strips(region, merging)) <= bound * int(visible(region).sum())


def test_strips_by_hand():
    assert strips(Region(-1, 0, 5, 2, 9)) == (Strip(0, 5, 2, 9),)
    assert strips(Region(-1, 0, 100, 7, 90, high=-20)) == (
        Strip(20, 84, 7, 71, (-UNBOUNDED, 0)), Strip(84, 100, 7, 87, (-UNBOUNDED, 64)),
    )  # fmt: skip
    assert strips(Region(-1, 0, 100, 0, 100, low=100)) == ()
    halves = strips(Region(-1, 0, 1024, 0, 1025, high=0))
    assert [each for each in halves if each.band is None] == [Strip(512, 1024, 0, 512)]


def test_a_window_is_one_call_between_its_ends():
    found = strips(Region(-1, 0, 10_000, 0, 10_000, -255, 0))
    (repeated,) = [each for each in found if each.repeats > 1]
    assert (repeated.q_end - repeated.q_start, repeated.k_end - repeated.k_start) == (NARROW_STRIP, 255 + NARROW_STRIP)
    assert repeated.repeats == (10_000 - 256) // NARROW_STRIP
    assert len(found) < 10


@pytest.mark.parametrize(("low", "high"), [(-UNBOUNDED, 0), (-4095, 0), (-100, 0), (0, UNBOUNDED)])
def test_calls_are_few(low: int, high: int):
    assert len(strips(Region(-1, 0, 100_000, 0, 100_000, low, high))) <= 100_000 / STRIP * 2.1


def test_parts_are_not_merged_in_half_precision():
    found = strips(Region(-1, 0, 2000, 0, 2000, high=0), merging=False)
    ends = [each.q_end for each in sorted(found, key=lambda each: each.q_start)]
    assert [each.q_start for each in found] == [0, *ends[:-1]]  # no row is in two strips


def test_few_masks_serve_triangles_of_any_size():
    _band_mask.cache_clear()
    for length in (700, 3000, 5555, 20_001):
        for low, high in ((-UNBOUNDED, 0), (0, UNBOUNDED)):
            for each in strips(Region(-1, 0, length, 0, length, low, high), merging=False):
                if each.band is not None:
                    band_mask(each.q_end - each.q_start, each.k_end - each.k_start, *each.band, torch.bfloat16)
    assert _band_mask.cache_info().misses <= 2 * 7, "of 512, 1,024, ..., 32,768 keys, left and right"
