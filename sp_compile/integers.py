"""Integers of all rows, computed anew on every rank from what all know, rather than gathered from the ranks."""

from __future__ import annotations

from torch import fx

from sp_compile import ops
from sp_compile.placements import REPLICATE, Replicate
from sp_compile.program import Program, placement
from sp_compile.symbols import is_float, is_tensor, tensors_of


def of_all_rows(program: Program, node: fx.Node, before: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """A node's value for all rows, where it is integers that come from what is known of all; None for activations.

    Args:
        before: where new nodes go.
        made: what was made so far; is added to.
    """
    if isinstance(placement(node), Replicate):
        return node
    if node.target is ops.redistribute:
        return of_all_rows(program, node.all_input_nodes[0], before, made)
    if node.op != "call_function" or not is_tensor(node) or is_float(node):
        return None
    if node not in made:
        inputs = {}
        for each in node.all_input_nodes:
            whole = of_all_rows(program, each, before, made) if is_tensor(each) else _if_known(each)
            if whole is None:
                return None
            inputs[each] = whole
        with program.graph.inserting_before(before):
            made[node] = program.graph.node_copy(node, lambda each: inputs[each])
        made[node].meta["placement"] = REPLICATE
    return made[node]


def _if_known(node: fx.Node) -> fx.Node | None:
    """A size, or several tensors that are whole on every rank."""
    held = placement(node)
    parts = held if isinstance(held, tuple) else (held,)
    return node if not tensors_of(node) or all(isinstance(each, Replicate) for each in parts) else None
