"""Code that rests on sizes of one call is not run on others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import sympy
import torch
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sp_compile import codegen, compat
from sp_compile.program import Program
from tests.passes.graphs import after


def doubled(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    return 2 * inputs_embeds


class Generated:
    """Stands for Inductor: each code notes that it ran, and fits only the sizes it was generated for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[int] = []
        monkeypatch.setattr(codegen, "compile_graph", self._compile)
        monkeypatch.setattr(codegen, "_guards", lambda env: [sympy.Eq(self._symbol, self._hint)])

    def _compile(self, gm: Any, inputs: Any, tracing: Any, differentiable: bool) -> Any:
        size = next(each for each in inputs if isinstance(each, torch.SymInt))
        self._symbol, self._hint = size.node.expr, int(size.node.hint)
        return lambda *_, hint=self._hint: self.ran.append(hint)


def test_code_is_generated_anew_for_sizes_that_it_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    generated, asked = Generated(monkeypatch), []

    def build(sizes: Mapping[str, int]) -> Program:
        asked.append(sizes["tokens"])
        program = after("lower_redistributes", doubled)
        program.hints = sizes
        _localize(program)
        return program

    captured = after("localize_shapes", doubled)
    local = codegen.LocalProgram(captured, build, "inductor")
    length = int(captured.symbols["tokens"].node.hint)
    for tokens in (length, 50, length, 60, 50):
        local([], {"tokens": tokens, "shard_length": tokens})
    assert generated.ran == [length, 50, length, 60, 50]
    assert asked == [50, 60]
    assert local.compiles == 3


def test_code_that_does_not_fit_its_first_call_is_not_run(monkeypatch: pytest.MonkeyPatch):
    generated = Generated(monkeypatch)

    def build(sizes: Mapping[str, int]) -> Program:
        program = after("lower_redistributes", doubled)
        program.hints = sizes
        _localize(program)
        return program

    local = codegen.LocalProgram(after("localize_shapes", doubled), build, "inductor")
    local([], {"tokens": 1234, "shard_length": 617})
    assert generated.ran == [1234]


def _localize(program: Program) -> None:
    from sp_compile.passes.localize_shapes import LocalizeShapes

    LocalizeShapes().run(program)


def test_code_on_disk_is_that_of_these_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    """Forward and backward of a graph, compiled by the sources of now, again, and by those of another version."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert len(compat.sources()) == 64
    weight, found = torch.nn.Parameter(torch.randn(8, 8)), []
    for version in ("1", "1", "2"):
        monkeypatch.setattr(compat, "sources", lambda version=version: version)
        torch._dynamo.reset()
        counters.clear()
        mode = FakeTensorMode(shape_env=ShapeEnv())
        inputs = [mode.from_tensor(torch.randn(3, 8)), mode.from_tensor(weight)]
        gm = torch.fx.symbolic_trace(lambda x, w: (x @ w).sin())
        run = compat.compile_graph(gm, inputs, tracing(TracingContext(mode)), True)
        run(torch.randn(3, 8), weight).sum().backward()
        found.append((counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]))
    assert found == [(2, 0), (0, 2), (2, 0)]
