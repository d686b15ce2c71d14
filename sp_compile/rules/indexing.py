"""Look-ups: embeddings, advanced indexing, gather and scatter."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sp_compile.placements import REPLICATE, Placement, Shard
from sp_compile.rules.base import Call, NoRule, Outcome, align, only_input, output_shape, rank_of
from sp_compile.rules.select import select_rows
from sp_compile.symbols import is_tensor, shape_of


def embedding(call: Call) -> Outcome:
    """Rows of a table at sharded indices."""
    weight, ids = call.node.args[:2]
    return Outcome(only_input(call, ids).at(only_input(call, ids).dim), {weight: REPLICATE})


def index(call: Call) -> Outcome:
    """Advanced indexing: sharded indices into a replicated table, a sharded table indexed elsewhere, own rows."""
    source: fx.Node = call.node.args[0]
    indices: list[Any] = list(call.node.args[1])
    used = [dim for dim, each in enumerate(indices) if each is not None]
    tensors = [indices[dim] for dim in used]
    if any(_is_mask(each) and rank_of(each) != 1 for each in tensors):
        raise NoRule("indexes by a mask of several dims")
    adjacent = used == list(range(used[0], used[-1] + 1))  # otherwise the indices' dims come first
    start = used[0] if adjacent else 0
    width = max(rank_of(each) for each in tensors)
    table = call.shard(source)
    if any(_is_mask(each) and call.shard(each) is not None for each in tensors) or (
        table is not None and table.dim in used and _is_mask(indices[table.dim])
    ):
        raise NoRule("a mask chooses tokens")
    if table is None:
        span = output_shape(call.node)[start : start + width]
        placement, needs = align(call, tensors, span)
        if placement.rows or any(shard.rows for _, shard in call.sharded()):
            raise NoRule("own row numbers into a replicated table")
        return Outcome(placement.at(placement.dim + start), {**needs, source: REPLICATE})
    if table.dim not in used:
        before = sum(dim < table.dim for dim in used)
        moved = table.dim - before + (width if not adjacent or table.dim > start else 0)
        return Outcome(table.at(moved), dict.fromkeys(tensors, REPLICATE))
    chosen = call.shard(indices[table.dim])
    if chosen is None:
        if len(used) > 1 or width != 1:
            raise NoRule("indexes the token dim together with others")
        return select_rows(call, source, table.dim, indices[table.dim])
    if chosen.rows != table.outer * table.inner or chosen.of != table.order or len(used) > 1:
        raise NoRule("indexes tokens of other ranks")
    return Outcome(Shard(chosen.dim + start, chosen.outer, chosen.inner, chosen.order))


def _is_mask(index: fx.Node) -> bool:
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


def index_put(call: Call) -> Outcome:
    """Rows of one other dim than the tokens' overwritten: both tensors are cut alike."""
    into, indices, values = call.node.args[:3]
    used = [dim for dim, each in enumerate(indices) if each is not None]
    placement = call.first_shard()
    (dim, *others), index = used, indices[used[0]]
    if others or rank_of(index) != 1:
        raise NoRule("overwrites elements of several dims")
    if rank_of(values) != rank_of(into):
        raise NoRule("the values broadcast")
    if placement.dim == dim or call.shard(index) is not None:
        raise NoRule("overwrites tokens")
    target = placement.at(placement.dim)
    return Outcome(target, {into: target, values: target, index: REPLICATE})


def index_select(call: Call) -> Outcome:
    """Rows along one dim."""
    source, dim, rows = call.node.args[:3]
    placement = only_input(call, source)
    dim = int(dim) % rank_of(source)
    if dim == placement.dim:
        return select_rows(call, source, dim, rows)
    return Outcome(placement.at(placement.dim), {rows: REPLICATE})


def same_place(call: Call) -> Outcome:
    """``gather`` and ``scatter`` along another dim than the tokens': every tensor is cut alike."""
    values = call.arguments()
    source, dim = values["self"], values["dim"] % rank_of(values["self"])
    placement = call.first_shard()
    if placement.dim == dim:
        raise NoRule("looks up along the token dim")
    needs: dict[fx.Node, Placement] = {}
    for node in (source, values["index"], values.get("src")):
        if is_tensor(node):
            if shape_of(node)[placement.dim] != shape_of(source)[placement.dim]:
                raise NoRule("the index covers only part of the tokens")
            needs[node] = placement.at(placement.dim)
    return Outcome(placement.at(placement.dim), needs)
