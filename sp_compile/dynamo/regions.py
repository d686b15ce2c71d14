"""What a graph for training has besides ops: regions that are checkpointed, and regions without gradients.

Checkpointed calls are inlined, their nodes marked to be computed again in the backward. What a region under ``no_grad``
computes is detached, so that the rest of the compiler need not know of modes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
MARKS = ("recompute", "ac_graph_id")  # that nodes of a checkpointed call carry
_SET_GRAD = torch._C._set_grad_enabled


def without_checkpoints(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph with every checkpointed call inlined, and its nodes marked to be computed again."""
    if not gm.graph.find_nodes(op="call_function", target=_CHECKPOINT):
        return gm
    graph = fx.Graph()
    own: dict[fx.Node, Any] = {}
    regions = 0
    for node in gm.graph.nodes:
        if node.target is _CHECKPOINT:
            own[node] = _inlined(gm, graph, node, own, regions)
            regions += 1
        elif node.op == "call_function" and node.args and isinstance(own.get(node.args[0]), tuple):
            own[node] = own[node.args[0]][node.args[1]]
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], own.__getitem__))
        elif not (node.op == "get_attr" and all(user.target is _CHECKPOINT for user in node.users)):
            own[node] = graph.node_copy(node, own.__getitem__)
    return fx.GraphModule(gm, graph)


def _inlined(gm: fx.GraphModule, graph: fx.Graph, call: fx.Node, own: dict[fx.Node, Any], region: int) -> Any:
    """Copy what a checkpointed call runs; what it returns."""
    body_name, *inputs = call.args
    assert isinstance(body_name, fx.Node)
    body = getattr(gm, str(body_name.target))
    values = [own[each] if isinstance(each, fx.Node) else each for each in inputs]
    inner: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), values, strict=True))
    for node in body.graph.nodes:
        if node.op == "output":
            return fx.map_arg(tuple(node.args[0]), inner.__getitem__)
        if node.op == "get_attr":
            name = f"checkpoint_{region}_{node.target}".replace(".", "_")
            setattr(gm, name, getattr(body, str(node.target)))
            inner[node] = graph.get_attr(name)
            inner[node].meta = dict(node.meta)
        elif node.op != "placeholder":
            inner[node] = graph.node_copy(node, inner.__getitem__)
            inner[node].meta.update(recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=region)
    raise AssertionError("a graph has an output")


def without_grad_modes(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph without changes of the grad mode; what is computed under ``no_grad`` is detached."""
    if not gm.graph.find_nodes(op="call_function", target=_SET_GRAD):
        return gm
    graph = fx.Graph()
    own: dict[fx.Node, Any] = {}
    recording = True
    for node in gm.graph.nodes:
        if node.target is _SET_GRAD:
            recording = bool(node.args[0])
            continue
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], own.__getitem__))
            continue
        own[node] = graph.node_copy(node, own.__getitem__)
        value = node.meta.get("example_value")
        if not recording and isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            own[node] = graph.call_method("detach", (own[node],))
            own[node].meta = {"example_value": value, "stack_trace": node.meta.get("stack_trace")}
    return fx.GraphModule(gm, graph)
