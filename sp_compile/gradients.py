"""Derivatives of a local graph: of what ranks exchange, of outputs that are whole on every rank, and of weights.

The gradient of a value that every rank has whole is kept as a sum over ranks: each rank has the part that comes from
what it computed itself. So the gradient of an all-gather is a reduce-scatter and that of a sum over ranks is one too,
whatever is done with the result. Outputs are where a gradient enters, the same on every rank: each takes its share of
it, or its own rows of it where the output was only gathered. Weights are where it leaves: there the parts are summed.

Ranks of tensor parallelism, that have shards of weights, are others, and each has whole gradients of what all of them
have: what they compute shards from gets the sum of their gradients, and what sums shards hands its gradient on
(arXiv:1909.08053, figure 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.autograd import Function

from sp_compile import ops
from sp_compile.compat import process_group

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
BUCKET = 25 << 20  # bytes of gradients that are summed together


def _done(started: torch.Tensor) -> torch.Tensor:
    waited: torch.Tensor = c10d.wait_tensor(started)
    return waited


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
        ctx.ranks, ctx.group = ranks, group
        gathered: torch.Tensor = c10d.all_gather_into_tensor(rows, ranks, group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        started = c10d.reduce_scatter_tensor(grad.contiguous(), "sum", ctx.ranks, ctx.group)
        return _done(started), None, None


class _Restored(Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, ranks: int, group: str, rank: torch.Tensor) -> torch.Tensor:
        ctx.ranks = ranks
        ctx.save_for_backward(rank)
        gathered: torch.Tensor = c10d.all_gather_into_tensor(rows, ranks, group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (rank,) = ctx.saved_tensors
        own = grad.unflatten(0, (ctx.ranks, -1)).index_select(0, rank.reshape(1))
        return own.squeeze(0), None, None, None


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, op: str, group: str) -> torch.Tensor:
        ctx.op, ctx.group = op, group
        reduced: torch.Tensor = c10d.all_reduce(value, op, group)
        return reduced

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _done(c10d.all_reduce(grad.contiguous(), ctx.op, ctx.group)), None, None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, come: list[Any], go: list[Any], group: str) -> torch.Tensor:
        ctx.sizes, ctx.group = (come, go), group
        exchanged: torch.Tensor = c10d.all_to_all_single(rows, come, go, group)
        return exchanged

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        come, go = ctx.sizes
        return _done(c10d.all_to_all_single(grad.contiguous(), go, come, ctx.group)), None, None, None


class _Exchange(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        sent: torch.Tensor,
        counts: torch.Tensor,
        received: torch.Tensor,
        group: str,
        after: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ctx.rows, ctx.group = rows.shape[0], group
        ctx.save_for_backward(sent, counts, received)
        exchanged: torch.Tensor = ops.exchange_rows(rows, sent, counts, received, group, after)
        return exchanged

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        sent, counts, received = ctx.saved_tensors
        everything = torch.arange(received.shape[0], device=grad.device)
        back = _done(ops.exchange_rows(grad.contiguous(), everything, counts.flip(0), sent, ctx.group))
        # what is too much at the end is zero
        own = grad.new_zeros(ctx.rows, *grad.shape[1:]).index_add(0, sent, back)
        return own, None, None, None, None, None


class _SumShards(Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, op: str, group: str) -> torch.Tensor:
        summed: torch.Tensor = c10d.all_reduce(value, op, group)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None, None


class _StackShards(Function):
    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
        ctx.rows, ctx.group = shard.shape[0], group
        stacked: torch.Tensor = c10d.all_gather_into_tensor(shard, ranks, group)
        return stacked

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        place = process_group(ctx.group).rank()
        return grad.narrow(0, place * ctx.rows, ctx.rows), None, None


class _ReadByShards(Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _done(c10d.all_reduce(grad.contiguous(), "sum", ctx.group)), None


class _Wait(Function):
    @staticmethod
    def forward(ctx: Any, started: torch.Tensor) -> torch.Tensor:
        return _done(started)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _Share(Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, ranks: int) -> torch.Tensor:
        ctx.ranks = ranks
        return value.clone()  # of a view, autograd forbids what Trainer does: loss *= 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad / ctx.ranks, None


class _Sum(Function):
    """Begins the sum of a bucket."""

    @staticmethod
    def forward(ctx: Any, group: str, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)
        return tuple(each.view_as(each) for each in weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        found = [each.contiguous() for each in grads if each is not None]
        summed = iter(c10d.all_reduce_coalesced(found, "sum", ctx.group) if found else ())
        return None, *(None if each is None else next(summed) for each in grads)


class _Summed(Function):
    """Ends the sums of all buckets; the first in the forward, so that it is the last in the backward."""

    @staticmethod
    def forward(ctx: Any, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(each.view_as(each) for each in weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return tuple(None if each is None else _done(each) for each in grads)


def restored_rows(rows: torch.Tensor, ranks: int, group: str, rank: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks for an output that every rank has whole: each gets the gradient of its own back."""
    return _Restored.apply(rows, ranks, group, rank)  # type: ignore[no-any-return, no-untyped-call]


def share_gradient(value: torch.Tensor, ranks: int) -> torch.Tensor:
    """An output that every rank has whole, whose gradient comes once for each: a rank takes its share of it."""
    return _Share.apply(value, ranks)  # type: ignore[no-any-return, no-untyped-call]


def begin_sum(group: str, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Weights of a bucket, whose gradients begin to be summed over ranks once all of them are known."""
    return _Sum.apply(group, *weights)  # type: ignore[no-any-return, no-untyped-call]


def end_sums(*weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All weights; their sums are waited for at the end of the backward."""
    return _Summed.apply(*weights)  # type: ignore[no-any-return, no-untyped-call]


def sum_shards(value: torch.Tensor, op: str, group: str) -> torch.Tensor:
    """Begin to sum over ranks of tensor parallelism; each of them gets the whole gradient."""
    return _SumShards.apply(value, op, group)  # type: ignore[no-any-return, no-untyped-call]


def stack_shards(shard: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """Begin to stack shards along dim 0; each rank of tensor parallelism takes the gradient of its own."""
    return _StackShards.apply(shard, ranks, group)  # type: ignore[no-any-return, no-untyped-call]


def read_by_shards(value: torch.Tensor, group: str) -> torch.Tensor:
    """A value of all ranks of tensor parallelism that each computes its shard from: its gradients are summed."""
    return _ReadByShards.apply(value, group)  # type: ignore[no-any-return, no-untyped-call]


def all_gather(rows: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """Begin to gather rows whose gradients are summed where they came from."""
    return _AllGather.apply(rows, ranks, group)  # type: ignore[no-any-return, no-untyped-call]


def all_reduce(value: torch.Tensor, op: str, group: str) -> torch.Tensor:
    """Begin to sum a value over ranks."""
    return _AllReduce.apply(value, op, group)  # type: ignore[no-any-return, no-untyped-call]


def all_to_all(rows: torch.Tensor, come: list[Any], go: list[Any], group: str) -> torch.Tensor:
    """Begin to exchange rows, whose gradients go back the way they came."""
    return _AllToAll.apply(rows, come, go, group)  # type: ignore[no-any-return, no-untyped-call]


def exchange(
    rows: torch.Tensor,
    sent: torch.Tensor,
    counts: torch.Tensor,
    received: torch.Tensor,
    group: str,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`sp_compile.ops.exchange_rows`, whose gradients go back and are added up."""
    return _Exchange.apply(rows, sent, counts, received, group, after)  # type: ignore[no-any-return, no-untyped-call]


def wait(started: torch.Tensor) -> torch.Tensor:
    """End any of these."""
    return _Wait.apply(started)  # type: ignore[no-any-return, no-untyped-call]


def copied(over: torch.Tensor, source: torch.Tensor, _: bool = False) -> torch.Tensor:
    """What ``over`` holds once ``source`` was written over it; torch knows no derivative of its op for that."""
    return source.to(over).expand(over.shape).contiguous()


DERIVED: dict[Any, Callable[..., Any]] = {
    aten.copy.default: copied,
    c10d.all_gather_into_tensor.default: all_gather,
    c10d.all_reduce.default: all_reduce,
    c10d.all_to_all_single.default: all_to_all,
    c10d.wait_tensor.default: wait,
    ops.exchange_rows._opoverload: exchange,
}


def with_derivatives(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph, with collectives and copies that torch can differentiate."""
    graph = fx.Graph()
    own: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, own))
    for node in graph.nodes:
        if node.meta.get("stack_trace", "") is None:
            del node.meta["stack_trace"]  # torch writes it into the backward as text
        if node.op == "call_function" and node.target in DERIVED:
            node.target = DERIVED[node.target]
    return fx.GraphModule(gm, graph)
