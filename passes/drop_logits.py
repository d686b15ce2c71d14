"""Where only the loss is wanted (``outputs="loss"``), compute it without ever holding the logits of all rows.

Requires: ``losses_by_rows``.
Establishes: ``logits_dropped``.

Outputs but for single values become None. A row's loss then is the only reader of its logits, and both become one
op that computes few rows at a time; what lies between them, a scale or soft-capping, becomes a rule.

Before::

    %logits = aten.linear(%hidden, %weight); %rows = aten.cross_entropy_loss(%logits, %labels, None, 0)
    return [%loss, %logits]

After::

    %rows = sp_compile.linear_cross_entropy(%hidden, %weight, None, %labels, '', -100, 0.0)
    return [%loss, None]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sp_compile import linear_loss
from sp_compile.errors import ConfigError
from sp_compile.invariants import LOGITS_DROPPED, LOSSES_SPLIT
from sp_compile.pipeline import Pass
from sp_compile.placements import REPLICATE
from sp_compile.program import Program, add_call
from sp_compile.raising.lift_ops import constant
from sp_compile.rules.reductions import loss_arguments
from sp_compile.score_rule import Assignment, format_rule
from sp_compile.symbols import is_tensor, shape_of

aten = torch.ops.aten
CASTS = (aten._to_copy.default, aten.to.dtype, aten.alias.default)
FUNCTIONS = {aten.mul.Tensor: "mul", aten.mul.Scalar: "mul", aten.div.Tensor: "div", aten.div.Scalar: "div",
             aten.add.Tensor: "add", aten.add.Scalar: "add", aten.sub.Tensor: "sub", aten.sub.Scalar: "sub",
             aten.tanh.default: "tanh", aten.neg.default: "neg"}  # fmt: skip


class _Kept(Exception):
    """Why logits cannot be dropped."""


@dataclass(frozen=True)
class DropLogits(Pass):
    """Losses from what the logits are computed from."""

    name = "drop_logits"
    requires = (LOSSES_SPLIT,)
    establishes = (LOGITS_DROPPED,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if program.outputs != "loss":
            return
        output = program.graph.output_node()
        output.args = fx.map_arg(output.args, lambda each: each if not shape_of(each) else None)
        if not any(is_tensor(each) for each in output.all_input_nodes):
            raise ConfigError('outputs="loss", but this forward gives none; pass labels, or use outputs="full"')
        program.remove_dead_code()
        for node in program.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
            try:
                _fuse(program, node)
            except _Kept as reason:
                program.record(node, f"its logits are held whole: {reason}")
        program.remove_dead_code()


def _fuse(program: Program, node: fx.Node) -> None:
    logits, labels, weight, reduction, ignored, smoothing = loss_arguments(node).values()
    if reduction or weight is not None:
        raise _Kept("rows are not reduced one by one")
    linear, rule = _behind(logits)
    x, matrix, bias = (*linear.args, None)[:3]
    graph, features = program.graph, shape_of(x)[-1]
    with graph.inserting_before(node):
        rows = x
        if len(shape_of(x)) != 2:
            rows = add_call(graph, aten.reshape.default, (x, [-1, int(features)]), REPLICATE, node)
        args = (rows, matrix, bias, labels, rule, ignored, smoothing)
        result = add_call(graph, linear_loss.linear_cross_entropy._opoverload, args, REPLICATE, node)
        if result.meta["val"].dtype != node.meta["val"].dtype:
            result = graph.call_function(aten._to_copy.default, (result,), {"dtype": node.meta["val"].dtype})
            result.meta.update(val=node.meta["val"], placement=REPLICATE)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _behind(logits: fx.Node) -> tuple[fx.Node, str]:
    """The linear layer behind logits, and what is done with its output as a rule.

    Raises:
        _Kept: something else lies between, or reads them.
    """
    classes, found, node = shape_of(logits)[-1], [], logits
    while node.target is not aten.linear.default:
        args: Any = node.args
        if len(node.users) > 1:
            raise _Kept(f"%{node.name} is read by others")
        if (node.target is aten.reshape.default and shape_of(args[0])[-1] == classes) or node.target in CASTS:
            node = args[0]
        elif node.target in FUNCTIONS and not node.kwargs and all(_is_number(constant(each)) for each in args[1:]):
            found.append((FUNCTIONS[node.target], [float(constant(each)) for each in args[1:]]))
            node = args[0]
        else:
            raise _Kept(f"%{node.name} lies between them and a linear layer")
    if len(node.users) > 1:
        raise _Kept(f"%{node.name} is read by others")
    steps = [Assignment("score", name, ("score", *others)) for name, others in reversed(found)]
    return node, format_rule(steps)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
