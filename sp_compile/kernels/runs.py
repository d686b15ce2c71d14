"""Plans of attention over a cache, where it is known beforehand which queries and keys can meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sp_compile.kernels.plan import Region, between, plan_regions

FEW_QUERIES = 8


def plan_within(
    runs: Sequence[Sequence[int]],
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
) -> list[Region]:
    """As :func:`plan_regions`, where queries and keys are known to meet in few places.

    Args:
        runs: ``q_start, q_end, k_start, k_end`` of each; no query sees a key elsewhere.

    Where queries are few, their elements decide, which costs less than to plan, and nothing for each key on the host.
    """
    found: list[Region] = []
    for q_start, q_end, k_start, k_end in runs:
        if q_start == q_end:
            continue
        if q_end - q_start <= FEW_QUERIES:
            found.append(Region(-1, q_start, q_end, k_start, k_end, masked=True))
            continue
        own = between(operands, (q_start, q_end), (k_start, k_end))
        held = None if valid is None else valid[k_start:k_end]
        for each in plan_regions(own, tables, rule, held, q_end - q_start, k_end - k_start):
            rows = replace(each, q_start=each.q_start + q_start, q_end=each.q_end + q_start)
            found.append(replace(rows, k_start=each.k_start + k_start, k_end=each.k_end + k_start))
    return found
