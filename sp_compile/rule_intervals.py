"""Bounds of what a rule computes, from bounds of its operands: which tiles of a mask are empty or full.

Source: interval arithmetic (Moore, Interval Analysis, 1966).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sp_compile.score_rule import parse

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
