"""The nodes that passes add to a graph, all executable in the global view.

``attention`` and ``tile_plan`` stay to the end and run as they are; the others are placeholders of the global view that
``lower_redistributes`` replaces by index selections and functional collectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sp_compile import kernels


def redistribute(value: torch.Tensor) -> torch.Tensor:
    """Change of placement; the identity in the global view. The placement is in the node's metadata."""
    return value.view(value.shape)


def select_rows(value: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows of the token dim by their normal-order numbers; each rank adds those it holds."""
    return value.index_select(dim, rows)


def row_numbers(start: int, count: int, length: int, device: torch.device) -> torch.Tensor:
    """Row numbers ``start .. start + count`` of ``length``, counted from the end when ``start`` is negative."""
    rows = torch.arange(count, device=device) + start
    return torch.where(rows < 0, rows + length, rows) if not isinstance(start, int) or start < 0 else rows


@torch.library.custom_op("sp_compile::tile_plan", mutates_args=())
def tile_plan(
    operands: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
    q_bounds: torch.Tensor,
    k_bounds: torch.Tensor,
) -> torch.Tensor:
    """Kind of each attention tile; see :func:`sp_compile.kernels.plan_tiles`."""
    return kernels.plan_tiles(operands, rule, valid, q_bounds, k_bounds)


@tile_plan.register_fake
def _(
    operands: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
    q_bounds: torch.Tensor,
    k_bounds: torch.Tensor,
) -> torch.Tensor:
    return torch.empty(q_bounds.shape[0] - 1, k_bounds.shape[0] - 1, dtype=torch.int8, device="cpu")


@torch.library.custom_op("sp_compile::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    empty_mean: bool,
    plan: torch.Tensor | None,
    q_bounds: torch.Tensor | None,
    k_bounds: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The canonical attention: softmax of the ruled scores over the keys, times the values, and its log-sum-exp.

    Args:
        q: ``[batch, heads, queries, head_dim]``.
        k: ``[batch, kv_heads, keys, head_dim]``, ``heads % kv_heads == 0``.
        v: ``[batch, kv_heads, keys, value_dim]``.
        operands, rule: mask and score rule, see :mod:`sp_compile.score_rule`.
        scale: factor of ``q @ k^T``.
        empty_mean: a row that sees no key gets the mean of the values instead of 0.
        plan, q_bounds, k_bounds: tile kinds and boundaries; without them all is one partial tile.
        valid: bool ``[keys]``, keys that exist.

    Returns:
        Output ``[batch, heads, queries, value_dim]`` in q's dtype and log-sum-exp ``[batch, heads, queries]``.
    """
    if plan is None or q_bounds is None or k_bounds is None:
        q_bounds, k_bounds = torch.tensor([0, q.shape[2]]), torch.tensor([0, k.shape[2]])
        plan = kernels.plan_tiles(operands, rule, valid, q_bounds, k_bounds)
    tiles = kernels.merged_tiles(plan, q_bounds, k_bounds)
    out, lse = kernels.attend(q, k, v, operands, rule, scale, tiles, valid, empty_mean)
    return out.contiguous(), lse


@attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    empty_mean: bool,
    plan: torch.Tensor | None,
    q_bounds: torch.Tensor | None,
    k_bounds: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, heads, queries, v.shape[-1]), q.new_empty(batch, heads, queries, dtype=wide)
