"""Let dropout draw by the seed of the call and the place of an element in the whole tensor, not by what ran before.

Requires: ``canonical``.
Establishes: ``drawn_by_position``.

Every token draws the same mask whatever rank computes it and however many there are; ranks that compute the same value
draw the same. The numbers are a hash of 32 bits of the seed, the number of the dropout in the graph, and the element's
number (the finalizer of C. Wellons, "Prospecting for Hash Functions").

Before::

    %dropout = aten.dropout(%x, 0.1, True)

After::

    %element = aten.add(aten.mul(%row, 64), %column); ...
    %kept = aten.ge(%mixed, 429496730)  # a hash of %seed, the dropout's number and %element
    %dropped = aten.mul(%x, aten.mul(aten.to(%kept, f32), 1.11))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sp_compile.errors import UnsupportedModelError
from sp_compile.invariants import CANONICAL, DRAWN
from sp_compile.pipeline import Pass
from sp_compile.placements import REPLICATE
from sp_compile.program import Program, add_call, op_name, source_line
from sp_compile.symbols import shape_of

aten = torch.ops.aten
ALL = 0xFFFFFFFF
GOLDEN = 0x9E3779B9


@dataclass(frozen=True)
class DrawByPosition(Pass):
    """Dropout by the element's place."""

    name = "draw_by_position"
    requires = (CANONICAL,)
    establishes = (DRAWN,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if not program.parallel:
            return
        for number, node in enumerate(program.graph.find_nodes(op="call_function", target=aten.dropout.default)):
            self._draw(program, node, number)
        for node in program.graph.nodes if program.differentiable else ():
            if isinstance(node.target, torch._ops.OpOverload) and _draws(node):
                raise UnsupportedModelError(
                    f"{op_name(node)} ({source_line(node) or 'no source line'}) draws random numbers, which would "
                    "differ from rank to rank; set its probability to 0 in the model's configuration"
                )

    def _draw(self, program: Program, node: fx.Node, number: int) -> None:
        source, chance = node.args[:2]
        value, graph = node.meta["val"], program.graph
        with graph.inserting_before(node):
            seed = program.index_input("seed")
            if "val" not in seed.meta:
                with value.fake_mode:
                    seed.meta["val"] = torch.empty((), dtype=torch.int64, device=value.device)
            build = _Build(program, node)
            element: Any = None
            for dim, size in enumerate(shape_of(node)):
                element = build.counted(element, dim, size, value)
            high = build.call(aten.__rshift__.Scalar, element, 32)
            key = build.call(aten.add.Tensor, seed, GOLDEN * (number + 1) & ALL)
            mixed = build.mixed(build.call(aten.__xor__.Tensor, element, build.mixed(key)))
            mixed = build.mixed(build.call(aten.__xor__.Tensor, mixed, high))
            kept = build.call(aten.ge.Scalar, mixed, round(chance * 2**32))
            factor = build.call(aten.mul.Tensor, build.call(aten.to.dtype, kept, value.dtype), 1 / (1 - chance))
            result = build.call(aten.mul.Tensor, source, factor)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


@dataclass
class _Build:
    program: Program
    origin: fx.Node

    def call(self, target: Any, *args: Any) -> fx.Node:
        return add_call(self.program.graph, target, args, REPLICATE, self.origin)

    def counted(self, before: fx.Node | None, dim: int, size: sympy.Expr, value: Any) -> fx.Node:
        """Numbers of elements along the dims so far, ``before`` those of the dims in front."""
        graph, length = self.program.graph, self.program.length_input()
        whole: Any = int(size) if size.is_Integer else length
        if not size.is_Integer and size != self.program.tokens:
            raise UnsupportedModelError(
                f"dropout ({source_line(self.origin)}) has {size} rows, which are neither fixed nor the tokens"
            )
        own = graph.call_function(aten.arange.default, (whole,), {"dtype": torch.int64, "device": value.device})
        with value.fake_mode:
            own.meta["val"] = torch.arange(value.shape[dim], dtype=torch.int64, device=value.device)
        own.meta["placement"] = REPLICATE
        own = self.call(aten.reshape.default, own, [whole] + [1] * (value.dim() - dim - 1))
        if before is None:
            return own
        return self.call(aten.add.Tensor, self.call(aten.mul.Tensor, before, whole), own)

    def mixed(self, value: fx.Node) -> fx.Node:
        """32 bits mixed with one another; what is above is dropped."""
        value = self.call(aten.bitwise_and.Scalar, value, ALL)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
            shifted = self.call(aten.__rshift__.Scalar, value, shift)
            value = self.call(aten.__xor__.Tensor, value, shifted)
            if factor is not None:
                value = self.call(aten.bitwise_and.Scalar, self.call(aten.mul.Tensor, value, factor), ALL)
        return value


def _draws(node: fx.Node) -> bool:
    target: Any = node.target
    if torch.Tag.nondeterministic_seeded not in target.tags or target is aten.dropout.default:
        return False
    chance = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
    return target is not aten.scaled_dot_product_attention.default or bool(chance)
