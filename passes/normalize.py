"""Bring the graph to canonical ATen: one op per meaning and no op that does nothing.

Requires: nothing.
Establishes: ``functional``, ``canonical``.

Before::

    %slice: f32[1, T, 64] = aten.slice(%x, 1, 0, 9223372036854775807)
    %view: f32[T, 64] = aten.view(%slice, [%tokens, 64])

After::

    %view: f32[T, 64] = aten.reshape(%x, [%tokens, 64])
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sp_compile.invariants import CANONICAL, FUNCTIONAL
from sp_compile.pipeline import Pass
from sp_compile.program import Program
from sp_compile.symbols import coefficient, expr, is_tensor, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Normalize(Pass):
    """Canonical ATen without no-ops."""

    name = "normalize"
    establishes = (FUNCTIONAL, CANONICAL)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        graph = program.graph
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _ASSERTIONS:
                graph.erase_node(node)
            elif node.target in _SYNONYMS:
                node.target = _SYNONYMS[node.target]
            elif node.target is aten.cat.default:
                _drop_empty(node)
            elif node.target is aten.copy.default:
                _to_copied(node)
            elif node.target in _FILLS:
                _to_full(program, node)
            elif node.target is aten.broadcast_to.default:
                node.target = aten.expand.default
            elif node.target is aten.unflatten.int:
                _to_reshape(program, node)
            elif node.target in (aten.view.default, aten._unsafe_view.default):
                node.target = aten.reshape.default
            elif node.target is aten.pad.default and (*node.args, "constant")[2] == "constant":
                node.args = (*node.args[:2], node.args[3] if len(node.args) > 3 else 0.0)
                node.target = aten.constant_pad_nd.default
            elif node.target is aten.sym_size.int:
                _token_length(program, node)
            elif node.target is aten.index_put.default:
                _inverse_permutation(graph, node)
        for node in list(graph.nodes):
            same = _same_value(node, program.differentiable)
            if same is not None:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
        program.remove_dead_code()


_ASSERTIONS = (aten._assert_tensor_metadata.default, aten._assert_async.msg, aten.sym_constrain_range.default)
_SYNONYMS = {
    getattr(getattr(aten, name), overload): getattr(getattr(aten, meaning), overload)
    for name, meaning in {
        "multiply": "mul",
        "divide": "div",
        "subtract": "sub",
        "greater": "gt",
        "greater_equal": "ge",
        "less": "lt",
        "less_equal": "le",
        "not_equal": "ne",
        "absolute": "abs",
        "negative": "neg",
    }.items()
    for overload in getattr(aten, name).overloads()
    if overload in getattr(aten, meaning).overloads()
}
_FILLS = {aten.zeros_like.default: 0, aten.ones_like.default: 1, aten.full_like.default: None}
_COPIES = (aten.clone.default, aten.alias.default, aten.contiguous.default,
           aten.lift_fresh_copy.default)  # fmt: skip
_CASTS = (aten.type_as.default, aten._to_copy.default, aten.to.dtype, aten.cat.default)
_SHAPES = (aten.reshape.default, aten.expand.default, aten.repeat.default)


def _same_value(node: fx.Node, differentiable: bool) -> fx.Node | None:
    """The input that the node repeats, if it changes nothing; of gradients, that they end, where they are wanted."""
    if node.op != "call_function" or not node.args or not is_tensor(node):
        return None
    parts: Any = node.args[0]
    source = parts[0] if node.target is aten.cat.default and len(parts) == 1 else parts
    return source if is_tensor(source) and _changes_nothing(node, source, differentiable) else None


def _changes_nothing(node: fx.Node, source: fx.Node, differentiable: bool) -> bool:
    before, after = source.meta["val"], node.meta["val"]
    same_type = before.dtype == after.dtype and before.device == after.device
    if node.target in _COPIES:
        return True
    if node.target is aten.detach.default:
        return not differentiable
    if node.target in _SHAPES or node.target is aten.slice.Tensor:
        return shape_of(node) == shape_of(source) and _is_whole(node)
    if node.target is aten.dropout.default:
        return node.args[1] == 0.0 or not node.args[2]
    return node.target in _CASTS and bool(same_type)


def _is_whole(node: fx.Node) -> bool:
    return node.target is not aten.slice.Tensor or (len(node.args) < 5 and node.args[2] in (0, None))


def _drop_empty(node: fx.Node) -> None:
    """Concatenation with nothing, as a cache without tokens does it."""
    parts: Any = node.args[0]
    held = [each for each in parts if 0 not in shape_of(each)]
    if held and len(held) < len(parts):
        node.args = (held, *node.args[1:])


def _to_full(program: Program, node: fx.Node) -> None:
    """A constant does not depend on the tensor that lends its shape."""
    value, shape = node.meta["val"], _shape_arguments(program, node)
    if shape is None:
        return
    fill: Any = node.args[1] if _FILLS[node.target] is None else _FILLS[node.target]
    node.target, node.args = aten.full.default, (shape, fill)
    node.kwargs = {"dtype": value.dtype, "device": value.device}


def _to_copied(node: fx.Node) -> None:
    """What is copied over a whole tensor does not depend on what was there."""
    source, value = node.args[1], node.meta["val"]
    assert isinstance(source, fx.Node)
    if shape_of(source) == shape_of(node) and source.meta["val"].device == value.device:
        node.target, node.args, node.kwargs = aten.to.dtype, (source, value.dtype), {}


def _to_reshape(program: Program, node: fx.Node) -> None:
    shape = _shape_arguments(program, node)
    if shape is not None:
        node.target, node.args = aten.reshape.default, (node.args[0], shape)


def _shape_arguments(program: Program, node: fx.Node) -> list[Any] | None:
    """The node's shape as arguments; None where a size is neither a number nor the token length."""
    sizes = [program.length_input() if size == program.tokens else size for size in shape_of(node)]
    if any(each is None or (isinstance(each, sympy.Expr) and not each.is_Integer) for each in sizes):
        return None
    return [int(each) if isinstance(each, sympy.Expr) else each for each in sizes]


def _token_length(program: Program, node: fx.Node) -> None:
    """Sizes of the token dim read the global length, not a tensor that will be cut."""
    length, times = program.length_input(), coefficient(expr(node.meta["val"]), program.tokens)
    if length is None or not times:
        return
    if times > 1:
        with program.graph.inserting_before(node):
            length = program.graph.call_function(operator.mul, (length, times))
        length.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(length)
    program.graph.erase_node(node)


def _inverse_permutation(graph: fx.Graph, node: fx.Node) -> None:
    """``empty[p] = arange(n)`` inverts a permutation, as ``argsort`` does for any order of the rows."""
    _, indices, values = node.args[:3]
    index: Any = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
    is_range = isinstance(values, fx.Node) and values.target is aten.arange.default
    if not is_range or not is_tensor(index) or len(shape_of(index)) != 1 or shape_of(index) != shape_of(values):
        return
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.target not in (aten.empty_like.default, aten.new_empty.default):
        return
    if not _is_permutation(index):
        return
    with graph.inserting_before(node):
        inverse = graph.call_function(aten.argsort.default, (index,))
    inverse.meta.update(val=node.meta["val"], stack_trace=node.meta.get("stack_trace"))
    node.replace_all_uses_with(inverse)
    graph.erase_node(node)


def _is_permutation(index: fx.Node) -> bool:
    if index.target is aten.argsort.default:
        return True
    source = index.args[0] if index.args else None
    is_second = len(index.args) == 2 and index.args[1] == 1
    return is_second and isinstance(source, fx.Node) and source.target is aten.sort.default
