"""Steps of training on ranks and without them, for tests to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import sp_compile


def gradients_of(model: nn.Module, batch: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The loss and every gradient of a step without ranks."""
    model = model.to(dtype).train()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: each.grad for name, each in model.named_parameters()}}


def on_ranks(make: Callable[..., nn.Module], kwargs: dict[str, Any], batch: dict[str, Any], dtype: torch.dtype,
             **config: Any) -> dict[str, Any]:  # fmt: skip
    """The same through ``parallelize``, on this rank of the group."""
    parallel = sp_compile.parallelize(make(**kwargs).to(dtype).train(), **config)
    loss = parallel(**batch).loss
    loss.backward()
    report = parallel.report()
    return {"loss": loss.detach(), "fallbacks": [str(each) for each in report.fallbacks],
            **{name: each.grad for name, each in parallel.module.named_parameters()}}  # fmt: skip
