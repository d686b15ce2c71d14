"""A step in two parts: what works on the host, and what a GPU does without it.

Plans of attention are made on the host, from integers, afresh in every step. All else can be replayed::

    whole    ids, cache -> plan -> plan on the GPU -> attention -> logits
    host     ids -> plan -> plan on the GPU
    device   ids, cache, plan on the GPU -> attention -> logits

Vectors that both parts need are computed in both, so that only plans cross.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from sp_compile.collectives import EXCHANGE, is_heavy, is_start
from sp_compile.ops import AttentionArgs
from sp_compile.program import op_name

aten = torch.ops.aten
sp = torch.ops.sp_compile
PLANS = frozenset({sp.tile_plan.default, sp.block_mask.default, sp.split_block_mask.default,
                   sp.query_blocks.default, sp.block_mask_of_keys.default, sp.seen_rows.default})  # fmt: skip
READERS = frozenset({"transformers.grouped_mm_fallback"})  # ops of others that read data on the host


@dataclass(frozen=True)
class Parts:
    """The two parts of a graph.

    Attributes:
        host: takes the inputs of the whole; returns what crosses.
        device: takes the inputs of the whole and then what crosses; returns what the whole does.
    """

    host: fx.GraphModule
    device: fx.GraphModule

    def examples(self, inputs: Sequence[Any], mode: Any) -> list[Any]:
        """Fake inputs of the device part, from those of the whole."""
        with mode, enable_python_dispatcher(), mode.shape_env.ignore_fresh_unbacked_symbols():
            return [*inputs, *self.host(*inputs)]


def split(gm: fx.GraphModule) -> Parts:
    """Cut a graph where plans, or copies of them, are ready for the device."""
    graph = gm.graph
    (results,) = graph.output_node().args
    reached = _reached(_nodes_of(results), _crosses)
    crossing = [node for node in graph.nodes if node in reached and _crosses(node)]
    return Parts(_part(gm, tuple(crossing), ()), _part(gm, results, crossing))


def obstacle(parts: Parts) -> tuple[fx.Node, str] | None:
    """What keeps the device part from being replayed, and why; None where it can be."""
    for node in parts.host.graph.nodes:
        if is_heavy(node) or is_start(node):
            return node, "plans of attention depend on what it computes"
    for node in parts.device.graph.nodes:
        reason = _works_on_host(node) if node.op == "call_function" else None
        if reason is not None:
            return node, reason
    inputs = [node for node in parts.device.graph.find_nodes(op="placeholder") if node.meta.get("val") is not None]
    on_host = [node for node in inputs if node.users and _on_host(node)]
    return (on_host[0], "it lies on the host") if any(_on_device(each) for each in inputs) and on_host else None


def _works_on_host(node: fx.Node) -> str | None:
    """Why a GPU cannot compute a node without the host."""
    if node.target is sp.attention.default:
        return f"kernel {AttentionArgs(*node.args).kernel} is steered by the host"
    if node.target is EXCHANGE:
        return "how many rows are exchanged is read on the host"
    if op_name(node) in READERS:
        return "it reads data on the host"
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return "it draws random numbers"
    values = node.meta.get("val")
    values = values if isinstance(values, (tuple, list)) else [values]
    sized = [each for each in values if isinstance(each, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))]
    return "its size or value depends on data" if any(free_unbacked_symbols(each) for each in sized) else None


def _crosses(node: fx.Node) -> bool:
    """Whether the node ends the host's work: a plan, or a copy of what is on the host."""
    if node.target in PLANS:
        return True
    if node.target is aten.to.device:
        target = node.args[1]
    elif node.target is aten._to_copy.default:
        target = node.kwargs.get("device")
    else:
        return False
    return target is not None and torch.device(str(target)).type != "cpu" and _on_host(node.all_input_nodes[0])


def _on_host(node: fx.Node) -> bool:
    """Whether a value is a tensor on the host, as plans on their way are, of which nothing is known yet."""
    value = node.meta.get("val")
    return value is None or (isinstance(value, torch.Tensor) and value.device.type == "cpu")


def _on_device(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _reached(roots: Iterable[fx.Node], ends: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """What roots are computed from, as far as the nodes at which that ends."""
    found: set[fx.Node] = set()
    stack = [*roots]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [] if ends(node) else node.all_input_nodes
    return found


def _nodes_of(results: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(results, found.append)
    return found


def _part(gm: fx.GraphModule, results: Any, given: Sequence[fx.Node]) -> fx.GraphModule:
    """The nodes that results need, in their order; ``given`` ones become inputs behind those that there are."""
    needed = _reached(_nodes_of(results), given.__contains__)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in gm.graph.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
    for node in given:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta.update(node.meta)
    for node in gm.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(results, copies.__getitem__))
    return fx.GraphModule(gm, graph)
