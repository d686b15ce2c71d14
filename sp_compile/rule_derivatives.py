"""Derivatives of what a rule makes of scores: by the scores, element by element, and by operands and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from sp_compile.score_rule import Assignment, call, given, needed


def score_and_derivative(
    rule: str, operands: Sequence[torch.Tensor], score: torch.Tensor, tables: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the rule makes of the scores, and its derivative by them, element by element.

    Raises:
        ValueError: the rule uses a function of the scores whose derivative is not known.
    """
    values = given(operands, tables, score)
    slopes: dict[Any, torch.Tensor] = {"score": torch.ones_like(score)}
    for each in needed(rule, ("score",)):
        inputs = [values[item] if isinstance(item, str) else item for item in each.arguments]
        values[each.name] = call(each.function, inputs, score.device)
        changing = [i for i, item in enumerate(each.arguments) if item in slopes]
        if changing and each.function in _STEPS:
            changing = []
        parts = [slopes[each.arguments[i]] * _slope(each, i, inputs, values[each.name]) for i in changing]
        slopes.pop(each.name, None)
        if parts:
            slopes[each.name] = sum(parts[1:], parts[0])
    return values["score"], slopes.get("score", torch.zeros_like(score))


def gradients(
    rule: str,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    score: torch.Tensor,
    change: torch.Tensor,
    wanted: Sequence[str],
) -> list[torch.Tensor]:
    """Gradients of operands and tables.

    Args:
        score: what the rule calls ``score``.
        change: the gradient of the score that the rule makes, with its bias.
        wanted: names of operands and tables.

    Raises:
        ValueError: the rule uses a function whose derivative is not known.
    """
    values = given(operands, tables, score)
    learned, steps = set(wanted), []
    for each in needed(rule, ("score", "bias")):
        inputs = [values[item] if isinstance(item, str) else item for item in each.arguments]
        values[each.name] = call(each.function, inputs, score.device)
        if learned.intersection(each.arguments) and each.function not in _STEPS:
            learned.add(each.name)
            steps.append((each, inputs, values[each.name]))
    found: dict[Any, torch.Tensor] = {name: change for name in ("score", "bias") if name in learned}
    for each, inputs, value in reversed(steps):
        of_value = found.pop(each.name, None)
        for i, item in enumerate(each.arguments if of_value is not None else ()):
            if item not in learned:
                continue
            assert of_value is not None
            if each.function == "lookup":
                part = _of_table(inputs[0], inputs[1], of_value)
            else:
                part = (of_value * _slope(each, i, inputs, value)).sum_to_size(inputs[i].shape)
            found[item] = found[item] + part if item in found else part
    return [found.get(name, torch.zeros_like(values[name])) for name in wanted]


def underivable(rule: str, learned: Iterable[str]) -> str | None:
    """A function of a rule through which :func:`gradients` cannot go, of those that read what is learned."""
    reached = set(learned)
    for each in needed(rule, ("score", "bias")):
        if reached.intersection(each.arguments) and each.function not in _STEPS:
            if each.function not in _SLOPES and each.function != "lookup":
                return each.function
            reached.add(each.name)
    return None


def _of_table(table: torch.Tensor, index: torch.Tensor, of_entries: torch.Tensor) -> torch.Tensor:
    """The gradient of a table by that of what was looked up in it."""
    batch, heads, queries, keys = of_entries.shape
    index = index.reshape((1,) * (4 - index.dim()) + tuple(index.shape)).expand(batch, 1, queries, keys)
    whole = of_entries.new_zeros(heads, table.shape[1])
    whole.index_add_(1, index.flatten().to(torch.int64), of_entries.transpose(0, 1).flatten(1))
    return whole.sum_to_size(table.shape)


def _slope(assignment: Assignment, i: int, inputs: Sequence[Any], value: torch.Tensor) -> Any:
    """The derivative of a function by its i-th argument."""
    known = _SLOPES.get(assignment.function)
    if known is None:
        raise ValueError(f"no derivative of {assignment.function!r} in a score rule is known")
    return known(i, value, *inputs)


_STEPS = ("floor_divide", "floor", "ceil", "round", "sign", "le", "lt", "ge", "gt", "eq", "ne", "and", "or", "xor",
          "not", "bool", "int")  # fmt: skip
_SLOPES: dict[str, Callable[..., Any]] = {  # by the place of the argument, the value and the arguments
    "copy": lambda i, y, a: 1.0,
    "float": lambda i, y, a: 1.0,
    "add": lambda i, y, a, b: 1.0,
    "sub": lambda i, y, a, b: -1.0 if i else 1.0,
    "mul": lambda i, y, a, b: a if i else b,
    "div": lambda i, y, a, b: -y / b if i else 1.0 / b,
    "neg": lambda i, y, a: -1.0,
    "abs": lambda i, y, a: torch.sign(a),
    "pow": lambda i, y, a, b: y * torch.log(a) if i else b * a ** (b - 1),
    "exp": lambda i, y, a: y,
    "exp2": lambda i, y, a: y * math.log(2),
    "log": lambda i, y, a: 1.0 / a,
    "log2": lambda i, y, a: 1.0 / (a * math.log(2)),
    "log1p": lambda i, y, a: 1.0 / (1.0 + a),
    "sqrt": lambda i, y, a: 0.5 / y,
    "tanh": lambda i, y, a: 1.0 - y * y,
    "sigmoid": lambda i, y, a: y * (1.0 - y),
    "maximum": lambda i, y, a, b: (y == (a, b)[i]).to(y.dtype),
    "minimum": lambda i, y, a, b: (y == (a, b)[i]).to(y.dtype),
    "where": lambda i, y, c, a, b: (c if i == 1 else ~c).to(y.dtype),
}
