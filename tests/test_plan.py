"""Plans hold every visible pair of query and key once, whatever the mask, and are as small as its structure."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sp_compile.kernels import plan
from sp_compile.kernels.plan import plan_regions
from sp_compile.kernels.regions import Region, as_regions, as_tensor
from sp_compile.kernels.runs import plan_within
from sp_compile.layout import token_layout
from sp_compile.score_rule import evaluate

CAUSAL = "mask = le(x1, x0)"
DOCUMENTS = "t0 = le(x1, x0); t1 = eq(x3, x2); mask = and(t0, t1)"
Operands = list[torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def planned_however_small() -> Iterator[None]:
    with mock.patch.object(plan, "LOOKED_AT", 0):
        yield


def seen(
    rule: str, operands: Sequence[torch.Tensor], valid: torch.Tensor | None, sizes: tuple[int, int], tables: Any = ()
) -> torch.Tensor:
    """The mask, bool ``[rows, heads, queries, keys]``."""
    mask = evaluate(rule, operands, ("mask",), tables=tables).get("mask", torch.tensor(True)).bool()
    mask = mask if valid is None else mask & valid
    return mask.expand(*torch.broadcast_shapes(mask.shape, (1, 1, *sizes)))


def counted(regions: Sequence[Region], mask: torch.Tensor) -> torch.Tensor:
    """How often each element is computed, ``[rows, queries, keys]``; of masked regions, where some head sees it."""
    found = torch.zeros(mask.shape[0], *mask.shape[2:], dtype=torch.int64)
    for each in regions:
        rows = slice(None) if each.row < 0 else slice(each.row, each.row + 1)
        part = rows, slice(each.q_start, each.q_end), slice(each.k_start, each.k_end)
        distance = torch.arange(each.k_end - each.k_start) - torch.arange(each.q_end - each.q_start)[:, None]
        band = (distance >= each.low) & (distance <= each.high)
        found[part] += mask.any(dim=1)[part] & band if each.masked else band
    return found


def check(
    rule: str,
    operands: Operands,
    valid: torch.Tensor | None,
    sizes: tuple[int, int],
    tables: Operands | tuple[()] = (),
) -> list[Region]:
    """Plan a mask and compare with its elements: each that some head sees once, unmasked ones seen by all heads."""
    regions = plan_regions(operands, tables, rule, valid, *sizes)
    mask = seen(rule, operands, valid, sizes, tables)
    assert torch.equal(counted(regions, mask), mask.any(dim=1).long())
    bands = counted([each for each in regions if not each.masked], mask)
    assert torch.equal(bands > 0, (bands > 0) & mask.all(dim=1))
    assert all(0 <= each.q_start < each.q_end <= sizes[0] for each in regions)
    assert all(0 <= each.k_start < each.k_end <= sizes[1] for each in regions)
    return regions


def positions(queries: int, keys: int | None = None) -> Operands:
    return [torch.arange(queries)[:, None], torch.arange(keys or queries)[None, :]]


def documents(lengths: Sequence[int]) -> Operands:
    """Positions and numbers of documents, each for queries and for keys."""
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.cat([torch.arange(each) for each in lengths])
    return [place[:, None], place[None], numbers[:, None], numbers[None]]


# any mask


class Drawn:
    """A mask rule drawn from a grammar, over the queries of one rank and the keys of all."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.lines = draw, []
        self.names = 0
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        lengths = draw(st.lists(st.sampled_from([1, 2, 30, 64, 65, 127, 128, 200, 300]), min_size=1, max_size=4))
        sp = draw(st.sampled_from([1, 2, 3]))
        layout = token_layout(lengths, sp, draw(st.sampled_from(["zigzag", "contiguous"])))
        own, everyone = layout.local_index[draw(st.integers(0, sp - 1))], layout.local_index.reshape(-1)
        place, _, number, _ = documents(lengths)
        blocks = torch.repeat_interleave(
            torch.randint(-1, 3, (sum(lengths),), generator=generator), torch.randint(1, 90, (sum(lengths),))
        )[: sum(lengths)]
        tokens = [place, number, blocks, torch.arange(sum(lengths))]
        if draw(st.integers(0, 4)) == 0:
            tokens[0] = torch.randperm(sum(lengths), generator=generator)
        pairs = [(each.reshape(-1)[own], each.reshape(-1)[everyone]) for each in tokens]
        self.operands = [side for q, k in pairs for side in (q[:, None], k[None])]
        self.operands.append(torch.rand(everyone.numel(), generator=generator)[None] < 0.9)
        self.valid = draw(st.sampled_from([None, layout.valid.reshape(-1)]))
        self.sizes = own.numel(), everyone.numel()
        self.longest = max(lengths)
        self.lines.append(f"mask = copy({self.mask(draw(st.integers(0, 3)))})")
        self.rule = "; ".join(self.lines)

    def call(self, function: str, *arguments: str | int) -> str:
        self.names += 1
        self.lines.append(f"t{self.names} = {function}({', '.join(map(str, arguments))})")
        return f"t{self.names}"

    def mask(self, depth: int) -> str:
        if depth == 0:
            return self.atom()
        kind = self.draw(st.sampled_from(["and", "and", "or", "xor", "not", "where"]))
        return self.call(kind, *(self.mask(depth - 1) for _ in range({"not": 1, "where": 3}.get(kind, 2))))

    def atom(self) -> str:
        q, k = self.draw(st.sampled_from([("x0", "x1"), ("x6", "x7")]))
        width = self.draw(st.integers(0, self.longest))
        choices = {
            **{each: lambda each=each: self.call(each, k, q) for each in ("le", "lt", "ge", "gt")},
            "window": lambda: self.call("and", self.call("le", k, q), self.call("lt", self.call("sub", q, k), width)),
            "near": lambda: self.call("le", self.call("abs", self.call("sub", q, k)), width),
            "chunk": lambda: self.call("eq", *(self.call("floor_divide", each, width + 1) for each in (q, k))),
            "documents": lambda: self.call("eq", "x3", "x2"),
            "prefix": lambda: self.call("or", self.call("le", k, q), self.call("lt", k, width)),
            "block": lambda: self.call(
                "or", self.call("le", k, q), self.call("and", self.call("eq", "x5", "x4"), self.call("ge", "x4", 0))
            ),
            "padding": lambda: self.call("copy", "x8"),
            "slanted": lambda: self.call("le", self.call("mul", k, 2), self.call("add", q, width)),
        }
        return choices[self.draw(st.sampled_from(sorted(choices)))]()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_mask_is_covered_once(data: st.DataObject):
    case = Drawn(data.draw)
    check(case.rule, case.operands, case.valid, case.sizes)


# masks of known structure


class Largest(TorchDispatchMode):
    """The most elements that one torch op made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [each.untyped_storage().nbytes() for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return found


def measured(rule: str, operands: Operands, valid: torch.Tensor | None = None) -> tuple[list[Region], float, int]:
    """Regions, seconds, and the most bytes held: by numpy together, or by one tensor."""
    sizes = max(each.shape[-2] for each in operands), max(each.shape[-1] for each in operands)
    start = time.thread_time()
    regions = plan_regions(operands, (), rule, valid, *sizes)
    seconds = time.thread_time() - start
    tracemalloc.start()
    with Largest() as largest:
        plan_regions(operands, (), rule, valid, *sizes)
    most = max(tracemalloc.get_traced_memory()[1], largest.elements)
    tracemalloc.stop()
    return regions, seconds, most


def computed(regions: Sequence[Region]) -> int:
    """At most how many elements are computed."""
    boxes = [(each.q_end - each.q_start, each.k_end - each.k_start, each.high - each.low + 1) for each in regions]
    return sum(rows * min(keys, width) for rows, keys, width in boxes)


def ranked(lengths: Sequence[int], sp: int, rank: int, scheme: str) -> tuple[Operands, torch.Tensor]:
    """Operands of :data:`DOCUMENTS` for the queries of one rank and all keys as gathered."""
    layout = token_layout(lengths, sp, scheme)
    rows = layout.local_index[rank], layout.local_index.reshape(-1)
    whole = [each.reshape(-1) for each in documents(lengths)]
    cut = [each[rows[i % 2]] for i, each in enumerate(whole)]
    return [each[:, None] if i % 2 == 0 else each[None] for i, each in enumerate(cut)], layout.valid.reshape(-1)


MILLION = 1_000_000
WINDOW = "t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, 4096); mask = and(t0, t2)"
CHUNKS = (
    "t0 = floor_divide(x0, 8192); t1 = floor_divide(x1, 8192); t2 = eq(t0, t1); t3 = le(x1, x0); mask = and(t2, t3)"
)
SINKS = f"{WINDOW.replace('mask', 't3')}; t4 = lt(x1, 4); t5 = and(t0, t4); mask = or(t3, t5)"


@pytest.mark.parametrize(
    ("rule", "make", "regions"),
    [
        (CAUSAL, lambda: positions(MILLION), 1),
        (WINDOW, lambda: positions(MILLION), 1),
        (SINKS, lambda: positions(MILLION), 2),
        ("t0 = le(x1, x0); t1 = lt(x1, 1000); mask = or(t0, t1)", lambda: positions(MILLION), 2),
        (CHUNKS, lambda: positions(MILLION), 123),
        (DOCUMENTS, lambda: documents([100] * 10_000), 10_000),
        (DOCUMENTS, lambda: documents([20] * 50_000), 12_500),  # four requests a region
    ],
    ids=["causal", "window", "sinks", "prefix", "chunks", "requests", "short requests"],
)
def test_plans_are_as_small_as_the_structure_of_a_million_tokens(rule: str, make: Any, regions: int):
    found, seconds, most = measured(rule, make())
    assert len(found) == regions
    assert seconds < 5  # 0.03 to 0.6 on an idle core
    assert most < 300 * MILLION  # bytes; each vector is 8 * MILLION, and the mask would be MILLION * MILLION


@pytest.mark.parametrize("scheme", ["zigzag", "contiguous"])
@pytest.mark.parametrize("rank", [0, 3])
def test_plans_of_a_rank_are_as_small(scheme: str, rank: int):
    found, seconds, most = measured(DOCUMENTS, *ranked([MILLION], 4, rank, scheme))
    assert len(found) <= 5
    assert seconds < 5
    lengths = [137 * each for each in range(1, 50)] * 4
    found, seconds, most = measured(DOCUMENTS, *ranked(lengths, 4, rank, scheme))
    assert len(found) <= 8 * len(lengths)
    assert computed([each for each in found if each.masked]) <= 200 * sum(lengths) / 4
    assert seconds < 5
    assert most < 100 * sum(lengths)


def test_irregular_masks_are_looked_at_in_strips():
    order = torch.randperm(6000)
    _, _, most = measured(CAUSAL, [order[:, None], order[None]])
    assert most < 6000 * 6000 / 4


def test_regions_of_masks_by_hand():
    assert check(CAUSAL, positions(100), None, (100, 100)) == [Region(-1, 0, 100, 0, 100, high=0)]
    assert check("mask = lt(x1, x0)", positions(100), None, (100, 100)) == [Region(-1, 0, 100, 0, 100, high=-1)]
    assert check("mask = ge(x1, x0)", positions(100), None, (100, 100)) == [Region(-1, 0, 100, 0, 100, low=0)]
    assert check("", [], None, (7, 9)) == [Region(-1, 0, 7, 0, 9)]
    assert check("bias = copy(x0)", [torch.zeros(7, 9)], None, (7, 9)) == [Region(-1, 0, 7, 0, 9)]
    assert check("mask = lt(x1, 0)", positions(100), None, (100, 100)) == []
    assert check(DOCUMENTS, documents([80, 90]), None, (170, 170)) == [
        Region(-1, 0, 80, 0, 80, high=0), Region(-1, 80, 170, 80, 170, high=0),
    ]  # fmt: skip


def test_small_pieces_are_masked_together():
    assert check(DOCUMENTS, documents([20, 30, 50]), None, (100, 100)) == [Region(-1, 0, 100, 0, 100, masked=True)]


def test_keys_that_do_not_exist_are_in_no_region():
    valid = torch.arange(300) % 150 < 100
    assert check("", [], valid, (70, 300)) == [Region(-1, 0, 70, 0, 100), Region(-1, 0, 70, 150, 250)]
    bands = check(CAUSAL, positions(300), valid, (300, 300))
    assert not any(each.masked for each in bands)


def test_large_positions_are_compared_exactly():
    """Neighbours above 2**24 are one number in single precision."""
    for start in (2**24, 2**40):
        rows, columns = (each + start for each in positions(200))
        check(CAUSAL, [rows, columns + 1], None, (200, 200))
        check(CAUSAL, [rows[:1].expand(200, 1), columns[:, :1].expand(1, 200) + 1], None, (200, 200))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.int64), (torch.int64, torch.float32), (torch.bfloat16,) * 2])
@pytest.mark.parametrize("start", [2**24, 2**8])
def test_numbers_are_compared_as_torch_rounds_them(start: int, dtypes: tuple[torch.dtype, torch.dtype]):
    rows, columns = (each + start for each in positions(200))
    for q, k in ((rows, columns), (rows[:1].expand(200, 1), columns[:, :1].expand(1, 200) + 1)):
        check(CAUSAL, [q.to(dtypes[0]), k.to(dtypes[1])], None, (200, 200))


@pytest.mark.parametrize("as_float", [False, True])
def test_a_stored_triangle_that_is_looked_up_is_one_region(as_float: bool):
    table = torch.ones(300, 300, dtype=torch.bool).tril().reshape(1, -1)
    last = "t2 = lookup(table0, t1); mask = gt(t2, 0.5)" if as_float else "mask = lookup(table0, t1)"
    rule = f"t0 = mul(x0, 300); t1 = add(t0, x1); {last}"
    found = check(rule, positions(300), None, (300, 300), [table.float() if as_float else table])
    assert found == [Region(-1, 0, 300, 0, 300, high=0)]


@pytest.mark.parametrize("shape", [(300, 300), (1, 300, 300), (1, 1, 300, 300)])
def test_a_matrix_that_is_a_band_is_known_as_one(shape: tuple[int, ...]):
    matrix = torch.ones(shape, dtype=torch.bool).tril(-3).triu(-40)
    found = check("mask = copy(x0)", [matrix], None, (300, 300))
    (band,) = [each for each in found if not each.masked and each.high - each.low == 37]
    assert band.q_end - band.q_start >= 300 - 64
    assert len(found) <= 3
    check("mask = copy(x0)", [matrix.index_fill(-1, torch.tensor([50, 170]), False)], None, (300, 300))


# rows of the batch and heads


def test_rows_of_a_padded_batch_are_planned_apart():
    pads = [0, 70, 299]
    padding = torch.arange(300) >= torch.tensor(pads)[:, None]
    operands = [*positions(300), padding[:, None, None]]
    found = check("t0 = le(x1, x0); mask = and(t0, x2)", operands, None, (300, 300))
    assert not any(each.masked for each in found)
    for row, pad in enumerate(pads):
        own = [each for each in found if each.row == row]
        assert len(own) == 1
        assert own[0].k_start == pad
    assert {each.row for each in found} == {0, 1, 2}


def test_rows_share_a_plan_where_their_mask_is_one():
    bias = torch.zeros(3, 1, 200, 200)
    assert check(f"{CAUSAL}; bias = copy(x2)", [*positions(200), bias], None, (200, 200)) == [
        Region(-1, 0, 200, 0, 200, high=0)
    ]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_mask_of_rows_and_heads_that_differ_is_covered_once(data: st.DataObject):
    case = Drawn(data.draw)
    for i in range(len(case.operands)):
        shape = data.draw(st.sampled_from([None, None, (1, 1), (3, 1), (1, 2), (2, 2)]))
        if shape is not None:
            shift = torch.randint(0, 3 if i < 8 else 1, (*shape, 1, 1))
            case.operands[i] = case.operands[i] + shift if i < 8 else case.operands[i].expand(*shape, -1, -1)
    rows = max([each.shape[0] for each in case.operands if each.dim() == 4] + [1])
    case.operands = [each if each.dim() < 4 or each.shape[0] in (1, rows) else each[:1] for each in case.operands]
    check(case.rule, case.operands, case.valid, case.sizes)


def test_windows_that_differ_by_head_are_masked():
    operands = [*positions(300), torch.tensor([10, 200]).reshape(1, 2, 1, 1)]
    found = check("t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, x2); mask = and(t0, t2)", operands, None, (300, 300))
    assert all(each.masked for each in found)


# rules


def test_names_may_be_assigned_again():
    rule = "t0 = add(x0, 0); t1 = le(x1, t0); t0 = sub(x0, x1); t2 = le(t0, 5); mask = and(t1, t2)"
    check(rule, positions(300), None, (300, 300))
    rule = "t0 = sub(x0, x1); t1 = le(t0, 5); t0 = add(x0, 0); t2 = le(x1, t0); mask = and(t1, t2)"
    check(rule, positions(300), None, (300, 300))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 30])
def test_many_short_requests_do_not_make_the_whole_square(length: int):
    tokens = length * 600
    found = plan_regions(documents([length] * 600), (), DOCUMENTS, None, tokens, tokens)
    assert computed(found) <= 200 * tokens


def test_a_plan_is_a_tensor_of_regions():
    regions = [Region(-1, 0, 5, 2, 9), Region(3, 5, 6, 0, 2, low=-1, high=0), Region(0, 6, 7, 0, 1, masked=True)]
    plan = as_tensor(regions)
    assert (plan.dtype, plan.shape) == (torch.int64, (3, 8))
    assert as_regions(plan) == regions
    assert as_tensor([]).shape == (0, 8)
    assert as_regions(as_tensor([])) == []
    assert [each.full for each in regions] == [True, False, False]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_few_elements_are_looked_at(data: st.DataObject):
    with mock.patch.object(plan, "LOOKED_AT", plan.BOX):
        test_any_mask_of_rows_and_heads_that_differ_is_covered_once.hypothesis.inner_test(data)
        test_any_mask_is_covered_once.hypothesis.inner_test(data)


def test_few_elements_that_are_all_seen_need_no_mask():
    with mock.patch.object(plan, "LOOKED_AT", plan.BOX):
        q, k = torch.tensor([5, 6])[:, None], torch.tensor([9, 1, 2, 7])[None, :]
        assert plan_regions([q, k], [], "mask = le(x1, x0)", None, 2, 4) == [Region(-1, 0, 2, 1, 3)]
        assert plan_regions([q, k], [], "mask = gt(x1, x0)", None, 2, 4) == [Region(-1, 0, 2, 0, 4, masked=True)]
        assert plan_regions([q, k], [], "mask = eq(x1, x0)", None, 2, 4) == []


# where queries and keys are known to meet


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([None, 3, 25]))
def test_plans_within_ranges_hold_what_is_seen_there(data: st.DataObject, window: int | None):
    """Of requests whose keys lie anywhere in a cache, in the order of their tokens or not."""
    draw = data.draw
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    queries, runs, slots = 0, [], 0
    query_rows, key_rows = [], []
    for request, count in enumerate(counts):
        pages = draw(st.lists(st.integers(0, 20), max_size=3))
        past = sum(pages)
        query_rows.append(1000 * request + past + torch.arange(count))
        for done, size in zip([0, *torch.tensor(pages).cumsum(0).tolist()], pages, strict=False):
            rows = 1000 * request + done + torch.arange(size)
            key_rows.append(rows if draw(st.booleans()) else rows.flip(0))
            runs.append([queries, queries + count, slots, slots + size])
            slots += size
        queries += count
    key_rows.append(torch.zeros(3, dtype=torch.int64))  # slots without a token
    operands = [torch.cat(query_rows)[:, None], torch.cat(key_rows)[None, :]]
    valid = torch.tensor([draw(st.booleans()) for _ in range(slots)] + [False] * 3) if draw(st.booleans()) else None
    rule = CAUSAL if window is None else f"t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, {window}); mask = and(t0, t2)"
    draw(st.randoms(use_true_random=False)).shuffle(runs)
    regions = plan_within(runs, operands, [], rule, valid)
    within = torch.zeros(queries, slots + 3, dtype=torch.bool)
    for q_start, q_end, k_start, k_end in runs:
        within[q_start:q_end, k_start:k_end] = True
    mask = seen(rule, operands, valid, (queries, slots + 3)) & within
    assert torch.equal(counted(regions, mask), mask.any(dim=1).long())
    one_by_one = [each for each in regions if each.q_end - each.q_start == 1]
    if valid is None and window is None:
        assert not any(each.masked for each in one_by_one)
