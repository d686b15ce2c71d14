"""Kernels behind the canonical attention node.

``tiles`` runs the planned regions through torch's flash kernel on a CPU, and as matrix products elsewhere; ``dense`` is
attention by its definition, which holds queries x keys elements, and ``dense_fp64`` the same in double precision.
``fused`` runs the planned regions through torch's flash and cuDNN kernels for GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sp_compile.kernels import dense, rectangles, tiles
from sp_compile.kernels.backward import Gradients, attend_backward
from sp_compile.kernels.backward import Saved as Saved
from sp_compile.kernels.dense import Partial
from sp_compile.kernels.plan import plan_regions
from sp_compile.kernels.regions import as_regions, as_tensor

HERE = ("tiles", "fused", "dense", "dense_fp64")  # flex is an operator of torch's, not called from here


def attend(
    kernel: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    plan: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> Partial:
    """Run one kernel of :data:`HERE`; see :func:`sp_compile.ops.attention`."""
    assert kernel in HERE, f"no kernel {kernel!r}"
    if kernel in ("dense", "dense_fp64"):
        wide = torch.float64 if kernel == "dense_fp64" else None
        out, lse = dense.attend(q, k, v, operands, tables, rule, scale, valid, wide)
        return out, lse.to(dense.accumulated(q.dtype))
    plan = _planned(q, k, operands, tables, rule, plan, valid)
    if kernel == "fused":
        return rectangles.attend(q, k, v, operands, tables, rule, scale, plan, valid)
    return tiles.attend(q, k, v, operands, tables, rule, scale, as_regions(plan), valid)


def gradients(
    kernel: str,
    saved: Saved,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    plan: torch.Tensor | None,
    valid: torch.Tensor | None,
    learned: Sequence[int],
) -> tuple[Gradients, list[torch.Tensor]]:
    """Gradients of an attention's q, k and v, and of operands and tables of these numbers."""
    assert kernel in HERE, f"no kernel {kernel!r}"
    q, k, v = saved[:3]
    plan = _planned(q, k, operands, tables, rule, plan, valid)
    of_rule: list[torch.Tensor] = []
    if kernel == "fused" and saved.grad_lse is None:
        dq, dk, dv = rectangles.gradients(saved, operands, tables, rule, scale, plan, valid)
    else:
        regions = as_regions(plan)
        (dq, dk, dv), of_rule = attend_backward(saved, operands, tables, rule, scale, regions, valid, learned)
    vectors = [*operands, *tables]
    of_rule = [each.to(vectors[i].dtype) for i, each in zip(learned, of_rule, strict=True)]
    return (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)), of_rule


def _planned(
    q: torch.Tensor,
    k: torch.Tensor,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    plan: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> torch.Tensor:
    """The plan, made here where there is none."""
    if plan is not None:
        return plan
    return as_tensor(plan_regions(operands, tables, rule, valid, q.shape[2], k.shape[2]))


def with_means(
    out: torch.Tensor, blind: torch.Tensor, v_BGKE: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """Rows that see nothing get the mean of the values: a softmax over equal scores.

    ``blind`` is bool and broadcasts to ``[B, H, Q]``.
    """
    held = v_BGKE if valid is None else v_BGKE[:, :, valid]
    mean = held.to(out.dtype).mean(dim=2, keepdim=True)
    mean = mean.repeat_interleave(out.shape[1] // mean.shape[1], dim=1)
    return torch.where(blind.unsqueeze(-1), mean, out)


def gradient_of_means(
    grad: torch.Tensor, blind: torch.Tensor, v_BGKE: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of the values by :func:`with_means`."""
    of_rows = torch.where(blind.unsqueeze(-1), grad, 0.0).sum(dim=2, keepdim=True)
    of_heads = of_rows.unflatten(1, (v_BGKE.shape[1], -1)).sum(dim=2)
    held = torch.ones(v_BGKE.shape[2], dtype=torch.bool, device=grad.device) if valid is None else valid
    shares = held.to(grad.dtype) / held.sum()
    found: torch.Tensor = of_heads * shares[:, None]
    return found.to(v_BGKE.dtype)
