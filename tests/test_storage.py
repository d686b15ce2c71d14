"""Whatever happens to a cache, each token that may be seen is once on one rank, with what was computed for it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sp_compile
from sp_compile import mesh
from sp_compile.errors import CacheError, CacheFullError
from sp_compile.steps import Kept, Step
from sp_compile.storage import Storage

pytest.importorskip("transformers")

WINDOW = 9
KINDS = ["extend", "decode", "extend", "decode", "drop", "crop", "reorder", "refuse"]
EVENTS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(1, 30)), max_size=25)


def caches(sp: int) -> list[Any]:
    """The cache of every rank, of a model that does not run."""
    module = torch.nn.Linear(1, 1)
    groups = [dataclasses.replace(mesh.pretend(sp), rank=rank) for rank in range(sp)]
    return [sp_compile.ShardedCache(SimpleNamespace(module=module, group=each), page_size=2) for each in groups]


def kept(step: Step, values: torch.Tensor, window: int = WINDOW) -> Kept:
    """What a forward gives back: ``values`` ``[rows, tokens]`` of the new tokens as all ranks gathered them."""
    gathered = values[:, step.layout.local_index.reshape(-1)]
    rows = gathered[:, step.index_inputs["kept_rows"]][:, None, :, None]
    return Kept([rows, -rows, rows, -rows], [None, None, window, window], {None: 40, window: 40})


def held(cache: Any, shelf: int) -> dict[int, list[float]]:
    """What a rank holds by the token's number in the whole row."""
    storage = cache.storages[shelf]
    slots = torch.nonzero(storage.valid).flatten().tolist()
    numbers = storage.index.tolist()
    assert len({numbers[slot] for slot in slots}) == len(slots)
    assert torch.equal(storage.tensors[0], -storage.tensors[1])
    return {numbers[slot]: storage.tensors[0][:, 0, slot, 0].tolist() for slot in slots}


def check(found: list[Any], expected: dict[int, list[float]], last: dict[int, int]) -> None:
    """``expected`` values by number in the row; ``last`` is the row that the token's request has reached."""
    for shelf, window in enumerate((None, WINDOW)):
        everything: dict[int, list[float]] = {}
        for cache in found:
            own = held(cache, shelf)
            assert everything.keys().isdisjoint(own)
            everything |= own
        if window is None:
            assert everything == expected
        else:
            seen = {number for number in expected if number > last[number] - window}
            assert seen <= everything.keys()
            assert all(expected[number] == value for number, value in everything.items())


@settings(deadline=None, max_examples=60)
@given(EVENTS, st.integers(1, 4))
def test_packed_requests(events, sp):
    found, lengths, number = caches(sp), dict[int, int](), 0
    for kind, which, count in events:
        known = [*lengths]
        if kind == "extend":
            parts = {number: count} if which < 4 or not known else {known[which % len(known)]: count, number: 2}
            number += 1
        elif kind == "decode" and known:
            parts = dict.fromkeys(known, 1)
        elif kind == "drop" and known:
            gone = known[which % len(known)]
            for cache in found:
                cache.finish(gone)
            del lengths[gone]
            parts = {}
        else:
            continue
        batch = sp_compile.pack([[5] * size for size in parts.values()], numbers=[*parts]) if parts else {}
        new = [1000.0 * each + lengths.get(each, 0) + i for each, size in parts.items() for i in range(size)]
        for cache in found if parts else ():
            step, _ = cache.begin(dict(batch), "zigzag")
            if which == 9:  # the forward fails
                cache.rollback()
                step, _ = cache.begin(dict(batch), "zigzag")
            cache.commit(kept(step, torch.tensor([new])))
        for each, size in parts.items():
            lengths[each] = lengths.get(each, 0) + size
        expected, last = {}, {}
        starts = found[0].rows.starts([*lengths]).tolist() if lengths else []
        for each, start in zip(lengths, starts, strict=True):
            for i in range(lengths[each]):
                expected[start + i], last[start + i] = [1000.0 * each + i], start + lengths[each]
        if found[0].storages:
            check(found, expected, last)
        assert max(int(each.ledger.held.max()) for each in found) <= -(-sum(lengths.values()) // sp) + len(lengths)


@settings(deadline=None, max_examples=60)
@given(EVENTS, st.integers(1, 4))
def test_rows(events, sp):
    found, rows = caches(sp), np.zeros((2, 0))
    for kind, which, count in events:
        if kind in ("extend", "decode"):
            size = count if kind == "extend" else 1
            new = 1000.0 * np.arange(2)[:, None] + np.random.default_rng(which).integers(0, 99, (2, size))
            for cache in found:
                step, _ = cache.begin({"input_ids": torch.full((2, size), 5)}, "contiguous")
                cache.commit(kept(step, torch.from_numpy(new)))
            rows = np.concatenate([rows, new], axis=1)
        elif kind == "reorder" and rows.size:
            order = [which % 2, count % 2]
            for cache in found:
                cache.reorder_cache(torch.tensor(order))
            rows = rows[order]
        elif kind == "crop" and rows.size:
            gone = min(count, rows.shape[1])
            try:
                for cache in found:
                    cache.crop(-gone)
            except CacheError:
                assert rows.shape[1] > WINDOW
            else:
                rows = rows[:, : rows.shape[1] - gone]
        if found[0].storages:
            total = rows.shape[1]
            check(found, {i: rows[:, i].tolist() for i in range(total)}, dict.fromkeys(range(total), total))


def test_kinds_do_not_mix():
    (cache,) = caches(1)
    step, _ = cache.begin({"input_ids": torch.full((1, 4), 5)}, "zigzag")
    cache.commit(kept(step, torch.ones(1, 4)))
    with pytest.raises(CacheError, match=r"holds rows \[B, S\] and cannot go on with packed requests"):
        cache.begin(dict(sp_compile.pack([[5]])), "zigzag")
    with pytest.raises(CacheError, match="no packed requests"):
        cache.finish(0)


def test_a_cache_that_was_emptied_takes_another_batch():
    found = caches(2)
    for cache in found:
        for rows, empty in ((2, cache.reset), (3, lambda cache=cache: cache.crop(-4)), (1, cache.reset)):
            step, _ = cache.begin({"input_ids": torch.full((rows, 4), 5)}, "zigzag")
            cache.commit(kept(step, torch.ones(rows, 4)))
            assert cache.batch_size == rows
            empty()
            assert not any(bool(each.valid.any()) for each in cache.storages)
        step, _ = cache.begin(dict(sp_compile.pack([[5, 5]])), "zigzag")
        cache.commit(kept(step, torch.ones(1, 2)))
        assert cache.get_seq_length() == 2


def test_a_window_of_one_token_is_no_reason_to_keep_any():
    found = caches(2)
    for cache in found:
        for _ in range(9):
            step, _ = cache.begin({"input_ids": torch.full((1, 1), 5)}, "zigzag")
            cache.commit(kept(step, torch.ones(1, 1), window=1))
        assert int(cache.storages[0].valid.sum()) in (4, 5)
        assert int(cache.storages[1].valid.sum()) <= 1


def test_a_failed_first_forward_does_not_say_what_the_cache_is_for():
    (cache,) = caches(1)
    cache.begin({"input_ids": torch.full((1, 4), 5)}, "zigzag")
    cache.rollback()
    step, _ = cache.begin(dict(sp_compile.pack([[5, 5]])), "zigzag")
    cache.commit(kept(step, torch.ones(1, 2)))


def test_requests_that_come_together_begin_on_ranks_in_turn():
    found = caches(4)
    for cache in found:
        step, _ = cache.begin(dict(sp_compile.pack([[5]] * 8)), "zigzag")
        cache.commit(kept(step, torch.ones(1, 8)))
        assert cache.ledger.held.tolist() == [2, 2, 2, 2]


def test_a_failure_while_storing_is_told_until_the_cache_is_reset(monkeypatch):
    (cache,) = caches(1)
    step, _ = cache.begin({"input_ids": torch.full((1, 30), 5)}, "zigzag")
    cache.commit(kept(step, torch.ones(1, 30)))
    step, _ = cache.begin({"input_ids": torch.full((1, 1), 5)}, "zigzag")
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            cache.commit(kept(step, torch.ones(1, 1)))
    cache.rollback()
    with pytest.raises(CacheError, match=r"failed while its keys and values were stored; call reset\(\)"):
        cache.check(SimpleNamespace(module=cache._module, group=cache._group))
    cache.reset()
    step, _ = cache.begin(dict(sp_compile.pack([[5] * 3])), "zigzag")
    cache.commit(kept(step, torch.ones(1, 3)))
    cache.check(SimpleNamespace(module=cache._module, group=cache._group))
    assert int(cache.storages[0].valid.sum()) == 3


def test_what_does_not_fit_leaves_no_trace_and_room_is_used_again():
    (module, group) = torch.nn.Linear(1, 1), mesh.pretend(1)
    cache = sp_compile.ShardedCache(SimpleNamespace(module=module, group=group), max_tokens=8, page_size=2)
    with pytest.raises(CacheFullError, match="requests take whole pages"):
        cache.begin(dict(sp_compile.pack([[5]] * 5)), "zigzag")
    assert cache.numbers == set()
    assert cache.rows is None
    for i in range(1, 9):
        cache.reserve({i: 64 * i})
        step, _ = cache.begin(dict(sp_compile.pack([[5]], numbers=[i])), "zigzag")
        cache.commit(kept(step, torch.ones(1, 1)))
        cache.finish(i)
        assert len(cache.rows.lengths(0)) == 1


def test_layers_may_not_keep_other_windows_than_before():
    (cache,) = caches(1)
    step, _ = cache.begin(dict(sp_compile.pack([[5]])), "zigzag")
    cache.commit(kept(step, torch.ones(1, 1)))
    step, _ = cache.begin(dict(sp_compile.pack([[5]], numbers=[1])), "zigzag")
    with pytest.raises(CacheError, match="keep other windows"):
        cache.commit(kept(step, torch.ones(1, 1), window=5))
    cache.rollback()
    assert cache.numbers == {0}
