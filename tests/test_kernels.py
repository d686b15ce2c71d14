"""Attention over tiles: against a dense softmax in double precision, whatever the mask, the tiles and their order.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sp_compile.kernels import (
    CAUSAL,
    DENSE_QUERIES,
    EMPTY,
    FULL,
    MASKED_KEYS,
    PARTIAL,
    Partial,
    Tile,
    _merge,
    attend,
    merged_tiles,
    plan_tiles,
)
from sp_compile.layout import token_layout
from sp_compile.score_rule import evaluate

CAUSAL_RULE = "mask = le(x1, x0)"
WINDOW = "t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, 9); mask = and(t0, t2)"
DOCUMENTS = "t0 = le(x1, x0); t1 = eq(x3, x2); mask = and(t0, t1)"
SOFTCAP = "t0 = div(score, 2.0); t1 = tanh(t0); score = mul(t1, 2.0)"
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6}


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    scale: float = 0.3,
) -> Partial:
    """Output and log-sum-exp by the definition; a row that sees nothing gets 0 and -inf."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = (torch.stack([each[:, h // group] for h in range(q.shape[1])], dim=1) for each in (k, v))
    score = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    score = score if change is None else change(score)
    score = score if bias is None else score + bias.double()
    score = score if mask is None else torch.where(mask, score, -torch.inf)
    largest = score.amax(dim=-1, keepdim=True).clamp(min=-1e30)
    weights = torch.exp(score - largest)
    total = weights.sum(dim=-1, keepdim=True)
    out = torch.einsum("bhqk,bhke->bhqe", weights / torch.where(total == 0, 1.0, total), v)
    return out, (largest + total.log()).squeeze(-1)


def inputs(
    heads: int = 2,
    groups: int = 1,
    queries: int = 37,
    keys: int | None = None,
    widths: tuple[int, int] = (8, 8),
    **kwargs: Any,
) -> tuple[torch.Tensor, ...]:
    keys, batch, dtype = keys or queries, kwargs.get("batch", 1), kwargs.get("dtype", torch.float32)
    sizes = (heads, queries, widths[0]), (groups, keys, widths[0]), (groups, keys, widths[1])
    return tuple(torch.randn(batch, *size, dtype=dtype) for size in sizes)


def cuts(length: int, tile: int) -> torch.Tensor:
    return torch.tensor([*range(0, length, tile), length])


def attention(
    qkv: tuple[torch.Tensor, ...],
    operands: list[torch.Tensor],
    rule: str,
    tile: int | None = 16,
    valid: torch.Tensor | None = None,
    empty_mean: bool = False,
    scale: float = 0.3,
) -> Partial:
    """The custom op, planned over tiles of the given size."""
    plan = q_bounds = k_bounds = None
    if tile is not None:
        q_bounds, k_bounds = cuts(qkv[0].shape[2], tile), cuts(qkv[1].shape[2], tile)
        plan = torch.ops.sp_compile.tile_plan(operands, rule, valid, q_bounds, k_bounds)
    return torch.ops.sp_compile.attention(*qkv, operands, rule, scale, empty_mean, plan, q_bounds, k_bounds, valid)


def positions(queries: int, keys: int | None = None) -> list[torch.Tensor]:
    return [torch.arange(queries)[:, None], torch.arange(keys or queries)[None, :]]


def documents(lengths: list[int]) -> list[torch.Tensor]:
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return [*positions(len(numbers)), numbers[:, None], numbers[None, :]]


def masks(queries: int) -> dict[str, tuple[str, list[torch.Tensor]]]:
    """Rules with their operands, by name."""
    shuffled = torch.randperm(queries)
    return {
        "everything": ("", []),
        "causal": (CAUSAL_RULE, positions(queries)),
        "window": (WINDOW, positions(queries)),
        "documents": (DOCUMENTS, documents([queries - queries // 2 - 1, 1, queries // 2])),
        "shuffled causal": (CAUSAL_RULE, [shuffled[:, None], shuffled[None, :]]),
        "matrix": ("mask = copy(x0)", [torch.rand(queries, queries) < 0.4]),
        "strictly causal": ("mask = lt(x1, x0)", positions(queries)),
    }


def assert_close(found: Partial, expected: Partial, dtype: torch.dtype) -> None:
    for each, right in zip(found, expected, strict=True):
        torch.testing.assert_close(each.double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# against the definition


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tile", [None, 5, 16])
@pytest.mark.parametrize("mask", masks(3))
def test_masks(mask: str, tile: int | None, dtype: torch.dtype):
    rule, operands = masks(37)[mask]
    qkv = inputs(heads=3, dtype=dtype)
    allowed = evaluate(rule, operands, ("mask",)).get("mask")
    found = attention(qkv, operands, rule, tile)
    assert (found[0].dtype, found[1].dtype) == (dtype, dtype)
    assert_close(found, dense(*qkv, allowed), dtype)


@pytest.mark.parametrize("changed", ["flash kernel", "dense kernel"])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (6, 2), (3, 1)])
def test_grouped_heads(heads: int, groups: int, changed: str):
    qkv = inputs(heads, groups, batch=2)
    rule = CAUSAL_RULE if changed == "flash kernel" else f"{CAUSAL_RULE}; score = copy(score)"
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    assert_close(attention(qkv, positions(37), rule), dense(*qkv, mask), torch.float32)


@pytest.mark.parametrize("widths", [(8, 3), (3, 8), (7, 7), (1, 1), (16, 33)])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 50), (50, 1), (31, 17), (2, 65)])
def test_odd_sizes(sizes: tuple[int, int], widths: tuple[int, int]):
    qkv = inputs(queries=sizes[0], keys=sizes[1], widths=widths, dtype=torch.float64)
    operands = [torch.arange(sizes[0])[:, None] + sizes[1] // 2, torch.arange(sizes[1])]
    for tile in (None, 16):
        found = attention(qkv, operands, CAUSAL_RULE, tile)
        assert found[0].shape == (1, 2, sizes[0], widths[1])
        assert found[0].is_contiguous()
        assert_close(found, dense(*qkv, operands[1] <= operands[0]), torch.float64)


@pytest.mark.parametrize("mask", ["causal", "window", "documents", "everything"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_as_torch_does(dtype: torch.dtype, mask: str):
    rule, operands = masks(70)[mask]
    qkv = inputs(heads=4, groups=4, queries=70, widths=(16, 16), dtype=dtype)
    allowed = evaluate(rule, operands, ("mask",)).get("mask")
    out, lse = attention(qkv, operands, rule)
    right, right_lse = dense(*qkv, allowed)
    plain = F.scaled_dot_product_attention(*qkv, attn_mask=allowed, scale=0.3)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    # Tiles are rounded before they are merged: little on the whole, more than torch in single elements.
    ours, theirs = (each.double() - right for each in (out, plain))
    assert ours.norm() <= 1.25 * theirs.norm()
    assert ours.abs().max() <= 4 * theirs.abs().max()
    # torch's kernel takes an exp of little more than half precision
    torch.testing.assert_close(lse.double(), right_lse, rtol=0, atol=2e-4)


def test_half_precision_with_a_changed_score_errs_by_the_rounding_of_the_output():
    qkv = inputs(queries=70, dtype=torch.bfloat16)
    out, lse = attention(qkv, [], SOFTCAP)
    right, right_lse = dense(*qkv, change=lambda score: 2 * torch.tanh(score / 2))
    torch.testing.assert_close(out.double(), right, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(lse.double(), right_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", [None, CAUSAL_RULE])
@pytest.mark.parametrize("shape", [(37, 37), (2, 37, 37), (2, 1, 1), (1, 37), (2, 3, 1, 37)])
def test_biases(shape: tuple[int, ...], mask: str | None):
    bias = torch.randn(shape)
    qkv = inputs(batch=2 if len(shape) == 4 else 1, heads=3 if len(shape) == 4 else 2)
    rule = "bias = copy(x0)" if mask is None else "bias = copy(x0); mask = le(x2, x1)"
    operands = [bias, *positions(37)]
    allowed = None if mask is None else torch.ones(37, 37, dtype=torch.bool).tril()
    for tile in (None, 16):
        assert_close(attention(qkv, operands, rule, tile), dense(*qkv, allowed, bias), torch.float32)


@pytest.mark.parametrize("rule", ["bias = copy(x0)", "bias = copy(x0); score = copy(score)"])
def test_a_bias_may_hide_all_keys_of_a_tile(rule: str):
    qkv = inputs(queries=12)
    bias = torch.zeros(12, 12).masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
    valid = torch.tensor([True] * 4 + [False] * 4 + [True] * 4)  # keys 8 to 12 are a tile that rows 0 to 8 do not see
    found = attention(qkv, [bias], rule, tile=4, valid=valid)
    assert_close(found, dense(*qkv, valid.expand(12, 12), bias), torch.float32)


@pytest.mark.parametrize("rule", ["bias = copy(x0)", "bias = copy(x0); score = copy(score)"])
def test_a_bias_may_hide_all_keys_of_a_row(rule: str):
    qkv = inputs(queries=12)
    bias = torch.zeros(12, 12).index_fill(0, torch.tensor([3]), -torch.inf)
    assert_close(attention(qkv, [bias], rule, tile=None), dense(*qkv, bias=bias), torch.float32)


@pytest.mark.parametrize("queries", [37, DENSE_QUERIES + 45])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_soft_capped_scores(dtype: torch.dtype, queries: int):
    qkv = inputs(heads=2, groups=1, queries=queries, keys=40, dtype=dtype)
    operands, mask = positions(queries, 40), torch.ones(queries, 40, dtype=torch.bool).tril()
    for tile in (None, 16):
        found = attention(qkv, operands, f"{SOFTCAP}; {CAUSAL_RULE}", tile, scale=3.0)
        right = dense(*qkv, mask, change=lambda score: 2 * torch.tanh(score / 2), scale=3.0)
        assert_close(found, right, dtype)


def test_a_bias_is_added_to_the_changed_score():
    qkv, bias = inputs(dtype=torch.float64), torch.randn(37, 37)
    found = attention(qkv, [bias], f"bias = copy(x0); {SOFTCAP}")
    assert_close(found, dense(*qkv, bias=bias, change=lambda score: 2 * torch.tanh(score / 2)), torch.float64)


@pytest.mark.parametrize("rule", ["mask = lt(x1, x0)", "mask = lt(x1, x0); score = copy(score)"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_see_nothing_are_zero_with_no_weight(dtype: torch.dtype, rule: str):
    qkv = inputs(heads=4, groups=2, dtype=dtype)
    for tile in (None, 16):
        out, lse = attention(qkv, positions(37), rule, tile)
        assert torch.equal(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
        assert torch.equal(lse[:, :, 0], torch.full_like(lse[:, :, 0], -torch.inf))
        assert bool(torch.isfinite(lse[:, :, 1:]).all())


@pytest.mark.parametrize("rule", ["mask = lt(x1, x0)", "mask = lt(x1, x0); score = copy(score)"])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_that_see_nothing_may_get_the_mean_of_the_values_there_are(padded: bool, rule: str):
    qkv = inputs(heads=4, groups=2)
    valid = torch.arange(37) % 3 > 0 if padded else torch.ones(37, dtype=torch.bool)
    out, lse = attention(qkv, positions(37), rule, 16, valid if padded else None, empty_mean=True)
    right, right_lse = dense(*qkv, torch.ones(37, 37, dtype=torch.bool).tril(-1) & valid)
    blind = right_lse == -torch.inf
    assert blind[0, 0].nonzero().flatten().tolist() == ([0, 1] if padded else [0])
    mean = qkv[2][:, :, valid].double().mean(dim=2, keepdim=True).repeat_interleave(2, dim=1)
    assert_close((out, lse), (torch.where(blind[..., None], mean, right), right_lse), torch.float32)


@pytest.mark.parametrize("tile", [None, 5, 16])
@pytest.mark.parametrize("rule", ["", WINDOW, SOFTCAP])
def test_keys_that_do_not_exist_have_no_weight(rule: str, tile: int | None):
    q, k, v = inputs()
    valid = torch.rand(37) < 0.7
    k, v = (torch.where(valid[:, None], each, 1e4) for each in (k, v))
    allowed = evaluate(rule, positions(37), ("mask",)).get("mask", torch.ones(37, 37, dtype=torch.bool))
    change = (lambda score: 2 * torch.tanh(score / 2)) if rule == SOFTCAP else None
    found = attention((q, k, v), positions(37), rule, tile, valid)
    assert_close(found, dense(q, k, v, allowed & valid, change=change), torch.float32)


def test_a_key_that_does_not_exist_is_not_seen_through_a_causal_tile():
    qkv = inputs(queries=8)
    valid = torch.tensor([True] * 6 + [False] * 2)
    found = attention(qkv, positions(8), CAUSAL_RULE, None, valid)
    assert_close(found, dense(*qkv, torch.ones(8, 8, dtype=torch.bool).tril() & valid), torch.float32)


@pytest.mark.parametrize("scheme", ["zigzag", "contiguous"])
@pytest.mark.parametrize("lengths", [[601], [1, 2, 1], [70, 300, 5, 131]])
def test_ranks_together_compute_what_one_does(lengths: list[int], scheme: str):
    """Queries of each rank against keys in gathered order, as the compiled program calls the op."""
    sp, tokens = 3, sum(lengths)
    layout = token_layout(lengths, sp, scheme, min_shard_length=2)
    q, k, v = inputs(heads=2, groups=1, queries=tokens, dtype=torch.float64)
    place, number = (each.flatten() for each in documents(lengths)[::2])
    everyone = layout.local_index.reshape(-1)
    garbage = torch.where(layout.valid.reshape(-1)[:, None], 0.0, torch.randn(everyone.numel(), 1).double() * 100)
    keys, values = (each[:, :, everyone] + garbage for each in (k, v))
    parts = []
    for rank in range(sp):
        rows, bounds = layout.local_index[rank], (layout.tile_bounds(rank), layout.gathered_tile_bounds())
        operands = [place[rows][:, None], place[everyone][None], number[rows][:, None], number[everyone][None]]
        valid = layout.valid.reshape(-1)
        plan = torch.ops.sp_compile.tile_plan(operands, DOCUMENTS, valid, *bounds)
        parts.append(
            torch.ops.sp_compile.attention(
                q[:, :, rows], keys, values, operands, DOCUMENTS, 0.3, False, plan, *bounds, valid
            )
        )
    mask = evaluate(DOCUMENTS, documents(lengths), ("mask",))["mask"]
    found = [torch.cat(each, dim=2)[:, :, layout.restore_index] for each in zip(*parts, strict=True)]
    assert_close((found[0], found[1]), dense(q, k, v, mask), torch.float64)


def test_the_ops_have_the_schema_and_shapes_that_tracing_sees():
    q_bounds, k_bounds = cuts(9, 4), cuts(7, 4)
    q, k, v = inputs(heads=2, queries=9, keys=7, widths=(4, 6), dtype=torch.bfloat16)
    operands, valid = positions(9, 7), torch.ones(7, dtype=torch.bool)
    tests = ("test_schema", "test_faketensor")
    arguments = (operands, CAUSAL_RULE, valid, q_bounds, k_bounds)
    torch.library.opcheck(torch.ops.sp_compile.tile_plan.default, arguments, test_utils=tests)
    plan = plan_tiles(*arguments)
    arguments = (q.mT.contiguous().mT, k, v, operands, CAUSAL_RULE, 0.5, False, plan, q_bounds, k_bounds, valid)
    torch.library.opcheck(torch.ops.sp_compile.attention.default, arguments, test_utils=tests)


# plans


def kinds(rule: str, operands: list[torch.Tensor], tile: int, valid: torch.Tensor | None = None) -> list[str]:
    """Rows of a plan over square tiles, in letters."""
    length = max(each.numel() for each in [*operands, *([] if valid is None else [valid])])
    plan = plan_tiles(operands, rule, valid, cuts(length, tile), cuts(length, tile))
    assert plan.dtype == torch.int8
    return ["".join(".#?\\"[kind] for kind in row) for row in plan.tolist()]


def test_plans_of_masks():
    assert kinds(CAUSAL_RULE, positions(16), 4) == ["\\...", "#\\..", "##\\.", "###\\"]
    assert kinds(WINDOW, positions(24), 4) == [
        "\\.....", "#\\....", "?#\\...", ".?#\\..", "..?#\\.", "...?#\\",
    ]  # fmt: skip
    assert kinds(DOCUMENTS, documents([8, 4, 4]), 4) == ["\\...", "#\\..", "..\\.", "...\\"]
    assert kinds(DOCUMENTS, documents([6, 10]), 4) == ["\\...", "??..", ".?\\.", ".?#\\"]
    assert kinds("mask = lt(x1, x0)", positions(8), 4) == ["?.", "#?"]
    assert kinds("bias = copy(x0)", [torch.zeros(1, 8)], 4) == ["##", "##"]


def test_plans_know_the_keys_that_do_not_exist():
    valid = torch.tensor([True] * 4 + [False] * 4 + [True] * 2 + [False] * 2)
    assert kinds("", [], 4, valid) == ["#.?"] * 3
    assert kinds(CAUSAL_RULE, positions(12), 4, valid)[:2] == ["\\..", "#.."]


def test_plans_compare_large_positions_exactly():
    """Neighbours above 2**24 are one number in single precision."""
    rows, columns = torch.tensor([[2**24]]), torch.tensor([[2**24 + 1]])
    assert kinds(CAUSAL_RULE, [rows, columns], 1) == ["."]


RULES = {
    CAUSAL_RULE: 2,
    "t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, 4); mask = and(t0, t2)": 2,
    DOCUMENTS: 4,
    "t0 = eq(x0, x1); mask = not(t0)": 2,
    "t0 = le(x0, x1); t1 = lt(x2, x3); mask = xor(t0, t1)": 4,
    "t0 = eq(x2, x3); t1 = gt(x0, x1); mask = or(t0, t1)": 4,
    "t0 = sub(x0, x1); t1 = abs(t0); mask = le(t1, 3)": 2,
    "t0 = floor_divide(x0, 3); t1 = floor_divide(x1, 3); mask = eq(t0, t1)": 2,
    "": 0,
}


def bounds(length: int) -> st.SearchStrategy[list[int]]:
    inner = st.sets(st.integers(1, max(1, length - 1)), max_size=4)
    return inner.map(lambda cuts: sorted({0, length, *(cut for cut in cuts if cut < length)}))


@st.composite
def planned(draw: Any) -> tuple[str, list[torch.Tensor], torch.Tensor | None, list[int], list[int]]:
    """A rule with operands of a few heads, and tiles of any size."""
    queries, keys = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rule = draw(st.sampled_from(list(RULES)))
    shift = draw(st.integers(0, 8))
    operands = []
    for i in range(RULES[rule]):
        length, shape = (queries, (-1, 1)) if i % 2 == 0 else (keys, (1, -1))
        if draw(st.booleans()):
            operand = torch.arange(length) + (shift if i % 2 else 0)
        else:
            operand = torch.tensor(draw(st.lists(st.integers(0, 6), min_size=length, max_size=length)))
        operand = operand.reshape(shape)
        heads = draw(st.sampled_from([None, 1, 2]))
        operands.append(operand if heads is None else torch.stack([operand + head for head in range(heads)])[None])
    valid = draw(st.none() | st.lists(st.booleans(), min_size=keys, max_size=keys).map(torch.tensor))
    return rule, operands, valid, draw(bounds(queries)), draw(bounds(keys))


@settings(max_examples=400, deadline=None)
@given(planned())
def test_plans_are_never_wrong(case: tuple[str, list[torch.Tensor], torch.Tensor | None, list[int], list[int]]):
    rule, operands, valid, q_cuts, k_cuts = case
    mask = evaluate(rule, operands, ("mask",)).get("mask", torch.tensor(True))
    mask = mask if valid is None else mask & valid
    mask = mask.expand(*torch.broadcast_shapes(mask.shape, (1, 1, q_cuts[-1], k_cuts[-1])))
    plan = plan_tiles(operands, rule, valid, torch.tensor(q_cuts), torch.tensor(k_cuts))
    assert plan.shape == (len(q_cuts) - 1, len(k_cuts) - 1)
    for i, (q_start, q_end) in enumerate(pairwise(q_cuts)):
        for j, (k_start, k_end) in enumerate(pairwise(k_cuts)):
            tile, kind = mask[:, :, q_start:q_end, k_start:k_end], int(plan[i, j])
            if kind == EMPTY:
                assert not bool(tile.any())
            elif kind == FULL:
                assert bool(tile.all())
            elif kind == CAUSAL:
                assert bool((tile == torch.ones(tile.shape[-2:], dtype=torch.bool).tril()).all())


# tiles


@st.composite
def plans(draw: Any) -> tuple[torch.Tensor, list[int], list[int]]:
    """Kinds of tiles, causal ones only where a tile is square."""
    q_cuts, k_cuts = draw(bounds(draw(st.integers(1, 12)))), draw(bounds(draw(st.integers(1, 12))))
    if draw(st.booleans()):
        k_cuts = q_cuts
    triangle = draw(st.booleans())
    rows = []
    for i, (q_start, q_end) in enumerate(pairwise(q_cuts)):
        row = []
        for j, (k_start, k_end) in enumerate(pairwise(k_cuts)):
            square = q_end - q_start == k_end - k_start
            likely = CAUSAL if i == j and square else FULL if j < i else EMPTY
            any_kind = st.sampled_from([EMPTY, FULL, PARTIAL, *([CAUSAL] if square else [])])
            row.append(likely if triangle and draw(st.integers(0, 9)) else draw(any_kind))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int8), q_cuts, k_cuts


@settings(max_examples=400, deadline=None)
@given(plans())
def test_merged_tiles_cover_what_is_not_empty_once(case: tuple[torch.Tensor, list[int], list[int]]):
    plan, q_cuts, k_cuts = case
    expected = torch.zeros(q_cuts[-1], k_cuts[-1], dtype=torch.int64)
    masked = torch.zeros_like(expected)  # elements that only a partial tile may hold
    for i, (q_start, q_end) in enumerate(pairwise(q_cuts)):
        for j, (k_start, k_end) in enumerate(pairwise(k_cuts)):
            part, kind = (slice(q_start, q_end), slice(k_start, k_end)), int(plan[i, j])
            ones = torch.ones(q_end - q_start, k_end - k_start, dtype=torch.int64)
            expected[part] = {EMPTY: ones * 0, FULL: ones, PARTIAL: ones, CAUSAL: ones.tril()}[kind]
            masked[part] = ones * (kind == PARTIAL)
    found, found_masked = torch.zeros_like(expected), torch.zeros_like(expected)
    for tile in merged_tiles(plan, torch.tensor(q_cuts), torch.tensor(k_cuts)):
        part = found[tile.q_start : tile.q_end, tile.k_start : tile.k_end]
        assert part.numel() > 0
        part += torch.ones_like(part).tril() if tile.kind == CAUSAL else 1
        assert tile.kind != CAUSAL or part.shape[0] == part.shape[1]
        found_masked[tile.q_start : tile.q_end, tile.k_start : tile.k_end] += tile.kind == PARTIAL
    assert torch.equal(found, expected)
    assert torch.equal(found_masked, masked)


def tiles_of(rows: list[str], cuts: list[int]) -> list[Tile]:
    plan = torch.tensor([[".#?\\".index(kind) for kind in row] for row in rows], dtype=torch.int8)
    bounds = torch.tensor(cuts)
    return sorted(merged_tiles(plan, bounds, bounds), key=lambda tile: (tile.q_start, tile.k_start))


def test_tiles_are_merged_into_few():
    assert tiles_of(["\\...", "#\\..", "##\\.", "###\\"], [0, 4, 6, 10, 11]) == [Tile(0, 11, 0, 11, CAUSAL)]
    assert tiles_of(["\\...", "#\\..", "..\\.", "..#\\"], [0, 4, 6, 10, 11]) == [
        Tile(0, 6, 0, 6, CAUSAL), Tile(6, 11, 6, 11, CAUSAL),
    ]  # fmt: skip
    assert tiles_of(["##.", "##.", "..#"], [0, 2, 4, 6]) == [Tile(0, 4, 0, 4, FULL), Tile(4, 6, 4, 6, FULL)]
    assert tiles_of(["??.", "#.?", "..?"], [0, 2, 4, 6]) == [
        Tile(0, 2, 0, 4, PARTIAL), Tile(2, 4, 0, 2, FULL), Tile(2, 4, 4, 6, PARTIAL), Tile(4, 6, 4, 6, PARTIAL),
    ]  # fmt: skip


def test_masked_tiles_stay_narrow_enough_to_hold_their_mask():
    k_bounds = cuts(3 * MASKED_KEYS, MASKED_KEYS // 4)
    plan = torch.full((1, len(k_bounds) - 1), PARTIAL, dtype=torch.int8)
    tiles = merged_tiles(plan, torch.tensor([0, 7]), k_bounds)
    assert [(tile.k_start, tile.k_end) for tile in tiles] == [
        (start, start + MASKED_KEYS) for start in range(0, 3 * MASKED_KEYS, MASKED_KEYS)
    ]


# merging


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_merging_partials_is_order_free(data: st.DataObject, seed: int):
    generator = torch.Generator().manual_seed(seed)
    blind = data.draw(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
    order = data.draw(st.permutations(range(len(blind))))
    partials = []
    for rows in blind:
        out, lse = (torch.randn(2, 5, 3, generator=generator).double() for _ in range(2))
        lse = (lse[..., 0] * 20).masked_fill(torch.tensor(rows), -torch.inf)
        partials.append((out.masked_fill(torch.tensor(rows)[:, None], 0.0), lse))

    def merged(parts: list[Partial]) -> Partial:
        into = torch.zeros(2, 5, 3).double(), torch.full((2, 5), -torch.inf).double()
        for i, part in enumerate(parts):
            _merge(into, part, seen=i > 0)
        return into

    out, lse = merged([partials[i] for i in order])
    for found, other in zip((out, lse), merged(partials), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-12)
    outs, lses = (torch.stack(each) for each in zip(*partials, strict=True))
    weights = torch.softmax(lses.clamp(min=-1e30), dim=0).masked_fill(lses == -torch.inf, 0.0)
    torch.testing.assert_close(out, (weights[..., None] * outs).sum(dim=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, torch.logsumexp(lses, dim=0), rtol=1e-12, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(plans(), st.sampled_from(["", "; score = copy(score)"]))
def test_any_mixture_of_tiles(case: tuple[torch.Tensor, list[int], list[int]], change: str):
    plan, q_cuts, k_cuts = case
    mask = torch.zeros(q_cuts[-1], k_cuts[-1], dtype=torch.bool)
    for i, (q_start, q_end) in enumerate(pairwise(q_cuts)):
        for j, (k_start, k_end) in enumerate(pairwise(k_cuts)):
            shape = q_end - q_start, k_end - k_start
            ones = torch.ones(shape, dtype=torch.bool)
            chosen = {EMPTY: ~ones, FULL: ones, PARTIAL: torch.rand(shape) < 0.5, CAUSAL: ones.tril()}
            mask[q_start:q_end, k_start:k_end] = chosen[int(plan[i, j])]
    qkv = inputs(queries=q_cuts[-1], keys=k_cuts[-1], widths=(4, 4), dtype=torch.float64)
    bounds = torch.tensor(q_cuts), torch.tensor(k_cuts)
    found = torch.ops.sp_compile.attention(*qkv, [mask], f"mask = copy(x0){change}", 0.3, False, plan, *bounds, None)
    assert_close(found, dense(*qkv, mask), torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_tiles_may_be_computed_in_any_order(data: st.DataObject):
    qkv, (rule, operands) = inputs(queries=30, dtype=torch.float64), masks(30)["window"]
    plan = plan_tiles(operands, rule, None, cuts(30, 7), cuts(30, 6))
    pieces = [
        Tile(tile.q_start, tile.q_end, key, key + 1, tile.kind)
        for tile in merged_tiles(plan, cuts(30, 7), cuts(30, 6))
        for key in range(tile.k_start, tile.k_end)
    ]
    assert {each.kind for each in pieces} <= {FULL, PARTIAL}
    found = attend(*qkv, operands, rule, 0.3, data.draw(st.permutations(pieces)), None, False)
    assert_close(found, dense(*qkv, evaluate(rule, operands, ("mask",))["mask"]), torch.float64)
