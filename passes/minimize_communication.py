"""Gather nothing twice, and keys together with values, and with the queries that go to a cache.

Requires: ``keys_in_padded_order``, ``outputs_restored``.
Establishes: ``gathered_once``.

Before::

    %k_all: f32[1, 2, T, 16] Gathered(2) = redistribute(%k)
    %v_all: f32[1, 2, T, 16] Gathered(2) = redistribute(%v)

After::

    %cat: f32[T, 64] Shard(0) = aten.cat([%k_rows, %v_rows], 1)
    %redistribute: f32[T, 64] Gathered(0) = redistribute(%cat)
    %split = aten.split_with_sizes(%redistribute, [32, 32], 1)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.invariants import GATHERED_ONCE, KEYS_PADDED, RESTORED
from sp_compile.pipeline import Pass
from sp_compile.placements import Gathered, Heads, Picked, Placement, Shard, gathers_all
from sp_compile.program import Program, add_call, placement

aten = torch.ops.aten


@dataclass(frozen=True)
class MinimizeCommunication(Pass):
    """Each value gathered once; keys and values in one collective."""

    name = "minimize_communication"
    requires = (KEYS_PADDED, RESTORED)
    establishes = (GATHERED_ONCE,)

    join_keys_and_values: bool = True

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if not program.parallel:
            return
        self._gather_once(program)
        if self.join_keys_and_values:
            for node in ops.attention_nodes(program.graph):
                q, *keys_and_values = node.args[:3]
                to_cache = [user for user in q.users if _is_gather(user)]
                for k, v in zip(*map(_gathers, keys_and_values), strict=True):
                    if k is not v and all(map(_is_gather, (k, v))) and not _join(program, [k, v, *to_cache]):
                        _join(program, [k, v])
                _spread_together(program.graph, [q, *keys_and_values])
        program.remove_dead_code()

    def _gather_once(self, program: Program) -> None:
        """A value needed whole in both orders crosses once and is reordered locally."""
        gathers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in program.graph.find_nodes(op="call_function", target=ops.redistribute):
            if isinstance(placement(node.args[0]), Shard) and gathers_all(placement(node)):
                gathers[node.args[0]].append(node)
        for source, nodes in gathers.items():
            padded = [node for node in nodes if placement(node) == Gathered(placement(source).dim)]
            first = padded[0] if padded else nodes[0]
            if first is not min(nodes):
                min(nodes).prepend(first)
            for node in nodes:
                if node is first:
                    continue
                if placement(node) == placement(first):
                    node.replace_all_uses_with(first)
                    program.graph.erase_node(node)
                else:
                    node.args = (first,)


def _spread_together(graph: fx.Graph, moves: list[fx.Node]) -> None:
    """Spread the heads of queries, keys and values in one collective."""
    moves = [*dict.fromkeys(moves)]
    sources: list[Any] = [each.args[0] for each in moves]
    if any(each.target is not ops.redistribute or not isinstance(placement(each), Heads) for each in moves):
        return
    alike = {(placement(each), each.meta["val"].dtype) for each in sources}
    if len(moves) == 1 or len(alike) > 1 or not isinstance(placement(sources[0]), Shard):
        return
    with graph.inserting_before(max(moves).next):
        placed = tuple(map(placement, moves))
        spread = add_call(graph, ops.spread_heads, sources, placed, like=moves[0])
        for i, each in enumerate(moves):
            each.replace_all_uses_with(add_call(graph, getitem, (spread, i), placed[i]))
    for each in moves:
        graph.erase_node(each)


def _gathers(keys: Any) -> Sequence[Any]:
    """What brings keys or values together: all new ones, and earlier ones that were picked."""
    return keys.args[:2] if keys.target is ops.joined_keys else (keys,)


def _join(program: Program, gathers: list[fx.Node]) -> bool:
    """Gather in one collective what is known before any of it is used; whether that is so."""
    sources: list[Any] = [each.args[0] for each in gathers]
    last = max(sources)
    rows, everyone = replace(placement(sources[0]), dim=0), replace(placement(gathers[0]), dim=0)
    same = len({(source.meta["val"].dtype, placement(source)) for source in sources}) == 1
    if not same or any(user < last for each in gathers for user in each.users):
        return False
    graph, before = program.graph, last.next
    with graph.inserting_before(before):
        flat = [_rows(graph, source, rows) for source in sources]
        joined = add_call(graph, aten.cat.default, (flat, 1), rows)
        gathered = add_call(graph, ops.redistribute, (joined,), everyone)
        widths = [each.meta["val"].shape[1] for each in flat]
        parts = add_call(graph, aten.split_with_sizes.default, (gathered, widths, 1), (everyone,) * len(gathers))
        for i, (each, source) in enumerate(zip(gathers, sources, strict=True)):
            part = add_call(graph, getitem, (parts, i), everyone)
            batch, heads, _, width = source.meta["val"].shape
            shape = add_call(graph, aten.unflatten.int, (part, 1, [batch, heads, width]), everyone)
            back = add_call(graph, aten.permute.default, (shape, [1, 2, 0, 3]), replace(everyone, dim=2))
            back.meta["stack_trace"] = each.meta.get("stack_trace")
            each.replace_all_uses_with(back)
        gathered.meta["stack_trace"] = gathers[0].meta.get("stack_trace")
    for each in gathers:
        graph.erase_node(each)
    return True


def _is_gather(node: fx.Node) -> bool:
    if node.target is not ops.redistribute or not isinstance(placement(node), Gathered):
        return False
    source, sizes = placement(node.args[0]), node.meta["val"].shape
    from_rows = source == Shard(2) or source == Picked(2, placement(node).of)
    return from_rows and all(isinstance(sizes[dim], int) for dim in (0, 1, 3))


def _rows(graph: fx.Graph, source: fx.Node, placed: Placement) -> fx.Node:
    """``[tokens, everything else]``."""
    tokens_first = add_call(graph, aten.permute.default, (source, [2, 0, 1, 3]), placed)
    return add_call(graph, aten.flatten.using_ints, (tokens_first, 1, -1), placed)
