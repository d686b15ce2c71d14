"""Let a forward over new tokens see the keys and values of earlier ones, which stay on the ranks that hold them.

Requires: ``keys_in_padded_order``.
Establishes: ``cache_seen``.

The graph is that of a forward over all tokens, earlier and new, of which only the new rows are computed. New queries
attend to the new keys as ever. Then they go to everyone, each rank attends to what it holds, and the partial outputs go
back and are merged by log-sum-exp. Each rank keeps its part of the new keys and values, which leave the graph as
outputs. Source: decode context parallelism (Helix, arXiv:2507.07120).

Before::

    %attention = sp_compile.attention(%q, %k_all, %v_all, [%rows, %columns_all], ...)

After::

    %attention = sp_compile.attention(%q, %k_all, %v_all, [%rows, %columns_all], ...)
    %q_all: f32[1, 8, T, 16] Gathered(2) = redistribute(%q)
    %held = sp_compile.attention(%q_all, %held_0, %held_1, [%rows_all, %columns_held], ..., valid=%held_valid)
    %parts = exchange_partials(%held[0], %held[1])
    %merged = merge_partials(%attention[0], %attention[1], %parts[0], %parts[1])
    ...; return [%logits, %k_kept, %v_kept]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

from torch import fx

from sp_compile import ops
from sp_compile.errors import CacheError
from sp_compile.invariants import CACHE_SEEN, KEYS_PADDED
from sp_compile.ledger import Window
from sp_compile.pipeline import Pass
from sp_compile.placements import (
    Gathered,
    Held,
    Kept,
    Placement,
    Replicate,
    Shard,
    describe,
)
from sp_compile.program import Program, moved, op_name, placement, source_line
from sp_compile.symbols import computed, is_float, is_tensor
from sp_compile.windows import window_of


@dataclass(frozen=True)
class ShardCache(Pass):
    """Earlier keys and values seen where they are, new ones kept."""

    name = "shard_cache"
    requires = (KEYS_PADDED,)
    establishes = (CACHE_SEEN,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if not program.cached:
            return
        _refuse_other_mixers(program)
        attentions = ops.attention_nodes(program.graph)
        cache = _Cache(program, _windows(program, attentions))
        for node in attentions:
            cache.keep(node)
            if program.cached == "more":
                cache.see(node)
        output = program.graph.output_node()
        (values,) = output.args
        output.args = ((*values, *cache.kept.values()),)
        program.kept = tuple(cache.windows.values())
        program.remove_dead_code()


@dataclass
class _Cache:
    """The tensors of the cache, each for keys or values that one or more attentions read."""

    program: Program
    windows: dict[fx.Node, Window]  # of the keys and values, in the order of the tensors
    kept: dict[fx.Node, fx.Node] = field(default_factory=dict)
    made: dict[tuple[fx.Node, Placement], fx.Node] = field(default_factory=dict)

    def keep(self, attention: fx.Node) -> None:
        """Let the new keys and values leave the graph, once each."""
        for whole in attention.args[1:3]:
            assert isinstance(whole, fx.Node)
            if whole not in self.kept:
                self.kept[whole] = self._moved(whole, Kept(2), whole.next)

    def see(self, attention: fx.Node) -> None:
        """Add attention over what is held, and merge it."""
        args, before = ops.AttentionArgs(*attention.args), attention.next
        held = [self._held(whole) for whole in (args.k, args.v)]
        queries = self._moved(_source(args.q), Gathered(2), before)
        shelf = self._shelf(args.k)
        operands = [self._operand(attention, each, shelf, before) for each in args.operands]
        past = args._replace(q=queries, k=held[0], v=held[1], operands=operands, empty_mean=False,
                             valid=self.program.index_input(f"held_valid_{shelf}"))  # fmt: skip
        attention.args = tuple(args._replace(empty_mean=False))
        own = [self._part(attention, i, before, Shard(2)) for i in range(2)]
        with self.program.graph.inserting_before(before):
            partial = self.program.graph.node_copy(attention)
        partial.args = tuple(past)
        partial.meta["placement"] = (Gathered(2),) * 2
        partials = tuple(self._part(partial, i, before, Gathered(2)) for i in range(2))
        parts = self._call(before, ops.exchange_partials, partials, attention, (Shard(3),) * 2)
        received = [self._part(parts, i, before, Shard(3)) for i in range(2)]
        merged = self._call(before, ops.merge_partials, (*own, *received), attention, (Shard(2),) * 2)
        for i, each in enumerate(own):
            whole = self._part(merged, i, before, Shard(2))
            for user in [user for user in attention.users if user.args[1] == i]:
                user.replace_all_uses_with(whole, delete_user_cb=lambda node: node is not merged)
            assert each in merged.all_input_nodes

    def _shelf(self, whole: fx.Node) -> int:
        return [*dict.fromkeys(self.windows.values())].index(self.windows[whole])

    def _held(self, whole: fx.Node) -> fx.Node:
        node, shelf = self.program.index_input(f"held_{[*self.windows].index(whole)}"), self._shelf(whole)
        value = whole.meta["val"]
        dtype = self.program.cache_dtype or value.dtype
        node.meta.update(val=value.to(dtype), placement=Held(2, shelf), held=shelf)
        return node

    def _operand(self, attention: fx.Node, operand: fx.Node, shelf: int, before: fx.Node) -> fx.Node:
        """What masks or changes scores, for everyone's queries and the held keys."""
        source = _source(operand)
        match placement(operand):
            case Shard(dim=dim):
                return self._moved(source, Gathered(dim), before)
            case Gathered(dim=dim) if isinstance(placement(source), Replicate):
                return self._moved(source, Held(dim, shelf), before)
            case Replicate():
                return operand
        raise CacheError(
            f"the attention at {source_line(attention) or 'no source line'} takes %{source.name}, which is not known "
            "for tokens of earlier calls: it is no rule over the tokens' positions; run without a cache"
        )

    def _moved(self, node: fx.Node, target: Placement, before: fx.Node) -> fx.Node:
        return moved(self.program, node, target, before, self.made)

    def _part(self, node: fx.Node, i: int, before: fx.Node, placed: Placement) -> fx.Node:
        return self._call(before, getitem, (node, i), node, placed)

    def _call(self, before: fx.Node, target: Any, args: tuple[Any, ...], origin: fx.Node, placed: Any) -> fx.Node:
        with self.program.graph.inserting_before(before):
            node = computed(self.program.graph, target, args)
        node.meta.update(placement=placed, stack_trace=origin.meta.get("stack_trace"))
        return node


def _windows(program: Program, attentions: Sequence[fx.Node]) -> dict[fx.Node, Window]:
    """How far back the keys and values that a graph keeps are seen; those that are read together, as far."""
    read = [(tuple(node.args[1:3]), window_of(node, program.tokens)) for node in attentions]
    found: dict[fx.Node, Window] = {}
    while True:
        before = dict(found)
        for wholes, window in read:
            seen = [window, *(found[each] for each in wholes if each in found)]
            widest = None if None in seen else max(each for each in seen if each is not None)
            found.update(dict.fromkeys(wholes, widest))
        if found == before:
            return found


def _source(node: fx.Node) -> fx.Node:
    """What a redistribute moves."""
    while node.target is ops.redistribute:
        (node,) = node.all_input_nodes
    return node


def _refuse_other_mixers(program: Program) -> None:
    """Only attention may bring tokens together: of earlier tokens nothing but keys and values is left."""
    output = program.graph.output_node()
    mixer = next((node for node in program.graph.nodes if "fallback" in node.meta and is_float(node)), None)
    if mixer is not None:
        raise CacheError(
            f"{op_name(mixer)} at {source_line(mixer) or 'no source line'} is computed on the tokens of the whole row "
            f"({mixer.meta['fallback']}), and nothing is kept of earlier tokens but keys and values; "
            "run without a cache"
        )
    for node in program.graph.find_nodes(op="call_function", target=ops.redistribute):
        gathers = isinstance(placement(node.args[0]), Shard) and isinstance(placement(node), (Replicate, Shard))
        users = [user for user in node.users if user is not output]
        if gathers and is_tensor(node) and is_float(node) and users:
            user = users[0]
            raise CacheError(
                f"{op_name(user)} at {source_line(user) or 'no source line'} mixes tokens otherwise than by attention "
                f"(%{node.args[0].name} is {describe(placement(node.args[0]))} and is needed whole), and nothing is "
                "kept of earlier tokens but keys and values; run without a cache"
            )
