"""From Dynamo's graph to one functional pre-dispatch ATen graph with a symbolic token length."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.distributed.tensor import DTensor
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx

from sp_compile.dynamo.backwards import without_own_backwards
from sp_compile.dynamo.flex import without_flex
from sp_compile.dynamo.regions import without_checkpoints, without_grad_modes
from sp_compile.dynamo.shards import is_mesh, local_value, tensor_group, without_dtensors
from sp_compile.dynamo.vmap import without_vmap
from sp_compile.errors import CaptureError
from sp_compile.program import Fallback, Program

TOKEN_INPUTS = ("input_ids", "inputs_embeds")
_KEYS = re.compile(r"\['([^']+)'\]|\.([A-Za-z_]\w*)")
_CONTAINERS = {"self", "kwargs", "_modules", "_parameters", "_buffers", "_orig_mod", "L", "args"}


def input_name(source: str) -> str:
    """A readable name out of Dynamo's source text.

    >>> input_name("L['self']._modules['lm_head']._parameters['weight']")
    'lm_head_weight'
    """
    keys = [first or second for first, second in _KEYS.findall(source)]
    name = "_".join(key for key in keys if key not in _CONTAINERS)
    return re.sub(r"\W", "_", name) or "input"


class Captured:
    """Dynamo's graph, traced anew over its fake inputs once and given out as programs.

    Args:
        gm: what Dynamo calls its backend with.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._traced: fx.GraphModule | None = None
        self._records = torch.is_grad_enabled()
        placeholders = _placeholders(gm)
        self._in_shards = any(isinstance(node.meta.get("example_value"), DTensor) for node in placeholders)
        for node in placeholders:
            _source(node)

    def inputs(self, values: Sequence[Any]) -> Sequence[Any]:
        """What programs take, of what Dynamo calls the graph with: local shards, and no meshes."""
        return [local_value(each) for each in values if not is_mesh(each)] if self._in_shards else values

    def program(self, sp: int, group_name: str, outputs: str) -> Program:
        """A program of its own, for passes to rewrite.

        Raises:
            CaptureError: the graph writes to its inputs, holds writes that cannot be made functional, or a backward of
                its own that cannot be kept.
        """
        if self._traced is None:
            self._traced = _traced(self._gm)
        own = fx.GraphModule(self._traced, copy.deepcopy(self._traced.graph))
        token_inputs, tokens = _find_tokens(own)
        program = Program(own, tokens, sp, group_name, token_inputs, outputs)
        program.differentiable = self._records and any(
            each.meta.get("requires_grad") for each in own.graph.find_nodes(op="placeholder")
        )
        if tokens is None and sp > 1 and not _has_one_token(own):
            reason = "the model fixes the token length, so every rank computes all tokens"
            program.fallbacks.append(Fallback("the whole graph", 1, 0, "", reason))
        return program


def _traced(gm: fx.GraphModule) -> fx.GraphModule:
    """One functional graph, its inputs under readable names."""
    placeholders = _placeholders(gm)
    values = [node.meta["example_value"] for node in placeholders]
    names = [input_name(_source(node)) for node in placeholders]
    is_weight = ["_parameters" in _source(node) or "_buffers" in _source(node) for node in placeholders]
    traced = _retrace(gm, [local_value(each) for each in values])
    inputs = traced.graph.find_nodes(op="placeholder")
    for node, name, value, weight in zip(inputs, names, values, is_weight, strict=True):
        node.meta["weight"] = weight
        if isinstance(value, DTensor) and not value.placements[0].is_replicate():
            node.meta["tensor_group"] = tensor_group(value), value.device_mesh.size()
        node.meta["requires_grad"] = isinstance(value, torch.Tensor) and value.requires_grad
        if not isinstance(value, torch.Tensor):
            name = "tokens" if isinstance(value, torch.SymInt) else name
        node._rename(name)
        node.target = node.name
    _refuse_writes(traced)
    return traced


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    """Dynamo's inputs, but for the meshes of DTensors."""
    found = gm.graph.find_nodes(op="placeholder")
    return [node for node in found if not is_mesh(node.meta.get("example_value"))]


def _source(node: fx.Node) -> str:
    """Dynamo's text for where an input comes from; kept, since Dynamo forgets it after the first capture."""
    argument = node.meta.get("grapharg")
    if "input_source" not in node.meta:
        name = argument.source.name if argument is not None else node.name
        node.meta["input_source"] = str(name() if callable(name) else name)
    return str(node.meta["input_source"])


def _retrace(gm: fx.GraphModule, values: Sequence[Any]) -> fx.GraphModule:
    differentiable = without_grad_modes(without_own_backwards(without_checkpoints(gm)))
    flat = without_vmap(without_flex(without_dtensors(differentiable)))

    def run(*inputs: Any) -> Any:
        return fx.Interpreter(flat).run(*inputs)

    functional = dispatch_functionalize(run, mode=FunctionalTensorMode(pre_dispatch=True, export=True))
    with traceback.preserve_node_meta(), torch.no_grad():
        try:
            traced = make_fx(functional, pre_dispatch=True, tracing_mode="fake")(*values)
        except RuntimeError:
            # higher-order ops (associative scans) and frozen constants do not functionalize; mutations that are left
            # are looked for below
            traced = make_fx(run, pre_dispatch=True, tracing_mode="fake")(*values)
            _writes_to_functional(traced)
    traced.graph.eliminate_dead_code()
    return traced


def _writes_to_functional(gm: fx.GraphModule) -> None:
    """Turn ``x.op_(y)`` on a whole tensor into ``x' = x.op(y)``, later uses reading ``x'``."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        if not _mutates(node):
            continue
        name = node.target._schema.name.removeprefix("aten::").removesuffix("_")
        written = node.args[0]
        packet = getattr(torch.ops.aten, name, None)
        if packet is None or node.target._overloadname not in packet.overloads() or _has_views(written):
            continue
        node.target = getattr(packet, node.target._overloadname)
        written.replace_all_uses_with(node, delete_user_cb=lambda user, at=order[node]: order[user] > at)


_FRESH = frozenset({"aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::zeros_like", "aten::linear",
                    "aten::add", "aten::mul", "aten::sub", "aten::div", "aten::clone"})  # fmt: skip


def _has_views(node: Any) -> bool:
    """Whether another tensor may share the node's memory."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return True
    if _aliases(node) and node.target._schema.name.removesuffix("_") not in _FRESH:
        return True
    return any(_aliases(user) and not _mutates(user) for user in node.users)


def _aliases(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return bool(node.op == "call_function")
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _refuse_writes(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if _mutates(node):
            line = (node.meta.get("stack_trace") or "").strip().splitlines()[-2:]
            raise CaptureError(
                f"the model writes in place with {node.target} and the write cannot be made functional; "
                f"use the out-of-place op. {' '.join(line)}"
            )


def _model_inputs(gm: fx.GraphModule) -> list[fx.Node]:
    """Tensors that the caller passes: those that hold tokens by name, or all."""
    inputs = [
        node
        for node in gm.graph.find_nodes(op="placeholder")
        if isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].dim() and not node.meta["weight"]
    ]
    return [node for node in inputs if node.name in TOKEN_INPUTS] or inputs


def _has_one_token(gm: fx.GraphModule) -> bool:
    values = [node.meta["val"] for node in _model_inputs(gm)]
    return bool(values) and bool(values[0].shape[min(1, values[0].dim() - 1)] == 1)


def _find_tokens(gm: fx.GraphModule) -> tuple[dict[str, int], sympy.Symbol | None]:
    """Placeholders that hold the tokens, with their token dim, and the symbol of the token length."""
    for node in _model_inputs(gm):
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                return {node.name: dim}, size.node.expr
    return {}, None


def is_specialised(error: BaseException) -> bool:
    """Whether capture failed because the model fixes the token length."""
    return type(error).__name__ == "ConstraintViolationError" or "Constraints violated" in str(error)


def graph_break(module: nn.Module, error: BaseException) -> str:
    """What stopped the capture and where, in the user's code rather than torch's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frames = [line for line in lines if line.startswith("File ")]
    own = [line for line in frames if "/torch/" not in line]
    where = f" at {(own or frames)[-1]}" if frames else ""
    return f"{type(module).__name__} does not capture into one graph{where}: {' '.join(lines[:3])}"
