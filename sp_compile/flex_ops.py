"""The nodes around FlexAttention, as custom ops: block masks, what its functions read, and queries without keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sp_compile import kernels
from sp_compile.kernels import flex, split
from sp_compile.kernels import plan as plans


@torch.library.custom_op("sp_compile::block_mask", mutates_args=())
def block_mask(
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
    q_rows: torch.Tensor,
    k_rows: torch.Tensor,
    runs: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`sp_compile.kernels.flex.block_mask`, of the arguments of :func:`sp_compile.ops.tile_plan`."""
    return flex.block_mask(operands, tables, rule, valid, q_rows.numel(), k_rows.numel(), runs)


@block_mask.register_fake
def _(*args: Any) -> torch.Tensor:
    operands, _, rule, _, q_rows, k_rows = args[:6]
    queries, keys = (flex.blocks(each.shape[0]) for each in (q_rows, k_rows))
    return torch.empty(plans.mask_rows(rule, operands) or 1, queries, 2, 1 + keys, dtype=torch.int32)


@torch.library.custom_op("sp_compile::block_mask_of_keys", mutates_args=())
def block_mask_of_keys(plan: torch.Tensor) -> torch.Tensor:
    """The blocks of queries by those of keys, ``[rows, key blocks, 2, 1 + query blocks]``, from ``block_mask``."""
    return torch.from_numpy(flex.of_keys(plan.numpy()))


@block_mask_of_keys.register_fake
def _(plan: torch.Tensor) -> torch.Tensor:
    rows, queries, kinds, keys = plan.shape
    return plan.new_empty(rows, keys - 1, kinds, 1 + queries)


@torch.library.custom_op("sp_compile::split_block_mask", mutates_args=())
def split_block_mask(plan: torch.Tensor, queries: int, rows: int, splits: int) -> torch.Tensor:
    """As :func:`sp_compile.kernels.split.split_blocks`."""
    return torch.from_numpy(split.split_blocks(plan.numpy(), queries, rows, splits))


@split_block_mask.register_fake
def _(plan: torch.Tensor, queries: int, rows: int, splits: int) -> torch.Tensor:
    return plan.new_empty(splits, flex.blocks(rows), 2, 2 + (plan.shape[3] + splits - 2) // splits)


@torch.library.custom_op("sp_compile::query_blocks", mutates_args=())
def query_blocks(
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
    q_rows: torch.Tensor,
    k_rows: torch.Tensor,
    runs: torch.Tensor,
    parts: int,
    size: int,
) -> torch.Tensor:
    """As :func:`sp_compile.kernels.split.query_blocks`, of the arguments of :func:`block_mask`."""
    sizes = q_rows.numel(), k_rows.numel()
    return torch.from_numpy(split.query_blocks(operands, tables, rule, valid, *sizes, runs, parts, size))


@query_blocks.register_fake
def _(*args: Any) -> torch.Tensor:
    *_, parts, size = args
    return torch.empty(parts, 1, 3, 2 + size, dtype=torch.int32)


@torch.library.custom_op("sp_compile::captured", mutates_args=())
def captured(value: torch.Tensor, dims: Sequence[int], keys: int = -1) -> torch.Tensor:
    """A tensor for FlexAttention, reduced to these dims and in memory of its own: Inductor fuses nothing into it.

    Args:
        keys: which of ``dims`` is that of the keys, which is filled up with zeros to a multiple of
            :data:`sp_compile.kernels.flex.KEYS`; -1 for none.
    """
    kept = value.reshape([value.shape[dim] for dim in dims] or [1])
    found = kept.new_zeros(_filled_up(kept.shape, keys))
    (found if keys < 0 else found.narrow(keys, 0, kept.shape[keys])).copy_(kept)
    return found


@captured.register_fake
def _(value: torch.Tensor, dims: Sequence[int], keys: int = -1) -> torch.Tensor:
    return value.new_empty(_filled_up([value.shape[dim] for dim in dims] or [1], keys))


def _save_captured(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    value, dims, *_ = inputs
    ctx.shape, ctx.kept = value.shape, [value.shape[dim] for dim in dims] or [1]


def _captured_gradient(ctx: Any, grad: torch.Tensor) -> Any:
    for dim, size in enumerate(ctx.kept):
        grad = grad.narrow(dim, 0, size)
    return grad.reshape(ctx.shape), None, None


captured.register_autograd(_captured_gradient, setup_context=_save_captured)


def _filled_up(sizes: Sequence[Any], keys: int) -> list[Any]:
    return [(size + flex.KEYS - 1) // flex.KEYS * flex.KEYS if dim == keys else size for dim, size in enumerate(sizes)]


@torch.library.custom_op("sp_compile::seen_rows", mutates_args=())
def seen_rows(
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
    q_rows: torch.Tensor,
    k_rows: torch.Tensor,
) -> torch.Tensor:
    """As :func:`sp_compile.kernels.plan.seen_rows`, of the arguments of :func:`sp_compile.ops.tile_plan`."""
    return plans.seen_rows(operands, tables, rule, valid, q_rows.numel(), k_rows.numel()).to(q_rows.device)


@seen_rows.register_fake
def _(*args: Any) -> torch.Tensor:
    operands, _, rule, _, q_rows, _ = args[:6]
    seen: torch.Tensor = q_rows.new_empty(plans.mask_rows(rule, operands) or 1, q_rows.shape[0], dtype=torch.bool)
    return seen


@torch.library.custom_op("sp_compile::fill_empty", mutates_args=())
def fill_empty(out: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Queries that see no key, by ``seen`` from ``seen_rows``, get the mean of the values."""
    return kernels.with_means(out, ~seen[:, None], v, valid).contiguous()


@fill_empty.register_fake
def _(out: torch.Tensor, *args: Any) -> torch.Tensor:
    return torch.empty_like(out, memory_format=torch.contiguous_format)


@torch.library.custom_op("sp_compile::fill_empty_backward", mutates_args=())
def fill_empty_backward(
    grad: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the output and of the values by :func:`fill_empty`."""
    blind = ~seen[:, None]
    own, of_values = grad.masked_fill(blind.unsqueeze(-1), 0.0), kernels.gradient_of_means(grad, blind, v, valid)
    return own.contiguous(), of_values.contiguous()


@fill_empty_backward.register_fake
def _(grad: torch.Tensor, v: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    own, of_values = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in (grad, v))
    return own, of_values


def _save_filled(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _filled_gradient(ctx: Any, grad: torch.Tensor) -> Any:
    return *fill_empty_backward(grad, *ctx.saved_tensors), None, None


fill_empty.register_autograd(_filled_gradient, setup_context=_save_filled)
