"""Gather where the fewest bytes cross, nothing twice, and what goes together in one collective.

Keys and values are gathered as they are, or what they are computed from where that is smaller: the compressed latent
and the rotary part of MLA, a hidden state that is smaller than both; see :mod:`sp_compile.cuts`. Heads that are
repeated for groups of queries are repeated afterwards. Queries that go to a cache travel with new keys and values.

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
from sp_compile.cuts import Cuts
from sp_compile.errors import ConfigError
from sp_compile.invariants import GATHERED_ONCE, KEYS_PADDED, RESTORED
from sp_compile.pipeline import Pass
from sp_compile.placements import LOCAL_ROWS, Gathered, Heads, Picked, Placement, Shard, gathers_all
from sp_compile.program import Program, add_call, placement

aten = torch.ops.aten


@dataclass(frozen=True)
class MinimizeCommunication(Pass):
    """What is smallest gathered, once; keys and values in one collective.

    Attributes:
        join_keys_and_values: in one collective.
        operations_per_byte: what a rank computes in the time in which a byte crosses: as many are worth computing anew
            to save a byte. None for the configured rates' ratio, by default 25 on a CPU and 1,000 on a GPU; 0 gathers
            keys and values as they are.
    """

    name = "minimize_communication"
    requires = (KEYS_PADDED, RESTORED)
    establishes = (GATHERED_ONCE,)

    join_keys_and_values: bool = True
    operations_per_byte: float | None = None

    def __post_init__(self) -> None:
        if self.operations_per_byte is not None and self.operations_per_byte < 0:
            raise ConfigError(f"operations_per_byte={self.operations_per_byte} is negative; pass 0 or more")

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if not program.parallel:
            return
        self._gather_once(program)
        brought = self._where_fewest_bytes_cross(program)
        self._gather_once(program)  # also what others gather that keys and values are computed from
        if self.join_keys_and_values:
            packed: dict[tuple[fx.Node, ...], fx.Node] = {}
            for node, gathers in brought:
                to_cache = [user for user in node.args[0].users if _is_gather(user)]
                gathers = [each for each in gathers if each.users and _is_gather(each)]  # others are joined already
                if not (gathers and to_cache and _join(program, [*gathers, *to_cache], packed)) and len(gathers) > 1:
                    _join(program, gathers, packed)
            for node in ops.attention_nodes(program.graph):
                _spread_together(program.graph, [*node.args[:3]])
        program.remove_dead_code()

    def _where_fewest_bytes_cross(self, program: Program) -> list[tuple[fx.Node, list[fx.Node]]]:
        """For each attention what is gathered for its keys and values, for those of a cache apart."""
        cuts, found = Cuts(program, program.operations_per_byte), []
        for node in ops.attention_nodes(program.graph):
            for pair in zip(*map(_gathers, node.args[1:3]), strict=True):
                gathers = [*dict.fromkeys(each for each in pair if _is_gather(each))]
                if gathers and cuts.operations_per_byte and self._from_rows(gathers):
                    gathers = cuts.move(gathers)
                found.append((node, gathers))
        return found

    def _from_rows(self, gathers: list[fx.Node]) -> bool:
        """Whether all come from the rank's rows to the same rows of others."""
        kinds = {placement(each) for each in gathers}
        rows = all(placement(each.args[0]) == Shard(2) for each in gathers)
        return len(kinds) == 1 and rows

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
    if any(each.target is not ops.redistribute or not isinstance(placement(each), Heads) for each in moves):
        return
    sources: list[Any] = [each.args[0] for each in moves]
    alike = {(placement(each), each.meta["val"].dtype) for each in sources}
    used_before = any(user < max(moves) for each in moves for user in each.users)
    if len(moves) == 1 or len(alike) > 1 or used_before or not isinstance(placement(sources[0]), Shard):
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


def _join(program: Program, gathers: list[fx.Node], packed: dict[tuple[fx.Node, ...], fx.Node]) -> bool:
    """Gather in one collective what is known before any of it is used; whether that is so.

    Args:
        packed: what was put together before, by its parts; stages of a ring send the same rows.
    """
    sources: list[Any] = [each.args[0] for each in gathers]
    last = max(sources)
    rows, everyone = replace(placement(sources[0]), dim=0), replace(placement(gathers[0]), dim=0)
    same = {(source.meta["val"].dtype, replace(placement(source), dim=0)) for source in sources}
    if len(same) > 1 or any(user < last for each in gathers for user in each.users):
        return False
    graph, key = program.graph, tuple(sources)
    if key not in packed:
        with graph.inserting_before(last.next):
            packed[key] = add_call(graph, aten.cat.default, ([_rows(graph, each, rows) for each in sources], 1), rows)
    joined = packed[key]
    with graph.inserting_before(joined.next):
        gathered = add_call(graph, ops.redistribute, (joined,), everyone)
        widths = [each.meta["val"].shape[1] for each in joined.args[0]]
        parts = add_call(graph, aten.split_with_sizes.default, (gathered, widths, 1), (everyone,) * len(gathers))
        for i, (each, source) in enumerate(zip(gathers, sources, strict=True)):
            back = _rows_back(graph, add_call(graph, getitem, (parts, i), everyone), source, everyone)
            back.meta["stack_trace"] = each.meta.get("stack_trace")
            each.replace_all_uses_with(back)
        gathered.meta["stack_trace"] = gathers[0].meta.get("stack_trace")
    for each in gathers:
        graph.erase_node(each)
    return True


def _is_gather(node: fx.Node) -> bool:
    if node.target is not ops.redistribute or not isinstance(placement(node), Gathered):
        return False
    source, wanted, sizes = placement(node.args[0]), placement(node), node.meta["val"].shape
    if wanted.of == LOCAL_ROWS:  # which are there
        return False
    from_rows = source == Shard(wanted.dim) or source == Picked(wanted.dim, wanted.of)
    return from_rows and len(sizes) > 1 and all(isinstance(sizes[dim], int) for dim in _others(node))


def _others(node: fx.Node) -> list[int]:
    """The dims but that of the tokens."""
    return [dim for dim in range(node.meta["val"].dim()) if dim != placement(node).dim]


def _rows(graph: fx.Graph, source: fx.Node, placed: Placement) -> fx.Node:
    """``[tokens, everything else]``."""
    others = _others(source)
    if placement(source).dim != 0:
        source = add_call(graph, aten.permute.default, (source, [placement(source).dim, *others]), placed)
    return add_call(graph, aten.flatten.using_ints, (source, 1, -1), placed) if len(others) > 1 else source


def _rows_back(graph: fx.Graph, rows: fx.Node, source: fx.Node, placed: Any) -> fx.Node:
    """Undo :func:`_rows`."""
    dim, others = placement(source).dim, _others(source)
    if len(others) > 1:
        sizes = [source.meta["val"].shape[each] for each in others]
        rows = add_call(graph, aten.unflatten.int, (rows, 1, sizes), placed)
    if dim == 0:
        return rows
    back = [each + 1 for each in range(dim)] + [0] + [each + 1 for each in range(dim, len(others))]
    return add_call(graph, aten.permute.default, (rows, back), replace(placed, dim=dim))
