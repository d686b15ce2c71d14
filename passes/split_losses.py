"""Take cross-entropies apart, so that each rank computes the losses of its own rows and only sums cross.

Requires: ``canonical``.
Establishes: ``losses_by_rows``.

A mean is the sum over all rows divided by how many labels count, which every rank knows, for labels are whole on each:
the loss is that of the whole batch, whichever ranks have labels.

Before::

    %loss = aten.cross_entropy_loss(%logits, %labels)

After::

    %rows = aten.cross_entropy_loss(%logits, %labels, None, 0)
    %total = sum_rows(%rows, [0])
    %counted = aten.sum(aten.ne(%labels, -100))
    %loss = aten.div(%total, %counted)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sp_compile import ops
from sp_compile.invariants import CANONICAL, LOSSES_SPLIT
from sp_compile.pipeline import Pass
from sp_compile.placements import REPLICATE
from sp_compile.program import Program, add_call
from sp_compile.rules.reductions import loss_arguments, splittable

aten = torch.ops.aten
NONE, MEAN = 0, 1  # how torch numbers reductions; 2 is a sum


@dataclass(frozen=True)
class SplitLosses(Pass):
    """Losses row by row, sums, and the count of labels."""

    name = "split_losses"
    requires = (CANONICAL,)
    establishes = (LOSSES_SPLIT,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if not program.splits_losses:
            return
        for node in program.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
            if splittable(node):
                self._split(program, node)

    def _split(self, program: Program, node: fx.Node) -> None:
        logits, labels, _, reduction, ignored, smoothing = loss_arguments(node).values()
        graph = program.graph
        with graph.inserting_before(node):
            args = (logits, labels, None, NONE, ignored, smoothing)
            rows = add_call(graph, aten.cross_entropy_loss.default, args, REPLICATE, node)
            result = add_call(graph, ops.sum_rows, (rows, [0], False), REPLICATE, node)
            if reduction == MEAN:
                counts = add_call(graph, aten.ne.Scalar, (labels, ignored), REPLICATE, node)
                counted = add_call(graph, aten.sum.default, (counts,), REPLICATE, node)
                result = add_call(graph, aten.div.Tensor, (result, counted), REPLICATE, node)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
