"""Let dropout draw by the seed of the call and the place of an element in the whole tensor, not by what ran before.

Requires: ``canonical``, ``attention_raised``.
Establishes: ``drawn_by_position``.

Every token draws the same mask whatever rank computes it and however many there are; ranks that compute the same value
draw the same (:mod:`sp_compile.draws`). Weights of an attention draw by bits of their query, in which are the seed, the
number of the dropout in the graph and the head, and bits of their key.

Before::

    %dropout = aten.dropout(%x, 0.1, True)
    %attention = sp_compile.attention(%q, %k, %v, [], 'keep = bernoulli(score, 0.9)', ...)

After::

    %element = aten.add(aten.mul(%row, 64), %column); ...
    %kept = aten.ge(%mixed, 429496730)  # a hash of %seed, the dropout's number and %element
    %dropped = aten.mul(%x, aten.mul(aten.to(%kept, f32), 1.11))
    %attention = sp_compile.attention(%q, %k, %v, [%of_queries, %of_keys], 'keep = drawn(x0, x1, 0.9)', ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sp_compile import ops
from sp_compile.draws import BITS, GOLDEN, STEPS
from sp_compile.errors import UnsupportedModelError
from sp_compile.invariants import CANONICAL, DRAWN, RAISED
from sp_compile.pipeline import Pass
from sp_compile.placements import REPLICATE
from sp_compile.program import Program, add_call, op_name, source_line
from sp_compile.score_rule import Assignment, calls, format_rule, parse
from sp_compile.symbols import shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class DrawByPosition(Pass):
    """Dropout by the element's place."""

    name = "draw_by_position"
    requires = (CANONICAL, RAISED)
    establishes = (DRAWN,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        number = 0
        for node in list(program.graph.nodes):
            if node.target is aten.dropout.default and _by_place(program, node):
                self._draw(program, node, number)
            elif node.target is torch.ops.sp_compile.attention.default and calls(
                ops.AttentionArgs(*node.args).rule, "bernoulli"
            ):
                self._draw_weights(program, node, number)
            else:
                continue
            number += 1
        for node in program.graph.nodes if program.differentiable and program.parallel else ():
            if isinstance(node.target, torch._ops.OpOverload) and _draws(node):
                raise UnsupportedModelError(
                    f"{op_name(node)} ({source_line(node) or 'no source line'}) draws random numbers, which would "
                    "differ from rank to rank; set its probability to 0 in the model's configuration"
                )

    def _draw(self, program: Program, node: fx.Node, number: int) -> None:
        source, chance = node.args[:2]
        value, graph = node.meta["val"], program.graph
        with graph.inserting_before(node):
            build = _Build(program, node, value)
            mixed = build.drawn(number, shape_of(node))
            kept = build.call(aten.ge.Scalar, mixed, round(chance * 2**32))
            share = 1 / (1 - chance) if chance < 1 else 0.0
            factor = build.call(aten.mul.Tensor, build.call(aten.to.dtype, kept, value.dtype), share)
            result = build.call(aten.mul.Tensor, source, factor)
        node.replace_all_uses_with(result)
        graph.erase_node(node)

    def _draw_weights(self, program: Program, node: fx.Node, number: int) -> None:
        args = ops.AttentionArgs(*node.args)
        with program.graph.inserting_before(node):
            build = _Build(program, node, args.q.meta["val"])
            (*heads, queries), keys = shape_of(args.q)[:3], shape_of(args.k)[2]
            of_queries = build.call(aten.unsqueeze.default, build.drawn(number, (*heads, queries)), -1)
            of_keys = build.call(aten.unsqueeze.default, build.mixed(build.counted(None, 2, keys)), 0)
        names = [f"x{len(args.operands) + i}" for i in range(2)]
        rule = format_rule([
            Assignment(each.name, "drawn", (*names, each.arguments[1])) if each.function == "bernoulli" else each
            for each in parse(args.rule)
        ])  # fmt: skip
        node.args = tuple(args._replace(operands=[*args.operands, of_queries, of_keys], rule=rule))


@dataclass
class _Build:
    program: Program
    origin: fx.Node
    value: Any  # whose elements draw

    def call(self, target: Any, *args: Any) -> fx.Node:
        return add_call(self.program.graph, target, args, REPLICATE, self.origin)

    def drawn(self, number: int, sizes: Sequence[sympy.Expr]) -> fx.Node:
        """32 bits for each element of a shape, by the seed and the number of the dropout."""
        seed = self.program.index_input("seed")
        if "val" not in seed.meta:
            with self.value.fake_mode:
                seed.meta["val"] = torch.empty((), dtype=torch.int64, device=self.value.device)
        element: Any = None
        for dim, size in enumerate(sizes):
            element = self.counted(element, dim, size, len(sizes))
        high = self.call(aten.__rshift__.Scalar, element, 32)
        key = self.call(aten.add.Tensor, seed, GOLDEN * (number + 1) & BITS)
        mixed = self.mixed(self.call(aten.__xor__.Tensor, element, self.mixed(key)))
        return self.mixed(self.call(aten.__xor__.Tensor, mixed, high))

    def counted(self, before: fx.Node | None, dim: int, size: sympy.Expr, dims: int = 0) -> fx.Node:
        """Numbers of elements along the dims so far, ``before`` those of the dims in front."""
        graph, length, value = self.program.graph, self.program.length_input(), self.value
        whole: Any = int(size) if size.is_Integer else length
        if not size.is_Integer and size != self.program.tokens:
            raise UnsupportedModelError(
                f"dropout ({source_line(self.origin)}) has {size} rows, which are neither fixed nor the tokens"
            )
        own = graph.call_function(aten.arange.default, (whole,), {"dtype": torch.int64, "device": value.device})
        with value.fake_mode:
            own.meta["val"] = torch.arange(value.shape[dim], dtype=torch.int64, device=value.device)
        own.meta["placement"] = REPLICATE
        own = self.call(aten.reshape.default, own, [whole] + [1] * (dims - dim - 1))
        if before is None:
            return own
        return self.call(aten.add.Tensor, self.call(aten.mul.Tensor, before, whole), own)

    def mixed(self, value: fx.Node) -> fx.Node:
        """32 bits mixed with one another, as :func:`sp_compile.draws.mixed` does; what is above is dropped."""
        value = self.call(aten.bitwise_and.Scalar, value, BITS)
        for shift, factor in STEPS:
            shifted = self.call(aten.__rshift__.Scalar, value, shift)
            value = self.call(aten.__xor__.Tensor, value, shifted)
            if factor is not None:
                value = self.call(aten.bitwise_and.Scalar, self.call(aten.mul.Tensor, value, factor), BITS)
        return value


def _by_place(program: Program, node: fx.Node) -> bool:
    """Whether a dropout draws by place: wherever ranks share the work, else where the place is known."""
    known = program.tokens is not None and all(size.is_Integer or size == program.tokens for size in shape_of(node))
    return program.parallel or known


def _draws(node: fx.Node) -> bool:
    target: Any = node.target
    if torch.Tag.nondeterministic_seeded not in target.tags or target is aten.dropout.default:
        return False
    chance = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
    return target is not aten.scaled_dot_product_attention.default or bool(chance)
