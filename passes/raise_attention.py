"""Turn every form of attention over the tokens into one node that carries its mask and score rules.

Requires: ``canonical``.
Establishes: ``attention_raised``.

Takes ``scaled_dot_product_attention`` and every product - softmax - product, FlexAttention among them, which capture
has written out. Masks and biases are lifted to per-token vectors and tables, dropout of the weights to a term of the
rule; repeated keys and values are un-repeated. What does not fit is left as it is and the reason recorded.

Before::

    %le: b8[1, 1, T, T] = aten.le(%columns, %rows)
    %sdpa: f32[1, 4, T, 16] = aten.scaled_dot_product_attention(%q, %k_repeated, %v_repeated, %le, scale=0.25)

After::

    %attention = sp_compile.attention(%q, %k, %v, [%columns, %rows], 'mask = le(x0, x1)', 0.25, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.invariants import CANONICAL, RAISED
from sp_compile.pipeline import Pass
from sp_compile.program import Program
from sp_compile.raising import eager_attention, sdpa
from sp_compile.raising.axes import shape_of
from sp_compile.raising.eager_attention import EagerAttention
from sp_compile.raising.insertion import Inserter
from sp_compile.raising.lift_ops import NotLifted
from sp_compile.raising.lookups import read_in_order
from sp_compile.raising.products import NearestMiss
from sp_compile.raising.sdpa import SdpaAttention
from sp_compile.raising.softmax_forms import SOFTMAXES

aten = torch.ops.aten

_SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """One canonical attention node."""

    name = "raise_attention"
    requires = (CANONICAL,)
    establishes = (RAISED,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if program.tokens is not None:
            _drop_indices(program)
            for node in list(program.graph.nodes):
                if node.target is _SDPA:
                    _raise_sdpa(program, node)
                elif node.target in (*SOFTMAXES, aten.exp.default):
                    _raise_eager(program, node)
            program.remove_dead_code()
        for node in program.graph.find_nodes(op="call_function", target=_SDPA):
            node.meta.setdefault("not_raised", "no symbolic token length")


def _drop_indices(program: Program) -> None:
    """Values that are indexed by all their row numbers in order, as mask functions do, are the values themselves."""
    for node in program.graph.find_nodes(op="call_function", target=aten.index.Tensor):
        read = read_in_order(node)
        if read is not None:
            base, dims, wanted = read
            node.meta["anchor"] = node.meta["val"]
            insert = _inserter(program, node)
            node.replace_all_uses_with(insert.reshape(insert.arrange(base, dims, wanted), shape_of(node)))
            program.graph.erase_node(node)


def _raise_sdpa(program: Program, node: fx.Node) -> None:
    try:
        found = sdpa.match(node, _inserter(program, node), _batch(program))
    except (NearestMiss, NotLifted) as miss:
        node.meta["not_raised"] = str(miss)
        if sdpa.is_over_tokens(node, program.tokens):
            program.record(node, f"attention not raised: {miss}")
        return
    found.replace(*_insert(program, found))


def _raise_eager(program: Program, root: fx.Node) -> None:
    if not eager_attention.over_tokens(root, program.tokens):
        return
    try:
        found = eager_attention.match(root, _inserter(program, root), _batch(program))
    except NearestMiss as miss:
        program.record(root, f"attention not raised: {miss}")
        return
    found.replace(*_insert(program, found))


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


def _insert(program: Program, found: SdpaAttention | EagerAttention) -> tuple[fx.Node, fx.Node]:
    """Add the attention node; its output and log-sum-exp."""
    k, v, lifter = found.k, found.v, found.lifter
    unrepeated = _unrepeat(k), _unrepeat(v)
    if shape_of(unrepeated[0])[1] == shape_of(unrepeated[1])[1]:
        k, v = unrepeated
    rule = lifter.finish()
    args = ops.AttentionArgs(found.q, k, v, lifter.operands, lifter.tables, rule, float(found.scale), found.empty_mean)
    dropout = lifter.terms.dropout
    insert = lifter.insert.new if dropout else lifter.insert.call  # equal ones draw each for itself
    raised = insert(torch.ops.sp_compile.attention.default, *args)
    out, lse = (lifter.insert.call(getitem, raised, i) for i in range(2))
    if dropout:
        out = lifter.insert.call(aten.mul.Tensor, out, 1 / (1 - dropout) if dropout < 1 else 0.0)
    for missed, reason in lifter.misses:
        program.record(missed, f"mask not lifted, cut to the rank's rows: {reason}")
    return out, lse


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
