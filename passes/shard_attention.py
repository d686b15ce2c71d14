"""Run attention on the rank's queries and everyone's keys, in the order in which an all-gather delivers them.

Requires: ``attention_raised``, ``placed``.
Establishes: ``keys_in_padded_order``.

Keys and values stay in padded SP order: what masks them is put in that order instead, which costs one index selection
of a vector. Padding is masked by ``valid``. Source: the all-gather of Llama 3 training (arXiv:2407.21783, section 3.3).

Before::

    %k_full: f32[1, 2, T, 16] Replicate = redistribute(%k)
    %attention = sp_compile.attention(%q, %k_full, %v_full, [%rows, %columns], ...)

After::

    %k_all: f32[1, 2, T, 16] Gathered(2) = redistribute(%k)
    %columns_all: i64[1, 1, 1, T] Gathered(3) = redistribute(%columns)
    %attention = sp_compile.attention(%q, %k_all, %v_all, [%rows, %columns_all], ..., valid=%gathered_valid)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sp_compile import ops
from sp_compile.errors import ConfigError, nearest
from sp_compile.invariants import KEYS_PADDED, PLACED, RAISED
from sp_compile.pipeline import Pass
from sp_compile.placements import Gathered, Placement, QueriesByKeys, Shard
from sp_compile.program import Program, moved, placement
from sp_compile.symbols import shape_of

STRATEGIES = ("allgather_kv",)


@dataclass(frozen=True)
class ShardAttention(Pass):
    """Keys and values gathered, queries local."""

    name = "shard_attention"
    requires = (RAISED, PLACED)
    establishes = (KEYS_PADDED,)

    strategy: str = "allgather_kv"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"unknown attention strategy {self.strategy!r}{nearest(self.strategy, STRATEGIES)}")

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if not program.parallel:
            return
        made: dict[tuple[fx.Node, Placement], fx.Node] = {}
        for node in ops.attention_nodes(program.graph):
            args = ops.AttentionArgs(*node.args)
            tokens = shape_of(args.k)[2]

            def ordered(each: fx.Node, node: fx.Node = node, tokens: object = tokens) -> fx.Node:
                rank = len(shape_of(each))
                if rank < 1 or shape_of(each)[-1] != tokens:
                    return each
                both = isinstance(placement(each), Shard)
                target = QueriesByKeys(rank - 2, rank - 1) if both else Gathered(rank - 1)
                return moved(program, each, target, node, made)

            k, v = (moved(program, _unmoved(each), Gathered(2), node, made) for each in (args.k, args.v))
            operands = [ordered(each) for each in args.operands]
            node.args = tuple(args._replace(k=k, v=v, operands=operands, valid=program.index_input("gathered_valid")))
        program.remove_dead_code()


def _unmoved(node: fx.Node) -> fx.Node:
    source = node.args[0] if node.target is ops.redistribute else None
    return source if isinstance(source, fx.Node) and isinstance(placement(source), Shard) else node
