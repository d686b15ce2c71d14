"""Attention on a GPU: the planned regions through torch's fused kernels, partial outputs merged by log-sum-exp.

A region that is a band is one call of a :mod:`fused kernel <sp_compile.kernels.fused>`; blocks of one whose elements
decide are matrix products. The kernel of a call is the one that was measured to be fastest on the device. Source of the
merging: ring attention, arXiv:2310.01889; of gradients from the whole softmax's log-sum-exp: arXiv:2205.14135.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sp_compile.kernels import fused
from sp_compile.kernels.backward import Gradients, Saved, attend_backward
from sp_compile.kernels.dense import Partial, dense_partial
from sp_compile.kernels.flash import merge
from sp_compile.kernels.fused import Window
from sp_compile.kernels.plan import rows_of
from sp_compile.kernels.rates import Shape, fastest
from sp_compile.kernels.regions import Region
from sp_compile.kernels.tiles import held_blocks


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
    """As :func:`sp_compile.kernels.tiles.attend`, for what :func:`sp_compile.kernels.fused.serves`."""
    batch, heads, queries, _ = q_BHQD.shape
    out = q_BHQD.new_zeros(batch, queries, heads, v_BGKE.shape[-1], dtype=torch.float32).transpose(1, 2)
    lse = q_BHQD.new_full((batch, heads, queries), -torch.inf, dtype=torch.float32)
    shape = Shape.of(q_BHQD, k_BGKD, v_BGKE, backward=False)
    for box, window in _windows(regions):
        rows, at, keys = _slices(box)
        q, k, v = q_BHQD[rows, :, at], k_BGKD[rows, :, keys], v_BGKE[rows, :, keys]
        name = fastest(shape, window, q.shape[2], k.shape[2], q.device)
        merge((out[rows, :, at], lse[rows, :, at]), fused.attend(name, q, k, v, scale, window))
    for region in regions:
        if region.masked:
            rows = region.rows
            own = [rows_of(each, rows) for each in operands]
            for at, keys, cut, mask, bias in held_blocks(region, own, tables, rule, valid):
                q, k, v = q_BHQD[rows, :, at], k_BGKD[rows, :, keys], v_BGKE[rows, :, keys]
                part = dense_partial(q, k, v, cut, tables, rule, scale, mask, bias)
                merge((out[rows, :, at], lse[rows, :, at]), part)
    return out, lse


def gradients(
    saved: Saved,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    regions: Sequence[Region],
    valid: torch.Tensor | None,
) -> Gradients:
    """Gradients of q, k and v in fp32; the log-sum-exp has none of its own."""
    assert saved.grad_lse is None
    masked = [each for each in regions if each.masked]
    (dq, dk, dv), _ = attend_backward(saved, operands, tables, rule, scale, masked, valid)
    blind = saved.lse == -torch.inf
    grad, lse = saved.grad.masked_fill(blind.unsqueeze(-1), 0.0), saved.lse.masked_fill(blind, torch.inf)
    shape = Shape.of(*saved[:3], backward=True)
    for box, window in _windows(regions):
        rows, at, keys = _slices(box)
        qkv = saved.q[rows, :, at], saved.k[rows, :, keys], saved.v[rows, :, keys]
        name = fastest(shape, window, qkv[0].shape[2], qkv[1].shape[2], saved.q.device)
        of_rows = saved.out[rows, :, at], lse[rows, :, at], grad[rows, :, at]
        found = fused.attend_backward(name, qkv, *of_rows, scale, window)
        for whole, span, each in zip((dq, dk, dv), (at, keys, keys), found, strict=True):
            whole[rows, :, span] += each
    return dq, dk, dv


def _windows(regions: Sequence[Region]) -> Iterator[tuple[Region, Window]]:
    """Regions that are bands, as calls of a fused kernel."""
    for region in regions:
        found = None if region.masked else fused.windowed(region)
        if found is not None:
            yield found


def _slices(box: Region) -> tuple[slice, slice, slice]:
    """Rows of the batch, queries and keys."""
    return box.rows, slice(box.q_start, box.q_end), slice(box.k_start, box.k_end)
