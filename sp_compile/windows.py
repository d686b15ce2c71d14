"""How far back and ahead an attention sees, read from its mask rule.

A rule that joins ``key > query - 512`` to whatever else, over numbers of the row's tokens, never shows a query more
than the last 512, and one that joins ``key <= query`` nothing that comes later. Only what follows from the rule counts:
positions that come from outside may jump, and prove nothing, unless the rule itself hides what lies behind a jump, as
transformers' rule for packed rows does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sp_compile import ops
from sp_compile.needs import Reach
from sp_compile.requests import START, keeps_apart
from sp_compile.score_rule import Assignment, parse
from sp_compile.symbols import product, shape_of

aten = torch.ops.aten
POSITIONS = "position_ids"

SAME_ORDER = (ops.redistribute, aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.expand.default,
              aten.squeeze.dim, aten.select.int, aten.clone.default, aten._to_copy.default, aten.to.dtype)  # fmt: skip
SWAPPED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}


@dataclass(frozen=True)
class _Linear:
    """``query * (number of the query's row) + key * (number of the key's row) + constant``."""

    query: float = 0
    key: float = 0
    constant: float = 0

    def plus(self, other: _Linear, sign: int) -> _Linear:
        return _Linear(*(a + sign * b for a, b in zip(self._parts, other._parts, strict=True)))

    @property
    def _parts(self) -> tuple[float, float, float]:
        return self.query, self.key, self.constant


def window_of(attention: fx.Node, tokens: sympy.Symbol | None) -> int | None:
    """Tokens that a query sees at most, itself and those before it; None where the rule sets no bound."""
    return reach_of(attention, tokens).back


def needed_by(attention: fx.Node, tokens: sympy.Symbol | None, counted: bool = False) -> Reach:
    """How far the keys go that an attention's queries need: as far as they see.

    Where a row that sees nothing gets the mean of all values, they need all, unless the rule shows every row itself.

    Args:
        attention, counted: as of :func:`reach_of`.
    """
    args = ops.AttentionArgs(*attention.args)
    steps = {step.name: step for step in parse(args.rule)}
    terms = [steps.get(each) for each in _terms("mask", steps)] if "mask" in steps else []
    if args.empty_mean and not all(each and _shows_itself(each, args, tokens, counted) for each in terms):
        return Reach(None, None)
    return reach_of(attention, tokens, counted)


def _shows_itself(step: Assignment, args: ops.AttentionArgs, tokens: sympy.Symbol | None, counted: bool) -> bool:
    """Whether a comparison holds between a row and itself."""
    values = _values(args, tokens, counted)
    bound = _bound(step, values)
    if bound is not None:
        return (bound.back is None or bound.back >= 1) and (bound.ahead is None or bound.ahead >= 0)
    operands = {f"x{i}": each for i, each in enumerate(args.operands)}
    if step.function != "eq" or not all(each in operands for each in step.arguments):
        return False
    first, second = (_origin(operands[str(each)]) for each in step.arguments)
    return first is second


def _origin(node: fx.Node) -> fx.Node:
    """What a node shows in another shape."""
    while node.op == "call_function" and node.target in SAME_ORDER:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def reach_of(attention: fx.Node, tokens: sympy.Symbol | None, counted: bool = False) -> Reach:
    """How far an attention sees by its rule.

    Args:
        attention: a canonical attention node, of which queries and keys are the tokens of one row.
        counted: requests are apart, and ``position_ids`` count the tokens of each.
    """
    args = ops.AttentionArgs(*attention.args)
    steps, values = {step.name: step for step in parse(args.rule)}, _values(args, tokens, counted)
    joined = [steps[each] for each in _terms("mask", steps) if each in steps]
    bounds = [each for each in (_bound(step, values) for step in joined) if each is not None]
    back = [each.back for each in bounds if each.back is not None and each.back >= 1]
    ahead = [each.ahead for each in bounds if each.ahead is not None and each.ahead >= 0]
    return Reach(min(back, default=None), min(ahead, default=None))


def _values(args: ops.AttentionArgs, tokens: sympy.Symbol | None, counted: bool) -> dict[Any, _Linear | None]:
    """The rule's operands and steps by name, where they are numbers of rows."""
    values: dict[Any, _Linear | None] = {f"x{i}": each for i, each in enumerate(_row_numbers(args, tokens, counted))}
    for step in parse(args.rule):
        values[step.name] = _linear(step, values)
    return values


def _terms(name: str, steps: dict[str, Assignment]) -> Iterator[str]:
    """Names of steps and operands of which all must hold."""
    step = steps.get(name)
    if step is not None and step.function in ("and", "copy"):
        for each in step.arguments:
            yield from _terms(str(each), steps)
    else:
        yield name


def _bound(step: Assignment, values: dict[Any, _Linear | None]) -> Reach | None:
    """``back`` of ``key > query - back``, or ``ahead`` of ``key <= query + ahead``."""
    if step.function not in SWAPPED:
        return None
    left, right = (_value(each, values) for each in step.arguments)
    if left is None or right is None:
        return None
    difference, function = left.plus(right, -1), step.function
    if difference.key < 0:
        difference, function = _Linear().plus(difference, -1), SWAPPED[function]
    constant = int(difference.constant)
    if (difference.key, difference.query) != (1, -1) or difference.constant != constant:
        return None
    if function in ("ge", "gt"):
        return Reach(constant + (function == "ge"), None)
    return Reach(None, -constant - (function == "lt"))


def _linear(step: Assignment, values: dict[Any, _Linear | None]) -> _Linear | None:
    inputs = [_value(each, values) for each in step.arguments]
    if any(each is None for each in inputs) or step.function not in ("copy", "int", "add", "sub", "neg"):
        return None
    first, *rest = (each for each in inputs if each is not None)
    if step.function == "neg":
        return _Linear().plus(first, -1)
    return first.plus(rest[0], 1 if step.function == "add" else -1) if rest else first


def _value(argument: Any, values: dict[Any, _Linear | None]) -> _Linear | None:
    return values.get(argument) if isinstance(argument, str) else _Linear(constant=argument)


def _row_numbers(args: ops.AttentionArgs, tokens: sympy.Symbol | None, counted: bool) -> list[_Linear | None]:
    """The operands as numbers of rows along their queries or keys, where they are these.

    Where only pairs of the same request are seen, all of them may count from where that begins; some may not, if others
    count the row's tokens.
    """
    found = [_row_number(each, tokens) for each in args.operands]
    if any(each is not None for each in found):
        return found
    if counted:
        runs = next((_Runs(each, ()) for each in _placeholders(args) if shape_of(each) == (1, tokens)), None)
        return [_row_number(each, tokens, True, runs) for each in args.operands]
    runs = _runs(args)
    if runs is not None:  # which may begin at any number, and so go with nothing that counts otherwise
        return [_row_number(each, tokens, False, runs) for each in args.operands]
    return (
        [_row_number(each, tokens, True) for each in args.operands] if keeps_apart(args.rule, args.operands) else found
    )


@dataclass(frozen=True)
class _Runs:
    """Positions that count by ones within what a rule keeps apart.

    ``leading`` are the dims of a rule's operands before those of queries and keys, which the batch of the positions is.
    """

    positions: fx.Node
    leading: tuple[Any, ...]

    def aligned(self, operand: fx.Node) -> bool:
        """Whether a batch's rows of an operand are those of the positions."""
        return len(self.positions.meta["val"]) == 1 or (
            tuple(shape_of(operand)[:-2]) == self.leading and _shows_all(operand, self.positions)
        )


def _placeholders(args: ops.AttentionArgs) -> list[fx.Node]:
    graph = args.operands[0].graph if args.operands else None
    return [] if graph is None else [each for each in graph.find_nodes(op="placeholder") if each.name == POSITIONS]


def _runs(args: ops.AttentionArgs) -> _Runs | None:
    """Positions of which a rule shows a query those only that are joined to its own by steps of one.

    Such a rule compares running counts of the jumps, as transformers finds packed requests:
    ``(positions.diff(prepend=...) != 1).cumsum(-1)``.
    """
    steps = {step.name: step for step in parse(args.rule)}
    operands = {f"x{i}": each for i, each in enumerate(args.operands)}
    for each in _terms("mask", steps):
        step = steps.get(each)
        if step is None or step.function != "eq" or not all(name in operands for name in step.arguments):
            continue
        query, key = (operands[str(name)] for name in step.arguments)
        counts = _origin(query)
        positions = _without_jumps(counts) if counts is _origin(key) else None
        leading = tuple(shape_of(query)[:-2])
        if positions is None or leading != tuple(shape_of(key)[:-2]):
            continue
        if len(positions.meta["val"]) == 1 or all(_shows_all(side, counts) for side in (query, key)):
            return _Runs(positions, leading)
    return None


def _without_jumps(counts: fx.Node) -> fx.Node | None:
    """The positions ``[batch, tokens]`` whose jumps are counted."""
    node: Any = counts
    for target, wanted in ((aten.cumsum.default, -1), (aten.ne.Scalar, 1)):
        if node.target is not target or node.args[1] != wanted:
            return None
        node = _origin(node.args[0])
    if node.target is not aten.diff.default or node.args[1:3] != (1, -1) or len(node.args) > 4:
        return None
    positions = node.args[0]
    return positions if len(shape_of(positions)) == 2 else None


def _shows_all(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node that shows a source in another shape has each of its elements once."""
    while node is not source:
        before: Any = node.args[0]
        if not isinstance(before, fx.Node) or product(shape_of(before)) != product(shape_of(node)):
            return False
        node = before
    return True


def _row_number(
    operand: fx.Node, tokens: sympy.Symbol | None, apart: bool = False, runs: _Runs | None = None
) -> _Linear | None:
    shape: Sequence[Any] = shape_of(operand)
    if tokens is None or len(shape) < 2 or tokens not in shape[-2:]:
        return None
    offset = _offset(operand, tokens, apart, runs)
    if offset is None or (runs is not None and not runs.aligned(operand)):
        return None
    return _Linear(query=1, constant=offset) if shape[-2] == tokens else _Linear(key=1, constant=offset)


def _inner(node: fx.Node, tokens: sympy.Symbol) -> Any:
    """Elements behind each row of the token dim; None where there is no such dim."""
    shape = shape_of(node)
    return product(shape[shape.index(tokens) + 1 :]) if shape.count(tokens) == 1 else None


def _offset(node: Any, tokens: sympy.Symbol, apart: bool, runs: _Runs | None) -> float | None:
    """``c`` where the node's elements along the token dim are ``c, c + 1, ...``, and along others the same.

    They may begin anew with each request where that will do (``apart``), as positions do that count by ``runs``.
    """
    if runs is not None and node is runs.positions:
        return 0
    if not isinstance(node, fx.Node) or node.op != "call_function" or shape_of(node).count(tokens) != 1:
        return None
    args: Any = node.args
    if node.target in SAME_ORDER:
        kept = node.target is aten.expand.default or _inner(args[0], tokens) == _inner(node, tokens)
        return _offset(args[0], tokens, apart, runs) if kept else None
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs and isinstance(args[1], int | float):
        base = _offset(args[0], tokens, apart, runs)
        return None if base is None else base + (args[1] if node.target is aten.add.Tensor else -args[1])
    if node.target is aten.sub.Tensor and apart and args[1].meta.get("index_input") == START:
        return _offset(args[0], tokens, apart, runs)
    if node.target is aten.arange.default and shape_of(node) == (tokens,):
        return 0
    if node.target is aten.arange.start and shape_of(node) == (tokens,):
        return args[0] if isinstance(args[0], int) else None
    return None
