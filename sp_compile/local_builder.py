"""Nodes of a rank's graph that bring rows, or heads of all rows, to other ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from sp_compile.collectives import EXCHANGE
from sp_compile.placements import Heads, Shard
from sp_compile.program import Program
from sp_compile.symbols import shape_of, tensors_of

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


@dataclass
class LocalBuilder:
    """Adds nodes to the graph of a rank where it inserts.

    Attributes:
        program: whose graph it is.
        origin: the node in whose place they are, of whose source line they are told.
    """

    program: Program
    origin: fx.Node

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A call of an op."""
        node = self.program.graph.call_function(target, args)
        node.meta["stack_trace"] = self.origin.meta.get("stack_trace")
        return node

    def index(self, name: str) -> fx.Node:
        """An index input."""
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
