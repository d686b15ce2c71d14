"""Block masks hold every block with a visible key, call none full that is not, and are made without the mask."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sp_compile.kernels.flex import BLOCK, block_mask, blocks
from sp_compile.kernels.plan import seen_rows
from sp_compile.kernels.runs import crossed
from sp_compile.layout import token_layout
from tests.test_plan import CAUSAL, DOCUMENTS, Drawn, documents, positions, seen

WINDOW = "t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, 200); mask = and(t0, t2)"
PADDED = "t0 = le(x1, x0); mask = and(t0, x2)"
Case = tuple[Any, ...]


def by_blocks(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of ``[rows, queries, keys]`` have a visible element, and which have no other."""
    queries, keys = (blocks(size) * BLOCK - size for size in mask.shape[1:])
    held = torch.ones_like(mask)
    found, held = (F.pad(each, (0, keys, 0, queries)).unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK))
                   for each in (mask, held))  # fmt: skip
    return found.any(4).any(2), (found | ~held).all(4).all(2) & held.any(4).any(2)


def flagged(listed: torch.Tensor) -> torch.Tensor:
    """The blocks that a list names, the first of ``[rows, query blocks, 1 + key blocks]`` being their number."""
    assert listed.dtype == torch.int32
    counts, which = listed[..., 0].long(), listed[..., 1:].long()
    size = which.shape[-1]
    assert torch.equal(which.sort(-1).values, torch.arange(size).expand_as(which))
    named = torch.arange(size) < counts[..., None]
    assert ((which[..., 1:] > which[..., :-1]) | ~named[..., 1:]).all()  # in order, so that keys are read forwards
    return torch.zeros_like(which, dtype=torch.bool).scatter(-1, which, named)


def check(
    rule: str,
    operands: Sequence[torch.Tensor],
    valid: torch.Tensor | None,
    sizes: tuple[int, int],
    tables: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, ...]:
    """Compare with the blocks of the mask's elements; returns partial and full ones, and what they could be."""
    found = block_mask(operands, tables, rule, valid, *sizes)
    mask = seen(rule, operands, valid, sizes, tables)
    assert found.shape == (len(found), blocks(sizes[0]), 2, 1 + blocks(sizes[1]))
    assert len(found) in (1, len(mask))
    partial, full = flagged(found[:, :, 0]), flagged(found[:, :, 1])
    some, every = by_blocks(mask.any(dim=1))[0], by_blocks(mask.all(dim=1))[1]
    assert not (partial & full).any()
    assert not (full & ~every).any()
    assert not (some & ~(partial | full)).any()
    return partial, full, some, every


def ranked(lengths: Sequence[int], sp: int, rank: int, scheme: str = "zigzag") -> Case:
    layout = token_layout(lengths, sp, scheme)
    own, everyone = layout.local_index[rank], layout.local_index.reshape(-1)
    place, _, number, _ = (each.flatten() for each in documents(lengths))
    operands = [place[own][:, None], place[everyone][None], number[own][:, None], number[everyone][None]]
    return DOCUMENTS, operands, layout.valid.reshape(-1), (own.numel(), everyone.numel())


def pads(*sizes: int, length: int = 300) -> torch.Tensor:
    return (torch.arange(length) >= torch.tensor(sizes)[:, None])[:, None, None]


EXACT: dict[str, Case] = {
    "everything": ("", [], None, (300, 400)),
    "nothing": ("mask = lt(x1, 0)", positions(300), None, (300, 300)),
    "causal": (CAUSAL, positions(700), None, (700, 700)),
    "causal of whole blocks": (CAUSAL, positions(512), None, (512, 512)),
    "one token": (CAUSAL, positions(1), None, (1, 1)),
    "window": (WINDOW, positions(700), None, (700, 700)),
    "window of two": (WINDOW.replace("200", "2"), positions(700), None, (700, 700)),
    "later keys": ("mask = gt(x1, x0)", positions(500), None, (500, 500)),
    "the last keys": ("", [], torch.arange(500) >= 200, (300, 500)),
    "some keys": (CAUSAL, positions(900), torch.arange(900) < 700, (900, 900)),
    "packed": (DOCUMENTS, documents([300, 77, 500]), None, (877, 877)),
    "padded rows": (PADDED, [*positions(300), pads(0, 70, 299)], None, (300, 300)),
    "ranks of whole blocks": ranked([1024], 4, 1),
    "contiguous ranks of whole blocks": ranked([1024], 4, 1, "contiguous"),
    "a bias of each row": (f"{CAUSAL}; bias = copy(x2)", [*positions(200), torch.zeros(3, 1, 1, 200)], None,
                           (200, 200)),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_bands_have_no_block_too_many(case: Case):
    partial, full, some, every = check(*case)
    keys = case[3][1]
    if keys % BLOCK:
        every[..., keys // BLOCK] = False  # keys may be filled up behind the last, and only the mask hides those
    assert torch.equal(partial | full, some[: len(partial)])
    assert torch.equal(full, every[: len(full)])


RAGGED: dict[str, Case] = {
    **{f"zigzag, rank {rank}": ranked([600, 5, 333, 1], 3, rank) for rank in range(3)},
    **{f"contiguous, rank {rank}": ranked([600, 5, 333, 1], 3, rank, "contiguous") for rank in (0, 2)},
    "short requests": (DOCUMENTS, documents([3, 20, 1, 40] * 12), None, (768, 768)),
    "shuffled": (CAUSAL, [each[..., torch.randperm(400)] if i else each for i, each in enumerate(positions(400))],
                 None, (400, 400)),
    "every other key": ("t0 = remainder(x1, 2); mask = eq(t0, 0)", positions(300), None, (300, 300)),
    "windows of heads": ("t0 = sub(x0, x1); t1 = abs(t0); mask = le(t1, x2)",
                         [*positions(500), torch.tensor([10, 300]).reshape(1, 2, 1, 1)], None, (500, 500)),
    "a matrix of each row": ("mask = copy(x0)", [torch.rand(2, 1, 300, 300) < 0.01], None, (300, 300)),
    "a table": ("t0 = sub(x0, x1); t1 = abs(t0); mask = lookup(table0, t1)", positions(400), None, (400, 400),
                [torch.arange(400)[None] % 200 < 50]),
    "holes among keys": (PADDED, [*positions(300), pads(0, 150)], torch.arange(300) % 90 < 60, (300, 300)),
}  # fmt: skip


@pytest.mark.parametrize("case", RAGGED.values(), ids=RAGGED)
def test_no_block_is_missing_and_full_ones_are_full(case: Case):
    partial, full, some, _ = check(*case)
    if case[0] == DOCUMENTS and len(some) == 1:
        assert int((partial | full).sum()) <= 2 * int(some.sum())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mask_is_held(data: st.DataObject):
    case = Drawn(data.draw)
    check(case.rule, case.operands, case.valid, case.sizes)


def test_blocks_by_hand():
    found = block_mask(positions(300), [], CAUSAL, None, 300, 300)
    assert found[0, :, 0, 0].tolist() == [1, 1, 1, 0]
    assert found[0, :3, 0, 1].tolist() == [0, 1, 2]
    assert found[0, :, 1, 0].tolist() == [0, 1, 2, 0]
    assert found[0, 2, 1, 1:3].tolist() == [0, 1]
    assert [blocks(each) for each in (1, 128, 129, 256)] == [2, 2, 3, 3]


@pytest.mark.parametrize(
    "case", [(CAUSAL, positions), (WINDOW, positions), (DOCUMENTS, lambda size: documents([size // 100] * 100))],
    ids=["causal", "window", "documents"],
)  # fmt: skip
def test_blocks_of_many_tokens_take_memory_and_time_of_blocks(case: Any):
    tokens = 200_000
    operands = case[1](tokens)
    tracemalloc.start()
    start = time.thread_time()
    found = block_mask(operands, [], case[0], None, tokens, tokens)
    seconds, most = time.thread_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 10  # 0.3 on an idle core
    assert most < 64 * blocks(tokens) ** 2  # bytes: 0.2 GB, where the mask would be 40 GB
    counts = found[0, :, :, 0].sum(0).tolist()
    held = tokens // BLOCK
    assert counts[0] >= held
    assert counts == [held + 1, held * (held + 1) // 2] if case[0] == CAUSAL else sum(counts) < 20 * held


# queries that see a key


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_queries_that_see_a_key_by_any_mask(data: st.DataObject):
    case = Drawn(data.draw)
    check_seen(case.rule, case.operands, case.valid, case.sizes)


def check_seen(rule: str, operands: Any, valid: Any, sizes: tuple[int, int], tables: Any = ()) -> torch.Tensor:
    found = seen_rows(operands, tables, rule, valid, *sizes)
    mask = seen(rule, operands, valid, sizes, tables)[: len(found)]
    assert found.dtype == torch.bool
    assert torch.equal(found, mask.any(dim=1).any(dim=-1))
    return found


@pytest.mark.parametrize("case", [*EXACT.values(), *RAGGED.values()], ids=[*EXACT, *RAGGED])
def test_queries_that_see_a_key(case: Case):
    check_seen(*case)


def test_queries_that_see_no_key_by_hand():
    behind = "t0 = add(x1, 3); t1 = le(t0, x0); mask = and(t1, x2)"
    found = check_seen(behind, [*positions(9), pads(0, 4, length=9)], None, (9, 9))
    assert found.sum(-1).tolist() == [6, 2]
    assert not found[:, :3].any()
    assert check_seen(CAUSAL, positions(200), torch.arange(200) >= 150, (200, 200)).sum() == 50
    assert not check_seen("", [], torch.zeros(7, dtype=torch.bool), (5, 7)).any()
    ahead = "t0 = sub(x1, x0); mask = ge(t0, 100)"
    assert check_seen(ahead, positions(300), None, (300, 300)).sum() == 200


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("new", "held"), [([1, 1, 1], [300, 20, 700]), ([40, 1, 200], [129, 500, 64])], ids=str)
def test_blocks_of_queries_that_meet_keys_in_known_ranges(new: list[int], held: list[int], rows: int):
    of_queries, of_keys = (torch.repeat_interleave(torch.arange(3), torch.tensor(each)) for each in (new, held))
    places = torch.cat([torch.randperm(each) for each in held])
    ends = torch.cat([torch.full((each,), last - 9) for each, last in zip(new, held, strict=True)])
    limits = torch.tensor([1 << 20, 100][:rows]).reshape(rows, 1, 1, 1)
    rule = "t0 = eq(x1, x0); t1 = le(x3, x2); t2 = and(t0, t1); t3 = lt(x3, x4); mask = and(t2, t3)"
    operands = [of_queries[:, None], of_keys[None], ends[:, None], places[None], limits]
    edges = [[0, *torch.tensor(each).cumsum(0).tolist()] for each in (new, held)]
    runs = torch.tensor([[*q, *k] for q, k in zip(*map(itertools.pairwise, edges), strict=True)])
    valid = torch.rand(sum(held)) < 0.9
    sizes = sum(new), sum(held)
    found = block_mask(operands, [], rule, valid, *sizes, runs)
    mask = seen(rule, operands, valid, sizes)
    partial, full = flagged(found[:, :, 0]), flagged(found[:, :, 1])
    some, every = by_blocks(mask.any(dim=1))[0], by_blocks(mask.all(dim=1))[1]
    assert len(found) == rows
    assert not (some & ~(partial | full)).any()
    assert not (full & ~every).any()
    assert (partial | full).sum() < partial.numel()


def test_queries_meet_every_range_of_keys_of_their_request():
    valid = np.array([[True, True, True], [True, False, True]])
    request = np.array([[0, 0, 2], [1, 1, 2]])
    runs = np.array([[0, 10, 14], [0, 20, 21], [2, 0, 3], [2, 5, 9], [2, 30, 31]])
    found = crossed(valid, request, runs).tolist()
    of_last = [[row, row + 1, *keys] for row in (2, 5) for keys in ([0, 3], [5, 9], [30, 31])]
    assert found == [[0, 2, 10, 14], [0, 2, 20, 21], *of_last]
    assert crossed(valid[1:], request[1:], runs[:0]).tolist() == [[0] * 4] * 2
