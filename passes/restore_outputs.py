"""Bring the outputs back to normal order on every rank, or leave them on the ranks if asked.

Requires: ``placed``.
Establishes: ``outputs_restored``.

Before::

    return [%linear]

After::

    %redistribute: f32[1, T, 128] Replicate = redistribute(%linear)
    return [%redistribute]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sp_compile.invariants import PLACED, RESTORED
from sp_compile.pipeline import Pass
from sp_compile.placements import REPLICATE, Shard
from sp_compile.program import Program, insert_redistribute, placement
from sp_compile.symbols import is_tensor


@dataclass(frozen=True)
class RestoreOutputs(Pass):
    """Outputs in normal order."""

    name = "restore_outputs"
    requires = (PLACED,)
    establishes = (RESTORED,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        output = program.graph.output_node()
        restored: dict[fx.Node, fx.Node] = {}
        for node in output.all_input_nodes:
            if not is_tensor(node) or placement(node) == REPLICATE:
                continue
            if program.outputs == "full" or not isinstance(placement(node), Shard):
                restored[node] = insert_redistribute(program, node, REPLICATE, output)
        output.args = fx.map_arg(output.args, lambda each: restored.get(each, each))
