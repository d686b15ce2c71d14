"""What a sharding rule sees and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from sp_compile.placements import REPLICATE, Placement, Shard
from sp_compile.symbols import is_tensor, shape_of

Placed = Placement | tuple[Placement, ...]


class NoRule(Exception):
    """The rule does not apply to this call; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """A rule's answer: the output's placement and the placement it needs of each tensor input.

    Inputs that are not named stay as they are. ``substitute``, where given, builds the node that replaces the call.
    """

    output: Placed
    inputs: Mapping[fx.Node, Placement] = field(default_factory=dict)
    substitute: Callable[[fx.Graph], fx.Node] | None = None


@dataclass(frozen=True)
class Call:
    """One op call in the global view.

    Attributes:
        node: the call.
        tokens: symbol of the token length.
        placed: placement of each tensor input.
        desired: what a consumer wants of the output, when no input says so (creations, expansions).
    """

    node: fx.Node
    tokens: sympy.Symbol
    placed: Mapping[fx.Node, Placement]
    desired: Shard | None = None

    @property
    def tensors(self) -> list[fx.Node]:
        """Tensor inputs, each once, in argument order."""
        return [node for node in self.node.all_input_nodes if is_tensor(node)]

    def shard(self, node: Any) -> Shard | None:
        """The input's placement when it is sharded."""
        placement = self.placed.get(node) if isinstance(node, fx.Node) else None
        return placement if isinstance(placement, Shard) else None

    def sharded(self) -> Iterator[tuple[fx.Node, Shard]]:
        """Inputs that are sharded, with their placements."""
        for node in self.tensors:
            placement = self.shard(node)
            if placement is not None:
                yield node, placement

    def first_shard(self) -> Shard:
        """The placement of the first sharded input."""
        for _, placement in self.sharded():
            return placement
        raise NoRule("no input is sharded")

    def arguments(self) -> dict[str, Any]:
        """All arguments by their names in the op's schema, defaults filled in."""
        schema = self.node.target._schema
        values = {arg.name: arg.default_value for arg in schema.arguments if arg.has_default_value()}
        values.update({arg.name: value for arg, value in zip(schema.arguments, self.node.args, strict=False)})
        values.update(self.node.kwargs)
        return values


def output_shape(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """Global shape of the call's output, or of its first output."""
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        value = value[0]
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in value.shape)


def rank_of(node: fx.Node) -> int:
    """Number of dims of a tensor node."""
    return len(shape_of(node))


def only_input(call: Call, node: Any) -> Shard:
    """Placement of the call's main input, which must be the sharded one."""
    placement = call.shard(node)
    if placement is None:
        raise NoRule("another input than the main one is sharded")
    return placement


def replicate_others(call: Call, *keep: fx.Node) -> dict[fx.Node, Placement]:
    """Require ``Replicate`` of every tensor input but those named."""
    return {node: REPLICATE for node in call.tensors if node not in keep}


def align(call: Call, nodes: list[fx.Node], shape: tuple[sympy.Expr, ...]) -> tuple[Shard, dict[fx.Node, Placement]]:
    """Place inputs that broadcast to ``shape``: the first sharded dim, counted from the right, decides.

    Returns the placement along ``shape`` and what each input needs.
    """
    best: tuple[int, Shard] | None = None
    for node in nodes:
        placement = call.shard(node)
        if placement is not None:
            place = placement.dim - rank_of(node)
            if best is None or place < best[0]:
                best = (place, placement)
    if best is None:
        raise NoRule("no input is sharded")
    place, model = best
    needs: dict[fx.Node, Placement] = {}
    for node in nodes:
        sizes = shape_of(node)
        dim = place + len(sizes)
        if dim < 0 or sizes[dim] == 1:
            needs[node] = REPLICATE
        elif sizes[dim] == shape[place]:
            needs[node] = model.at(dim)
        else:
            raise NoRule(f"input {node.name} has size {sizes[dim]} where the output has {shape[place]}")
    return model.at(place + len(shape)), needs
