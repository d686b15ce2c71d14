"""What differs between the supported versions of torch (2.11 to 2.13)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import sympy
import torch
from torch import fx


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], tracing: AbstractContextManager[Any]
) -> Callable[..., Any]:
    """Compile a graph with Inductor for fake inputs, outside of Dynamo."""
    from torch._inductor.compile_fx import compile_fx

    with tracing, torch.no_grad():
        return cast(Callable[..., Any], compile_fx(gm, list(inputs)))


def hint_of_symbol(size: torch.SymInt, symbol: sympy.Symbol) -> int:
    """The example value of one symbol of a symbolic size; torch 2.13 renamed where it is kept."""
    env = size.node.shape_env
    return int((env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val)[symbol])


def group_store(group: Any) -> Any:
    """The key-value store through which the ranks of a process group found each other."""
    return torch.distributed.distributed_c10d._world.pg_map[group][1]
