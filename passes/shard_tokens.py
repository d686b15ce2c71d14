"""Cut the token inputs to the rank's rows, in padded SP order.

Requires: ``canonical``.
Establishes: ``tokens_sharded``.

Token ids are whole on every rank at no cost, so integers that follow from them (positions, masks of padding) stay
whole: the cut is where they become floating-point. Embeddings given as input are cut at once.

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
from sp_compile.program import Program, insert_redistribute, uncut_tokens


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
        for node, dim, users in uncut_tokens(program):
            cut = insert_redistribute(program, node, Shard(dim), min(users))
            for user in users:
                user.replace_input_with(node, cut)
