"""FlexAttention in Dynamo's graph written out: a product, pointwise ops over row numbers, a softmax, a product.

The functions that score and mask one element (``score_mod`` and ``mask_mod``) are called once on row numbers that
broadcast to ``[B, H, Q, K]``, so that their attention is raised like any other. The ``mask_mod`` of a ``BlockMask`` is
what counts; its blocks only say where the mask is empty, and the code that finds them is removed.

Before::

    %flex = flex_attention(%q, %k, %v, score_mod, (..., mask_mod), 0.25)

After::

    %le = le(%arange_k[1, 1, 1, T], %arange_q[1, 1, T, 1])
    %scores = where(%le, (%q @ %k^T) * 0.25, -inf)
    %out = softmax(%scores) @ %v
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sp_compile.dynamo.vmap import top_level_regions
from sp_compile.errors import CaptureError

FLEX = torch.ops.higher_order.flex_attention
_LN2 = math.log(2)


def without_flex(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph with every FlexAttention written out.

    Raises:
        CaptureError: a ``score_mod`` or ``mask_mod`` is no pointwise function of its indices, or a ``BlockMask`` hides
            keys without a ``mask_mod``.
    """
    calls = gm.graph.find_nodes(op="call_function", target=FLEX)
    if not calls:
        return gm
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, mapping)
    graph.output(result)
    for node in calls:
        copy = mapping[node]
        with graph.inserting_before(copy):
            parts = _WrittenOut(gm, graph, copy).parts()
        for user in list(copy.users):
            user.replace_all_uses_with(parts[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(copy)
    _remove_dead(graph)
    return fx.GraphModule(gm, graph)


class _WrittenOut:
    """One FlexAttention as ordinary calls, inserted where the graph stands."""

    def __init__(self, gm: fx.GraphModule, graph: fx.Graph, node: fx.Node) -> None:
        self.gm, self.graph, self.node = gm, graph, node
        names = ("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options",
                 "score_mod_other_buffers", "mask_mod_other_buffers")  # fmt: skip
        self.args: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = self.graph.call_function(function, args, kwargs)
        new.meta["stack_trace"] = self.node.meta.get("stack_trace")
        return new

    def parts(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The output, its log-sum-exp to base 2 and the largest scores, as FlexAttention returns them."""
        q, k, v = (self.args[name] for name in ("query", "key", "value"))
        k, v = self._repeated(k, q), self._repeated(v, q)
        dtype = q.meta["example_value"].dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scores = self.call(torch.matmul, q, self.call(torch.transpose, k, -2, -1))
        scores = self.call(torch.Tensor.to, scores, wide)
        scores = self.call(torch.mul, scores, self.args["scale"])
        indices = [self._indices(q, 0), self._indices(q, 1), self._indices(q, 2), self._indices(k, 2, at=3)]
        scores = self._inline("score_mod", self.args["score_mod"], [scores, *indices])
        mask_mod, blocks = self.args["block_mask"][-1], self.args["block_mask"]
        if not self._is_constant(mask_mod):
            mask = self._inline("mask_mod", mask_mod, indices)
            scores = self.call(torch.where, mask, scores, -math.inf)
        elif _hides_blocks(blocks):
            raise CaptureError(
                f"a BlockMask without mask_mod hides keys by its blocks alone; pass mask_mod too. {self._line()}"
            )
        weights = self.call(torch.ops.aten._safe_softmax.default, scores, -1)
        out = self.call(torch.matmul, self.call(torch.Tensor.to, weights, dtype), v)
        lse = self.call(torch.div, self.call(torch.logsumexp, scores, -1), _LN2)
        return out, lse, self.call(torch.amax, scores, -1)

    def _repeated(self, keys: fx.Node, q: fx.Node) -> fx.Node:
        times = q.meta["example_value"].shape[1] // keys.meta["example_value"].shape[1]
        return keys if times == 1 else self.call(torch.repeat_interleave, keys, times, 1)

    def _indices(self, of: fx.Node, dim: int, at: int | None = None) -> fx.Node:
        """Row numbers along one dim of ``[B, H, Q, K]``."""
        device = self.args["query"].meta["example_value"].device
        size = self.call(torch.Tensor.size, of, dim)
        shape: list[Any] = [1, 1, 1, 1]
        shape[dim if at is None else at] = size
        return self.call(torch.reshape, self.call(torch.arange, size, device=device), shape)

    def _is_constant(self, mask_mod: fx.Node) -> bool:
        result = self._module(mask_mod).graph.output_node().args[0]
        return isinstance(result, fx.Node) and getattr(result.target, "__name__", result.target) == "new_ones"

    def _module(self, node: fx.Node) -> fx.GraphModule:
        return getattr(self.gm, str(node.target))

    def _line(self) -> str:
        """The line of the model that calls FlexAttention."""
        lines = [line.strip() for line in (self.node.meta.get("stack_trace") or "").splitlines()]
        frames = [line for line in lines if line.startswith("File ") and "/torch/" not in line]
        return frames[-1] if frames else ""

    def _inline(self, name: str, function: fx.Node, inputs: Sequence[fx.Node]) -> fx.Node:
        """Call a function of one element on all elements at once."""
        module = self._module(function)
        values = [*inputs, *self.args.get(f"{name}_other_buffers", ())]
        placeholders = module.graph.find_nodes(op="placeholder")
        own: dict[fx.Node, Any] = dict(zip(placeholders, values, strict=True))
        elements = set(placeholders[: len(inputs)])
        partial: dict[fx.Node, tuple[Any, tuple[Any, ...]]] = {}
        for node in module.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if not elements.isdisjoint(node.all_input_nodes):
                elements.add(node)
            if node in elements and node.target is operator.getitem:
                source, index = node.args
                base, before = partial.get(source, (own.get(source), ()))
                indices = (*before, *(index if isinstance(index, tuple) else (index,)))
                if _is_indexed_whole(node, indices):
                    mapped = fx.map_arg(indices, own.__getitem__)
                    own[node] = self.call(operator.getitem, base, mapped)
                else:
                    partial[node] = base, indices
                continue
            rows = [each for each in node.all_input_nodes if each in partial]
            if rows or (node in elements and _rank(node)):
                raise CaptureError(
                    f"{name} of flex_attention computes with whole rows (%{node.name}: {node.target}), not with one "
                    f"element; index captured tensors down to one element. {self._line()}"
                )
            own[node] = self._copied(node, own, module)
        return own[module.graph.output_node().args[0]]

    def _copied(self, node: fx.Node, own: dict[fx.Node, Any], module: fx.GraphModule) -> fx.Node:
        if node.op == "get_attr":
            name = f"{module.__class__.__name__}_{id(module)}_{node.target}".replace(".", "_")
            setattr(self.gm, name, getattr(module, str(node.target)))
            return self.graph.get_attr(name)
        copy = self.graph.node_copy(node, own.__getitem__)
        copy.meta = {"stack_trace": node.meta.get("stack_trace") or self.node.meta.get("stack_trace")}
        return copy


def _rank(node: fx.Node) -> int:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _is_indexed_whole(node: fx.Node, indices: tuple[Any, ...]) -> bool:
    """Whether one element is left; slices and the like make rows."""
    return _rank(node) == 0 and all(isinstance(each, (int, fx.Node)) for each in indices)


def _hides_blocks(blocks: Sequence[Any]) -> bool:
    """Whether a block mask has more than the one block that stands for everything."""
    return not (isinstance(blocks[-2], int) and blocks[-2] >= 1 << 30)


def _remove_dead(graph: fx.Graph) -> None:
    """Remove what only the blocks of masks were computed for; a vmap goes as a whole."""
    kept: set[fx.Node] = set()
    for unit in reversed(top_level_regions(graph)):
        is_vmap = len(unit) > 1
        effect = not is_vmap and (unit[0].op in ("placeholder", "output") or _writes(unit[0]))
        used = any(user in kept for node in unit for user in node.users)
        if effect or used:
            kept.update(unit)
            continue
        for node in reversed(unit):
            graph.erase_node(node)


def _writes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name == "setitem"
