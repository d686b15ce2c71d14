"""Lifting: slicing the graph back from a mask (or a chain of scores) to per-token vectors.

A mask ``[B, H, Q, K]`` is computed by pointwise ops over vectors ``[.., Q, 1]`` and ``[.., 1, K]``. The lifter turns
those ops into a :mod:`score rule <sp_compile.score_rule>` and the vectors into its operands, so that no tensor of all
queries by all keys is ever built. A subgraph it does not know becomes one operand of that size, and is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from sp_compile.score_rule import Assignment, format_rule
from sp_compile.symbols import is_tensor, shape_of

aten = torch.ops.aten

_DIRECT = {
    "add": "add", "sub": "sub", "mul": "mul", "multiply": "mul", "div": "div", "floor_divide": "floor_divide",
    "neg": "neg", "abs": "abs", "pow": "pow", "exp": "exp", "log": "log", "tanh": "tanh", "sigmoid": "sigmoid",
    "maximum": "maximum", "minimum": "minimum", "le": "le", "lt": "lt", "ge": "ge", "gt": "gt", "eq": "eq", "ne": "ne",
    "logical_and": "and", "logical_or": "or", "logical_xor": "xor", "logical_not": "not", "where": "where",
}  # fmt: skip
_BITWISE = {"__and__": "and", "bitwise_and": "and", "__or__": "or", "bitwise_or": "or", "bitwise_not": "not",
            "__xor__": "xor", "bitwise_xor": "xor"}  # fmt: skip
_TRANSPARENT = {"expand", "clone", "contiguous", "alias", "detach", "expand_as"}
_FILLS = {"zeros": 0, "zeros_like": 0, "ones": 1, "ones_like": 1, "new_zeros": 0, "new_ones": 1}

Adapt = Callable[[fx.Graph, fx.Node], fx.Node]


def same(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Leave an operand as it is: it broadcasts to the scores already."""
    return node


@dataclass
class Lifter:
    """Builds one rule; operands are inserted in front of ``before``.

    Attributes:
        score: the node that a score rule calls ``score``, if any.
        misses: ops that were not lifted, with the reason.
    """

    graph: fx.Graph
    tokens: sympy.Symbol
    length: fx.Node
    before: fx.Node
    score: fx.Node | None = None
    operands: list[fx.Node] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    misses: list[tuple[fx.Node, str]] = field(default_factory=list)
    _names: dict[tuple[str, tuple[Any, ...]], str] = field(default_factory=dict)
    _lifted: dict[tuple[fx.Node, Adapt], Any] = field(default_factory=dict)

    @property
    def rule(self) -> str:
        """The text of what was lifted so far."""
        return format_rule(self.assignments)

    def set(self, output: str, value: Any) -> None:
        """Assign ``mask``, ``bias`` or ``score``."""
        last = self.assignments[-1] if self.assignments else None
        if last is not None and last.name == value and sum(value in each.arguments for each in self.assignments) == 0:
            self.assignments[-1] = Assignment(output, last.function, last.arguments)
        else:
            self.assignments.append(Assignment(output, "copy", (value,)))

    def call(self, function: str, *arguments: Any) -> str:
        """Name of ``function(arguments)``, computed once."""
        key = (function, arguments)
        if key not in self._names:
            self._names[key] = f"t{len(self._names)}"
            self.assignments.append(Assignment(self._names[key], function, arguments))
        return self._names[key]

    def rows(self, of_keys: bool) -> str:
        """The row numbers of the queries or of the keys."""
        with self.graph.inserting_before(self.before):
            value = self.before.meta["anchor"]
            node = self._node(aten.arange.default, (self.length,), {"device": value.device})
            shape = [1, self.length] if of_keys else [self.length, 1]
            return self._operand(self._node(aten.reshape.default, (node, shape)))

    def _node(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        for node in self.graph.find_nodes(op="call_function", target=target):
            if node.args == args and node.kwargs == (kwargs or {}) and node < self.before:
                return node
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs or {}), lambda each: each.meta["val"])
        with self.before.meta["anchor"].fake_mode:
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def is_matrix(self, node: Any) -> bool:
        """Whether the node has both a query and a key dim."""
        sizes = shape_of(node) if is_tensor(node) else ()
        return len(sizes) >= 2 and sizes[-1] == self.tokens and sizes[-2] == self.tokens

    def lift(self, node: Any, adapt: Adapt = same) -> Any:
        """Name or number for the node's value in the rule; ``adapt`` brings its operands to the scores' dims."""
        if not isinstance(node, fx.Node):
            return node
        if node is self.score:
            return "score"
        if (node, adapt) not in self._lifted:
            self._lifted[node, adapt] = self._lift(node, adapt)
        return self._lifted[node, adapt]

    def _lift(self, node: fx.Node, adapt: Adapt) -> Any:
        fill = _constant(node)
        if fill is not None:
            return fill
        if not self.is_matrix(node):
            return self._operand_of(node, adapt)
        try:
            return self._interior(node, adapt)
        except NotLifted as reason:
            self.misses.append((node, str(reason)))
            return self._operand_of(node, adapt)

    def _operand_of(self, node: fx.Node, adapt: Adapt) -> str:
        with self.graph.inserting_before(self.before):
            return self._operand(adapt(self.graph, node))

    def _operand(self, node: fx.Node) -> str:
        if node not in self.operands:
            self.operands.append(node)
        return f"x{self.operands.index(node)}"

    def _interior(self, node: fx.Node, adapt: Adapt) -> Any:
        if not isinstance(node.target, torch._ops.OpOverload):
            raise NotLifted(f"{node.target} is not pointwise")
        name = node.target._schema.name.split("::")[1]
        arguments = _arguments(node)
        if arguments.get("alpha", 1) != 1:
            raise NotLifted(f"{name} with alpha={arguments['alpha']}")
        if name in _TRANSPARENT:
            return self.lift(node.args[0], adapt)
        if arguments.get("rounding_mode") is not None:
            if arguments["rounding_mode"] != "floor":
                raise NotLifted(f"{name} that rounds by {arguments['rounding_mode']}")
            name = "floor_divide"
        if name in _DIRECT:
            return self.call(_DIRECT[name], *(self.lift(each, adapt) for each in node.args))
        if name in _BITWISE and node.meta["val"].dtype == torch.bool:
            return self.call(_BITWISE[name], *(self.lift(each, adapt) for each in node.args))
        if name == "rsub":
            return self.call("sub", self.lift(node.args[1], adapt), self.lift(node.args[0], adapt))
        if name in ("max", "min") and len(node.args) == 2:
            return self.call(f"{name}imum", *(self.lift(each, adapt) for each in node.args))
        if name == "masked_fill":
            value, mask, fill = (self.lift(each, adapt) for each in node.args)
            return self.call("where", mask, fill, value)
        if name in ("tril", "triu"):
            return self._triangle(node, name, adapt)
        if name in ("_to_copy", "to", "type_as"):
            return self._cast(node, adapt)
        if name == "unsqueeze" and self.is_matrix(node.args[0]):
            return self.lift(node.args[0], unsqueezed(int(node.args[1]), len(shape_of(node)), adapt))
        if name == "clamp" and not any(isinstance(each, fx.Node) for each in node.args[1:]):
            low, high = arguments.get("min"), arguments.get("max")
            value = self.lift(node.args[0], adapt)
            value = value if low is None else self.call("maximum", value, low)
            return value if high is None else self.call("minimum", value, high)
        raise NotLifted(f"{name} is not a pointwise op that rules know")

    def _cast(self, node: fx.Node, adapt: Adapt) -> Any:
        value = self.lift(node.args[0], adapt)
        before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype
        if not isinstance(value, str):
            return bool(value) if after == torch.bool else float(value) if after.is_floating_point else int(value)
        if after == torch.bool:
            return value if before == torch.bool else self.call("bool", value)
        if not after.is_floating_point:
            return self.call("int", value) if before.is_floating_point else value
        return value if before.is_floating_point else self.call("float", value)

    def _triangle(self, node: fx.Node, name: str, adapt: Adapt) -> Any:
        arguments = _arguments(node)
        diagonal = arguments.get("diagonal", 0)
        if not isinstance(diagonal, int):
            raise NotLifted(f"{name} with a symbolic diagonal")
        value, queries, keys = self.lift(node.args[0], adapt), self.rows(of_keys=False), self.rows(of_keys=True)
        inside = self.call("le" if name == "tril" else "ge", keys, self.call("add", queries, diagonal))
        return self.call("and", inside, value) if node.meta["val"].dtype == torch.bool else self.call(
            "where", inside, value, 0
        )  # fmt: skip


class NotLifted(Exception):
    """Why an op cannot become part of a rule."""


def unsqueezed(dim: int, rank: int, then: Adapt) -> Adapt:
    """Operands that lie left of the new dim get it too; the others broadcast."""
    from_right = rank - (dim % rank)

    def adapt(graph: fx.Graph, node: fx.Node) -> fx.Node:
        own = len(shape_of(node))
        if own >= from_right:
            new = graph.call_function(aten.unsqueeze.default, (node, own + 1 - from_right))
            new.meta["val"] = node.meta["val"].unsqueeze(own + 1 - from_right)
            node = new
        return then(graph, node)

    return adapt


def _arguments(node: fx.Node) -> dict[str, Any]:
    schema = node.target._schema
    named = {arg.name: value for arg, value in zip(schema.arguments, node.args, strict=False)}
    return {**named, **node.kwargs}


def _constant(node: fx.Node) -> Any:
    """The number that every element of the node has, if it is made from one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name.split("::")[1]
    dtype = node.meta["val"].dtype
    if name in _FILLS:
        return bool(_FILLS[name]) if dtype == torch.bool else _FILLS[name]
    if name in ("full", "full_like", "new_full"):
        value = node.args[2] if name == "new_full" else node.args[1]
        return None if isinstance(value, fx.Node) else value
    if name == "scalar_tensor":
        return None if isinstance(node.args[0], fx.Node) else node.args[0]
    return None


def constant(node: Any) -> Any:
    """A number, or the number that fills the node; None for anything else."""
    return _constant(node) if isinstance(node, fx.Node) and is_tensor(node) else node if not isinstance(
        node, fx.Node) else None  # fmt: skip
