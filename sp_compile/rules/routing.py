"""Expert routing: each rank sorts its own rows by expert, runs the experts on them and puts them back.

No row crosses ranks. A sort gives the rank's rows an order of its own (``Shard(0 by sort)``), group sizes become
``RankLocal``, and indexing with the inverse permutation brings the rows back. Where such values would reach anything
else, the sort runs on gathered rows instead.
"""

from __future__ import annotations

from sp_compile.placements import RankLocal, Shard
from sp_compile.rules.base import Call, NoRule, Outcome, only_input, rank_of
from sp_compile.rules.reductions import along_dims


def sort(call: Call) -> Outcome:
    """Sort along the token dim of a row of integers: an order of the rank's own rows."""
    values = call.arguments()
    source = values["self"]
    placement = only_input(call, source)
    if values["dim"] % rank_of(source) != placement.dim:
        return along_dims(call)
    if rank_of(source) != 1 or source.meta["val"].dtype.is_floating_point or values.get("descending"):
        raise NoRule("sorts tokens of all ranks")
    per_token, name = placement.outer * placement.inner, call.node.name
    if placement.rows:
        inverse = Shard(0, placement.outer, placement.inner, placement.of, placement.rows, placement.order)
        ordered = Shard(0, placement.outer, placement.inner, placement.of, placement.rows, placement.of)
        return _sorted(call, ordered, inverse)
    if placement.order:
        raise NoRule("sorts rows that are already in a rank's own order")
    by_sort = Shard(0, placement.outer, placement.inner, name)
    return _sorted(call, by_sort, Shard(0, placement.outer, placement.inner, name, per_token, ""))


def _sorted(call: Call, ordered: Shard, indices: Shard) -> Outcome:
    return Outcome((ordered, indices) if isinstance(call.node.meta["val"], (tuple, list)) else indices)


def group_sizes(call: Call) -> Outcome:
    """Rows per expert (``histc``, ``bincount``), counted over the rank's own rows."""
    only_input(call, call.node.args[0])
    return Outcome(RankLocal(call.node.name))


def of_group_sizes(call: Call) -> Outcome:
    """Running group sizes stay the rank's own; on rows, an ordinary scan."""
    placement = call.placed[call.node.args[0]]
    return Outcome(placement) if isinstance(placement, RankLocal) else along_dims(call)


def grouped_mm(call: Call) -> Outcome:
    """Rows sorted by expert times the expert's matrix, the groups given by their ends."""
    rows, _, ends = call.node.args[:3]
    placement = only_input(call, rows)
    sizes = call.placed[ends]
    if placement.dim != 0 or not placement.order or not isinstance(sizes, RankLocal):
        raise NoRule("group sizes that do not belong to these rows")
    return Outcome(placement.at(0))
