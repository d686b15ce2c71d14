"""One captured graph of a model: its program, the code that runs it, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sp_compile.codegen import LocalProgram
from sp_compile.isolation import Isolation, find_isolation
from sp_compile.layout import TokenLayout
from sp_compile.masks import attention_rows
from sp_compile.pipeline import PassStep, build_pipeline, run_pipeline
from sp_compile.program import Program
from sp_compile.report import Report, make_report

ANALYSED = ("normalize", "raise_attention", "shard_tokens", "propagate_placements")


@dataclass
class Step:
    """What a running forward knows: its layout, the index inputs of this rank, and whether ``pack`` made the batch."""

    layout: TokenLayout
    index_inputs: dict[str, torch.Tensor]
    packed: bool


class Compiled:
    """A program that went through the pipeline, ready to run.

    Args:
        program, steps: the rewritten program and what each pass did.
        build: makes the program anew with these sizes, for code that rests on others.
        capture: captures the same graph for a number of ranks, to be analysed.
        codegen: ``inductor`` or ``eager``.
    """

    def __init__(
        self,
        program: Program,
        steps: list[PassStep],
        build: Callable[[Mapping[str, int]], Program],
        capture: Callable[[int], Program],
        codegen: str,
    ) -> None:
        self.program = program
        self.steps = steps
        self.local = LocalProgram(program, build, codegen)
        self._capture = capture
        self._inputs: dict[str, Any] = {}
        self._apart: set[tuple[int, ...]] = set()
        placeholders = program.graph.find_nodes(op="placeholder")
        self._index_names = [node.meta["index_input"] for node in placeholders if "index_input" in node.meta]
        self._kept = [
            (i, node.name)
            for i, node in enumerate(placeholders)
            if "index_input" not in node.meta and not node.meta.get("weight")
        ]

    def remember(self, inputs: Sequence[Any], original: Mapping[str, Any] | None = None) -> None:
        """Keep the model's inputs of this call for the report; ``original`` replaces those that hold no data."""
        self._inputs = {name: inputs[i] for i, name in self._kept}
        self._inputs |= {name: value for name, value in (original or {}).items() if name in self._inputs}

    def check_apart(self, step: Step) -> None:
        """Check once per mix of lengths that a batch from ``pack`` keeps its requests apart.

        Raises:
            RequestsMixedError: it does not.
        """
        lengths = step.layout.lengths
        if step.packed and len(lengths) > 1 and lengths not in self._apart:
            self._isolation.check(self._inputs, lengths)
            self._apart.add(lengths)

    def run(self, inputs: Sequence[Any], step: Step) -> Any:
        """Run the local graph on the model's inputs and the step's."""
        sizes = {"tokens": step.layout.tokens, "shard_length": step.layout.shard_length}
        return self.local([*inputs, *(step.index_inputs[name] for name in self._index_names)], sizes)

    def report(self, layout: TokenLayout) -> Report:
        """What the last call ran."""
        rows = attention_rows(self._isolation.masks, self._inputs, layout.tokens)
        return make_report(self.program, self.steps, layout, rows)

    @cached_property
    def _isolation(self) -> Isolation:
        program = self._capture(2)
        run_pipeline(program, build_pipeline(ANALYSED), verify=False)
        on_meta = any(isinstance(each, torch.Tensor) and each.is_meta for each in self._real())
        return find_isolation(program, torch.device("cpu") if on_meta else None)

    def _real(self) -> list[Any]:
        return [node.meta.get("val") for node in self.program.graph.find_nodes(op="placeholder")]
