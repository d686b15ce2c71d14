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

from sp_compile import eager_attention, ops
from sp_compile.axes import Frame, frame_of, held_dims, new_dims
from sp_compile.insertion import Inserter
from sp_compile.invariants import CANONICAL, RAISED
from sp_compile.lift import Lifter
from sp_compile.lift_ops import NotLifted
from sp_compile.pipeline import Pass
from sp_compile.products import NearestMiss, from_heads, to_heads
from sp_compile.program import Fallback, Program, op_name, source_line
from sp_compile.softmax_forms import SOFTMAXES
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
        if program.tokens is not None:
            for node in list(program.graph.nodes):
                if node.target is aten.scaled_dot_product_attention.default:
                    _raise_sdpa(program, node)
                elif node.target in (*SOFTMAXES, aten.exp.default):
                    _raise_eager(program, node)
            program.remove_dead_code()
        for node in program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            node.meta.setdefault("not_raised", "no symbolic token length")


def _raise_sdpa(program: Program, node: fx.Node) -> None:
    try:
        _sdpa(program, node)
    except (NearestMiss, NotLifted) as miss:
        node.meta["not_raised"] = str(miss)
        if len(_token_dims(program, node)) > 0:
            _record(program, node, f"attention not raised: {miss}")


def _token_dims(program: Program, node: fx.Node) -> list[int]:
    return [i for i, size in enumerate(shape_of(node)) if program.tokens in size.free_symbols]


def _sdpa(program: Program, node: fx.Node) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    values: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    q, k, v = values["query"], values["key"], values["value"]
    for name, each in (("query", q), ("key", k), ("value", v)):
        if shape_of(each)[-2] != program.tokens:
            raise NearestMiss(f"its {name} %{each.name} is not over the tokens: {list(shape_of(each))}")
    if values.get("dropout_p"):
        raise NearestMiss(f"dropout_p={values['dropout_p']}; call model.eval()")
    grouped = bool(values.get("enable_gqa"))
    dims, frame = _sdpa_dims(program, q)
    key_dims = (*dims[:-2], (frame.keys,), dims[-1])
    node.meta["anchor"] = node.meta["val"]
    insert = _inserter(program, node)
    lifter = Lifter(insert, frame)
    _sdpa_mask(lifter, values, node)
    scale = values.get("scale")
    scale = float(shape_of(q)[-1]) ** -0.5 if scale is None else float(scale)
    heads = to_heads(insert, q, dims, frame, frame.queries, dims[-1][0])
    whole = []
    for each in (k, v):
        own = (*key_dims[:-1], new_dims(shape_of(each)[-1:])[0])
        if grouped and len(shape_of(each)) == 4:
            whole.append(each)
        elif grouped or held_dims(each, own) is None:
            raise NearestMiss(f"%{each.name} has the dims {list(shape_of(each))}, the query {list(shape_of(q))}")
        else:
            whole.append(to_heads(insert, each, own, frame, frame.keys, (*own[-1], frame.keys)[0]))
    features = new_dims(shape_of(node)[-1:])[0]
    out, _ = _insert(program, lifter, (heads, *whole), scale, lifter.terms.empty_mean)
    node.replace_all_uses_with(from_heads(insert, out, frame, features[0], node, (*dims[:-1], features)))


def _sdpa_dims(program: Program, q: fx.Node) -> tuple[Any, Frame]:
    dims = new_dims(shape_of(q))
    lead = [atom for each in dims[:-2] for atom in each]
    keys = new_dims([program.tokens])[0][0]
    return dims, frame_of(lead, dims[-2][0], keys, _batch(program))


def _sdpa_mask(lifter: Lifter, values: dict[str, Any], node: fx.Node) -> None:
    terms, mask = lifter.terms, values.get("attn_mask")
    if values.get("is_causal"):
        terms.hide(lifter.call("le", lifter.rows(of_keys=True), lifter.rows(of_keys=False)))
    if not is_tensor(mask):
        return
    frame = lifter.frame
    lead = new_dims(shape_of(values["query"]))[:-2]
    atoms = [*frame.batch, *frame.heads]
    dims = (*(() if not each else (atoms.pop(0),) for each in lead), (frame.queries,), (frame.keys,))
    if mask.meta["val"].dtype == torch.bool:
        terms.hide(lifter.lift(mask, dims))
    else:
        terms.add(lifter.lift(mask, dims, vectors=True), mask.meta["val"].dtype)


def _raise_eager(program: Program, root: fx.Node) -> None:
    if not eager_attention.over_tokens(root, program.tokens):
        return
    try:
        found = eager_attention.match(root, _inserter(program, root), _batch(program))
    except NearestMiss as miss:
        _record(program, root, f"attention not raised: {miss}")
        return
    out, lse = _insert(program, found.lifter, (found.q, found.k, found.v), found.scale, found.empty_mean)
    found.replace(out, lse)


def _inserter(program: Program, node: fx.Node) -> Inserter:
    length = program.length_input()
    assert length is not None
    assert program.tokens is not None
    return Inserter(program.graph, program.tokens, length, node)


def _batch(program: Program) -> int:
    """Number of sequences that the inputs hold side by side."""
    for node in program.graph.find_nodes(op="placeholder"):
        dim = program.token_inputs.get(node.name)
        if dim:
            size = shape_of(node)[0]
            return int(size) if size.is_Integer else 1
    return 1


def _insert(
    program: Program, lifter: Lifter, qkv: tuple[fx.Node, fx.Node, fx.Node], scale: float, empty_mean: bool
) -> tuple[fx.Node, fx.Node]:
    q, k, v = qkv
    node = lifter.insert.before
    unrepeated = _unrepeat(k), _unrepeat(v)
    if shape_of(unrepeated[0])[1] == shape_of(unrepeated[1])[1]:
        k, v = unrepeated
    rule = lifter.finish()
    args = ops.AttentionArgs(q, k, v, lifter.operands, lifter.tables, rule, float(scale), empty_mean)
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
