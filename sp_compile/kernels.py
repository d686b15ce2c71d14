"""Attention over tiles: empty tiles are skipped, full ones run unmasked, partial outputs merge by log-sum-exp.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from sp_compile.score_rule import Interval, assigns, evaluate, mask_ranges

EMPTY, FULL, PARTIAL, CAUSAL = 0, 1, 2, 3
MASKED_KEYS = 4096
DENSE_QUERIES = 256


def plan_tiles(
    operands: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
    q_bounds: torch.Tensor,
    k_bounds: torch.Tensor,
) -> torch.Tensor:
    """Kind of each tile: ``EMPTY``, ``FULL``, ``PARTIAL``, or ``CAUSAL`` for an exact lower triangle.

    Args:
        operands: the rule's operands, each broadcasting to ``[B, H, Q, K]``.
        rule: see :mod:`sp_compile.score_rule`.
        valid: bool ``[K]``, keys that exist (False on the padding of a rank); None when all do.
        q_bounds, k_bounds: int64 tile boundaries along queries and keys.

    Returns:
        int8 ``[query tiles, key tiles]`` on the CPU.
    """
    q_cuts, k_cuts = q_bounds.cpu().numpy(), k_bounds.cpu().numpy()
    shape = (len(q_cuts) - 1, len(k_cuts) - 1)
    low, high, whole = np.ones(shape), np.ones(shape), np.ones(shape[1], dtype=bool)
    if assigns(rule, "mask"):
        ranges = [_ranges(operand, q_cuts[:-1], k_cuts[:-1]) for operand in operands]
        low, high = (np.broadcast_to(each, shape) for each in mask_ranges(rule, ranges))
    if valid is not None:
        held = valid.cpu().numpy()
        whole = np.logical_and.reduceat(held, k_cuts[:-1])
        low, high = low * whole, high * np.logical_or.reduceat(held, k_cuts[:-1])
    kinds = np.where(high == 0, EMPTY, np.where(low == 1, FULL, PARTIAL)).astype(np.int8)
    if assigns(rule, "mask"):
        _mark_triangles(kinds, whole, operands, rule, q_cuts, k_cuts)
    return torch.from_numpy(kinds)


def _ranges(operand: torch.Tensor, q_starts: np.ndarray, k_starts: np.ndarray) -> Interval:
    values = operand.detach().cpu()
    array = values.reshape((1,) * (4 - values.dim()) + tuple(values.shape)).to(torch.float64).numpy()
    low, high = array.min(axis=(0, 1)), array.max(axis=(0, 1))
    for axis, starts in enumerate((q_starts, k_starts)):
        if low.shape[axis] != 1:
            low = np.minimum.reduceat(low, starts, axis=axis)
            high = np.maximum.reduceat(high, starts, axis=axis)
    return low, high


def _mark_triangles(
    kinds: np.ndarray,
    whole: np.ndarray,
    operands: Sequence[torch.Tensor],
    rule: str,
    q_cuts: np.ndarray,
    k_cuts: np.ndarray,
) -> None:
    """Find exact lower triangles among the partial tiles whose keys all exist."""
    rows, columns = np.nonzero((kinds == PARTIAL) & whole)
    square = np.diff(q_cuts)[rows] == np.diff(k_cuts)[columns]
    for i, j in zip(rows[square].tolist(), columns[square].tolist(), strict=True):
        tile = Tile(int(q_cuts[i]), int(q_cuts[i + 1]), int(k_cuts[j]), int(k_cuts[j + 1]), PARTIAL)
        mask = evaluate(rule, tile.cut(operands), ("mask",))["mask"]
        size = tile.q_end - tile.q_start
        triangle = torch.ones(size, size, dtype=torch.bool, device=mask.device).tril()
        if mask.shape[-2:] == (size, size) and bool((mask == triangle).all()):
            kinds[i, j] = CAUSAL


@dataclass(frozen=True)
class Tile:
    """Queries ``[q_start, q_end)`` against keys ``[k_start, k_end)``."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    kind: int

    def cut(self, operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The operands' part of this tile."""
        return [_narrow(_narrow(each, -2, self.q_start, self.q_end), -1, self.k_start, self.k_end) for each in operands]


def _narrow(tensor: torch.Tensor, dim: int, start: int, end: int) -> torch.Tensor:
    if tensor.dim() < -dim or tensor.shape[dim] == 1:
        return tensor
    return tensor.narrow(dim, start, end - start)


def merged_tiles(kinds: torch.Tensor, q_bounds: torch.Tensor, k_bounds: torch.Tensor) -> tuple[Tile, ...]:
    """Few large tiles that cover the same elements: causal squares, runs of full tiles, runs of partial ones."""
    cuts = (tuple(q_bounds.tolist()), tuple(k_bounds.tolist()))
    return _merged(kinds.numpy().tobytes(), *cuts)


@lru_cache(maxsize=256)
def _merged(kind_bytes: bytes, q_cuts: tuple[int, ...], k_cuts: tuple[int, ...]) -> tuple[Tile, ...]:
    kinds = np.frombuffer(kind_bytes, dtype=np.int8).reshape(len(q_cuts) - 1, len(k_cuts) - 1).copy()
    tiles = [Tile(q_cuts[i], q_cuts[i_end], k_cuts[j], k_cuts[j_end], CAUSAL)
             for i, i_end, j, j_end in _causal_squares(kinds, q_cuts, k_cuts)]  # fmt: skip
    open_runs: dict[tuple[int, int], int] = {}
    for i in range(len(q_cuts)):
        runs = set(_runs(kinds[i] == FULL)) if i < len(kinds) else set()
        for j, j_end in [run for run in open_runs if run not in runs]:
            tiles.append(Tile(q_cuts[open_runs.pop((j, j_end))], q_cuts[i], k_cuts[j], k_cuts[j_end], FULL))
        for run in runs:
            open_runs.setdefault(run, i)
        if i < len(kinds):
            tiles += _partial_tiles(kinds[i] >= PARTIAL, q_cuts[i], q_cuts[i + 1], k_cuts)
    return tuple(tiles)


def _partial_tiles(partial: np.ndarray, q_start: int, q_end: int, k_cuts: tuple[int, ...]) -> list[Tile]:
    tiles = []
    for j, j_end in _runs(partial):
        first = j
        for last in range(j + 1, j_end + 1):
            if last == j_end or k_cuts[last + 1] - k_cuts[first] > MASKED_KEYS:
                tiles.append(Tile(q_start, q_end, k_cuts[first], k_cuts[last], PARTIAL))
                first = last
    return tiles


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _causal_squares(
    kinds: np.ndarray, q_cuts: tuple[int, ...], k_cuts: tuple[int, ...]
) -> list[tuple[int, int, int, int]]:
    squares = []
    for i, j in zip(*(each.tolist() for each in np.nonzero(kinds == CAUSAL)), strict=True):
        if kinds[i, j] != CAUSAL:
            continue
        size = 1
        while (
            i + size < kinds.shape[0]
            and j + size < kinds.shape[1]
            and kinds[i + size, j + size] == CAUSAL
            and (kinds[i + size, j : j + size] == FULL).all()
            and (kinds[i : i + size, j + size] == EMPTY).all()
        ):
            size += 1
        kinds[i : i + size, j : j + size] = EMPTY
        squares.append((i, i + size, j, j + size))
    return squares


Partial = tuple[torch.Tensor, torch.Tensor]


def attend(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKE: torch.Tensor,
    operands: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    tiles: Sequence[Tile],
    valid: torch.Tensor | None,
    empty_mean: bool,
) -> Partial:
    """Attention of all queries over the keys that the rule lets them see.

    Args:
        tiles: what to compute, from :func:`merged_tiles`; everything else is empty.
        empty_mean: a row that sees nothing gets the mean of all values (a softmax over equal scores) instead of 0.

    Returns:
        The output ``[B, H, Q, E]`` in q's dtype and the log-sum-exp ``[B, H, Q]`` in fp32 (fp64 for fp64), -inf for a
        row that sees nothing.
    """
    changed = assigns(rule, "score")
    kernel = _flash_cpu if not changed and _flash_cpu_takes(q_BHQD) else _dense
    batch, heads, queries, _ = q_BHQD.shape
    wide = torch.float64 if q_BHQD.dtype == torch.float64 else torch.float32
    out = q_BHQD.new_zeros(batch, queries, heads, v_BGKE.shape[-1], dtype=wide).transpose(1, 2)
    lse = q_BHQD.new_full((batch, heads, queries), -torch.inf, dtype=wide)
    written = np.zeros(queries, dtype=bool)
    for tile in _sized(tiles) if kernel is _dense or assigns(rule, "bias") else tiles:
        mask, bias = _tile_mask(tile, operands, rule, valid)
        rows, keys = slice(tile.q_start, tile.q_end), slice(tile.k_start, tile.k_end)
        change = _score_change(tile, operands, rule) if changed else None
        part = kernel(q_BHQD[:, :, rows], k_BGKD[:, :, keys], v_BGKE[:, :, keys], mask, bias, scale, tile.kind, change)
        _merge((out[:, :, rows], lse[:, :, rows]), part, bool(written[rows].any()))
        written[rows] = True
    if empty_mean:
        _fill_empty(out, lse, v_BGKE, valid)
    return out.to(q_BHQD.dtype), lse


def _sized(tiles: Sequence[Tile]) -> list[Tile]:
    """Cut tiles whose scores or biases are held; a causal tile is masked there like any other."""
    return [
        Tile(start, min(start + DENSE_QUERIES, tile.q_end), tile.k_start, tile.k_end,
             PARTIAL if tile.kind == CAUSAL else tile.kind)
        for tile in tiles
        for start in range(tile.q_start, tile.q_end, DENSE_QUERIES)
    ]  # fmt: skip


def _tile_mask(
    tile: Tile, operands: Sequence[torch.Tensor], rule: str, valid: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if tile.kind != PARTIAL and not assigns(rule, "bias"):
        return None, None
    values = evaluate(rule, tile.cut(operands), ("mask", "bias"))
    bias, mask = values.get("bias"), None
    if tile.kind == PARTIAL:
        mask = values.get("mask")
        if valid is not None:
            held = valid[tile.k_start : tile.k_end]
            mask = held if mask is None else mask & held
    elif tile.kind == CAUSAL:
        size = tile.q_end - tile.q_start
        mask = torch.ones(size, size, dtype=torch.bool, device=bias.device if bias is not None else None).tril()
    return mask, bias


def _score_change(tile: Tile, operands: Sequence[torch.Tensor], rule: str) -> Callable[[torch.Tensor], torch.Tensor]:
    cut = tile.cut(operands)
    return lambda score: evaluate(rule, cut, ("score",), score)["score"]


def _merge(into: Partial, part: Partial, seen: bool) -> None:
    """Join two partial softmaxes over disjoint keys (online softmax, as in ring attention)."""
    (out, lse), (part_out, part_lse) = into, part
    if not seen:
        out.copy_(part_out)
        lse.copy_(part_lse)
        return
    joint = torch.logaddexp(lse, part_lse)
    weight = torch.exp(part_lse - joint).nan_to_num_(0.0).unsqueeze(-1)
    out.lerp_(part_out.to(out.dtype), weight.to(out.dtype))
    lse.copy_(joint)


def _fill_empty(out: torch.Tensor, lse: torch.Tensor, v_BGKE: torch.Tensor, valid: torch.Tensor | None) -> None:
    held = v_BGKE if valid is None else v_BGKE[:, :, valid]
    mean = held.to(out.dtype).mean(dim=2, keepdim=True)
    mean = mean.repeat_interleave(out.shape[1] // mean.shape[1], dim=1)
    out.copy_(torch.where((lse == -torch.inf).unsqueeze(-1), mean, out))


def _flash_cpu_takes(q: torch.Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _flash_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    kind: int,
    change: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Partial:
    assert change is None
    added = None
    if mask is not None or bias is not None:
        added = torch.zeros((), dtype=q.dtype) if bias is None else bias.to(q.dtype)
        if mask is not None:
            added = torch.where(mask, added, torch.tensor(-torch.inf, dtype=q.dtype))
        shape = torch.broadcast_shapes(added.shape, (1, 1, q.shape[2], k.shape[2]))
        added = added.expand(shape).contiguous()
    width = v.shape[-1]
    largest = max(q.shape[-1], width)
    q, k, v = (F.pad(each, (0, largest - each.shape[-1])) if each.shape[-1] < largest else each for each in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, kind == CAUSAL and added is None, attn_mask=added, scale=scale
    )
    if added is not None:
        blind = (added == -torch.inf).all(dim=-1).expand(lse.shape)
        lse = lse.masked_fill(blind, -torch.inf)
        out = out.masked_fill(blind.unsqueeze(-1), 0.0)
    return out[..., :width], lse


def _dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    kind: int,
    change: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Partial:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(group, dim=1) if group > 1 else each for each in (k, v))
    score = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if change is not None:
        score = change(score)
    if bias is not None:
        score = score + bias
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(score, dim=-1)
    weights = torch.exp(score - lse.unsqueeze(-1)).nan_to_num_(0.0)
    return weights @ v.to(wide), lse
