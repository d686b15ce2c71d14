"""What a parallel model runs: its local graphs, the kernels of its attention, and values that would be dense masks."""

from __future__ import annotations

from typing import Any

import torch

from sp_compile import ParallelModule
from sp_compile.ops import AttentionArgs, attention_nodes
from sp_compile.program import Program


def local_programs(parallel: ParallelModule) -> list[Program]:
    """All programs that were made so far."""
    return [variant.program for each in parallel._compiled for variant in each._variants.values()]


def kernels_of(parallel: ParallelModule) -> set[str]:
    """What computes attention in all of them."""
    found = set()
    for program in local_programs(parallel):
        for node in program.graph.nodes:
            if node.target is torch.ops.higher_order.flex_attention:
                found.add("flex")
        found |= {AttentionArgs(*node.args).kernel for node in attention_nodes(program.graph)}
    return found


def wide_values(parallel: ParallelModule) -> list[str]:
    """Nodes of the local graphs whose values have two dims that grow with the tokens, such as queries by keys.

    Block masks have such dims too, divided by the size of a block.
    """
    found = []
    for program in local_programs(parallel):
        lengths = {size.node.expr for size in program.symbols.values()}
        for node in program.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and sum(_grows(size, lengths) for size in value.shape) > 1:
                found.append(f"{node.name}{list(value.shape)}")
    return [each for each in found if not each.startswith("block_mask")]


def _grows(size: Any, lengths: set[Any]) -> bool:
    return isinstance(size, torch.SymInt) and not lengths.isdisjoint(size.node.expr.free_symbols)
