"""Attention by its definition: matrix products and a softmax over all keys at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sp_compile.kernels.plan import with_valid
from sp_compile.score_rule import assigns, evaluate

Partial = tuple[torch.Tensor, torch.Tensor]  # output and log-sum-exp


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-sum-exps and of outputs before they are rounded."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_partial(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKE: torch.Tensor,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> Partial:
    """Attention over these keys alone, in fp32 or fp64; a row that sees nothing gives 0 and -inf.

    Args:
        operands, tables, rule: give the change of the scores.
        mask, bias: broadcast to the scores, None for none.
    """
    wide = accumulated(q_BHQD.dtype)
    group = q_BHQD.shape[1] // k_BGKD.shape[1]
    k, v = (each.repeat_interleave(group, dim=1) if group > 1 else each for each in (k_BGKD, v_BGKE))
    score = (q_BHQD.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if assigns(rule, "score"):
        score = evaluate(rule, operands, ("score",), score, tables)["score"]
    if bias is not None:
        score = score + bias
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(score, dim=-1)
    weights = torch.exp(score - lse.unsqueeze(-1)).nan_to_num_(0.0)
    kept = evaluate(rule, operands, ("keep",), score, tables).get("keep")
    return (weights if kept is None else weights * kept) @ v.to(wide), lse


def attend(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKE: torch.Tensor,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    valid: torch.Tensor | None,
    wide: torch.dtype | None = None,
) -> Partial:
    """All queries over all keys at once, computed in ``wide``; queries x keys elements are held."""
    rule, operands = with_valid(rule, operands, valid)
    if wide is not None:
        q_BHQD, k_BGKD, v_BGKE = (each.to(wide) for each in (q_BHQD, k_BGKD, v_BGKE))
        operands = [each.to(wide) if each.is_floating_point() else each for each in operands]
        tables = [each.to(wide) if each.is_floating_point() else each for each in tables]
    values = evaluate(rule, operands, ("mask", "bias"), tables=tables)
    mask, bias = values.get("mask"), values.get("bias")
    return dense_partial(q_BHQD, k_BGKD, v_BGKE, operands, tables, rule, scale, mask, bias)
