"""One captured graph of a model: its programs, the code that runs them, and what is known about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from sp_compile import costs, cuda_graphs, needs
from sp_compile.analysis import Analysis, analyse, choices_of
from sp_compile.codegen import LocalProgram
from sp_compile.errors import CacheError, StrategyError
from sp_compile.layout import TokenLayout
from sp_compile.masks import attention_rows
from sp_compile.pipeline import PassStep
from sp_compile.program import Program
from sp_compile.report import Report, make_report
from sp_compile.requests import request_inputs
from sp_compile.steps import Kept, Kind, Step
from sp_compile.work import Work, work_of


@dataclass
class Variant:
    """A program of the graph: as the model is, with its requests isolated, with a cache."""

    program: Program
    steps: list[PassStep]
    local: LocalProgram
    index_names: list[str]
    measured: dict[str, tuple[int, int]]  # symbols that are the size of an input of the model: which, and its dim

    def completed(self, step: Step) -> Step:
        """The step with the index inputs of what this program fetches.

        Raises:
            StrategyError: nothing is to be exchanged, and a request is on several ranks.
        """
        if "local" in self.program.ran_by and not (step.apart and needs.whole_on_ranks(step.layout)):
            raise StrategyError(
                "strategy local exchanges nothing, but requests of this batch lie on several ranks or may see each "
                "other; use scheme='whole' and short requests from pack, or attention='fetch'"
            )
        if not self.program.fetches:
            return step
        rank = int(step.index_inputs["rank"])
        found = needs.index_inputs(step.layout, rank, self.program.fetches, step.apart)
        device = step.index_inputs["rank"].device
        moved = {name: each if "counts" in name else each.to(device) for name, each in found.items()}
        return replace(step, index_inputs={**step.index_inputs, **moved})

    def sizes(self, step: Step, inputs: Sequence[Any]) -> dict[str, int]:
        """True values of the sizes that are symbols."""
        return {name: int(inputs[i].shape[dim]) for name, (i, dim) in self.measured.items()} | step.sizes()


@dataclass(frozen=True)
class Ready:
    """A program's local graph with its inputs; a call runs it.

    Attributes:
        variant: the program.
        inputs: of the local graph.
        sizes: true values of the sizes that are symbols.
    """

    variant: Variant
    inputs: list[Any]
    sizes: Mapping[str, int]

    def __call__(self) -> list[Any]:
        return list(self.variant.local(self.inputs, self.sizes))


class Compiled:
    """A captured graph, ready to run: as it is, and with its requests isolated or with a cache once that is needed.

    Args:
        build: makes the program of a :attr:`Step.kind`, for code that rests on certain sizes.
        agree: makes the program first, in agreement with the other ranks.
        capture: captures the same graph for a number of ranks, to be analysed.
        predict: what an attention takes by each strategy, for a layout and whether its requests are apart.
        codegen, finish: as of :class:`~sp_compile.codegen.LocalProgram`.
        graphs: what replays steps of decoding; None where nothing does.
    """

    def __init__(
        self,
        build: Callable[[Kind, Mapping[str, int]], Program],
        agree: Callable[[Kind], tuple[Program, list[PassStep]]],
        capture: Callable[[int], Program],
        predict: Callable[[TokenLayout, costs.Attention, bool], dict[str, costs.Predicted]],
        codegen: str,
        finish: Callable[[fx.GraphModule], fx.GraphModule],
        graphs: Callable[[], cuda_graphs.Graphs] | None,
    ) -> None:
        self._build, self._agree, self._capture, self._predict = build, agree, capture, predict
        self._codegen, self._finish, self._graphs = codegen, finish, graphs
        self._runs = 0
        self._inputs: Sequence[Any] = ()
        self._original: Mapping[str, Any] = {}
        self._variants: dict[Kind, Variant] = {}
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
        lengths, growing = step.lengths, bool(step.cached)
        if not step.promised or (len(lengths) == 1 and not growing):
            return
        analysis = self._analysis(step.isolated)
        if (lengths, growing) not in analysis.checked:
            analysis.isolation.check(self._named(analysis), lengths, growing)
            if analysis.isolation.lasting:
                analysis.checked.add((lengths, growing))

    def variant(self, kind: Kind) -> Variant:
        """The program, made at the first call."""
        if kind not in self._variants:
            program, steps = self._agree(kind)
            graphs = cuda_graphs.replayable(program, self._graphs)
            build = partial(self._build, kind)
            local = LocalProgram(program, build, self._codegen, graphs, self._finish)
            placeholders = program.graph.find_nodes(op="placeholder")
            names = [node.meta["index_input"] for node in placeholders if "index_input" in node.meta]
            self._variants[kind] = Variant(program, steps, local, names, _measured(program))
        return self._variants[kind]

    def run(self, inputs: Sequence[Any], step: Step) -> tuple[list[Any], Kept]:
        """Run the local graph: the model's outputs, and the keys and values to keep."""
        self._runs += 1
        ready = self.ready(inputs, step)
        found, program = ready(), ready.variant.program
        ours = len(found) - len(program.kept)
        return list(found[:ours]), Kept(found[ours:], program.kept, program.query_bytes)

    def ready(self, inputs: Sequence[Any], step: Step) -> Ready:
        """The local graph for a step with all that it takes, to be run."""
        variant, step = self._prepared(step)
        if step.held and variant.program.kept != tuple(step.windows):
            raise CacheError(
                "the cache was filled by a forward whose layers keep other windows than those of this one; pass the "
                "requests in the same form in every call, or make another cache"
            )
        device = step.index_inputs["rank"].device
        indices = {"seed": torch.tensor(self._runs, device=device)} if "seed" in variant.index_names else {}
        indices |= {**step.index_inputs, **{f"held_{i}": each for i, each in enumerate(step.held)}}
        if step.isolated:
            indices |= request_inputs(step.lengths, device)
        given = [*inputs, *(indices[name] for name in variant.index_names)]
        return Ready(variant, given, variant.sizes(step, inputs))

    def report(self, step: Step) -> Report:
        """What the last call ran."""
        (variant, step), analysis = self._prepared(step), self._analysis(step.isolated)
        inputs = {**self._named(analysis), **request_inputs(step.lengths)}
        rows = attention_rows(analysis.isolation.masks, inputs, sum(step.lengths))
        if step.cached:
            rows = rows[step.index_inputs["new_rows"].cpu().numpy()]
        sizes = variant.sizes(step, self._inputs)
        report = make_report(variant.program, variant.steps, step.layout, rows, sizes, variant.local.replayed)
        spread = variant.program.parallel and step.layout.sp > 1 and not step.cached
        attentions, ran_by = analysis.attentions(step.counted), variant.program.ran_by
        if not spread or len(ran_by) != len(attentions):
            return report
        found = {each: self._predict(step.layout, each, step.apart) for each in {*attentions}}
        ran = [found[each].get(name) for each, name in zip(attentions, ran_by, strict=True)]
        choices = choices_of(attentions, ran_by, analysis.refused(step.counted), found)
        return replace(report, bytes_by_formula=self._bytes(ran, variant.program, step), choices=list(choices))

    def _bytes(self, ran: Sequence[costs.Predicted | None], program: Program, step: Step) -> int | None:
        """Bytes that attentions, as they ran, and outputs bring to a rank."""
        known = [each.bytes_in for each in ran if each is not None]
        outputs = (step.layout.sp - 1) * step.layout.shard_length * self.work(step).outputs
        return round(sum(known) + (outputs if program.outputs == "full" else 0)) if len(known) == len(ran) else None

    def work(self, step: Step) -> Work:
        """What the graph computes for a token."""
        analysis = self._analysis(step.isolated)
        return work_of(analysis.program, analysis.attentions(step.counted), step.apart)

    def _prepared(self, step: Step) -> tuple[Variant, Step]:
        """The program for a step, and the step with all that it needs."""
        if step.asked is not None and not step.cached:
            attentions = self._analysis(step.isolated).attentions(step.counted)
            best = costs.fastest(step.layout, attentions, step.apart, self._predict)
            asked = step.asked(len(attentions))
            chosen = (each if wanted == "auto" else "" for each, wanted in zip(best, asked, strict=True))
            step = replace(step, strategies=tuple(chosen))
        variant = self.variant(step.kind)
        return variant, variant.completed(step)

    def _named(self, analysis: Analysis) -> dict[str, Any]:
        named = dict(zip(analysis.names, self._inputs, strict=True))
        return named | {name: value for name, value in self._original.items() if name in named}

    def _analysis(self, isolated: bool) -> Analysis:
        if isolated not in self._analyses:
            self._analyses[isolated] = analyse(self._capture(2), isolated)
        return self._analyses[isolated]


def _measured(program: Program) -> dict[str, tuple[int, int]]:
    """The symbols of the local graph that are the size of an input, by name."""
    found: dict[str, tuple[int, int]] = {}
    names = {size.node.expr: name for name, size in program.symbols.items()}
    for i, node in enumerate(program.graph.find_nodes(op="placeholder")):
        value = node.meta.get("val")
        if "index_input" not in node.meta and isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and size.node.expr in names:
                    found.setdefault(names[size.node.expr], (i, dim))
    return found
