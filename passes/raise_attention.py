"""Turn every form of attention over the tokens into one node that carries its mask and score rules.

Requires: ``canonical``.
Establishes: ``attention_raised``.

Takes ``scaled_dot_product_attention`` and eager matmul - softmax - matmul. Masks and biases are lifted to per-token
vectors, repeated keys and values are un-repeated. What does not fit is left as it is and the reason recorded.

Before::

    %le: b8[1, 1, T, T] = aten.le(%columns, %rows)
    %sdpa: f32[1, 4, T, 16] = aten.scaled_dot_product_attention(%q, %k_repeated, %v_repeated, %le, scale=0.25)

After::

    %attention = sp_compile.attention(%q, %k, %v, [%columns, %rows], 'mask = le(x0, x1)', 0.25, ...)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.eager_attention import EagerAttention, NearestMiss
from sp_compile.invariants import CANONICAL, RAISED
from sp_compile.lift import Lifter
from sp_compile.pipeline import Pass
from sp_compile.program import Fallback, Program, op_name, source_line
from sp_compile.symbols import is_tensor, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """One canonical attention node."""

    name = "raise_attention"
    requires = (CANONICAL,)
    establishes = (RAISED,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        for node in program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            reason = self._raise_sdpa(program, node)
            if reason is not None:
                node.meta["not_raised"] = reason
        for node in list(program.graph.nodes):
            if node.target in (aten.softmax.int, aten._softmax.default):
                self._raise_eager(program, node)
        program.remove_dead_code()

    def _raise_sdpa(self, program: Program, node: fx.Node) -> str | None:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        values = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        q, k, v = values["query"], values["key"], values["value"]
        tokens = program.tokens
        if tokens is None or any(len(shape_of(each)) != 4 or shape_of(each)[2] != tokens for each in (q, k, v)):
            return "not attention of the tokens over themselves"
        if values.get("dropout_p"):
            return f"dropout_p={values['dropout_p']}"
        lifter = _lifter(program, node)
        mask: Any = values.get("attn_mask")
        empty_mean = False
        if values.get("is_causal"):
            lifter.set("mask", lifter.call("le", lifter.rows(of_keys=True), lifter.rows(of_keys=False)))
        elif is_tensor(mask) and mask.meta["val"].dtype == torch.bool:
            lifter.set("mask", lifter.lift(mask))
        elif is_tensor(mask):
            split = EagerAttention(lifter)
            split.add_bias(mask)
            split.finish()
            empty_mean = split.empty_mean
        scale = values.get("scale")
        scale = float(q.meta["val"].shape[-1]) ** -0.5 if scale is None else scale
        out, _ = _insert(program, node, lifter, (q, k, v), scale, empty_mean)
        node.replace_all_uses_with(out)
        return None

    def _raise_eager(self, program: Program, softmax: fx.Node) -> None:
        if program.tokens is None or not is_tensor(softmax):
            return
        lifter = _lifter(program, softmax)
        eager = EagerAttention(lifter)
        try:
            match = eager.match(softmax)
        except NearestMiss as miss:
            if eager.scores_over_tokens(softmax):
                _record(program, softmax, f"attention not raised: {miss}")
            return
        out, lse = _insert(program, lifter.before, lifter, (match.q, match.k, match.v), match.scale, eager.empty_mean)
        eager.replace(match, out, lse)


def _lifter(program: Program, node: fx.Node) -> Lifter:
    length = program.length_input()
    assert length is not None or program.tokens is None
    anchor = node.meta["val"]
    node.meta["anchor"] = anchor[0] if isinstance(anchor, (tuple, list)) else anchor
    return Lifter(program.graph, program.tokens, length, node)


def _insert(
    program: Program,
    node: fx.Node,
    lifter: Lifter,
    qkv: tuple[fx.Node, fx.Node, fx.Node],
    scale: float,
    empty_mean: bool,
) -> tuple[fx.Node, fx.Node]:
    q, k, v = qkv
    unrepeated = _unrepeat(k), _unrepeat(v)
    if shape_of(unrepeated[0])[1] == shape_of(unrepeated[1])[1]:
        k, v = unrepeated
    args = ops.AttentionArgs(q, k, v, lifter.operands, [], lifter.rule, float(scale), empty_mean)
    with program.graph.inserting_before(node):
        raised = program.graph.call_function(torch.ops.sp_compile.attention.default, tuple(args))
        values = fx.map_arg(args, lambda each: each.meta["val"])
        with node.meta["anchor"].fake_mode:
            raised.meta["val"] = torch.ops.sp_compile.attention.default(*values)
        parts = [program.graph.call_function(getitem, (raised, i)) for i in range(2)]
    for part, value in zip(parts, raised.meta["val"], strict=True):
        part.meta["val"] = value
    for each in (raised, *parts):
        each.meta["stack_trace"] = node.meta.get("stack_trace")
    for missed, reason in lifter.misses:
        _record(program, missed, f"mask not lifted, cut to the rank's rows: {reason}")
    return parts[0], parts[1]


def _record(program: Program, node: fx.Node, reason: str) -> None:
    """Layers that miss for the same reason are one entry; what their gathers bring is told by the ops after them."""
    same = Fallback(op_name(node), 1, 0, source_line(node), reason)
    for i, each in enumerate(program.fallbacks):
        if replace(each, count=1) == same:
            program.fallbacks[i] = replace(each, count=each.count + 1)
            return
    program.fallbacks.append(same)


def _unrepeat(node: fx.Node) -> fx.Node:
    """Keys or values before their heads were repeated for grouped queries."""
    if node.target is aten.repeat_interleave.self_int:
        source, _, dim = (*node.args, None)[:3]
        return source if dim in (1, -3) else node
    if node.target is not aten.reshape.default:
        return node
    wide: Any = node.args[0]
    if not isinstance(wide, fx.Node) or wide.target is not aten.expand.default:
        return node
    narrow: Any = wide.args[0]
    if narrow.target is not aten.unsqueeze.default or narrow.args[1] not in (2, -3):
        return node
    source = narrow.args[0]
    before, after = shape_of(source), shape_of(node)
    kept = len(before) == 4 == len(after) and before[0] == after[0] and before[2:] == after[2:]
    return source if kept else node
