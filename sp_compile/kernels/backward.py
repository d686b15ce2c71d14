"""The gradient of attention over the planned regions, from the log-sum-exp of the forward.

With ``P = exp(S - lse)``, ``dP = dO V^T`` and ``D = rowsum(dO * O) - dlse``: ``dV = P^T dO`` and ``dS = P * (dP - D)``
(FlashAttention, arXiv:2205.14135, with the log-sum-exp's own gradient added). Where weights are dropped, those of ``P``
in ``dV`` and of ``dP`` are 0. Regions are disjoint, so their parts add up. What has neither changed scores, dropped
weights nor a gradient of its log-sum-exp goes through torch's kernel.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from sp_compile.kernels.plan import between, rows_of
from sp_compile.kernels.regions import Region
from sp_compile.kernels.strips import strips
from sp_compile.kernels.tiles import Block, added_to_scores, band_mask, by_products, held_blocks
from sp_compile.rule_derivatives import gradients as rule_gradients
from sp_compile.rule_derivatives import score_and_derivative
from sp_compile.score_rule import assigns, evaluate

_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Saved(NamedTuple):
    """What the forward had and gave, and the gradients of what it gave.

    Attributes:
        q, k, v, out: ``[B, H, Q, D]``, ``[B, G, K, D]``, ``[B, G, K, E]`` and ``[B, H, Q, E]``.
        lse: ``[B, H, Q]``, -inf for a row that saw nothing.
        grad: of the output.
        grad_lse: of the log-sum-exp; None for none.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    grad: torch.Tensor
    grad_lse: torch.Tensor | None


def attend_backward(
    saved: Saved,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    regions: Sequence[Region],
    valid: torch.Tensor | None,
    learned: Sequence[int] = (),
) -> tuple[Gradients, list[torch.Tensor]]:
    """Gradients of q, k and v, and of what is learned of the rule, in the dtype of the log-sum-exp.

    Args:
        learned: numbers of operands and, behind these, of tables.
    """
    blind = saved.lse == -torch.inf
    grad = saved.grad.masked_fill(blind.unsqueeze(-1), 0.0)
    grad_lse = None if saved.grad_lse is None else saved.grad_lse.masked_fill(blind, 0.0)
    saved = saved._replace(lse=saved.lse.masked_fill(blind, torch.inf), grad=grad, grad_lse=grad_lse)
    wide = saved.lse.dtype
    found = tuple(torch.zeros(each.shape, dtype=wide, device=each.device) for each in saved[:3])
    of_rule = [torch.zeros_like([*operands, *tables][i], dtype=wide) for i in learned]
    products = by_products(rule, saved.q) or grad_lse is not None or bool(learned)
    for region in regions:
        rows = region.rows
        own = [rows_of(each, rows) for each in operands]
        q, k, v, out, lse, row_grad = (each[rows] for each in saved[:6])
        part = Saved(q, k, v, out, lse, row_grad, None if grad_lse is None else grad_lse[rows])
        into = tuple(each[rows] for each in found)
        held = region.masked or assigns(rule, "bias") or products
        pieces = held_blocks(region, own, tables, rule, valid) if held else _banded(region, part.q.dtype)
        for queries, keys, elements, mask, bias in pieces:
            cut = _cut(part, queries, keys)
            if products:
                names = [f"x{i}" if i < len(own) else f"table{i - len(own)}" for i in learned]
                gradients, parts = _products(cut, elements, tables, rule, scale, mask, bias, names)
                for i, whole, each in zip(learned, of_rule, parts, strict=True):
                    spans = (queries.start, queries.stop), (keys.start, keys.stop)
                    into_rule = between([rows_of(whole, rows)], *spans)[0] if i < len(own) else whole
                    into_rule += each
            else:
                gradients = _flash(cut, added_to_scores(mask, bias, cut.q, cut.k), scale)
            for whole, span, each in zip(into, (queries, keys, keys), gradients, strict=True):
                whole[:, :, span] += each
    return (found[0], found[1], found[2]), of_rule


def _banded(region: Region, dtype: torch.dtype) -> Iterator[Block]:
    """A region whose mask is a band, which is added to the scores like a bias."""
    if region.full:
        yield slice(region.q_start, region.q_end), slice(region.k_start, region.k_end), [], None, None
        return
    for strip in strips(region, True):
        rows, keys = strip.q_end - strip.q_start, strip.k_end - strip.k_start
        mask = None if strip.band is None else band_mask(rows, keys, *strip.band, dtype)
        for i in range(strip.repeats):
            start, first = strip.q_start + i * rows, strip.k_start + i * rows
            yield slice(start, start + rows), slice(first, first + keys), [], None, mask


def _cut(part: Saved, queries: slice, keys: slice) -> Saved:
    return Saved(
        part.q[:, :, queries],
        part.k[:, :, keys],
        part.v[:, :, keys],
        part.out[:, :, queries],
        part.lse[:, :, queries],
        part.grad[:, :, queries],
        None if part.grad_lse is None else part.grad_lse[:, :, queries],
    )


def _flash(cut: Saved, added: torch.Tensor | None, scale: float) -> Gradients:
    """By torch's kernel, for which all head dims are alike."""
    q, k, v, out, lse, grad, _ = cut
    dtype, dims = q.dtype, (q.shape[-1], k.shape[-1], v.shape[-1])
    width = max(dims)
    q, k, v, out, grad = (
        F.pad(each.to(dtype), (0, width - each.shape[-1])) if each.shape[-1] < width else each.to(dtype).contiguous()
        for each in (q, k, v, out, grad)
    )
    found = _flash_backward(grad, q, k, v, out, lse.contiguous(), 0.0, False, attn_mask=added, scale=scale)
    dq, dk, dv = (each[..., :dim] for each, dim in zip(found, dims, strict=True))
    return dq, dk, dv


def _products(
    cut: Saved,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    learned: Sequence[str],
) -> tuple[Gradients, list[torch.Tensor]]:
    """By matrix products, in the dtype of the log-sum-exp; then gradients of the rule's ``learned`` values."""
    wide, group = cut.lse.dtype, cut.q.shape[1] // cut.k.shape[1]
    q, k, v, out, grad = (each.to(wide) for each in (cut.q, cut.k, cut.v, cut.out, cut.grad))
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    before, slope = (q @ k.transpose(-1, -2)).mul_(scale), None
    score = before
    if assigns(rule, "score"):
        score, slope = score_and_derivative(rule, operands, before, tables)
    if bias is not None:
        score = score + bias
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    weights = torch.exp(score - cut.lse.unsqueeze(-1))
    kept = evaluate(rule, operands, ("keep",), score, tables).get("keep")
    dv = (weights if kept is None else weights * kept).transpose(-1, -2) @ grad
    rows = (grad * out).sum(dim=-1)
    if cut.grad_lse is not None:
        rows = rows - cut.grad_lse
    of_weights = grad @ v.transpose(-1, -2)
    if kept is not None:
        of_weights.mul_(kept)
    change = weights.mul_(of_weights - rows.unsqueeze(-1))
    of_rule = rule_gradients(rule, operands, tables, before, change, learned) if learned else []
    change.mul_(scale)
    if slope is not None:
        # where nothing is seen the slope may be anything
        change = torch.where(change == 0, 0.0, change * slope)
    return (change @ k, _of_group(change.transpose(-1, -2) @ q, group), _of_group(dv, group)), of_rule


def _of_group(gradient: torch.Tensor, group: int) -> torch.Tensor:
    """Summed over the query heads that share a key/value head."""
    return gradient if group == 1 else gradient.unflatten(1, (-1, group)).sum(dim=2)
