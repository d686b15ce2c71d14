"""Calls of fused kernels hold every pair that a plan's regions see once, and are few."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sp_compile.kernels import calls, fused
from sp_compile.kernels.calls import Call, Calls, calls_of, windowed
from sp_compile.kernels.fused import Window
from sp_compile.kernels.plan import plan_regions
from sp_compile.kernels.regions import UNBOUNDED, Region, as_tensor
from sp_compile.layout import token_layout
from tests.test_fused import as_flash_takes_it, seen_by
from tests.test_kernels import DOCUMENTS, documents
from tests.test_plan import counted

CPU = torch.device("cpu")
FULL = torch.ones(1, 1, 1, 1, dtype=torch.bool)


def _by_flash(call: Call, queries: int, keys: int) -> torch.Tensor:
    """What flash computes of a rectangle of a call."""
    return seen_by(as_flash_takes_it(*call.window, False, call.packed.most_keys), queries, keys)


def counts_of(found: Calls, batch: int, queries: int, keys: int) -> torch.Tensor:
    """How often each pair is computed by calls, ``[batch, queries, keys]``."""
    seen = torch.zeros(batch, queries, keys, dtype=torch.int64)
    for call in found.calls:
        for each, alone in zip(call.rectangles, call.apart, strict=True):
            assert torch.equal(_by_flash(alone, *each.sizes), seen_by(each.window, *each.sizes))
            at = torch.cat([torch.arange(*run) for run in each.keys])
            rows = range(batch) if each.row < 0 else [each.row]
            for row in rows:
                seen[row, each.queries[0] : each.queries[1], at] += seen_by(each.window, *each.sizes).long()
                assert torch.equal(_by_flash(call, *each.sizes), seen_by(each.window, *each.sizes))
    return seen


@pytest.mark.parametrize("seed", range(200))
def test_a_band_is_a_window_of_its_corner(seed: int):
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    rows, columns = number(1, 12), number(1, 12)
    low = number(-14, 14) if number(0, 4) else -UNBOUNDED
    high = max(low, -14) + number(0, 14) if number(0, 4) else UNBOUNDED
    region = Region(-1, 3, 3 + rows, 5, 5 + columns, low, high)
    ahead = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
    right = (ahead >= low) & (ahead <= high)
    found, cut = torch.zeros(rows, columns, dtype=torch.bool), windowed(region)
    if cut is not None:
        box, window = cut
        part = seen_by(window, box.q_end - box.q_start, box.k_end - box.k_start)
        assert part.any(dim=1).all()
        assert part.any(dim=0).all()
        found[box.q_start - 3 : box.q_end - 3, box.k_start - 5 : box.k_end - 5] = part
    assert torch.equal(found, right)


@st.composite
def regions(draw: st.DrawFn) -> list[Region]:
    """Bands side by side, for queries that some of them share, in any order."""
    found = []
    for q_start in range(0, draw(st.integers(1, 3)) * 8, 8):
        rows, k_start = draw(st.integers(1, 8)), 0
        for _ in range(draw(st.integers(0, 5))):
            columns = draw(st.integers(1, 9))
            low = draw(st.one_of(st.just(-UNBOUNDED), st.integers(-rows, columns)))
            high = draw(st.one_of(st.just(UNBOUNDED), st.integers(-rows, columns)))
            k_start += draw(st.integers(0, 2))
            found.append(Region(draw(st.integers(-1, 1)), q_start, q_start + rows, k_start, k_start + columns, low,
                                max(low, high)))  # fmt: skip
            k_start += columns
    return draw(st.permutations(found))


@settings(deadline=None, max_examples=400)
@given(regions(), st.sampled_from([0, 20, 60, 1 << 24]), st.integers(0, 60))
def test_every_pair_of_any_bands_is_in_one_call(found: list[Region], planned: int, keys: int):
    keys = max([keys, *(each.k_end for each in found)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fused, "PLANNED", planned)
        calls._calls_of.cache_clear()
        made = calls_of(as_tensor(found), 2, (24, keys), CPU)
    calls._calls_of.cache_clear()
    expected = counted(found, FULL.expand(2, 1, 24, keys))
    assert torch.equal(counts_of(made, 2, 24, keys), expected)
    written = torch.zeros(48, dtype=torch.int64)
    for call, fresh in zip(made.calls, made.fresh, strict=True):
        rows = call.queries.of(torch.arange(48))
        assert len(rows.unique()) == len(rows), "queries of a call are its rectangles' own"
        assert fresh == (not written[rows].any())
        written[rows] += 1
        if made.complete:
            assert fresh or written[rows].min() > 1
    assert made.complete <= bool(written.all())


@pytest.mark.parametrize(
    ("lengths", "sp"), [((4096,), 1), ((900, 30, 2000, 500, 64), 1), ((900, 30, 2000, 500, 64), 4), ((2048,) * 2, 8)]
)
def test_requests_of_any_lengths_are_one_call_on_each_rank(lengths: tuple[int, ...], sp: int):
    layout, operands = token_layout(lengths, sp), documents([*lengths])
    keys, valid = layout.local_index.reshape(-1), layout.valid.reshape(-1)
    for rank in range(sp):
        rows = layout.local_index[rank]
        own = [operands[0][rows], operands[1][:, keys], operands[2][rows], operands[3][:, keys]]
        plan = as_tensor(plan_regions(own, [], DOCUMENTS, valid, len(rows), len(keys), boxes=False))
        found = calls_of(plan, 1, (len(rows), len(keys)), CPU)
        calls_of_tokens = [each for each in found.calls if each.packed.most_queries > 2]  # others are of padding
        assert [each.window for each in calls_of_tokens] == [Window(-1, 0)]
        assert found.masked == ()


def test_calls_of_a_plan_are_made_once():
    plan = as_tensor([Region(-1, 0, 9, 0, 9, high=0)])
    assert calls_of(plan, 1, (9, 9), CPU) is calls_of(plan.clone(), 1, (9, 9), CPU)
    assert calls_of(plan, 1, (9, 9), CPU) is not calls_of(plan, 2, (9, 9), CPU)


def test_large_regions_read_keys_where_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "PLANNED", 64)
    calls._calls_of.cache_clear()
    plan = as_tensor([Region(-1, 0, 8, 0, 8), Region(-1, 0, 8, 10, 18), Region(-1, 0, 8, 20, 28, high=0)])
    found = calls_of(plan, 1, (8, 30), CPU)
    calls._calls_of.cache_clear()
    assert [each.keys for call in found.calls for each in call.rectangles] == [((0, 8),), ((10, 18),), ((20, 28),)]
    assert (found.fresh, found.complete) == ((True, False, False), True)


def test_a_call_copies_no_more_keys_than_there_are():
    parts = [Region(-1, i, i + 1, 0, 50) for i in range(10)]
    found = calls_of(as_tensor(parts), 1, (10, 60), CPU)
    assert len(found.calls) > 1
    assert all(sum(each.sizes[1] for each in call.rectangles) <= 2 * 60 for call in found.calls)
