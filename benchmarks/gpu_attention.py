"""Attention of every rank of a layout on one device, beside torch's kernels, for ``gpu.py``.

A rank's queries meet the keys that a strategy brings, in the order in which they come, under what is planned for them,
by FlexAttention's code for any length and by fused kernels; "ours" is the one that compiled models take on this card.
Beside each rank stand torch's kernels on one causal sequence with about as many visible pairs of query and key,
FlexAttention with code for that length alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_runs import (
    FUSED,
    SDPA,
    STRATEGIES,
    Batch,
    Given,
    Part,
    block_mask_plan,
    by_flex,
    causal,
    chosen,
    code_on,
    generalize,
    kernels_on,
    of_one_length,
    part_of,
    plan_of,
    runs_of,
    whole_part,
)
from gpu_timing import LAYERS, Run, Shape, able, difference, host_seconds, medians

from sp_compile.kernels import calls
from sp_compile.layout import TokenLayout, token_layout

BLOCK, OCTAVE = 128, 24  # lengths that stand for areas are multiples, and so many from one to its double


def sequence_of(area: int) -> int:
    """Tokens of a causal sequence with about that many visible pairs, of few lengths that there are."""
    step = round(math.log2(max(1.0, (2 * area) ** 0.5 / BLOCK)) * OCTAVE)
    return round(2 ** (step / OCTAVE)) * BLOCK


@dataclass
class Areas:
    """Seconds of torch's kernels on one causal sequence, by its tokens; each is measured beside the first that asks.

    Attributes:
        refused: kernels that do not run, and why.
    """

    shape: Shape
    seconds: dict[int, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def beside(self, runs: Mapping[str, Run], tokens: int, rounds: int) -> dict[str, float]:
        """Median seconds of runs that ran before, and from now on those of so many tokens."""
        if tokens in self.seconds:
            return medians(runs, rounds, warm=runs.keys())
        others, refused = able(self._of(tokens))
        self.refused |= {f"{name}, {tokens} tokens": why for name, why in refused.items()}
        found = medians({**runs, **others}, rounds, warm={*runs, *others})
        self.seconds[tokens] = {name: found.pop(name) for name in others}
        return found

    def _of(self, tokens: int) -> dict[str, Run]:
        batch = Batch((tokens,), self.shape)
        of_flex = by_flex(batch.given(whole_part(tokens)), code_on(self.shape, of_one_length))
        return {**causal(batch.q, batch.k, batch.v, kernels_on(self.shape)), "FlexAttention": of_flex}


def compare(lengths: tuple[int, ...], sp: int, scheme: str, rounds: int, areas: Areas) -> dict[str, Any]:
    """All ranks of one size by all strategies, each beside torch's kernels on its area; one rank at a time is held."""
    shape = areas.shape
    generalize(shape)
    batch, layout = Batch(lengths, shape), token_layout(lengths, sp, scheme)
    strategies = STRATEGIES[: 1 if sp == 1 else None]
    found: dict[str, Any] = {"lengths": lengths, "sp": sp, "kernel": chosen(layout, shape)}
    found["error"] = error_of(batch, layout, strategies)
    if sp == 1:
        found |= unsharded(batch, rounds)
    for strategy in strategies:
        found[strategy] = of_strategy(batch, layout, strategy, rounds, areas)
    return found | {"refused": found.get("refused", {}) | areas.refused}


def error_of(batch: Batch, layout: TokenLayout, strategies: tuple[str, ...]) -> float:
    """The largest difference of all ranks together to flash over each request, by any kernel."""
    flash = {name: each for name, each in SDPA.items() if name == "flash SDPA"}
    expected = batch.each_request(flash)["flash SDPA"]()
    error = 0.0
    for strategy in strategies:
        outputs: dict[str, list[torch.Tensor]] = {}
        for rank in range(layout.sp):
            given = batch.given(part_of(layout, rank, strategy))
            for name, run in runs_of(given, batch.shape).items():
                outputs.setdefault(name, []).append(run())
        for name in [*outputs]:
            restored = torch.cat(outputs.pop(name), dim=2)[:, :, layout.restore_index.to(batch.device)]
            error = max(error, difference(restored, expected))
    return error


def unsharded(batch: Batch, rounds: int) -> dict[str, Any]:
    """Torch's kernels over each request, for all of them."""
    runs, refused = able(batch.each_request(kernels_on(batch.shape)))
    return {"unsharded_seconds": medians(runs, rounds, warm=runs.keys()), "refused": refused}


def of_strategy(batch: Batch, layout: TokenLayout, strategy: str, rounds: int, areas: Areas) -> dict[str, Any]:
    """What each rank takes, all of whose kernels ran before, and planning for the slowest."""
    ours, ranks, planned = chosen(layout, batch.shape), [], []
    for rank in range(layout.sp):
        part = part_of(layout, rank, strategy)
        given = batch.given(part)
        tokens = sequence_of(part.area)
        seconds = areas.beside(runs_of(given, batch.shape), tokens, rounds)
        ranks.append(rank_figures(part, seconds, ours, tokens, areas.seconds[tokens]))
        planned.append(medians({0: planning(given, ours)}, rounds, host_seconds)[0])
        del given
    spent = [each["seconds"] for each in ranks]
    return {
        "sum_seconds": sum(spent),
        "slowest_over_mean": max(spent) / statistics.mean(spent),
        "plan_seconds": max(planned),
        "plan_over_layers": max(planned) / (LAYERS * max(spent)),
        "ranks": ranks,
    }


def planning(given: Given, kernel: str) -> Run:
    """All that is planned for a kernel once a forward and kind of mask."""
    if kernel != FUSED:
        return lambda: block_mask_plan(given)
    sizes = given.q.shape[2], given.k.shape[2]

    def plan() -> None:
        calls._calls_of.cache_clear()  # which keeps the calls for the layers of a forward
        for call in calls.calls_of(plan_of(given, FUSED), 1, sizes, given.q.device).calls:
            _ = (call.rows, call.packed) if len(call.rectangles) > 1 else call.queries

    return plan


def rank_figures(
    part: Part, seconds: Mapping[str, float], ours: str, tokens: int, of_area: Mapping[str, float]
) -> dict[str, Any]:
    """One rank against torch's kernels on a causal sequence, their times by the pair."""
    share = part.area / (tokens * (tokens + 1) / 2)
    others = {name: spent * share for name, spent in of_area.items()}
    spent = seconds[ours]
    return {
        "queries": len(part.queries),
        "keys": len(part.keys),
        "area": part.area,
        "seconds": spent,
        "of_that_area": others,
        "by_kernel": dict(seconds),
        "ratio": spent / min(others.values()),
        "ratio_to_flex": spent / others["FlexAttention"] if "FlexAttention" in others else None,
    }
