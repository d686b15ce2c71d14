"""Backwards of a model's own: a ``torch.autograd.Function`` of elements, out of Dynamo's graph, with its derivative.

A trace of the forward sees what such a function computes, and not what its backward says instead of that derivative.
Where the backward multiplies the gradient of each element by a number, as those of activations and of bounded or
straight-through derivatives do, these numbers are the backward of ones; they go with the value into one node.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.errors import CaptureError
from sp_compile.program import source_line

_APPLY = torch.ops.higher_order.autograd_function_apply
# By names of functions, operators and methods: of one gradient, and linear in it whatever else they read.
SAME = frozenset({"clone", "contiguous", "to", "type_as", "float", "double", "half", "bfloat16", "neg", "view_as"})
FACTORS = frozenset({"mul", "multiply"})  # one of two is a gradient
QUOTIENTS = frozenset({"div", "truediv", "true_divide"})  # the first of two is one
SUMS = frozenset({"add", "sub"})  # both are


def without_own_backwards(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph, with every such function replaced by what it computes and the slopes that its backward gives.

    Raises:
        CaptureError: a backward is not one of elements, or a hook changes a gradient, which would be lost.
    """
    for node in gm.graph.nodes:
        if getattr(node.target, "__name__", "") == "register_hook":
            raise CaptureError(
                f"the hook on a gradient at {source_line(node) or 'an unknown line'} would be lost; take it out, or "
                "put it on a parameter"
            )
    if not any(_has_gradient(node) for node in gm.graph.nodes):
        return gm
    graph = fx.Graph()
    own: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], own.__getitem__))
            continue
        own[node] = graph.node_copy(node, own.__getitem__)
        if _has_gradient(node):
            own[node].target, own[node].kwargs = _applied(gm, node), {}
            own[node].args = own[node].args[2:]
    return fx.GraphModule(gm, graph)


def _has_gradient(node: fx.Node) -> bool:
    values = [each.meta.get("example_value") for each in node.all_input_nodes]
    return node.target is _APPLY and any(isinstance(each, torch.Tensor) and each.requires_grad for each in values)


def _applied(gm: fx.GraphModule, node: fx.Node) -> Callable[..., Any]:
    """A function of the node's inputs that gives what the node does."""
    forward, backward = (_without_modes(getattr(gm, str(node.args[i]))) for i in range(2))
    refused = CaptureError(
        f"the torch.autograd.Function at {source_line(node) or 'an unknown line'} has a backward of its own that is "
        "not one of elements, and would be lost; write it as ops with the same derivative, or freeze what it reads"
    )
    # before torch 2.13 bodies may begin with a context that they do not read
    context = [None] * (len(forward.graph.find_nodes(op="placeholder")) - len(node.args[2:]))
    if not _of_elements(backward.graph, len(context)):
        raise refused

    def run(*inputs: Any) -> Any:
        output, saved = fx.Interpreter(forward).run(*context, *inputs)
        value, *others = _listed(output)
        slopes = _listed(fx.Interpreter(backward).run(*context, torch.ones_like(value), *saved))
        if others or len(slopes) != len(inputs):
            raise refused
        value = value.detach()
        for each, slope in zip(inputs, slopes, strict=True):
            if slope is None:
                continue
            if not slope.shape == each.shape == value.shape:
                raise refused
            value = ops.sloped(value, each, slope.to(each.dtype).detach())
        return value if isinstance(output, torch.Tensor) else (value,)

    return run


def _without_modes(body: fx.GraphModule) -> fx.GraphModule:
    """What all that comes of is detached has no need of modes."""
    plain = fx.GraphModule(body, copy.deepcopy(body.graph))
    for node in plain.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        plain.graph.erase_node(node)
    plain.recompile()
    return plain


def _listed(values: Any) -> list[Any]:
    return [*values] if isinstance(values, (tuple, list)) else [values]


def _of_elements(graph: fx.Graph, at: int) -> bool:
    """Whether a backward multiplies each element of the gradient, its input ``at``, by something."""
    gradients = {graph.find_nodes(op="placeholder")[at]}
    for node in graph.nodes:
        if node.op == "output":
            return all(each is None or each in gradients for each in _listed(node.args[0]))
        read = [each for each in node.args if isinstance(each, fx.Node) and each in gradients]
        if not gradients.isdisjoint(node.all_input_nodes):
            if not _is_linear(node, read):
                return False
            gradients.add(node)
    return False


def _is_linear(node: fx.Node, read: list[fx.Node]) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    if name in SAME:
        return read == [*node.args[:1]] and node.all_input_nodes[0] is read[0]
    if name in FACTORS:
        return len(node.args) == 2 and len(read) == 1
    if name in QUOTIENTS:
        return read == [*node.args[:1]] and not node.kwargs
    return name in SUMS and len(read) == len(node.args) == 2 and not node.kwargs
