"""Small modules captured into programs, and programs run on pretended ranks in one process.

The captured token length is symbolic, so a program that was captured once runs at any lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from sp_compile import capture, mesh, ops
from sp_compile.config import compile_config
from sp_compile.errors import SPCompileError
from sp_compile.layout import TokenLayout, token_layout
from sp_compile.pipeline import registered_passes
from sp_compile.placements import Gathered, Partial, QueriesByKeys, Replicate, Shard, describe
from sp_compile.program import Program, op_name, placement
from sp_compile.requests import request_inputs
from sp_compile.runtime import ParallelModule
from sp_compile.steps import Kind, index_inputs
from sp_compile.symbols import is_tensor

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
LENGTHS = (5, 3, 1, 2)
SHAPED = ("reshape", "expand", "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")


class _Captured(SPCompileError):
    """Carries the program out of the compiler's back end."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program


SEED = 5  # of dropout


def small(forward: Callable[..., Any], **weights: torch.Tensor) -> nn.Module:
    """A module with this ``forward(self, ...)`` and these parameters."""
    module = type("Small", (nn.Module,), {"forward": forward})()
    for name, value in weights.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return module


def embeds(width: int = 8, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> dict[str, torch.Tensor]:
    """One packed row of random embeddings."""
    generator = torch.Generator().manual_seed(seed)
    return {"inputs_embeds": torch.randn(1, sum(lengths), width, generator=generator)}


def qkv(x: torch.Tensor, heads: int = 4, kv_heads: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values ``[1, heads, T, 4]`` cut out of embeddings of width ``4 * (heads + 2 * kv_heads)``."""
    ends = (0, heads, heads + kv_heads, heads + 2 * kv_heads)
    parts = [x[..., 4 * start : 4 * end] for start, end in itertools.pairwise(ends)]
    q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in parts)
    return q, k, v


def repeated(x: torch.Tensor, times: int = 2) -> torch.Tensor:
    """Keys or values repeated for grouped queries, as transformers does."""
    batch, heads, tokens, width = x.shape
    return x[:, :, None].expand(batch, heads, times, tokens, width).reshape(batch, heads * times, tokens, width)


def packed(width: int = 8, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Embeddings with the position ids of the requests."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {**embeds(width, lengths, seed), "position_ids": positions}


def after(
    last: str | None,
    model: nn.Module | Callable[..., Any],
    inputs: Mapping[str, torch.Tensor] | None = None,
    sp: int = 2,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    functional: bool = True,
    isolated: bool = False,
    cached: str = "",
    device: str = "",
    **config: Any,
) -> Program:
    """The program after the pass ``last`` of the default pipeline, or as captured for None.

    Args:
        model: a module, or a ``forward(self, ...)`` without weights.
        inputs: keyword arguments; by default a packed row of embeddings.
        options: of passes, by their names.
        isolated: as for a packed batch that the model itself would mix.
        cached: as with a cache: ``first``, ``more``, ``decode`` or ``mixed``.
        device: the kind that code is for; the model's by default.
        functional: False captures as models are that cannot be made functional, with composite ops as written.
    """
    names = list(registered_passes())
    names = names[: names.index(last) + 1] if last is not None else []
    pipeline = [{name: dict((options or {}).get(name, {}))} for name in names]
    module = model if isinstance(model, nn.Module) else small(model)
    chosen = compile_config(pipeline=pipeline, **config)
    parallel = ParallelModule(module.eval(), mesh.pretend(sp, chosen.ranks_per_node), chosen)
    if device:
        parallel.builder.pretend_device(torch.device(device))
    build = parallel.builder.build

    def captured(gm: fx.GraphModule, *_: Any, **__: Any) -> Any:
        raise _Captured(build(gm, Kind(isolated=isolated, cached=cached, outputs=parallel.compile_config.outputs))[0])

    parallel.builder.build = captured  # type: ignore[method-assign]
    torch._dynamo.reset()
    functionalize = capture.dispatch_functionalize if functional else _refuse
    try:
        with mock.patch.object(capture, "dispatch_functionalize", functionalize):
            parallel.explain(embeds() if inputs is None else inputs)
    except _Captured as found:
        program = found.program
    program.weights = dict(module.named_parameters())  # type: ignore[attr-defined]
    return program


def _refuse(*_: Any, **__: Any) -> Callable[..., Any]:
    return mock.Mock(side_effect=RuntimeError("not functional"))


def calls(program: Program, op: str) -> list[fx.Node]:
    """The calls of an op, such as ``aten.linear``."""
    return [node for node in program.graph.nodes if node.op == "call_function" and op_name(node) == op]


def call(program: Program, op: str) -> fx.Node:
    """The only call of an op."""
    (node,) = calls(program, op)
    return node


def ops_of(program: Program) -> list[str]:
    """The ops that are called, in order."""
    return [op_name(node) for node in program.graph.nodes if node.op == "call_function"]


def placed(program: Program, op: str) -> list[str]:
    """Placements of the calls of an op, as text."""
    return [describe(placement(node)) for node in calls(program, op)]


def run_whole(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[fx.Node, Any]:
    """What each node of the global view computes."""
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    tokens = next(iter(inputs.values())).shape[1]
    layout = token_layout([tokens], 1)
    Recorder(program.gm).run(*[_input(program, node, inputs, layout, 0)
                               for node in program.graph.find_nodes(op="placeholder")])  # fmt: skip
    return values


def outputs(program: Program, values: Mapping[fx.Node, Any]) -> Any:
    """The program's outputs among the values of its nodes."""
    return fx.map_arg(program.graph.output_node().args[0], lambda node: values[node])


def _input(program: Program, node: fx.Node, inputs: Mapping[str, torch.Tensor], layout: TokenLayout, rank: int) -> Any:
    if "index_input" in node.meta:
        found = {**index_inputs(layout, rank), **request_inputs(layout.lengths), "seed": torch.tensor(SEED)}
        return found[node.meta["index_input"]]
    if isinstance(node.meta["val"], torch.SymInt):
        return layout.tokens
    return {**program.weights, **inputs}[node.name]  # type: ignore[attr-defined]


class Ranks:
    """All ranks of a program in lockstep, in the global view with placements or in the local view.

    In the global view, redistributes do what their placements say and shape arguments are made local here, so that the
    rules are tried without the passes that come after them. ``values[node][rank]`` is what a rank holds.
    """

    def __init__(self, program: Program, inputs: Mapping[str, torch.Tensor], layout: TokenLayout) -> None:
        self.program, self.layout = program, layout
        self.values: dict[fx.Node, list[Any]] = {}
        ranks = range(layout.sp)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = [_input(program, node, inputs, layout, rank) for rank in ranks]
            elif node.op == "get_attr":
                self.values[node] = [getattr(program.gm, str(node.target))] * layout.sp
            elif node.op == "call_function":
                self.values[node] = self._call(node)

    def outputs(self) -> list[Any]:
        """The program's outputs on each rank."""
        return [outputs(self.program, {node: held[rank] for node, held in self.values.items()})
                for rank in range(self.layout.sp)]  # fmt: skip

    def _call(self, node: fx.Node) -> list[Any]:
        source = node.args[0] if node.args else None
        if node.target is ops.redistribute:
            return self._redistribute(self.values[source], placement(source), placement(node))  # type: ignore[index,arg-type]
        if node.target is ops.select_rows and isinstance(placement(source), Shard):  # type: ignore[arg-type]
            return self._select(node)
        if node.target is c10d.all_gather_into_tensor.default:
            return [torch.cat(self.values[source])] * self.layout.sp  # type: ignore[index]
        if node.target is c10d.all_reduce.default:
            return [sum(self.values[source])] * self.layout.sp  # type: ignore[index]
        if node.target is c10d.wait_tensor.default:
            return self.values[source]  # type: ignore[index]
        found = []
        for rank in range(self.layout.sp):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each, rank=rank: self.values[each][rank])
            if self.program.local_inputs is None:
                args = self._local_shape(node, args)
            found.append(node.target(*args, **kwargs))  # type: ignore[operator]
        return found

    def _local_shape(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        held = placement(node)
        at = next((i for i, each in enumerate(args) if isinstance(each, (list, tuple)) and all(
            isinstance(size, int) for size in each)), None)  # fmt: skip
        if at is None or not isinstance(held, Shard | Gathered) or op_name(node).removeprefix("aten.") not in SHAPED:
            return args
        shape = list(args[at])
        times = held.outer * held.inner if isinstance(held, Shard) else self.layout.sp
        shape[held.dim] = times * self.layout.shard_length
        return (*args[:at], shape, *args[at + 1 :])

    def _redistribute(self, held: list[torch.Tensor], source: Any, target: Any) -> list[torch.Tensor]:
        if isinstance(target, Gathered) and isinstance(source, Shard):
            return [torch.cat(held, dim=target.dim)] * self.layout.sp
        whole = self._whole(held, source)
        return [cut(each, target, self.layout, rank) for rank, each in enumerate(whole)]

    def _whole(self, held: list[torch.Tensor], source: Any) -> list[torch.Tensor]:
        match source:
            case Replicate():
                return held
            case Partial():
                return [torch.stack(held).sum(0)] * self.layout.sp
            case Shard(order="", rows=0):
                parts = [each.unflatten(source.dim, (source.outer, -1, source.inner)) for each in held]
                rows = torch.cat(parts, dim=source.dim + 1).index_select(source.dim + 1, self.layout.restore_index)
                return [rows.flatten(source.dim, source.dim + 2)] * self.layout.sp
            case Gathered():
                return [each.index_select(source.dim, self.layout.restore_index) for each in held]
        raise AssertionError(f"{describe(source)} cannot be made whole")

    def _select(self, node: fx.Node) -> list[torch.Tensor]:
        source, rows, dim = node.args
        found = []
        for rank, held in enumerate(self.values[source]):  # type: ignore[index]
            chosen = self.values[rows][rank] if isinstance(rows, fx.Node) else rows  # type: ignore[index]
            padded = self.layout.restore_index[chosen] - rank * self.layout.shard_length
            own = (padded >= 0) & (padded < self.layout.shard_length)
            part = held.index_select(dim, padded.clamp(0, self.layout.shard_length - 1))
            found.append(part * own.reshape(-1, *[1] * (part.dim() - dim - 1)))  # type: ignore[operator]
        return found


def cut(value: torch.Tensor, target: Any, layout: TokenLayout, rank: int) -> torch.Tensor:
    """What a rank holds of a whole value under a placement."""
    match target:
        case Shard(order="", rows=0):
            rows = value.unflatten(target.dim, (target.outer, -1, target.inner))
            return rows.index_select(target.dim + 1, layout.local_index[rank]).flatten(target.dim, target.dim + 2)
        case Gathered():
            return value.index_select(target.dim, layout.local_index.reshape(-1))
        case QueriesByKeys():
            queries = value.index_select(target.queries, layout.local_index[rank])
            return queries.index_select(target.keys, layout.local_index.reshape(-1))
    assert isinstance(target, Replicate), describe(target)
    return value


def check_placements(program: Program, inputs: Mapping[str, torch.Tensor], layout: TokenLayout) -> int:
    """Compare what every rank holds of each value with the same part of the whole value; padding may hold anything.

    Returns how many values were compared that are not replicated.
    """
    whole, ranks, compared = run_whole(program, inputs), Ranks(program, inputs, layout), 0
    for node, held in ranks.values.items():
        kind = placement(node)
        if not is_tensor(node) or "index_input" in node.meta or (isinstance(kind, Shard) and (kind.order or kind.rows)):
            continue
        if isinstance(kind, Partial):
            torch.testing.assert_close(sum(held), whole[node], msg=lambda text, node=node: f"%{node.name}: {text}")
            compared += 1
        elif isinstance(kind, (Replicate, Shard, Gathered)):
            for rank, found in enumerate(held):
                expected = cut(whole[node], kind, layout, rank)
                torch.testing.assert_close(
                    _without_padding(found, kind, layout, rank),
                    _without_padding(expected, kind, layout, rank),
                    msg=lambda text, node=node, rank=rank: f"%{node.name} on rank {rank}: {text}",
                )
            compared += not isinstance(kind, Replicate)
    return compared


def _without_padding(value: torch.Tensor, kind: Any, layout: TokenLayout, rank: int) -> torch.Tensor:
    if isinstance(kind, Shard):
        valid = layout.valid[rank].nonzero().flatten()
        return value.unflatten(kind.dim, (kind.outer, -1, kind.inner)).index_select(kind.dim + 1, valid)
    if isinstance(kind, Gathered):
        return value.index_select(kind.dim, layout.valid.reshape(-1).nonzero().flatten())
    return value
