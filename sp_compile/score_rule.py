"""Masks and score changes of attention as small programs over broadcast operands.

A rule is text, one assignment per ``;``, so it prints in a graph, hashes, and travels as an op argument::

    t0 = le(x1, x0); mask = and(t0, x2)

``x<i>`` are operands that broadcast to ``[batch, heads, queries, keys]`` (a vector per query has size 1 at the keys and
the other way round), ``table<i>`` are whole tables ``[heads or 1, entries]`` that ``lookup(table0, index)`` reads, and
``score`` is ``scale * q @ k^T``. A rule assigns any of ``mask`` (bool, True attends), ``bias``
(added to the score), ``score`` (replaces the score before the bias) and ``keep`` (bool, False drops a weight of the
softmax, which sums to 1 with it). Evaluated on slices of the operands it yields
the tile of a mask; on ranges of them (:mod:`sp_compile.rule_intervals`) it tells which tiles are empty or full, without
touching an element; :mod:`sp_compile.rule_derivatives` has the derivatives of what it computes.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

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


def given(
    operands: Sequence[torch.Tensor], tables: Sequence[torch.Tensor], score: torch.Tensor | None
) -> dict[Any, Any]:
    """What a rule begins with, by the names that it has there."""
    operand_names = {f"x{i}": operand for i, operand in enumerate(operands)}
    return {**operand_names, **{f"table{i}": table for i, table in enumerate(tables)}, "score": score}


def evaluate(
    rule: str,
    operands: Sequence[torch.Tensor],
    outputs: Sequence[str],
    score: torch.Tensor | None = None,
    tables: Sequence[torch.Tensor] = (),
) -> dict[str, torch.Tensor]:
    """Compute those of ``outputs`` that the rule assigns, on operands that broadcast to a tile of the scores."""
    values = given(operands, tables, score)
    device = operands[0].device if operands else (score.device if score is not None else torch.device("cpu"))
    for each in needed(rule, tuple(outputs)):
        inputs = [values[item] if isinstance(item, str) else item for item in each.arguments]
        values[each.name] = call(each.function, inputs, device)
    return {name: values[name] for name in outputs if assigns(rule, name)}


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
