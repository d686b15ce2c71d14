"""What differs between the supported versions of torch (2.11 to 2.13)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import sympy
import torch
from torch import fx


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], tracing: AbstractContextManager[Any], differentiable: bool = False
) -> Callable[..., Any]:
    """Compile a graph with Inductor for fake inputs, outside of Dynamo; ops stay in the order of the graph.

    Code that torch keeps on disk calls the ops of sp_compile as they were, so it is kept for these sources alone. That
    of the backward is generated at once, and so is too.
    """
    from torch._functorch import config as derivatives
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch.compiler import config as caches

    in_order = config.patch(reorder_for_locality=False, reorder_for_peak_memory=False)
    own = caches.patch(cache_key_tag=f"{caches.cache_key_tag} sp_compile {sources()}")  # type: ignore[attr-defined]
    at_once = derivatives.patch(force_non_lazy_backward_lowering=True)
    with tracing, in_order, own, at_once, torch.set_grad_enabled(differentiable):
        return cast(Callable[..., Any], compile_fx(gm, list(inputs)))


@lru_cache(maxsize=1)
def sources() -> str:
    """A hash of the modules of sp_compile."""
    from sp_compile import passes

    found = hashlib.sha256()
    for module in (__file__, str(passes.__file__)):
        for path in sorted(Path(module).parent.rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def process_group(name: str) -> Any:
    """The process group that functional collectives know by this name."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def register_work(tensor: torch.Tensor, work: Any) -> None:
    """Let ``wait_tensor`` of a tensor wait for work that writes it."""
    torch._C._distributed_c10d._register_work(tensor, work)


def size_source(name: str) -> Any:
    """A source for the symbol of a size, such that the symbol's number is 90 or more.

    Inductor's FlexAttention for CPUs renames sizes by text, and takes its own ``ks2`` for a part of our ``ks20``.
    """
    from torch._dynamo.source import ConstantSource

    suffix = 0
    while int(hashlib.sha256(f"{name}{suffix}".encode()).hexdigest(), 16) % 100 < 90:  # how torch numbers symbols
        suffix += 1
    return ConstantSource(f"{name}{suffix}")


@contextmanager
def hashable_dtensors() -> Iterator[None]:
    """Let Dynamo hash DTensors whose strides are symbols, as those of a slice of tokens are."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

    def hashed(spec: Any) -> int:
        meta = spec.tensor_meta
        return hash((spec.mesh, spec.placements, None if meta is None else (len(meta.shape), meta.dtype)))

    with patch.object(DTensorSpec, "_hash_impl", hashed):
        yield


def hint_of_symbol(size: torch.SymInt, symbol: sympy.Symbol) -> int:
    """The example value of one symbol of a symbolic size; torch 2.13 renamed where it is kept."""
    env = size.node.shape_env
    return int((env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val)[symbol])


def group_store(group: Any) -> Any:
    """The key-value store through which the ranks of a process group found each other."""
    return torch.distributed.distributed_c10d._world.pg_map[group][1]
