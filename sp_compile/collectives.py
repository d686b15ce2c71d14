"""The collectives of a lowered graph: where each begins and is waited for, and what is computed meanwhile."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from sp_compile import gradients, ops
from sp_compile.program import op_name

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

EXCHANGE = ops.exchange_rows._opoverload
STARTS = {
    c10d.all_gather_into_tensor.default: "all_gather",
    gradients.restored_rows: "all_gather",
    gradients.stack_shards: "all_gather",
    gradients.sum_shards: "all_reduce",
    c10d.all_to_all_single.default: "all_to_all",
    c10d.all_reduce.default: "all_reduce",
    EXCHANGE: "exchange",
}
PRODUCTS = frozenset(
    {"aten.linear", "aten.matmul", "aten.mm", "aten.bmm", "aten.addmm", "aten._grouped_mm"}
    | {"transformers.grouped_mm_fallback"}  # where torch's does not run
)
ATTENTION = (ops.attention._opoverload, torch.ops.higher_order.flex_attention)


def is_start(node: fx.Node) -> bool:
    """Whether the node begins a collective."""
    return node.op == "call_function" and node.target in STARTS


def is_wait(node: fx.Node) -> bool:
    """Whether the node waits for a collective."""
    return node.target is c10d.wait_tensor.default


def is_heavy(node: fx.Node) -> bool:
    """Whether the node does work that a collective can hide behind: products with weights, and attention."""
    return is_product(node) or node.target in ATTENTION


def is_product(node: fx.Node) -> bool:
    """Whether the node is a product, as those with weights are."""
    return node.op == "call_function" and op_name(node) in PRODUCTS


def reading_order(graph: fx.Graph) -> dict[fx.Node, tuple[int, int]]:
    """Keys to sort nodes by: their places, but waits stand before the first work or collective that reads what came.

    So does what is computed from what came on the way there.
    """
    place = {node: (i, 0) for i, node in enumerate(graph.nodes)}
    late: dict[fx.Node, None] = {}
    for node in graph.nodes:
        ends = is_heavy(node) or is_start(node) or node.op == "output"
        if is_wait(node) or (not ends and any(each in late for each in node.all_input_nodes)):
            late[node] = None
    for depth, node in enumerate(reversed(late)):
        if node.users:
            place[node] = (min(place[user][0] for user in node.users), -1 - depth)
    return place


def depends(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is computed from another."""
    seen, stack = {node}, [node]
    while stack:
        for each in stack.pop().all_input_nodes:
            if each is source:
                return True
            if each not in seen and source < each:  # what stands before it does not read it
                seen.add(each)
                stack.append(each)
    return False


def shadows(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each collective the work between its beginning and its wait."""
    found: dict[fx.Node, list[fx.Node]] = {}
    travelling: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if is_start(node):
            travelling[node] = found[node] = []
        elif is_wait(node):
            travelling.pop(node.args[0], None)
        elif is_heavy(node):
            for work in travelling.values():
                work.append(node)
    return found


def multiplications(node: fx.Node, size: Any) -> int:
    """Multiply-adds of a product with weights; ``size`` gives the true value of a symbolic size."""
    first = node.args[1] if node.target is aten.addmm.default else node.args[0]
    assert isinstance(first, fx.Node)
    inner: int = size(first.meta["val"].shape[-1])
    rest: int = math.prod(size(each) for each in node.meta["val"].shape)
    return inner * rest
