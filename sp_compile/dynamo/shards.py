"""Tensor parallelism in Dynamo's graph: what a rank computes of DTensors, with the collectives written out.

A model that ``torch.distributed.tensor.parallel`` has cut over the ranks of ``tp`` multiplies DTensors. Here every one
becomes its local shard, after the two products of Megatron-LM (arXiv:1909.08053, section 3): columns of a weight need
nothing, the products of its rows are summed over ranks. ``place_gradients`` sees to what that means for gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.distributed.tensor import DTensor, Replicate, Shard

from sp_compile.dynamo.regions import MARKS
from sp_compile.errors import CaptureError
from sp_compile.program import source_line

c10d = torch.ops._c10d_functional
TRANSLATED = ("from_local", "redistribute", "to_local", "linear", "embedding")  # by methods of their names
SAME = ("detach", "contiguous", "to", "float", "clone")  # keep the placement of their first argument


def is_mesh(value: Any) -> bool:
    """Whether an input of Dynamo's graph is the mesh of a DTensor."""
    return type(getattr(value, "real_obj", value)).__name__ == "DeviceMesh"


def local_value(value: Any) -> Any:
    """The rank's shard of a DTensor, differentiable where gradients are recorded; other values as they are."""
    return value.to_local() if isinstance(value, DTensor) else value


def tensor_group(value: DTensor) -> str:
    """The name of the group of ranks that a DTensor is spread over."""
    return str(value.device_mesh.get_group(0).group_name)


def without_dtensors(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph over local shards; placeholders of meshes are gone.

    Raises:
        CaptureError: a DTensor has no local counterpart here: it is spread along the tokens, over several axes, or read
            by an op other than a product with weights.
    """
    if not any(_placed(node) is not None for node in gm.graph.nodes):
        return gm
    return fx.GraphModule(gm, _Local(gm.graph).graph)


def _placed(node: Any) -> DTensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, DTensor) else None


class _Local:
    """Copies a graph; knows how the copies of DTensors are really spread, which may be ahead of what the graph says."""

    def __init__(self, source: fx.Graph) -> None:
        self.graph = fx.Graph()
        self._own: dict[fx.Node, Any] = {}
        self._spread: dict[fx.Node, Replicate | Shard] = {}  # by nodes of the source
        weights = map(_placed, source.find_nodes(op="placeholder"))
        # torch may give what is computed an older mesh of the same ranks, whose groups have other names
        self._groups = {_ranks(each): tensor_group(each) for each in weights if each is not None}
        self._node: fx.Node
        for self._node in source.nodes:
            self._copy()

    def _copy(self) -> None:
        node = self._node
        if node.op == "output":
            if any(
                isinstance(self._spread.get(each), Shard) for each in node.all_input_nodes if _placed(each) is not None
            ):
                raise self._refused("the model returns a value that is spread over ranks; let it return local tensors")
            self.graph.output(fx.map_arg(node.args[0], self._own.__getitem__))
        elif node.op == "placeholder" and is_mesh(node.meta.get("example_value")):
            return
        elif node.op in ("placeholder", "get_attr") or not self._reads_dtensors():
            self._own[node] = self.graph.node_copy(node, self._own.__getitem__)
            if _placed(node) is not None:
                self._spread[node] = self._wanted()
        else:
            self._own[node] = self._translated()

    def _reads_dtensors(self) -> bool:
        return any(_placed(each) is not None for each in (self._node, *self._node.all_input_nodes))

    def _translated(self) -> fx.Node:
        node = self._node
        name = str(getattr(node.target, "__name__", node.target)).removeprefix("prim_")
        if name in TRANSLATED:
            result: fx.Node = getattr(self, f"_{name}")()
            return result
        inputs = [each for each in node.all_input_nodes if _placed(each) is not None]
        if name in SAME:
            self._spread[node] = self._spread[inputs[0]]
        elif all(isinstance(self._spread[each], Replicate) for each in inputs):
            self._spread[node] = Replicate()
        else:
            raise self._refused(f"{name} reads a value that is spread over ranks; let modules return local tensors")
        return self.graph.node_copy(node, self._own.__getitem__)

    def _from_local(self) -> fx.Node:
        self._spread[self._node] = self._wanted()
        return self._argument(0)

    def _to_local(self) -> fx.Node:
        return self._argument(0)

    def _redistribute(self) -> fx.Node:
        source, wanted = self._node.args[0], self._wanted()
        assert isinstance(source, fx.Node)
        held, value = self._spread[source], self._argument(0)
        self._spread[self._node] = wanted
        if held == wanted:
            return value
        if isinstance(held, Shard) and isinstance(wanted, Replicate):
            return self._gathered(value, held.dim)
        raise self._refused(f"a change from {held} to {wanted} has no local form here")

    def _linear(self) -> fx.Node:
        x, weight, bias = self._arguments("input", "weight", "bias")
        rows, columns = self._held(x), self._held(weight)
        last = self._node.meta["example_value"].dim() - 1
        if rows == Shard(last) and columns == Shard(1) and self._held(bias) == Replicate():
            self._spread[self._node] = Replicate()
            summed = self._summed(self._call(torch.nn.functional.linear, self._own[x], self._own[weight]))
            return summed if bias is None else self._call(torch.add, summed, self._own[bias])
        fits = bias is None or self._held(bias) == columns
        if not isinstance(rows, Replicate) or columns not in (Replicate(), Shard(0)) or not fits:
            raise self._refused(f"a product of {rows} with a weight of {columns} has no local form here")
        self._spread[self._node] = Replicate() if columns == Replicate() else Shard(last)
        return self.graph.node_copy(self._node, self._own.__getitem__)

    def _embedding(self) -> fx.Node:
        ids, weight, padding, *others = self._arguments(
            "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"
        )
        spread = self._held(weight)
        if not isinstance(self._held(ids), Replicate) or others[0] is not None or any(others[2:]):
            raise self._refused("a look-up of spread ids, or with more than padding_idx, has no local form here")
        if spread != Shard(0):
            last = self._node.meta["example_value"].dim() - 1
            self._spread[self._node] = Shard(last) if isinstance(spread, Shard) else spread
            return self.graph.node_copy(self._node, self._own.__getitem__)
        table = _placed(weight)
        assert table is not None
        start, count = _own_part(table, 0)
        local_padding = None if padding is None else padding % int(table.shape[0]) - start
        inside = local_padding is not None and 0 <= local_padding < count
        local = self._call(torch.sub, self._own[ids], start)
        outside = self._call(torch.logical_or, self._call(torch.lt, local, 0), self._call(torch.ge, local, count))
        found = self._call(
            torch.nn.functional.embedding,
            self._call(torch.masked_fill, local, outside, 0),
            self._own[weight],
            local_padding if inside else None,
        )
        self._spread[self._node] = Replicate()
        return self._summed(self._call(torch.masked_fill, found, self._call(torch.unsqueeze, outside, -1), 0.0))

    def _summed(self, value: fx.Node) -> fx.Node:
        return self._call(c10d.wait_tensor.default, self._call(c10d.all_reduce.default, value, "sum", self._group()))

    def _gathered(self, value: fx.Node, dim: int) -> fx.Node:
        whole = self._node.meta["example_value"]
        size, ranks = whole.shape[dim], whole.device_mesh.size()
        if not isinstance(size, int):
            raise self._refused("tokens are spread over the ranks of tp, which sp does; take SequenceParallel out")
        each = -(-size // ranks)
        if _own_part(whole, dim)[1] < each:
            after = whole.dim() - 1 - dim
            value = self._call(
                torch.nn.functional.pad, value, (0,) * (2 * after + 1) + (each - _own_part(whole, dim)[1],)
            )
        rows = self._call(torch.Tensor.contiguous, self._call(torch.transpose, value, 0, dim))
        found = self._call(c10d.all_gather_into_tensor.default, rows, ranks, self._group())
        found = self._call(torch.transpose, self._call(c10d.wait_tensor.default, found), 0, dim)
        return self._call(torch.Tensor.contiguous, self._call(torch.narrow, found, dim, 0, size))

    def _group(self) -> str:
        value = self._node.meta["example_value"]
        return self._groups.get(_ranks(value)) or tensor_group(value)

    def _held(self, node: Any) -> Replicate | Shard:
        """How an argument is spread; what is not a DTensor is the same on all ranks."""
        return self._spread.get(node, Replicate())

    def _wanted(self) -> Replicate | Shard:
        """How the graph says that the node's value is spread."""
        value = self._node.meta["example_value"]
        if value.device_mesh.ndim != 1:
            raise self._refused(f"a tensor is spread over the axes {value.device_mesh.mesh_dim_names}; only one can be")
        (found,) = value.placements
        if type(found) is Replicate:
            return found
        if type(found) is not Shard:
            raise self._refused(f"a value is placed as {found}")
        dim = found.dim % value.dim()
        if not isinstance(value.shape[dim], int):
            raise self._refused("tokens are spread over the ranks of tp, which sp does; take SequenceParallel out")
        return Shard(dim)

    def _arguments(self, *names: str) -> list[Any]:
        given = dict(zip(names, self._node.args, strict=False)) | dict(self._node.kwargs)
        return [given.get(name) for name in names]

    def _argument(self, place: int) -> fx.Node:
        source = self._node.args[place]
        assert isinstance(source, fx.Node)
        found: fx.Node = self._own[source]
        return found

    def _call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        kept = ("stack_trace", "nn_module_stack", *MARKS)
        node.meta = {name: self._node.meta[name] for name in kept if name in self._node.meta}
        return node

    def _refused(self, why: str) -> CaptureError:
        where = source_line(self._node)
        return CaptureError(f"tensor parallelism{where and f' at {where}'}: {why}")


def _ranks(value: DTensor) -> tuple[int, ...]:
    return tuple(value.device_mesh.mesh.flatten().tolist())


def _own_part(value: DTensor, dim: int) -> tuple[int, int]:
    """Where a rank's part of a dim begins and how long it is; parts are as of ``torch.chunk``."""
    size, each = int(value.shape[dim]), -(-int(value.shape[dim]) // value.device_mesh.size())
    start = min(value.device_mesh.get_local_rank() * each, size)
    return start, min(each, size - start)
