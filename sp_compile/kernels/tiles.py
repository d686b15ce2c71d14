"""Attention on a CPU: the planned regions through torch's flash kernel, partial outputs merged by log-sum-exp.

Regions that are bands run as the strips of :mod:`sp_compile.kernels.strips`. Where the rule changes scores, adds a
bias or drops weights, or the mask is no band, blocks of bounded size are computed with what the rule gives for them.
Other devices than a CPU have no such kernel here; there all blocks are matrix products.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from sp_compile.kernels.dense import Partial, accumulated, dense_partial
from sp_compile.kernels.few import attend_few, of_few_queries
from sp_compile.kernels.flash import flash, merge
from sp_compile.kernels.plan import between, rows_of
from sp_compile.kernels.regions import UNBOUNDED, Region, batch_rows
from sp_compile.kernels.strips import STRIP, TRIANGLE, Strip, strips
from sp_compile.lasting import lasting
from sp_compile.score_rule import assigns, evaluate

HELD_QUERIES, HELD_KEYS = 256, 4096  # of scores or biases that are held at once


def attend(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKE: torch.Tensor,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    regions: Sequence[Region],
    valid: torch.Tensor | None,
) -> Partial:
    """Attention of all queries over the keys that the rule lets them see.

    Args:
        regions: what to compute, from :func:`sp_compile.kernels.plan.plan_regions`; everything else is empty.

    Returns:
        The output ``[B, H, Q, E]`` and the log-sum-exp ``[B, H, Q]`` in fp32 (fp64 for fp64): 0 and -inf for a row that
        sees nothing.
    """
    batch, heads, queries, _ = q_BHQD.shape
    wide = accumulated(q_BHQD.dtype)
    out = q_BHQD.new_empty(batch, queries, heads, v_BGKE.shape[-1], dtype=wide).transpose(1, 2)
    lse = q_BHQD.new_empty(batch, heads, queries, dtype=wide)
    written = np.zeros((batch, queries), dtype=bool)
    products = by_products(rule, q_BHQD)
    holding = assigns(rule, "bias") or products
    few, others = ({}, regions) if holding else of_few_queries(regions)
    for region in others:
        rows = region.rows
        parts = q_BHQD[rows], k_BGKD[rows], v_BGKE[rows]
        call = _Call(*parts, [rows_of(each, rows) for each in operands], tables, rule, scale, valid, products)
        for at, part in call.held(region) if region.masked or holding else call.banded(region):
            span = rows, slice(*at)
            seen = written[span]
            if seen.any() and not seen.all():
                _clear(out, lse, ~written & _within(written.shape, span))
            into = out[rows, :, at[0] : at[1]], lse[rows, :, at[0] : at[1]]
            if seen.any():
                merge(into, part)
            else:
                into[0].copy_(part[0])
                into[1].copy_(part[1])
            written[span] = True
    if [*few] == [-1] and not others:
        return attend_few(q_BHQD, k_BGKD, v_BGKE, scale, few[-1])
    _clear(out, lse, ~written)
    for row, chosen in few.items():
        rows = batch_rows(row)
        merge((out[rows], lse[rows]), attend_few(q_BHQD[rows], k_BGKD[rows], v_BGKE[rows], scale, chosen))
    return out, lse


def by_products(rule: str, q: torch.Tensor) -> bool:
    """Whether torch's kernel cannot serve."""
    return assigns(rule, "score") or assigns(rule, "keep") or q.device.type != "cpu"


def _within(shape: tuple[int, ...], span: tuple[slice, slice]) -> np.ndarray:
    inside = np.zeros(shape, dtype=bool)
    inside[span] = True
    return inside


def _clear(out: torch.Tensor, lse: torch.Tensor, rows: np.ndarray) -> None:
    """Rows ``[batch, queries]`` as if they saw nothing."""
    for row in np.flatnonzero(rows.any(axis=1)).tolist():
        blind = torch.from_numpy(rows[row]).to(out.device)
        out[row, :, blind], lse[row, :, blind] = 0.0, -torch.inf


Placed = tuple[tuple[int, int], Partial]  # the queries, and what was computed for them


@dataclass(frozen=True)
class _Call:
    """The arguments of one attention, for some rows of the batch."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    operands: Sequence[torch.Tensor]
    tables: Sequence[torch.Tensor]
    rule: str
    scale: float
    valid: torch.Tensor | None
    by_products: bool

    def banded(self, region: Region) -> Iterator[Placed]:
        """A region without biases whose mask is a band."""
        if region.full:
            rows, keys = slice(region.q_start, region.q_end), slice(region.k_start, region.k_end)
            yield (
                (rows.start, rows.stop),
                flash(self.q[:, :, rows], self.k[:, :, keys], self.v[:, :, keys], None, self.scale),
            )
            return
        merging = self.q.dtype in (torch.float32, torch.float64)
        for strip in strips(region, merging):
            if strip.repeats > 1:
                yield self._repeated(strip)
                continue
            mask = None
            rows, keys = slice(strip.q_start, strip.q_end), slice(strip.k_start, strip.k_end)
            if strip.band is not None:
                mask = band_mask(rows.stop - rows.start, keys.stop - keys.start, *strip.band, self.q.dtype)
            q, k, v = self.q[:, :, rows], self.k[:, :, keys], self.v[:, :, keys]
            yield (rows.start, rows.stop), flash(q, k, v, mask, self.scale)

    def _repeated(self, strip: Strip) -> Placed:
        """Strips along the diagonal as a batch of overlapping views."""
        rows, keys = strip.q_end - strip.q_start, strip.k_end - strip.k_start
        assert strip.band is not None
        mask = band_mask(rows, keys, *strip.band, self.q.dtype)
        parts = []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            queries = _windows(q[:, strip.q_start :], rows, rows, strip.repeats)
            seen_k, seen_v = (_windows(each[:, strip.k_start :], keys, rows, strip.repeats) for each in (k, v))
            out, lse = flash(queries, seen_k, seen_v, mask, self.scale)
            parts.append((out.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)))
        out, lse = (each[0][None] if len(each) == 1 else torch.stack(each) for each in zip(*parts, strict=True))
        end = strip.q_start + rows * strip.repeats
        return (strip.q_start, end), (out, lse)

    def held(self, region: Region) -> Iterator[Placed]:
        """A region whose mask, bias or changed scores are held, a block at a time."""
        for rows, keys, cut, mask, bias in held_blocks(region, self.operands, self.tables, self.rule, self.valid):
            q, k, v = self.q[:, :, rows], self.k[:, :, keys], self.v[:, :, keys]
            at = rows.start, rows.stop
            if self.by_products:
                yield at, dense_partial(q, k, v, cut, self.tables, self.rule, self.scale, mask, bias)
            else:
                added = added_to_scores(mask, bias, q, k)
                yield at, _without_blind_rows(flash(q, k, v, added, self.scale), added)


def _windows(part: torch.Tensor, size: int, step: int, count: int) -> torch.Tensor:
    """``[count, heads, size, dim]`` views of ``[heads, rows, dim]``, each ``step`` rows after the last."""
    heads, rows, dim = part.stride()
    return part.as_strided((count, part.shape[0], size, part.shape[2]), (step * rows, heads, rows, dim))


Block = tuple[slice, slice, list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]


def held_blocks(
    region: Region,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
) -> Iterator[Block]:
    """Blocks of bounded size of a region: queries, keys, the operands between them, mask and bias, None for none."""
    for block in _blocks(region):
        rows, keys = slice(block.q_start, block.q_end), slice(block.k_start, block.k_end)
        cut = between(operands, (rows.start, rows.stop), (keys.start, keys.stop))
        values = evaluate(rule, cut, ("mask", "bias"), tables=tables)
        mask, bias = None if region.full else values.get("mask"), values.get("bias")
        if valid is not None and not region.full:
            mask = valid[keys] if mask is None else mask & valid[keys]
        yield rows, keys, cut, mask, bias


def _blocks(region: Region) -> Iterator[Region]:
    """Blocks of bounded size that cover the visible elements of a region."""
    for start in range(region.q_start, region.q_end, HELD_QUERIES):
        end = min(start + HELD_QUERIES, region.q_end)
        k_start, k_end = region.k_start, region.k_end
        if not region.masked:
            k_start = max(k_start, region.k_start + start - region.q_start + region.low)
            k_end = min(k_end, region.k_start + end - region.q_start + region.high)
        for at in range(k_start, k_end, HELD_KEYS):
            yield replace(region, q_start=start, q_end=end, k_start=at, k_end=min(at + HELD_KEYS, k_end))


@lru_cache(maxsize=64)
@lasting
def _band_mask(rows: int, keys: int, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
    distance = torch.arange(keys)[None, :] - torch.arange(rows)[:, None]
    seen = (distance >= low) & (distance <= high)
    return torch.zeros(rows, keys, dtype=dtype).masked_fill_(~seen, -torch.inf)[None, None]


def band_mask(rows: int, keys: int, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask ``[1, 1, rows, keys]`` of ``low <= j - i <= high``: 0 inside, -inf outside.

    Strips of a lower triangle behind any number of keys are the corner of one mask, and so are those of an upper one
    before them. Masks have sizes that are powers of two, so that few are kept.
    """
    if rows > STRIP or (low == -UNBOUNDED) == (high == UNBOUNDED):
        return _band_mask(rows, keys, low, high, dtype)
    whole = max(TRIANGLE, 1 << (keys - 1).bit_length())
    if low == -UNBOUNDED:
        missing = STRIP - rows, whole - keys
        return _band_mask(STRIP, whole, low, high + missing[1] - missing[0], dtype)[..., missing[0] :, missing[1] :]
    return _band_mask(STRIP, whole, low, high, dtype)[..., :rows, :keys]


def added_to_scores(
    mask: torch.Tensor | None, bias: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor
) -> torch.Tensor | None:
    """What is added to the scores, ``[B or 1, H or 1, Q, K]`` in q's dtype."""
    if mask is None and bias is None:
        return None
    added = torch.zeros((), dtype=q.dtype) if bias is None else bias.to(q.dtype)
    if mask is not None:
        added = torch.where(mask, added, torch.tensor(-torch.inf, dtype=q.dtype))
    shape = torch.broadcast_shapes(added.shape, (1, 1, q.shape[2], k.shape[2]))
    return added.expand(shape).contiguous()


def _without_blind_rows(part: Partial, added: torch.Tensor | None) -> Partial:
    """The kernel gives rows that see nothing a log-sum-exp of 0."""
    if added is None:
        return part
    out, lse = part
    blind = (added == -torch.inf).all(dim=-1)
    return out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf)
