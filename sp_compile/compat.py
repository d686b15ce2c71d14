"""What differs between the supported versions of torch (2.11 to 2.13)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx


def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], tracing: AbstractContextManager[Any]) -> Callable[..., Any]:
    """Compile a graph with Inductor for fake inputs, outside of Dynamo."""
    from torch._inductor.compile_fx import compile_fx

    with tracing, torch.no_grad():
        return compile_fx(gm, list(inputs))  # type: ignore[no-any-return]


def hint_of(size: torch.SymInt) -> int:
    """The example value of a symbolic size."""
    return int(size.node.hint)


def group_store(group: Any) -> Any:
    """The key-value store through which the ranks of a process group found each other."""
    return torch.distributed.distributed_c10d._world.pg_map[group][1]
