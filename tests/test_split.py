"""Parts of the keys hold every block that is seen, once, and about as many each; merged they are the whole."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sp_compile import parts
from sp_compile.kernels.flex import BLOCK, block_mask, blocks
from sp_compile.kernels.split import part_size, query_blocks, spare_parts, split_blocks, split_count
from tests.test_block_mask import EXACT, Case, by_blocks, ranked
from tests.test_plan import CAUSAL, seen


def kinds_of(listed: torch.Tensor, width: int) -> torch.Tensor:
    """0, 1 for partial or 2 for full, ``[rows, row blocks, key blocks]``, each block named once."""
    found = torch.zeros(*listed.shape[:2], width, dtype=torch.int64)
    for row, block, kind in itertools.product(*map(range, listed.shape[:3])):
        count, *which = listed[row, block, kind].tolist()
        assert sorted({*which[:count]}) == which[:count]
        assert not found[row, block, which[:count]].any()
        found[row, block, which[:count]] = kind + 1
    return found


@pytest.mark.parametrize(
    ("case", "group", "splits"),
    [
        (EXACT["everything"], 3, 2),
        (EXACT["nothing"], 2, 5),
        (EXACT["causal"], 2, 4),
        (EXACT["one token"], 8, 1),
        (EXACT["packed"], 1, 3),
        (ranked([600, 5, 333, 1], 3, 1), 4, 9),
        (("t0 = eq(x3, x2); t1 = le(x1, x0); mask = and(t0, t1)", [torch.full((3, 1), 999), torch.arange(2000)[None],
          torch.tensor([0, 1, 3])[:, None], torch.arange(2000)[None] // 500], torch.arange(2000) % 500 < 480,
          (3, 2000)), 7, 6),
    ],
)  # fmt: skip
def test_splits_hold_the_blocks_of_all_rows_once_and_about_as_many_each(case: Case, group: int, splits: int):
    rule, operands, valid, (queries, keys) = case
    listed = block_mask(operands, [], rule, valid, queries, keys)
    split = torch.from_numpy(split_blocks(listed.numpy(), queries, group * queries, splits))
    assert split.dtype == torch.int32
    assert split.shape[:3] == (splits, blocks(group * queries), 2)
    parts = kinds_of(split, blocks(keys))
    assert (parts > 0).sum(dim=0).max() <= 1
    sizes = (parts > 0).sum(dim=2)
    assert (sizes.amax(dim=0) - sizes.amin(dim=0)).max() <= 1
    found = parts.sum(dim=0)
    mask = seen(rule, operands, valid, (queries, keys))[:, 0].repeat(1, group, 1)
    some, every = by_blocks(mask)
    assert not (some[0] & (found == 0)).any()
    assert not (~every[0] & (found == 2)).any()
    if group == 1:
        assert torch.equal(found, kinds_of(listed, blocks(keys))[0])
    if queries <= BLOCK and valid is None:
        assert torch.equal(found > 0, some[0])


def test_keys_are_split_as_far_as_a_gpu_has_room():
    assert split_count(16 * 4, 1 << 21, 8) == 32
    assert split_count(4096 * 4, 1 << 17, 8) == 2
    assert split_count(64, 300, 8) == 3
    assert split_count(64, 1, 1) == 2


@st.composite
def caches(draw: Any) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor, int, int, str]:
    """Operands, keys that exist, runs, queries, keys and rule of a step in which each request has one new token."""
    held, runs, of_keys, places, slots = [], [], [], [], 0
    queries = draw(st.integers(1, 6))
    pages = draw(st.lists(st.tuples(st.integers(0, queries - 1), st.integers(1, 400)), max_size=12))
    held = [0] * queries
    for request, size in pages:
        runs.append([request, request + 1, slots, slots + size])
        of_keys += [request] * size
        places += range(held[request], held[request] + size)
        held[request], slots = held[request] + size, slots + size
    spare = draw(st.integers(0, 200))
    keys = slots + spare
    operands = [torch.tensor(held)[:, None], torch.tensor(places + [0] * spare, dtype=torch.int64)[None]]
    real = [draw(st.booleans()) or draw(st.booleans()) for _ in range(slots)]
    valid = torch.tensor(real + [False] * spare, dtype=torch.bool)
    window = draw(st.sampled_from([None, 1, 100, 300]))
    rule = CAUSAL if window is None else f"t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, {window}); mask = and(t0, t2)"
    found = torch.tensor([*runs, [0, 0, 0, 0]])
    return operands, valid if draw(st.booleans()) else None, found, queries, keys, rule


@settings(max_examples=60, deadline=None)
@given(caches(), st.integers(1, 40))
def test_parts_of_single_queries_hold_what_they_see(case: Any, spare: int):
    operands, valid, runs, queries, keys, rule = case
    size = part_size(keys, len(runs), spare)
    found = query_blocks(operands, [], rule, valid, queries, keys, runs, queries + spare, size)
    within = torch.zeros(queries, keys, dtype=torch.bool)
    for q_start, q_end, k_start, k_end in runs.tolist():
        within[q_start:q_end, k_start:k_end] = True
    mask = seen(rule, operands, valid, (queries, keys))[0, 0].expand(queries, keys) & within
    padded = torch.zeros(queries, blocks(keys) * BLOCK, dtype=torch.bool)
    padded[:, :keys] = mask
    by_block = padded.unflatten(1, (-1, BLOCK))
    expected = by_block.any(dim=2).long() + by_block.all(dim=2).long()
    listed = torch.from_numpy(found)
    kinds = kinds_of(listed[:, :, :2], blocks(keys))[:, 0]
    of, begins, counts = listed[:, 0, 2, :3].unbind(1)
    sizes = (kinds > 0).sum(dim=1)
    most = max(1, -(-int(sizes.sum()) // spare))
    assert sizes.max() <= most
    for query in range(queries):
        own = slice(int(begins[query]), int(begins[query] + counts[query]))
        assert (of[own] == query).all()
        assert torch.equal(kinds[own].sum(dim=0), expected[query])
        assert int(counts[query]) <= spare + 1
    assert int(counts.sum()) == int((sizes > 0).sum())


@pytest.mark.parametrize(("heads", "kv_heads", "rows"), [(4, 2, 16), (3, 3, 16), (40, 2, 32)])
def test_attention_by_parts_of_single_queries(heads: int, kv_heads: int, rows: int):
    held, dim, group = torch.tensor([300, 0, 1, 700, 129]), 8, heads // kv_heads
    queries, keys, spare = len(held), int(held.sum()) + 50, spare_parts(2000, 32)
    q, k, v = (torch.randn(1, *size, dim) for size in ((heads, queries), (kv_heads, keys), (kv_heads, keys)))
    of_queries, of_keys = torch.arange(queries), torch.full((keys,), -1)
    of_keys[:-50] = of_queries.repeat_interleave(held)
    runs = torch.stack([of_queries, of_queries + 1, held.cumsum(0) - held, held.cumsum(0)], dim=1)
    operands = [of_queries[:, None], of_keys[None]]
    size = part_size(keys, queries, spare)
    plan = query_blocks(operands, [], "mask = eq(x0, x1)", None, queries, keys, runs, queries + spare, size)
    listed = torch.from_numpy(plan)[:, None]
    numbers = parts.numbers_of_parts(listed)
    asking = parts.queries_of_parts(q, numbers, group)
    assert asking.shape == (queries + spare, kv_heads, rows, dim)
    own = parts.operand_of_parts(operands[0], numbers)
    assert own.shape == (queries + spare, 1, 1, 1)
    named = kinds_of(listed[:, 0, :, :2], blocks(keys)).repeat_interleave(BLOCK, dim=2)[..., :keys] > 0
    out, lse = attended(asking, k, v, (own == operands[1]) & named[:, None])
    merged, total = parts.merged_queries(out, lse, numbers, 1, group, queries, spare + 1)
    whole = (each.repeat_interleave(group, dim=1) for each in (k, v))
    expected = attended(q, *whole, operands[0] == operands[1])
    torch.testing.assert_close((merged, total), expected, atol=1e-5, rtol=1e-5)


def test_what_a_query_has_no_part_of_is_not_read():
    """Other requests may hold NaN."""
    numbers = torch.tensor([[0, 0, 2], [0, 2, 1], [1, 3, 0], [0, 0, 0]])  # of two, one and no parts
    out, lse = torch.randn(4, 2, 16, 8), torch.randn(4, 2, 16)
    out[:2], lse[:2] = torch.nan, torch.nan
    merged, total = parts.merged_queries(out, lse, numbers, 1, 1, 3, 4)
    assert merged[0, :, 0].isnan().all()
    torch.testing.assert_close((merged[0, :, 1], total[0, :, 1]), (out[2, :, 0], lse[2, :, 0]))
    assert merged[0, :, 2].eq(0).all()
    assert total[0, :, 2].eq(-torch.inf).all()


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its definition, and its log-sum-exp; 0 and -inf where nothing is seen."""
    scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None]) @ v, lse


def test_lists_keep_their_size_while_a_cache_grows():
    sizes = {part_size(16 * context, 16, spare_parts(16 * context, 8)) for context in range(100_000, 130_000, 100)}
    assert len(sizes) <= 3
    assert part_size(1, 2, 256) == 64


def test_there_are_as_many_parts_as_a_gpu_runs_at_once():
    assert spare_parts(1 << 21, 8) == 32
    assert spare_parts(300, 8) == 3
    assert spare_parts(1, 8) == 1
    assert spare_parts(1 << 21, 1000) == 1
