"""Ops over whole dims: reductions, softmax, scans, sorts, norms. Fine as long as the token dim is not among them."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from sp_compile.placements import Partial, Placement
from sp_compile.rules.base import Call, NoRule, Outcome, only_input, output_shape, rank_of, replicate_others
from sp_compile.symbols import is_float, shape_of


def along_dims(call: Call) -> Outcome:
    """Ops with a ``dim`` argument, kept or dropped in the output; all outputs are sharded alike."""
    values = call.arguments()
    source = values.get("self", call.node.args[0])
    placement = only_input(call, source)
    rank, dims = rank_of(source), values.get("dim", values.get("dims"))
    if dims is None or dims == []:
        raise NoRule("reduces over all dims")
    touched = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)}
    if placement.dim in touched:
        raise NoRule("runs over the token dim")
    dropped = rank != len(output_shape(call.node))
    output = placement.at(placement.dim - (sum(dim < placement.dim for dim in touched) if dropped else 0))
    value = call.node.meta["val"]
    needs: dict[fx.Node, Placement] = {**replicate_others(call, source)}
    return Outcome((output,) * len(value) if isinstance(value, (tuple, list)) else output, needs)


def sum_rows(call: Call) -> Outcome:
    """:func:`sp_compile.ops.sum_rows`: each rank has the sum of its own rows."""
    source, dims, _ = call.node.args
    placement = only_input(call, source)
    if placement.order:
        raise NoRule("sums over rows in an order of the rank's own")
    if placement.dim not in [dim % rank_of(source) for dim in dims]:
        raise NoRule("sums over other dims than the tokens")
    return Outcome(Partial("sum"))


def loss_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a cross-entropy, in the order of its schema."""
    values = Call(node, sympy.Symbol("tokens"), {}).arguments()
    return {each.name: values[each.name] for each in node.target._schema.arguments}


def splittable(node: fx.Node) -> bool:
    """Whether a cross-entropy is one of rows, ``[rows, classes]`` and a label each, that is reduced to one value."""
    values = loss_arguments(node)
    logits, labels = values["self"], values["target"]
    by_rows = len(shape_of(logits)) == 2 and len(shape_of(labels)) == 1 and not is_float(labels)
    return by_rows and values["weight"] is None and values["reduction"] != 0


def row_losses(call: Call) -> Outcome:
    """A cross-entropy that is not reduced, of logits ``[rows, classes]`` and one label a row."""
    values = call.arguments()
    logits, labels = values["self"], values["target"]
    placement = only_input(call, logits)
    if values["reduction"] or rank_of(logits) != 2 or rank_of(labels) != 1 or placement.dim:
        raise NoRule("reduces over rows, or has more than one label a row")
    needs: dict[fx.Node, Placement] = {**replicate_others(call, logits, labels), labels: placement.at(0)}
    return Outcome(placement.at(0), needs)


def linear_losses(call: Call) -> Outcome:
    """:func:`sp_compile.linear_loss.linear_cross_entropy`: each rank computes those of its own rows."""
    rows, labels = call.node.args[0], call.node.args[3]
    placement = only_input(call, rows)
    if placement.dim:
        raise NoRule("runs over the token dim")
    needs: dict[fx.Node, Placement] = {**replicate_others(call, rows, labels), labels: placement.at(0)}
    return Outcome(placement.at(0), needs)


def diff(call: Call) -> Outcome:
    """Differences along a dim; what is put before and after is cut like the rows."""
    outcome, values = along_dims(call), call.arguments()
    placement = only_input(call, values["self"])
    ends = {each: placement.at(placement.dim) for each in (values["prepend"], values["append"]) if each is not None}
    return Outcome(outcome.output, {**outcome.inputs, **ends})


def last_dims(call: Call) -> Outcome:
    """Norms over the last dims, as many as ``normalized_shape`` has."""
    values = call.arguments()
    source = values["input"]
    placement = only_input(call, source)
    if placement.dim >= rank_of(source) - len(values["normalized_shape"]):
        raise NoRule("normalizes over the token dim")
    value = call.node.meta["val"]
    output = placement.at(placement.dim)
    placed = (output,) * len(value) if isinstance(value, (tuple, list)) else output
    return Outcome(placed, replicate_others(call, source))
