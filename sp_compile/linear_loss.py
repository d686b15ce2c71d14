"""Cross-entropy of a linear layer's logits, of which only a few rows exist at a time.

The forward keeps what it was given; the backward computes the logits of each few rows again, as `Cut Your Losses in
Large-Vocabulary Language Models <https://arxiv.org/abs/2411.09009>`_ does.

Letters: N rows, D features, V classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from sp_compile.kernels.dense import accumulated
from sp_compile.rule_derivatives import score_and_derivative
from sp_compile.score_rule import evaluate

HELD = 1 << 24  # logits that exist at a time


@torch.library.custom_op("sp_compile::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_N: torch.Tensor,
    rule: str,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    """The loss of each row.

    Args:
        labels_N: int64, the class of each row.
        rule: what is done with a logit, as a :mod:`sp_compile.score_rule` of ``score``; empty for nothing.
        ignore_index, label_smoothing: as of ``torch.nn.functional.cross_entropy``.

    Returns:
        ``[N]`` in fp32 (fp64 for fp64), 0 for rows to ignore.
    """
    losses = x_ND.new_empty(x_ND.shape[0], dtype=accumulated(x_ND.dtype))
    for rows in _chunks(x_ND, weight_VD):
        product = _product(x_ND[rows], weight_VD, bias_V)
        logits = evaluate(rule, [], ("score",), product).get("score", product)
        losses[rows] = F.cross_entropy(
            logits, labels_N[rows], reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
        )
    return losses


@linear_cross_entropy.register_fake
def _(x_ND: torch.Tensor, *_: Any) -> torch.Tensor:
    return x_ND.new_empty(x_ND.shape[0], dtype=accumulated(x_ND.dtype))


@torch.library.custom_op("sp_compile::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    grad_N: torch.Tensor,
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_N: torch.Tensor,
    rule: str,
    ignore_index: int,
    label_smoothing: float,
    trains: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``x_ND``, ``weight_VD`` and ``bias_V``; the last two are empty where the layer is not trained."""
    classes, wide = weight_VD.shape[0], accumulated(x_ND.dtype)
    dx = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    dweight = weight_VD.new_zeros(weight_VD.shape if trains else (0,), dtype=wide)
    dbias = weight_VD.new_zeros(classes if trains and bias_V is not None else 0, dtype=wide)
    for rows in _chunks(x_ND, weight_VD):
        labels = labels_N[rows]
        ignored = labels == ignore_index
        logits, slope = _product(x_ND[rows], weight_VD, bias_V), None
        if rule:
            logits, slope = score_and_derivative(rule, [], logits)
        change = logits.softmax(dim=-1).sub_(label_smoothing / classes)
        own = labels.masked_fill(ignored, 0).unsqueeze(-1)
        change.scatter_add_(-1, own, torch.full_like(own, label_smoothing - 1.0, dtype=wide))
        change.mul_(grad_N[rows].masked_fill(ignored, 0.0).unsqueeze(-1))
        if slope is not None:
            change.mul_(slope)
        if dbias.numel():
            dbias += change.sum(dim=0)
        change = change.to(x_ND.dtype)
        dx[rows] = change @ weight_VD
        if trains:
            dweight += _wide(change.t(), x_ND[rows])
    return dx, dweight.to(weight_VD.dtype), dbias.to(weight_VD.dtype)


@linear_cross_entropy_backward.register_fake
def _(
    grad_N: torch.Tensor, x_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    trains = bool(args[-1])
    dweight = weight_VD.new_empty(weight_VD.shape if trains else (0,))
    dbias = weight_VD.new_empty(weight_VD.shape[0] if trains and bias_V is not None else 0)
    return torch.empty_like(x_ND, memory_format=torch.contiguous_format), dweight, dbias


def _chunks(x_ND: torch.Tensor, weight_VD: torch.Tensor) -> Iterator[slice]:
    step = max(1, HELD // max(1, weight_VD.shape[0]))
    return (slice(start, start + step) for start in range(0, x_ND.shape[0], step))


def _product(x_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x_ND, weight_VD, bias_V).to(accumulated(x_ND.dtype))


def _wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A matrix product that is not rounded to the dtype of its factors."""
    wide = accumulated(a.dtype)
    if a.dtype == wide:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _gradient(ctx: Any, grad_N: torch.Tensor) -> Any:
    trains = any(ctx.needs_input_grad[1:3])
    dx, dweight, dbias = linear_cross_entropy_backward(grad_N, *ctx.saved_tensors, *ctx.options, trains)
    has_bias = ctx.saved_tensors[2] is not None
    return dx, dweight if trains else None, dbias if trains and has_bias else None, None, None, None, None


linear_cross_entropy.register_autograd(_gradient, setup_context=_save)
