"""Let a forward over new tokens see the keys and values of earlier ones, which are spread over the ranks.

Requires: ``keys_in_padded_order``.
Establishes: ``cache_seen``.

The graph is that of a forward over all tokens, earlier and new, of which only the new rows are computed. New queries
attend to the new keys as ever. Then they go to everyone, each rank attends to what it holds, and the partial outputs go
back and are merged by log-sum-exp. Each rank keeps its part of the new keys and values, which leave the graph as
outputs. Source: decode context parallelism (Helix, arXiv:2507.07120).

Where many tokens follow few, their queries are more bytes than the earlier keys and values. A program that is ``mixed``
gathers both, of each request one: earlier keys come behind the new ones, and only picked queries go to everyone.

Before::

    %attention = sp_compile.attention(%q, %k_all, %v_all, [%rows, %columns_all], ...)

After::

    %attention = sp_compile.attention(%q, %k_all, %v_all, [%rows, %columns_all], ...)
    %q_all: f32[1, 8, T, 16] Gathered(2) = redistribute(%q)
    %held = sp_compile.attention(%q_all, %held_0, %held_1, [%rows_all, %columns_held], ..., valid=%held_valid)
    %parts = exchange_partials(%held[0], %held[1])
    %merged = merge_partials(%attention[0], %attention[1], %parts[0], %parts[1])
    ...; return [%logits, %k_kept, %v_kept]

or, ``mixed``::

    %past: f32[1, 2, T, 16] Gathered(2, past_0) = redistribute(%k_picked)
    %k_seen: f32[1, 2, T, 16] Gathered(2, seen_0) = joined_keys(%k_all, %past)
    %attention = sp_compile.attention(%q, %k_seen, %v_seen, [%rows, %columns_seen], ..., valid=%seen_valid_0)
    ...; %merged = merge_partials(...) of the picked rows
    %whole: f32[1, 8, T, 16] Shard(2) = put_back(%attention[0], %merged[0], %merged_rows_0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any, NoReturn

import torch
from torch import fx

from sp_compile import ops
from sp_compile.errors import CacheError
from sp_compile.integers import of_all_rows
from sp_compile.invariants import CACHE_SEEN, KEYS_PADDED
from sp_compile.ledger import Window
from sp_compile.pipeline import Pass
from sp_compile.placements import (
    Gathered,
    Held,
    Kept,
    Picked,
    Placement,
    QueriesByKeys,
    Replicate,
    Shard,
    describe,
)
from sp_compile.program import Program, add_call, moved, op_name, placement, source_line
from sp_compile.symbols import is_float, is_tensor
from sp_compile.windows import window_of

LSE_BYTES = 4


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
            if program.cached != "first":
                cache.see(node)
        output = program.graph.output_node()
        (values,) = output.args
        output.args = ((*values, *cache.kept.values()),)
        program.kept = tuple(cache.windows.values())
        program.query_bytes = cache.query_bytes
        program.remove_dead_code()


@dataclass
class _Cache:
    """The tensors of the cache, each for keys or values that one or more attentions read."""

    program: Program
    windows: dict[fx.Node, Window]  # of the keys and values, in the order of the tensors
    kept: dict[fx.Node, fx.Node] = field(default_factory=dict)
    made: dict[tuple[fx.Node, Placement], fx.Node] = field(default_factory=dict)
    joined: dict[fx.Node, fx.Node] = field(default_factory=dict)
    whole: dict[fx.Node, fx.Node] = field(default_factory=dict)
    query_bytes: dict[Window, int] = field(default_factory=dict)

    def keep(self, attention: fx.Node) -> None:
        """Let the new keys and values leave the graph, once each."""
        for whole in attention.args[1:3]:
            assert isinstance(whole, fx.Node)
            if whole not in self.kept:
                self.kept[whole] = self._moved(whole, Kept(2), whole.next)
        q, _, v = (each.meta["val"] for each in attention.args[:3])
        there_and_back = q.shape[1] * ((q.shape[3] + v.shape[3]) * q.element_size() + LSE_BYTES)
        window = self.windows[attention.args[1]]
        self.query_bytes[window] = self.query_bytes.get(window, 0) + there_and_back

    def see(self, attention: fx.Node) -> None:
        """Add attention over what is held, and merge it."""
        args, before, graph = ops.AttentionArgs(*attention.args), attention.next, self.program.graph
        held, shelf = [self._held(whole) for whole in (args.k, args.v)], self._shelf(args.k)
        mixed = self.program.cached == "mixed"
        picked = f"queries_{shelf}" if mixed else ""
        asked = [user for user in attention.users if user.args[1] in (0, 1)]
        attention.args = tuple(self._with_past(attention, held) if mixed else args._replace(empty_mean=False))
        own = [self._part(attention, i, before, Shard(2)) for i in range(2)]

        everyone = Gathered(2, picked)
        past = args._replace(
            q=self._for_everyone(_source(args.q), 2, picked, before),
            k=held[0],
            v=held[1],
            operands=[self._operand(attention, each, shelf, picked, before) for each in args.operands],
            empty_mean=False,
            valid=self.program.index_input(f"held_valid_{shelf}"),
        )
        with graph.inserting_before(before):
            partial = graph.node_copy(attention)
        partial.args = tuple(past)
        partial.meta["placement"] = (everyone, everyone)
        partials = tuple(self._part(partial, i, before, everyone) for i in range(2))
        received: Placement = Picked(3, picked) if mixed else Shard(3)
        parts = self._call(before, ops.exchange_partials, partials, attention, (received, received))
        rows: Placement = Picked(2, picked) if mixed else Shard(2)
        merging = [self._moved(each, rows, before) for each in own]
        merging += [self._part(parts, i, before, received) for i in range(2)]
        merged = self._call(before, ops.merge_partials, tuple(merging), attention, (rows, rows))
        for i, each in enumerate(own):
            whole = self._part(merged, i, before, rows)
            if mixed:
                whole = self._put_back(each, whole, shelf, before)
            for user in [user for user in asked if user.args[1] == i]:
                user.replace_all_uses_with(whole)

    def _with_past(self, attention: fx.Node, held: Sequence[fx.Node]) -> ops.AttentionArgs:
        """The arguments of an attention that sees picked earlier keys behind the new ones."""
        args, shelf = ops.AttentionArgs(*attention.args), self._shelf(attention.args[1])
        earlier = [self._for_everyone(each, 2, f"past_{shelf}", attention) for each in held]
        dtype = held[0].meta["val"].dtype
        k, v = (self._joined(new, past, dtype, attention) for new, past in zip((args.k, args.v), earlier, strict=True))
        operands = []
        for each in args.operands:
            placed, source = placement(each), _source(each)
            if isinstance(placed, Gathered):
                self._check_known(attention, source)
                each = self._moved(source, Gathered(placed.dim, f"seen_{shelf}"), attention)
            elif isinstance(placed, QueriesByKeys):
                self._refuse(attention, source)
            operands.append(each)
        valid = self.program.index_input(f"seen_valid_{shelf}")
        return args._replace(k=k, v=v, operands=operands, empty_mean=False, valid=valid)

    def _joined(self, new: fx.Node, past: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        """Earlier keys or values, stored as ``dtype``, behind the new ones; together they are those of all tokens."""
        if new not in self.joined:
            with self.program.graph.inserting_before(before):
                node = self.program.graph.call_function(ops.joined_keys, (new, past, dtype))
            node.meta.update(val=new.meta["val"], placement=Gathered(2, f"seen_{self._shelf(new)}"))
            self.joined[new] = node
        return self.joined[new]

    def _put_back(self, own: fx.Node, merged: fx.Node, shelf: int, before: fx.Node) -> fx.Node:
        """What was merged for picked rows, among the rank's."""
        rows = self.program.index_input(f"merged_rows_{shelf}")
        with self.program.graph.inserting_before(before):
            node = self.program.graph.call_function(ops.put_back, (own, merged, rows))
        node.meta.update(val=own.meta["val"], placement=Shard(2), stack_trace=before.meta.get("stack_trace"))
        return node

    def _for_everyone(self, source: fx.Node, dim: int, picked: str, before: fx.Node) -> fx.Node:
        """What every rank gets of a rank's rows, or of those it picks."""
        if picked and not isinstance(placement(source), Replicate):
            source = self._moved(source, Picked(dim, picked), before)
        return self._moved(source, Gathered(dim, picked), before)

    def _shelf(self, whole: fx.Node) -> int:
        return [*dict.fromkeys(self.windows.values())].index(self.windows[whole])

    def _held(self, whole: fx.Node) -> fx.Node:
        node, shelf = self.program.index_input(f"held_{[*self.windows].index(whole)}"), self._shelf(whole)
        value = whole.meta["val"]
        dtype = self.program.cache_dtype or value.dtype
        node.meta.update(val=value.to(dtype), placement=Held(2, shelf), held=shelf)
        return node

    def _operand(self, attention: fx.Node, operand: fx.Node, shelf: int, picked: str, before: fx.Node) -> fx.Node:
        """What masks or changes scores, for everyone's queries and the held keys."""
        source = _source(operand)
        match placement(operand):
            case Shard(dim=dim):
                whole = of_all_rows(self.program, operand, before, self.whole)
                return self._for_everyone(source if whole is None else whole, dim, picked, before)
            case Gathered(dim=dim):
                self._check_known(attention, source)
                return self._moved(source, Held(dim, shelf), before)
            case Replicate():
                return operand
        return self._refuse(attention, source)

    def _check_known(self, attention: fx.Node, source: fx.Node) -> None:
        """Check that what masks keys is known of earlier ones."""
        if not isinstance(placement(source), Replicate):
            self._refuse(attention, source)

    def _refuse(self, attention: fx.Node, source: fx.Node) -> NoReturn:
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
            return add_call(self.program.graph, target, args, placed, like=origin)


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
