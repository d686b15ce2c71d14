"""One captured graph of a model: its programs, the code that runs them, and what is known about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sp_compile.codegen import LocalProgram
from sp_compile.isolation import Isolation, find_isolation
from sp_compile.layout import TokenLayout
from sp_compile.masks import attention_rows
from sp_compile.pipeline import PassStep, build_pipeline, run_pipeline
from sp_compile.program import Program
from sp_compile.report import Report, make_report
from sp_compile.requests import request_inputs

ANALYSED = ("normalize", "raise_attention", "isolate_requests", "shard_tokens", "propagate_placements")


@dataclass(frozen=True)
class Step:
    """What a running forward knows.

    Attributes:
        layout: who holds which rows.
        index_inputs: those of this rank.
        promised: the requests must be kept apart.
        isolated: by the pass ``isolate_requests``, since the model does not.
    """

    layout: TokenLayout
    index_inputs: Mapping[str, torch.Tensor]
    promised: bool
    isolated: bool = False


@dataclass
class Variant:
    """A program of the graph, as the model is or with its requests isolated."""

    program: Program
    steps: list[PassStep]
    local: LocalProgram
    index_names: list[str]


@dataclass
class Analysis:
    """What is known of a variant, and the mixes of lengths that were checked."""

    isolation: Isolation
    names: list[str]
    apart: set[tuple[int, ...]] = field(default_factory=set)


class Compiled:
    """A captured graph, ready to run: as it is, and with its requests isolated once that is needed.

    Args:
        build: makes the program, isolated or not, for code that rests on certain sizes.
        agree: makes the program first, in agreement with the other ranks.
        capture: captures the same graph for a number of ranks, to be analysed.
        codegen: ``inductor`` or ``eager``.
    """

    def __init__(
        self,
        build: Callable[[bool, Mapping[str, int]], Program],
        agree: Callable[[bool], tuple[Program, list[PassStep]]],
        capture: Callable[[int], Program],
        codegen: str,
    ) -> None:
        self._build, self._agree, self._capture, self._codegen = build, agree, capture, codegen
        self._inputs: Sequence[Any] = ()
        self._original: Mapping[str, Any] = {}
        self._variants: dict[bool, Variant] = {}
        self._analyses: dict[bool, Analysis] = {}

    @property
    def compiles(self) -> int:
        """How many times code was generated."""
        return sum(each.local.compiles for each in self._variants.values())

    def remember(self, inputs: Sequence[Any], original: Mapping[str, Any] | None = None) -> None:
        """Keep the inputs of this call for the analysis; ``original`` replaces those that hold no data."""
        self._inputs, self._original = inputs, original or {}

    def check_apart(self, step: Step) -> None:
        """Check that requests are kept apart where that is promised, once per mix of lengths if that is enough.

        Raises:
            RequestsMixedError: they are not.
        """
        lengths = step.layout.lengths
        if not step.promised or len(lengths) == 1:
            return
        analysis = self._analysis(step.isolated)
        if lengths not in analysis.apart:
            analysis.isolation.check(self._named(analysis), lengths)
            if analysis.isolation.lasting:
                analysis.apart.add(lengths)

    def variant(self, isolated: bool) -> Variant:
        """The program, made at the first call."""
        if isolated not in self._variants:
            program, steps = self._agree(isolated)
            local = LocalProgram(program, lambda sizes: self._build(isolated, sizes), self._codegen)
            placeholders = program.graph.find_nodes(op="placeholder")
            names = [node.meta["index_input"] for node in placeholders if "index_input" in node.meta]
            self._variants[isolated] = Variant(program, steps, local, names)
        return self._variants[isolated]

    def run(self, inputs: Sequence[Any], step: Step) -> Any:
        """Run the local graph on the model's inputs and the step's."""
        variant = self.variant(step.isolated)
        index_inputs = dict(step.index_inputs)
        if step.isolated:
            index_inputs |= request_inputs(step.layout.lengths, index_inputs["rank"].device)
        sizes = {"tokens": step.layout.tokens, "shard_length": step.layout.shard_length}
        return variant.local([*inputs, *(index_inputs[name] for name in variant.index_names)], sizes)

    def report(self, step: Step) -> Report:
        """What the last call ran."""
        variant, analysis = self.variant(step.isolated), self._analysis(step.isolated)
        inputs = {**self._named(analysis), **request_inputs(step.layout.lengths)}
        rows = attention_rows(analysis.isolation.masks, inputs, step.layout.tokens)
        return make_report(variant.program, variant.steps, step.layout, rows)

    def _named(self, analysis: Analysis) -> dict[str, Any]:
        named = dict(zip(analysis.names, self._inputs, strict=True))
        return named | {name: value for name, value in self._original.items() if name in named}

    def _analysis(self, isolated: bool) -> Analysis:
        if isolated not in self._analyses:
            program = self._capture(2)
            program.isolated = isolated
            names = [node.name for node in program.graph.find_nodes(op="placeholder")]
            run_pipeline(program, build_pipeline(ANALYSED), verify=False)
            on_meta = any(_is_meta(node) for node in program.graph.find_nodes(op="placeholder"))
            isolation = find_isolation(program, torch.device("cpu") if on_meta else None)
            self._analyses[isolated] = Analysis(isolation, names)
        return self._analyses[isolated]


def _is_meta(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_meta
