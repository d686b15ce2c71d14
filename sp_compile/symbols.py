"""Reading the token length out of symbolic shapes, and computing the values of nodes on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._guards import detect_fake_mode


def expr(size: int | torch.SymInt) -> sympy.Expr:
    """The size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def shape_of(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The node's global shape as sympy expressions; empty when it is not a tensor."""
    value = node.meta.get("val")
    return tuple(expr(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def is_tensor(node: Any) -> bool:
    """Whether the node carries one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that the node carries: one, those of a tuple, or none."""
    value = node.meta.get("val")
    return [each for each in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(each, torch.Tensor)]


def is_float(node: fx.Node) -> bool:
    """Whether any of the node's tensors holds real or complex numbers, not integers."""
    return any(each.dtype.is_floating_point or each.dtype.is_complex for each in tensors_of(node))


def coefficient(size: sympy.Expr, tokens: sympy.Symbol | None) -> int:
    """``c`` when the size is ``c * tokens``, else 0."""
    if tokens is None or tokens not in size.free_symbols:
        return 0
    quotient = size / tokens
    return int(quotient) if quotient.is_Integer else 0


def token_dims(node: fx.Node, tokens: sympy.Symbol | None) -> dict[int, int]:
    """Dims of the node whose size is a multiple of the token length, with the multiple."""
    found = {dim: coefficient(size, tokens) for dim, size in enumerate(shape_of(node))}
    return {dim: times for dim, times in found.items() if times}


def length_input(graph: fx.Graph, tokens: sympy.Symbol | None) -> fx.Node | None:
    """The placeholder that is the global token length."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == tokens:
            return node
    return None


def known_size(size: Any, values: Mapping[Any, Any]) -> int | None:
    """A size where symbols have these values; None where it depends on others."""
    number = size.node.expr.xreplace(values) if isinstance(size, torch.SymInt) else size
    return None if getattr(number, "free_symbols", None) else int(number)


def product(sizes: Sequence[sympy.Expr]) -> sympy.Expr:
    """Product of sizes, 1 for none."""
    result: sympy.Expr = sympy.Integer(1)
    for size in sizes:
        result = result * size
    return result


def computed(
    graph: fx.Graph, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, mode: Any = None
) -> fx.Node:
    """A new call where the graph inserts, with the value that it has on the fake values of its inputs.

    Args:
        mode: the fake mode, for calls without a tensor among their inputs.
    """
    node = graph.call_function(target, tuple(args), dict(kwargs or {}))
    own_args, own_kwargs = fx.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
    mode = mode or detect_fake_mode((own_args, own_kwargs))
    with mode or contextlib.nullcontext():
        node.meta["val"] = target(*own_args, **own_kwargs)
    return node
