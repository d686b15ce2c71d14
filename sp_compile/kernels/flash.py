"""torch's flash kernel for CPUs, for keys and values as caches and models have them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from sp_compile.kernels.dense import Partial

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> Partial:
    """Attention of ``q`` ``[B, H, Q, D]`` over all of ``k`` ``[B, G, K, D]``; output and natural log-sum-exp.

    Value heads may have another size than the keys', and keys and values another dtype.

    Args:
        mask: added to the scores, broadcasts to ``[B, H, Q, K]`` in q's dtype; None for none.
    """
    k = k if k.dtype == q.dtype else k.to(q.dtype)  # without a call where there is nothing to do
    v = v if v.dtype == q.dtype else v.to(q.dtype)
    width, largest = v.shape[-1], max(q.shape[-1], v.shape[-1])
    if q.shape[-1] != width:
        q, k, v = (F.pad(each, (0, largest - each.shape[-1])) for each in (q, k, v))
    out, lse = _flash(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return (out if largest == width else out[..., :width]), lse


def merge(into: Partial, part: Partial) -> None:
    """Join two partial softmaxes over disjoint keys in place (online softmax, as in ring attention)."""
    (out, lse), (part_out, part_lse) = into, part
    joint = torch.logaddexp(lse, part_lse)
    weight = torch.exp(part_lse - joint).nan_to_num_(0.0).unsqueeze(-1)
    out.lerp_(part_out.to(out.dtype), weight.to(out.dtype))
    lse.copy_(joint)
