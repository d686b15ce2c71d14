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

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.collectives import EXCHANGE
from sp_compile.invariants import GATHERED_ONCE, KEYS_PADDED, LOWERED, PLACED, RESTORED, TOKENS_SHARDED
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
from sp_compile.symbols import shape_of, tensors_of

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


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
        return self._gathered(rows, self.program.sp, self.program.group_name)

    def of_node(self, rows: fx.Node) -> fx.Node:
        """Rows of the ranks of the node, stacked."""
        assert self.program.nodes is not None
        return self._gathered(rows, self.program.nodes.size, self.program.nodes.inner)

    def _gathered(self, rows: fx.Node, ranks: int, group_name: str) -> fx.Node:
        dense = self._dense(rows)
        if ranks == 1:
            return dense
        gathered = self.call(c10d.all_gather_into_tensor.default, dense, ranks, group_name)
        return self.call(c10d.wait_tensor.default, gathered)

    def constant(self, lists: Sequence[Sequence[int]]) -> fx.Node:
        """Numbers of heads as a tensor."""
        value = torch.tensor(lists, device=tensors_of(self.origin)[0].device)
        name = f"heads_{hashlib.sha256(str(lists).encode()).hexdigest()[:8]}"
        if not hasattr(self.program.gm, name):
            self.program.gm.register_buffer(name, value, persistent=False)
        node = self.program.graph.get_attr(name)
        node.meta["val"] = value
        return node

    def to_heads(self, sources: Sequence[fx.Node], wanted: Sequence[Heads]) -> list[fx.Node]:
        """The rank's heads of everyone's rows, ``[batch, heads, rows, dim]``, from all heads of the rank's; in one."""
        nodes, ranks = self.program.nodes, len(wanted[0].lists)
        parts = [self._by_rank(each, heads.lists) for each, heads in zip(sources, wanted, strict=True)]
        widths = [math.prod(each.meta["val"].shape[dim] for dim in (0, 3)) * len(heads.lists[0])
                  for each, heads in zip(sources, wanted, strict=True)]  # fmt: skip
        within = nodes is not None and ranks != self.program.sp
        rows = self.all_to_all(self._joined(parts), "local_index", within)
        pieces = self._split(rows, widths)
        across = [i for i, heads in enumerate(wanted) if within and not heads.of]
        if across:
            assert nodes is not None
            joined = self._joined([pieces[i] for i in across])
            whole = self._gathered(joined, self.program.sp // nodes.size, nodes.outer)
            for i, each in zip(across, self._split(whole, [widths[i] for i in across]), strict=True):
                pieces[i] = each
        found = []
        for source, heads, piece in zip(sources, wanted, pieces, strict=True):
            batch, _, _, dim = source.meta["val"].shape
            shape = self.call(aten.unflatten.int, piece, 1, [batch, len(heads.lists[0]), dim])
            found.append(self.call(aten.permute.default, shape, [1, 2, 0, 3]))
        return found

    def _by_rank(self, source: fx.Node, lists: Sequence[Sequence[int]]) -> fx.Node:
        """What goes to each rank, one behind the other: ``[ranks * rows, batch * heads * dim]``."""
        sent = [head for each in lists for head in each]
        if sent != [*range(int(source.meta["val"].shape[1]))]:
            flat = self.call(aten.flatten.using_ints, self.constant(lists))
            source = self.call(aten.index_select.default, source, 1, flat)
        parts = self.call(aten.unflatten.int, source, 1, [len(lists), len(lists[0])])
        ranks_first = self.call(aten.permute.default, parts, [1, 3, 0, 2, 4])  # rank, row, batch, head, dim
        return self.call(aten.flatten.using_ints, self.call(aten.flatten.using_ints, ranks_first, 2, 4), 0, 1)

    def _joined(self, parts: Sequence[fx.Node]) -> fx.Node:
        return self.call(aten.cat.default, list(parts), 1) if len(parts) > 1 else parts[0]

    def _split(self, joined: fx.Node, widths: Sequence[int]) -> list[fx.Node]:
        if len(widths) == 1:
            return [joined]
        parts = self.call(aten.split_with_sizes.default, joined, list(widths), 1)
        return [self.call(getitem, parts, i) for i in range(len(widths))]

    def from_heads(self, source: fx.Node, lists: Sequence[Sequence[int]]) -> fx.Node:
        """All heads of the rank's rows; a log-sum-exp has no last dim."""
        ranks, heads = len(lists), 1 + max(head for each in lists for head in each)
        scalar = len(shape_of(source)) == 3
        value = self.call(aten.unsqueeze.default, source, -1) if scalar else source
        rows = self.call(aten.permute.default, value, [2, 0, 1, 3])
        rows = self.all_to_all(rows, "local_index", ranks != self.program.sp)
        parts = self.call(aten.unflatten.int, rows, 0, [ranks, -1])  # rank, row, batch, head, dim
        together = self.call(aten.permute.default, parts, [2, 0, 3, 1, 4])
        value = self.call(aten.flatten.using_ints, together, 1, 2)
        if sum(map(len, lists)) != heads:
            value = self.call(aten.slice.Tensor, value, 1, 0, heads)
        return self.call(aten.squeeze.dim, value, -1) if scalar else value

    def own_heads(self, source: fx.Node, wanted: Heads) -> fx.Node:
        """The rank's heads of what it has of all heads."""
        name = "rank" if len(wanted.lists) == self.program.sp else "node_rank"
        rank = self.call(aten.reshape.default, self.index(name), [1])
        own = self.call(aten.index_select.default, self.constant(wanted.lists), 0, rank)
        return self.call(aten.index_select.default, source, wanted.dim, self.call(aten.flatten.using_ints, own))

    def all_to_all(self, rows: fx.Node, picked: str, within: bool = False) -> fx.Node:
        """The r-th part of every rank's rows on rank r, stacked; ``picked`` is the index input with its rows.

        Args:
            within: among the ranks of a node.
        """
        dense = self._dense(rows)
        if self.program.sp == 1:
            return dense
        nodes = self.program.nodes
        ranks, name = (nodes.size, nodes.inner) if within and nodes else (self.program.sp, self.program.group_name)
        rank_rows = [self.call(aten.sym_size.int, self.index(picked), 0)] * ranks
        args = (dense, rank_rows, rank_rows, name)
        return self.call(c10d.wait_tensor.default, self.call(c10d.all_to_all_single.default, *args))

    def exchange(self, rows: fx.Node, fetch: str) -> fx.Node:
        """The rows of others that a fetch brings."""
        names = ("fetch_rows", "fetch_counts", "fetched_rows")
        index = [self.index(f"{name}_{fetch}") for name in names]
        return self.call(c10d.wait_tensor.default, self.call(EXCHANGE, rows, *index, self.program.group_name))

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
            build.program.graph.erase_node(whole) if not whole.users else None
            return _cut(build, gathered, wanted)
        case Partial(), Replicate():
            return build.all_reduce(source)
    raise AssertionError(f"no way from {describe(held)} to {describe(wanted)}")


def _spread_heads(build: _Builder, node: fx.Node) -> list[fx.Node]:
    return build.to_heads([*node.args], placement(node))


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


def _sum_rows(build: _Builder, node: fx.Node) -> fx.Node:
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


def _exchange_partials(build: _Builder, node: fx.Node) -> list[fx.Node]:
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


def _row_numbers(build: _Builder, node: fx.Node) -> fx.Node:
    start, count, length = node.args
    rows = build.call(aten.arange.default, count)
    rows.kwargs = {"device": node.kwargs["device"]}
    rows = build.call(aten.add.Tensor, rows, start)
    return build.call(aten.add.Tensor, rows, length) if isinstance(start, int) and start < 0 else rows


_LOWERINGS: dict[Any, Callable[[_Builder, fx.Node], fx.Node | list[fx.Node]]] = {
    ops.redistribute: _redistribute,
    ops.spread_heads: _spread_heads,
    ops.select_rows: _select_rows,
    ops.sum_rows: _sum_rows,
    ops.exchange_partials: _exchange_partials,
    ops.row_numbers: _row_numbers,
}
