"""Make every shape argument the rank's, and compute all shapes anew in the local view.

Requires: ``lowered``.
Establishes: ``local_shapes``.

The whole graph is run once on fake tensors of local shapes: an op that does not fit its inputs is found here, not on a
rank. ``shard_length`` is a symbol of its own, so new lengths never compile again.

Before::

    %reshape: f32[1, T, 4, 16] Shard(1) = aten.reshape(%linear, [1, %tokens, 4, 16])

After::

    %reshape: f32[1, n, 4, 16] Shard(1) = aten.reshape(%linear, [1, %sym_size, 4, 16])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from sp_compile.compat import hint_of_symbol, size_source
from sp_compile.invariants import LOCAL, LOWERED
from sp_compile.pipeline import Pass
from sp_compile.placements import Gathered, Shard
from sp_compile.program import Program, gathered_index, placement
from sp_compile.symbols import is_tensor

aten = torch.ops.aten

SHAPE_ARGUMENT = {
    aten.reshape.default: 1,
    aten.expand.default: 1,
    aten.zeros.default: 0,
    aten.ones.default: 0,
    aten.full.default: 0,
    aten.empty.memory_format: 0,
    aten.new_zeros.default: 1,
    aten.new_ones.default: 1,
    aten.new_full.default: 1,
    aten.new_empty.default: 1,
}


# the sizes of what else enters beside a cache
CACHE_SIZES = {"new_rows": "new_tokens", "kept_rows": "kept"}
NUMBERED_SIZES = {"held_index": "slots", "held_valid": "slots", "picked_queries": "queries", "queries_index": "queries",
                  "picked_past": "past", "seen_index": "past", "seen_valid": "past", "fetch_rows": "sent",
                  "fetched_rows": "fetched", "reach_index": "fetched", "reach_valid": "fetched",
                  "stage_index": "fetched", "stage_valid": "fetched"}  # fmt: skip
EXAMPLE = 24


@dataclass(frozen=True)
class LocalizeShapes(Pass):
    """Local shapes everywhere."""

    name = "localize_shapes"
    requires = (LOWERED,)
    establishes = (LOCAL,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if program.tokens is not None:
            self._localize_arguments(program)
        _Shapes(program).run()

    def _localize_arguments(self, program: Program) -> None:
        for node in list(program.graph.nodes):
            held = placement(node) if is_tensor(node) else None
            if not isinstance(held, Shard | Gathered) or node.target not in SHAPE_ARGUMENT:
                continue
            at = SHAPE_ARGUMENT[node.target]
            shape = list(node.args[at])
            index = "local_index" if isinstance(held, Shard) else gathered_index(held)
            with program.graph.inserting_before(node):
                rows = program.graph.call_function(aten.sym_size.int, (program.index_input(index), 0))
                times = held.outer * held.inner if isinstance(held, Shard) else 1
                if times != 1:
                    rows = program.graph.call_function(_times, (rows, times))
            shape[held.dim] = rows
            node.args = (*node.args[:at], shape, *node.args[at + 1 :])


def _times(size: int, times: int) -> int:
    return size * times


class _Shapes:
    """Fake inputs of local shape, and every value computed from them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.shape_env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self.lengths: dict[sympy.Symbol, torch.SymInt] = {}

    def run(self) -> None:
        graph = self.program.graph
        inputs = [self._fake(node) for node in graph.find_nodes(op="placeholder")]
        self.program.local_inputs = inputs
        interpreter = _Recorder(self.program.gm)
        with self.mode, enable_python_dispatcher(), self.shape_env.ignore_fresh_unbacked_symbols():
            interpreter.run(*inputs)

    def symbol(self, name: str, hint: int) -> Any:
        """A size that compiled code may not depend on, one of each name."""
        if name in self.program.symbols:
            return self.program.symbols[name]
        source, hint = size_source(name), self.program.hints.get(name, hint)
        symbol = self.shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        self.program.symbols[name] = made = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
        return made

    def _fake(self, node: fx.Node) -> Any:
        name = node.meta.get("index_input")
        if name is not None and "held" not in node.meta:
            return self._index_input(name)
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if not isinstance(value, torch.Tensor):
            return value
        sizes = [self._size(size) for size in value.shape]
        strides = [self._size(stride) for stride in value.stride()]
        if "held" in node.meta:
            sizes[2] = self.symbol(f"slots_{node.meta['held']}", EXAMPLE)
            with self.mode:
                return torch.empty(sizes, dtype=value.dtype, device=value.device)
        with self.mode:
            own = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        return own.requires_grad_(self.program.differentiable and node.meta.get("requires_grad", False))

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        known = size.node.expr
        result: Any = known
        values = {}
        for symbol in known.free_symbols:
            if symbol not in self.lengths:
                hint = hint_of_symbol(size, symbol)
                name = "tokens" if symbol == self.program.tokens else str(symbol)
                self.lengths[symbol] = self.symbol(name, hint)
            values[symbol] = self.lengths[symbol]
        if isinstance(known, sympy.Symbol):
            return values[known]
        result = sympy.lambdify(list(values), known, modules=[{"FloorDiv": lambda a, b: a // b}])(*values.values())
        return result

    def _index_input(self, name: str) -> Any:
        rows, sp = self._shard_length(), self.program.sp
        device = self._device()
        with self.mode:
            if name in ("rank", "node_rank", "seed"):
                return torch.empty((), dtype=torch.int64, device=device)
            if name in ("gathered_valid", "local_valid"):
                return torch.empty(rows * (sp if name[0] == "g" else 1), dtype=torch.bool, device=device)
            what, _, shelf = name.rpartition("_")
            if what == "fetch_counts":
                return torch.empty(2, sp, dtype=torch.int64)
            if what == "held_runs":
                return torch.empty(self.symbol(f"runs_{shelf}", EXAMPLE), 4, dtype=torch.int64)
            if shelf.isdecimal():
                dtype = torch.bool if what.endswith("_valid") else torch.int64
                return torch.empty(self._numbered_size(what, shelf), dtype=dtype, device=device)
            ranks = {
                "local_index": 1,
                "gathered_index": sp,
                "node_index": self.program.nodes and self.program.nodes.size,
            }
            if name in ranks:
                size = rows * ranks[name]
            elif name in CACHE_SIZES or (name == "restore_index" and self.program.cached):
                size = self.symbol(CACHE_SIZES.get(name, "new_tokens"), EXAMPLE)
            else:
                size = self._tokens()
            return torch.empty(size, dtype=torch.int64, device=device)

    def _numbered_size(self, what: str, shelf: str) -> Any:
        """The size of an index input of a shelf or a reach."""
        if what == "merged_rows":
            return self._shard_length()
        size = self.symbol(f"{NUMBERED_SIZES[what]}_{shelf}", EXAMPLE)
        if what.startswith(("seen", "reach")):
            size = self._shard_length() + size
        return self.program.sp * size if what.startswith(("queries", "seen")) else size

    def _tokens(self) -> torch.SymInt:
        assert self.program.tokens is not None
        if self.program.tokens not in self.lengths:
            self.lengths[self.program.tokens] = self.symbol("tokens", 67)
        return self.lengths[self.program.tokens]

    def _shard_length(self) -> Any:
        return self.symbol("shard_length", max(2, -(-int(self._tokens().node.hint) // self.program.sp)) + 1)

    def _device(self) -> torch.device:
        for node in self.program.graph.find_nodes(op="placeholder"):
            if node.name in self.program.token_inputs:
                return node.meta["val"].device  # type: ignore[no-any-return]
        return torch.device("cpu")


class _Recorder(fx.Interpreter):
    """Stores what each node computes."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["val"] = result
        return result
