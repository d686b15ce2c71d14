"""What the compiler can shard: one table from ATen op to rule. Read it top to bottom.

A row names ops, or one overload of an op (``aten::max.other``), and covers what is tagged pointwise besides.

An op that is not here, or whose rule says :class:`NoRule`, is computed on gathered inputs and reported.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from sp_compile.placements import RankLocal, Shard
from sp_compile.rules import attention, contractions, indexing, pointwise, reductions, routing, select, views
from sp_compile.rules.base import Call, NoRule, Outcome

Rule = Callable[[Call], Outcome]


def _table(rows: dict[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in rows.items() for name in names.split()}


RULES: dict[str, Rule] = _table(
    {
        # elementwise beside everything tagged pointwise
        pointwise.pointwise: "aten::where aten::masked_fill aten::copy aten::full_like aten::zeros_like "
        "aten::ones_like aten::empty_like aten::rand_like aten::rsub aten::true_divide aten::max.other aten::min.other "
        "aten::__and__ aten::__or__ aten::__xor__ aten::isclose aten::hardswish aten::log_sigmoid aten::polar "
        "aten::complex aten::real aten::imag aten::_conj sp_compile::sloped",
        pointwise.keeps_rows: "aten::clone aten::alias aten::detach aten::_to_copy aten::to aten::contiguous "
        "aten::lift_fresh_copy",
        pointwise.like_first: "aten::type_as",
        # between ranks of tensor parallelism
        pointwise.over_ranks: "_c10d_functional::all_reduce _c10d_functional::wait_tensor "
        "_c10d_functional::all_gather_into_tensor",
        pointwise.floor_divide: "aten::floor_divide",
        # dims
        views.view: "aten::view aten::_unsafe_view aten::reshape aten::flatten aten::unflatten",
        views.expand: "aten::expand aten::expand_as",
        views.permute: "aten::permute aten::transpose aten::t aten::numpy_T aten::swapaxes",
        views.unsqueeze: "aten::unsqueeze",
        views.squeeze: "aten::squeeze",
        views.select: "aten::select",
        views.slice_: "aten::slice",
        views.split: "aten::split aten::chunk aten::split_with_sizes aten::tensor_split",
        views.unbind: "aten::unbind",
        views.cat: "aten::cat aten::concat",
        views.stack: "aten::stack",
        views.repeat: "aten::repeat",
        views.repeat_interleave: "aten::repeat_interleave",
        views.size: "aten::sym_size",
        views.complex_pairs: "aten::view_as_complex aten::view_as_real",
        views.pad: "aten::pad aten::constant_pad_nd",
        views.slice_scatter: "aten::slice_scatter aten::select_scatter",
        # constants
        views.creation: "aten::zeros aten::ones aten::full aten::empty aten::new_zeros aten::new_ones aten::new_full "
        "aten::new_empty",
        # products
        contractions.matmul: "aten::matmul aten::mm aten::bmm",
        contractions.addmm: "aten::addmm aten::baddbmm",
        contractions.linear: "aten::linear",
        contractions.einsum: "aten::einsum",
        # over whole dims
        reductions.along_dims: "aten::sum aten::mean aten::amax aten::amin aten::max aten::min aten::prod aten::any "
        "aten::all aten::argmax aten::argmin aten::var aten::std aten::logsumexp aten::softmax aten::_softmax "
        "aten::log_softmax aten::_log_softmax aten::topk aten::cumprod aten::flip aten::roll "
        "aten::linalg_vector_norm aten::norm aten::median aten::kthvalue aten::glu",
        reductions.sum_rows: "sum_rows",
        reductions.row_losses: "aten::cross_entropy_loss",
        reductions.linear_losses: "sp_compile::linear_cross_entropy",
        reductions.diff: "aten::diff",
        reductions.last_dims: "aten::layer_norm aten::native_layer_norm aten::rms_norm aten::_fused_rms_norm",
        # look-ups
        indexing.embedding: "aten::embedding",
        indexing.index: "aten::index",
        indexing.index_put: "aten::index_put",
        indexing.index_select: "aten::index_select",
        indexing.same_place: "aten::gather aten::scatter aten::scatter_add",
        select.selected: "select_rows",
        # experts
        routing.sort: "aten::sort aten::argsort",
        routing.group_sizes: "aten::histc aten::bincount",
        routing.of_group_sizes: "aten::cumsum",
        routing.grouped_mm: "aten::_grouped_mm transformers::grouped_mm_fallback",
        # attention
        attention.attention: "sp_compile::attention",
        attention.plan: "sp_compile::tile_plan sp_compile::block_mask",
        attention.exchange: "exchange_partials",
        attention.merge: "merge_partials",
        attention.joined: "joined_keys",
        attention.put_back: "put_back",
        attention.sdpa: "aten::scaled_dot_product_attention",
    }
)

_OF_RANK_ROWS = frozenset(
    {pointwise.keeps_rows, pointwise.floor_divide, views.unsqueeze, views.squeeze, views.view, indexing.index}
    | {routing.sort}
)
_OF_RANK_LOCAL = frozenset(
    {pointwise.keeps_rows, routing.of_group_sizes, routing.grouped_mm, attention.attention, attention.plan}
)


def rule_for(node: fx.Node) -> Rule | None:
    """The rule of the node's op, if there is one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return RULES.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
    name = node.target._schema.name
    for known in (f"{name}.{node.target._overloadname}", name):
        if known in RULES:
            return RULES[known]
    return pointwise.pointwise if torch.Tag.pointwise in node.target.tags else None


def apply(call: Call) -> Outcome:
    """Ask the table for the call's placements.

    Raises:
        NoRule: no rule applies; compute on gathered inputs.
    """
    rule = rule_for(call.node)
    if rule is None:
        raise NoRule("no rule")
    placements = call.placed.values()
    if rule not in _OF_RANK_ROWS and any(isinstance(each, Shard) and each.rows for each in placements):
        raise NoRule("row numbers of one rank mean nothing here")
    if rule not in _OF_RANK_LOCAL and any(isinstance(each, RankLocal) for each in placements):
        raise NoRule("what one rank counted means nothing here")
    return rule(call)


__all__ = ["RULES", "Call", "NoRule", "Outcome", "Rule", "apply", "rule_for"]
