"""Replace every change of placement by index selections and functional collectives.

Requires: ``gathered_once``, ``placed``.
Establishes: ``lowered``.
Breaks: all that is said of redistributes and placements.

Collectives run over rows: the token dim comes first, so ranks stack in padded SP order without a copy.

Before::

    %all: f32[T, 64] Gathered(0) = redistribute(%rows)
    %whole: f32[1, T, 128] Replicate = redistribute(%logits)

After::

    %all = c10d.all_gather_into_tensor(%rows, 2, 'sp'); %wait = c10d.wait_tensor(%all)
    ...; %whole = aten.index_select(%gathered, 0, %restore_index), permuted back
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.invariants import GATHERED_ONCE, KEYS_PADDED, LOWERED, PLACED, RESTORED, TOKENS_SHARDED
from sp_compile.pipeline import Pass
from sp_compile.placements import (
    LOCAL_ROWS,
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
c10d = torch.ops._c10d_functional
_exchange_rows = torch.ops.sp_compile.exchange_rows.default


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
            builder = _Builder(program, node)
            with program.graph.inserting_before(node):
                result = lower(builder, node)
            if result is not node.args[0]:
                result.meta["placement"] = placement(node)
            node.replace_all_uses_with(result)
            program.graph.erase_node(node)
        program.remove_dead_code()


@dataclass
class _Builder:
    program: Program
    origin: fx.Node

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.program.graph.call_function(target, args)
        node.meta["stack_trace"] = self.origin.meta.get("stack_trace")
        return node

    def index(self, name: str) -> fx.Node:
        return self.program.index_input(name)

    def rows_first(self, node: fx.Node, shard: Shard) -> tuple[fx.Node, int]:
        """The value with its token rows alone in dim 0, and the dim they came from."""
        split = (shard.outer, shard.inner) != (1, 1)
        dim = shard.dim + 1 if split else shard.dim
        if split:
            node = self.call(aten.unflatten.int, node, shard.dim, [shard.outer, -1, shard.inner])
        return (self.call(aten.movedim.int, node, dim, 0) if dim else node), dim

    def rows_back(self, node: fx.Node, shard: Shard, dim: int) -> fx.Node:
        """Undo :meth:`rows_first`."""
        node = self.call(aten.movedim.int, node, 0, dim) if dim else node
        if (shard.outer, shard.inner) != (1, 1):
            node = self.call(aten.flatten.using_ints, node, shard.dim, shard.dim + 2)
        return node

    def _dense(self, rows: fx.Node) -> fx.Node:
        dense = self.call(aten.clone.default, rows)
        dense.kwargs = {"memory_format": torch.contiguous_format}
        return dense

    def all_gather(self, rows: fx.Node) -> fx.Node:
        """Rows of all ranks, stacked."""
        dense = self._dense(rows)
        if self.program.sp == 1:
            return dense
        gathered = self.call(c10d.all_gather_into_tensor.default, dense, self.program.sp, self.program.group_name)
        return self.call(c10d.wait_tensor.default, gathered)

    def constant(self, lists: Sequence[Sequence[int]]) -> fx.Node:
        """Numbers of heads as a tensor."""
        value = torch.tensor(lists, device=self.origin.meta["val"].device)
        name = f"heads_{hashlib.sha256(str(lists).encode()).hexdigest()[:8]}"
        if not hasattr(self.program.gm, name):
            self.program.gm.register_buffer(name, value, persistent=False)
        node = self.program.graph.get_attr(name)
        node.meta["val"] = value
        return node

    def to_heads(self, source: fx.Node, lists: Sequence[Sequence[int]]) -> fx.Node:
        """The rank's heads of everyone's rows, ``[batch, heads, sp * rows, dim]``, from all heads of the rank's."""
        sp, own = len(lists), len(lists[0])
        sent = [head for each in lists for head in each]
        if sent != [*range(int(self.origin.meta["val"].shape[1]))]:
            flat = self.call(aten.flatten.using_ints, self.constant(lists))
            source = self.call(aten.index_select.default, source, 1, flat)
        parts = self.call(aten.unflatten.int, source, 1, [sp, own])
        ranks_first = self.call(aten.permute.default, parts, [1, 3, 0, 2, 4])  # rank, row, batch, head, dim
        rows = self.call(aten.flatten.using_ints, ranks_first, 0, 1)
        return self.call(aten.permute.default, self.all_to_all(rows, "local_index"), [1, 2, 0, 3])

    def from_heads(self, source: fx.Node, lists: Sequence[Sequence[int]]) -> fx.Node:
        """All heads of the rank's rows; a log-sum-exp has no last dim."""
        sp, heads = len(lists), 1 + max(head for each in lists for head in each)
        scalar = len(shape_of(source)) == 3
        value = self.call(aten.unsqueeze.default, source, -1) if scalar else source
        rows = self.all_to_all(self.call(aten.permute.default, value, [2, 0, 1, 3]), "local_index")
        parts = self.call(aten.unflatten.int, rows, 0, [sp, -1])  # rank, row, batch, head, dim
        together = self.call(aten.permute.default, parts, [2, 0, 3, 1, 4])
        value = self.call(aten.flatten.using_ints, together, 1, 2)
        if sum(map(len, lists)) != heads:
            value = self.call(aten.slice.Tensor, value, 1, 0, heads)
        return self.call(aten.squeeze.dim, value, -1) if scalar else value

    def all_to_all(self, rows: fx.Node, picked: str) -> fx.Node:
        """The r-th part of every rank's rows on rank r, stacked; ``picked`` is the index input with its rows."""
        dense = self._dense(rows)
        if self.program.sp == 1:
            return dense
        rank_rows = [self.call(aten.sym_size.int, self.index(picked), 0)] * self.program.sp
        args = (dense, rank_rows, rank_rows, self.program.group_name)
        return self.call(c10d.wait_tensor.default, self.call(c10d.all_to_all_single.default, *args))

    def exchange(self, rows: fx.Node, reach: str) -> fx.Node:
        """The rows of others that this rank's queries see."""
        sent = self.call(aten.index_select.default, rows, 0, self.index(f"fetch_rows_{reach}"))
        counts, received = self.index(f"fetch_counts_{reach}"), self.index(f"fetched_rows_{reach}")
        return self.call(_exchange_rows, sent, counts, received, self.program.group_name)

    def all_reduce(self, node: fx.Node) -> fx.Node:
        """Sum over ranks."""
        if self.program.sp == 1:
            return node
        reduced = self.call(c10d.all_reduce.default, node, "sum", self.program.group_name)
        return self.call(c10d.wait_tensor.default, reduced)


def _redistribute(build: _Builder, node: fx.Node) -> fx.Node:
    source: Any = node.args[0]
    held, wanted = placement(source), placement(node)
    match held, wanted:
        case Replicate(), Shard(order=""):
            return _cut(build, source, wanted)
        case Shard(), Gathered(of=of) if of == LOCAL_ROWS:
            return source
        case Shard(order="", rows=0), Gathered(of=of) if of:
            rows, dim = build.rows_first(source, held)
            fetched = build.exchange(rows, of.rpartition("_")[2])
            return build.rows_back(build.call(aten.cat.default, [rows, fetched]), held, dim)
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
            return build.to_heads(source, wanted.lists)
        case Heads(), Shard():
            return build.from_heads(source, held.lists)
        case Replicate() | Gathered(), Heads():
            rank = build.call(aten.reshape.default, build.index("rank"), [1])
            own = build.call(aten.index_select.default, build.constant(wanted.lists), 0, rank)
            own = build.call(aten.flatten.using_ints, own)
            return build.call(aten.index_select.default, source, wanted.dim, own)
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
            build.program.graph.erase_node(whole) if not whole.users else None
            return _cut(build, gathered, wanted)
        case Partial(), Replicate():
            return build.all_reduce(source)
    raise AssertionError(f"no way from {describe(held)} to {describe(wanted)}")


def _cut(build: _Builder, source: fx.Node, wanted: Shard) -> fx.Node:
    local = build.index("local_index")
    if (wanted.outer, wanted.inner) == (1, 1):
        return build.call(aten.index_select.default, source, wanted.dim, local)
    split = build.call(aten.unflatten.int, source, wanted.dim, [wanted.outer, -1, wanted.inner])
    rows = build.call(aten.index_select.default, split, wanted.dim + 1, local)
    return build.call(aten.flatten.using_ints, rows, wanted.dim, wanted.dim + 2)


def _select_rows(build: _Builder, node: fx.Node) -> fx.Node:
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


def _exchange_partials(build: _Builder, node: fx.Node) -> fx.Node:
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
    return build.call(_pair, own, build.call(aten.squeeze.dim, sums, -1))


def _pair(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return first, second


def _row_numbers(build: _Builder, node: fx.Node) -> fx.Node:
    start, count, length = node.args
    rows = build.call(aten.arange.default, count)
    rows.kwargs = {"device": node.kwargs["device"]}
    rows = build.call(aten.add.Tensor, rows, start)
    return build.call(aten.add.Tensor, rows, length) if isinstance(start, int) and start < 0 else rows


_LOWERINGS: dict[Any, Callable[[_Builder, fx.Node], fx.Node]] = {
    ops.redistribute: _redistribute,
    ops.select_rows: _select_rows,
    ops.exchange_partials: _exchange_partials,
    ops.row_numbers: _row_numbers,
}
