"""Attention: against a dense softmax in double precision, whatever the kernel, the mask, and the plan's order.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sp_compile.kernels import Partial, attend
from sp_compile.kernels.few import attend_few, of_few_queries
from sp_compile.kernels.flash import merge
from sp_compile.kernels.regions import Region, as_tensor
from sp_compile.kernels.tiles import HELD_KEYS, HELD_QUERIES
from sp_compile.layout import token_layout
from sp_compile.score_rule import evaluate

CAUSAL_RULE = "mask = le(x1, x0)"
WINDOW = "t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, 9); mask = and(t0, t2)"
DOCUMENTS = "t0 = le(x1, x0); t1 = eq(x3, x2); mask = and(t0, t1)"
SOFTCAP = "t0 = div(score, 2.0); t1 = tanh(t0); score = mul(t1, 2.0)"
KERNELS = ("tiles", "dense", "dense_fp64")
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


def attention(
    qkv: tuple[torch.Tensor, ...],
    operands: list[torch.Tensor],
    rule: str,
    kernel: str = "tiles",
    valid: torch.Tensor | None = None,
    tables: Sequence[torch.Tensor] = (),
    **options: Any,
) -> Partial:
    """The custom op, planned where the kernel is one that takes a plan."""
    plan = None
    if kernel == "tiles":
        rows = (torch.zeros(each.shape[2], dtype=torch.int64) for each in qkv[:2])
        plan = torch.ops.sp_compile.tile_plan(operands, tables, rule, valid, *rows)
    arguments = {"scale": 0.3, "kernel": kernel, "plan": plan, "valid": valid, **options}
    return torch.ops.sp_compile.attention(*qkv, operands, list(tables), rule, **arguments)


def positions(queries: int, keys: int | None = None) -> list[torch.Tensor]:
    return [torch.arange(queries)[:, None], torch.arange(keys or queries)[None, :]]


def documents(lengths: list[int]) -> list[torch.Tensor]:
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return [*positions(len(numbers)), numbers[:, None], numbers[None, :]]


def masks(queries: int) -> dict[str, tuple[str, list[torch.Tensor]]]:
    """Rules with their operands, by name."""
    shuffled = torch.randperm(queries)
    wide = queries * 4 // 5
    causal = "t0 = le(x1, x0); t1 = sub(x0, x1)"
    return {
        "everything": ("", []),
        "causal": (CAUSAL_RULE, positions(queries)),
        "strictly causal": ("mask = lt(x1, x0)", positions(queries)),
        "anti-causal": ("mask = ge(x1, x0)", positions(queries)),
        "window": (WINDOW, positions(queries)),
        "wide window": (f"{causal}; t2 = lt(t1, {wide}); mask = and(t0, t2)", positions(queries)),
        "both sides": ("t0 = sub(x0, x1); t1 = abs(t0); mask = le(t1, 7)", positions(queries)),
        "sinks": (
            f"{causal}; t2 = lt(t1, 9); t3 = and(t0, t2); t4 = lt(x1, 4); t5 = and(t0, t4); mask = or(t3, t5)",
            positions(queries),
        ),
        "prefix": (f"t0 = le(x1, x0); t1 = lt(x1, {queries // 3}); mask = or(t0, t1)", positions(queries)),
        "documents": (DOCUMENTS, documents([queries - queries // 2 - 1, 1, queries // 2])),
        "short documents": (DOCUMENTS, documents([10] * (queries // 10) + [queries % 10] * (queries % 10 > 0))),
        "shuffled causal": (CAUSAL_RULE, [shuffled[:, None], shuffled[None, :]]),
        "matrix": ("mask = copy(x0)", [torch.rand(queries, queries) < 0.4]),
        "matrix of each head": ("mask = copy(x0)", [torch.rand(1, 2, queries, queries) < 0.4]),
        "window of each head": (
            f"{causal}; t2 = lt(t1, x2); mask = and(t0, t2)",
            [*positions(queries), torch.tensor([5, wide])[:, None, None]],
        ),
    }  # fmt: skip


def assert_close(found: Partial, expected: Partial, dtype: torch.dtype) -> None:
    for each, right in zip(found, expected, strict=True):
        torch.testing.assert_close(each.double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# against the definition


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("queries", [37, 300])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mask", masks(3))
def test_masks(mask: str, kernel: str, queries: int, dtype: torch.dtype):
    rule, operands = masks(queries)[mask]
    qkv = inputs(queries=queries, dtype=dtype)
    allowed = evaluate(rule, operands, ("mask",)).get("mask")
    found = attention(qkv, operands, rule, kernel)
    assert (found[0].dtype, found[1].dtype) == (dtype, dtype)
    assert_close(found, dense(*qkv, allowed), dtype)


@pytest.mark.parametrize("mask", ["causal", "strictly causal", "anti-causal", "wide window", "prefix", "documents"])
def test_masks_of_many_tokens(mask: str):
    """Triangles and bands that are halved and merged."""
    rule, operands = masks(1400)[mask]
    qkv = inputs(queries=1400, widths=(4, 4))
    assert_close(
        attention(qkv, operands, rule), dense(*qkv, evaluate(rule, operands, ("mask",))["mask"]), torch.float32
    )


@pytest.mark.parametrize("changed", ["", "; score = copy(score)", "; bias = mul(x1, 0.0)"])
@pytest.mark.parametrize("rule", [CAUSAL_RULE, WINDOW])
def test_kernels_plan_for_themselves_where_no_plan_is_given(rule: str, changed: str):
    qkv, operands = inputs(queries=200, batch=2), positions(200)
    found = torch.ops.sp_compile.attention(*qkv, operands, [], rule + changed, 0.3)
    assert_close(found, dense(*qkv, evaluate(rule, operands, ("mask",))["mask"]), torch.float32)


@pytest.mark.parametrize("changed", ["flash kernel", "dense kernel"])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (6, 2), (3, 1)])
def test_grouped_heads(heads: int, groups: int, changed: str):
    qkv = inputs(heads, groups, batch=2)
    rule = CAUSAL_RULE if changed == "flash kernel" else f"{CAUSAL_RULE}; score = copy(score)"
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    assert_close(attention(qkv, positions(37), rule), dense(*qkv, mask), torch.float32)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (6, 2)])
@pytest.mark.parametrize("mask", ["causal", "window", "wide window"])
def test_grouped_heads_of_rows_laid_out_as_models_do(heads: int, groups: int, mask: str):
    """Heads beside each other in memory, which strips read as overlapping views."""
    rule, operands = masks(300)[mask]
    q, k, v = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in inputs(heads, groups, 300, batch=2))
    found = attention((q, k, v), operands, rule)
    assert_close(found, dense(q, k, v, evaluate(rule, operands, ("mask",))["mask"]), torch.float32)


@pytest.mark.parametrize("widths", [(8, 3), (3, 8), (7, 7), (1, 1), (16, 33)])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 50), (50, 1), (31, 17), (2, 65)])
def test_odd_sizes(sizes: tuple[int, int], widths: tuple[int, int]):
    qkv = inputs(queries=sizes[0], keys=sizes[1], widths=widths, dtype=torch.float64)
    operands = [torch.arange(sizes[0])[:, None] + sizes[1] // 2, torch.arange(sizes[1])]
    for kernel in ("tiles", "dense"):
        found = attention(qkv, operands, CAUSAL_RULE, kernel)
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
    # Regions are rounded before they are merged: little on the whole, more than torch in single elements.
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
    for kernel in KERNELS:
        assert_close(attention(qkv, operands, rule, kernel), dense(*qkv, allowed, bias), torch.float32)


@pytest.mark.parametrize("rule", ["bias = copy(x0)", "bias = copy(x0); score = copy(score)"])
def test_a_bias_may_hide_all_keys_of_a_region(rule: str):
    qkv = inputs(queries=300)
    bias = torch.zeros(300, 300).masked_fill(torch.ones(300, 300, dtype=torch.bool).triu(1), -torch.inf)
    valid = (torch.arange(300) < 100) | (
        torch.arange(300) >= 200
    )  # keys from 200 on are one that rows to 200 do not see
    found = attention(qkv, [bias], rule, valid=valid)
    assert_close(found, dense(*qkv, valid.expand(300, 300), bias), torch.float32)


@pytest.mark.parametrize("rule", ["bias = copy(x0)", "bias = copy(x0); score = copy(score)"])
def test_biases_are_held_a_block_at_a_time(rule: str):
    sizes = HELD_QUERIES + 30, HELD_KEYS + 50
    qkv, bias = inputs(1, 1, *sizes, widths=(4, 4)), torch.randn(sizes)
    masked = f"{rule}; t0 = sub(x1, x2); t1 = abs(t0); mask = le(t1, 250)"
    found = attention(qkv, [bias, *positions(*sizes)], masked)
    distance = torch.arange(sizes[1]) - torch.arange(sizes[0])[:, None]
    assert_close(found, dense(*qkv, distance.abs() <= 250, bias), torch.float32)
    assert_close(attention(qkv, [bias], rule), dense(*qkv, bias=bias), torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
def test_biases_and_masks_that_are_looked_up(kernel: str):
    qkv, table = inputs(heads=3, queries=150), torch.randn(3, 299)
    rule = "t0 = sub(x0, x1); t1 = add(t0, 149); bias = lookup(table0, t1); t2 = lookup(table1, t1); mask = gt(t2, 0.0)"
    seen = (torch.arange(299)[None] >= 149).float()
    distance = torch.arange(150)[:, None] - torch.arange(150) + 149
    found = attention(qkv, positions(150), rule, kernel, tables=[table, seen])
    assert_close(found, dense(*qkv, seen[0, distance] > 0, table[:, distance][None]), torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("change", ["", "; score = copy(score)"])
def test_rows_of_a_batch_that_are_padded_by_other_lengths(change: str, kernel: str):
    qkv = inputs(heads=2, groups=1, queries=200, batch=3)
    padding = (torch.arange(200) >= torch.tensor([0, 70, 199])[:, None])[:, None, None]
    rule = f"t0 = le(x1, x0); mask = and(t0, x2){change}"
    found = attention(qkv, [*positions(200), padding], rule, kernel)
    assert_close(found, dense(*qkv, torch.ones(200, 200, dtype=torch.bool).tril() & padding), torch.float32)


@pytest.mark.parametrize("rule", ["bias = copy(x0)", "bias = copy(x0); score = copy(score)"])
def test_a_bias_may_hide_all_keys_of_a_row(rule: str):
    qkv = inputs(queries=12)
    bias = torch.zeros(12, 12).index_fill(0, torch.tensor([3]), -torch.inf)
    assert_close(attention(qkv, [bias], rule), dense(*qkv, bias=bias), torch.float32)


@pytest.mark.parametrize("queries", [37, HELD_QUERIES + 45])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_soft_capped_scores(dtype: torch.dtype, queries: int):
    qkv = inputs(heads=2, groups=1, queries=queries, keys=40, dtype=dtype)
    operands, mask = positions(queries, 40), torch.ones(queries, 40, dtype=torch.bool).tril()
    for kernel in KERNELS:
        found = attention(qkv, operands, f"{SOFTCAP}; {CAUSAL_RULE}", kernel, scale=3.0)
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
    for kernel in KERNELS:
        out, lse = attention(qkv, positions(37), rule, kernel)
        assert torch.equal(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
        assert torch.equal(lse[:, :, 0], torch.full_like(lse[:, :, 0], -torch.inf))
        assert bool(torch.isfinite(lse[:, :, 1:]).all())


@pytest.mark.parametrize("rule", ["mask = lt(x1, x0)", "mask = lt(x1, x0); score = copy(score)"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_see_nothing_may_get_the_mean_of_the_values_there_are(kernel: str, padded: bool, rule: str):
    qkv = inputs(heads=4, groups=2)
    valid = torch.arange(37) % 3 > 0 if padded else torch.ones(37, dtype=torch.bool)
    out, lse = attention(qkv, positions(37), rule, kernel, valid if padded else None, empty_mean=True)
    right, right_lse = dense(*qkv, torch.ones(37, 37, dtype=torch.bool).tril(-1) & valid)
    blind = right_lse == -torch.inf
    assert blind[0, 0].nonzero().flatten().tolist() == ([0, 1] if padded else [0])
    mean = qkv[2][:, :, valid].double().mean(dim=2, keepdim=True).repeat_interleave(2, dim=1)
    assert_close((out, lse), (torch.where(blind[..., None], mean, right), right_lse), torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("queries", [37, 300])
@pytest.mark.parametrize("rule", ["", CAUSAL_RULE, WINDOW, SOFTCAP])
def test_keys_that_do_not_exist_have_no_weight(rule: str, queries: int, kernel: str):
    q, k, v = inputs(queries=queries)
    places = torch.arange(queries)
    for valid in (torch.rand(queries) < 0.7, places < queries - 2, (places < 90) | (places >= 170)):
        big_k, big_v = (torch.where(valid[:, None], each, 1e4) for each in (k, v))
        allowed = evaluate(rule, positions(queries), ("mask",)).get("mask", torch.tensor(True)) & valid
        change = (lambda score: 2 * torch.tanh(score / 2)) if rule == SOFTCAP else None
        found = attention((q, big_k, big_v), positions(queries), rule, kernel, valid)
        assert_close(found, dense(q, big_k, big_v, allowed, change=change), torch.float32)


def test_a_key_that_does_not_exist_may_hold_anything_where_the_mask_is_a_band():
    q, k, v = inputs(queries=300)
    valid = torch.arange(300) < 200
    nan_k, nan_v = (torch.where(valid[:, None], each, torch.nan) for each in (k, v))
    for rule in ("", CAUSAL_RULE, WINDOW):
        found = attention((q, nan_k, nan_v), positions(300), rule, valid=valid)
        allowed = evaluate(rule, positions(300), ("mask",)).get("mask", torch.tensor(True)) & valid
        assert_close(found, dense(q, k, v, allowed), torch.float32)


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
        rows = layout.local_index[rank]
        operands = [place[rows][:, None], place[everyone][None], number[rows][:, None], number[everyone][None]]
        valid = layout.valid.reshape(-1)
        parts.append(attention((q[:, :, rows], keys, values), operands, DOCUMENTS, valid=valid))
    mask = evaluate(DOCUMENTS, documents(lengths), ("mask",))["mask"]
    found = [torch.cat(each, dim=2)[:, :, layout.restore_index] for each in zip(*parts, strict=True)]
    assert_close((found[0], found[1]), dense(q, k, v, mask), torch.float64)


def test_the_ops_have_the_schema_and_shapes_that_tracing_sees():
    q, k, v = inputs(heads=2, queries=9, keys=7, widths=(4, 6), dtype=torch.bfloat16)
    operands, valid = positions(9, 7), torch.ones(7, dtype=torch.bool)
    tests = ("test_schema", "test_faketensor")
    rule, tables = f"{CAUSAL_RULE}; bias = lookup(table0, x1)", [torch.randn(2, 7)]
    arguments = (operands, tables, rule, valid, torch.zeros(9), torch.zeros(7))
    torch.library.opcheck(torch.ops.sp_compile.tile_plan.default, arguments, test_utils=tests)
    plan = torch.ops.sp_compile.tile_plan(*arguments)
    for kernel, planned in [("tiles", plan), ("tiles", None), ("dense", None), ("dense_fp64", None)]:
        arguments = (q.mT.contiguous().mT, k, v, operands, tables, rule, 0.5, True, kernel, planned, valid)
        torch.library.opcheck(torch.ops.sp_compile.attention.default, arguments, test_utils=tests)


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
        for part in parts:
            merge(into, part)
        return into

    out, lse = merged([partials[i] for i in order])
    for found, other in zip((out, lse), merged(partials), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-12)
    outs, lses = (torch.stack(each) for each in zip(*partials, strict=True))
    weights = torch.softmax(lses.clamp(min=-1e30), dim=0).masked_fill(lses == -torch.inf, 0.0)
    torch.testing.assert_close(out, (weights[..., None] * outs).sum(dim=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, torch.logsumexp(lses, dim=0), rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([(4, 1), (6, 3), (2, 2)]), st.sampled_from([torch.float64, torch.float32]))
def test_few_queries_each_over_ranges_of_keys(data: st.DataObject, heads: tuple[int, int], dtype: torch.dtype):
    """Some queries see no key, some several ranges, and others share theirs."""
    qkv = inputs(*heads, queries=20, keys=60, widths=(8, 5), batch=2, dtype=dtype)
    mask = torch.zeros(2, 1, 20, 60, dtype=torch.bool)
    regions = []
    for start, end in ((0, 1), (1, 3), (3, 4), (9, 17), (19, 20)):
        edges = sorted(data.draw(st.sets(st.integers(0, 60), max_size=6)))
        for left, right in zip(edges[::2], edges[1::2], strict=False):
            row = data.draw(st.sampled_from([-1, 0, 1]))
            regions.append(Region(row, start, end, left, right))
            mask[slice(None) if row < 0 else row, :, start:end, left:right] = True
    data.draw(st.randoms(use_true_random=False)).shuffle(regions)
    few, others = of_few_queries(regions)
    assert others == []
    assert sum(map(len, few.values())) == len(regions)
    found = attend("tiles", *qkv, [], [], "", 0.3, as_tensor(regions), None)
    assert_close(found, dense(*qkv, mask), dtype)


def test_queries_of_ranges_that_overlap_are_left_to_others():
    regions = [Region(-1, 0, 3, 0, 5), Region(-1, 2, 4, 5, 9), Region(0, 1, 2, 0, 5), Region(-1, 0, 9, 9, 12)]
    assert of_few_queries(regions) == ({0: [regions[2]]}, [regions[3], *regions[:2]])


@pytest.mark.parametrize("queries", [3, 300])
@pytest.mark.parametrize("kernel", ["tiles", "dense"])
def test_values_may_have_another_dtype_than_queries_and_keys(queries: int, kernel: str):
    q, k, v = inputs(4, 2, queries=queries)
    rule, operands = masks(queries)["causal"]
    mask = evaluate(rule, operands, ("mask",))["mask"]
    v = v.bfloat16()
    assert_close(attention((q, k, v), operands, rule, kernel), dense(q, k, v, mask), torch.float32)


def test_few_queries_over_a_cache_of_lower_precision():
    q, k, v = inputs(4, 2, queries=3, keys=40)
    k, v = k.bfloat16(), v.bfloat16()
    regions = [Region(-1, i, i + 1, 10 * i, 10 * i + 15) for i in range(3)]
    mask = torch.zeros(3, 40, dtype=torch.bool)
    for each in regions:
        mask[each.q_start, each.k_start : each.k_end] = True
    assert_close(attend_few(q, k, v, 0.3, regions), dense(q, k, v, mask), torch.float32)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_regions_may_be_computed_in_any_order(data: st.DataObject):
    """Rows of the queries reach a region when some of them, all or none have seen keys before."""
    qkv = inputs(queries=30, dtype=torch.float64)
    rule, operands = masks(30)[data.draw(st.sampled_from(["window", "both sides", "short documents"]))]
    mask = evaluate(rule, operands, ("mask",))["mask"]
    boxes = []
    for start, end in ((0, 4), (4, 11), (11, 30)):
        cut = data.draw(st.integers(1, 29))
        boxes += [Region(-1, start, end, left, right, masked=True) for left, right in ((0, cut), (cut, 30))]
    single = [Region(-1, row, row + 1, key, key + 1) for row, key in mask.nonzero().tolist()]
    for regions in (boxes, single):
        data.draw(st.randoms(use_true_random=False)).shuffle(regions)
        found = attend("tiles", *qkv, operands, [], rule, 0.3, as_tensor(regions), None)
        assert_close(found, dense(*qkv, mask), torch.float64)


def test_a_kernel_that_there_is_not_is_a_mistake():
    for name in ("flex", "densest", ""):
        with pytest.raises(AssertionError, match=f"no kernel '{name}'"):
            attention(inputs(), [], "", name)
