"""Adding nodes to a graph in front of another one, with their fake values."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sp_compile.raising.axes import Atom, Dims, resolved
from sp_compile.symbols import coefficient, computed, product, shape_of

aten = torch.ops.aten


@dataclass
class Inserter:
    """Inserts calls in front of ``before``; a call that is there already is not made twice.

    Attributes:
        tokens: symbol of the token length, and ``length`` the placeholder that holds it.
    """

    graph: fx.Graph
    tokens: sympy.Symbol
    length: fx.Node
    before: fx.Node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """The value of ``target(*args, **kwargs)``."""
        args = tuple(list(each) if isinstance(each, tuple) else each for each in args)
        for node in self.graph.find_nodes(op="call_function", target=target):
            if list(node.args) == list(args) and node.kwargs == kwargs and node < self.before:
                return node
        return self.new(target, *args, **kwargs)

    def new(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of its own."""
        with self.graph.inserting_before(self.before):
            node = computed(self.graph, target, args, kwargs, self.before.meta["anchor"].fake_mode)
        node.meta["stack_trace"] = self.before.meta.get("stack_trace")
        return node

    def size(self, size: sympy.Expr) -> Any:
        """A size as an argument."""
        if size.is_Integer:
            return int(size)
        times = coefficient(size, self.tokens)
        assert times, f"{size} is no multiple of the tokens"
        return self.length if times == 1 else self.call(operator.mul, self.length, times)

    def reshape(self, node: fx.Node, sizes: Any) -> fx.Node:
        """The node in another shape."""
        sizes = tuple(sizes)
        if sizes == shape_of(node):
            return node
        return self.call(aten.reshape.default, node, [self.size(each) for each in sizes])

    def arrange(self, node: fx.Node, dims: Dims, wanted: Dims, expand: frozenset[int] = frozenset()) -> fx.Node:
        """Bring a value to the dims ``wanted``; a dim that it has no atom of becomes 1, or whole if in ``expand``.

        A wanted dim of which it has only some atoms is filled by repeating.
        """
        wanted = tuple(resolved(each) for each in wanted)
        own = [atom for each in dims for atom in resolved(each)]
        kept = [[a for a in each if a in own or i in expand or _partly(each, own)] for i, each in enumerate(wanted)]
        order = [atom for each in kept for atom in each]
        assert set(own) <= set(order), "a value has a dim that the scores do not have"
        if own != [atom for atom in order if atom in own]:
            node = self.reshape(node, [atom.size for atom in own])
            ordered = [atom for atom in order if atom in own]
            node = self.call(aten.permute.default, node, [own.index(atom) for atom in ordered])
        if set(own) != set(order):
            node = self.reshape(node, [atom.size if atom in own else sympy.Integer(1) for atom in order])
            node = self.call(aten.expand.default, node, [self.size(atom.size) for atom in order])
        return self.reshape(node, [product([atom.size for atom in each]) for each in kept])


def _partly(atoms: tuple[Atom, ...], own: list[Atom]) -> bool:
    return any(atom in own for atom in atoms)
