"""Backwards of a model's own: a ``torch.autograd.Function`` of elements, out of Dynamo's graph, with its derivative.

A trace of the forward sees what such a function computes, and not what its backward says instead of that derivative.
Where the backward multiplies the gradient of each element by something, as those of activations and of bounded or
straight-through derivatives do, the factors are the backward of ones; they go with the value into one node. What is
known to do so are products, quotients, sums and choices by masks. Everything else is refused.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.dynamo.regions import MARKS
from sp_compile.errors import CaptureError
from sp_compile.program import source_line

_APPLY = torch.ops.higher_order.autograd_function_apply
KNOWN = ("torch", "einops")  # whose functions have the derivatives of their ops
# By names of functions, operators and methods:
SAME = frozenset({"clone", "contiguous", "neg", "view_as", "view", "reshape"})
CASTS = frozenset({"to", "type_as", "float", "double", "half", "bfloat16"})
FACTORS = frozenset({"mul", "multiply"})
QUOTIENTS = frozenset({"div", "truediv", "true_divide"})
SUMS = frozenset({"add", "sub"})
OPERATORS = frozenset(dir(operator))
WRITING = {"setitem", "delitem"} | {
    each for each in OPERATORS if each[:1] == "i" and not OPERATORS.isdisjoint((each[1:], f"{each[1:]}_"))
}


def without_own_backwards(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph, with every such function replaced by what it computes and the slopes that its backward gives.

    Raises:
        CaptureError: a backward is not one of elements, cannot be seen, or a hook changes a gradient.
    """
    for node in gm.graph.nodes:
        if getattr(node.target, "__name__", "") == "register_hook":
            raise CaptureError(
                f"the hook on a gradient at {source_line(node) or 'an unknown line'} would be lost; take it out, or "
                "put it on a parameter"
            )
        if _is_opaque(node) and _reads_gradients(node):
            raise CaptureError(
                f"{getattr(node.target, '__qualname__', node.target)} at {source_line(node) or 'an unknown line'} is "
                "called as it is (allow_in_graph or nonstrict_trace); a backward of its own would be lost, so let "
                "Dynamo trace it"
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
    return node.target is _APPLY and _reads_gradients(node)


def _reads_gradients(node: fx.Node) -> bool:
    values = [each.meta.get("example_value") for each in node.all_input_nodes]
    return any(isinstance(each, torch.Tensor) and each.requires_grad for each in values)


def _is_opaque(node: fx.Node) -> bool:
    """Whether a node calls Python that Dynamo has not traced."""
    module = str(getattr(node.target, "__module__", "")).partition(".")[0]
    return getattr(node.target, "__name__", "") == "flat_apply" or (
        isinstance(node.target, FunctionType) and module not in KNOWN
    )


def _applied(gm: fx.GraphModule, node: fx.Node) -> Callable[..., Any]:
    """A function of the node's inputs that gives what the node does."""
    marks = {name: node.meta[name] for name in MARKS if name in node.meta}
    forward, backward = (_body(getattr(gm, str(each.target)), marks) for each in node.args[:2])
    refused = CaptureError(
        f"the torch.autograd.Function at {source_line(node) or 'an unknown line'} has a backward of its own that is "
        "not known to be one of elements, and would be lost; write it as ops with the same derivative, or freeze what "
        "it reads"
    )
    # before torch 2.13 bodies may begin with a context that they do not read
    context = [None] * (len(forward.graph.find_nodes(op="placeholder")) - len(node.args[2:]))
    if any(map(_writes, (*forward.graph.nodes, *backward.graph.nodes))) or node.kwargs.get("dirty_idx"):
        raise refused
    if not _of_elements(backward.graph, len(context)):
        raise refused

    def run(*inputs: Any) -> Any:
        output, saved = fx.Interpreter(forward).run(*context, *inputs)
        value, *others = _listed(output)
        if others:
            raise refused
        slopes = _listed(fx.Interpreter(backward).run(*context, torch.ones_like(value), *saved))
        if len(slopes) != len(inputs):
            raise refused
        value = value.detach()
        for each, slope in zip(inputs, slopes, strict=True):
            if slope is None:
                continue
            if not slope.shape == each.shape == value.shape:
                raise refused
            value = ops.sloped(value, each, slope.detach())
        return value if isinstance(output, torch.Tensor) else (value,)

    return run


def _body(body: fx.GraphModule, marks: dict[str, Any]) -> fx.GraphModule:
    """With the marks of the call, and without modes, since all that comes of it is detached."""
    plain = fx.GraphModule(body, copy.deepcopy(body.graph))
    for node in plain.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        plain.graph.erase_node(node)
    for node in plain.graph.nodes:
        node.meta.update(marks)
    plain.recompile()
    return plain


def _listed(values: Any) -> list[Any]:
    return [*values] if isinstance(values, (tuple, list)) else [values]


def _name(node: fx.Node) -> str:
    """Of a method, or of a function of torch or of Python's operators; empty for any other."""
    if node.op == "call_method":
        return str(node.target)
    name = str(getattr(node.target, "__name__", ""))
    return name if node.target in (getattr(operator, name, None), getattr(torch, name, None)) else ""


def _writes(node: fx.Node) -> bool:
    """Whether a node may write to what it reads."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    in_place = name.endswith("_") and name not in OPERATORS
    return in_place or name in WRITING or node.kwargs.get("out") is not None


def _of_elements(graph: fx.Graph, at: int) -> bool:
    """Whether a backward multiplies each element of the gradient, its input ``at``, by something."""
    gradient = graph.find_nodes(op="placeholder")[at]
    gradients = {gradient}
    for node in graph.nodes:
        if node.op == "output":
            return all(each is None or each in gradients for each in _listed(node.args[0]))
        if gradients.isdisjoint(node.all_input_nodes) or _reads_its_dtype(node, gradients):
            continue
        if not (_is_linear(node, gradients) and _is_as_exact(node, gradient)):
            return False
        gradients.add(node)
    return False


def _reads_its_dtype(node: fx.Node, gradients: set[fx.Node]) -> bool:
    """Whether a gradient only lends its dtype to something else."""
    return _name(node) == "type_as" and len(node.args) == 2 and node.args[0] not in gradients


def _is_linear(node: fx.Node, gradients: set[fx.Node]) -> bool:
    """Whether each element of what a node gives is one of a gradient, times something that is not."""
    name, args = _name(node), node.args
    read = [isinstance(each, fx.Node) and each in gradients for each in args]
    if name in SAME | CASTS:
        return read[:1] == [True] and node.all_input_nodes == [args[0]]
    if node.kwargs:
        return False
    if name in FACTORS:
        return sum(read) == 1 and len(args) == 2
    if name in QUOTIENTS:
        return read == [True, False]
    if name in SUMS:
        return read == [True, True]
    if name == "masked_fill":
        return read == [True, False, False] and _is_zero(args[2])
    if name == "where":
        branches = zip(args[1:], read[1:], strict=True)
        return len(args) == 3 and not read[0] and all(gradient or _is_zero(each) for each, gradient in branches)
    return False


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _is_as_exact(node: fx.Node, gradient: fx.Node) -> bool:
    """Whether a value is rounded no more than the gradient that comes; of ones, rounding would not be seen."""
    found, own = (each.meta.get("example_value") for each in (node, gradient))
    if not isinstance(found, torch.Tensor) or not isinstance(own, torch.Tensor) or not found.is_floating_point():
        return False
    return own.is_floating_point() and torch.finfo(found.dtype).eps <= torch.finfo(own.dtype).eps
