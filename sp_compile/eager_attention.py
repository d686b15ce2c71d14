"""Recognising attention written as matmul - softmax - matmul.

From the softmax the scores are peeled backwards: masks and biases that are added, row maxima that are subtracted, a
sink column that is concatenated, casts and reshapes; what is left between them and the matrix product is the change of
the score (soft-capping). Forwards the weights must reach one product with the values and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sp_compile.lift import Adapt, Lifter, constant, same
from sp_compile.symbols import is_tensor, product, shape_of

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
_BLIND = 1e30


class NearestMiss(Exception):
    """Why a candidate is not attention; names the node that did not fit."""


@dataclass
class Match:
    """The parts of an eager attention."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    product: fx.Node
    scores: fx.Node
    sink: fx.Node | None


class EagerAttention:
    """Peels one candidate; masks and biases go to the lifter as they are met."""

    def __init__(self, lifter: Lifter) -> None:
        self.lifter = lifter
        self.graph = lifter.graph
        self.masks: list[Any] = []
        self.biases: list[Any] = []
        self.empty_mean = False
        self.needs_lse = False
        self.heads: tuple[Any, Any] | None = None

    def scores_over_tokens(self, softmax: fx.Node) -> bool:
        """Whether the softmax is over a matrix of tokens by tokens at all."""
        sizes = shape_of(softmax)
        return len(sizes) >= 2 and all(self.lifter.tokens in size.free_symbols for size in sizes[-2:])

    def match(self, softmax: fx.Node) -> Match:
        """Recognise the attention around ``softmax``.

        Raises:
            NearestMiss: it is something else; the message names the node.
        """
        if not self.scores_over_tokens(softmax):
            raise NearestMiss("not over a matrix of tokens by tokens")
        if softmax.args[1] not in (-1, len(shape_of(softmax)) - 1):
            raise NearestMiss(f"%{softmax.name} is over dim {softmax.args[1]}")
        scores, sink = self._without_sink(softmax)
        weights = self._weights(softmax, sink is not None)
        values = self._value_product(weights)
        self.needs_lse = sink is not None or bool(self._lse_users(scores))
        self._anchor_at(min([values, *self._lse_users(scores)]), values, sink)
        self._find_heads(scores)
        inner = self._peel(scores)
        score, scale = self._change(inner)
        q, k, extra = self._operands_of(score, scale)
        v = self._four_dims(values.args[1], "value")
        self.finish()
        if sink is not None and len(shape_of(sink)) == 3:
            sink = self._heads_adapt(self.graph, sink)
        return Match(q, k, v, extra, values, scores, sink)

    def _anchor_at(self, before: fx.Node, values: fx.Node, sink: fx.Node | None) -> None:
        """Insert the attention in front of the first node that reads what it computes."""
        for each in (values.args[1], sink):
            if isinstance(each, fx.Node) and each > before:
                raise NearestMiss(f"%{each.name} is computed after %{before.name} reads the scores")
        before.meta["anchor"] = before.meta["val"]
        self.lifter.before = before

    # forwards

    def _weights(self, softmax: fx.Node, has_sink: bool) -> fx.Node:
        node = softmax
        while True:
            users = list(node.users)
            if len(users) != 1:
                raise NearestMiss(f"the weights %{node.name} are used {len(users)} times")
            (user,) = users
            same_rows = user.target is aten.reshape.default and shape_of(user)[-2:] == shape_of(node)[-2:]
            if user.target is aten.slice.Tensor and has_sink:
                has_sink = False
            elif not same_rows and user.target not in (aten._to_copy.default, aten.type_as.default):
                break
            node = user
        if has_sink:
            raise NearestMiss(f"the sink's column stays in the weights %{node.name}")
        return node

    def _value_product(self, weights: fx.Node) -> fx.Node:
        (user,) = weights.users
        if user.target not in (aten.matmul.default, aten.bmm.default) or user.args[0] is not weights:
            raise NearestMiss(f"the weights go into %{user.name}, not into a product with the values")
        if len(shape_of(user.args[1])) != len(shape_of(weights)):
            raise NearestMiss(f"the values of %{user.name} broadcast")
        return user

    def replace(self, match: Match, out: fx.Node, lse: fx.Node) -> None:
        """Put the raised output in place of the product, applying the sink."""
        graph, anchor = self.graph, self.lifter.before
        with graph.inserting_before(anchor):
            if match.sink is not None:
                column = self._node(aten.squeeze.dim, (match.sink, -1))
                gap = self._node(aten.sub.Tensor, (lse, column))
                share = self._node(aten.unsqueeze.default, (self._node(aten.sigmoid.default, (gap,)), -1))
                share = self._node(aten.type_as.default, (share, out))
                out = self._node(aten.mul.Tensor, (out, share))
            shape = self._shape_arguments(match.product)
            if len(shape_of(match.product)) != 4:
                out = self._node(aten.reshape.default, (out, shape))
        self._replace_lse(match.scores, lse)
        match.product.replace_all_uses_with(out)

    def _replace_lse(self, scores: fx.Node, lse: fx.Node) -> None:
        for user in self._lse_users(scores):
            dtype = user.meta["val"].dtype
            if dtype != lse.meta["val"].dtype:
                with self.graph.inserting_before(user):
                    lse = self._node(aten._to_copy.default, (lse,), {"dtype": dtype})
            user.replace_all_uses_with(lse)

    def _lse_users(self, scores: fx.Node) -> list[fx.Node]:
        """Log-sum-exps of the same scores, which the raised attention returns anyway."""
        return [
            user
            for user in scores.users
            if user.target is aten.logsumexp.default
            and user.args[1] in ([-1], [len(shape_of(scores)) - 1])
            and len(user.args) < 3
            and len(shape_of(scores)) == 4
        ]

    # backwards

    def _without_sink(self, softmax: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        scores = self._without_row_maximum(softmax.args[0])
        if scores.target is not aten.cat.default:
            return scores, None
        parts, dim = (*scores.args, 0)[:2]
        if len(parts) != 2 or dim not in (-1, len(shape_of(scores)) - 1) or shape_of(parts[1])[-1] != 1:
            raise NearestMiss(f"%{scores.name} concatenates scores with something that is not one sink column")
        return parts[0], parts[1]

    def _without_row_maximum(self, node: fx.Node) -> fx.Node:
        if node.target is aten.sub.Tensor and isinstance(node.args[1], fx.Node):
            source, maximum = node.args
            if maximum.op == "call_function" and maximum.args and isinstance(maximum.args[0], fx.Node):
                of = maximum.args[0]
                whole = maximum if maximum.target is aten.amax.default else of
                if whole.target in (aten.max.dim, aten.amax.default) and whole.args[0] is source:
                    return source
        return node

    def _find_heads(self, scores: fx.Node) -> None:
        node, shapes = scores, []
        while isinstance(node, fx.Node) and node.target not in _PRODUCTS:
            shapes.append(shape_of(node))
            node = next((each for each in node.all_input_nodes if self._has_score(each)), None)
        if node is None:
            raise NearestMiss(f"no matrix product behind %{scores.name}")
        shapes.append(shape_of(node))
        four = [shape for shape in shapes if len(shape) == 4]
        rank = len(shapes[-1])
        if rank == 3 and not four:
            self.heads = (shapes[-1][0], 1)
        elif four:
            self.heads = (four[-1][0], four[-1][1])
        else:
            raise NearestMiss(f"%{node.name} has {rank} dims")
        self.product = node
        if any(len(shape) not in (3, 4) for shape in shapes):
            raise NearestMiss(f"scores behind %{scores.name} change their number of dims")

    def _has_score(self, node: fx.Node) -> bool:
        seen: set[fx.Node] = set()
        stack = [node]
        while stack:
            each = stack.pop()
            if each in seen or not self.lifter.is_matrix(each):
                continue
            seen.add(each)
            if each.target in _PRODUCTS:
                return True
            stack.extend(each.all_input_nodes)
        return False

    def _peel(self, node: fx.Node) -> fx.Node:
        while node is not self.product:
            adapt = self._adapt(node)
            args: Any = node.args
            stripped = self._without_row_maximum(node)
            shifted = node.target is aten.add.Tensor and constant(args[1]) is not None
            if self.needs_lse and (shifted or stripped is not node):
                raise NearestMiss(f"%{node.name} shifts the scores, of which the log-sum-exp is used")
            if stripped is not node:
                node = stripped
            elif node.target in (aten._to_copy.default, aten.type_as.default, aten.reshape.default) or shifted:
                node = args[0]
            elif node.target is aten.add.Tensor and not node.kwargs and is_tensor(args[1]):
                first = self._has_score(args[0])
                self.add_bias(args[1] if first else args[0], adapt)
                node = args[0] if first else args[1]
            elif self._hides(node):
                mask, node = self._hidden(node, adapt)
                self.masks.append(mask)
            elif node.target in (aten.maximum.default, aten.max.other) and _is_blind(args[1], node):
                node = args[0]
            else:
                return node
        return node

    def _hides(self, node: fx.Node) -> bool:
        args: Any = node.args
        if node.target in (aten.where.self, aten.where.ScalarOther):
            return self._has_score(args[1]) and _is_blind(args[2], node)
        if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            return self._has_score(args[0]) and _is_blind(args[2], node)
        return False

    def _hidden(self, node: fx.Node, adapt: Adapt) -> tuple[Any, fx.Node]:
        args: Any = node.args
        if node.target in (aten.where.self, aten.where.ScalarOther):
            self._note_blind(args[2])
            return self.lifter.lift(args[0], adapt), args[1]
        self._note_blind(args[2])
        return self.lifter.call("not", self.lifter.lift(args[1], adapt)), args[0]

    def _note_blind(self, fill: Any) -> None:
        if constant(fill) != -float("inf"):
            self.empty_mean = True

    def add_bias(self, node: fx.Node, adapt: Adapt = same) -> None:
        """An added term: a mask where it hides keys, a bias where it does not."""
        args: Any = node.args
        if node.target in (aten.expand.default, aten._to_copy.default, aten.clone.default) and (
            self.lifter.is_matrix(args[0]) and len(shape_of(args[0])) == len(shape_of(node))
        ):
            self.add_bias(args[0], adapt)
        elif node.target in (aten.where.self, aten.where.ScalarOther, aten.where.Scalar) and _is_blind(args[2], node):
            self._note_blind(args[2])
            self.masks.append(self.lifter.lift(args[0], adapt))
            self._add_rest(args[1], adapt)
        elif node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and _is_blind(args[2], node):
            self._note_blind(args[2])
            self.masks.append(self.lifter.call("not", self.lifter.lift(args[1], adapt)))
            self._add_rest(args[0], adapt)
        elif node.target is aten.add.Tensor and not node.kwargs and self.lifter.is_matrix(node):
            for each in args:
                self._add_rest(each, adapt)
        else:
            self.biases.append(self.lifter.lift(node, adapt))

    def _add_rest(self, node: Any, adapt: Adapt) -> None:
        if constant(node) == 0:
            return
        if isinstance(node, fx.Node) and constant(node) is None:
            self.add_bias(node, adapt)
        else:
            self.biases.append(constant(node))

    def finish(self) -> None:
        """Write the collected masks and biases into the rule."""
        for output, function, found in (("mask", "and", self.masks), ("bias", "add", self.biases)):
            if found:
                value = found[0]
                for each in found[1:]:
                    value = self.lifter.call(function, value, each)
                self.lifter.set(output, value)

    def _change(self, node: fx.Node) -> tuple[fx.Node, float]:
        """The product behind the remaining chain, and its scale; anything else becomes a score rule."""
        scale, inner = 1.0, node
        while inner is not self.product:
            args: Any = inner.args
            if inner.target in (aten._to_copy.default, aten.reshape.default):
                inner = args[0]
            elif inner.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(constant(args[1]), (int, float)):
                scale, inner = scale * float(constant(args[1])), args[0]
            elif inner.target in (aten.div.Tensor, aten.div.Scalar) and isinstance(constant(args[1]), (int, float)):
                scale, inner = scale / float(constant(args[1])), args[0]
            else:
                break
        if inner is self.product:
            return inner, scale
        self.lifter.score = self.product
        value = self._lift_change(node)
        self.lifter.set("score", value)
        return self.product, 1.0

    def _lift_change(self, node: fx.Node) -> Any:
        misses = len(self.lifter.misses)
        value = self.lifter.lift(node, self._adapt(node))
        if len(self.lifter.misses) > misses:
            missed, reason = self.lifter.misses.pop()
            raise NearestMiss(f"%{missed.name} between the product and the softmax: {reason}")
        return value

    def _operands_of(self, score: fx.Node, scale: float) -> tuple[fx.Node, fx.Node, float]:
        args: Any = score.args
        if score.target is aten.baddbmm.default:
            beta, alpha = score.kwargs.get("beta", 1), score.kwargs.get("alpha", 1)
            if beta != 1 or self.lifter.score is not None:
                raise NearestMiss(f"%{score.name} with beta={beta}")
            if scale != 1.0:
                raise NearestMiss(f"%{score.name} is scaled after its bias was added")
            self.add_bias(args[0], self._adapt(score))
            left, right, scale = args[1], args[2], float(alpha)
        else:
            left, right = args[:2]
        if len(shape_of(left)) != len(shape_of(score)) or len(shape_of(right)) != len(shape_of(score)):
            raise NearestMiss(f"the operands of %{score.name} broadcast")
        q = self._four_dims(left, "query")
        if right.target is aten.transpose.int and {each % len(shape_of(right)) for each in right.args[1:3]} == {
            len(shape_of(right)) - 1,
            len(shape_of(right)) - 2,
        }:
            k = right.args[0]
        else:
            with self.graph.inserting_before(self.lifter.before):
                k = self._node(aten.transpose.int, (right, -2, -1))
        k = self._four_dims(k, "key")
        if shape_of(q)[2] != self.lifter.tokens or shape_of(k)[2] != self.lifter.tokens:
            raise NearestMiss(f"%{score.name} is not of the tokens over themselves")
        return q, k, scale

    # dims

    def _adapt(self, node: fx.Node) -> Adapt:
        return same if len(shape_of(node)) == 4 else self._heads_adapt

    def _heads_adapt(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        sizes = shape_of(node)
        if len(sizes) != 3:
            return node
        assert self.heads is not None
        batch, heads = self.heads
        if sizes[0] == 1:
            return self._node(aten.unsqueeze.default, (node, 0))
        if heads == 1:
            return self._node(aten.unsqueeze.default, (node, 1))
        return self._node(aten.unflatten.int, (node, 0, [int(batch), int(heads)]))

    def _four_dims(self, node: Any, role: str) -> fx.Node:
        if len(shape_of(node)) == 4:
            return node
        assert self.heads is not None
        batch, heads = self.heads
        if shape_of(node)[0] != product([batch, heads]):
            raise NearestMiss(f"the {role} %{node.name} has {shape_of(node)[0]} heads, expected {batch} x {heads}")
        with self.graph.inserting_before(self.lifter.before):
            source = node.args[0] if node.target is aten.reshape.default else None
            wanted = (batch, heads, *shape_of(node)[1:])
            if isinstance(source, fx.Node) and shape_of(source) == wanted:
                return source
            if heads == 1:
                return self._node(aten.unsqueeze.default, (node, 1))
            return self._node(aten.unflatten.int, (node, 0, [int(batch), int(heads)]))

    def _shape_arguments(self, node: fx.Node) -> list[Any]:
        return [self.lifter.length if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape]

    def _node(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg(args, lambda each: each.meta["val"])
        with self.lifter.before.meta["anchor"].fake_mode:
            node.meta["val"] = target(*values, **(kwargs or {}))
        node.meta["stack_trace"] = self.lifter.before.meta.get("stack_trace")
        return node


def _is_blind(fill: Any, hidden: fx.Node) -> bool:
    """Whether a score of this value is never attended to in the dtype of ``hidden``."""
    value, lowest = constant(fill), torch.finfo(torch.float32).min
    if is_tensor(hidden) and hidden.meta["val"].is_floating_point():
        lowest = torch.finfo(hidden.meta["val"].dtype).min
    return isinstance(value, (int, float)) and value <= max(-_BLIND, lowest)
