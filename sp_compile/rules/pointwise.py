"""Ops that compute each element from the elements at the same place."""

from __future__ import annotations

from sp_compile.placements import RankLocal
from sp_compile.rules.base import Call, NoRule, Outcome, align, only_input, output_shape


def pointwise(call: Call) -> Outcome:
    """Inputs broadcast against each other; the output is sharded where they are."""
    output, needs = align(call, call.tensors, output_shape(call.node))
    return Outcome(output, needs)


def like_first(call: Call) -> Outcome:
    """The other tensors only lend a dtype or a device (``type_as``)."""
    source = call.node.args[0]
    return Outcome(only_input(call, source).at(only_input(call, source).dim))


def keeps_rows(call: Call) -> Outcome:
    """A copy: what the integers number stays (``clone``, ``alias``, ``_to_copy``)."""
    source = call.node.args[0]
    placement = call.placed[source]
    return Outcome(placement if isinstance(placement, RankLocal) else only_input(call, source))


def over_ranks(call: Call) -> Outcome:
    """A sum over ranks of tensor parallelism, or their shards stacked along dim 0, which is not that of the tokens."""
    placement = only_input(call, call.node.args[0])
    if placement.dim == 0 and "all_gather" in str(call.node.target):
        raise NoRule("shards are stacked along the token dim")
    return Outcome(placement)


def floor_divide(call: Call) -> Outcome:
    """Row numbers divided by the rows per token number tokens; anything else is pointwise."""
    rows, divisor = call.node.args[0], call.node.args[1]
    placement = call.shard(rows)
    if placement is None or not placement.rows:
        return pointwise(call)
    if not isinstance(divisor, int) or placement.rows % divisor:
        raise NoRule(f"row numbers of {placement.rows} rows per token divided by {divisor}")
    kept = type(placement)(
        placement.dim, placement.outer, placement.inner, placement.order, placement.rows // divisor, placement.of
    )
    return Outcome(kept)
