"""Every token of a cache is on exactly one rank, in a slot of its own, whatever happens to its requests."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sp_compile.errors import CacheError, CacheFullError
from sp_compile.ledger import Ledger, Shelf

EVENTS = st.lists(
    st.tuples(st.sampled_from(["add", "append", "decode", "crop", "drop"]), st.integers(0, 9)), max_size=40
)


def tokens_of(ledger: Ledger, window: int | None = None) -> dict[int, list[tuple[int, int, int]]]:
    """(position, rank, slot) of every token of each request that is kept."""
    found = {}
    for request in ledger.requests:
        places = ledger.place([request], [0], [ledger.length(request)])
        found[request] = []
        for rank in range(ledger.sp):
            positions = places.position[places.rank == rank].tolist()
            slots = ledger.slots([request], places, rank, window).tolist()
            found[request] += [(p, rank, s) for p, s in zip(positions, slots, strict=True) if s >= 0]
    return found


def check(ledger: Ledger, lengths: dict[int, int], window: int | None) -> None:
    """Every token that the next one sees is in one slot, which no other has, and where readers look."""
    found = tokens_of(ledger, window)
    for request, kept in found.items():
        first = 0 if window is None else max(lengths[request] - window + 1, 0)
        positions = sorted(position for position, _, _ in kept)
        assert len({*positions}) == len(positions)
        assert {*range(first, lengths[request])} <= {*positions}
        if window is not None:
            assert len(positions) <= window - 1 + (ledger.page + 1) * ledger.sp
    everything = [(rank, slot) for kept in found.values() for _, rank, slot in kept]
    assert len({*everything}) == len(everything)
    for rank in range(ledger.sp):
        runs = ledger.runs(ledger.requests, rank, window)
        read = [(rank, slot) for _, start, end in runs.tolist() for slot in range(start, end)]
        assert sorted(read) == sorted(each for each in everything if each[0] == rank)


@given(EVENTS, st.integers(1, 5), st.integers(2, 4), st.integers(1, 9))
def test_any_events_leave_every_token_in_a_slot_of_its_own_where_readers_look(events, sp, page, window):
    ledger, lengths = Ledger(sp, page), dict[int, int]()
    ledger.shelves[window] = Shelf(sp, page, window)
    for i, (kind, number) in enumerate(events):
        known = [*lengths]
        if kind == "add":
            ledger.add(i)
            lengths[i] = 0
        elif known and kind == "decode":
            ledger.append(known, [1] * len(known))
            ledger.settle(known)
            lengths = {each: length + 1 for each, length in lengths.items()}
        elif known:
            request = known[number % len(known)]
            if kind == "append":
                ledger.append([request], [number])
                ledger.settle([request])
                lengths[request] += number
            elif kind == "crop":
                shorter = lengths[request] // 2
                try:
                    ledger.crop(request, shorter)
                except CacheError:
                    assert shorter - window + 1 < ledger.shelves[window].forgotten(request, ledger.first(request))
                else:
                    lengths[request] = shorter
            else:
                ledger.drop(request)
                del lengths[request]
        assert {each: ledger.length(each) for each in ledger.requests} == lengths
        check(ledger, lengths, None)
        check(ledger, lengths, window)
        counts = Counter(rank for kept in tokens_of(ledger).values() for _, rank, _ in kept)
        assert ledger.held.tolist() == [counts[rank] for rank in range(sp)]
        assert sum((ledger.held_of(each) for each in ledger.requests), np.zeros(sp)).tolist() == ledger.held.tolist()


def test_a_token_that_was_just_added_is_found_where_all_are():
    ledger = Ledger(3, 2)
    ledger.add(7)
    for length in range(20):
        places = ledger.append([7], [1])
        rank = int(places.rank[0])
        (slot,) = ledger.slots([7], places, rank).tolist()
        assert (length, rank, slot) in tokens_of(ledger)[7]


def test_a_window_frees_the_pages_that_the_next_token_cannot_see():
    ledger = Ledger(2, 2)
    shelf = ledger.shelves[5] = Shelf(2, 2, 5)
    ledger.add(0)
    for _ in range(50):
        ledger.append([0], [1])
        ledger.settle([0])
    assert shelf.slots.max() <= 6  # a share of 5 tokens, and pages that are partly seen at either end
    assert ledger.shelves[None].slots.max() == 26
    with pytest.raises(CacheError, match="cannot go back to 30 tokens: layers with a window of 5"):
        ledger.crop(0, 30)
    ledger.crop(0, 49)


@pytest.mark.parametrize("sp", [1, 2, 3, 4])
def test_no_rank_holds_more_than_its_share_and_a_page(sp: int):
    ledger = Ledger(sp, 16)
    ledger.add(0)
    for total in range(1, 200):
        ledger.append([0], [1])
        assert ledger.held.max() <= -(-total // sp)
        assert ledger.shelves[None].slots.max() <= -(-total // sp) + 16


def test_a_full_ledger_refuses_before_it_changes_anything():
    ledger = Ledger(2, 2, pages=2)
    ledger.add(0)
    ledger.append([0], [7])
    before = tokens_of(ledger)
    with pytest.raises(CacheFullError, match=r"rank \d has 0 free pages of 2 tokens, 1 are needed; .* for 8 tokens"):
        ledger.append([0], [2])
    assert tokens_of(ledger) == before
    assert ledger.length(0) == 7
    ledger.append([0], [1])


def test_an_unknown_request_is_named():
    ledger = Ledger(2, 2)
    ledger.add(3)
    with pytest.raises(CacheError, match="no request 4; it holds 3"):
        ledger.length(4)
