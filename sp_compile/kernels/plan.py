"""Which parts of the scores have to be computed, found from the mask's rule and its vectors.

Between two :mod:`pieces <sp_compile.kernels.pieces>` the mask is a :mod:`band <sp_compile.kernels.bands>`. Pairs of
pieces without a visible key are dropped by a tree over them, so that work and memory follow the mask's area and not
queries times keys. Where the rule is no band, its elements are looked at in strips.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sp_compile.kernels.bands import Band, Pairs, Value
from sp_compile.kernels.pieces import BRANCH, SMALL, Side, Vector
from sp_compile.kernels.regions import BOX, UNBOUNDED, Region, boxed, joined
from sp_compile.score_rule import Assignment, assigns, call, evaluate, needed

HALF = (torch.bfloat16, torch.float16)
PAIRS = 1 << 15  # of pieces, from where on they are not told apart further
STRIP_ROWS, STRIP_KEYS = 128, 4096
LOOKED_AT = BOX  # elements up to which nothing is planned


def plan_regions(
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
    queries: int,
    keys: int,
    boxes: bool = True,
) -> list[Region]:
    """The regions that hold all visible pairs of query and key, each pair in one region.

    Args:
        operands, tables, rule: see :mod:`sp_compile.score_rule`.
        valid: bool ``[keys]``, keys that exist (False on the padding of a rank); None when all do.
        boxes: small regions that follow one another become one, whose elements decide; else they are bands where
            that is possible, and those of the same queries have the same ends.
    """
    operands = [each.detach().cpu() for each in operands]
    tables = [each.detach().cpu() for each in tables]
    rule, operands = with_valid(rule, operands, None if valid is None else valid.cpu())
    if not assigns(rule, "mask"):
        return [Region(-1, 0, queries, 0, keys)]
    rows = mask_rows(rule, operands)
    found: list[Region] = []
    for row in [-1] if rows is None else range(rows):
        own = operands if row < 0 else [rows_of(each, slice(row, row + 1)) for each in operands]
        if queries * keys <= LOOKED_AT:
            found += _visible(rule, own, tables, queries, keys, row)
        else:
            regions = list(_Planner(rule, own, tables, queries, keys, row, boxes).regions())
            found += boxed(regions) if boxes else regions
    return found


def _visible(
    rule: str, operands: Sequence[torch.Tensor], tables: Sequence[torch.Tensor], queries: int, keys: int, row: int
) -> list[Region]:
    """The box of all that is seen, for few elements."""
    mask = evaluate(rule, operands, ("mask",), tables=tables)["mask"].to(torch.bool)
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))[0]
    some, every = (each.expand(queries, keys).numpy() for each in (mask.any(dim=0), mask.all(dim=0)))
    seeing, seen = np.flatnonzero(some.any(axis=1)), np.flatnonzero(some.any(axis=0))
    if not len(seeing):
        return []
    box = int(seeing[0]), int(seeing[-1]) + 1, int(seen[0]), int(seen[-1]) + 1
    return [Region(row, *box, masked=not every[box[0] : box[1], box[2] : box[3]].all())]


def seen_rows(
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
    queries: int,
    keys: int,
) -> torch.Tensor:
    """Which queries see any key, bool ``[rows, queries]`` on the CPU; one row where the batch shares a mask."""
    regions = plan_regions(operands, tables, rule, valid, queries, keys)
    rule, operands = with_valid(rule, [each.cpu() for each in operands], None if valid is None else valid.cpu())
    seen = np.zeros((mask_rows(rule, operands) or 1, queries), dtype=bool)
    for each in regions:
        row = max(each.row, 0)
        into = seen[row, each.q_start : each.q_end]
        if each.masked:
            own = [rows_of(operand, slice(row, row + 1)) for operand in operands]
            for start in range(each.k_start, each.k_end, STRIP_KEYS):
                span = start, min(start + STRIP_KEYS, each.k_end)
                into |= elements(rule, own, [x.cpu() for x in tables], (each.q_start, each.q_end), span).any(axis=1)
        else:
            i = np.arange(len(into))
            into |= np.maximum(0, i + each.low) <= np.minimum(each.k_end - each.k_start - 1, i + each.high)
    return torch.from_numpy(seen)


def rows_of(operand: torch.Tensor, rows: slice) -> torch.Tensor:
    """An operand for some rows of the batch."""
    return operand[rows] if operand.dim() == 4 and operand.shape[0] > 1 else operand


def between(operands: Sequence[torch.Tensor], queries: tuple[int, int], keys: tuple[int, int]) -> list[torch.Tensor]:
    """The operands' part between these queries and keys."""
    return [_narrowed(_narrowed(each, -2, *queries), -1, *keys) for each in operands]


def with_valid(
    rule: str, operands: Sequence[torch.Tensor], valid: torch.Tensor | None
) -> tuple[str, list[torch.Tensor]]:
    """The rule with keys that do not exist masked too."""
    if valid is None:
        return rule, list(operands)
    return joined_with_valid(rule, len(operands)), [*operands, valid[None, :]]


def joined_with_valid(rule: str, operand: int) -> str:
    """The rule with its mask joined to an operand of that number."""
    mask = f"mask = and(mask, x{operand})" if assigns(rule, "mask") else f"mask = copy(x{operand})"
    return f"{rule}; {mask}"


def mask_rows(rule: str, operands: Sequence[torch.Tensor]) -> int | None:
    """Rows of the batch where each has a mask of its own, else None."""
    used = {item for each in needed(rule, ("mask",)) for item in each.arguments}
    sizes = [each.shape[0] for i, each in enumerate(operands) if f"x{i}" in used and each.dim() == 4]
    return max(sizes) if sizes and max(sizes) > 1 else None


class _Planner:
    """Plans one mask; ``operands`` have no batch dim of their own."""

    def __init__(
        self,
        rule: str,
        operands: Sequence[torch.Tensor],
        tables: Sequence[torch.Tensor],
        queries: int,
        keys: int,
        row: int,
        boxes: bool,
    ) -> None:
        self.rule, self.operands, self.tables, self.row = rule, operands, tables, row
        self.boxes, self.least = boxes, SMALL if boxes else 1
        self.vectors: dict[str, Vector] = {}
        self.constants: dict[str, float] = {}
        self.mixed: list[Assignment] = []
        self._split()
        # an element that some head sees is then masked anew when it is computed
        read = {item for each in needed(rule, ("mask",)) for item in each.arguments}
        self.heads_differ = any(len(each) > 1 for i, each in enumerate(tables) if f"table{i}" in read) or any(
            each.dim() >= 3 and each.shape[-3] > 1 for i, each in enumerate(operands) if f"x{i}" in read
        )
        used = {item for each in self.mixed for item in each.arguments}
        vectors = [each for name, each in self.vectors.items() if name in used]
        self.queries = Side(queries, [each for each in vectors if not each.of_keys], self.least)
        self.keys = Side(keys, [each for each in vectors if each.of_keys], self.least)

    def _split(self) -> None:
        """Compute what depends on queries or on keys alone; what is left depends on both."""
        known: dict[str, Any] = {f"x{i}": _plain(each) for i, each in enumerate(self.operands)}
        known = {name: each for name, each in known.items() if each is not None}
        for each in needed(self.rule, ("mask",)):
            inputs = [known.get(item) if isinstance(item, str) else item for item in each.arguments]
            if each.name == "mask" or each.function == "lookup" or not _one_sided(inputs):
                self.mixed.append(each)
            else:
                known[each.name] = call(each.function, inputs, torch.device("cpu"))
        # what is compared with half precision is rounded to it
        rounding = 2.0**-7 if any(each.dtype in HALF for each in known.values()) else 0.0
        for name, value in known.items():
            if value.numel() == 1:
                self.constants[name] = float(value)
            elif value.dim() and value.shape[-1] == value.numel():
                self.vectors[name] = Vector(value, True, rounding)
            elif value.dim() > 1 and value.shape[-2] == value.numel():
                self.vectors[name] = Vector(value, False, rounding)

    def regions(self) -> Iterator[Region]:
        """All regions, in no order."""
        rows, columns, level = self._visible_pairs()
        if not len(rows):
            return
        band = self._band(rows, columns, level)
        unknown = np.isnan(band.low) | np.isnan(band.high)
        q_starts, q_ends = (each[rows] for each in self.queries.level(level))
        k_starts, k_ends = (each[columns] for each in self.keys.level(level))
        bounds = np.where(unknown, 0, np.clip(np.stack([band.low, band.high]), -UNBOUNDED, UNBOUNDED))
        table = np.stack([q_starts, q_ends, k_starts, k_ends, *bounds.astype(np.int64)], axis=1)
        keep = unknown | ~band.empty
        found: list[Region] = []
        for values, masked in zip(table[keep].tolist(), unknown[keep].tolist(), strict=True):
            if masked:
                found += self._looked_at(*values[:4])
            else:
                found.append(Region(self.row, *values))
        yield from joined(found, across_queries=self.boxes)

    def _visible_pairs(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Pairs of pieces that may hold a visible element, by descending both trees, and the level that was reached."""
        depth = max(len(self.queries.levels), len(self.keys.levels))
        rows = columns = np.zeros(1, dtype=np.int64)
        for level in range(depth - 1, -1, -1):
            counts = [len(side.level(level)[0]) for side in (self.queries, self.keys)]
            if level == depth - 1:
                rows, columns = (each.reshape(-1) for each in np.indices(counts))
            else:
                rows, columns = self._children(rows, columns, level, counts)
            if level:
                band = self._band(rows, columns, level)
                rows, columns = rows[~band.empty], columns[~band.empty]
                if len(rows) > PAIRS:
                    return rows, columns, level
        return rows, columns, 0

    def _children(
        self, rows: np.ndarray, columns: np.ndarray, level: int, counts: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        q_branch = BRANCH if level < len(self.queries.levels) - 1 else 1
        k_branch = BRANCH if level < len(self.keys.levels) - 1 else 1
        down, right = (each.reshape(-1) for each in np.indices((q_branch, k_branch)))
        rows = (rows[:, None] * q_branch + down).reshape(-1)
        columns = (columns[:, None] * k_branch + right).reshape(-1)
        inside = (rows < counts[0]) & (columns < counts[1])
        return rows[inside], columns[inside]

    def _band(self, rows: np.ndarray, columns: np.ndarray, level: int) -> Band:
        (q_starts, q_ends), (k_starts, k_ends) = self.queries.level(level), self.keys.level(level)
        pairs = Pairs((q_ends - q_starts)[rows].astype(float), (k_ends - k_starts)[columns].astype(float))
        values: dict[str, Value | Band] = {
            name: pairs.constant(np.full(len(rows), value)) for name, value in self.constants.items()
        }
        for name, vector in self.vectors.items():
            starts, ends, at = (k_starts, k_ends, columns) if vector.of_keys else (q_starts, q_ends, rows)
            low, high, first, step = (each[at] for each in vector.over(starts, ends))
            still = np.where(np.isnan(step), np.nan, 0.0)
            down, right = (still, step) if vector.of_keys else (step, still)
            values[name] = Value(low, high, first, down, right)
        with np.errstate(all="ignore"):
            return pairs.evaluate(self.mixed, values)

    def _looked_at(self, q_start: int, q_end: int, k_start: int, k_end: int) -> Iterator[Region]:
        """Regions of a pair whose mask is no band of the rule: its elements may still be one."""
        if max(q_end - q_start, k_end - k_start) <= 2 * SMALL and self.boxes:
            yield Region(self.row, q_start, q_end, k_start, k_end, masked=True)
            return
        first, last, count = (np.zeros(q_end - q_start, dtype=np.int64) for _ in range(3))
        strips = []
        for start in range(q_start, q_end, STRIP_ROWS):
            end = min(start + STRIP_ROWS, q_end)
            parts = [self._elements(start, end, at, min(at + STRIP_KEYS, k_end))
                     for at in range(k_start, k_end, STRIP_KEYS)]  # fmt: skip
            mask = np.concatenate(parts, axis=1)
            rows = slice(start - q_start, end - q_start)
            count[rows] = np.count_nonzero(mask, axis=1)
            first[rows], last[rows] = mask.argmax(axis=1), mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
            strips.append((start, end, np.any(mask, axis=0), np.all(mask, axis=0)))
        if (count == np.where(count > 0, last - first + 1, 0)).all():
            yield from self._of_runs(q_start, k_start, k_end, np.where(count > 0, first, -1), last)
            return
        for start, end, some, every in strips:
            yield from self._of_strip(start, end, k_start, some, every)

    def _elements(self, q_start: int, q_end: int, k_start: int, k_end: int) -> np.ndarray:
        return elements(self.rule, self.operands, self.tables, (q_start, q_end), (k_start, k_end))

    def _of_runs(self, q_start: int, k_start: int, k_end: int, first: np.ndarray, last: np.ndarray) -> Iterator[Region]:
        """Rows that each see one run of keys, cut where the run's ends jump or change their step."""
        ends = [Vector(torch.from_numpy(each), of_keys=False) for each in (first, last)]
        side = Side(len(first), ends, self.least)
        for start, end in zip(side.starts.tolist(), side.ends.tolist(), strict=True):
            if (first[start:end] < 0).all():
                continue
            lows, highs = first[start:end], last[start:end]
            steps = [np.unique(np.diff(each)) for each in (lows, highs)]
            seen = int(lows[lows >= 0].min()), int(highs.max()) + 1
            regular = (lows >= 0).all() and all(len(each) <= 1 and set(each.tolist()) <= {0, 1} for each in steps)
            region = Region(self.row, q_start + start, q_start + end, k_start + seen[0], k_start + seen[1], masked=True)
            if regular and not self.heads_differ:
                counts = [len(each) == 1 and each[0] == 1 for each in steps]
                low = int(lows[0]) - seen[0] if counts[0] else -UNBOUNDED
                high = int(highs[0]) - seen[0] if counts[1] else UNBOUNDED
                region = replace(region, low=low, high=high, masked=False)
            yield region

    def _of_strip(self, start: int, end: int, k_start: int, some: np.ndarray, every: np.ndarray) -> Iterator[Region]:
        """Runs of keys that all rows see, and of keys that some do."""
        kinds = some.astype(np.int8) + (every & (not self.heads_differ))
        edges = np.flatnonzero(np.diff(kinds)) + 1
        if len(edges) > len(kinds) // SMALL + 2:  # too ragged to be worth telling apart
            seen = np.flatnonzero(some)
            yield Region(self.row, start, end, k_start + int(seen[0]), k_start + int(seen[-1]) + 1, masked=True)
            return
        bounds = [0, *edges.tolist(), len(kinds)]
        for left, right in itertools.pairwise(bounds):
            if kinds[left]:
                yield Region(self.row, start, end, k_start + left, k_start + right, masked=bool(kinds[left] == 1))


def elements(
    rule: str,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    queries: tuple[int, int],
    keys: tuple[int, int],
) -> np.ndarray:
    """The mask between these queries and keys for one row of the batch, True where some head sees."""
    mask = evaluate(rule, between(operands, queries, keys), ("mask",), tables=tables)["mask"].to(torch.bool)
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)).any(dim=1)[0]
    return mask.expand(queries[1] - queries[0], keys[1] - keys[0]).numpy()


def _plain(operand: torch.Tensor) -> torch.Tensor | None:
    """The operand as ``[queries or 1, keys or 1]``; None where heads differ or both dims are there."""
    wide = operand.reshape((1,) * (4 - operand.dim()) + tuple(operand.shape))
    if wide.shape[1] > 1:
        if not bool((wide == wide[:, :1]).all()):
            return None
        wide = wide[:, :1]
    flat = wide[0, 0]
    return None if all(size > 1 for size in flat.shape) else flat


def _one_sided(inputs: Sequence[Any]) -> bool:
    """Whether all inputs are known, and a value of theirs depends on queries or on keys, not on both."""
    if any(each is None for each in inputs):
        return False
    shape = torch.broadcast_shapes(*(each.shape for each in inputs if isinstance(each, torch.Tensor)))
    return len(shape) < 2 or 1 in shape[-2:]


def _narrowed(tensor: torch.Tensor, dim: int, start: int, end: int) -> torch.Tensor:
    """Part of a dim that operands may leave out or have of size 1."""
    if tensor.dim() < -dim or tensor.shape[dim] == 1:
        return tensor
    return tensor.narrow(dim, start, end - start)
