"""What is said of a mask over two pieces is true of each of its elements; pieces are where vectors count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st

from sp_compile.kernels.bands import _COMPARISONS, _LOGIC, _PLANES, Band, Pairs, Value
from sp_compile.kernels.pieces import BRANCH, SMALL, Side, Vector
from sp_compile.score_rule import DRAWS, FUNCTIONS, evaluate, parse

properties = settings(max_examples=150, deadline=None)
Case = tuple[str, list[torch.Tensor]]


def valued(operand: torch.Tensor) -> Value:
    """An operand ``[rows, 1]`` or ``[1, columns]`` as one piece."""
    vector = Vector(operand, of_keys=operand.shape[0] == 1)
    low, high, first, step = vector.over(np.array([0]), np.array([operand.numel()]))
    still = np.where(np.isnan(step), np.nan, 0.0)
    down, right = (still, step) if vector.of_keys else (step, still)
    return Value(low, high, first, down, right)


def banded(rule: str, operands: list[torch.Tensor], rows: int, columns: int) -> Band:
    pairs = Pairs(np.array([float(rows)]), np.array([float(columns)]))
    with np.errstate(all="ignore"):
        return pairs.evaluate(parse(rule), {f"x{i}": valued(each) for i, each in enumerate(operands)})


def drawn_mask(band: Band, rows: int, columns: int) -> torch.Tensor | None:
    """The mask that a band stands for, None for an unknown one."""
    low, high = float(band.low[0]), float(band.high[0])
    if np.isnan(low) or np.isnan(high):
        return None
    distance = torch.arange(columns) - torch.arange(rows)[:, None]
    return (distance >= low) & (distance <= high)


def check(rule: str, operands: list[torch.Tensor], rows: int, columns: int) -> Band:
    """Where a band is known it is the mask; it is called full or empty only where all or no elements are seen."""
    band = banded(rule, operands, rows, columns)
    mask = evaluate(rule, operands, ("mask",))["mask"].bool().expand(rows, columns)
    found = drawn_mask(band, rows, columns)
    if found is not None:
        assert torch.equal(found, mask)
        assert (bool(band.full[0]), bool(band.empty[0])) == (bool(mask.all()), not bool(mask.any()))
    return band


@st.composite
def operands(draw: st.DrawFn, rows: int, columns: int) -> list[torch.Tensor]:
    """Two vectors of the queries and two of the keys: constant, counting, of any step, random, or fractions."""
    found = []
    for size, shape in ((rows, (-1, 1)), (columns, (1, -1))) * 2:
        start, step = draw(st.integers(-9, 9)), draw(st.sampled_from([0, 1, 1, -1, 2]))
        vector = torch.arange(size) * step + start
        kind = draw(st.sampled_from(["plane"] * 4 + ["random", "half", "float"]))
        if kind == "random":
            vector = torch.tensor(draw(st.lists(st.integers(-5, 5), min_size=size, max_size=size)))
        found.append({"half": vector / 2, "float": vector.float()}.get(kind, vector).reshape(shape))
    return found


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
NUMBERS = st.sampled_from(["-3", "0", "1", "2", "7", "0.5", "-0.1"])


@st.composite
def rules(draw: st.DrawFn, function: str) -> Case:
    """A mask that rests on a function of what two other functions gave."""
    rows, columns = draw(SHAPES)
    lines: list[str] = []
    numbers, masks = ["x0", "x1", "x2", "x3"], ["t0", "t1"]

    def call(function: str) -> str:
        arity = {"where": 3}.get(function, 1 if function in ONE else 2)
        truths = arity if function in _LOGIC else 1 if function == "where" else 0
        truths = draw(st.integers(0, 1)) if function in ("int", "float") else truths
        arguments = [draw(st.sampled_from(masks if i < truths else numbers)) for i in range(arity)]
        if arity == 2 and not truths and draw(st.integers(0, 3)) == 0:
            arguments[1] = draw(NUMBERS)
        lines.append(f"t{len(lines)} = {function}({', '.join(arguments)})")
        (masks if function in _COMPARISONS or function in _LOGIC else numbers).append(f"t{len(lines) - 1}")
        return f"t{len(lines) - 1}"

    ordered = sorted(_COMPARISONS)
    lines += [f"t{i} = {draw(st.sampled_from(ordered))}(x{2 * i + 1}, x{2 * i})" for i in range(2)]
    for _ in range(draw(st.integers(0, 3))):
        call(draw(st.sampled_from([*ordered, *_LOGIC, "add", "sub", "mul", "abs", "where", "float"])))
    lines.append(f"mask = bool({call(function)})")
    return "; ".join(lines), draw(operands(rows, columns))


ONE = ("copy", "neg", "abs", "exp", "exp2", "sqrt", "tanh", "sigmoid", "floor", "ceil", "round", "sign", "not", "bool",
       "int", "float", "log", "log2", "log1p")  # fmt: skip
BRUTE = sorted(set(FUNCTIONS) - DRAWS - {"lookup", "pow"})


@pytest.mark.parametrize("function", BRUTE)
def test_a_band_is_the_mask(function: str):
    @settings(max_examples=50, deadline=None)
    @given(rules(function))
    def run(case: Case) -> None:
        rule, vectors = case
        try:
            steps = evaluate(rule, vectors, [each.name for each in parse(rule)])
        except RuntimeError as error:
            if "ZeroDivisionError" not in str(error):
                raise
            reject()
        if all(bool(torch.isfinite(each.double()).all()) for each in steps.values()):
            check(rule, vectors, vectors[0].numel(), vectors[1].numel())

    run()


def counting(rows: int, columns: int, row: int = 0, column: int = 0) -> list[torch.Tensor]:
    return [torch.arange(row, row + rows)[:, None], torch.arange(column, column + columns)[None]]


KNOWN = [
    "mask = le(x1, x0)", "mask = lt(x1, x0)", "mask = ge(x1, x0)", "mask = gt(x1, x0)", "mask = eq(x1, x0)",
    "t0 = sub(x0, x1); mask = le(t0, 3)", "t0 = sub(x0, x1); mask = gt(t0, -2)",
    "t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, 3); mask = and(t0, t2)",
    "t0 = le(x1, x0); t1 = sub(x1, x0); t2 = le(t1, 3); mask = or(t0, t2)",
    "t0 = gt(x1, x0); mask = not(t0)", "t0 = neg(x0); t1 = add(t0, x1); mask = le(t1, 0)",
    "t0 = mul(x0, 2); t1 = mul(x1, 2); mask = le(t1, t0)",
    "t0 = mul(x0, 2); t1 = mul(x1, -2); t2 = add(t0, t1); mask = eq(t2, 1)",
    "t0 = float(x0); mask = le(x1, t0)", "t0 = le(x1, x0); t1 = ge(x1, x0); mask = xor(t0, t1)",
    "t0 = le(x1, x0); mask = where(t0, 1, 0)", "t0 = le(x1, x0); t1 = le(x1, 100); mask = where(t1, t0, t1)",
]  # fmt: skip


@properties
@given(st.sampled_from(KNOWN), st.tuples(st.integers(2, 9), st.integers(2, 9)), st.integers(-9, 9))
@example(KNOWN[0], (9, 9), 0)
@example(KNOWN[1], (2, 2), 0)
def test_masks_of_counting_vectors_are_known(rule: str, shape: tuple[int, int], column: int):
    band = check(rule, counting(*shape, column=column), *shape)
    # but for a mask that is no band
    if "where(t0" not in rule and "xor" not in rule and "eq" not in rule:
        assert not np.isnan(band.low[0])


def test_bands_by_hand():
    for rule, low, high in [
        ("mask = le(x1, x0)", -np.inf, 2), ("mask = gt(x1, x0)", 3, np.inf), ("mask = eq(x1, x0)", 2, 2),
        (KNOWN[7], 0, 2),
    ]:  # fmt: skip
        band = check(rule, counting(8, 8, row=2), 8, 8)
        assert (float(band.low[0]), float(band.high[0])) == (low, high)


def test_what_is_no_band_is_unknown():
    for rule in ("mask = ne(x1, x0)", "t0 = remainder(x1, 2); mask = eq(t0, 0)", "t0 = mul(x1, 2); mask = le(t0, x0)"):
        assert np.isnan(check(rule, counting(8, 8), 8, 8).low[0])
    shuffled = [torch.tensor([3, 0, 2, 1])[:, None], torch.arange(4)[None]]
    assert np.isnan(check("mask = le(x1, x0)", shuffled, 4, 4).low[0])


@pytest.mark.parametrize("start", [2**24 - 4, 2**24, 2**40])
def test_numbers_that_are_not_exact_in_single_precision_are_bounded_only(start: int):
    rows, columns = counting(8, 8, start, start)
    check("t0 = float(x0); t1 = float(x1); mask = le(t1, t0)", [rows, columns], 8, 8)
    check("t0 = mul(x0, 3); t1 = mul(x1, 3); mask = le(t1, t0)", [rows, columns], 8, 8)


def test_planes_that_leave_the_numbers_that_are_exact_are_bounded_only():
    rule = "t0 = float(x0); t1 = mul(t0, 3.0); t2 = float(x1); t3 = mul(t2, 3.0); t4 = add(t3, 1.0); mask = le(t4, t1)"
    check(rule, counting(8, 8, 2**23, 2**23), 8, 8)


@properties
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=2), SHAPES, st.data())
def test_logic_is_that_of_the_elements(sides: Any, shape: tuple[int, int], data: st.DataObject):
    """All bands, not only those that vectors make."""
    rows, columns = shape
    pairs = Pairs(np.array([float(rows)]), np.array([float(columns)]))
    bands = []
    for side in sides:
        low, high = (float(each) for each in side)
        if data.draw(st.booleans()):
            low, high = data.draw(st.sampled_from([(-np.inf, high), (low, np.inf), (-np.inf, np.inf)]))
        bands.append(pairs.clipped(np.array([low]), np.array([high])))
    masks = [drawn_mask(each, rows, columns) for each in bands]
    for name, function in _LOGIC.items():
        count = 1 if name in ("not", "bool") else 2
        found = drawn_mask(function(pairs, *bands[:count]), rows, columns)
        if found is not None:
            assert torch.equal(found, FUNCTIONS[name](*masks[:count]))
        else:
            assert name in ("or", "xor", "not")


def test_every_function_of_the_domain_is_tried():
    assert {*_COMPARISONS, *_LOGIC, *_PLANES, "mul", "where", "int", "float"} <= set(BRUTE)


# pieces

RUNS = st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(1, 90), st.integers(-50, 50)), min_size=1, max_size=6)


@properties
@given(RUNS)
def test_vectors_are_regular_between_their_cuts(runs: list[tuple[int, int, int]]):
    values = torch.cat([torch.arange(size) * step + start for step, size, start in runs])
    vector = Vector(values, of_keys=True)
    cuts = vector.cuts().tolist()
    starts = np.unique([0, *cuts])
    ends = np.append(starts[1:], len(values))
    assert len(starts) <= 2 * len(runs)
    low, high, first, step = vector.over(starts, ends)
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        piece = values[start:end]
        assert (low[i], high[i]) == (piece.min(), piece.max())
        assert torch.equal(first[i] + step[i] * torch.arange(end - start), piece.double())


@properties
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
def test_irregular_pieces_have_bounds_only(values: list[int], data: st.DataObject):
    cuts = data.draw(st.sets(st.integers(0, len(values) - 1)))
    starts = np.array(sorted({0, *cuts}))
    ends = np.append(starts[1:], len(values))
    for scale in (1.0, 0.5):
        vector = Vector(torch.tensor(values)[:, None] * scale, of_keys=False)
        low, high, first, step = vector.over(starts, ends)
        for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            piece = vector.values[start:end]
            assert (low[i], high[i]) == (piece.min(), piece.max())
            regular = len(np.unique(np.diff(piece))) <= 1 and vector.whole
            assert (np.isnan(first[i]), np.isnan(step[i])) == (not regular, not regular)


def test_cuts_by_hand():
    def cuts(*values: float) -> list[int]:
        return Vector(torch.tensor(values), of_keys=True).cuts().tolist()

    assert cuts(5) == cuts(1, 2, 3, 4) == cuts(7, 7, 7) == []
    assert cuts(0, 1, 2, 3, 0, 1, 2) == [4]
    assert cuts(0, 0, 0, 0, 1, 1, 1) == [4]
    assert cuts(0, 0, 0, 1, 2, 3, 4) in ([2], [3])
    assert cuts(0.0, 0.5, 1.0) == cuts(0.0, 1.0, float("inf")) == []
    assert len(Vector(torch.randperm(1000), of_keys=True).cuts()) <= 1000 // SMALL


@properties
@given(st.integers(1, 5000), st.lists(st.integers(0, 5000), max_size=60), st.lists(st.integers(0, 5000), max_size=60))
def test_a_side_is_cut_where_its_vectors_are_but_not_into_small_pieces(length: int, jumps: list[int], more: list[int]):
    vectors = []
    for each in (jumps, more):
        vector = torch.zeros(length, dtype=torch.int64)
        vector[[at for at in each if 0 < at < length]] = 5
        vectors.append(Vector(vector.cumsum(0), of_keys=True))
    side = Side(length, vectors)
    assert (side.starts[0], side.ends[-1]) == (0, length)
    assert (side.starts[1:] == side.ends[:-1]).all()
    assert (side.starts < side.ends).all()
    wanted = sorted({0, *(at for each in vectors for at in each.cuts().tolist())})
    assert set(side.starts.tolist()) <= set(wanted)
    for at, end in zip(wanted, [*wanted[1:], length], strict=True):
        assert end - at < SMALL or at in side.starts  # what is left out begins a small piece
    joined = [end - start for start, end in zip(side.starts, side.ends, strict=True) if start not in wanted]
    assert joined == []


@pytest.mark.parametrize("pieces", [1, BRANCH, BRANCH + 1, BRANCH**2 + 1, BRANCH**3])
def test_the_tree_over_a_side_takes_eight_pieces_together(pieces: int):
    side = Side(pieces * SMALL, [Vector(torch.arange(pieces).repeat_interleave(SMALL), of_keys=True)])
    assert len(side.starts) == pieces
    for below, above in zip(side.levels, side.levels[1:], strict=False):
        assert above[0].tolist() == below[0][::BRANCH].tolist()
        assert above[1][-1] == pieces * SMALL
    assert len(side.levels[-1][0]) <= BRANCH
    assert side.level(99) == side.levels[-1]
