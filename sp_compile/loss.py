"""Losses of outputs that stay on the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Function
from torch.nn import functional as F

from sp_compile.errors import BatchError
from sp_compile.runtime import ParallelModule


class _SumOverRanks(Function):
    """A sum of what ranks have, the same on each: so is its gradient, which is that of every part."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: Any) -> torch.Tensor:
        summed = value.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


def cross_entropy(
    model: ParallelModule,
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of the whole batch from logits that stayed on the ranks (``outputs="sharded"``), the same on every rank.

    Labels are shifted by one over the whole row before they are cut, so that none is lost where ranks meet.

    Args:
        model: what gave the logits; its layout tells their rows.
        logits: this rank's ``[1, rows, vocabulary]`` of the last forward.
        labels: int64 ``[1, tokens]`` of all tokens, the same on every rank; label t is what token t - 1 predicts.
        ignore_index: labels that do not count.
        label_smoothing: as of ``torch.nn.functional.cross_entropy``.
        num_items_in_batch: what the sum is divided by; None for the labels that count.

    Returns:
        A value without dims, in fp32 (fp64 for fp64); NaN where no label counts, as torch has it.

    Raises:
        BatchError: there is no layout, or shapes do not fit it.
    """
    layout, group = model.layout, model.group
    if layout is None or labels.shape != (1, layout.tokens) or logits.shape[:2] != (1, layout.shard_length):
        raise BatchError(
            f"logits {list(logits.shape)} and labels {list(labels.shape)} are not of the last forward's layout: pass "
            "this rank's rows of logits, and the labels of all tokens in one row"
        )
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    shifted = F.pad(labels, (0, 1), value=ignore_index)[0, 1:]
    own = shifted[layout.local_index[group.rank].to(labels.device)]
    own = own.masked_fill(~layout.valid[group.rank].to(labels.device), ignore_index)
    total = F.cross_entropy(
        logits[0].to(wide), own, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    if group.process_group is not None and group.size > 1:
        total = _SumOverRanks.apply(total, group.process_group)  # type: ignore[no-untyped-call]
    counted = (shifted != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / counted
