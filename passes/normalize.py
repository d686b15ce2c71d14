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

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sp_compile.invariants import CANONICAL, FUNCTIONAL
from sp_compile.pipeline import Pass
from sp_compile.program import Program
from sp_compile.symbols import expr, is_tensor, shape_of

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
            if node.op == "call_function" and _does_nothing(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        graph.eliminate_dead_code()


_ASSERTIONS = (aten._assert_tensor_metadata.default, aten._assert_async.msg, aten.sym_constrain_range.default)
_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default,
           aten.lift_fresh_copy.default)  # fmt: skip
_SHAPES = (aten.reshape.default, aten.expand.default, aten.repeat.default)


def _does_nothing(node: fx.Node) -> bool:
    if not node.args or not is_tensor(node.args[0]) or not is_tensor(node):
        return False
    source, value = node.args[0].meta["val"], node.meta["val"]
    same_shape = shape_of(node) == shape_of(node.args[0])
    if node.target in _COPIES:
        return True
    if node.target in _SHAPES or node.target is aten.slice.Tensor:
        return same_shape and _is_whole(node)
    if node.target is aten.dropout.default:
        return node.args[1] == 0.0 or not node.args[2]
    if node.target in (aten.type_as.default, aten._to_copy.default, aten.to.dtype):
        return bool(source.dtype == value.dtype and source.device == value.device)
    return False


def _is_whole(node: fx.Node) -> bool:
    return node.target is not aten.slice.Tensor or (len(node.args) < 5 and node.args[2] in (0, None))


def _token_length(program: Program, node: fx.Node) -> None:
    """Sizes of the token dim read the global length, not a tensor that will be cut."""
    if program.tokens is None or expr(node.meta["val"]) != program.tokens:
        return
    for length in program.graph.find_nodes(op="placeholder"):
        if isinstance(length.meta["val"], torch.SymInt) and expr(length.meta["val"]) == program.tokens:
            node.replace_all_uses_with(length)
            program.graph.erase_node(node)
            return


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
