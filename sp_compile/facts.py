"""What a graph computes without the tokens, for a packed row and for each of its requests alone.

Rotary tables, learned positions and anything else that follows from positions, sizes and weights is the same for every
text of these lengths. So whether it depends on where in the row a request lies is found by computing it for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.masks import follows_from_inputs, slice_of
from sp_compile.program import Program, op_name, source_line
from sp_compile.raising.lift_ops import constant
from sp_compile.requests import rows_read
from sp_compile.symbols import is_tensor, token_dims


@dataclass(frozen=True)
class Fact:
    """An output of :attr:`Facts.gm`, its dims of so many rows a token, and who takes it; ``rows`` numbers rows."""

    dims: tuple[tuple[int, int], ...]
    rows: bool
    user: str


@dataclass(frozen=True)
class Facts:
    """All values that ops on tokens take from ops without tokens, and the part of the graph that computes them."""

    gm: fx.GraphModule
    inputs: tuple[str, ...]
    facts: tuple[Fact, ...]

    def evaluate(self, inputs: Mapping[str, Any]) -> list[Any]:
        """The values for these inputs, weights among them; weights without data are made up."""
        with torch.no_grad():
            return list(self.gm(*(_real(inputs[name]) for name in self.inputs)))

    def differ(self, together: Sequence[Any], alone: Sequence[Any], rows: slice) -> str | None:
        """Who takes a value that the request in these rows would not have alone, if anyone does."""
        for fact, packed, single in zip(self.facts, together, alone, strict=True):
            if not isinstance(packed, torch.Tensor):
                if packed != single:
                    return fact.user
                continue
            for dim, times in fact.dims:
                packed = packed.narrow(dim, times * rows.start, times * (rows.stop - rows.start))
            if not _same(packed - rows.start if fact.rows else packed, single):
                return fact.user
        return None


def read_facts(program: Program, device: torch.device | None = None) -> Facts:
    """Collect what ops on tokens take from the rest of the graph; operands of masks that hold no weights apart."""
    free, varying = _without_tokens(program)
    of_masks = follows_from_inputs(program)
    found: dict[tuple[fx.Node, bool], Fact] = {}
    for node in program.graph.nodes:
        # which rows are returned (logits_to_keep) is up to the caller, who counts in the packed row
        if node.op != "call_function" or node in free or node.target is ops.select_rows:
            continue
        numbers = rows_read(node, program.tokens)
        for each in node.all_input_nodes:
            masks = each in of_masks and node.target is torch.ops.sp_compile.attention.default
            if each in varying and not masks and not _is_fill(each) and (is_tensor(each) or _is_pointwise(node)):
                where = source_line(node)
                fact = Fact(
                    tuple(token_dims(each, program.tokens).items()),
                    each in numbers,
                    f"{op_name(node)}{f' ({where})' if where else ''}",
                )
                found.setdefault((each, fact.rows), fact)
    gm, inputs = slice_of(program, [each for each, _ in found], device)
    return Facts(gm, inputs, tuple(found.values()))


def _without_tokens(program: Program) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes that no token leads to, and those of them that more than weights lead to."""
    free, varying = set[fx.Node](), set[fx.Node]()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name not in program.token_inputs:
            free.add(node)
            if not node.meta.get("weight"):
                varying.add(node)
        elif node.op == "get_attr" or (node.op == "call_function" and free.issuperset(node.all_input_nodes)):
            free.add(node)
            if not varying.isdisjoint(node.all_input_nodes):
                varying.add(node)
    return free, varying


def _is_fill(node: fx.Node) -> bool:
    """Whether every element of the node is the same number, whatever its size."""
    return constant(node) is not None or op_name(node) == "aten.empty"


def _is_pointwise(node: fx.Node) -> bool:
    """Whether a size among the arguments is computed with, not a shape."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _real(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_meta:
        return value
    generator = torch.Generator().manual_seed(0)
    if value.is_floating_point():
        return torch.rand(value.shape, generator=generator, dtype=torch.float32).to(value.dtype)
    return torch.randint(0, 2, value.shape, generator=generator).to(value.dtype)


def _same(packed: torch.Tensor, single: torch.Tensor) -> bool:
    if packed.shape != single.shape or not packed.numel():
        return packed.shape == single.shape
    if not (packed.is_floating_point() or packed.is_complex()):
        return bool(torch.equal(packed, single))
    near = 64 * torch.finfo(packed.dtype).eps * single.abs().nan_to_num(posinf=0.0).max().item()
    return torch.allclose(packed, single, rtol=0.0, atol=near, equal_nan=True)
