"""How far back an attention sees, read from its mask rule.

A rule that joins ``key > query - 512`` to whatever else, over numbers of the row's tokens, never shows a query more
than the last 512. Only what follows from the rule counts: positions that come from outside may jump, and prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sp_compile import ops
from sp_compile.requests import START, keeps_apart
from sp_compile.score_rule import Assignment, parse
from sp_compile.symbols import product, shape_of

aten = torch.ops.aten

SAME_ORDER = (ops.redistribute, aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.expand.default,
              aten.squeeze.dim, aten.clone.default, aten._to_copy.default, aten.to.dtype)  # fmt: skip
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
    """Tokens that a query sees at most, itself and those before it; None where the rule sets no bound.

    Args:
        attention: a canonical attention node, of which queries and keys are the tokens of one row.
    """
    args = ops.AttentionArgs(*attention.args)
    apart = keeps_apart(args.rule, args.operands)
    numbers = [_row_numbers(each, tokens, apart) for each in args.operands]
    values: dict[Any, _Linear | None] = {f"x{i}": each for i, each in enumerate(numbers)}
    steps = {}
    for step in parse(args.rule):
        steps[step.name] = step
        values[step.name] = _linear(step, values)
    bounds = [_bound(step, values) for step in _joined("mask", steps)]
    found = [each for each in bounds if each is not None and each >= 1]
    return min(found, default=None)


def _joined(name: str, steps: dict[str, Assignment]) -> Iterator[Assignment]:
    """The comparisons of which all must hold."""
    step = steps.get(name)
    if step is not None and step.function in ("and", "copy"):
        for each in step.arguments:
            yield from _joined(str(each), steps)
    elif step is not None:
        yield step


def _bound(step: Assignment, values: dict[Any, _Linear | None]) -> int | None:
    """``W`` of ``key > query - W``."""
    if step.function not in SWAPPED:
        return None
    left, right = (_value(each, values) for each in step.arguments)
    if left is None or right is None:
        return None
    difference, function = left.plus(right, -1), step.function
    if difference.key < 0:
        difference, function = _Linear().plus(difference, -1), SWAPPED[function]
    if (difference.key, difference.query) != (1, -1) or function not in ("ge", "gt"):
        return None
    return int(difference.constant) + (function == "ge") if difference.constant == int(difference.constant) else None


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


def _row_numbers(operand: fx.Node, tokens: sympy.Symbol | None, apart: bool) -> _Linear | None:
    """The operand as numbers of rows along its queries or keys, if it is these.

    Where only pairs of the same request are seen (``apart``), they may count from where that begins.
    """
    shape: Sequence[Any] = shape_of(operand)
    if tokens is None or len(shape) < 2 or tokens not in shape[-2:]:
        return None
    offset = _offset(operand, tokens, apart)
    if offset is None:
        return None
    return _Linear(query=1, constant=offset) if shape[-2] == tokens else _Linear(key=1, constant=offset)


def _inner(node: fx.Node, tokens: sympy.Symbol) -> Any:
    """Elements behind each row of the token dim; None where there is no such dim."""
    shape = shape_of(node)
    return product(shape[shape.index(tokens) + 1 :]) if shape.count(tokens) == 1 else None


def _offset(node: Any, tokens: sympy.Symbol, apart: bool) -> float | None:
    """``c`` where the node's elements along the token dim are ``c, c + 1, ...``, and along others the same.

    They may begin anew with each request where that will do (``apart``).
    """
    if not isinstance(node, fx.Node) or node.op != "call_function" or shape_of(node).count(tokens) != 1:
        return None
    args: Any = node.args
    if node.target in SAME_ORDER:
        kept = node.target is aten.expand.default or _inner(args[0], tokens) == _inner(node, tokens)
        return _offset(args[0], tokens, apart) if kept else None
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs and isinstance(args[1], int | float):
        base = _offset(args[0], tokens, apart)
        return None if base is None else base + (args[1] if node.target is aten.add.Tensor else -args[1])
    if node.target is aten.sub.Tensor and apart and args[1].meta.get("index_input") == START:
        return _offset(args[0], tokens, apart)
    if node.target is aten.arange.default and shape_of(node) == (tokens,):
        return 0
    if node.target is aten.arange.start and shape_of(node) == (tokens,):
        return args[0] if isinstance(args[0], int) else None
    return None
