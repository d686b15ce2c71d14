"""Cut the token inputs to the rank's rows, in padded SP order.

Requires: ``canonical``.
Establishes: ``tokens_sharded``.

Before::

    %embedding: f32[1, T, 64] = aten.embedding(%weight, %input_ids)

After::

    %redistribute: i64[1, T] Shard(1) = redistribute(%input_ids)
    %embedding: f32[1, T, 64] = aten.embedding(%weight, %redistribute)
"""

from __future__ import annotations

from dataclasses import dataclass

from sp_compile.invariants import CANONICAL, TOKENS_SHARDED
from sp_compile.pipeline import Pass
from sp_compile.placements import Shard
from sp_compile.program import Program, insert_redistribute


@dataclass(frozen=True)
class ShardTokens(Pass):
    """Token inputs become the rank's rows."""

    name = "shard_tokens"
    requires = (CANONICAL,)
    establishes = (TOKENS_SHARDED,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if not program.parallel:
            return
        for node in program.graph.find_nodes(op="placeholder"):
            if node.name not in program.token_inputs or not node.users:
                continue
            first = min(node.users)
            cut = insert_redistribute(program, node, Shard(program.token_inputs[node.name]), first)
            node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
