"""Plans of attention over a cache, where it is known beforehand which queries and keys can meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from sp_compile.kernels.plan import between, plan_regions
from sp_compile.kernels.regions import Region
from sp_compile.score_rule import assigns, evaluate

FEW_QUERIES = 8
AT_ONCE = 1 << 20  # pairs of a query and a key that are looked at together


def plan_within(
    runs: Sequence[Sequence[int]],
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
    boxes: bool = True,
) -> list[Region]:
    """As :func:`plan_regions`, where queries and keys are known to meet in few places.

    Args:
        runs: ``q_start, q_end, k_start, k_end`` of each; no query sees a key elsewhere.

    Where queries are few, all their pairs are looked at in one go, which costs less than to plan.
    """
    found: list[Region] = []
    few: list[Sequence[int]] = []
    for run in runs:
        q_start, q_end, k_start, k_end = run
        if q_start == q_end or k_start == k_end:
            continue
        if q_end - q_start <= FEW_QUERIES:
            few.append(run)
            continue
        own = between(operands, (q_start, q_end), (k_start, k_end))
        held = None if valid is None else valid[k_start:k_end]
        for each in plan_regions(own, tables, rule, held, q_end - q_start, k_end - k_start, boxes):
            rows = replace(each, q_start=each.q_start + q_start, q_end=each.q_end + q_start)
            found.append(replace(rows, k_start=each.k_start + k_start, k_end=each.k_end + k_start))
    for part in _batches(few):
        found += _of_few(part, operands, tables, rule, valid)
    return found


def _batches(runs: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    pairs = 0
    for run in runs:
        area = (run[1] - run[0]) * (run[3] - run[2])
        if batch and pairs + area > AT_ONCE:
            yield batch
            batch, pairs = [], 0
        batch.append(run)
        pairs += area
    if batch:
        yield batch


def _of_few(
    runs: Sequence[Sequence[int]],
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
) -> Iterator[Region]:
    """Each run as one region, full or masked, or none where nothing is seen."""
    if not assigns(rule, "mask"):
        yield from (_region(run) for run in runs)
        return
    q_start, q_end, k_start, k_end = np.asarray(runs, dtype=np.int64).T
    keys = k_end - k_start
    sizes = (q_end - q_start) * keys
    ends = np.cumsum(sizes)
    of = np.repeat(np.arange(len(runs)), sizes)
    within = np.arange(int(ends[-1])) - (ends - sizes)[of]
    device = operands[0].device
    query = torch.from_numpy(q_start[of] + within // keys[of]).to(device)
    key = torch.from_numpy(k_start[of] + within % keys[of]).to(device)
    pairs = [_of_pairs(each, query, key) for each in operands]
    seen = evaluate(rule, pairs, ("mask",), tables=tables)["mask"]
    if valid is not None:
        seen = seen & valid[key]
    rows = seen.expand(*seen.shape[:-1], len(within)).reshape(-1, len(within)).cpu().numpy()
    starts = ends - sizes
    by_all, by_any = rows.all(axis=0), rows.any(axis=0)
    counts = np.add.reduceat(by_all.astype(np.int64), starts)
    first = np.minimum.reduceat(np.where(by_any, within, sizes.max()), starts)
    last = np.maximum.reduceat(np.where(by_any, within, -1), starts)
    for i, run in enumerate(runs):
        if last[i] < 0:
            continue
        # what one query sees side by side is a region of its own
        side_by_side = counts[i] == last[i] - first[i] + 1
        if side_by_side and run[1] - run[0] == 1:
            yield _region((*run[:2], run[2] + int(first[i]), run[2] + int(last[i]) + 1))
        else:
            yield _region(run, masked=counts[i] < sizes[i])


def _region(run: Sequence[int], masked: bool = False) -> Region:
    q_start, q_end, k_start, k_end = run
    return Region(-1, q_start, q_end, k_start, k_end, masked=bool(masked))


def _of_pairs(operand: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """An operand at pairs of query and key, ``[..., 1, pairs]``."""
    if operand.dim() < 2:
        return operand if operand.dim() == 0 or operand.shape[0] == 1 else operand[key]
    queries, keys = operand.shape[-2:]
    rows = query if queries > 1 else torch.zeros_like(query)
    columns = key if keys > 1 else torch.zeros_like(key)
    return operand[..., rows, columns].unsqueeze(-2)


def crossed(valid: np.ndarray, request: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Ranges of gathered queries by ranges of held keys of the same request, for :func:`plan_within`.

    Args:
        valid: bool ``[sp, shard_length]``, rows that are queries.
        request: int64, the same shape, of which request each is.
        runs: int64 ``[runs, 3]``, request, start and end of held keys, ordered by request.

    Returns:
        int64 ``[ranges, 4]``, at least two.
    """
    at = np.flatnonzero(valid.reshape(-1))
    of = request.reshape(-1)[at]
    edges = np.flatnonzero((np.diff(at) != 1) | (np.diff(of) != 0)) + 1
    ends = np.append(edges, len(at)) if len(at) else edges
    first, last = np.append(0, ends)[:-1], ends - 1
    queries = np.stack([at[first], at[last] + 1], axis=1)
    low, high = (np.searchsorted(runs[:, 0], of[first], side) for side in ("left", "right"))
    counts = high - low
    which = np.repeat(np.arange(len(queries)), counts)
    keys = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
    found = np.concatenate([queries[which], runs[keys, 1:]], axis=1)
    return np.concatenate([found, np.zeros((max(0, 2 - len(found)), 4), dtype=np.int64)])
