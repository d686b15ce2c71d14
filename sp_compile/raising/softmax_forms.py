"""How models write the softmax: as an op, or as exponentials over their sum, with sinks that take a share of it.

What is no weight of a key (a concatenated column, ``exp(sink - m)`` or a number added to the sum) is a *sink*: a score
without a value. The output is that of the softmax without it, times ``sigmoid(lse - sink)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import fx

from sp_compile.raising.lift_ops import constant, is_zero_one
from sp_compile.raising.products import PRODUCTS, NearestMiss
from sp_compile.symbols import is_tensor, shape_of

aten = torch.ops.aten

SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
CASTS = (aten._to_copy.default, aten.type_as.default)
_WEIGHT_VIEWS = (aten.reshape.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default,
                 aten.squeeze.dim, aten.expand.default)  # fmt: skip


@dataclass
class SoftmaxForm:
    """A softmax over the keys, however it is written.

    Attributes:
        root: the softmax, or the exponentials.
        scores: what it is of.
        sinks: scores without a value, as columns ``[.., Q or 1, 1]`` or numbers.
        weights: from ``root`` to the node that goes into the product with the values.
        masks: ``(node, holds)``: keys are seen only where the node has this truth; put on the exponentials.
        divided: what divides the product, where the weights are not divided before.
        empty_is_zero: rows that see no key are 0 by the way it is written.
        dropout: with which probability a weight is dropped.
    """

    root: fx.Node
    scores: fx.Node
    sinks: list[Any] = field(default_factory=list)
    weights: list[fx.Node] = field(default_factory=list)
    masks: list[tuple[fx.Node, bool]] = field(default_factory=list)
    divided: fx.Node | None = None
    empty_is_zero: bool = False
    dropout: float = 0.0

    @property
    def product(self) -> fx.Node:
        """The product of the weights with the values."""
        return next(each for each in self.weights[-1].users if each.target in PRODUCTS)

    @property
    def result(self) -> fx.Node:
        """What the attention gives: the product, or its quotient by the sum."""
        return self.divided or self.product


def softmax_form(root: fx.Node) -> SoftmaxForm:
    """Read the softmax at ``root``: a softmax op over the last dim, or an exponential that is divided by its sum.

    Raises:
        NearestMiss: it is something else; the message names the node.
    """
    return _of_softmax(root) if root.target in SOFTMAXES else _of_exponentials(root)


def _of_softmax(softmax: fx.Node) -> SoftmaxForm:
    sinks = []
    dim = _arg(softmax, 1) % len(shape_of(softmax))
    scores, _ = without_row_shift(_arg(softmax, 0), dim)
    if scores.target is aten.cat.default:
        parts, along = (*scores.args, 0)[:2]
        rank = len(shape_of(scores))
        if len(parts) != 2 or along % rank != dim or shape_of(parts[1])[along] != 1:
            raise NearestMiss(f"%{scores.name} concatenates scores with something that is not one sink column")
        scores, sink = parts
        sinks.append(sink)
    form = SoftmaxForm(softmax, scores, sinks, empty_is_zero=softmax.target is aten._safe_softmax.default)
    form.weights = _weights(form, [softmax], bool(sinks))
    return form


def _weights(
    form: SoftmaxForm, path: list[fx.Node], has_sink: bool = False, sums: tuple[Any, ...] = ()
) -> list[fx.Node]:
    """From the weights forwards to the one node that goes into a product; ``sums`` of them are no use."""
    while True:
        users = [user for user in path[-1].users if user not in sums]
        if len(users) != 1:
            raise NearestMiss(f"the weights %{path[-1].name} are used {len(users)} times")
        (user,) = users
        if user.target is aten.slice.Tensor and has_sink and _drops_last(user):
            has_sink = False
        elif user.target is aten.nan_to_num.default and (*user.args, None)[1] in (None, 0.0):
            form.empty_is_zero = True
        elif user.target is aten.dropout.default and not form.dropout:
            form.dropout = float(user.args[1])
        elif user.target not in (*_WEIGHT_VIEWS, *CASTS):
            break
        path = [*path, user]
    if has_sink:
        raise NearestMiss(f"the sink's column stays in the weights %{path[-1].name}")
    if user.target not in PRODUCTS:
        raise NearestMiss(f"the weights go into %{user.name}, not into a product with the values")
    return path


def _drops_last(node: fx.Node) -> bool:
    _, dim, start, end = (*node.args, 0, None, None)[:4]
    rank = len(shape_of(node))
    same_end = isinstance(end, fx.Node) and str(end.meta["val"]) == str(node.meta["val"].shape[-1])
    return dim % rank == rank - 1 and start in (0, None) and (end == -1 or same_end)


def _of_exponentials(root: fx.Node) -> SoftmaxForm:
    scores, shift = without_row_shift(_arg(root, 0), len(shape_of(root)) - 1)
    form = SoftmaxForm(root, scores)
    path = _masked(form, root)
    node = path[-1]
    sums = [user for user in node.users if _is_row_sum(user)]
    if len(sums) != 1:
        raise NearestMiss(f"the exponentials %{node.name} have {len(sums)} sums over the keys")
    total = _total(form, sums[0], shift)
    quotient = next((user for user in node.users if _divides(user, node, total)), None)
    if quotient is not None:
        if set(node.users) != {quotient, sums[0]}:
            raise NearestMiss(f"the exponentials %{node.name} are used beside their sum and quotient")
        form.weights = _weights(form, [*path, quotient])
        return form
    form.weights = _weights(form, path, sums=(sums[0],))
    form.divided = next(iter(form.product.users))
    if len(form.product.users) != 1 or not _divides(form.divided, form.product, total):
        raise NearestMiss(f"the exponentials %{root.name} are not divided by their sum %{total.name}")
    return form


def _masked(form: SoftmaxForm, root: fx.Node) -> list[fx.Node]:
    """The exponentials after keys were taken out of them."""
    path = [root]
    while len(path[-1].users) == 1:
        (user,) = path[-1].users
        if user.target is aten.masked_fill.Scalar and user.args[0] is path[-1] and user.args[2] == 0:
            form.masks.append((user.args[1], False))
        elif user.target in (aten.where.self, aten.where.ScalarOther) and constant(user.args[2]) == 0:
            form.masks.append((user.args[0], True))
        elif user.target is aten.mul.Tensor and (mask := _zero_one_factor(user, path[-1])) is not None:
            form.masks.append((mask, True))
        elif user.target not in CASTS:
            break
        path.append(user)
    return path


def _zero_one_factor(node: fx.Node, other: fx.Node) -> fx.Node | None:
    found = [each for each in node.args if each is not other]
    return found[0] if len(found) == 1 and is_tensor(found[0]) and is_zero_one(found[0]) else None


def _is_row_sum(node: fx.Node) -> bool:
    if node.target is not aten.sum.dim_IntList:
        return False
    dims: Any = node.args[1]
    rank = len(shape_of(node.args[0]))
    return [each % rank for each in dims] == [rank - 1] and len(node.args) > 2 and bool(node.args[2])


def _total(form: SoftmaxForm, node: fx.Node, shift: fx.Node | None) -> fx.Node:
    """The denominator behind a sum of exponentials; what is added to the sum becomes sinks."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.add.Tensor and "alpha" not in user.kwargs:
            extra = next((each for each in user.args if each is not node), node)
            sink = _sink(extra, shift, form.scores)
            if sink is not None:
                form.sinks.append(sink)
        elif user.target not in (*CASTS, aten.clamp_min.default, aten.clamp.default):
            break
        elif user.target not in CASTS and not (_is_row_maximum(shift, form.scores) and user.args[1] <= 1):
            raise NearestMiss(f"%{user.name} bounds the sum of exponentials from below")
        node = user
    return node


def _sink(extra: Any, shift: fx.Node | None, scores: fx.Node) -> Any:
    """The score that ``extra`` beside the sum stands for; None where it is too small to change the sum."""
    number = constant(extra)
    if number is not None:
        if shift is None and number > 0:
            return math.log(number)
        # the sum of exponentials less their maximum is at least 1
        if 0 <= number <= 1e-7 and _is_row_maximum(shift, scores):
            return None
        raise NearestMiss(f"{number} is added to the sum of exponentials less %{getattr(shift, 'name', shift)}")
    if is_tensor(extra) and extra.target in CASTS:
        return _sink(extra.args[0], shift, scores)
    inner: Any = extra.args[0] if is_tensor(extra) and extra.target is aten.exp.default else None
    if inner is not None and shift is None:
        return inner
    if inner is not None and inner.target is aten.neg.default and inner.args[0] is shift:
        return 0.0
    if inner is not None and inner.target is aten.sub.Tensor and inner.args[1] is shift:
        return inner.args[0]
    if inner is not None and inner.target is aten.rsub.Scalar and inner.args[0] is shift:
        return float(inner.args[1])
    raise NearestMiss(f"%{getattr(extra, 'name', extra)} is added to the sum of exponentials and is no sink's")


def _divides(node: fx.Node, numerator: fx.Node, total: fx.Node) -> bool:
    if node.target is aten.div.Tensor:
        return node.args[0] is numerator and node.args[1] is total
    if node.target is not aten.mul.Tensor or numerator not in node.args:
        return False
    other: Any = node.args[1] if node.args[0] is numerator else node.args[0]
    return is_tensor(other) and other.target is aten.reciprocal.default and other.args[0] is total


def without_row_shift(node: fx.Node, dim: int) -> tuple[fx.Node, fx.Node | None]:
    """The scores behind ``scores - m``, where ``m`` is one number for all of ``dim``, and ``m``."""
    if node.target is not aten.sub.Tensor or node.kwargs or not all(is_tensor(each) for each in node.args):
        return node, None
    source, shift = node.args
    from_right = len(shape_of(node)) - dim
    sizes = shape_of(shift)
    is_shift = len(sizes) < from_right or sizes[len(sizes) - from_right] == 1
    return (source, shift) if is_shift and shape_of(source) == shape_of(node) else (node, None)


def _is_row_maximum(shift: fx.Node | None, scores: fx.Node) -> bool:
    while shift is not None and shift.op == "call_function" and shift.target in (getitem, *CASTS):
        shift = shift.args[0]
    return shift is not None and shift.target in (aten.amax.default, aten.max.dim) and shift.args[0] is scores


def _arg(node: fx.Node, at: int) -> Any:
    return node.args[at]
