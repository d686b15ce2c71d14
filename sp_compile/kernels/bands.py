"""What a mask rule says of a rectangle of the scores: all, nothing, or a band along the diagonal.

Within a *piece* of tokens every per-token vector of a rule is constant or counts up by one, so over a pair of pieces
(queries by keys) its comparisons are half-planes: ``key <= query`` is everything left of a diagonal, a sliding window
lies between two. A mask is then known without looking at an element of it. Values are kept as ``start + down * i +
right * j`` for row i and column j of the pair, masks as the band ``low <= j - i <= high``.

Only whole numbers are treated so, for which this is exact; anything else is bounded from above and below, and where
that decides nothing the mask is unknown there (a band of NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sp_compile.rule_intervals import Interval, interval
from sp_compile.score_rule import Assignment

WHOLE = 2.0**24  # whole numbers up to here are exact in fp32
ROUNDING = 1e-5


@dataclass(frozen=True)
class Value:
    """A number over pairs of pieces: bounds, and its plane where it has one (NaN elsewhere)."""

    low: np.ndarray
    high: np.ndarray
    start: np.ndarray
    down: np.ndarray
    right: np.ndarray

    @property
    def bounds(self) -> Interval:
        """Least and largest element."""
        return self.low, self.high


@dataclass(frozen=True)
class Band:
    """A mask over pairs of pieces: True where ``low <= j - i <= high``; NaN where that is not known."""

    low: np.ndarray
    high: np.ndarray

    @property
    def full(self) -> np.ndarray:
        """Where every element is True."""
        return np.asarray((self.low == -np.inf) & (self.high == np.inf))

    @property
    def empty(self) -> np.ndarray:
        """Where no element is."""
        return np.asarray(self.low > self.high)


@dataclass(frozen=True)
class Pairs:
    """Sizes of the pairs of pieces that are looked at."""

    rows: np.ndarray
    columns: np.ndarray

    def evaluate(self, assignments: Sequence[Assignment], values: Mapping[str, Value | Band]) -> Band:
        """The mask of a rule from the values of its operands."""
        known = dict(values)
        for each in assignments:
            known[each.name] = self._apply(each, [self._argument(item, known) for item in each.arguments])
        return self._as_band(known["mask"])

    def _argument(self, item: str | float, known: Mapping[str, Value | Band]) -> Value | Band:
        if isinstance(item, str):
            return known.get(item, self._unknown())
        return self.constant(np.full(self.rows.shape, float(item)))

    def constant(self, value: np.ndarray) -> Value:
        """One number for each pair."""
        zero = np.zeros_like(value)
        return Value(value, value, np.where(_whole(value), value, np.nan), zero, zero)

    def plane(self, start: np.ndarray, down: np.ndarray, right: np.ndarray) -> Value:
        """A plane with its bounds; not one where it leaves the whole numbers that are exact."""
        ends = down * (self.rows - 1), right * (self.columns - 1)
        low = start + np.minimum(ends[0], 0) + np.minimum(ends[1], 0)
        high = start + np.maximum(ends[0], 0) + np.maximum(ends[1], 0)
        exact = (np.abs(low) <= WHOLE) & (np.abs(high) <= WHOLE)
        return Value(low, high, np.where(exact, start, np.nan), down, right)

    def _unknown(self) -> Value:
        nothing = np.full(self.rows.shape, np.nan)
        return Value(np.full_like(nothing, -np.inf), np.full_like(nothing, np.inf), nothing, nothing, nothing)

    def _apply(self, each: Assignment, inputs: list[Value | Band]) -> Value | Band:
        name = each.function
        if name in _COMPARISONS:
            a, b = (self._as_value(item) for item in inputs)
            return _COMPARISONS[name](self, a, b)
        if name in _LOGIC:
            return _LOGIC[name](self, *(self._as_band(item) for item in inputs))
        if name == "where":
            return self._where(*inputs)
        if name == "copy":
            return inputs[0]
        return self._arithmetic(name, [self._as_value(item) for item in inputs])

    def _where(self, condition: Value | Band, first: Value | Band, second: Value | Band) -> Value | Band:
        chosen = self._as_band(condition)
        if isinstance(first, Band) and isinstance(second, Band):
            inside = _LOGIC["and"](self, chosen, first)
            return _LOGIC["or"](self, inside, _LOGIC["and"](self, _LOGIC["not"](self, chosen), second))
        a, b = self._as_value(first), self._as_value(second)
        parts = []
        for one, other in zip(vars(a).values(), vars(b).values(), strict=True):
            parts.append(np.where(chosen.full, one, np.where(chosen.empty, other, np.nan)))
        low = np.where(np.isnan(parts[0]), np.minimum(a.low, b.low), parts[0])
        high = np.where(np.isnan(parts[1]), np.maximum(a.high, b.high), parts[1])
        return Value(low, high, *parts[2:])

    def _arithmetic(self, name: str, inputs: list[Value]) -> Value:
        if name in _PLANES:
            planes = [(each.start, each.down, each.right) for each in inputs]
            parts = [_PLANES[name](*each) for each in zip(*planes, strict=True)]
            return self._bounded(name, inputs, self.plane(*parts))
        if name == "mul":
            a, b = inputs
            for one, other in ((a, b), (b, a)):
                flat = (one.down == 0) & (one.right == 0)
                if flat.all():
                    return self._bounded(name, inputs, self.plane(*(one.start * part for part in _plane(other))))
        if name in ("int", "float"):
            return self._bounded(name, inputs, self.plane(*_plane(inputs[0])))
        return self._bounded(name, inputs, self._unknown())

    def _bounded(self, name: str, inputs: list[Value], plane: Value) -> Value:
        """Bounds by interval arithmetic where there is no plane, widened by what rounding may do."""
        with np.errstate(all="ignore"):
            low, high = (np.broadcast_to(each, self.rows.shape) for each in interval(name, [x.bounds for x in inputs]))
            low, high = (np.where(_whole(each), each, each + sign * ROUNDING * np.abs(each))
                         for each, sign in ((low, -1), (high, 1)))  # fmt: skip
        held = ~np.isnan(plane.start)
        return Value(
            np.where(held, plane.low, np.where(np.isnan(low), -np.inf, low)),
            np.where(held, plane.high, np.where(np.isnan(high), np.inf, high)),
            plane.start,
            plane.down,
            plane.right,
        )

    def _as_value(self, item: Value | Band) -> Value:
        if isinstance(item, Value):
            return item
        known = item.full | item.empty
        truth = np.where(known, item.full.astype(float), np.nan)
        zero = np.zeros_like(truth)
        return Value(np.where(known, truth, 0.0), np.where(known, truth, 1.0), truth, zero, zero)

    def _as_band(self, item: Value | Band) -> Band:
        """Numbers are True where they are not 0."""
        return item if isinstance(item, Band) else _not_equal(self, item, self.constant(np.zeros(self.rows.shape)))

    def clipped(self, low: np.ndarray, high: np.ndarray) -> Band:
        """Sides that no element reaches are infinite; a band that holds no element is empty."""
        low = np.where(low <= 1 - self.rows, -np.inf, low)
        high = np.where(high >= self.columns - 1, np.inf, high)
        outside = (low > self.columns - 1) | (high < 1 - self.rows) | (low > high)
        return Band(np.where(outside, np.inf, low), np.where(outside, -np.inf, high))

    def at_least(self, value: Value) -> Band:
        """Where ``value >= 0``."""
        start, down, right = _plane(value)
        with np.errstate(all="ignore"):
            edge = start / np.abs(down)  # start + down * (i - j) >= 0
        diagonal = (down == -right) & (down != 0)
        high = np.where(diagonal & (down > 0), np.floor(edge), np.inf)
        low = np.where(diagonal & (down < 0), np.ceil(-edge), -np.inf)
        found = self.clipped(low, high)
        return self._decided(value.low >= 0, value.high < 0, diagonal, found)

    def equal(self, value: Value) -> Band:
        """Where ``value == 0``."""
        start, down, right = _plane(value)
        with np.errstate(all="ignore"):
            edge = start / down
        diagonal = (down == -right) & (down != 0)
        off = diagonal & (edge != np.floor(edge))
        found = self.clipped(np.where(diagonal, edge, -np.inf), np.where(diagonal, edge, np.inf))
        never = (value.low > 0) | (value.high < 0) | off
        return self._decided((value.low == 0) & (value.high == 0), never, diagonal, found)

    def _decided(self, always: np.ndarray, never: np.ndarray, diagonal: np.ndarray, band: Band) -> Band:
        low = np.where(always, -np.inf, np.where(never, np.inf, np.where(diagonal, band.low, np.nan)))
        high = np.where(always, np.inf, np.where(never, -np.inf, np.where(diagonal, band.high, np.nan)))
        return Band(low, high)


def _whole(value: np.ndarray) -> np.ndarray:
    return np.asarray(np.isfinite(value) & (value == np.floor(value)) & (np.abs(value) <= WHOLE))


def _plane(value: Value) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return value.start, value.down, value.right


_PLANES: Mapping[str, Callable[..., np.ndarray]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "neg": lambda a: -a,
}


def _difference(pairs: Pairs, a: Value, b: Value) -> Value:
    """``a - b``; bounds of plain numbers are exact, those of sums are not."""
    both = pairs.plane(a.start - b.start, a.down - b.down, a.right - b.right)
    held = ~np.isnan(both.start)
    with np.errstate(invalid="ignore"):
        low, high = a.low - b.high, a.high - b.low
    low, high = np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)
    return Value(np.where(held, both.low, low), np.where(held, both.high, high), both.start, both.down, both.right)


def _le(pairs: Pairs, a: Value, b: Value) -> Band:
    return pairs.at_least(_difference(pairs, b, a))


def _lt(pairs: Pairs, a: Value, b: Value) -> Band:
    """Less, as the opposite of at least."""
    return _not(pairs, _le(pairs, b, a))


def _equal(pairs: Pairs, a: Value, b: Value) -> Band:
    return pairs.equal(_difference(pairs, a, b))


def _not_equal(pairs: Pairs, a: Value, b: Value) -> Band:
    return _not(pairs, _equal(pairs, a, b))


def _not(pairs: Pairs, a: Band) -> Band:
    """The rest of a half-plane is one; that of a band between two diagonals is not known."""
    left, right = a.low == -np.inf, a.high == np.inf
    low = np.where(
        a.empty, -np.inf, np.where(a.full, np.inf, np.where(left, a.high + 1, np.where(right, -np.inf, np.nan)))
    )
    high = np.where(
        a.empty, np.inf, np.where(a.full, -np.inf, np.where(left, np.inf, np.where(right, a.low - 1, np.nan)))
    )
    known = np.isnan(a.low) | np.isnan(low)
    found = pairs.clipped(low, high)
    return Band(np.where(known, np.nan, found.low), np.where(known, np.nan, found.high))


def _and(pairs: Pairs, a: Band, b: Band) -> Band:
    found = pairs.clipped(np.maximum(a.low, b.low), np.minimum(a.high, b.high))  # NaN stays NaN
    unknown = np.isnan(a.low) | np.isnan(b.low)
    none = a.empty | b.empty
    low = np.where(none, np.inf, np.where(unknown, np.nan, found.low))
    return Band(low, np.where(none, -np.inf, np.where(unknown, np.nan, found.high)))


def _or(pairs: Pairs, a: Band, b: Band) -> Band:
    """Bands that touch join; others are not known, unless one of them decides."""
    touch = (a.low <= b.high + 1) & (b.low <= a.high + 1)
    low, high = np.minimum(a.low, b.low), np.maximum(a.high, b.high)
    found = pairs.clipped(np.where(touch, low, np.nan), np.where(touch, high, np.nan))
    all_of_it = a.full | b.full
    choices = [all_of_it, a.empty, b.empty, touch]
    return Band(
        np.select(choices, [np.full_like(low, -np.inf), b.low, a.low, found.low], np.nan),
        np.select(choices, [np.full_like(high, np.inf), b.high, a.high, found.high], np.nan),
    )


def _xor(pairs: Pairs, a: Band, b: Band) -> Band:
    return _or(pairs, _and(pairs, a, _not(pairs, b)), _and(pairs, _not(pairs, a), b))


_COMPARISONS: Mapping[str, Callable[[Pairs, Value, Value], Band]] = {
    "le": _le,
    "lt": _lt,
    "ge": lambda pairs, a, b: _le(pairs, b, a),
    "gt": lambda pairs, a, b: _lt(pairs, b, a),
    "eq": _equal,
    "ne": _not_equal,
}
_LOGIC: Mapping[str, Callable[..., Band]] = {
    "and": _and,
    "or": _or,
    "xor": _xor,
    "not": _not,
    "bool": lambda pairs, a: a,
}
