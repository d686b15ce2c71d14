"""One captured graph of a model: its programs, the code that runs them, and what is known about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx

from sp_compile import costs, cuda_graphs, needs, ops
from sp_compile.codegen import LocalProgram
from sp_compile.cuts import Cuts
from sp_compile.errors import CacheError, StrategyError
from sp_compile.isolation import Isolation, find_isolation
from sp_compile.layout import TokenLayout
from sp_compile.ledger import Window
from sp_compile.masks import attention_rows
from sp_compile.pipeline import PassStep, build_pipeline, run_pipeline
from sp_compile.placements import Shard
from sp_compile.program import Program, placement
from sp_compile.report import Choice, Report, make_report
from sp_compile.requests import request_inputs
from sp_compile.strategies import Site, applicable, refused
from sp_compile.strategies.base import Made, unmoved
from sp_compile.work import Work, work_of


class Kind(NamedTuple):
    """What sets the programs of one captured graph apart.

    Attributes:
        isolated, cached, cache_dtype, outputs, counted, short, strategies: as in
            :class:`~sp_compile.program.Program`.
    """

    isolated: bool = False
    cached: str = ""
    cache_dtype: torch.dtype | None = None
    outputs: str = "full"
    counted: bool = False
    short: bool = False
    strategies: tuple[str, ...] = ()


ANALYSED = ("normalize", "raise_attention", "isolate_requests", "shard_tokens", "propagate_placements")


@dataclass(frozen=True)
class Step:
    """What a running forward knows.

    Attributes:
        layout: who holds which rows.
        index_inputs: those of this rank.
        promised: the requests must be kept apart.
        isolated: by the pass ``isolate_requests``, since the model does not.
        cached: as in :class:`~sp_compile.program.Program`; the layout then is that of the new tokens.
        rows: tokens of each request, those of earlier calls included; None for the layout's.
        held, windows: the tensors of the cache on this rank, and how far back each is seen.
        cache_dtype, outputs, counted, short, strategies: as in :class:`~sp_compile.program.Program`.
        asked: gives the strategies that are asked for so many attentions, where some are ``auto``.
    """

    layout: TokenLayout
    index_inputs: Mapping[str, torch.Tensor]
    promised: bool
    isolated: bool = False
    cached: str = ""
    rows: tuple[int, ...] | None = None
    held: Sequence[torch.Tensor] = ()
    windows: Sequence[Window] = ()
    cache_dtype: torch.dtype | None = None
    outputs: str = "full"
    counted: bool = False
    short: bool = False
    strategies: tuple[str, ...] = ()
    asked: Callable[[int], Sequence[str]] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each request in the whole graph's view."""
        return self.layout.lengths if self.rows is None else self.rows

    @property
    def apart(self) -> bool:
        """Whether no request of the layout sees another."""
        return self.promised or len(self.layout.lengths) == 1

    @property
    def kind(self) -> Kind:
        """What program of a graph the step runs."""
        return Kind(*(getattr(self, each) for each in Kind._fields))

    def sizes(self) -> dict[str, int]:
        """True values of the sizes that are symbols."""
        found = {"tokens": sum(self.lengths), "shard_length": self.layout.shard_length}
        if self.cached:
            found |= {"new_tokens": self.layout.tokens, "kept": self.index_inputs["kept_rows"].numel()}
        sizes = {"held_index": "slots", "held_runs": "runs", "picked_queries": "queries", "picked_past": "past",
                 "fetch_rows": "sent", "fetched_rows": "fetched"}  # fmt: skip
        for name, each in self.index_inputs.items():
            what, _, number = name.rpartition("_")
            if what in sizes:
                found[f"{sizes[what]}_{number}"] = len(each)
            elif what == "fetch_counts":
                found[f"sent_rows_{number}"] = int(each[0].sum())
        return found


@dataclass(frozen=True)
class Kept:
    """What a forward gives back for its cache.

    Attributes:
        tensors: keys and values to keep.
        windows, query_bytes: as :attr:`~sp_compile.program.Program.kept` and ``query_bytes``.
    """

    tensors: Sequence[torch.Tensor] = ()
    windows: Sequence[Window] = ()
    query_bytes: Mapping[Window, int] = field(default_factory=dict)


def index_inputs(layout: TokenLayout, rank: int, rows: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The index inputs of a rank, on the host.

    Args:
        rows: int64 ``[tokens]``, numbers of the layout's tokens in the whole graph's row, where that has more.
    """
    local, gathered = layout.local_index[rank], layout.local_index.reshape(-1)
    return {
        "local_index": local if rows is None else rows[local],
        "local_valid": layout.valid[rank],
        "gathered_index": gathered if rows is None else rows[gathered],
        "gathered_valid": layout.valid.reshape(-1),
        "restore_index": layout.restore_index,
        "rank": torch.tensor(rank),
    }


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


@dataclass
class Analysis:
    """What is known of a graph, with its requests isolated or not, and the mixes of lengths that were checked."""

    isolation: Isolation
    names: list[str]
    program: Program
    apart: set[tuple[tuple[int, ...], bool]] = field(default_factory=set)
    _refused: dict[bool, list[dict[str, str]]] = field(default_factory=dict)
    _attentions: dict[bool, list[costs.Attention]] = field(default_factory=dict)

    def attentions(self, counted: bool) -> list[costs.Attention]:
        """What decides by which strategies the attentions run, read once.

        Args:
            counted: as in :class:`~sp_compile.program.Program`.
        """
        if counted not in self._attentions:
            self.program.counted = counted
            cuts, made = Cuts(self.program, self.program.operations_per_byte), Made()
            sites = [Site(self.program, each, made) for each in ops.attention_nodes(self.program.graph)]
            self._attentions[counted] = [_described(each, cuts) for each in sites]
            self._refused[counted] = [refused(each) for each in sites]
        return self._attentions[counted]

    def refused(self, counted: bool) -> list[dict[str, str]]:
        """The strategies that each attention cannot run by, and why."""
        self.attentions(counted)
        return self._refused[counted]


def _described(site: Site, cuts: Cuts) -> costs.Attention:
    q, k, v = (each.meta["val"] for each in site.args[:3])
    sources = [unmoved(each) for each in (site.args.k, site.args.v)]
    spread = [*dict.fromkeys(each for each in sources if placement(each) == Shard(2))]
    return costs.Attention(
        reach=site.reach,
        heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        dims=int(k.shape[3] + v.shape[3]),
        itemsize=k.element_size(),
        crossing=cuts.price(spread) if spread else 0.0,
        applicable=tuple(applicable(site)),
    )


def _choices(
    attentions: Sequence[costs.Attention],
    ran_by: Sequence[str],
    reasons: Sequence[dict[str, str]],
    found: Mapping[costs.Attention, Mapping[str, costs.Predicted]],
) -> Iterator[Choice]:
    """What each strategy would take, and why others cannot run, attentions of a kind together."""
    kinds: dict[tuple[costs.Attention, str], list[int]] = {}
    for i, kind in enumerate(zip(attentions, ran_by, strict=True)):
        kinds.setdefault(kind, []).append(i)
    for (attention, name), numbers in kinds.items():
        by_time = sorted(found[attention].items(), key=lambda each: each[1].seconds)
        yield Choice(numbers, name, {each: taken.seconds for each, taken in by_time}, reasons[numbers[0]])


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
        if (lengths, growing) not in analysis.apart:
            analysis.isolation.check(self._named(analysis), lengths, growing)
            if analysis.isolation.lasting:
                analysis.apart.add((lengths, growing))

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
        choices = _choices(attentions, ran_by, analysis.refused(step.counted), found)
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
            program = self._capture(2)
            program.isolated = isolated
            names = [node.name for node in program.graph.find_nodes(op="placeholder")]
            run_pipeline(program, build_pipeline(ANALYSED), verify=False)
            on_meta = any(_is_meta(node) for node in program.graph.find_nodes(op="placeholder"))
            isolation = find_isolation(program, torch.device("cpu") if on_meta else None)
            self._analyses[isolated] = Analysis(isolation, names, program)
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


def _is_meta(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_meta
