"""Reading ``scaled_dot_product_attention``: its arguments in whatever form, its mask as a rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sp_compile.raising.axes import Atom, Dims, Frame, frame_of, held_dims, new_dims, shape_of
from sp_compile.raising.insertion import Inserter
from sp_compile.raising.lift import Lifter
from sp_compile.raising.products import NearestMiss, from_heads, to_heads
from sp_compile.symbols import is_tensor

aten = torch.ops.aten

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass
class SdpaAttention:
    """One call of it, with q, k and v in four dims."""

    node: fx.Node
    lifter: Lifter
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    dims: Dims

    @property
    def empty_mean(self) -> bool:
        """Whether rows that see no key get the mean of the values."""
        return self.lifter.terms.empty_mean

    def replace(self, out: fx.Node, _: fx.Node) -> None:
        """Put the raised output in place of the call."""
        out = from_heads(self.lifter.insert, out, self.lifter.frame, self.dims[-1], self.node, self.dims)
        self.node.replace_all_uses_with(out)


def is_over_tokens(node: fx.Node, tokens: Any) -> bool:
    """Whether the call is attention of the tokens over themselves."""
    values = _arguments(node)
    return all(shape_of(values[name])[-2] == tokens for name in ("query", "key"))


def _arguments(node: fx.Node) -> dict[str, Any]:
    return dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)


def match(node: fx.Node, insert: Inserter, batch: int) -> SdpaAttention:
    """Read a call.

    Args:
        batch: number of sequences of the model's inputs.

    Raises:
        NearestMiss, NotLifted: it cannot be raised; the message says why.
    """
    values = _arguments(node)
    q, k, v = values["query"], values["key"], values["value"]
    for name in _NAMES[:3]:
        if shape_of(values[name])[-2] != insert.tokens:
            raise NearestMiss(f"its {name} %{values[name].name} is not over the tokens: {list(shape_of(values[name]))}")
    dims = new_dims(shape_of(q))
    frame = _frame(dims, Atom(insert.tokens), batch)
    node.meta["anchor"] = node.meta["val"]
    lifter = Lifter(insert, frame)
    lifter.terms.dropout = float(values.get("dropout_p") or 0.0)
    _mask(lifter, values, dims)
    scale = values.get("scale")
    wanted: Dims = (frame.batch, frame.heads, dims[-2], dims[-1])
    grouped = bool(values.get("enable_gqa")) and len(dims) == 4
    k, v = (each if grouped else _in_four_dims(insert, each, dims, frame) for each in (k, v))
    return SdpaAttention(
        node,
        lifter,
        to_heads(insert, (q, dims), wanted, shares=False),
        k,
        v,
        float(shape_of(q)[-1]) ** -0.5 if scale is None else float(scale),
        (*dims[:-1], new_dims(shape_of(node)[-1:])[0]),
    )


def _frame(dims: Dims, keys: Atom, batch: int) -> Frame:
    (queries,) = dims[-2]
    if len(dims) == 4:
        return Frame(dims[0], dims[1], queries, keys)
    return frame_of([atom for each in dims[:-2] for atom in each], queries, keys, batch)


def _in_four_dims(insert: Inserter, node: fx.Node, dims: Dims, frame: Frame) -> fx.Node:
    features = new_dims(shape_of(node)[-1:])[0]
    own = held_dims(node, (*dims[:-2], (frame.keys,), features))
    if own is None or len(own) != len(dims):
        raise NearestMiss(f"%{node.name} has dims {list(shape_of(node))}, which do not go with the query's")
    return to_heads(insert, (node, own), (frame.batch, frame.heads, (frame.keys,), features), shares=False)


def _mask(lifter: Lifter, values: dict[str, Any], dims: Dims) -> None:
    terms = lifter.terms
    mask: Any = values.get("attn_mask")
    if values.get("is_causal"):
        terms.hide(lifter.call("le", lifter.rows(of_keys=True), lifter.rows(of_keys=False)))
    if not is_tensor(mask):
        return
    scores: Dims = (*dims[:-1], (lifter.frame.keys,))
    if mask.meta["val"].dtype == torch.bool:
        terms.hide(lifter.lift(mask, scores))
    else:
        terms.add(lifter.lift(mask, scores, vectors=True), mask.meta["val"].dtype)
