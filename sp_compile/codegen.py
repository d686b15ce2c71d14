"""From the local graph to something that runs: Inductor code, or the graph itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor

from sp_compile.compat import compile_graph
from sp_compile.gradients import with_derivatives
from sp_compile.program import Program

Variant = tuple[list[Any], dict[str, sympy.Symbol], Callable[..., Any]]  # guards, symbols, code


class LocalProgram:
    """Runs a program's local graph, compiled at the first call.

    Compiled code may rest on guards over the sizes that were symbols (tokens, rows per rank, tiles). They are evaluated
    with the true sizes of each call: where one does not hold, the graph is compiled again for those sizes.

    Args:
        build: makes the program for other sizes.
        codegen: ``inductor`` or ``eager``.
        finish: makes of the local graph what is to run.
    """

    def __init__(
        self,
        program: Program,
        build: Callable[[Mapping[str, int]], Program],
        codegen: str,
        finish: Callable[[fx.GraphModule], fx.GraphModule] = lambda gm: gm,
    ) -> None:
        self._build, self._finish = build, finish
        self._codegen = codegen
        self._variants: list[Variant] = []
        self._fresh: Program | None = program
        self.compiles = 0

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
        if self._codegen == "eager":
            return [], symbols, gm
        mode = next(each.fake_mode for each in program.local_inputs if isinstance(each, FakeTensor))
        run = compile_graph(gm, program.local_inputs, tracing(TracingContext(mode)), program.differentiable)
        return _guards(mode.shape_env), symbols, run


def _guards(shape_env: Any) -> list[Any]:
    """Conditions on symbols that tracing and code generation relied on."""
    found = [guard.expr for guard in shape_env.guards]
    return found + [sympy.Eq(symbol, value) for symbol, value in shape_env.replacements.items()]


def _hold(guards: list[Any], symbols: Mapping[str, sympy.Symbol], sizes: Mapping[str, int]) -> bool:
    values = {symbol: sizes[name] for name, symbol in symbols.items() if name in sizes}
    found = [guard.xreplace(values) if hasattr(guard, "xreplace") else guard for guard in guards]
    # what still depends on data is asserted in the code itself
    return all(bool(each) for each in found if not getattr(each, "free_symbols", None))
