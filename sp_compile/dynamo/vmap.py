"""Taking ``torch.vmap`` out of Dynamo's graph.

A pre-dispatch trace does not see the ops under a vmap (associative scans of state-space models use one). Each region
between ``_vmap_increment_nesting`` and its ``_vmap_decrement_nesting`` is traced on its own, below functorch, and the
flat ops take its place.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

_OPEN, _CLOSE = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def without_vmap(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph with every vmap replaced by the ops it runs."""
    if not any(_name(node) == _OPEN for node in gm.graph.nodes):
        return gm
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for region in top_level_regions(gm.graph):
        if len(region) == 1:
            mapping[region[0]] = graph.node_copy(region[0], mapping.__getitem__)
        else:
            _inline(gm, graph, region, mapping)
    return fx.GraphModule(gm, graph)


def top_level_regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes in order, those of one vmap (and of the vmaps in it) together."""
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        opens = _name(node) == _OPEN
        if depth == 0:
            regions.append([])
        regions[-1].append(node)
        depth += opens
        depth -= _name(node) == _CLOSE
    return regions


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _inline(gm: fx.GraphModule, graph: fx.Graph, region: list[fx.Node], mapping: dict[fx.Node, fx.Node]) -> None:
    """Trace one region and copy what it runs into ``graph``."""
    inside = set(region)
    inputs = list(dict.fromkeys(each for node in region for each in node.all_input_nodes if each not in inside))
    outputs = [node for node in region if any(user not in inside for user in node.users)]
    part, own = fx.Graph(), {}
    for each in inputs:
        own[each] = part.placeholder(each.name)
    for node in region:
        own[node] = part.node_copy(node, own.__getitem__)
    part.output(tuple(own[each] for each in outputs))
    traced = make_fx(fx.GraphModule(gm, part), tracing_mode="fake")(*(each.meta["example_value"] for each in inputs))
    flat: dict[fx.Node, Any] = dict(
        zip(traced.graph.find_nodes(op="placeholder"), (mapping[each] for each in inputs), strict=True)
    )
    for node in traced.graph.nodes:
        if node.op == "call_function":
            flat[node] = graph.node_copy(node, flat.__getitem__)
            flat[node].meta["stack_trace"] = region[0].meta.get("stack_trace")
    results = traced.graph.output_node().args[0]
    mapping.update({each: flat[result] for each, result in zip(outputs, results, strict=True)})
