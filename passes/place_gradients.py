"""Say where gradients enter and leave the graph: shared among ranks at outputs, summed over ranks at weights.

Requires: ``lowered``.
Establishes: ``gradients_placed``.

See :mod:`sp_compile.gradients`. Weights are summed in buckets, in the order in which the backward is done with them, so
that sums travel while the rest of it computes. What attention reads of other ranks' tokens is kept for the backward,
also in checkpointed layers, or marked to be brought again there.

Before::

    %linear = aten.linear(%x, %weight); %all = c10d.all_gather_into_tensor(%linear, 2, 'sp'); ...
    return [%loss, %logits]

After::

    %weights = end_sums(%weight, ...); %bucket = begin_sum('sp', %weights[0], ...)
    %linear = aten.linear(%x, %bucket[0]); %all = restored_rows(%linear, 2, 'sp', %rank); ...
    %share = share_gradient(%loss, 2)
    return [%share, %logits]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from sp_compile import gradients, ops
from sp_compile.collectives import is_wait
from sp_compile.errors import CaptureError
from sp_compile.invariants import GRADIENTS_PLACED, LOWERED
from sp_compile.pipeline import Pass
from sp_compile.placements import REPLICATE, Replicate, Shard
from sp_compile.program import Program, placement, source_line
from sp_compile.symbols import is_float, shape_of

aten = torch.ops.aten
ALL_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
_JOINING = {
    torch.ops._c10d_functional.all_reduce.default: gradients.sum_shards,
    ALL_GATHER: gradients.stack_shards,
}
_OF_A_SHARD = (
    "the loss is computed from a part of the logits on each rank of tensor parallelism; let the module that makes them "
    "return whole ones: ColwiseParallel(output_layouts=Replicate())"
)
_DRAWN_IN_SHARDS = (
    "dropout at {where} is of values that are spread over ranks of tensor parallelism, which would all draw the same; "
    "set its probability to 0, or leave that module whole"
)
ORDERED = (aten.index_select.default, aten.movedim.int, aten.unflatten.int, aten.flatten.using_ints)


@dataclass(frozen=True)
class PlaceGradients(Pass):
    """Shares of gradients at outputs, sums at weights.

    Attributes:
        bucket_bytes: gradients that are summed together, at most but for a single one.
        keep_gathered: see :class:`sp_compile.config.CompileConfig`.
    """

    name = "place_gradients"
    requires = (LOWERED,)
    establishes = (GRADIENTS_PLACED,)

    bucket_bytes: int = gradients.BUCKET
    keep_gathered: bool = True

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if not program.differentiable:
            return
        for group in program.tensor_groups:
            _shards(program, group)
        if program.sp > 1:
            self._outputs(program)
            self._weights(program)
            if not self.keep_gathered:
                _bring_again(program)

    def _outputs(self, program: Program) -> None:
        output = program.graph.output_node()
        shared: dict[fx.Node, fx.Node] = {}
        for node in output.all_input_nodes:
            known = "val" in node.meta  # what was lowered is a tensor
            if (known and not is_float(node)) or not isinstance(placement(node), Replicate):
                continue
            gather = _only_gathered(node)
            if gather is not None:
                gather.target = gradients.restored_rows
                gather.args = (*gather.args, program.index_input("rank"))
                continue
            with program.graph.inserting_before(output):
                shared[node] = program.graph.call_function(gradients.share_gradient, (node, program.sp))
            shared[node].meta["placement"] = REPLICATE
        output.args = fx.map_arg(output.args, lambda each: shared.get(each, each))

    def _weights(self, program: Program) -> None:
        graph = program.graph
        placeholders = graph.find_nodes(op="placeholder")
        weights = [each for each in placeholders if each.meta.get("requires_grad") and each.users]
        if not weights:
            return
        place = {node: i for i, node in enumerate(graph.nodes)}
        first = {each: min(each.users, key=place.__getitem__) for each in weights}
        weights.sort(key=lambda each: place[first[each]])
        start = placeholders[-1].next
        with graph.inserting_before(start):
            ended = _parts(graph, gradients.end_sums, (), weights)
        for bucket in self._buckets(weights):
            with graph.inserting_before(min((first[each] for each in bucket), key=place.__getitem__)):
                found = _parts(graph, gradients.begin_sum, (program.group_name,), [ended[each] for each in bucket])
            for each in bucket:
                new = found[ended[each]]
                each.replace_all_uses_with(new, delete_user_cb=lambda user: user.target is not gradients.end_sums)

    def _buckets(self, weights: list[fx.Node]) -> Iterator[list[fx.Node]]:
        """Weights of one dtype that are used one after the other."""
        bucket: list[fx.Node] = []
        held = 0
        for each in weights:
            value = each.meta["val"]
            size = value.numel() * value.element_size()
            if bucket and (held + size > self.bucket_bytes or value.dtype != bucket[0].meta["val"].dtype):
                yield bucket
                bucket, held = [], 0
            bucket.append(each)
            held += size
        if bucket:
            yield bucket


def _shards(program: Program, group: str) -> None:
    """Have ranks of tensor parallelism sum the gradients of what they compute shards from.

    Raises:
        CaptureError: the loss is one of a shard, or shards have dropout, which would draw the same in all.
    """
    graph = program.graph
    inputs = graph.find_nodes(op="placeholder")
    in_shards = {each for each in inputs if group in each.meta.get("tensor_group", ())}
    recorded = {each for each in inputs if each.meta.get("requires_grad")}
    drawn = {each for each in inputs if each.meta.get("index_input") == "seed"}  # by the seed, and by nothing else
    read: dict[fx.Node, fx.Node] = {}
    for node in [each for each in graph.nodes if each.op == "call_function"]:
        sources = node.all_input_nodes
        if not recorded.isdisjoint(sources) and ("val" not in node.meta or is_float(node)):
            recorded.add(node)
        if node.target in _JOINING and node.args[-1] == group:
            node.target = _JOINING[node.target]
        elif not in_shards.isdisjoint(sources):
            in_shards.add(node)
            if not drawn.isdisjoint(sources):
                raise CaptureError(_DRAWN_IN_SHARDS.format(where=source_line(node) or "no source line"))
            for each in [each for each in sources if each in recorded and each not in in_shards]:
                node.replace_input_with(each, _read_by_shards(each, node, group, read))
        elif not drawn.isdisjoint(sources) and recorded.isdisjoint(sources):
            drawn.add(node)
    for each in in_shards & recorded & {*graph.output_node().all_input_nodes}:
        if not shape_of(_before_sums(each)):
            raise CaptureError(_OF_A_SHARD)


def _read_by_shards(value: fx.Node, reader: fx.Node, group: str, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """The value as shards are computed from it, made once for all that read it, the first of which is ``reader``."""
    if value not in made:
        with reader.graph.inserting_before(reader):
            made[value] = reader.graph.call_function(gradients.read_by_shards, (value, group))
        made[value].meta.update(value.meta)
    return made[value]


def _before_sums(node: fx.Node) -> fx.Node:
    """What was summed over ranks, of which the shape is known."""
    while "val" not in node.meta:
        node = node.all_input_nodes[0]
    return node


def _bring_again(program: Program) -> None:
    """Mark what attention reads, back to values of the rank's own rows, to be computed again in the backward."""
    stack = [each for node in ops.attention_nodes(program.graph) for each in ops.AttentionArgs(*node.args)[:3]]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        ends = node.op == "placeholder" or isinstance(node.meta.get("placement"), Shard | Replicate)
        if not ends and node not in seen:
            seen.add(node)
            node.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)  # checkpointed layers are marked
            stack += node.all_input_nodes


def _parts(
    graph: fx.Graph, target: object, before: tuple[object, ...], weights: list[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """A call on all weights, and its results by weight."""
    call = graph.call_function(target, (*before, *weights))
    call.meta.update(val=tuple(each.meta["val"] for each in weights), placement=(REPLICATE,) * len(weights))
    found = {}
    for i, each in enumerate(weights):
        found[each] = graph.call_function(getitem, (call, i))
        found[each].meta.update(val=each.meta["val"], placement=REPLICATE)
    return found


def _only_gathered(node: fx.Node) -> fx.Node | None:
    """The all-gather that an output is, brought to normal order and read by nothing else."""
    while node.target in ORDERED and len(node.users) == 1:
        node = node.args[0]
    if not is_wait(node) or len(node.users) != 1:
        return None
    gather = node.args[0]
    assert isinstance(gather, fx.Node)
    return gather if gather.target is ALL_GATHER and len(gather.users) == 1 else None
