"""What a rank holds at a time while its local graph runs, read in the graph itself: nothing is allocated.

A value is held from the node that computes it to the last one that reads it, or a view of it. What a collective sends
and brings is held until it is waited for. Weights, token ids and other inputs are the caller's, and are not counted;
nor are what a kernel allocates inside itself, and plans on the host of a model that is elsewhere. Ops count one by one,
so what Inductor fuses takes less.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.multiprocessing.reductions import StorageWeakRef

from sp_compile.collectives import EXCHANGE, is_start, is_wait
from sp_compile.program import Program
from sp_compile.symbols import known_size

FLEX = torch.ops.higher_order.flex_attention


class Peak(NamedTuple):
    """The most that is held at a time.

    Attributes:
        bytes: of all values together.
        at: the node that is computed then.
        values: bytes of each of them, by the node that computed it, the largest first.
    """

    bytes: int
    at: str
    values: dict[str, int]


class _Held(NamedTuple):
    """Memory of a value: its bytes, and the first and the last node at which it is there."""

    name: str
    bytes: int
    first: int
    last: int


def peak(program: Program, sizes: Mapping[str, int]) -> Peak:
    """The most that a rank holds at a time in one run of its local graph; see the top of this module.

    Args:
        program: whose shapes are local.
        sizes: true values of its symbols; sizes that depend on data, as those of plans, count as 1.
    """
    held = [*_held(program, sizes)]
    nodes = [*program.graph.nodes]
    change = [0] * (len(nodes) + 1)
    for each in held:
        change[each.first] += each.bytes
        change[each.last + 1] -= each.bytes
    most, at, now = 0, 0, 0
    for i, more in enumerate(change):
        now += more
        if now > most:
            most, at = now, i
    there = Counter[str]()
    for each in held:
        there[each.name] += each.bytes if each.first <= at <= each.last else 0
    return Peak(most, nodes[at].name, {name: size for name, size in there.most_common() if size})


def values(program: Program, sizes: Mapping[str, int]) -> dict[fx.Node, list[torch.Tensor]]:
    """The tensors of each node of a local graph, of true sizes and without data; views share the memory of another.

    Args:
        program, sizes: as of :func:`peak`.
    """
    return _Sizes(program, sizes).tensors()


def _held(program: Program, sizes: Mapping[str, int]) -> Iterator[_Held]:
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    inputs = [each for each in program.local_inputs or () if isinstance(each, torch.Tensor)]
    own, on_host = values(program, sizes), all(each.device.type == "cpu" for each in inputs)
    first: dict[StorageWeakRef, tuple[fx.Node, torch.Tensor]] = {}
    last: dict[StorageWeakRef, int] = {}
    for node, tensors in own.items():
        for each in tensors:
            memory = StorageWeakRef(each.untyped_storage())
            first.setdefault(memory, (node, each))
            last[memory] = max([last.get(memory, 0), place[node], *(_end(user, place) for user in node.users)])
    for memory, (node, tensor) in first.items():
        if node.op == "call_function" and (on_host or tensor.device.type != "cpu"):
            yield _Held(node.name, _number(tensor.untyped_storage().nbytes()), place[node], last[memory])
    for node in program.graph.find_nodes(op="call_function", target=EXCHANGE):
        (rows,), (sent,) = (own[each] for each in node.all_input_nodes[:2])
        size = math.prod(sent.shape[:1] + rows.shape[1:]) * rows.element_size()
        yield _Held(f"what {node.name} sends", size, place[node], _ended(node, place))


def _end(node: fx.Node, place: Mapping[fx.Node, int]) -> int:
    """The place of the last node at which inputs of a node are held for it."""
    return _ended(node, place) if is_start(node) and node.target is not EXCHANGE else place[node]


def _ended(start: fx.Node, place: Mapping[fx.Node, int]) -> int:
    """The place of the wait for a collective."""
    return max(place[each] for each in (start, *filter(is_wait, start.users)))


def _number(size: Any) -> int:
    """A size; 1 where it depends on data."""
    return int(size) if isinstance(size, int) else 1


class _Sizes(fx.Interpreter):
    """Runs a local graph on fake tensors of true sizes."""

    def __init__(self, program: Program, sizes: Mapping[str, int]) -> None:
        super().__init__(program.gm, garbage_collect_values=False)
        known = {size.node.expr: sizes[name] for name, size in program.symbols.items() if name in sizes}
        self.shape_env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self.inputs = [self._fake(each, known) for each in program.local_inputs or ()]

    def tensors(self) -> dict[fx.Node, list[torch.Tensor]]:
        """Those of each node."""
        with self.mode, enable_python_dispatcher(), torch.no_grad(), self.shape_env.ignore_fresh_unbacked_symbols():
            self.run(*self.inputs)
        found = {}
        for node, value in self.env.items():
            values = value if isinstance(value, (tuple, list)) else [value]
            found[node] = [each for each in values if isinstance(each, torch.Tensor)]
        return found

    def run_node(self, n: fx.Node) -> Any:
        """What a node computes."""
        if is_wait(n):
            return self.env[n.all_input_nodes[0]]  # the same memory
        if n.target is not FLEX:
            return super().run_node(n)
        q, _, v = self.map_nodes_to_values(n.args[:3], n)
        return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)

    def _fake(self, value: Any, known: Mapping[Any, int]) -> Any:
        def true(size: Any) -> int:
            return known_size(size, known) or 1

        if isinstance(value, torch.SymInt):
            return true(value)
        if not isinstance(value, torch.Tensor):
            return value
        shape, strides = (tuple(map(true, each)) for each in (value.shape, value.stride()))
        with self.mode:
            return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
