"""Replace every change of placement by index selections, functional collectives and exchanges of rows.

Requires: ``gathered_once``, ``placed``.
Establishes: ``lowered``.
Breaks: all that is said of redistributes and placements.

Collectives run over rows: the token dim comes first, so ranks stack in padded SP order without a copy.

Before::

    %all: f32[T, 64] Gathered(0) = redistribute(%rows)
    %near: f32[T, 64] Gathered(0, reach_0) = redistribute(%rows)
    %whole: f32[1, T, 128] Replicate = redistribute(%logits)

After::

    %all = c10d.all_gather_into_tensor(%rows, 2, 'sp'); %wait = c10d.wait_tensor(%all)
    %others = sp_compile.exchange_rows(%rows, ...); %wait_1 = c10d.wait_tensor(%others)
    %near = aten.cat([%rows, %wait_1])
    ...; %whole = aten.index_select(%gathered, 0, %restore_index), permuted back
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.invariants import GATHERED_ONCE, KEYS_PADDED, LOWERED, PLACED, RESTORED, TOKENS_SHARDED
from sp_compile.local_builder import LocalBuilder
from sp_compile.pipeline import Pass
from sp_compile.placements import (
    LOCAL_ROWS,
    NODE_ROWS,
    Gathered,
    Heads,
    Held,
    Kept,
    Partial,
    Picked,
    QueriesByKeys,
    Replicate,
    Shard,
    describe,
)
from sp_compile.program import Program, gathered_index, placement
from sp_compile.symbols import shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerRedistributes(Pass):
    """Collectives and index selections only."""

    name = "lower_redistributes"
    requires = (GATHERED_ONCE, PLACED)
    establishes = (LOWERED,)
    breaks = (PLACED, KEYS_PADDED, RESTORED, GATHERED_ONCE, TOKENS_SHARDED)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        for node in list(program.graph.nodes):
            lower = _LOWERINGS.get(node.target) if node.op == "call_function" else None
            if lower is None:
                continue
            builder = LocalBuilder(program, node)
            with program.graph.inserting_before(node):
                result = lower(builder, node)
            if isinstance(result, fx.Node):
                _replace(node, result)
                continue
            for part in [*node.users]:
                assert isinstance(part.args[1], int)
                _replace(part, result[part.args[1]])
            program.graph.erase_node(node)
        program.remove_dead_code()


def _replace(node: fx.Node, result: fx.Node) -> None:
    if result is not node.args[0]:
        result.meta["placement"] = placement(node)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _redistribute(build: LocalBuilder, node: fx.Node) -> fx.Node:
    source: Any = node.args[0]
    held, wanted = placement(source), placement(node)
    match held, wanted:
        case Replicate(), Shard(order=""):
            return _cut(build, source, wanted)
        case Shard(), Gathered(of=of) if of == LOCAL_ROWS:
            return source
        case Shard(order="", rows=0), Gathered(of=of) if of == NODE_ROWS:
            rows, dim = build.rows_first(source, held)
            return build.rows_back(build.of_node(rows), held, dim)
        case Shard(order="", rows=0), Gathered(of=of) if of:
            rows, dim = build.rows_first(source, held)
            kind, _, number = of.rpartition("_")
            found = build.exchange(rows, number)
            if kind == "reach":
                found = build.call(aten.cat.default, [rows, found])
            return build.rows_back(found, held, dim)
        case Shard(order="", rows=0), Replicate() | Gathered():
            rows, dim = build.rows_first(source, held)
            rows = build.all_gather(rows)
            if isinstance(wanted, Replicate):
                rows = build.call(aten.index_select.default, rows, 0, build.index("restore_index"))
            return build.rows_back(rows, held, dim)
        case Gathered(), Replicate():
            return build.call(aten.index_select.default, source, held.dim, build.index("restore_index"))
        case Shard(order="") | Held(), Picked():
            if source.meta["val"].element_size() == 1:  # fp8, of which torch selects no rows
                source = build.call(aten.view.dtype, source, torch.uint8)
            return build.call(aten.index_select.default, source, wanted.dim, build.index(f"picked_{wanted.of}"))
        case Picked(), Gathered():
            rows, dim = build.rows_first(source, Shard(held.dim))
            return build.rows_back(build.all_gather(rows), Shard(held.dim), dim)
        case Shard(dim=2, order="", rows=0), Heads():
            return build.to_heads([source], [wanted])[0]
        case Heads(), Shard():
            return build.from_heads(source, held.lists)
        case Replicate() | Gathered(), Heads():
            return build.own_heads(source, wanted)
        case Replicate(), Gathered():
            return build.call(aten.index_select.default, source, wanted.dim, build.index(gathered_index(wanted)))
        case Replicate(), Held():
            return build.call(aten.index_select.default, source, wanted.dim, build.index(f"held_index_{wanted.shelf}"))
        case Gathered(), Kept():
            return build.call(aten.index_select.default, source, wanted.dim, build.index("kept_rows"))
        case Shard(), QueriesByKeys():
            order = gathered_index(Gathered(wanted.keys, wanted.of))
            return build.call(aten.index_select.default, source, wanted.keys, build.index(order))
        case Shard(order=""), Shard(order=""):
            whole = build.call(ops.redistribute, source)
            whole.meta.update(placement=Replicate(), val=source.meta.get("val"))
            gathered = _redistribute(build, whole)
            if not whole.users:
                build.program.graph.erase_node(whole)
            return _cut(build, gathered, wanted)
        case Partial(), Replicate():
            return build.all_reduce(source)
    raise AssertionError(f"no way from {describe(held)} to {describe(wanted)}")


def _spread_heads(build: LocalBuilder, node: fx.Node) -> list[fx.Node]:
    return build.to_heads([*node.args], placement(node))


def _cut(build: LocalBuilder, source: fx.Node, wanted: Shard) -> fx.Node:
    local = build.index("local_index")
    if (wanted.outer, wanted.inner) == (1, 1):
        return build.call(aten.index_select.default, source, wanted.dim, local)
    split = build.call(aten.unflatten.int, source, wanted.dim, [wanted.outer, -1, wanted.inner])
    rows = build.call(aten.index_select.default, split, wanted.dim + 1, local)
    return build.call(aten.flatten.using_ints, rows, wanted.dim, wanted.dim + 2)


def _select_rows(build: LocalBuilder, node: fx.Node) -> fx.Node:
    """Each rank adds the wanted rows that it holds, the others add zero."""
    source, rows, dim = node.args
    if not isinstance(placement(source), Shard):
        return build.call(aten.index_select.default, source, dim, rows)
    tokens = build.program.length_input()
    positive = build.call(
        aten.add.Tensor, rows, build.call(aten.mul.Tensor, build.call(aten.lt.Scalar, rows, 0), tokens)
    )
    if build.program.cached:  # rows are numbered with those of earlier calls, and not in the order of the batch
        ordered = build.call(aten.sort.default, build.index("new_rows"))
        at = build.call(aten.searchsorted.Tensor, build.call(getitem, ordered, 0), positive)
        positive = build.call(aten.index_select.default, build.call(getitem, ordered, 1), 0, at)
    padded = build.call(aten.index_select.default, build.index("restore_index"), 0, positive)
    length = build.call(aten.sym_size.int, build.index("local_index"), 0)
    own = build.call(aten.sub.Tensor, padded, build.call(aten.mul.Tensor, build.index("rank"), length))
    held = build.call(
        aten.logical_and.default, build.call(aten.ge.Scalar, own, 0), build.call(aten.lt.Scalar, own, length)
    )
    safe = build.call(aten.mul.Tensor, own, held)
    found = build.call(aten.index_select.default, source, dim, safe)
    trailing = len(shape_of(source)) - dim - 1
    mask = build.call(aten.reshape.default, held, [-1] + [1] * trailing)
    return build.call(aten.where.ScalarOther, mask, found, 0.0)


def _sum_rows(build: LocalBuilder, node: fx.Node) -> fx.Node:
    """The sum over the rank's own rows, of which those that are no tokens count as 0."""
    source, dims, keepdim = node.args
    shard = placement(source)
    if isinstance(shard, Shard):
        valid = build.index("local_valid")
        if (shard.outer, shard.inner) != (1, 1):
            parts = build.call(aten.reshape.default, valid, [1, -1, 1])
            parts = build.call(aten.expand.default, parts, [shard.outer, -1, shard.inner])
            valid = build.call(aten.flatten.using_ints, parts)
        trailing = len(shape_of(source)) - shard.dim - 1
        mask = build.call(aten.reshape.default, valid, [-1] + [1] * trailing)
        source = build.call(aten.where.ScalarOther, mask, source, 0)
    return build.call(aten.sum.dim_IntList, source, dims, keepdim)


def _exchange_partials(build: LocalBuilder, node: fx.Node) -> list[fx.Node]:
    """Outputs and log-sum-exps travel together, with the rows in front; an exponent of fp32 is two numbers of bf16."""
    out, lse = node.args
    dtype, wide = out.meta["val"].dtype, lse.meta["val"].dtype
    width = out.meta["val"].shape[-1]
    parts = build.call(aten.unsqueeze.default, lse, -1)
    if dtype != wide:
        parts = build.call(aten.view.dtype, build.call(aten.contiguous.default, parts), dtype)
    packed = build.call(aten.cat.default, [out, parts], -1)
    rows = build.call(aten.permute.default, packed, [2, 0, 1, 3])
    picked = placement(out).of
    received = build.all_to_all(rows, f"picked_{picked}" if picked else "local_index")
    moved = build.call(aten.unflatten.int, received, 0, [build.program.sp, -1])
    moved = build.call(aten.permute.default, moved, [0, 2, 3, 1, 4])
    own = build.call(aten.slice.Tensor, moved, -1, 0, width)
    sums = build.call(aten.slice.Tensor, moved, -1, width)
    if dtype != wide:
        sums = build.call(aten.view.dtype, build.call(aten.contiguous.default, sums), wide)
    return [own, build.call(aten.squeeze.dim, sums, -1)]


def _row_numbers(build: LocalBuilder, node: fx.Node) -> fx.Node:
    start, count, length = node.args
    rows = build.call(aten.arange.default, count)
    rows.kwargs = {"device": node.kwargs["device"]}
    rows = build.call(aten.add.Tensor, rows, start)
    return build.call(aten.add.Tensor, rows, length) if isinstance(start, int) and start < 0 else rows


_LOWERINGS: dict[Any, Callable[[LocalBuilder, fx.Node], fx.Node | list[fx.Node]]] = {
    ops.redistribute: _redistribute,
    ops.spread_heads: _spread_heads,
    ops.select_rows: _select_rows,
    ops.sum_rows: _sum_rows,
    ops.exchange_partials: _exchange_partials,
    ops.row_numbers: _row_numbers,
}
