"""Score rules: their text, their values, and the bounds that decide which parts of a mask are empty or full."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sp_compile.rule_derivatives import score_and_derivative
from sp_compile.rule_intervals import mask_ranges
from sp_compile.score_rule import (
    DRAWS,
    FUNCTIONS,
    Assignment,
    assigns,
    evaluate,
    format_rule,
    parse,
)

SIDE, TILE = 4, 2
ORDERS = ("le", "lt", "ge", "gt", "eq", "ne")
NUMBERS = st.one_of(
    st.integers(-(10**12), 10**12), st.floats(allow_nan=False), st.booleans(), st.sampled_from([float("inf"), -0.5])
)
NAMES = st.sampled_from(["x0", "x1", "x12", "t0", "t1", "score", "mask", "bias"])
ASSIGNMENTS = st.builds(
    Assignment, NAMES, st.sampled_from(sorted(FUNCTIONS)), st.lists(NAMES | NUMBERS, min_size=1, max_size=3).map(tuple)
)
properties = settings(max_examples=150, deadline=None)


# text


@properties
@given(st.lists(ASSIGNMENTS, max_size=6))
def test_text_and_assignments_are_each_others_inverse(assignments: list[Assignment]):
    text = format_rule(assignments)
    assert parse(text) == tuple(assignments)
    assert [list(map(type, each.arguments)) for each in parse(text)] == [
        list(map(type, each.arguments)) for each in assignments
    ]
    assert format_rule(parse(text)) == text


def test_text_may_be_written_with_any_spaces():
    assert parse(" t0=le( x1,x0 ) ;mask = and(t0,  x2);; ") == parse("t0 = le(x1, x0); mask = and(t0, x2)")
    assert parse("") == ()


def test_numbers_keep_their_kind():
    (each,) = parse("t0 = where(True, -3, 1e-05)")
    assert each.arguments == (True, -3, 1e-5)
    assert [type(item) for item in each.arguments] == [bool, int, float]
    assert parse("t0 = where(x0, -inf, inf)")[0].arguments == ("x0", float("-inf"), float("inf"))
    assert format_rule(parse("t0 = add(x0, nan)")) == "t0 = add(x0, nan)"


def test_a_rule_tells_what_it_assigns():
    rule = "t0 = tanh(score); score = mul(t0, 2.0)"
    assert [assigns(rule, name) for name in ("score", "mask", "bias", "t0")] == [True, False, False, True]


@pytest.mark.parametrize(
    "wrong", ["mask", "mask = x0", "mask = nearly(x1, x0)", "mask = le(x1, x0", "le(x1, x0)", "0 = le(x1, x0)"]
)
def test_text_that_is_no_rule_is_refused_by_the_assignment(wrong: str):
    with pytest.raises(ValueError, match="not an assignment of a score rule") as caught:
        parse(f"t0 = neg(x0); {wrong}")
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("wrong", ["mask = copy()", "mask = le(x1, )", "mask = le(x1, 3+)", "mask = le(x 1, x0)"])
def test_arguments_that_are_neither_names_nor_numbers_are_refused_by_the_assignment(wrong: str):
    with pytest.raises(ValueError, match="not an assignment of a score rule") as caught:
        parse(f"t0 = neg(x0); {wrong}")
    assert repr(wrong) in str(caught.value)


# values

INTEGERS = torch.tensor([[-7, -3, -1, 0, 1, 2, 5, 8]])
OTHERS = torch.tensor([[-2], [1], [3]])
REALS = INTEGERS / 4 + 0.1
FLAGS, COLUMN_FLAGS = INTEGERS > 0, OTHERS > 0
DIRECT = {
    "copy(x0)": (lambda a: a, INTEGERS),
    "add(x0, x1)": (operator.add, INTEGERS, OTHERS),
    "sub(x0, x1)": (operator.sub, INTEGERS, OTHERS),
    "mul(x0, x1)": (operator.mul, INTEGERS, OTHERS),
    "div(x0, x1)": (operator.truediv, INTEGERS, OTHERS),
    "floor_divide(x0, x1)": (operator.floordiv, INTEGERS, OTHERS),
    "neg(x0)": (operator.neg, INTEGERS),
    "abs(x0)": (abs, INTEGERS),
    "pow(x0, 2)": (lambda a: a * a, INTEGERS),
    "pow(2.0, x0)": (lambda a: 2.0**a, REALS),
    "exp(x0)": (lambda a: a.exp(), REALS),
    "exp2(x0)": (lambda a: (a * math.log(2)).exp(), REALS),
    "log(x0)": (lambda a: a.log(), REALS.abs()),
    "log2(x0)": (lambda a: a.log() / math.log(2), REALS.abs()),
    "log1p(x0)": (lambda a: (a + 1).log(), REALS.abs()),
    "sqrt(x0)": (lambda a: a**0.5, REALS.abs()),
    "remainder(x0, x1)": (operator.mod, INTEGERS, OTHERS),
    "floor(x0)": (lambda a: a // 1, REALS),
    "ceil(x0)": (lambda a: -(-a // 1), REALS),
    "round(x0)": (lambda a: (a + 0.5) // 1, REALS),
    "sign(x0)": (lambda a: (a > 0).long() - (a < 0).long(), INTEGERS),
    "tanh(x0)": (lambda a: a.tanh(), REALS),
    "sigmoid(x0)": (lambda a: 1 / (1 + (-a).exp()), REALS),
    "maximum(x0, x1)": (lambda a, b: torch.where(a > b, a, b), INTEGERS, OTHERS),
    "minimum(x0, x1)": (lambda a, b: torch.where(a < b, a, b), INTEGERS, OTHERS),
    "le(x0, x1)": (operator.le, INTEGERS, OTHERS),
    "lt(x0, x1)": (operator.lt, INTEGERS, OTHERS),
    "ge(x0, x1)": (operator.ge, INTEGERS, OTHERS),
    "gt(x0, x1)": (operator.gt, INTEGERS, OTHERS),
    "eq(x0, x1)": (operator.eq, INTEGERS, OTHERS),
    "ne(x0, x1)": (operator.ne, INTEGERS, OTHERS),
    "and(x0, x1)": (operator.and_, FLAGS, COLUMN_FLAGS),
    "or(x0, x1)": (operator.or_, FLAGS, COLUMN_FLAGS),
    "xor(x0, x1)": (operator.xor, FLAGS, COLUMN_FLAGS),
    "not(x0)": (operator.invert, FLAGS),
    "where(x0, x1, 0)": (lambda c, a: a * c, FLAGS, OTHERS),
    "bool(x0)": (lambda a: a != 0, INTEGERS),
    "int(x0)": (lambda a: a.long(), REALS),
    "float(x0)": (lambda a: a.float(), INTEGERS),
}


@pytest.mark.parametrize("call", DIRECT)
def test_functions_are_those_of_torch(call: str):
    direct, *operands = DIRECT[call]
    expected = direct(*operands)
    found = evaluate(f"bias = {call}", operands, ("bias",))["bias"]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


def test_every_function_is_tried():
    others = set(FUNCTIONS) - DRAWS - {"lookup"}  # tests/test_draws.py has those that draw
    assert {call.partition("(")[0] for call in DIRECT} == set(SIGNATURES) == others


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (2, 1, 4, 5), (1, 1, 1, 5), (2, 1, 1, 1)])
def test_lookups_read_a_table_of_each_head_or_of_all(shape: tuple[int, ...], heads: int):
    index, table = torch.randint(0, 7, shape), torch.randn(heads, 7)
    found = evaluate("bias = lookup(table0, x0)", [index], ("bias",), tables=[table])["bias"]
    whole = index.reshape((1,) * (4 - len(shape)) + shape)[:, 0]
    assert found.shape == (len(whole), heads, *whole.shape[1:])
    for head in range(heads):
        for row, entries in enumerate(whole):
            expected = [[float(table[head, entry]) for entry in each] for each in entries.tolist()]
            assert found[row, head].tolist() == expected


def test_an_index_that_was_computed_as_a_float_is_an_entry():
    rule = "t0 = float(x0); t1 = mul(t0, 2.0); bias = lookup(table1, t1)"
    tables = [torch.zeros(1, 9), torch.arange(9)[None] * 10]
    assert evaluate(rule, [torch.tensor([[0, 3, 4]])], ("bias",), tables=tables)["bias"].flatten().tolist() == [
        0,
        60,
        80,
    ]


def test_a_mask_of_several_steps():
    rows, columns = torch.arange(6)[:, None], torch.arange(6)
    rule = "t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, 3); mask = and(t0, t2)"
    found = evaluate(rule, [rows, columns], ("mask",))["mask"]
    assert torch.equal(found, torch.ones(6, 6, dtype=torch.bool).tril().triu(-2))


def test_only_what_is_asked_for_and_assigned_is_computed():
    rule = "t0 = tanh(score); score = mul(t0, 2.0); mask = le(x1, x0)"
    operands = [torch.arange(3)[:, None], torch.arange(3)]
    assert set(evaluate(rule, operands, ("mask", "bias"))) == {"mask"}  # without a score there is nothing to change
    score = torch.randn(3, 3)
    torch.testing.assert_close(evaluate(rule, operands, ("score",), score)["score"], torch.tanh(score) * 2.0)


def test_a_name_may_be_assigned_again():
    rule = "t0 = add(x0, 1); bias = mul(t0, 2); t0 = neg(x0); score = add(score, t0); score = mul(score, 10)"
    found = evaluate(rule, [torch.tensor([3])], ("bias", "score"), torch.tensor([5]))
    assert (found["bias"].item(), found["score"].item()) == (8, 20)
    replaced = "t0 = tanh(score); t0 = neg(x0); bias = mul(t0, 2)"
    assert evaluate(replaced, [torch.tensor([3])], ("bias",))["bias"].item() == -6  # without the score


def test_numbers_do_not_widen_half_precision():
    value = torch.tensor([0.5, 2.0], dtype=torch.bfloat16)
    for call in ("mul(x0, 0.1)", "where(False, 3.0, x0)", "maximum(x0, 1)"):
        assert evaluate(f"bias = {call}", [value], ("bias",))["bias"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "call", ["mul(score, 0.1)", "maximum(score, 0.1)", "where(False, score, 0.1)", "sub(score, 0.1)"]
)
def test_numbers_are_exact_in_double_precision(call: str):
    score = torch.tensor([-1.0], dtype=torch.float64)
    expected = {"mul": -0.1, "maximum": 0.1, "where": 0.1, "sub": -1.1}[call.partition("(")[0]]
    found = evaluate(f"score = {call}", [], ("score",), score)["score"]
    assert found.double().item() == pytest.approx(expected, abs=1e-12)


# bounds


# The arguments that a function is drawn with, and the kind of its result. n: a number's name, N: the same or a literal,
# e: a number without rounding, i: an integer, r: a float, f: a small factor, so that products stay exact, d: a divisor,
# b: a truth value; "same" is the widest kind of the arguments.
SIGNATURES = {
    "copy": ("n", "same"), "add": ("nN", "same"), "sub": ("nN", "same"), "mul": ("nf", "same"), "div": ("ed", "real"),
    "floor_divide": ("ed", "same"), "neg": ("n", "same"), "abs": ("n", "same"), "pow": ("n2", "real"),
    "exp": ("r", "real"), "log": (["x2"], "real"), "tanh": ("r", "real"), "sigmoid": ("r", "real"),
    "maximum": ("nN", "same"), "minimum": ("nN", "same"), "le": ("nN", "bool"),
    "lt": ("nN", "bool"), "ge": ("nN", "bool"), "gt": ("nN", "bool"), "eq": ("nN", "bool"), "ne": ("nN", "bool"),
    "and": ("bb", "bool"), "or": ("bb", "bool"), "xor": ("bb", "bool"), "not": ("b", "bool"), "where": ("bnN", "same"),
    "bool": ("n", "bool"), "int": ("e", "int"), "float": ("e", "whole"),
    "exp2": ("r", "real"), "log2": (["x2"], "real"), "log1p": (["x2"], "real"), "sqrt": (["x2"], "real"),
    "remainder": ("ed", "same"), "floor": ("e", "same"), "ceil": ("e", "same"), "round": ("e", "same"),
    "sign": ("n", "same"),
}  # fmt: skip
WIDTH = ("int", "whole", "real")


@st.composite
def rules(draw: Any, function: str) -> str:
    """A mask that depends on the result of the function, whose arguments are operands or results of other functions."""
    kinds = {"x0": "int", "x1": "int", "x2": "int", "x3": "whole", "x4": "bool"}

    def argument(slot: str) -> str:
        def named(*allowed: str) -> list[str]:
            return [name for name, kind in kinds.items() if kind in allowed]

        choices = {
            "n": named(*WIDTH), "N": [*named(*WIDTH), "-2", "0", "1", "3"], "e": named("int", "whole"),
            "i": named("int"), "r": named("whole", "real"), "f": ["x0", "x1", "x2", "-3", "0"],
            "d": ["x2", "-3", "2", "3"], "b": [*named("bool"), "True", "False"],
        }  # fmt: skip
        return draw(st.sampled_from(choices.get(slot, [slot])))

    lines: list[str] = []

    def assign(function: str, *arguments: str) -> str:
        name = f"t{len(lines)}"
        lines.append(f"{name} = {function}({', '.join(arguments)})")
        widest = max(WIDTH.index(kinds[each]) if kinds.get(each) in WIDTH else 0 for each in arguments)
        kind = SIGNATURES[function][1]
        kinds[name] = WIDTH[widest] if kind == "same" else kind
        return name

    for each in [*draw(st.lists(st.sampled_from(sorted(SIGNATURES)), max_size=3)), function]:
        result = assign(each, *map(argument, SIGNATURES[each][0]))
    if kinds[result] != "bool":
        result = assign(draw(st.sampled_from(ORDERS)), *draw(st.permutations([result, argument("N")])))
    return "; ".join([*lines, f"mask = {draw(st.sampled_from(['copy', 'not']))}({result})"])


def vector(low: int, high: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(low, high), min_size=SIDE, max_size=SIDE)


def bounds(operand: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest element of each tile; a dim of size 1 stays as it is."""
    tiles = operand.double()
    for dim in (0, 1):
        tiles = tiles.unflatten(dim, (-1, min(TILE, tiles.shape[dim]))).movedim(dim + 1, -1)
    return tiles.amin(dim=(-1, -2)).numpy(), tiles.amax(dim=(-1, -2)).numpy()


OPERANDS = st.tuples(vector(-9, 9), vector(-9, 9), st.integers(1, 4), vector(-9, 9), vector(0, 1))
ZEROS = [0] * SIDE


def tensors(
    rows: list[int], columns: list[int], step: int = 1, weights: list[int] = ZEROS, flags: list[int] = ZEROS
) -> list[torch.Tensor]:
    return [
        torch.tensor(rows)[:, None],
        torch.tensor(columns)[None, :],
        torch.tensor([[step]]),
        torch.tensor(weights)[None, :].float(),
        torch.tensor(flags)[:, None].bool(),
    ]


def check_bounds(rule: str, operands: list[torch.Tensor]) -> None:
    mask = evaluate(rule, operands, ("mask",))["mask"]
    exact = mask.expand(SIDE, SIDE).double().unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))
    low, high = mask_ranges(rule, [bounds(each) for each in operands])
    assert (low <= exact.amin(dim=(1, 3)).numpy()).all()
    assert (high >= exact.amax(dim=(1, 3)).numpy()).all()


@pytest.mark.parametrize("function", sorted(SIGNATURES))
def test_the_bounds_of_a_mask_contain_each_of_its_elements(function: str):
    @settings(max_examples=50, deadline=None)
    @given(rules(function), OPERANDS)
    def check(rule: str, drawn: Any) -> None:
        operands = tensors(*drawn)
        steps = evaluate(rule, operands, [each.name for each in parse(rule)])
        assume(all(bool(torch.isfinite(each).all()) for each in steps.values()))
        check_bounds(rule, operands)

    check()


def test_a_product_of_zero_and_a_value_without_bounds_decides_nothing():
    check_bounds("t0 = exp(x3); t1 = mul(t0, x0); mask = le(t1, 1)", tensors([0, 1, 0, 1], ZEROS))


@pytest.mark.parametrize(
    ("mask", "rows", "columns", "expected"),
    [
        ("le(x1, x0)", (4, 7), (0, 3), (1, 1)),
        ("le(x1, x0)", (4, 7), (4, 7), (0, 1)),
        ("le(x1, x0)", (4, 7), (8, 11), (0, 0)),
        ("lt(x1, x0)", (4, 7), (0, 4), (0, 1)),
        ("lt(x1, x0)", (4, 7), (7, 9), (0, 0)),
        ("ge(x1, x0)", (0, 3), (3, 5), (1, 1)),
        ("gt(x1, x0)", (0, 3), (3, 5), (0, 1)),
        ("eq(x1, x0)", (2, 2), (2, 2), (1, 1)),
        ("eq(x1, x0)", (2, 3), (4, 5), (0, 0)),
        ("ne(x1, x0)", (2, 3), (4, 5), (1, 1)),
        ("ne(x1, x0)", (2, 2), (2, 2), (0, 0)),
        ("not(x0)", (0, 0), (0, 0), (1, 1)),
        ("not(x0)", (1, 2), (0, 0), (0, 0)),
        ("bool(x0)", (-2, -1), (0, 0), (1, 1)),
        ("bool(x0)", (-2, 1), (0, 0), (0, 1)),
        ("or(x0, x1)", (0, 1), (1, 1), (1, 1)),
        ("and(x0, x1)", (0, 1), (0, 0), (0, 0)),
        ("copy(True)", (0, 1), (0, 0), (1, 1)),
    ],
)
def test_masks_are_decided_where_the_operands_decide_them(
    mask: str, rows: tuple[int, int], columns: tuple[int, int], expected: tuple[int, int]
):
    ranges = [tuple(np.asarray(float(each)) for each in pair) for pair in (rows, columns)]
    assert mask_ranges(f"mask = {mask}", ranges) == expected


def test_steps_of_windows_and_chunks_are_decided():
    def decide(rule: str, rows: tuple[int, int], columns: tuple[int, int]) -> tuple[Any, Any]:
        return mask_ranges(rule, [tuple(np.asarray(float(each)) for each in pair) for pair in (rows, columns)])

    window = "t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, 8); mask = and(t0, t2)"
    assert decide(window, (20, 23), (16, 19)) == (1, 1)
    assert decide(window, (20, 23), (8, 12)) == (0, 0)
    assert decide(window, (20, 23), (12, 16)) == (0, 1)
    chunk = "t0 = floor_divide(x0, 4); t1 = floor_divide(x1, 4); mask = eq(t0, t1)"
    assert decide(chunk, (4, 7), (4, 7)) == (1, 1)
    assert decide(chunk, (4, 7), (8, 9)) == (0, 0)
    distance = "t0 = sub(x0, x1); t1 = abs(t0); mask = le(t1, 3)"
    assert decide(distance, (0, 1), (2, 3)) == (1, 1)
    assert decide(distance, (0, 1), (9, 12)) == (0, 0)
    assert decide(distance, (9, 12), (0, 1)) == (0, 0)


def test_a_mask_that_depends_on_the_score_is_not_decided():
    assert mask_ranges("mask = gt(score, 0)", []) == (0, 1)
    assert mask_ranges("mask = lookup(table0, x0)", [(np.asarray(0.0), np.asarray(1.0))]) == (0, 1)
    assert mask_ranges("t0 = tanh(x0); mask = gt(t0, 5)", [(np.asarray(0.0), np.asarray(1.0))]) == (0, 1)


CHANGES = {
    **{name: f"score = {name}(score)" for name in ("copy", "float", "neg", "abs", "exp", "exp2", "tanh", "sigmoid")},
    **{name: f"t0 = exp(score); score = {name}(t0)" for name in ("log", "log2", "log1p", "sqrt")},
    **{name: f"score = {name}(score, x0)" for name in ("add", "sub", "mul", "div", "maximum", "minimum")},
    **{f"{name}, second": f"score = {name}(x0, score)" for name in ("sub", "mul", "div")},
    "pow": "t0 = exp(score); score = pow(t0, 3)",
    "where": "t0 = gt(score, x0); t1 = mul(score, 2.0); score = where(t0, score, t1)",
    "a name used again": "score = mul(score, score); score = add(score, x0); t0 = tanh(score); score = mul(t0, 3.0)",
    "a step": "t0 = floor(score); score = add(t0, x0)",
}


@pytest.mark.parametrize("rule", CHANGES.values(), ids=CHANGES)
def test_the_derivative_of_a_rule_is_that_of_autograd(rule: str):
    generator = torch.Generator().manual_seed(0)
    score, x0 = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    score.requires_grad_()
    wanted = evaluate(rule, [x0], ("score",), score)["score"]
    slope = torch.autograd.grad(wanted.sum(), score)[0] if "floor" not in rule else torch.zeros_like(score)
    found, derivative = score_and_derivative(rule, [x0], score.detach())
    torch.testing.assert_close(found, wanted.detach())
    torch.testing.assert_close(derivative.expand_as(slope) * 1.0, slope)


def test_a_derivative_that_is_not_known_is_told():
    with pytest.raises(ValueError, match="no derivative of 'lookup'"):
        score_and_derivative("score = lookup(table0, score)", [], torch.zeros(1, 1, 2, 2), [torch.ones(1, 3)])
