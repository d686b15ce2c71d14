"""Of each request either the queries or the earlier keys go to everyone, each once, by what is fewer bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sp_compile.fetching import Extension, fetches
from sp_compile.layout import token_layout
from sp_compile.ledger import Ledger, Shelf

HEADS, KV_HEADS, DIM, BYTES = 8, 2, 64, 2
QUERY, KEY = HEADS * (2 * DIM * BYTES + 4), 2 * KV_HEADS * DIM * BYTES


@pytest.mark.parametrize(
    ("new", "past", "window", "expected"),
    [
        (1, 0, None, False),  # nothing is there to fetch
        (1, 1, None, True),
        (1, 4, None, True),  # 4 * 512 bytes of keys, 2080 of queries and partial outputs
        (1, 5, None, False),
        (100, 406, None, True),
        (100, 407, None, False),
        (100, 10_000, None, False),
        (100, 10_000, 400, True),  # 399 are seen
        (100, 10_000, 408, False),
    ],
)
def test_what_is_fewer_bytes_goes(new: int, past: int, window: int | None, expected: bool):
    found = fetches(np.asarray([new, new]), np.asarray([past, past]), QUERY, KEY, window)
    assert found.tolist() == [expected] * 2


def requests() -> st.SearchStrategy[list[tuple[int, int, bool]]]:
    """Earlier and new tokens of each, and whether the earlier ones are fetched if there are any."""
    return st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20), st.booleans()), min_size=1, max_size=6)


@given(requests(), st.integers(2, 4), st.integers(2, 5), st.sampled_from([None, 1, 3, 16]), st.booleans())
def test_every_row_that_is_needed_goes_once(mix, sp, page, window, zigzag):
    pasts, counts, wanted = (np.asarray(each) for each in zip(*mix, strict=True))
    ledger, numbers = Ledger(sp, page), [*range(10, 10 + len(mix))]
    ledger.shelves.setdefault(window, Shelf(sp, page, window))
    for i, number in enumerate(numbers):
        ledger.add(number, i)
    ledger.append(numbers, pasts.tolist())
    ledger.settle(numbers)
    starts = np.cumsum(pasts + counts) - pasts - counts
    request = np.repeat(np.arange(len(mix)), counts)
    rows = np.concatenate(
        [np.arange(past, past + new) + at for past, new, at in zip(pasts, counts, starts, strict=True)]
    )
    layout = token_layout(counts.tolist(), sp, "zigzag" if zigzag else "contiguous", min_shard_length=2)
    first = np.zeros_like(pasts) if window is None else np.maximum(pasts - window + 1, 0)
    fetched = wanted.astype(bool) & (pasts > first)

    found = []
    for rank in range(sp):
        extension = Extension(ledger, rank, layout, numbers, pasts, starts, request, rows)
        runs = ledger.runs(numbers, rank, window)
        found.append({name.removesuffix("_3"): each for name, each in
                      extension.index_inputs(3, window, fetched, runs).items()})  # fmt: skip

    earlier = [starts[i] + np.arange(first[i], pasts[i]) for i in np.flatnonzero(fetched)]
    new = layout.local_index.numel()
    for each in found:  # all ranks agree on what everyone sees: all new rows, and earlier ones once each
        index, valid = each["seen_index"], each["seen_valid"]
        assert index[:new][valid[:new]].tolist() == rows[layout.local_index[layout.valid].numpy()].tolist()
        assert sorted(index[new:][valid[new:]]) == sorted(np.concatenate([*earlier, []]).tolist())
    for rank, each in enumerate(found):  # what a rank sends is where all expect it
        size = len(each["picked_past"])
        part = slice(new + rank * size, new + (rank + 1) * size)
        real = each["seen_valid"][part]
        for slot, row in zip(each["picked_past"][real], each["seen_index"][part][real], strict=True):
            of = int(np.flatnonzero(starts <= row)[-1])
            places = ledger.place([numbers[of]], [row - starts[of]], [1])
            assert places.rank.tolist() == [rank]
            assert ledger.slots([numbers[of]], places, rank, window).tolist() == [slot]

    going = (~fetched & (pasts > 0))[request]
    asked = []
    for rank, each in enumerate(found):
        local, n = layout.local_index[rank].numpy(), layout.shard_length
        at = np.flatnonzero(each["merged_rows"] != np.arange(n))
        sent = each["picked_queries"][each["merged_rows"][at] - n]
        assert sent.tolist() == at.tolist()
        asked += rows[local[at]].tolist()
        size = len(each["picked_queries"])
        for other in found:
            assert other["queries_index"][rank * size : rank * size + len(at)].tolist() == rows[local[at]].tolist()
    assert sorted(asked) == rows[going].tolist()


@given(requests(), st.integers(2, 3))
def test_queries_meet_the_held_keys_of_their_own_request_only(mix, sp):
    pasts, counts, wanted = (np.asarray(each) for each in zip(*mix, strict=True))
    ledger, numbers = Ledger(sp, 4), [*range(len(mix))]
    for i in numbers:
        ledger.add(i, i)
    ledger.append(numbers, pasts.tolist())
    starts = np.cumsum(pasts + counts) - pasts - counts
    request = np.repeat(np.arange(len(mix)), counts)
    rows = np.concatenate(
        [np.arange(past, past + new) + at for past, new, at in zip(pasts, counts, starts, strict=True)]
    )
    layout = token_layout(counts.tolist(), sp, min_shard_length=2)
    fetched = wanted.astype(bool) & (pasts > 0)
    for rank in range(sp):
        runs = ledger.runs(numbers, rank)
        inputs = Extension(ledger, rank, layout, numbers, pasts, starts, request, rows).index_inputs(
            0, None, fetched, runs
        )
        met: dict[tuple[int, int], int] = {}
        for q_start, q_end, k_start, k_end in inputs["held_runs_0"].tolist():
            for query in inputs["queries_index_0"][q_start:q_end].tolist():
                for slot in range(k_start, k_end):
                    met[query, slot] = met.get((query, slot), 0) + 1
        expected = {
            (int(row), slot): 1
            for row, of in zip(rows, request, strict=True) if not fetched[of]
            for _, start, end in runs[runs[:, 0] == of].tolist() for slot in range(start, end)
        }  # fmt: skip
        assert met == expected
