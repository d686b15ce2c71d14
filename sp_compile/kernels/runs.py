"""Plans of attention over a cache, where it is known beforehand which queries and keys can meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sp_compile.kernels.plan import between, plan_regions, with_valid
from sp_compile.kernels.regions import BLOCK, UNBOUNDED, Region
from sp_compile.score_rule import evaluate

FEW_QUERIES = 8
PAIRS = 1 << 20  # of a query and a key that are looked at together


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
    wanted = [run for run in runs if run[0] < run[1] and run[2] < run[3]]
    few = [run for run in wanted if run[1] - run[0] <= FEW_QUERIES]
    for q_start, q_end, k_start, k_end in (run for run in wanted if run[1] - run[0] > FEW_QUERIES):
        own = between(operands, (q_start, q_end), (k_start, k_end))
        held = None if valid is None else valid[k_start:k_end]
        for each in plan_regions(own, tables, rule, held, q_end - q_start, k_end - k_start, boxes):
            rows = replace(each, q_start=each.q_start + q_start, q_end=each.q_end + q_start)
            found.append(replace(rows, k_start=each.k_start + k_start, k_end=each.k_end + k_start))
    if few:
        at = np.asarray(few, dtype=np.int64)
        found += _of_few(at, seen_within(at, operands, tables, rule, valid))
    return found


@dataclass(frozen=True)
class Seen:
    """What queries see of keys in runs: int64 arrays, an entry for each run, query and block of keys, in this order.

    Blocks are those of :data:`~sp_compile.kernels.regions.BLOCK` keys, of which a run has some or all.

    Attributes:
        run: number of the run.
        query: number of the query.
        block: number of the block.
        keys: of the block in the run.
        by_any: keys that a row and a head of the batch sees.
        by_all: keys that all of them see.
        first, last: numbers of the first and the last key of ``by_any``, where there is one.
    """

    run: np.ndarray
    query: np.ndarray
    block: np.ndarray
    keys: np.ndarray
    by_any: np.ndarray
    by_all: np.ndarray
    first: np.ndarray
    last: np.ndarray


def seen_within(
    runs: np.ndarray,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
) -> Seen:
    """Look at all pairs of a query and a key in runs, where the operands are.

    Args:
        runs: int64 ``[runs, 4]``, as of :func:`plan_within`, none of them empty.
        operands, tables, rule, valid: as of :func:`~sp_compile.kernels.plan.plan_regions`.
    """
    q_start, q_end, k_start, k_end = runs.T
    low, high = k_start // BLOCK, -(-k_end // BLOCK)
    wide = high - low
    run, within = numbered((q_end - q_start) * wide)
    query, block = q_start[run] + within // wide[run], low[run] + within % wide[run]
    starts = np.maximum(block * BLOCK, k_start[run])
    ends = np.minimum((block + 1) * BLOCK, k_end[run])
    found = [np.zeros((4, 0), dtype=np.int64)]
    at_once = max(1, PAIRS // BLOCK // max((each.shape[:-2].numel() for each in operands), default=1))
    for i in range(0, len(run), at_once):
        part = slice(i, i + at_once)
        found.append(_looked_at(query[part], block[part], starts[part], ends[part], operands, tables, rule, valid))
    by_any, by_all, first, last = np.concatenate(found, axis=1)
    return Seen(run, query, block, ends - starts, by_any, by_all, block * BLOCK + first, block * BLOCK + last)


def _looked_at(
    query: np.ndarray,
    block: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
) -> np.ndarray:
    """Of keys from ``starts`` to ``ends`` of a block: how many any and all see, and in the block the first and last."""
    device = next((each.device for each in (*operands, valid) if each is not None), torch.device("cpu"))
    queries, blocks, low, high = torch.from_numpy(np.stack([query, block, starts, ends])).to(device)
    keys = blocks[:, None] * BLOCK + torch.arange(BLOCK, device=device)
    inside = (keys >= low[:, None]) & (keys < high[:, None])
    keys = torch.minimum(keys, high[:, None] - 1)
    rule, operands = with_valid(rule, operands, valid)
    pairs = [_of_pairs(each, queries[:, None], keys) for each in operands]
    seen = evaluate(rule, pairs, ("mask",), tables=tables).get("mask", inside)
    seen = seen.to(torch.bool).expand(*seen.shape[:-2], *inside.shape).reshape(-1, *inside.shape)
    some, every = seen.any(dim=0) & inside, seen.all(dim=0) & inside
    first = some.to(torch.uint8).argmax(dim=1)
    last = BLOCK - 1 - some.flip(1).to(torch.uint8).argmax(dim=1)
    return torch.stack([some.sum(dim=1), every.sum(dim=1), first, last]).cpu().numpy()


def numbered(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For so many entries of each, whose they are and which."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)


def _of_few(runs: np.ndarray, seen: Seen) -> Iterator[Region]:
    """Each run as one region, full or masked, or none where nothing is seen."""
    starts = np.searchsorted(seen.run, np.arange(len(runs)))
    keys, by_all = (np.add.reduceat(each, starts) for each in (seen.keys, seen.by_all))
    first = np.minimum.reduceat(np.where(seen.by_any, seen.first, UNBOUNDED), starts)
    last = np.maximum.reduceat(np.where(seen.by_any, seen.last, -1), starts)
    for run, pairs, whole, low, high in zip(runs.tolist(), keys, by_all, first.tolist(), last.tolist(), strict=True):
        if high < 0:
            continue
        # what one query sees side by side is a region of its own
        if whole == high - low + 1 and run[1] - run[0] == 1:
            yield _region((*run[:2], low, high + 1))
        else:
            yield _region(run, masked=whole < pairs)


def _region(run: Sequence[int], masked: bool = False) -> Region:
    q_start, q_end, k_start, k_end = run
    return Region(-1, q_start, q_end, k_start, k_end, masked=bool(masked))


def _of_pairs(operand: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """An operand at queries ``[n, 1]`` and keys ``[n, m]``, ``[..., n or 1, m or 1]``."""
    if operand.dim() == 0:
        return operand
    whole = operand.expand(1, -1) if operand.dim() == 1 else operand
    of_queries, of_keys = (size > 1 for size in whole.shape[-2:])
    if of_queries and of_keys:
        return whole[..., queries, keys]
    if of_keys:
        return whole[..., 0, :][..., keys]
    return whole[..., 0][..., queries] if of_queries else whole


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
    which, nth = numbered(counts)
    found = np.concatenate([queries[which], runs[low[which] + nth, 1:]], axis=1)
    return np.concatenate([found, np.zeros((max(0, 2 - len(found)), 4), dtype=np.int64)])
