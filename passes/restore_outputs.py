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

from sp_compile.errors import UnsupportedModelError
from sp_compile.invariants import PLACED, RESTORED
from sp_compile.pipeline import Pass
from sp_compile.placements import REPLICATE, Kept, Placement, Shard
from sp_compile.program import Program, insert_redistribute, placement
from sp_compile.symbols import is_tensor, token_dims


@dataclass(frozen=True)
class RestoreOutputs(Pass):
    """Outputs in normal order."""

    name = "restore_outputs"
    requires = (PLACED,)
    establishes = (RESTORED,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if program.outputs == "sharded" and program.sp > 1 and program.tokens is None:
            raise UnsupportedModelError(
                'outputs="sharded" needs tokens that are spread, but this graph is computed whole on every rank: the '
                'batch has one token, or the model fixes the token length; pass outputs="full"'
            )
        output = program.graph.output_node()
        restored: dict[fx.Node, fx.Node] = {}
        for node in output.all_input_nodes:
            wanted = self._wanted(program, node) if is_tensor(node) else None
            if wanted is not None and wanted != placement(node):
                restored[node] = insert_redistribute(program, node, wanted, output)
        output.args = fx.map_arg(output.args, lambda each: restored.get(each, each))

    def _wanted(self, program: Program, node: fx.Node) -> Placement:
        """Whole if asked, or where the output has no token dim of its own; else the rank's rows. Kept rows stay."""
        held: Placement = placement(node)
        if isinstance(held, Kept):
            return held
        if program.outputs == "full" or not program.parallel:
            return REPLICATE
        dims = token_dims(node, program.tokens)
        whole = Shard(next(iter(dims))) if list(dims.values()) == [1] else REPLICATE
        return placement(node) if isinstance(placement(node), Shard) else whole
