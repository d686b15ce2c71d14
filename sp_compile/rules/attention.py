"""The canonical attention with gathered keys: queries are the rank's own, keys and values are everyone's."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sp_compile import ops
from sp_compile.placements import (
    REPLICATE,
    Gathered,
    Heads,
    Held,
    Picked,
    Placement,
    QueriesByKeys,
    RankLocal,
    Shard,
)
from sp_compile.rules.base import Call, NoRule, Outcome, rank_of
from sp_compile.symbols import shape_of


def attention(call: Call) -> Outcome:
    """Queries sharded along their token dim; keys, values and what masks them whole, in one order for all."""
    q, k, v, operands, *_ = ops.AttentionArgs(*call.node.args)
    keys_held = call.placed.get(k)
    if isinstance(keys_held, Heads):
        return _over_heads(call, keys_held)
    if isinstance(keys_held, Held):
        return _over_held_keys(call, keys_held.shelf)
    keys: Placement = keys_held if isinstance(keys_held, Gathered) else REPLICATE
    needs: dict[fx.Node, Placement] = {k: keys, v: keys, q: Shard(2)}
    for operand in operands:
        assert isinstance(operand, fx.Node)
        rank, sizes = rank_of(operand), shape_of(operand)
        per_query = rank >= 2 and sizes[-2] == shape_of(q)[2]
        per_key = rank >= 1 and sizes[-1] == shape_of(k)[2]
        if isinstance(keys_held, Gathered) and per_key:
            both = QueriesByKeys(rank - 2, rank - 1, keys_held.of)
            needs[operand] = both if per_query else replace(keys_held, dim=rank - 1)
        else:
            needs[operand] = Shard(rank - 2) if per_query else REPLICATE
    return Outcome((Shard(2), Shard(2)), needs)


def _over_held_keys(call: Call, shelf: int) -> Outcome:
    """Everyone's queries over the keys that the rank holds."""
    q, k, v, operands, *_ = ops.AttentionArgs(*call.node.args)
    queries = _gathered(call, q)
    needs: dict[fx.Node, Placement] = {k: Held(2, shelf), v: Held(2, shelf), q: queries}
    for operand in operands:
        assert isinstance(operand, fx.Node)
        rank, sizes = rank_of(operand), shape_of(operand)
        if rank >= 1 and sizes[-1] == shape_of(k)[2]:
            needs[operand] = Held(rank - 1, shelf)
        else:
            per_query = rank >= 2 and sizes[-2] == shape_of(q)[2]
            needs[operand] = replace(queries, dim=rank - 2) if per_query else REPLICATE
    return Outcome((queries, queries), needs)


def _over_heads(call: Call, keys: Heads) -> Outcome:
    """The rank's heads, of everyone's queries and keys."""
    args = ops.AttentionArgs(*call.node.args)
    queries = call.placed.get(args.q)
    if not isinstance(queries, Heads):
        raise NoRule("keys of a rank's heads, and queries of all")
    needs: dict[fx.Node, Placement] = {args.q: queries, args.k: keys, args.v: keys}
    for operand in args.operands:
        needs[operand] = of_heads(operand, args, queries)[-1]
    for table in args.tables:
        needs[table] = Heads(0, queries.lists) if shape_of(table)[0] != 1 else REPLICATE
    return Outcome((queries, queries), needs)


def is_vector(operand: fx.Node, args: ops.AttentionArgs) -> bool:
    """Whether what masks or changes scores has values for queries or keys, not for every pair of them."""
    rank, sizes = rank_of(operand), shape_of(operand)
    return rank < 2 or sizes[-2] != shape_of(args.q)[2] or sizes[-1] != shape_of(args.k)[2]


def of_heads(operand: fx.Node, args: ops.AttentionArgs, queries: Heads) -> list[Placement]:
    """How what masks or changes scores comes to be placed for an attention over a rank's heads: rows, then heads."""
    rank, sizes = rank_of(operand), shape_of(operand)
    found: list[Placement] = []
    of = ""
    if rank >= 1 and sizes[-1] == shape_of(args.k)[2]:
        found.append(Gathered(rank - 1))
    elif rank >= 2 and sizes[-2] == shape_of(args.q)[2]:
        of = queries.of
        found.append(Gathered(rank - 2, of))
    if rank >= 3 and sizes[-3] != 1:
        found.append(Heads(rank - 3, queries.lists, of))
    return found or [REPLICATE]


def _gathered(call: Call, node: fx.Node) -> Gathered:
    """How a node's rows are gathered along dim 2: all of them, or those that were picked."""
    found = call.placed.get(node)
    return Gathered(2, found.of if isinstance(found, Gathered) else "")


def exchange(call: Call) -> Outcome:
    """Partial outputs of everyone's queries, to the ranks of the queries."""
    queries = _gathered(call, call.tensors[0])
    own = Picked(3, queries.of) if queries.of else Shard(3)
    return Outcome((own, own), dict.fromkeys(call.tensors, queries))


def merge(call: Call) -> Outcome:
    """Each rank merges what belongs to its own queries."""
    out, lse, *parts = call.tensors
    found = call.placed.get(out)
    own: Placement = Picked(2, found.of) if isinstance(found, Picked) else Shard(2)
    received: Placement = Picked(3, found.of) if isinstance(found, Picked) else Shard(3)
    return Outcome((own, own), {out: own, lse: own, **dict.fromkeys(parts, received)})


def joined(call: Call) -> Outcome:
    """Earlier keys that were gathered, behind all new ones."""
    new, past = call.tensors
    of = _gathered(call, past).of
    return Outcome(Gathered(2, of.replace("past", "seen")), {new: Gathered(2), past: Gathered(2, of)})


def put_back(call: Call) -> Outcome:
    """What was merged for picked rows, among the rank's."""
    own, merged, *_ = call.tensors
    found = call.placed.get(merged)
    return Outcome(Shard(2), {own: Shard(2), merged: Picked(2, found.of if isinstance(found, Picked) else "")})


def plan(call: Call) -> Outcome:
    """Each rank plans for its own queries."""
    return Outcome(RankLocal(call.node.name))


def sdpa(call: Call) -> Outcome:
    """Attention across other dims than the tokens' (across layers): tokens are batch."""
    tensors = [each for each in call.tensors if call.shard(each) is not None]
    placement = call.first_shard()
    for each in call.node.args[:3]:
        assert isinstance(each, fx.Node)
        if rank_of(each) - placement.dim <= 2 or shape_of(each)[placement.dim] != shape_of(tensors[0])[placement.dim]:
            raise NoRule(f"attention over the token dim that was not raised: {call.node.meta.get('not_raised')}")
    needs: dict[fx.Node, Placement] = {
        each: placement.at(placement.dim) for each in call.node.args[:3] if isinstance(each, fx.Node)
    }
    for each in call.tensors:
        if each not in needs:
            same = (
                rank_of(each) > placement.dim and shape_of(each)[placement.dim] == shape_of(tensors[0])[placement.dim]
            )
            needs[each] = placement.at(placement.dim) if same else REPLICATE
    return Outcome(placement.at(placement.dim), needs)
