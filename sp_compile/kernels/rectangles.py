"""Attention on a GPU: the planned regions through torch's fused kernels, partial outputs merged by log-sum-exp.

Regions that are bands are :mod:`calls <sp_compile.kernels.calls>` of :mod:`fused kernels <sp_compile.kernels.fused>`;
blocks of regions whose elements decide are matrix products. The kernel of a call is the one that was measured to be
fastest on the device. Source of the merging: ring attention, arXiv:2310.01889; of gradients from the whole softmax's
log-sum-exp: arXiv:2205.14135.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D head dim, E value head dim; T queries and S
keys of a call, rows of all rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sp_compile.kernels import fused
from sp_compile.kernels.backward import Gradients, Saved, attend_backward
from sp_compile.kernels.calls import Call, Calls, Run, calls_of
from sp_compile.kernels.dense import Partial, dense_partial
from sp_compile.kernels.flash import merge
from sp_compile.kernels.plan import rows_of
from sp_compile.kernels.rates import Shape, fastest, packs
from sp_compile.kernels.regions import batch_rows
from sp_compile.kernels.tiles import held_blocks


def attend(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKE: torch.Tensor,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    plan: torch.Tensor,
    valid: torch.Tensor | None,
) -> Partial:
    """As :func:`sp_compile.kernels.tiles.attend`, for what :func:`sp_compile.kernels.fused.serves`.

    Args:
        plan: regions, int64 ``[regions, 8]`` on the host.

    Returns:
        As there, but that the output of one call alone is in q's dtype.
    """
    batch, heads, queries, _ = q_BHQD.shape
    calls = calls_of(plan, batch, (queries, k_BGKD.shape[2]), q_BHQD.device)
    shape = Shape.of(q_BHQD, k_BGKD, v_BGKE, backward=False)
    runs = _runs(calls, shape, q_BHQD.device)
    if len(runs) == 1 and calls.complete and not calls.masked:
        return _of_batch(_attend(runs[0][0], q_BHQD, k_BGKD, v_BGKE, scale, shape), batch)
    out = q_BHQD.new_empty(batch * queries, heads, v_BGKE.shape[-1], dtype=torch.float32)
    lse = q_BHQD.new_empty(heads, batch * queries, dtype=torch.float32)
    if not calls.complete:
        out.zero_()
        lse.fill_(-torch.inf)
    for call, fresh in runs:
        part, rows = _attend(call, q_BHQD, k_BGKD, v_BGKE, scale, shape), call.queries
        if not fresh:
            part = _merged((rows.of(out), rows.of(lse, 1)), part)
        if fresh or rows.numbers is not None:
            rows.put(out, part[0])
            rows.put(lse, part[1], 1)
    found = _of_batch((out, lse), batch)
    for region in calls.masked:
        batch_of = region.rows
        own = [rows_of(each, batch_of) for each in operands]
        for at, keys, cut, mask, bias in held_blocks(region, own, tables, rule, valid):
            q, k, v = q_BHQD[batch_of, :, at], k_BGKD[batch_of, :, keys], v_BGKE[batch_of, :, keys]
            part = dense_partial(q, k, v, cut, tables, rule, scale, mask, bias)
            merge((found[0][batch_of, :, at], found[1][batch_of, :, at]), part)
    return found


def gradients(
    saved: Saved,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    plan: torch.Tensor,
    valid: torch.Tensor | None,
) -> Gradients:
    """Gradients of q, k and v, of one call alone in their dtype, else in fp32; the log-sum-exp has none of its own."""
    assert saved.grad_lse is None
    (batch, _, queries, _), keys = saved.q.shape, saved.k.shape[2]
    calls = calls_of(plan, batch, (queries, keys), saved.q.device)
    shape = Shape.of(*saved[:3], backward=True)
    runs = _runs(calls, shape, saved.q.device)
    blind = saved.lse == -torch.inf
    grad, lse = saved.grad.masked_fill(blind.unsqueeze(-1), 0.0), saved.lse.masked_fill(blind, torch.inf)
    seeing = saved._replace(grad=grad, lse=lse)
    if len(runs) == 1 and calls.complete and not calls.masked and runs[0][0].keys.range == slice(0, batch * keys):
        dq, dk, dv = (_unflat(each, batch) for each in _gradients(runs[0][0], seeing, scale, shape))
        return dq, dk, dv
    found = [each.new_zeros(batch * each.shape[2], each.shape[1], each.shape[3], dtype=torch.float32)
             for each in saved[:3]]  # fmt: skip
    for call, _ in runs:
        for whole, rows, part in zip(found, call.rows, _gradients(call, seeing, scale, shape), strict=True):
            rows.add(whole, part)
    dq, dk, dv = (_unflat(each, batch) for each in found)
    if calls.masked:
        others, _ = attend_backward(saved, operands, tables, rule, scale, calls.masked, valid)
        for whole, part in zip((dq, dk, dv), others, strict=True):
            whole += part
    return dq, dk, dv


def _runs(calls: Calls, shape: Shape, device: torch.device) -> list[tuple[Call, bool]]:
    """Calls that the device's kernels can run, and whether each is the first of its queries."""
    packed = any(len(each.rectangles) > 1 for each in calls.calls) and packs(shape, device)
    pairs = zip(calls.calls, calls.fresh, strict=True)
    return [(each, fresh) for call, fresh in pairs for each in ([call] if packed else call.apart)]


def _attend(
    call: Call, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKE: torch.Tensor, scale: float, shape: Shape
) -> Partial:
    """Output ``[T, H, E]`` in q's dtype and log-sum-exp ``[H, T]``."""
    if len(call.rectangles) > 1:
        q, k, v = (rows.of(_flat(each)) for each, rows in zip((q_BHQD, k_BGKD, v_BGKE), call.rows, strict=True))
        return fused.attend_packed(q, k, v, call.packed, scale, call.window)
    (one,) = call.rectangles
    q, k, v = (_cut(each, one.row, runs) for each, runs in zip((q_BHQD, k_BGKD, v_BGKE), one.runs, strict=True))
    out, lse = fused.attend(fastest(shape, call.window, *one.sizes, q.device), q, k, v, scale, call.window)
    return _flat(out), _flat_lse(lse)


def _gradients(call: Call, saved: Saved, scale: float, shape: Shape) -> Gradients:
    """Gradients of a call's queries ``[T, H, D]``, keys ``[S, G, D]`` and values ``[S, G, E]``."""
    if len(call.rectangles) > 1:
        q, k, v = (rows.of(_flat(each)) for each, rows in zip(saved[:3], call.rows, strict=True))
        out, grad = (call.queries.of(_flat(each)) for each in (saved.out, saved.grad))
        lse = call.queries.of(_flat_lse(saved.lse), 1)
        return fused.attend_packed_backward((q, k, v), out, lse, grad, call.packed, scale, call.window)
    (one,) = call.rectangles
    q, k, v = (_cut(each, one.row, runs) for each, runs in zip(saved[:3], one.runs, strict=True))
    out, lse, grad = (_cut(each, one.row, [one.queries]) for each in (saved.out, saved.lse, saved.grad))
    name = fastest(shape, call.window, *one.sizes, q.device)
    dq, dk, dv = map(_flat, fused.attend_backward(name, (q, k, v), out, lse, grad, scale, call.window))
    return dq, dk, dv


def _merged(held: Partial, part: Partial) -> Partial:
    """Two partial softmaxes of ``[T, H, E]`` and ``[H, T]``."""
    (out, lse), (part_out, part_lse) = held, part
    merge((out.transpose(0, 1), lse), (part_out.transpose(0, 1), part_lse))
    return out, lse


def _cut(tensor: torch.Tensor, row: int, runs: Sequence[Run]) -> torch.Tensor:
    """Runs of dim 2 of a row of the batch, or of all, behind one another."""
    parts = [tensor[batch_rows(row), :, start:end] for start, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """``[B, heads, rows, dim]`` as ``[B * rows, heads, dim]``."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _flat_lse(lse: torch.Tensor) -> torch.Tensor:
    """``[B, heads, rows]`` as ``[heads, B * rows]``."""
    return lse.transpose(0, 1).flatten(1, 2)


def _unflat(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """The inverse of :func:`_flat`."""
    return tensor.view(batch, len(tensor) // batch, *tensor.shape[1:]).transpose(1, 2)


def _of_batch(part: Partial, batch: int) -> Partial:
    """Output and log-sum-exp of flat rows as ``[B, H, rows, E]`` and ``[B, H, rows]``."""
    out, lse = part
    return _unflat(out, batch), lse.view(len(lse), batch, lse.shape[1] // batch).transpose(0, 1)
