"""Every token of a cache is on exactly one rank, in a slot of its own, whatever happens to its requests."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sp_compile.errors import CacheError, CacheFullError
from sp_compile.ledger import Ledger

EVENTS = st.lists(
    st.tuples(st.sampled_from(["add", "append", "decode", "crop", "drop"]), st.integers(0, 9)), max_size=40
)


def tokens_of(ledger: Ledger) -> list[tuple[int, int]]:
    """(rank, slot) of every token there is."""
    requests = ledger.requests
    places = ledger.place(requests, [0] * len(requests), [ledger.length(each) for each in requests])
    return list(zip(places.rank.tolist(), places.slot.tolist(), strict=True))


@given(EVENTS, st.integers(1, 5), st.integers(2, 4))
def test_any_events_leave_every_token_in_a_slot_of_its_own_where_readers_look(events, sp, page):
    ledger, lengths = Ledger(sp, page), dict[int, int]()
    for i, (kind, number) in enumerate(events):
        known = [*lengths]
        if kind == "add":
            ledger.add(i)
            lengths[i] = 0
        elif known and kind == "decode":
            ledger.append(known, [1] * len(known))
            lengths = {each: length + 1 for each, length in lengths.items()}
        elif known:
            request = known[number % len(known)]
            if kind == "append":
                ledger.append([request], [number])
                lengths[request] += number
            elif kind == "crop":
                lengths[request] //= 2
                ledger.crop(request, lengths[request])
            else:
                ledger.drop(request)
                del lengths[request]
        found = tokens_of(ledger)
        assert len(set(found)) == len(found) == sum(lengths.values())
        assert {each: ledger.length(each) for each in ledger.requests} == lengths
        for rank in range(sp):
            runs = ledger.runs(ledger.requests, rank)
            read = [(rank, slot) for _, start, end in runs.tolist() for slot in range(start, end)]
            assert sorted(read) == sorted(each for each in found if each[0] == rank)
        counts = Counter(rank for rank, _ in found)
        assert ledger.held.tolist() == [counts[rank] for rank in range(sp)]
        assert sum((ledger.held_of(each) for each in ledger.requests), np.zeros(sp)).tolist() == ledger.held.tolist()


@pytest.mark.parametrize("sp", [1, 2, 3, 4])
def test_no_rank_holds_more_than_its_share_and_a_page(sp: int):
    ledger = Ledger(sp, 16)
    ledger.add(0)
    for total in range(1, 200):
        ledger.append([0], [1])
        assert ledger.held.max() <= -(-total // sp)
        assert ledger.slots.max() <= -(-total // sp) + 16


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
