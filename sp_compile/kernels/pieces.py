"""Pieces of the queries or keys: where a rule's vectors are constant or count up, and a tree over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sp_compile.kernels.bands import ROUNDING, WHOLE

SMALL = 64  # rows of a piece
BRANCH = 8


class Vector:
    """A per-token vector of the rule, seen over pieces.

    ``rounding`` is by how much a comparison may change its values, as a share; then it has no runs that can be trusted.
    """

    def __init__(self, value: torch.Tensor, of_keys: bool, rounding: float = 0.0) -> None:
        self.of_keys = of_keys
        self.values = value.reshape(-1).to(torch.float64).numpy()
        small = np.abs(self.values) <= WHOLE
        self.whole = not rounding and bool(((self.values == np.floor(self.values)) & small).all())
        self.rounding = rounding if small.all() else max(rounding, ROUNDING)

    def cuts(self) -> np.ndarray:
        """Where a run of constant or counting values ends; a grid for vectors without such runs."""
        if len(self.values) < 2:
            return np.zeros(0, dtype=np.int64)
        steps = np.diff(self.values)
        starts = np.flatnonzero(np.diff(steps)) + 1  # where another step begins
        if not self.whole or len(starts) > len(steps) // 4 + 8:
            return np.arange(SMALL, len(self.values), SMALL)
        edges = starts.tolist()
        # a lone first element is a piece, unless it counts on
        found = [1] if edges[:1] == [1] and steps[0] not in (0.0, 1.0) else []
        for at in edges:
            if not found or at != found[-1]:  # else a piece begins here anyway
                found.append(at + 1)
        return np.asarray(found, dtype=np.int64)

    def over(self, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, ...]:
        """Least and largest value, first value and step of each piece; NaN for the last two where it is irregular."""
        low, high = np.minimum.reduceat(self.values, starts), np.maximum.reduceat(self.values, starts)
        if self.rounding:
            low, high = low - self.rounding * np.abs(low), high + self.rounding * np.abs(high)
        first, size = self.values[starts], ends - starts
        step = np.where(size > 1, self.values[np.minimum(starts + 1, ends - 1)] - first, 0.0)
        irregular = np.zeros(len(self.values), dtype=bool)
        if len(self.values) > 2:
            irregular[2:] = np.diff(self.values, 2) != 0
        irregular[starts] = False
        second = starts + 1
        irregular[second[second < ends]] = False
        regular = ~np.logical_or.reduceat(irregular, starts) & self.whole
        return low, high, np.where(regular, first, np.nan), np.where(regular, step, np.nan)


class Side:
    """The pieces of the queries or of the keys, in a tree.

    Args:
        least: rows below which neighbouring pieces become one.
    """

    def __init__(self, length: int, vectors: Sequence[Vector], least: int = SMALL) -> None:
        cuts = np.unique(np.concatenate([np.zeros(1, dtype=np.int64), *(each.cuts() for each in vectors)]))
        self.starts = _without_small(cuts[cuts < length], length, least)
        self.ends = np.append(self.starts[1:], length)
        self.levels = [(self.starts, self.ends)]
        while len(self.levels[-1][0]) > BRANCH:
            starts = self.levels[-1][0][::BRANCH]
            self.levels.append((starts, np.append(starts[1:], length)))

    def level(self, level: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of the pieces, ``BRANCH**level`` of them taken together; at most as far as the tree goes."""
        return self.levels[min(level, len(self.levels) - 1)]


def _without_small(starts: np.ndarray, length: int, least: int) -> np.ndarray:
    """Runs of neighbouring small pieces become larger ones."""
    sizes = np.diff(np.append(starts, length))
    if (sizes >= least).all():
        return starts
    kept: list[int] = []
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        if not kept or size >= least or start - kept[-1] >= least:
            kept.append(start)
    return np.asarray(kept, dtype=np.int64)
