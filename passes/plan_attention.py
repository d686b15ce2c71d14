"""Decide once per kind of mask which regions of the scores are computed.

Requires: ``attention_raised``, ``keys_in_padded_order``.
Establishes: ``attention_planned``.

Layers that share a mask share its plan: local and global layers make two plans, however many layers there are.

Before::

    %attention = sp_compile.attention(%q, %k, %v, [%rows, %columns], [], 'mask = le(x1, x0)', 0.25, ...)

After::

    %plan = sp_compile.tile_plan([%rows, %columns], [], 'mask = le(x1, x0)', %valid, %local_index, %gathered_index)
    %attention = sp_compile.attention(%q, %k, %v, ..., plan=%plan, valid=%valid)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.invariants import KEYS_PADDED, PLANNED, RAISED
from sp_compile.pipeline import Pass
from sp_compile.placements import REPLICATE, RankLocal
from sp_compile.program import Program


@dataclass(frozen=True)
class PlanAttention(Pass):
    """One tile plan per kind of mask."""

    name = "plan_attention"
    requires = (RAISED, KEYS_PADDED)
    establishes = (PLANNED,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if program.tokens is None:
            return
        plans: dict[Any, fx.Node] = {}
        for node in ops.attention_nodes(program.graph):
            args = ops.AttentionArgs(*node.args)
            rows = program.index_input("local_index"), program.index_input("gathered_index")
            key = (tuple(args.operands), tuple(args.tables), args.rule)
            if key not in plans:
                with program.graph.inserting_before(node):
                    plans[key] = program.graph.call_function(
                        torch.ops.sp_compile.tile_plan.default,
                        (args.operands, args.tables, args.rule, args.valid, *rows),
                    )
                plans[key].meta["placement"] = RankLocal(plans[key].name) if program.parallel else REPLICATE
            node.args = tuple(args._replace(plan=plans[key]))
