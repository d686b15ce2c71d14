"""Lifting: slicing the graph back from a mask (or a chain of scores) to per-token vectors.

A mask ``[B, H, Q, K]`` is computed by pointwise ops over vectors ``[.., Q, 1]`` and ``[.., 1, K]``. The lifter turns
those ops into a :mod:`score rule <sp_compile.score_rule>` and the vectors into its operands, so that no tensor of all
queries by all keys is ever built. A subgraph it does not know becomes one operand of that size, and is reported. How
each op is lifted is told in :mod:`sp_compile.raising.lift_ops`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sp_compile.raising import lift_ops
from sp_compile.raising.axes import Dims, Frame, held_dims, resolved
from sp_compile.raising.insertion import Inserter
from sp_compile.raising.lift_ops import NotLifted, constant
from sp_compile.raising.rule_terms import Terms
from sp_compile.score_rule import Assignment

aten = torch.ops.aten


@dataclass
class Lifter:
    """Builds one rule; operands are inserted by ``insert``.

    Attributes:
        frame: what the dims of the scores stand for.
        score: the node that a score rule calls ``score`` with its dims, if any.
        misses: nodes that were not lifted, with the reason.
        terms: what was lifted so far.
    """

    insert: Inserter
    frame: Frame
    score: tuple[fx.Node, Dims] | None = None
    operands: list[fx.Node] = field(default_factory=list)
    tables: list[fx.Node] = field(default_factory=list)
    misses: list[tuple[fx.Node, str]] = field(default_factory=list)
    terms: Terms = field(default_factory=Terms)
    _lifted: dict[tuple[fx.Node, Dims, bool], Any] = field(default_factory=dict)
    _held: dict[Any, fx.Node] = field(default_factory=dict)

    def call(self, function: str, *arguments: Any) -> Any:
        """Name of ``function(arguments)``, computed once."""
        return self.terms.call(function, *arguments)

    def rows(self, of_keys: bool) -> str:
        """The row numbers of the queries or of the keys."""
        device = self.insert.before.meta["anchor"].device
        numbers = self.insert.call(aten.arange.default, self.insert.length, device=device)
        shape = [1, self.insert.length] if of_keys else [self.insert.length, 1]
        return self._operand(self.insert.call(aten.reshape.default, numbers, shape))

    def lift(self, node: Any, dims: Dims, vectors: bool = False) -> Any:
        """Name or number for the node's value in the rule.

        Args:
            node: a node, or a number.
            dims: what the dims of the scores are that the node broadcasts to.
            vectors: lift also vectors that hide keys by a very low number, so that the rule tells which.

        Raises:
            NotLifted: the node does not broadcast to the scores.
        """
        if not isinstance(node, fx.Node):
            return node
        own = held_dims(node, dims)
        if own is None:
            raise NotLifted(f"%{node.name} does not broadcast to the scores")
        if self.score is not None and node is self.score[0]:
            if own != self.score[1]:
                raise NotLifted(f"%{node.name} is used with other rows and columns")
            return "score"
        if (node, own, vectors) not in self._lifted:
            self._lifted[node, own, vectors] = self._lift(node, own, vectors)
        return self._lifted[node, own, vectors]

    def _lift(self, node: fx.Node, dims: Dims, vectors: bool) -> Any:
        fill = constant(node)
        if fill is not None:
            return fill
        is_matrix = self.frame.is_matrix(dims)
        if not is_matrix and not (vectors and lift_ops.hides(node)):
            return self.operand(node, dims)
        known = len(self.misses)
        try:
            return lift_ops.lift(self, node, dims, vectors)
        except NotLifted as reason:
            if is_matrix:
                self.misses[known:] = [(node, str(reason))]
            return self.operand(node, dims)

    def operand(self, node: fx.Node, dims: Dims) -> str:
        """Name of an operand; it gets the dims ``[B, H, Q, K]`` if it does not broadcast to them as it is."""
        wanted = tuple(resolved(each) for each in self.frame.scores)[4 - len(dims) :]
        if len(dims) > 4 or any(own and own != whole for own, whole in zip(dims, wanted, strict=False)):
            node = self.insert.arrange(node, dims, self.frame.scores)
        return self._operand(node)

    def _operand(self, node: fx.Node) -> str:
        same = self._held.setdefault(_meaning(node), node)
        if same not in self.operands:
            self.operands.append(same)
            if lift_ops.is_zero_one(same):
                self.terms.zero_one.add(f"x{self.operands.index(same)}")
        return f"x{self.operands.index(same)}"

    def table(self, node: fx.Node) -> str:
        """Name of a table ``[heads or 1, entries]``."""
        if node not in self.tables:
            self.tables.append(node)
        return f"table{self.tables.index(node)}"

    def finish(self) -> str:
        """The rule; operands and tables that it does not read are dropped."""
        assignments = self.terms.finish()
        renamed: dict[str, str] = {}
        self.operands = _kept(self.operands, "x", assignments, renamed)
        self.tables = _kept(self.tables, "table", assignments, renamed)
        return self.terms.text(assignments, renamed)


def _meaning(value: Any, depth: int = 8) -> Any:
    """What a vector is computed from, so that the row numbers that a mask makes twice are one operand."""
    if isinstance(value, (list, tuple)):
        return tuple(_meaning(each, depth) for each in value)
    if not isinstance(value, fx.Node):
        return type(value), str(value)
    if not isinstance(value.target, torch._ops.OpOverload) or depth == 0:
        return value
    if torch.Tag.nondeterministic_seeded in value.target.tags:
        return value
    named = tuple((name, _meaning(each, depth - 1)) for name, each in sorted(value.kwargs.items()))
    return value.target, _meaning(value.args, depth - 1), named


def _kept(nodes: list[fx.Node], letter: str, assignments: list[Assignment], renamed: dict[str, str]) -> list[fx.Node]:
    read = {item for each in assignments for item in each.arguments if isinstance(item, str)}
    kept = [i for i in range(len(nodes)) if f"{letter}{i}" in read]
    renamed.update({f"{letter}{old}": f"{letter}{new}" for new, old in enumerate(kept)})
    return [nodes[i] for i in kept]
