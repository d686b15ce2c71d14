"""From the scores that go into a softmax back to the product of queries and keys.

Masks and biases that are added or filled in, scales and shifts of whole rows are peeled off; what is left between them
and the product is a change of the score, such as soft-capping.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sp_compile.raising.axes import Dims, held_dims
from sp_compile.raising.lift import Lifter
from sp_compile.raising.lift_ops import NotLifted, constant
from sp_compile.raising.products import PRODUCTS, NearestMiss
from sp_compile.raising.rule_terms import blind_below
from sp_compile.raising.softmax_forms import CASTS
from sp_compile.symbols import is_tensor, shape_of

aten = torch.ops.aten

_VIEWS = (aten.reshape.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim,
          aten.expand.default)  # fmt: skip
_WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
_MASKED_FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)


def score_path(scores: fx.Node, tokens: Any) -> list[fx.Node]:
    """The nodes from the product of queries and keys to the scores.

    Raises:
        NearestMiss: there is no product behind the scores.
    """
    path = [scores]
    while path[0].target not in PRODUCTS:
        behind = next((each for each in path[0].all_input_nodes if _has_product(each, tokens)), None)
        if behind is None:
            raise NearestMiss(f"no matrix product behind %{scores.name}")
        path.insert(0, behind)
    return path


def _has_product(node: fx.Node, tokens: Any) -> bool:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        each = stack.pop()
        if each in seen or not is_over_tokens(each, tokens):
            continue
        seen.add(each)
        if each.target in PRODUCTS and not _is_outer(each):
            return True
        stack.extend(each.all_input_nodes)
    return False


def is_over_tokens(node: fx.Node, tokens: Any) -> bool:
    """Whether the node has two dims of tokens."""
    return is_tensor(node) and sum(tokens in size.free_symbols for size in shape_of(node)) >= 2


def _is_outer(node: fx.Node) -> bool:
    if node.target in (aten.baddbmm.default, aten.einsum.default):
        return False
    return bool(shape_of(node.args[0])[-1] == 1)


class ScoreChain:
    """Peels the scores of one attention; what it meets goes to the lifter."""

    def __init__(self, lifter: Lifter, path: list[fx.Node], dims: list[Dims], needs_lse: bool) -> None:
        self.lifter, self.terms = lifter, lifter.terms
        self.product = path[0]
        self.needs_lse = needs_lse
        self.scale = 1.0
        self._dims = dict(zip(path, dims, strict=True))

    def peel(self, node: fx.Node) -> None:
        """Take all of ``node`` apart down to the product; sets :attr:`scale`.

        Raises:
            NearestMiss: a part of it cannot be said by a rule.
        """
        while node is not self.product:
            inner = self._inner(node)
            if inner is None:
                self._change(node)
                return
            node = inner
        if node.target is aten.baddbmm.default:
            self._baddbmm(node)

    def _inner(self, node: fx.Node) -> fx.Node | None:
        """The scores before this op, if it only masks, adds, scales or reshapes."""
        args: Any = node.args
        if self._shifts_rows(node):
            if self.needs_lse:
                raise NearestMiss(f"%{node.name} shifts the scores, of which the log-sum-exp is used")
            return args[0]
        if node.target in (*CASTS, *_VIEWS):
            return args[0]
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and is_tensor(args[1]) and not node.kwargs:
            return self._added(node)
        if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            return self._scaled(node)
        if node.target in (*_WHERE, *_MASKED_FILL):
            return self._hidden(node)
        if node.target in (aten.maximum.default, aten.max.other, aten.clamp.default) and self._is_blind(args[1], node):
            return args[0] if len(args) < 3 or args[2] is None else None
        return None

    def _shifts_rows(self, node: fx.Node) -> bool:
        """Whether one number is added to or taken from all keys of a query, which a softmax does not see."""
        if node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.args[0] not in self._dims:
            return False
        if constant(node.args[1]) is not None:
            return True
        dims = held_dims(node.args[1], self._dims[node])
        atoms = {atom for each in dims or () for atom in each}
        return node.target is aten.sub.Tensor and dims is not None and self.lifter.frame.keys not in atoms

    def _added(self, node: fx.Node) -> fx.Node | None:
        first = node.args[0] in self._dims
        score, term = node.args if first else node.args[::-1]
        if node.target is aten.sub.Tensor and not first:
            return None
        value = self._lift(term, node)
        if node.target is aten.sub.Tensor:
            value = self.lifter.call("neg", value)
        self.terms.add(value, node.meta["val"].dtype, self.scale)
        return score

    def _scaled(self, node: fx.Node) -> fx.Node | None:
        args: Any = node.args
        first = args[0] in self._dims
        number = constant(args[1] if first else args[0])
        is_div = node.target in (aten.div.Tensor, aten.div.Scalar)
        if not isinstance(number, (int, float)) or number <= 0 or (is_div and not first) or node.kwargs:
            return None
        self.scale = self.scale / number if is_div else self.scale * number
        return args[0] if first else args[1]

    def _hidden(self, node: fx.Node) -> fx.Node | None:
        args: Any = node.args
        is_where = node.target in _WHERE
        condition, kept, fill = (args[0], args[1], args[2]) if is_where else (args[1], args[0], args[2])
        holds = is_where
        if is_where and kept not in self._dims:
            kept, fill, holds = fill, kept, False
        if kept not in self._dims or not self._is_blind(fill, node):
            return None
        mask = self._lift(condition, node)
        self.terms.hide(mask if holds else self.lifter.call("not", mask), constant(fill))
        return kept

    def _is_blind(self, fill: Any, node: fx.Node) -> bool:
        number = constant(fill)
        return isinstance(number, (int, float)) and number * min(self.scale, 1.0) <= blind_below(node.meta["val"].dtype)

    def _lift(self, node: Any, where: fx.Node) -> Any:
        try:
            return self.lifter.lift(node, self._dims[where], vectors=True)
        except NotLifted as reason:
            raise NearestMiss(str(reason)) from None

    def _change(self, node: fx.Node) -> None:
        """What no peeling takes off becomes a score rule."""
        known = len(self.lifter.misses)
        self.lifter.score = self.product, self._dims[self.product]
        try:
            value = self.lifter.lift(node, self._dims[node])
        except NotLifted as reason:
            raise NearestMiss(str(reason)) from None
        if len(self.lifter.misses) > known or value == "score" or not isinstance(value, str):
            missed, why = (*self.lifter.misses[known:], (node, "does not depend on it"))[0]
            raise NearestMiss(f"%{missed.name} between the product and the softmax: {why}")
        self.terms.score = value if self.scale == 1.0 else self.lifter.call("mul", value, self.scale)
        self.scale = 1.0
        if self.product.target is aten.baddbmm.default:
            raise NearestMiss(f"%{self.product.name} adds to the product before %{node.name} changes it")

    def _baddbmm(self, node: fx.Node) -> None:
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
            raise NearestMiss(f"%{node.name} with beta={beta} and alpha={alpha}")
        if beta != 0:
            self.terms.add(self._lift(node.args[0], node), node.meta["val"].dtype, self.scale * beta)
        self.scale *= alpha
