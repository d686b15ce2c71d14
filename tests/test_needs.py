"""A rank receives every key that its queries can see and does not hold, once, from who holds it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sp_compile.layout import SCHEMES, TokenLayout, token_layout
from sp_compile.needs import (
    TOGETHER,
    Fetch,
    Reach,
    fetched_rows,
    received,
    ring_stages,
    rows_of,
    seen_pairs,
    seen_parts,
    short_runs,
    whole_on_ranks,
)

LAYOUTS = st.builds(
    token_layout,
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.integers(2, 5),
    st.sampled_from(sorted(SCHEMES)),
)
REACHES = st.builds(Reach, st.sampled_from([None, 1, 2, 7, 50]), st.sampled_from([None, 0, 3]))


def seen(layout: TokenLayout, rank: int, reach: Reach, apart: bool) -> set[int]:
    """Rows that some query of a rank sees, looked at one by one."""
    request = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
    found = set()
    for query in rows_of(layout, rank).tolist():
        first = 0 if reach.back is None else query - reach.back + 1
        last = layout.tokens - 1 if reach.ahead is None else query + reach.ahead
        for key in range(max(first, 0), min(last, layout.tokens - 1) + 1):
            if not apart or request[key] == request[query]:
                found.add(key)
    return found


@settings(max_examples=150, deadline=None)
@given(LAYOUTS, REACHES, st.booleans())
def test_ranks_receive_what_they_need_from_who_holds_it(layout: TokenLayout, reach: Reach, apart: bool):
    plans = [fetched_rows(layout, rank, Fetch(reach), apart) for rank in range(layout.sp)]
    most = 0
    for rank, (_, counts, rows) in enumerate(plans):
        holds = {*rows_of(layout, rank).tolist()}
        needed = seen(layout, rank, reach, apart) - holds
        # whole intervals between the rows of a run are fetched: no more than what lies between its ends
        assert needed <= {*rows.tolist()}
        assert len({*rows.tolist()}) == len(rows)
        assert not holds & {*rows.tolist()}
        if reach.back is None or reach.ahead is not None:
            assert {*rows.tolist()} == needed
        most = max(most, len(rows))
        came = np.split(rows, np.cumsum(counts[1])[:-1])
        for other, part in enumerate(came):
            sent, theirs, _ = plans[other]
            start = int(theirs[0][:rank].sum())
            local = sent[start : start + int(theirs[0][rank])]
            assert part.tolist() == rows_of(layout, other)[local].tolist()
    assert received(layout, reach, apart) == most


def test_what_is_exchanged_of_known_batches():
    """One causal sequence needs half of an all-gather where it is cut once, and three quarters in zigzag."""
    everything = 7 * 8192
    for scheme, share in (("contiguous", 0.5), ("zigzag", 0.75)):
        layout = token_layout([8192], 8, scheme)
        plans = [fetched_rows(layout, rank, Fetch(Reach(None, 0)), True)[2] for rank in range(8)]
        assert sum(map(len, plans)) == pytest.approx(share * everything, rel=0.01)
        halo = [len(fetched_rows(layout, rank, Fetch(Reach(128, 0)), True)[2]) for rank in range(8)]
        assert max(halo) == (127 if scheme == "contiguous" else 2 * 127)
    lengths = np.random.default_rng(0).integers(8, 513, 64).tolist()
    layout = token_layout(lengths, 8, "whole")
    assert whole_on_ranks(layout)
    assert all(len(fetched_rows(layout, rank, Fetch(Reach(None, None)), True)[2]) == 0 for rank in range(8))
    assert not whole_on_ranks(token_layout(lengths, 8, "zigzag"))


@settings(max_examples=100, deadline=None)
@given(LAYOUTS, REACHES, st.booleans())
def test_the_stages_of_a_ring_bring_each_row_once(layout: TokenLayout, reach: Reach, apart: bool):
    for rank in range(layout.sp):
        *_, whole = fetched_rows(layout, rank, Fetch(reach), apart)
        stages = [fetched_rows(layout, rank, Fetch(reach, each), apart) for each in ring_stages(layout.sp)]
        assert sorted(np.concatenate([rows for *_, rows in stages]).tolist()) == sorted(whole.tolist())
        for stage, (sent, counts, _) in zip(ring_stages(layout.sp), stages, strict=True):
            near = [(rank - source) % layout.sp in range(*stage) for source in range(layout.sp)]
            assert not counts[1][~np.asarray(near)].any()
            assert counts[0].sum() == len(sent)


def test_a_ring_of_many_ranks_has_few_stages():
    for sp in range(2, 70):
        stages = ring_stages(sp)
        assert len(stages) <= 8
        assert [each for stage in stages for each in range(*stage)] == [*range(1, sp)]


def test_a_block_that_no_query_sees_is_not_sent():
    """Contiguous and causal: the first rank needs nothing, and sends to all."""
    layout = token_layout([64], 4, "contiguous")
    counts = [
        fetched_rows(layout, 0, Fetch(Reach(None, 0), each), True)[1].sum(axis=1).tolist() for each in ring_stages(4)
    ]
    assert counts == [[16, 0]] * 3


@settings(max_examples=60, deadline=None)
@given(LAYOUTS, REACHES, st.booleans())
def test_pairs_are_those_that_queries_see(layout: TokenLayout, reach: Reach, apart: bool):
    request = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
    for rank, found in enumerate(seen_pairs(layout, reach, apart)):
        rows, keys = rows_of(layout, rank)[:, None], np.arange(layout.tokens)[None, :]
        seen = np.ones((len(rows), layout.tokens), dtype=bool)
        if apart:
            seen &= request[rows] == request[keys]
        if reach.back is not None:
            seen &= keys > rows - reach.back
        if reach.ahead is not None:
            seen &= keys <= rows + reach.ahead
        assert found == seen.sum()


@settings(max_examples=100, deadline=None)
@given(LAYOUTS, REACHES, st.booleans())
def test_parts_of_the_scores_are_counted_by_request_and_the_rank_of_the_keys(
    layout: TokenLayout, reach: Reach, apart: bool
):
    request = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
    for rank, parts in enumerate(seen_parts(layout, reach, apart)):
        wanted = 0.0
        for queries in runs_of_requests(rows_of(layout, rank), request):
            sources = {
                source
                for source in range(layout.sp)
                for run in np.split(queries, np.flatnonzero(np.diff(queries) != 1) + 1)
                if span(layout, run, reach, apart, request) & {*rows_of(layout, source).tolist()}
            }
            wanted += min(1.0, len(queries) / TOGETHER) * len(sources)
        assert parts == pytest.approx(wanted)


def runs_of_requests(rows: np.ndarray, request: np.ndarray) -> list[np.ndarray]:
    return [rows[request[rows] == each] for each in np.unique(request[rows])]


def span(layout: TokenLayout, run: np.ndarray, reach: Reach, apart: bool, request: np.ndarray) -> set[int]:
    """Rows between the first and the last that a run of queries sees."""
    first = 0 if reach.back is None else run[0] - reach.back + 1
    end = layout.tokens if reach.ahead is None else run[-1] + reach.ahead + 1
    own = np.flatnonzero(request == request[run[0]]) if apart else np.arange(layout.tokens)
    return {*range(max(first, int(own[0])), min(end, int(own[-1]) + 1))}


@pytest.mark.parametrize(
    ("lengths", "sp", "scheme", "short"),
    [((1000,), 4, "zigzag", False), ((1000,) * 9, 4, "zigzag", False), ((100,) * 40, 8, "zigzag", True),
     ((64,) * 40, 1, "zigzag", False), ((63,) * 40, 1, "zigzag", True), ((100,) * 40, 8, "whole", False),
     ((5000, *[20] * 40), 1, "zigzag", False), ((2,), 4, "zigzag", True)],
)  # fmt: skip
def test_runs_of_a_rank_are_short_where_many_requests_are_cut_often(
    lengths: tuple[int, ...], sp: int, scheme: str, short: bool
):
    assert short_runs(token_layout(lengths, sp, scheme)) == short
