"""Attention of few queries over each of many ranges of keys: requests that decode together.

Each range is one call of torch's kernel. Whatever else there is to do is done once for all of them: for so little
work an op costs more than what it computes.

Letters: B batch, H query heads, G key/value heads, R query rows of a key/value head, D head dim, E value head dim.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from sp_compile.kernels.dense import Partial, accumulated
from sp_compile.kernels.flash import flash, merge
from sp_compile.kernels.regions import Region
from sp_compile.kernels.runs import FEW_QUERIES

Range = tuple[int, int]


def of_few_queries(regions: Sequence[Region]) -> tuple[dict[int, list[Region]], list[Region]]:
    """Regions that :func:`attend_few` serves, by their batch row (-1 for all), and the others."""
    few: dict[int, list[Region]] = {}
    others: list[Region] = []
    for each in regions:
        if each.q_end - each.q_start <= FEW_QUERIES and each.full:
            few.setdefault(each.row, []).append(each)
        else:
            others.append(each)
    for row, chosen in list(few.items()):
        if not _apart(sorted({(each.q_start, each.q_end) for each in chosen})):
            others += few.pop(row)
    return few, others


def attend_few(
    q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKE: torch.Tensor, scale: float, regions: Sequence[Region]
) -> Partial:
    """Attention of all queries over the keys of these regions, from :func:`of_few_queries`.

    Returns:
        As :func:`sp_compile.kernels.tiles.attend`.
    """
    group, queries = q_BHQD.shape[1] // k_BGKD.shape[1], q_BHQD.shape[2]
    # heads of a group are rows of one call, which reads their keys once
    q_BGRD = q_BHQD.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)
    if [(each.q_start, each.q_end) for each in regions] == [(0, queries)]:
        (only,) = regions
        within = slice(only.k_start, only.k_end)
        return _by_head(flash(q_BGRD, k_BGKD[:, :, within], v_BGKE[:, :, within], None, scale), group)
    wide = accumulated(q_BHQD.dtype)
    out = q_BGRD.new_zeros(*q_BGRD.shape[:3], v_BGKE.shape[-1], dtype=wide)
    lse = q_BGRD.new_full(q_BGRD.shape[:3], -torch.inf, dtype=wide)
    rows = [(each.q_start * group, each.q_end * group) for each in regions]
    keys = [(each.k_start, each.k_end) for each in regions]
    asking, seen, values = _pieces(q_BGRD, rows), _pieces(k_BGKD, keys), _pieces(v_BGKE, keys)
    # ranges of keys that the same queries see are merged one after another, those of different queries together
    turns: list[list[tuple[Range, Partial]]] = []
    come: Counter[Range] = Counter()
    for at, where in zip(rows, keys, strict=True):
        if come[at] == len(turns):
            turns.append([])
        turns[come[at]].append((at, flash(asking[at], seen[where], values[where], None, scale)))
        come[at] += 1
    for turn in turns:
        chosen = np.concatenate([np.arange(*at) for at, _ in turn])
        index = torch.from_numpy(chosen).to(out.device)
        part = torch.cat([each[0] for _, each in turn], dim=2), torch.cat([each[1] for _, each in turn], dim=2)
        own = out.index_select(2, index), lse.index_select(2, index)
        merge(own, part)
        out.index_copy_(2, index, own[0])
        lse.index_copy_(2, index, own[1])
    return _by_head((out, lse), group)


def _by_head(part: Partial, group: int) -> Partial:
    """Query heads from the rows of their key/value head."""
    out, lse = (each.unflatten(2, (-1, group)).transpose(2, 3).flatten(1, 2) for each in part)
    return out, lse


def _apart(ranges: Sequence[Range]) -> bool:
    return all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


def _pieces(tensor: torch.Tensor, ranges: Sequence[Range]) -> dict[Range, torch.Tensor]:
    """Views of ranges along dim 2; one op makes them all where no two overlap."""
    distinct = sorted({*ranges})
    if not _apart(distinct):
        return {(start, end): tensor[:, :, start:end] for start, end in distinct}
    edges = [0, *itertools.chain.from_iterable(distinct), tensor.shape[2]]
    views = tensor.split_with_sizes([end - start for start, end in itertools.pairwise(edges)], dim=2)
    return dict(zip(distinct, views[1::2], strict=True))
