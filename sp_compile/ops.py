"""The nodes that passes add to a graph, all executable in the global view.

The custom ops, attention, what plans it and the exchange of rows, run as they are; so do the plain functions around
partial outputs and earlier keys. The other plain functions are placeholders of the global view that
``lower_redistributes`` replaces by index selections and collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import fx

from sp_compile import flex_ops as flex_ops
from sp_compile import kernels
from sp_compile.compat import process_group, register_work
from sp_compile.kernels import plan as plans
from sp_compile.kernels.dense import accumulated
from sp_compile.kernels.regions import as_tensor
from sp_compile.kernels.runs import plan_within
from sp_compile.score_rule import needed
from sp_compile.symbols import shape_of


def redistribute(value: torch.Tensor) -> torch.Tensor:
    """Change of placement; the identity in the global view. The placement is in the node's metadata."""
    return value.view(value.shape)


def spread_heads(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Several values, each of all heads of the rank's rows, to some heads of all rows, in one collective."""
    return tuple(each.view(each.shape) for each in values)


def select_rows(value: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows of the token dim by their normal-order numbers; each rank adds those it holds."""
    return value.index_select(dim, rows)


def sum_rows(value: torch.Tensor, dims: Sequence[int], keepdim: bool) -> torch.Tensor:
    """A sum over dims of which one is that of the tokens; each rank adds up its own."""
    return value.sum(list(dims), keepdim)


def row_numbers(start: int, count: int, length: int, device: torch.device) -> torch.Tensor:
    """Row numbers ``start .. start + count`` of ``length``, counted from the end when ``start`` is negative."""
    rows = torch.arange(count, device=device) + start
    return torch.where(rows < 0, rows + length, rows) if not isinstance(start, int) or start < 0 else rows


def exchange_partials(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over what each rank holds goes to the ranks of the queries.

    Args:
        out: ``[batch, heads, queries, value_dim]`` of everyone's queries over the rank's own keys.
        lse: their log-sum-exp ``[batch, heads, queries]``.

    Returns:
        Both with the ranks that they come from in front, for the rank's own queries.
    """
    return out.unsqueeze(0), lse.unsqueeze(0)


def merge_partials(
    out: torch.Tensor, lse: torch.Tensor, parts_out: torch.Tensor, parts_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join partial softmaxes over disjoint keys, in any order (online softmax, arXiv:1805.02867).

    Args:
        out, lse: ``[batch, heads, queries, value_dim]`` and ``[batch, heads, queries]``.
        parts_out, parts_lse: the same with a dim of parts in front.

    Returns:
        As ``out`` and ``lse``; 0 and -inf for a query that sees nothing in any part.
    """
    lses = torch.cat([lse.unsqueeze(0), parts_lse])
    largest = lses.amax(dim=0).detach()  # the result does not depend on it
    finite = torch.where(largest == -torch.inf, 0.0, largest)
    weights = torch.exp(lses - finite)
    total = weights.sum(dim=0)
    safe = torch.where(total == 0, 1.0, total)
    shares = (weights / safe).unsqueeze(-1)
    merged = shares[0] * out + (shares[1:] * parts_out).sum(dim=0)
    return merged.to(out.dtype), torch.where(total == 0, -torch.inf, finite + torch.log(safe))


def joined_keys(new: torch.Tensor, past: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Earlier keys or values behind the new ones.

    Args:
        new: ``[batch, kv_heads, keys, dim]``.
        past: the same for earlier tokens, in ``dtype`` or as its bytes.
    """
    earlier = past.view(dtype) if past.dtype == torch.uint8 else past
    return torch.cat([new, earlier.to(new.dtype)], dim=2)


def put_back(own: torch.Tensor, merged: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rank's rows along dim 2, some of them replaced: ``rows`` number those of ``own`` and then ``merged``."""
    return torch.cat([own, merged], dim=2).index_select(2, rows)


class AttentionArgs(NamedTuple):
    """The arguments of an ``attention`` node: ``AttentionArgs(*node.args)``; see :func:`attention`."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    operands: Sequence[fx.Node]
    tables: Sequence[fx.Node]
    rule: str
    scale: float
    empty_mean: bool = False
    kernel: str = "tiles"
    plan: fx.Node | None = None
    valid: fx.Node | None = None
    partial: bool = False

    def read_by(self, output: str) -> AttentionArgs:
        """The arguments without operands and tables that an output of the rule does not read."""
        read = {item for each in needed(self.rule, (output,)) for item in each.arguments}
        operands = [each for i, each in enumerate(self.operands) if f"x{i}" in read]
        return self._replace(operands=operands, tables=[x for i, x in enumerate(self.tables) if f"table{i}" in read])

    @property
    def per_head(self) -> bool:
        """Whether heads have operands or tables of their own."""
        operands = [shape_of(each) for each in self.operands]
        return any(len(each) >= 3 and each[-3] != 1 for each in operands) or any(
            shape_of(each)[0] != 1 for each in self.tables
        )


def attention_part(node: fx.Node, i: int) -> fx.Node | None:
    """The output (0) or the log-sum-exp (1) of an attention node, where it is used."""
    parts = [user for user in node.users if user.args[1] == i]
    return parts[0] if parts and parts[0].users else None


def attention_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The canonical attention nodes of a graph, in order."""
    return list(graph.find_nodes(op="call_function", target=torch.ops.sp_compile.attention.default))


@torch.library.custom_op("sp_compile::exchange_rows", mutates_args=())
def exchange_rows(
    rows: torch.Tensor,
    sent: torch.Tensor,
    counts: torch.Tensor,
    received: torch.Tensor,
    group_name: str,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """Begin to send rows to other ranks and to receive theirs; ``wait_tensor`` of the result ends it.

    Args:
        rows: ``[rows, ...]``.
        sent: int64, those that are sent, ordered by the rank they go to; what the counts do not name stays here.
        counts: int64 ``[2, sp]`` on the host, rows that go to each rank and that come from each.
        received: its length is that of the result.
        after: of the collective that begins before this one, so that code keeps their order on all ranks; not read.

    Returns:
        ``[received, ...]``, ordered by the rank they come from; zero where none came.
    """
    go, come = counts.tolist()
    out = rows.new_zeros(received.shape[0], *rows.shape[1:])
    part = rows.index_select(0, sent[: sum(go)])  # of its own, since the graph may reuse its memory before the end
    group = process_group(group_name)
    work = dist.all_to_all_single(out[: sum(come)], part, come, go, group, async_op=True)
    register_work(out, work)
    return out


@exchange_rows.register_fake
def _(
    rows: torch.Tensor,
    sent: torch.Tensor,
    counts: torch.Tensor,
    received: torch.Tensor,
    group_name: str,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    return rows.new_empty(received.shape[0], *rows.shape[1:])


@torch.library.custom_op("sp_compile::tile_plan", mutates_args=())
def tile_plan(
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
    q_rows: torch.Tensor,
    k_rows: torch.Tensor,
    runs: torch.Tensor | None = None,
    boxes: bool = True,
) -> torch.Tensor:
    """Regions of the scores to compute, int64 ``[regions, 8]``; see :func:`sp_compile.kernels.plan.plan_regions`.

    ``q_rows`` and ``k_rows`` are numbers of the rows that are queries and keys; only how many there are is used.
    ``runs`` are ranges outside of which no query sees a key, int64 ``[runs, 4]``; ``boxes`` is as there.
    """
    if runs is not None:
        return as_tensor(plan_within(runs.tolist(), operands, tables, rule, valid, boxes))
    return as_tensor(plans.plan_regions(operands, tables, rule, valid, q_rows.numel(), k_rows.numel(), boxes))


@tile_plan.register_fake
def _(*args: Any) -> torch.Tensor:
    return torch.empty(torch.library.get_ctx().new_dynamic_size(), 8, dtype=torch.int64)


@torch.library.custom_op("sp_compile::sloped", mutates_args=())
def sloped(value: torch.Tensor, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """The value, whose derivative by ``x`` is ``slope``, element by element; all are of one shape."""
    return value.clone()


@sloped.register_fake
def _(value: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(value)


def _save_slope(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(inputs[2])


def _sloped_gradient(ctx: Any, grad: torch.Tensor) -> Any:
    (slope,) = ctx.saved_tensors
    return grad, (grad * slope).to(ctx.dtype), None


sloped.register_autograd(_sloped_gradient, setup_context=_save_slope)


@torch.library.custom_op("sp_compile::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    empty_mean: bool = False,
    kernel: str = "tiles",
    plan: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    partial: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The canonical attention: softmax of the ruled scores over the keys, times the values, and its log-sum-exp.

    Args:
        q: ``[batch, heads, queries, head_dim]``.
        k: ``[batch, kv_heads, keys, head_dim]``, ``heads % kv_heads == 0``.
        v: ``[batch, kv_heads, keys, value_dim]``.
        operands, tables, rule: mask and score rule, see :mod:`sp_compile.score_rule`.
        scale: factor of ``q @ k^T``.
        empty_mean: a row that sees no key gets the mean of the values instead of 0.
        kernel: what computes it, see :mod:`sp_compile.kernels`.
        plan: regions from ``tile_plan``, made here where it is None.
        valid: bool ``[keys]``, keys that exist.
        partial: the output is to be merged with others over further keys, and is not rounded to q's dtype before,
            but where the kernel does so itself.

    Returns:
        Output ``[batch, heads, queries, value_dim]`` in q's dtype (``partial``: in that of the log-sum-exp) and
        log-sum-exp ``[batch, heads, queries]`` in fp32 (fp64 for fp64), -inf for a row that sees nothing.
    """
    out, lse = kernels.attend(kernel, q, k, v, operands, tables, rule, scale, plan, valid)
    if empty_mean:
        out = kernels.with_means(out, lse == -torch.inf, v, valid)
    return out.to(lse.dtype if partial else q.dtype).contiguous(), lse


@attention.register_fake
def _(*args: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, _, v = args[:3]
    lse = q.new_empty(*q.shape[:3], dtype=accumulated(q.dtype))
    dtype = lse.dtype if AttentionArgs(*args, **more).partial else q.dtype
    return q.new_empty(*q.shape[:3], v.shape[-1], dtype=dtype), lse


@torch.library.custom_op("sp_compile::attention_backward", mutates_args=())
def attention_backward(
    grad: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    empty_mean: bool,
    kernel: str,
    plan: torch.Tensor | None,
    valid: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    learned: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Gradients of q, k and v of an :func:`attention`, from those of what it returned.

    And those of operands and, numbered behind these, of tables whose numbers are ``learned``.
    """
    grad = torch.zeros_like(out) if grad is None else grad
    saved = kernels.Saved(q, k, v, out, lse, grad, grad_lse)
    (dq, dk, dv), of_rule = kernels.gradients(kernel, saved, operands, tables, rule, scale, plan, valid, learned)
    if empty_mean:
        dv = dv + kernels.gradient_of_means(grad, lse == -torch.inf, v, valid)
    return dq, dk, dv, of_rule


@attention_backward.register_fake
def _(grad: Any, grad_lse: Any, *args: Any) -> Any:
    (q, k, v, operands, tables), learned = args[:5], args[-1]
    vectors = [*operands, *tables]
    found = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (q, k, v)]
    return *found, [torch.empty_like(vectors[i]) for i in learned]


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    args = AttentionArgs(*inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(args.q, args.k, args.v, args.plan, args.valid, *output, *args.operands, *args.tables)
    ctx.operands, ctx.tables, ctx.rule = len(args.operands), len(args.tables), args.rule
    ctx.scale, ctx.empty_mean, ctx.kernel = args.scale, args.empty_mean, args.kernel


def _attention_gradient(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> Any:
    q, k, v, plan, valid, out, lse, *vectors = ctx.saved_tensors
    operands, tables = vectors[: ctx.operands], vectors[ctx.operands :]
    wanted = [*ctx.needs_input_grad[3], *ctx.needs_input_grad[4]]
    learned = [i for i, each in enumerate(wanted) if each]
    known = ctx.rule, ctx.scale, ctx.empty_mean, ctx.kernel
    *found, of_rule = attention_backward(
        grad, grad_lse, q, k, v, operands, tables, *known, plan, valid, out, lse, learned
    )
    of_vectors: list[torch.Tensor | None] = [None] * len(wanted)
    for i, each in zip(learned, of_rule, strict=True):
        of_vectors[i] = each
    others = len(ctx.needs_input_grad) - 5  # defaults at the end are left out
    return *found, of_vectors[: ctx.operands], of_vectors[ctx.operands :], *[None] * others


attention.register_autograd(_attention_gradient, setup_context=_save_attention)
