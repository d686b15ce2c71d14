"""From the local graph to something that runs: Inductor code, or the graph itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import sympy
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor

from sp_compile.compat import compile_graph
from sp_compile.cuda_graphs import Graphs, Replaying, note
from sp_compile.gradients import with_derivatives
from sp_compile.host_part import split
from sp_compile.program import Program

Variant = tuple[list[Any], dict[str, sympy.Symbol], Callable[..., Any]]  # guards, symbols, code


class LocalProgram:
    """Runs a program's local graph, compiled at the first call.

    Compiled code may rest on guards over the sizes that were symbols (tokens, rows per rank, tiles). They are evaluated
    with the true sizes of each call: where one does not hold, the graph is compiled again for those sizes.

    Args:
        program: what runs.
        build: makes it anew, for code that rests on certain sizes.
        codegen: ``inductor`` or ``eager``.
        graphs: what replays steps; None where all are run.
        finish: makes of the local graph what is to run.
    """

    def __init__(
        self,
        program: Program,
        build: Callable[[Mapping[str, int]], Program],
        codegen: str,
        graphs: Callable[[], Graphs] | None = None,
        finish: Callable[[fx.GraphModule], fx.GraphModule] = lambda gm: gm,
    ) -> None:
        self._program = program
        self._build, self._finish = build, finish
        self._codegen = codegen
        self._graphs = graphs
        self._variants: list[Variant] = []
        self._fresh: Program | None = program
        self.compiles = 0

    @property
    def replayed(self) -> tuple[int, int] | None:
        """CUDA graphs that there are, and how many steps were replayed; None where none can be."""
        found = [run.recorder for *_, run in self._variants if isinstance(run, Replaying)]
        return None if self._graphs is None else (sum(map(len, found)), sum(each.replays for each in found))

    def __call__(self, inputs: list[Any], sizes: Mapping[str, int]) -> Any:
        """Run on real inputs; ``sizes`` are the true values of the program's symbols."""
        for guards, symbols, run in self._variants:
            if _hold(guards, symbols, sizes):
                return run(*inputs)
        return self._compile(sizes)(*inputs)

    def _compile(self, sizes: Mapping[str, int]) -> Callable[..., Any]:
        fresh, self._fresh = self._fresh, None
        variant = self._generate(fresh if fresh is not None else self._build(sizes))
        if not _hold(*variant[:2], sizes):  # traced for other sizes
            variant = self._generate(self._build(sizes))
            assert _hold(*variant[:2], sizes), "code generated for these sizes fits them"
        self._variants.append(variant)
        return variant[2]

    def _generate(self, program: Program) -> Variant:
        self.compiles += 1
        assert program.local_inputs is not None
        symbols = {name: size.node.expr for name, size in program.symbols.items()}
        gm = self._finish(with_derivatives(program.gm) if program.differentiable else program.gm)
        parts = None if self._graphs is None else split(gm)
        guards, gm = list[Any](), gm if parts is None else parts.device
        run: Callable[..., Any] = gm
        if self._codegen != "eager":
            mode = next(each.fake_mode for each in program.local_inputs if isinstance(each, FakeTensor))
            inputs = program.local_inputs if parts is None else parts.examples(program.local_inputs, mode)
            run = compile_graph(gm, inputs, tracing(TracingContext(mode)), program.differentiable)
            guards = _guards(mode.shape_env)
        if parts is not None and self._graphs is not None:
            run = Replaying(program, parts, run, self._graphs(), partial(note, self._program))
        return guards, symbols, run


def _guards(shape_env: Any) -> list[Any]:
    """Conditions on symbols that tracing and code generation relied on."""
    found = [guard.expr for guard in shape_env.guards]
    return found + [sympy.Eq(symbol, value) for symbol, value in shape_env.replacements.items()]


def _hold(guards: list[Any], symbols: Mapping[str, sympy.Symbol], sizes: Mapping[str, int]) -> bool:
    values = {symbol: sizes[name] for name, symbol in symbols.items() if name in sizes}
    found = [guard.xreplace(values) if hasattr(guard, "xreplace") else guard for guard in guards]
    # what still depends on data is asserted in the code itself
    return all(bool(each) for each in found if not getattr(each, "free_symbols", None))
