"""Recognising attention written as product - softmax - product.

Forwards from the softmax the weights must reach one product with the values and nothing else; backwards the scores are
followed to the product of queries and keys. Which dims are heads, queries and keys follows from the dims that the
products sum over, so any order and any grouping of dims will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sp_compile.raising.axes import Atom, Dims, Frame, frame_of, resolved
from sp_compile.raising.insertion import Inserter
from sp_compile.raising.lift import Lifter
from sp_compile.raising.lift_ops import NotLifted
from sp_compile.raising.products import (
    NearestMiss,
    Product,
    follow,
    from_heads,
    read_product,
    retie,
    to_heads,
)
from sp_compile.raising.score_chain import ScoreChain, is_over_tokens, score_path
from sp_compile.raising.softmax_forms import SOFTMAXES, SoftmaxForm, softmax_form
from sp_compile.symbols import shape_of

aten = torch.ops.aten


@dataclass
class EagerAttention:
    """One attention that was recognised.

    Attributes:
        q, k, v: ``[B, H or H_kv, T, D]``.
        before: node in front of which the attention goes.
    """

    lifter: Lifter
    form: SoftmaxForm
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    dims: Dims
    score_dims: Dims
    features: Atom
    lse_users: list[fx.Node]

    @property
    def before(self) -> fx.Node:
        """The node in front of which the attention goes."""
        return self.lifter.insert.before

    @property
    def empty_mean(self) -> bool:
        """Whether rows that see no key get the mean of the values."""
        return self.lifter.terms.empty_mean and not self.form.empty_is_zero

    def replace(self, out: fx.Node, lse: fx.Node) -> None:
        """Put the raised output in place of the product, applying the sinks."""
        insert, frame = self.lifter.insert, self.lifter.frame
        total = lse
        for sink in self.form.sinks:
            column = sink if isinstance(sink, float) else self._column(sink)
            gap = insert.call(aten.sub.Tensor, total, column)
            share = insert.call(aten.unsqueeze.default, insert.call(aten.sigmoid.default, gap), -1)
            out = insert.call(aten.mul.Tensor, out, insert.call(aten.type_as.default, share, out))
            if sink is not self.form.sinks[-1]:
                column = insert.call(aten.full_like.default, total, sink) if isinstance(sink, float) else column
                total = insert.call(aten.logaddexp.default, total, column)
        result = self.form.result
        out = from_heads(insert, out, frame, (self.features,), result, self.dims)
        if out.meta["val"].dtype != result.meta["val"].dtype:
            out = insert.call(aten._to_copy.default, out, dtype=result.meta["val"].dtype)
        for user in self.lse_users:
            same = lse
            if user.meta["val"].dtype != lse.meta["val"].dtype:
                same = insert.call(aten._to_copy.default, lse, dtype=user.meta["val"].dtype)
            user.replace_all_uses_with(same)
        result.replace_all_uses_with(out)

    def _column(self, sink: fx.Node) -> fx.Node:
        insert, frame = self.lifter.insert, self.lifter.frame
        sizes = shape_of(sink)
        whole = self.score_dims[len(self.score_dims) - len(sizes) :]
        own = tuple(() if size == 1 else atoms for size, atoms in zip(sizes, whole, strict=True))
        if len(own) != 4 or self.score_dims != frame.scores:
            sink = insert.arrange(sink, own, frame.scores)
        return insert.call(aten.squeeze.dim, sink, -1)


def over_tokens(root: fx.Node, tokens: Any) -> bool:
    """Whether a softmax or an exponential is of a matrix of tokens by tokens with a product behind it."""
    if not is_over_tokens(root, tokens):
        return False
    if root.target in SOFTMAXES:
        return True
    try:
        score_path(root.args[0], tokens)
    except NearestMiss:
        return False
    users = list(root.users) + [after for user in root.users for after in user.users]
    return any(user.target is aten.sum.dim_IntList for user in users)


def match(root: fx.Node, insert: Inserter, batch: int) -> EagerAttention:
    """Recognise the attention around the softmax ``root``.

    Args:
        batch: number of sequences of the model's inputs.

    Raises:
        NearestMiss: it is something else; the message names the node.
    """
    form = softmax_form(root)
    path = score_path(form.scores, insert.tokens)
    first = read_product(path[0])
    dims = follow(path, first.dims)
    frame = _frame(form, first, dims, insert.tokens, batch)
    dims = [tuple(resolved(each) for each in own) for own in dims]
    weights = follow(_weight_path(form), dims[-1])[-1]
    second = read_product(form.product)
    if form.weights[-1] not in (second.left, second.right):
        raise NearestMiss(f"%{second.node.name} adds the weights to a product")
    values, _ = second.side(form.weights[-1])
    lse_users = _lse_users(form.scores) if dims[-1] == frame.scores else []
    _anchor(insert, min([form.result, *lse_users]), [values, *form.sinks])
    value_dims = retie(second, form.weights[-1], weights)
    features = _features(second, value_dims, frame)
    lifter = Lifter(insert, frame)
    lifter.terms.dropout = form.dropout
    chain = ScoreChain(lifter, path, dims, needs_lse=bool(form.sinks or lse_users))
    chain.peel(form.scores)
    for node, holds in form.masks:
        _hide(lifter, node, holds, dims[-1])
    q, *keys = _queries_and_keys(first, frame)
    rows: list[Dims] = [(frame.batch, frame.heads, (atom,)) for atom in (frame.queries, frame.keys)]
    q_whole = to_heads(insert, q, (*rows[0], (first.summed,)), shares=False)
    keys_and_values = [(keys[0], first.summed), ((values, value_dims), features)]
    shared = len({_heads(value, frame) for value, _ in keys_and_values}) == 1
    k, v = (to_heads(insert, value, (*rows[1], (last,)), shared) for value, last in keys_and_values)
    return EagerAttention(lifter, form, q_whole, k, v, chain.scale, second.dims, dims[-1], features, lse_users)


def _heads(value: tuple[fx.Node, Dims], frame: Frame) -> tuple[Atom, ...]:
    held = {atom for each in value[1] for atom in resolved(each)}
    return tuple(atom for atom in resolved(frame.heads) if atom in held)


def _weight_path(form: SoftmaxForm) -> list[fx.Node]:
    """The scores and the weights after them, without those that have a column for the sink."""
    size = shape_of(form.scores)
    at = 0
    if form.root.target in SOFTMAXES and form.sinks:
        at = next(i for i, each in enumerate(form.weights) if each.target is aten.slice.Tensor) + 1
        if shape_of(form.weights[at - 1]) != size:
            raise NearestMiss(f"%{form.weights[at - 1].name} does not only drop the sink's column")
    return [form.scores, *form.weights[at:]]


def _hide(lifter: Lifter, node: fx.Node, holds: bool, dims: Dims) -> None:
    try:
        mask = lifter.lift(node, dims)
    except NotLifted as reason:
        raise NearestMiss(str(reason)) from None
    lifter.terms.hide(mask if holds else lifter.call("not", mask))


def _frame(form: SoftmaxForm, first: Product, dims: list[Dims], tokens: Any, batch: int) -> Frame:
    """Tell queries from keys: the softmax is over the keys."""
    root = form.root
    at = root.args[1] if root.target in SOFTMAXES else -1
    over = resolved(dims[-1][at])
    atoms = [atom for each in dims[-1] for atom in resolved(each)]
    rows = [atom for atom in atoms if tokens in atom.size.free_symbols]
    if len(over) != 1 or len(rows) != 2 or any(atom.size != tokens for atom in rows) or over[0] not in rows:
        raise NearestMiss(f"%{root.name} is not over one of two dims of the tokens")
    (queries,) = (atom for atom in rows if atom is not over[0])
    lead = [atom for each in first.dims for atom in resolved(each) if atom not in rows]
    return frame_of(lead, queries, over[0], batch)


def _features(second: Product, value_dims: Dims, frame: Frame) -> Atom:
    known = {*resolved(frame.batch), *resolved(frame.heads), frame.keys}
    own = [atom for each in value_dims for atom in each if atom not in known]
    held = [atom for each in value_dims for atom in each]
    out = [atom for each in second.dims for atom in each]
    if len(own) != 1 or frame.keys not in held or frame.keys in out:
        raise NearestMiss(f"%{second.node.name} is not a product over the keys")
    return own[0]


def _queries_and_keys(first: Product, frame: Frame) -> tuple[tuple[fx.Node, Dims], tuple[fx.Node, Dims]]:
    sides = (first.left, first.left_dims), (first.right, first.right_dims)
    for q, k in (sides, sides[::-1]):
        q_atoms, k_atoms = ({atom for each in dims for atom in resolved(each)} for _, dims in (q, k))
        if frame.queries in q_atoms - k_atoms and frame.keys in k_atoms - q_atoms:
            return q, k
    raise NearestMiss(f"%{first.node.name} is not a product of queries and keys")


def _anchor(insert: Inserter, before: fx.Node, needed: list[Any]) -> None:
    """Insert the attention in front of the first node that reads what it computes."""
    for each in needed:
        if isinstance(each, fx.Node) and not each < before:
            raise NearestMiss(f"%{each.name} is computed after %{before.name} reads the scores")
    before.meta["anchor"] = before.meta["val"]
    insert.before = before


def _lse_users(scores: fx.Node) -> list[fx.Node]:
    """Log-sum-exps of the same scores, which the raised attention returns anyway."""
    rank = len(shape_of(scores))
    return [
        user
        for user in scores.users
        if user.target is aten.logsumexp.default
        and user.args[1] in ([-1], [rank - 1])
        and len(user.args) < 3
        and rank == 4
    ]
