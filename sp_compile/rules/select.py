"""A few rows out of the token dim: each comes from the rank that holds it, and only those rows cross."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.placements import REPLICATE, Partial, Placement, Shard
from sp_compile.rules.base import Call, NoRule, Outcome, only_input, output_shape
from sp_compile.symbols import length_input


def select_rows(call: Call, source: fx.Node, dim: int, index: Any, squeeze: bool = False) -> Outcome:
    """Replace the call by :func:`sp_compile.ops.select_rows`, whose output is ``Partial("sum")``.

    Applies when the number of rows taken does not grow with the token length; otherwise a gather costs less.
    """
    placement = only_input(call, source)
    if (placement.outer, placement.inner, placement.order) != (1, 1, ""):
        raise NoRule("selects rows of a merged token dim")
    if not squeeze and call.tokens in output_shape(call.node)[dim].free_symbols:
        raise NoRule("takes a range of the token dim that grows with it")
    if not source.meta["val"].dtype.is_floating_point:
        raise NoRule("selects rows of integers")
    if isinstance(index, slice) and index.step != 1:
        raise NoRule("takes every n-th token")

    count = 1 if squeeze else call.node.meta["val"].shape[dim]

    def build(graph: fx.Graph) -> fx.Node:
        rows = index if isinstance(index, fx.Node) else _row_numbers(graph, index, call, count)
        chosen = graph.call_function(ops.select_rows, (source, rows, dim))
        chosen.meta["placement"] = Partial("sum")
        value = call.node.meta["val"]
        if not squeeze:
            chosen.meta["val"] = value
            return chosen
        with value.fake_mode:
            chosen.meta["val"] = value.unsqueeze(dim)
        node = graph.call_function(torch.ops.aten.squeeze.dim, (chosen, dim))
        node.meta["val"] = value
        return node

    needs: dict[fx.Node, Placement] = {source: Shard(dim)}
    if isinstance(index, fx.Node):
        needs[index] = REPLICATE
    return Outcome(Partial("sum"), needs, substitute=build)


def selected(call: Call) -> Outcome:
    """:func:`sp_compile.ops.select_rows` itself: each rank has the rows that it holds, the sum has all."""
    source, rows, dim = call.node.args
    if only_input(call, source) != Shard(dim):
        raise NoRule("selects along another dim")
    return Outcome(Partial("sum"), {rows: REPLICATE} if isinstance(rows, fx.Node) else {})


def _row_numbers(graph: fx.Graph, index: Any, call: Call, count: Any) -> fx.Node:
    length, value = length_input(graph, call.tokens), call.tensors[0].meta["val"]
    assert length is not None, "a symbolic token length is an input"
    start = (index.start or 0) if isinstance(index, slice) else index
    rows = graph.call_function(ops.row_numbers, (start, count, length), {"device": value.device})
    rows.meta["placement"] = REPLICATE
    with value.fake_mode:
        rows.meta["val"] = torch.empty(count, dtype=torch.int64, device=value.device)
    return rows
