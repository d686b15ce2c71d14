"""Runs models of the zoo on ranks and compares them with themselves unsharded."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import sp_compile
from tests.zoo.models import ENTRIES, build, tokens

TOLERANCE = 1e-5
LENGTHS = (23, 1, 43)


@dataclass(frozen=True)
class Outcome:
    """How one model did with one kind of batch: the error over the scale, or what was raised."""

    error: float | None
    raised: str
    fallbacks: tuple[tuple[str, int, str, str], ...]
    seconds: float
    compiles: int = 0


def batch(name: str, kind: str) -> dict[str, Any]:
    """Inputs of one kind: ``plain`` (odd length), ``packed`` (ragged), ``left`` or ``right`` (padded rows)."""
    if kind == "plain":
        return {"input_ids": tokens(1, sum(LENGTHS))}
    if kind == "packed":
        rows = tokens(sum(LENGTHS)).split(LENGTHS)
        return dict(sp_compile.pack(rows))
    mask = torch.ones(2, 33, dtype=torch.int64)
    if kind == "left":
        mask[0, :12] = 0
    else:
        mask[0, 21:] = 0
    return {"input_ids": tokens(2, 33) * mask + (1 - mask), "attention_mask": mask}


def takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def compare(name: str, kind: str, **options: Any) -> Outcome:
    start = time.perf_counter()
    torch._dynamo.reset()
    model = build(name)
    inputs = batch(name, kind)
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    parallel = None
    try:
        with torch.no_grad():
            expected = model(**inputs)[0]
            parallel = sp_compile.parallelize(model, **options)
            found = parallel(**inputs)[0]
    except sp_compile.SPCompileError as error:
        return Outcome(None, f"{type(error).__name__}: {error}", (), time.perf_counter() - start)
    if "attention_mask" in inputs:
        held = inputs["attention_mask"].bool()
        found, expected = found[held], expected[held]
    error = ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    fallbacks = tuple((each.op, each.count, each.source, each.reason) for each in parallel.report().fallbacks)
    return Outcome(error, "", fallbacks, time.perf_counter() - start, parallel.compiles)


def compare_all(jobs: list[tuple[str, str]], **options: Any) -> dict[tuple[str, str], Outcome]:
    """Runs on every rank; crashes are outcomes too."""
    import traceback

    outcomes = {}
    for name, kind in jobs:
        try:
            outcomes[name, kind] = compare(name, kind, **options)
        except Exception as error:  # a crash of one model is told with the model
            outcomes[name, kind] = Outcome(None, f"CRASH {type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}", (), 0.0)
        import torch.distributed as dist
        if dist.get_rank() == 0:
            o = outcomes[name, kind]
            print(f"{name:22} {kind:7} {o.seconds:5.1f}s err={o.error} fb={len(o.fallbacks)} {o.raised[:200]}", flush=True)
    return outcomes


__all__ = ["ENTRIES", "LENGTHS", "TOLERANCE", "Outcome", "compare_all"]
