"""Masks and score changes of attention as small programs over broadcast operands.

A rule is text, one assignment per ``;``, so it prints in a graph, hashes, and travels as an op argument::

    t0 = le(x1, x0); mask = and(t0, x2)

``x<i>`` are operands that broadcast to ``[batch, heads, queries, keys]`` (a vector per query has size 1 at the keys and
the other way round), ``table<i>`` are whole tables ``[heads or 1, entries]`` that ``lookup(table0, index)`` reads, and
``score`` is ``scale * q @ k^T``. A rule assigns any of ``mask`` (bool, True attends), ``bias``
(added to the score), ``score`` (replaces the score before the bias) and ``keep`` (bool, False drops a weight of the
softmax, which sums to 1 with it). Evaluated on slices of the operands it yields
the tile of a mask; evaluated on ranges of them it tells which tiles are empty or full, without touching an element.
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from sp_compile.draws import drawn


def _lookup(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of a table ``[heads or 1, entries]`` at ``[batch, 1, queries, keys]``, as ``[batch, heads, ...]``."""
    index = index.reshape((1,) * (4 - index.dim()) + tuple(index.shape)).squeeze(1)
    return table[:, index.to(torch.int64)].transpose(0, 1)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "copy": lambda value: value,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "floor_divide": torch.floor_divide,
    "remainder": torch.remainder,
    "neg": torch.neg,
    "abs": torch.abs,
    "pow": torch.pow,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "sign": torch.sign,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "le": torch.le,
    "lt": torch.lt,
    "ge": torch.ge,
    "gt": torch.gt,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "xor": torch.logical_xor,
    "not": torch.logical_not,
    "where": torch.where,
    "bool": lambda value: value.to(torch.bool),
    "int": lambda value: value.to(torch.int64),
    "float": lambda value: value.to(torch.float32),
    "lookup": _lookup,
    "bernoulli": lambda score, chance: torch.rand_like(score) < chance,
    "drawn": drawn,
}


DRAWS = frozenset({"bernoulli", "drawn"})  # of FUNCTIONS, those that only ``keep`` is made by


@dataclass(frozen=True)
class Assignment:
    """``name = function(arguments)``; arguments are names of values or numbers."""

    name: str
    function: str
    arguments: tuple[Any, ...]


@lru_cache(maxsize=256)
def parse(rule: str) -> tuple[Assignment, ...]:
    """Read a rule's text.

    Raises:
        ValueError: the text is not a rule; the message names the assignment.

    >>> parse("mask = le(x1, x0)")
    (Assignment(name='mask', function='le', arguments=('x1', 'x0')),)
    """
    parts = [part.strip() for part in rule.split(";") if part.strip()]
    return tuple(_assignment(part) for part in parts)


def _assignment(text: str) -> Assignment:
    name, _, call = (piece.strip() for piece in text.partition("="))
    function, _, inner = call.partition("(")
    if not name.isidentifier() or function not in FUNCTIONS or not inner.endswith(")"):
        raise ValueError(f"not an assignment of a score rule: {text!r}")
    try:
        return Assignment(name, function, tuple(_argument(each.strip()) for each in inner[:-1].split(",")))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"not an assignment of a score rule: {text!r}") from error


def _argument(text: str) -> Any:
    if text.isidentifier() and text not in ("True", "False", "inf", "nan"):
        return text
    return float(text) if text in ("inf", "-inf", "nan") else ast.literal_eval(text)


def format_rule(assignments: Sequence[Assignment]) -> str:
    """The text of a rule; the inverse of :func:`parse`."""
    return "; ".join(f"{each.name} = {each.function}({', '.join(map(str, each.arguments))})" for each in assignments)


def evaluate(
    rule: str,
    operands: Sequence[torch.Tensor],
    outputs: Sequence[str],
    score: torch.Tensor | None = None,
    tables: Sequence[torch.Tensor] = (),
) -> dict[str, torch.Tensor]:
    """Compute those of ``outputs`` that the rule assigns, on operands that broadcast to a tile of the scores."""
    values: dict[str, Any] = {f"x{i}": operand for i, operand in enumerate(operands)}
    values |= {f"table{i}": table for i, table in enumerate(tables)}
    values["score"] = score
    device = operands[0].device if operands else (score.device if score is not None else torch.device("cpu"))
    for each in needed(rule, tuple(outputs)):
        inputs = [values[item] if isinstance(item, str) else item for item in each.arguments]
        values[each.name] = call(each.function, inputs, device)
    return {name: values[name] for name in outputs if assigns(rule, name)}


def score_and_derivative(
    rule: str, operands: Sequence[torch.Tensor], score: torch.Tensor, tables: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the rule makes of the scores, and its derivative by them, element by element.

    Raises:
        ValueError: the rule uses a function of the scores whose derivative is not known.
    """
    values: dict[Any, Any] = {f"x{i}": operand for i, operand in enumerate(operands)}
    values |= {f"table{i}": table for i, table in enumerate(tables)}
    values["score"] = score
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
    values: dict[Any, Any] = {f"x{i}": operand for i, operand in enumerate(operands)}
    values |= {f"table{i}": table for i, table in enumerate(tables)}
    values["score"] = score
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


@lru_cache(maxsize=256)
def needed(rule: str, outputs: tuple[str, ...]) -> tuple[Assignment, ...]:
    """The assignments of a rule that its outputs rest on, in order, each to a name of its own."""
    wanted, kept = set(outputs), []
    for each in reversed(parse(rule)):
        if each.name in wanted:
            kept.append(each)
            wanted.discard(each.name)
            wanted.update(item for item in each.arguments if isinstance(item, str))
    left = Counter(each.name for each in kept)
    current: dict[Any, str] = {}
    found = []
    for each in reversed(kept):
        left[each.name] -= 1
        name = f"{each.name}.{left[each.name]}" if left[each.name] else each.name
        found.append(Assignment(name, each.function, tuple(current.get(item, item) for item in each.arguments)))
        current[each.name] = name
    return tuple(found)


def call(function: str, inputs: Sequence[Any], device: torch.device) -> torch.Tensor:
    """Compute one function of tensors and numbers."""
    if function != "pow":
        wide = any(isinstance(each, torch.Tensor) and each.dtype == torch.float64 for each in inputs)
        floats = torch.float64 if wide else torch.float32
        inputs = [each if isinstance(each, torch.Tensor) else _number(each, floats, device) for each in inputs]
    return FUNCTIONS[function](*inputs)  # type: ignore[no-any-return]


def _number(value: float, floats: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=floats if isinstance(value, float) else None, device=device)


def assigns(rule: str, name: str) -> bool:
    """Whether the rule sets ``mask``, ``bias``, ``score`` or ``keep``."""
    return any(each.name == name for each in parse(rule))


def calls(rule: str, function: str) -> bool:
    """Whether the rule calls a function."""
    return any(each.function == function for each in parse(rule))


Interval = tuple[np.ndarray, np.ndarray]
_UNKNOWN: Interval = (np.asarray(-math.inf), np.asarray(math.inf))


def mask_ranges(rule: str, ranges: Sequence[Interval]) -> Interval:
    """Lower and upper bound of the mask (0 or 1) from bounds of the operands, each broadcast to ``[queries, keys]``.

    ``(1, 1)`` means every element attends, ``(0, 0)`` none does; anything else decides nothing.
    """
    values: dict[str, Interval] = {f"x{i}": each for i, each in enumerate(ranges)}
    with np.errstate(all="ignore"):
        for each in parse(rule):
            inputs = [
                values.get(item, _UNKNOWN) if isinstance(item, str) else (np.asarray(float(item)),) * 2
                for item in each.arguments
            ]
            low, high = interval(each.function, inputs)
            # 0 * inf and the like bound nothing
            values[each.name] = np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)
    return _truth(values["mask"])


def _truth(value: Interval) -> Interval:
    low, high = value
    return ((low > 0) | (high < 0)).astype(float), ((low != 0) | (high != 0)).astype(float)


def interval(function: str, inputs: Sequence[Interval]) -> Interval:
    """Bounds of a function's value from bounds of its arguments; nothing is known where it has no rule."""
    rule = _INTERVALS.get(function)
    if rule is not None:
        return rule(*inputs)
    return (np.asarray(0.0), np.asarray(1.0)) if function == "xor" else _UNKNOWN


def _compare(low: np.ndarray, high: np.ndarray) -> Interval:
    return low.astype(float), high.astype(float)


def _mul(a: Interval, b: Interval) -> Interval:
    corners = [x * y for x in a for y in b]
    return np.minimum.reduce(np.broadcast_arrays(*corners)), np.maximum.reduce(np.broadcast_arrays(*corners))


def _floor_divide(a: Interval, b: Interval) -> Interval:
    if b[0].ndim or b[0] != b[1] or b[0] <= 0:
        return _UNKNOWN
    return np.floor(a[0] / b[0]), np.floor(a[1] / b[0])


def _eq(a: Interval, b: Interval) -> Interval:
    sure = (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0])
    return _compare(sure, (a[0] <= b[1]) & (b[0] <= a[1]))


def _not(a: Interval) -> Interval:
    low, high = _truth(a)
    return 1 - high, 1 - low


def _and(a: Interval, b: Interval) -> Interval:
    (a_low, a_high), (b_low, b_high) = _truth(a), _truth(b)
    return a_low * b_low, a_high * b_high


def _or(a: Interval, b: Interval) -> Interval:
    (a_low, a_high), (b_low, b_high) = _truth(a), _truth(b)
    return np.maximum(a_low, b_low), np.maximum(a_high, b_high)


def _where(condition: Interval, a: Interval, b: Interval) -> Interval:
    low, high = _truth(condition)
    least, most = np.minimum(a[0], b[0]), np.maximum(a[1], b[1])
    return (
        np.where(low == 1, a[0], np.where(high == 0, b[0], least)),
        np.where(low == 1, a[1], np.where(high == 0, b[1], most)),
    )


def _abs(a: Interval) -> Interval:
    largest = np.maximum(np.abs(a[0]), np.abs(a[1]))
    return np.where((a[0] <= 0) & (a[1] >= 0), 0.0, np.minimum(np.abs(a[0]), np.abs(a[1]))), largest


_INTERVALS: Mapping[str, Callable[..., Interval]] = {
    "copy": lambda a: a,
    "int": lambda a: (np.trunc(a[0]), np.trunc(a[1])),
    "float": lambda a: a,
    "bool": _truth,
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "neg": lambda a: (-a[1], -a[0]),
    "abs": _abs,
    "mul": _mul,
    "floor_divide": _floor_divide,
    "maximum": lambda a, b: (np.maximum(a[0], b[0]), np.maximum(a[1], b[1])),
    "minimum": lambda a, b: (np.minimum(a[0], b[0]), np.minimum(a[1], b[1])),
    "le": lambda a, b: _compare(a[1] <= b[0], a[0] <= b[1]),
    "lt": lambda a, b: _compare(a[1] < b[0], a[0] < b[1]),
    "ge": lambda a, b: _compare(a[0] >= b[1], a[1] >= b[0]),
    "gt": lambda a, b: _compare(a[0] > b[1], a[1] > b[0]),
    "eq": _eq,
    "ne": lambda a, b: _not(_eq(a, b)),
    "and": _and,
    "or": _or,
    "not": _not,
    "where": _where,
}
