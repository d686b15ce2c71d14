"""Runs one model of the zoo on a rank and compares it with itself unsharded."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import sp_compile
from tests.local_graphs import wide_values
from tests.zoo.models import build, tokens

LENGTHS = (23, 1, 43)


@dataclass(frozen=True)
class Outcome:
    """How one model did with one kind of batch: the error over the scale of the logits, or what was raised.

    Where its requests were isolated, they are compared with each alone only, since unsharded it would mix them.
    ``wide`` are values of the local graphs of queries by keys.
    """

    error: float | None
    raised: str
    fallbacks: tuple[tuple[str, str, str], ...]
    isolated: bool = False
    wide: tuple[str, ...] = ()


def batch(kind: str) -> dict[str, Any]:
    """Inputs of one kind: ``plain`` (odd length), ``packed`` (ragged), ``left`` or ``right`` (padded rows)."""
    if kind == "plain":
        return {"input_ids": tokens(1, sum(LENGTHS))}
    if kind == "packed by another tool":
        return {name: each.clone() for name, each in batch("packed").items()}
    if kind == "packed":
        return dict(sp_compile.pack(tokens(sum(LENGTHS)).split(LENGTHS)))
    mask = torch.ones(2, 33, dtype=torch.int64)
    if kind == "left":
        mask[0, :12] = 0
    else:
        mask[0, 21:] = 0
    return {"input_ids": tokens(2, 33) * mask + (1 - mask), "attention_mask": mask}


def compare(name: str, kind: str, dtype: torch.dtype = torch.float32, codegen: str = "eager") -> Outcome:
    """Compare all logits of tokens that are not padding; a packed batch also with each request alone."""
    model, inputs = build(name, dtype), batch(kind)
    options: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}
    parallel = sp_compile.parallelize(model, codegen=codegen)
    try:
        with torch.no_grad():
            found = parallel(**inputs, **options)[0]
    except sp_compile.SPCompileError as error:
        return Outcome(None, f"{type(error).__name__}: {error}", ())
    with torch.no_grad():
        expected = [] if parallel.isolated else [model(**parallel.options({**inputs, **options}))[0]]
        if kind.startswith("packed"):
            parts = inputs["input_ids"].split(LENGTHS, dim=1)
            expected.append(torch.cat([model(part, **options)[0] for part in parts], dim=1))
    held = inputs.get("attention_mask", torch.ones(found.shape[:2])).bool()
    error = max(_error(found[held], each[held]) for each in expected)
    fallbacks = tuple((each.op, each.source, each.reason) for each in parallel.report().fallbacks)
    return Outcome(error, "", fallbacks, parallel.isolated, tuple(wide_values(parallel)))


def compare_gradients(name: str, dtype: torch.dtype = torch.float64) -> Outcome:
    """Compare gradients of all parameters, by a fixed weighting of the logits.

    The error is over the scale of each, or a hundredth of the largest where that is more: of some, such as biases of
    keys, nothing but rounding is left.
    """
    inputs, found = batch("plain"), {}
    for sharded in (False, True):
        model: Any = build(name, dtype)
        for each in model.modules():
            if hasattr(each, "config"):
                each.config._experts_implementation = "batched_mm"  # grouped products take no fp64
        options: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}
        run = sp_compile.parallelize(model, codegen="eager", gradients="always") if sharded else model
        try:
            logits = run(**inputs, **options)[0]
        except sp_compile.SPCompileError as error:
            return Outcome(None, f"{type(error).__name__}: {error}", ())
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
        found[sharded] = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    least = max(float(each.abs().max()) for each in found[False].values()) / 100
    assert found[True].keys() == found[False].keys()
    error = max(
        float((found[True][name] - each).abs().max()) / max(float(each.abs().max()), least)
        for name, each in found[False].items()
    )
    return Outcome(error, "", ())


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has the argument."""
    return argument in inspect.signature(model.forward).parameters


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
